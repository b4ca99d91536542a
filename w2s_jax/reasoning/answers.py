"""Final answers: checkers by name, gold answers, and rows graded in workers that can be killed.

published: the rules of the code published with arXiv 2407.13647, with their oddities ("ft" is
removed from any text). harness: lm-evaluation-harness's task `gsm8k`, version 3.0, without
importing it. math: by value; numbers and units exactly, expressions by their values at points.
Checkers have no time limit and sympy may hang, so grading calls them in workers.
"""

import importlib
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from typing import Any, Protocol, runtime_checkable

from w2s_jax.errors import InputError
from w2s_jax.reasoning.answer_forms import expression_form, form, quantity
from w2s_jax.reasoning.answer_text import (
    after_answer_is,
    after_hashes,
    clean,
    final_answer,
    last_box,
)
from w2s_jax.reasoning.quantities import CURRENCIES, NO_UNIT, Quantity
from w2s_jax.reasoning.workers import Failure, Workers
from w2s_jax.text.rows import Row

# Marks the final answer of a response.
MARKERS = {"gsm8k": "####", "math": "The answer is:", "olympicarena": "The answer is:"}

_REPLACED = (
    *(("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), ("\\%", "%"), (" ", "")),
    *(("mbox", "text"), (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}")),
)
# Removed one after another in this order: removing one may create a later one.
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
class TextChecker:
    """Compares the normal forms of answers as text.

    Answers that `extract` returns are normalised already; gold answers are normalised here, once.

    Attributes:
        name: The checker's name.
        find: Finds the answer in a response, as it is written there; "" if there is none.
        normal: The normal form of an answer.
        empty: Whether an empty answer equals a gold answer with an empty normal form.
    """

    name: str
    find: Callable[[str], str]
    normal: Callable[[str], str]
    empty: bool = False

    def extract(self, response: str) -> str:
        return self.normal(self.find(response))

    def equal(self, prediction: str, gold: str) -> bool:
        return prediction == self.normal(gold) and (self.empty or prediction != "")

    def canonical(self, answer: str) -> str:
        return answer


def _published_answer(response: str, kind: str) -> str:
    """The answer that the published code extracts, for the kind gsm8k, math or olympicarena."""
    text = response.split("Question")[0].strip()
    found = re.findall(f"{MARKERS[kind]} (.*)$", text)
    answer = (found[-1] if found else "") or _number_after_answer_is(text)
    # The published code drops the last four characters, wherever the end mark is.
    return answer[:-4] if "</s>" in answer else answer


def published_form(answer: str) -> str:
    """The published normal form of a final answer."""
    answer = answer.split("=")[-1]
    for old, new in (*_REPLACED, *((removed, "") for removed in _REMOVED)):
        answer = answer.replace(old, new)
    for pattern, kept in _UNWRAPPED:
        answer = pattern.sub(kept, answer)
    answer = answer.replace("$", "")
    whole = answer.replace(",", "")
    answer = whole if whole.isdigit() else answer
    for ending in (".0", ".00", "%"):
        if answer.endswith(ending) and answer[: -len(ending)].isdigit():
            answer = answer[: -len(ending)]
    return answer.lower() if answer.lower() in tuple("abcdefg") else answer


def _number_after_answer_is(text: str) -> str:
    found = re.findall(r"The answer is (.*)$", text)
    numbers = re.findall(r"-?\d+\.?\d*", found[-1].replace(",", "")) if found else []
    return numbers[0].removesuffix(".") if numbers else ""


_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
# Removed from both sides by the exact match, in this order.
_IGNORED = (re.compile(","), re.compile(r"\$"), re.compile(r"(?s).*#### "), re.compile(r"\.$"))


def _harness_answer(response: str, flexible: bool) -> str:
    """`strict-match`: the first number after "####"; `flexible-extract`: the last number."""
    found = _FLEXIBLE.findall(response)[-1:] if flexible else _STRICT.findall(response)[:1]
    return found[0].strip() if found else ""


def _harness_form(answer: str) -> str:
    """A final answer, alone or with its solution, as the harness's exact match compares it."""
    for pattern in _IGNORED:
        answer = pattern.sub("", answer)
    return answer.lower()


# A decimal with at least this many digits equals a number that it only approximates.
_SIGNIFICANT_DIGITS = 6
_CHOICE = re.compile(r"[(\[]?([A-Z])[)\]]?(?:[.):]\s.*)?", re.DOTALL)
_SMALL_CHOICE = re.compile(r"[(\[]([a-h])[)\]]")
_CHOICES = re.compile(r"[(\[{]?\s*([A-Z](?:\s*(?:,|;|&|/|\band\b|\s)\s*[A-Z])+)\s*[)\]}]?")


@dataclass(frozen=True)
class MathChecker:
    r"""Extraction from \boxed{..}, "####", "answer is" and bold text; equality by value.

    `extract` returns clean LaTeX.

    Attributes:
        kind: For gsm8k "####" takes precedence over a box; for math and olympicarena the last of
            both counts. For olympicarena several letters are a multiple choice in any order.
        name: The checker's name.
    """

    kind: str
    name: str = "math"

    def extract(self, response: str) -> str:
        text = re.split(r"\nQuestion\b", response, maxsplit=1)[0]
        return clean(final_answer(text, hashes_first=self.kind == "gsm8k"))

    def equal(self, prediction: str, gold: str) -> bool:
        """Whether both give the same vote, or differ only in what the question may have stated.

        One of them may lack the unit, "per day" after money, "%", the base, "mod 7" or "p.m."; and
        a decimal of at least six digits equals the number that it rounds.
        """
        prediction, gold = clean(prediction), clean(gold)
        if not prediction or not gold:
            return False
        # A choice in brackets may be given in lower case without them.
        letters = self._letters(prediction, small=gold.startswith("("))
        others = self._letters(gold, small=prediction.startswith("("))
        if letters is not None or others is not None:
            return letters == others
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
            return _near(numbers[0], numbers[1]) or _same_amount(numbers[0], numbers[1])
        # m g / 2 reads as milligrams in some notations; then compare it as a product.
        written = expression_form(prediction) if numbers[0] or numbers[1] else None
        return written is not None and written == expression_form(gold)

    def canonical(self, answer: str) -> str:
        """One form per value: "1000", "-3/4", "1/20 m", "{1,2}" for a list, "A,C" for choices.

        Lists have any order. An expression is identified by its values at fixed points.
        """
        answer = clean(answer)
        if (letters := self._letters(answer)) is not None:
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
    """Whether one is a different notation of the other: 60,120 for a list, 12:5 for a time."""
    if re.fullmatch(r"\d+(?:,[1-9]\d{2})+", one):
        listed = form(one.replace(",", ", "), "voted")
        return listed == form(other, "voted") != form(one, "voted")
    return re.fullmatch(r"\d{1,2}:\d", one) is not None and one.replace(":", ":0") == other


def _same_amount(left: Quantity, right: Quantity) -> bool:
    """Whether both are one amount of money, of which one has a rate: $18, $18 per day."""
    few, more = sorted((left.unit.powers, right.unit.powers), key=len)
    rate = len(few) == 1 < len(more) and few[0] in more and few[0][0] in CURRENCIES
    return rate and left.value == right.value


def _near(left: Quantity, right: Quantity) -> bool:
    """Whether one is a decimal of at least _SIGNIFICANT_DIGITS digits that the other rounds to."""
    told = [side for side in (left, right) if side.places is not None]
    units = {side.unit for side in (left, right)} - {NO_UNIT}
    if not told or len(units) > 1:
        return False
    coarse = min(told, key=lambda side: side.places or 0)
    step = Fraction(10) ** -(coarse.places or 0)
    return coarse.digits >= _SIGNIFICANT_DIGITS and abs(left.value - right.value) * 2 <= step


KINDS = ("gsm8k", "math", "olympicarena")
CHECKERS = ("math", "published", "harness", "harness-flexible")
# Other versions read LaTeX incorrectly.
_READ_BY = {"math-verify": "0.9.0", "antlr4-python3-runtime": "4.11.0"}


@runtime_checkable
class Checker(Protocol):
    """Finds and compares final answers."""

    @property
    def name(self) -> str: ...

    def extract(self, response: str) -> str:
        """The final answer of a response in the checker's normal form; "" if there is none."""
        ...

    def equal(self, prediction: str, gold: str) -> bool:
        """Whether an extracted answer equals the gold answer."""
        ...

    def canonical(self, answer: str) -> str:
        """One form for all extracted answers that count as the same vote."""
        ...


def make_checker(name: str, kind: str) -> Checker:
    """A checker by name, for answers of a kind.

    Args:
        name: `math` judges by value and reads LaTeX with math-verify's parser. `published` has the
            rules of the code of arXiv 2407.13647. `harness` and `harness-flexible` are the filters
            of lm-evaluation-harness.
        kind: gsm8k, math or olympicarena.

    Raises:
        InputError: For an unknown name or kind, and for a harness checker of a kind other than
            gsm8k. For `math`, if math-verify or its ANTLR runtime is missing or of another version:
            with another runtime than its parsers were generated for, math-verify silently reads no
            LaTeX.
    """
    _check_kind(kind)
    if name not in CHECKERS:
        raise InputError(f"checker {name!r}: one of {', '.join(CHECKERS)} is needed")
    if name == "published":
        return TextChecker(name, partial(_published_answer, kind=kind), published_form, empty=True)
    if name != "math":
        if kind != "gsm8k":
            raise InputError(f"checker {name} reads gsm8k answers only, not {kind}; take math")
        find = partial(_harness_answer, flexible=name == "harness-flexible")
        return TextChecker(name, find, _harness_form)
    for package, wanted in _READ_BY.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "none"
        if found != wanted:
            raise InputError(
                f"checker math needs {package} {wanted}, and {found} is installed: "
                f"pip install {package}=={wanted}"
            )
    return MathChecker(kind)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise InputError(f"kind of answers {kind!r}: one of {', '.join(KINDS)} is needed")


def gold_answer(solution: str, kind: str) -> str:
    r"""The final answer at the end of a gold solution, as it is written there.

    GSM8K: after the last "####". math and olympicarena: in the last \boxed{..}, or after "The
    answer is:". A single line without any of these is itself the answer.

    Raises:
        InputError: For a solution without a final answer, and an unknown kind.
    """
    _check_kind(kind)
    hashes, box, stated = after_hashes(solution), last_box(solution), after_answer_is(solution)
    marked = (hashes, box, stated) if kind == "gsm8k" else (box, stated, hashes)
    for place, answer in marked:
        if place >= 0 and answer.strip():
            return answer.strip()
    bare = solution.strip()
    if not bare or ("\n" in bare and "\\begin{" not in bare):
        where = "#### " if kind == "gsm8k" else "\\boxed{"
        raise InputError(f'a solution without a final answer (no "{where}..."): {bare[:60]!r}')
    return bare


# --- Grading --------------------------------------------------------------------------------------

Task = tuple[str, ...]
_NUMBER = re.compile(r"-?\d")
_BARE = re.compile(r"[-+\d.,/ ]+")


def grade(
    rows: Sequence[Mapping[str, Any]],
    golds: Mapping[Any, str] | None,
    checker_name: str,
    kind: str,
    *,
    complete: bool = True,
    **limits: Any,
) -> list[Row]:
    """Grade rows by a checker, in workers.

    An answer that hangs, crashes or takes too much memory has the result False (or an empty pred,
    if it happened in extraction) and the reason in "error".

    Args:
        rows: Each with "response", and with "id" if there are golds.
        golds: Gold final answers by a row's id; None to extract only.
        checker_name: A name of `make_checker`, or "module:attribute" of a factory of another
            checker, which is called with the kind.
        kind: Kind of the answers.
        complete: Whether every row must have a gold answer.
        **limits: Those of `Workers`.

    Returns:
        The rows in their order, with "pred" and, if they have a gold answer, "gold" and "result".

    Raises:
        InputError: For a row without a response or gold answer, and as `make_checker` does.
    """
    known = {} if golds is None else golds
    for index, row in enumerate(rows):
        name = f"row {index + 1}" + (f" (id {row['id']!r})" if "id" in row else "")
        if not isinstance(row.get("response"), str):
            raise InputError(f'{name}: no text "response" to grade')
        if golds is not None and complete and row.get("id") not in golds:
            raise InputError(f"{name}: no gold answer has its id")
    wanted = [known.get(row.get("id")) for row in rows]
    with _checking(checker_name, kind, **limits) as pool:
        preds = _run(pool, [("extract", row["response"]) for row in rows])
        texts = ["" if isinstance(pred, Failure) else pred for pred in preds]
        pairs = zip(texts, wanted, strict=True)
        verdicts = iter(_run(pool, [("equal", *pair) for pair in pairs if pair[1] is not None]))
    graded = []
    for row, pred, text, gold in zip(rows, preds, texts, wanted, strict=True):
        found = {name: value for name, value in row.items() if name != "error"} | {"pred": text}
        failures = [pred]
        if gold is not None:
            failures.append(verdict := next(verdicts))
            found |= {"gold": gold, "result": not isinstance(verdict, Failure) and verdict}
        reasons = [failure.reason for failure in failures if isinstance(failure, Failure)]
        graded.append(found | ({"error": reasons[0]} if reasons else {}))
    return graded


def judged(
    rows: Sequence[Mapping[str, Any]], golds: Mapping[Any, str], voter: str, judge: str, kind: str
) -> list[Row]:
    """The rows in their order, with "pred" by the checker `voter`.

    Those whose id has a gold answer also have "gold", and "result" by the checker `judge`.

    Raises:
        InputError: As `grade` does.
    """
    if voter == judge:
        return grade(rows, golds, voter, kind, complete=False)
    graded = grade(rows, None, voter, kind)
    known = [index for index, row in enumerate(rows) if row["id"] in golds]
    verdicts = grade([rows[index] for index in known], golds, judge, kind)
    for index, verdict in zip(known, verdicts, strict=True):
        graded[index] |= {"gold": verdict["gold"], "result": verdict["result"]}
    return graded


def canonical_answers(
    preds: Sequence[str], checker_name: str, kind: str, **limits: Any
) -> list[str]:
    """The canonical form of each final answer; the answer itself if it has none.

    `limits` are those of `Workers`.

    Raises:
        InputError: As `make_checker` does.
    """
    with _checking(checker_name, kind, **limits) as pool:
        forms = _run(pool, [("canonical", pred) for pred in preds])
    pairs = zip(preds, forms, strict=True)
    return [pred if isinstance(form, Failure) else form for pred, form in pairs]


def votes(rows: Sequence[Mapping[str, Any]], checker_name: str, kind: str) -> list[Row]:
    """Replace "pred" in each row, which also has an "id", by the form for which it votes.

    Among the answers to one question, numbers that all equal one another are one vote, under the
    form that sorts first: "5 cm" and "5", unless somebody says "5 m".

    Raises:
        InputError: As `make_checker` does.
    """
    preds = sorted({row["pred"] for row in rows if row["pred"]})
    forms = dict(zip(preds, canonical_answers(preds, checker_name, kind), strict=True))
    asked: dict[Any, dict[str, str]] = {}
    for pred, row_id in sorted({(row["pred"], row["id"]) for row in rows if row["pred"]}, key=str):
        asked.setdefault(row_id, {}).setdefault(forms[pred], pred)
    alike = _equal_numbers(asked, checker_name, kind)
    return [
        {**row, "pred": _shared_form(forms[row["pred"]], alike[row["id"]]) if row["pred"] else ""}
        for row in rows
    ]


def _equal_numbers(
    asked: Mapping[Any, Mapping[str, str]], checker_name: str, kind: str
) -> dict[Any, dict[str, set[str]]]:
    """By question and by form of a number there, the forms that are equal to it."""
    alike = {row_id: {form: {form} for form in found} for row_id, found in asked.items()}
    pairs = [
        (row_id, one, other)
        for row_id, found in asked.items()
        for one, other in combinations(filter(_NUMBER.match, found), 2)
        if not (_BARE.fullmatch(found[one]) and _BARE.fullmatch(found[other]))
    ]
    with _checking(checker_name, kind) as pool:
        verdicts = _run(pool, [("equal", asked[at][one], asked[at][two]) for at, one, two in pairs])
    for (row_id, one, other), verdict in zip(pairs, verdicts, strict=True):
        if verdict is True:
            alike[row_id][one].add(other)
            alike[row_id][other].add(one)
    return alike


def _shared_form(form: str, alike: Mapping[str, set[str]]) -> str:
    same = alike[form]
    return min(same) if all(alike[one] == same for one in same) else form


def methods(checker_name: str, kind: str) -> Callable[[Task], Any]:
    """A function that calls methods of a checker, as (method, *arguments); made in a worker."""
    module, _, attribute = checker_name.partition(":")
    if attribute:
        try:
            checker = getattr(importlib.import_module(module), attribute)(kind)
        except (ImportError, AttributeError) as error:
            raise InputError(f"checker {checker_name}: cannot be loaded ({error})") from None
    else:
        checker = make_checker(checker_name, kind)
    return lambda task: getattr(checker, task[0])(*task[1:])


def _checking(checker_name: str, kind: str, **limits: Any) -> Workers:
    if ":" not in checker_name:
        make_checker(checker_name, kind)
    return Workers(f"{__name__}:methods", (checker_name, kind), **limits)


def _run(pool: Workers, tasks: Sequence[Hashable]) -> list[Any]:
    """Results in the order of the tasks; equal tasks are run once."""
    different = list(dict.fromkeys(tasks))
    results = dict(zip(different, pool.run(different), strict=True))
    return [results[task] for task in tasks]
