r"""Final answers by the rules of the reasoning code that was published with arXiv 2407.13647.

Exactly those rules, their oddities included: "ft" goes from \left too. Verdicts compare strings.
"""

import re
from dataclasses import dataclass

# What stands before the final answer of a response.
MARKERS = {"gsm8k": "####", "math": "The answer is:", "olympicarena": "The answer is:"}

_REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    ("\\%", "%"),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
)
# Taken out one after another, in this order: an earlier one may uncover a later one.
_REMOVED = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units"),
    *("\\ldots", "sue", "points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm"),
    *("pounds", "meters", "meals", "edges", "students", "childrentickets", "multiples"),
    *("\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}"),
    *("\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
)
_UNWRAPPED = (
    (re.compile(r"(.*?)(\$)(.*?)(\$)(.*)"), r"$\3$"),
    (re.compile(r"\\text\{(.*?)\}"), r"\1"),
    (re.compile(r"\\textbf\{(.*?)\}"), r"\1"),
    (re.compile(r"\\overline\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),
)


@dataclass(frozen=True)
class PublishedChecker:
    """The published extraction and normalisation; equal are answers whose strings are.

    kind: gsm8k, math or olympicarena. Answers that `extract` returns are normalised already; gold
    answers are normalised once, as they come.
    """

    kind: str
    name: str = "published"

    def extract(self, response: str) -> str:
        text = response.split("Question")[0].strip()
        found = re.findall(f"{MARKERS[self.kind]} (.*)$", text)
        answer = (found[-1] if found else "") or _number_after_answer_is(text)
        # Wherever the end mark stands, the last four characters go.
        return normalise(answer[:-4] if "</s>" in answer else answer)

    def equal(self, prediction: str, gold: str) -> bool:
        return prediction == normalise(gold)

    def canonical(self, answer: str) -> str:
        return answer


def normalise(answer: str) -> str:
    """The published normal form of a final answer."""
    answer = answer.split("=")[-1]
    for old, new in _REPLACED:
        answer = answer.replace(old, new)
    for old in _REMOVED:
        answer = answer.replace(old, "")
    for pattern, kept in _UNWRAPPED:
        answer = pattern.sub(kept, answer)
    answer = answer.replace("$", "")
    if answer.replace(",", "").isdigit():
        answer = answer.replace(",", "")
    for ending in (".0", ".00", "%"):
        if answer.endswith(ending) and answer[: -len(ending)].isdigit():
            answer = answer[: -len(ending)]
    return answer.lower() if answer.lower() in tuple("abcdefg") else answer


def _number_after_answer_is(text: str) -> str:
    found = re.findall(r"The answer is (.*)$", text)
    numbers = re.findall(r"-?\d+\.?\d*", found[-1].replace(",", "")) if found else []
    return numbers[0].removesuffix(".") if numbers else ""
