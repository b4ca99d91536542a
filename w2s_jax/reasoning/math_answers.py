"""Final answers by value: numbers and units exactly, everything else by math-verify.

What may hang (sympy) runs without time limits of its own; `grading.py` gives it a process.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from w2s_jax.reasoning.answer_text import (
    after_answer_is,
    after_hashes,
    clean,
    last_box,
    split_top,
)
from w2s_jax.reasoning.quantities import read_quantity, same_quantity, write_value

_CHOICE = re.compile(r"[(\[]?([A-Z])[)\]]?(?:[.):]\s.*)?", re.DOTALL)
_CHOICES = re.compile(r"[(\[{]?\s*([A-Z](?:\s*(?:,|;|&|/|\band\b|\s)\s*[A-Z])+)\s*[)\]}]?")
_ASSIGNED = re.compile(r"\s*[A-Za-z]\w?(?:_\{?\w+\}?)?(?:\(\w\))?\s*=(?!=)\s*([^=<>]+)")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]+")
_MEMBER = re.compile(r"\s*[a-z]\s*\\in(?![a-z])\s*")
_MATRIX = re.compile(r"\\(begin|end)\{[bp]?matrix\}")
_IN_BASE = re.compile(r"(\d{1,200})_\{?(\d{1,2})\}?")
_LONGEST = 2_000  # characters; what is longer is compared as text


@dataclass(frozen=True)
class MathChecker:
    r"""Extraction from "####", \boxed{..} and "answer is", equality by value.

    kind: gsm8k reads "####" first; math and olympicarena take what stands last. For olympicarena
    several letters are a multiple choice in any order. `extract` returns cleaned LaTeX.
    """

    kind: str
    name: str = "math"

    def extract(self, response: str) -> str:
        text = re.split(r"\nQuestion\b", response, maxsplit=1)[0]
        hashes = after_hashes(text)
        if self.kind == "gsm8k" and hashes[0] >= 0:
            return clean(hashes[1])
        place, answer = max(hashes, last_box(text), after_answer_is(text), key=lambda at: at[0])
        return clean(answer) if place >= 0 else ""

    def equal(self, prediction: str, gold: str) -> bool:
        prediction, gold = clean(prediction), clean(gold)
        if not prediction or not gold:
            return False
        choices = self._letters(gold)
        if choices is not None:
            # A capital in brackets is a choice, not a variable, and may be told in small.
            spoken = self.kind == "olympicarena" or gold.startswith("(")
            told = prediction.upper() if spoken and len(prediction) < 4 else prediction
            return self._letters(told) == choices
        if _IN_BASE.fullmatch(gold) or _IN_BASE.fullmatch(prediction):
            return _same_in_base(prediction, gold)
        numbers = read_quantity(_right_side(prediction)), read_quantity(_right_side(gold))
        if numbers[0] and numbers[1]:
            return same_quantity(numbers[0], numbers[1])
        if _text_form(prediction) == _text_form(gold):
            return True
        return verify(prediction, gold)

    def canonical(self, answer: str) -> str:
        """One form per value: "1000", "-3/4", "{1,2}" for lists in any order, "A,C" for choices.

        Units and currencies go, a percentage is its number, x = 5 is 5; expressions are simplified.
        """
        answer = clean(answer)
        letters = self._letters(answer)
        if letters is not None:
            return ",".join(sorted(letters))
        return _canonical(answer)

    def _letters(self, answer: str) -> frozenset[str] | None:
        if self.kind == "olympicarena" and re.fullmatch(r"[A-Z]{1,8}", answer):
            return frozenset(answer) if len(set(answer)) == len(answer) else None
        if self.kind == "olympicarena" and re.fullmatch(r"\(?[a-f]\)?", answer):
            answer = answer.upper()
        if one := _CHOICE.fullmatch(answer):
            return frozenset(one[1])
        if self.kind == "olympicarena" and (several := _CHOICES.fullmatch(answer)):
            return frozenset(re.findall(r"\b[A-Z]\b", several[1]))
        return None


def _right_side(answer: str) -> str:
    answer = _MEMBER.sub("", answer, count=1)
    match = _ASSIGNED.fullmatch(answer)
    return match[1].strip() if match else answer


def _same_in_base(prediction: str, gold: str) -> bool:
    """Equal in value, or in digits where only one names its base: the other's is the question's."""
    pairs = [_IN_BASE.fullmatch(answer) for answer in (prediction, gold)]
    if pairs[0] and pairs[1]:
        values = [_in_base(pair[1], int(pair[2])) for pair in pairs if pair]
        return values[0] is not None and values[0] == values[1]
    digits = [
        pair[1] if pair else answer for pair, answer in zip(pairs, (prediction, gold), strict=True)
    ]
    return digits[0] == digits[1]


def _in_base(digits: str, base: int) -> int | None:
    try:
        return int(digits, base)
    except ValueError:
        return None


def _text_form(answer: str) -> str:
    """Equal for answers that differ in spaces, or in capitals where they are words."""
    answer = _right_side(answer)
    return answer.lower().strip() if _WORDS.fullmatch(answer) else re.sub(r"\s", "", answer)


def _canonical(answer: str) -> str:
    answer = _right_side(answer)
    number = read_quantity(answer)
    if number is not None:
        return write_value(number.value)
    if _WORDS.fullmatch(answer):
        return answer.lower()
    if in_base := _IN_BASE.fullmatch(answer):
        return in_base[1]
    listed = _canonical_list(answer)
    return listed if listed is not None else _simplified(answer)


def _canonical_list(answer: str) -> str | None:
    r"""Sets and bare lists sorted, tuples and intervals in their order; None for anything else."""
    ends = {"(": ")]", "[": ")]"}
    braces = answer.startswith("\\{") and answer.endswith("\\}")
    if braces:
        parts = split_top(answer[2:-2])
    elif len(answer) > 2 and answer[-1] in ends.get(answer[0], "") and _one_bracket(answer):
        parts = split_top(answer[1:-1])
        if parts is None or len(parts) < 2:
            return None
        return answer[0] + ",".join(map(_canonical, parts)) + answer[-1]
    else:
        parts = split_top(re.sub(r"\s*,?\s*\b(?:and|or)\b\s*", ", ", answer).replace(";", ","))
        if parts is not None and len(parts) < 2:
            return None
    if parts is None or not all(parts):
        return None
    return "{" + ",".join(sorted(set(map(_canonical, parts)))) + "}"


def _one_bracket(answer: str) -> bool:
    """Whether the first bracket closes at the very end, as in (1,2) and not in (1,2)u(3,4)."""
    depth = 0
    for index, character in enumerate(answer):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return index == len(answer) - 1
    return False


def _simplified(answer: str) -> str:
    """A sympy expression simplified and written out; where there is none, the answer itself."""
    plain = _MATRIX.sub(r"\\\1{pmatrix}", re.sub(r"\s", "", answer))
    parsed = parse(answer)
    if not parsed or isinstance(parsed[0], str):
        return plain
    import sympy

    if not isinstance(parsed[0], sympy.Expr):
        return plain
    try:
        value = sympy.expand(sympy.simplify(parsed[0].doit()))
        # Euler's number is not the choice E.
        return re.sub(r"\bE\b", "exp(1)", str(value))
    except (TypeError, ValueError, AttributeError, NotImplementedError, ZeroDivisionError):
        return plain


def verify(prediction: str, gold: str) -> bool:
    """math-verify's verdict on two cleaned answers. May take for ever, or all memory."""
    from math_verify import verify as verify_parsed

    # Lists, or it takes a tuple of readings for one answer.
    golds, predictions = list(parse(gold)), list(parse(prediction))
    return bool(verify_parsed(golds, predictions, timeout_seconds=None))


@lru_cache(maxsize=4096)
def parse(answer: str) -> tuple[Any, ...]:
    """What math-verify reads in a cleaned answer; empty where it reads nothing."""
    from math_verify import LatexExtractionConfig
    from math_verify import parse as parse_answer

    if len(answer) > _LONGEST:
        return ()
    found = parse_answer(
        f"\\boxed{{{answer}}}",
        [LatexExtractionConfig(boxed_match_priority=0)],
        parsing_timeout=None,
    )
    return tuple(found)
