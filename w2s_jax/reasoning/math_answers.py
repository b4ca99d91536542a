"""Final answers by value: numbers and units exactly, expressions by their values at points.

What may hang (sympy) runs without time limits of its own; `grading.py` gives it a process.
"""

import re
from dataclasses import dataclass

from w2s_jax.reasoning.answer_forms import form, quantity
from w2s_jax.reasoning.answer_text import clean, final_answer
from w2s_jax.reasoning.expressions import expression_form
from w2s_jax.reasoning.quantities import near, same_amount

_CHOICE = re.compile(r"[(\[]?([A-Z])[)\]]?(?:[.):]\s.*)?", re.DOTALL)
_SMALL_CHOICE = re.compile(r"[(\[]([a-h])[)\]]")
_CHOICES = re.compile(r"[(\[{]?\s*([A-Z](?:\s*(?:,|;|&|/|\band\b|\s)\s*[A-Z])+)\s*[)\]}]?")


@dataclass(frozen=True)
class MathChecker:
    r"""Extraction from \boxed{..}, "####", "answer is" and bold, equality by value.

    kind: gsm8k reads "####" before a box; math and olympicarena take which stands last. For
    olympicarena several letters are a multiple choice in any order. `extract` returns clean LaTeX.
    """

    kind: str
    name: str = "math"

    def extract(self, response: str) -> str:
        text = re.split(r"\nQuestion\b", response, maxsplit=1)[0]
        return clean(final_answer(text, hashes_first=self.kind == "gsm8k"))

    def equal(self, prediction: str, gold: str) -> bool:
        """Whether both cast one vote, or differ only in what a question may have told.

        One of them may leave out the unit, "per day" behind money, "%", the base, "mod 7" or
        "p.m."; and a decimal of at least six digits is the number that it rounds. Answers of one
        vote are always equal.
        """
        prediction, gold = clean(prediction), clean(gold)
        if not prediction or not gold:
            return False
        # A choice in brackets may be told in small without them.
        letters = (
            self._letters(prediction, small=gold.startswith("(")),
            self._letters(gold, small=prediction.startswith("(")),
        )
        if letters[0] is not None or letters[1] is not None:
            return letters[0] == letters[1]
        if form(prediction, "voted") == form(gold, "voted"):
            return True
        if _as_typed(prediction, gold) or _as_typed(gold, prediction):
            return True
        told = form(prediction), form(gold)
        bare = form(prediction, "bare"), form(gold, "bare")
        if bare[0] == bare[1] and bare[0] in told:
            return True
        numbers = quantity(prediction), quantity(gold)
        if numbers[0] and numbers[1]:
            return near(numbers[0], numbers[1]) or same_amount(numbers[0], numbers[1])
        # Half of mg is a product where another way to write it is no quantity.
        written = expression_form(prediction) if numbers[0] or numbers[1] else None
        return written is not None and written == expression_form(gold)

    def canonical(self, answer: str) -> str:
        """One form per value: "1000", "-3/4", "1/20 m", "{1,2}" for lists in any order, "A,C" for
        choices; an expression is known by its values at fixed points.
        """  # noqa: D205
        answer = clean(answer)
        letters = self._letters(answer)
        if letters is not None:
            return ",".join(sorted(letters))
        return form(answer, "voted") if answer else ""

    def _letters(self, answer: str, *, small: bool = False) -> frozenset[str] | None:
        several = self.kind == "olympicarena"
        if several and re.fullmatch(r"[A-J]{1,8}", answer):
            return frozenset(answer) if len(set(answer)) == len(answer) else None
        small = small or several
        if _SMALL_CHOICE.fullmatch(answer) or (small and re.fullmatch("[a-f]", answer)):
            answer = answer.upper()
        if one := _CHOICE.fullmatch(answer):
            return frozenset(one[1])
        if several and (found := _CHOICES.fullmatch(answer)):
            return frozenset(re.findall(r"\b[A-Z]\b", found[1]))
        return None


def _as_typed(one: str, other: str) -> bool:
    """Whether one is typed as another answer is read: 60,120 for a list, 12:5 for a time."""
    if re.fullmatch(r"\d+(?:,[1-9]\d{2})+", one):
        listed = form(one.replace(",", ", "), "voted")
        return listed == form(other, "voted") != form(one, "voted")
    return re.fullmatch(r"\d{1,2}:\d", one) is not None and one.replace(":", ":0") == other
