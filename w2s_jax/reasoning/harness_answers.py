"""Final answers of GSM8K by lm-evaluation-harness: its two filters and its exact match.

The rules are those of its task `gsm8k`, version 3.0. Imports nothing of the harness.
"""

import re
from dataclasses import dataclass

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
# What the exact match ignores on both sides, in this order.
_IGNORED = (re.compile(","), re.compile(r"\$"), re.compile(r"(?s).*#### "), re.compile(r"\.$"))


@dataclass(frozen=True)
class HarnessChecker:
    """`strict-match`, the first number after "####", or `flexible-extract`, the last number at all.

    Answers that `extract` returns are normalised already; gold answers, bare or with their
    solution, are normalised once.
    """

    flexible: bool = False

    @property
    def name(self) -> str:
        return "harness-flexible" if self.flexible else "harness"

    def extract(self, response: str) -> str:
        if self.flexible:
            found = _FLEXIBLE.findall(response)[-1:]
        else:
            found = [match[1] for match in [_STRICT.search(response)] if match]
        return normalise(found[0].strip()) if found else ""

    def equal(self, prediction: str, gold: str) -> bool:
        return prediction != "" and prediction == normalise(gold)

    def canonical(self, answer: str) -> str:
        return answer


def normalise(answer: str) -> str:
    """A final answer as the harness's exact match compares it."""
    for pattern in _IGNORED:
        answer = pattern.sub("", answer)
    return answer.lower()
