"""Answers graded, and put in one form for votes, in workers that can be killed.

What an answer is and which answers are equal is for the checkers in `answers.py`.
"""

import importlib
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from w2s_jax.errors import InputError
from w2s_jax.reasoning.answers import Checker, make_checker
from w2s_jax.reasoning.workers import Failure, Workers
from w2s_jax.text.rows import Row

Task = tuple[str, ...]
_NUMBER = re.compile(r"-?\d")
_BARE = re.compile(r"[-+\d.,/ ]+")


def grade(
    rows: Sequence[Mapping[str, Any]],
    golds: Mapping[Any, str] | None,
    checker_name: str,
    kind: str,
    **limits: Any,
) -> list[Row]:
    """The rows with "pred", and where there are golds with "gold" and "result", in their order.

    rows: each with "response", and with "id" where there are golds; golds: a row's id -> its gold
    final answer. checker_name: a name of `make_checker`, or "module:attribute" of a checker of
    one's own, called with the kind. limits: those of `Workers`. An answer that hangs, crashes or
    takes too much memory has the result False (or the empty pred, if it was being extracted) and
    says why in "error".
    Raises InputError for a row without a response or a gold answer, and as `make_checker` does.
    """
    wanted = (None if golds is None else _gold(row, golds, i) for i, row in enumerate(rows))
    return _graded(rows, wanted, checker_name, kind, **limits)


def judged(
    rows: Sequence[Mapping[str, Any]],
    golds: Mapping[Any, str],
    voter: str,
    judge: str,
    kind: str,
) -> list[Row]:
    """The rows with "pred" by the checker `voter`, in their order; those whose id has a gold answer
    also with "gold" and "result" by the checker `judge`.

    Raises InputError as `grade` does.
    """  # noqa: D205
    if voter == judge:
        return _graded(rows, (golds.get(row["id"]) for row in rows), voter, kind)
    graded = grade(rows, None, voter, kind)
    known = [index for index, row in enumerate(rows) if row["id"] in golds]
    verdicts = grade([rows[index] for index in known], golds, judge, kind)
    for index, verdict in zip(known, verdicts, strict=True):
        graded[index] |= {"gold": verdict["gold"], "result": verdict["result"]}
    return graded


def _graded(
    rows: Sequence[Mapping[str, Any]],
    wanted: Iterable[str | None],
    checker_name: str,
    kind: str,
    **limits: Any,
) -> list[Row]:
    """The rows with "pred", and those with a gold answer with "gold" and "result"."""
    responses = [_response(row, index) for index, row in enumerate(rows)]
    golds = list(wanted)
    with _checking(checker_name, kind, **limits) as pool:
        preds = _run(pool, [("extract", response) for response in responses])
        texts = ["" if isinstance(pred, Failure) else pred for pred in preds]
        pairs = [("equal", *pair) for pair in zip(texts, golds, strict=True) if pair[1] is not None]
        verdicts = iter(_run(pool, pairs))
    graded = []
    for row, pred, text, gold in zip(rows, preds, texts, golds, strict=True):
        found = {name: value for name, value in row.items() if name != "error"} | {"pred": text}
        failures = [pred]
        if gold is not None:
            verdict = next(verdicts)
            failures.append(verdict)
            found |= {"gold": gold, "result": not isinstance(verdict, Failure) and verdict}
        reasons = [failure.reason for failure in failures if isinstance(failure, Failure)]
        graded.append(found | ({"error": reasons[0]} if reasons else {}))
    return graded


def canonical_answers(
    preds: Sequence[str], checker_name: str, kind: str, **limits: Any
) -> list[str]:
    """Each final answer in the checker's one form per value; as it is where that cannot be found.

    limits: those of `Workers`. Raises InputError as `make_checker` does.
    """
    with _checking(checker_name, kind, **limits) as pool:
        forms = _run(pool, [("canonical", pred) for pred in preds])
    pairs = zip(preds, forms, strict=True)
    return [pred if isinstance(form, Failure) else form for pred, form in pairs]


def votes(rows: Sequence[Mapping[str, Any]], checker_name: str, kind: str) -> list[Row]:
    """The rows with "pred" in the one form that it votes for, in their order.

    rows: each with "id" and "pred". Of one question, numbers of which any two are equal are one
    vote, that of the first in the order of characters: "5 cm" and "5", where nobody says "5 m".
    Raises InputError as `make_checker` does.
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
    """For each question and form of a number there, the forms that are equal to it."""
    alike = {row_id: {form: {form} for form in found} for row_id, found in asked.items()}
    pairs = [
        (row_id, pair)
        for row_id, found in asked.items()
        for pair in combinations([form for form in found if _NUMBER.match(form)], 2)
        if not all(_BARE.fullmatch(found[form]) for form in pair)
    ]
    if pairs:
        with _checking(checker_name, kind) as pool:
            tasks = [("equal", *(asked[row_id][form] for form in pair)) for row_id, pair in pairs]
            verdicts = _run(pool, tasks)
        for (row_id, (one, other)), verdict in zip(pairs, verdicts, strict=True):
            if verdict is True:
                alike[row_id][one].add(other)
                alike[row_id][other].add(one)
    return alike


def _shared_form(form: str, alike: Mapping[str, set[str]]) -> str:
    same = alike[form]
    return min(same) if all(alike[one] == same for one in same) else form


def methods(checker_name: str, kind: str) -> Callable[[Task], Any]:
    """In a worker: the function that calls a method of a checker, told as (method, *arguments)."""
    checker = _load(checker_name, kind)

    def call(task: Task) -> Any:
        return getattr(checker, task[0])(*task[1:])

    return call


def _checking(checker_name: str, kind: str, **limits: Any) -> Workers:
    if ":" not in checker_name:
        make_checker(checker_name, kind)
    return Workers(f"{__name__}:methods", (checker_name, kind), **limits)


def _load(checker_name: str, kind: str) -> Checker:
    module, _, attribute = checker_name.partition(":")
    if not attribute:
        return make_checker(checker_name, kind)
    try:
        return getattr(importlib.import_module(module), attribute)(kind)
    except (ImportError, AttributeError) as error:
        raise InputError(f"checker {checker_name}: cannot be loaded ({error})") from None


def _run(pool: Workers, tasks: Sequence[Hashable]) -> list[Any]:
    """Results in order; what is asked more than once, as common answers are, is worked out once."""
    different = list(dict.fromkeys(tasks))
    results = dict(zip(different, pool.run(different), strict=True))
    return [results[task] for task in tasks]


def _response(row: Mapping[str, Any], index: int) -> str:
    response = row.get("response")
    if not isinstance(response, str):
        raise InputError(f'{_name(row, index)}: no text "response" to grade')
    return response


def _gold(row: Mapping[str, Any], golds: Mapping[Any, str], index: int) -> str:
    if "id" not in row or row["id"] not in golds:
        raise InputError(f"{_name(row, index)}: no gold answer has its id")
    return golds[row["id"]]


def _name(row: Mapping[str, Any], index: int) -> str:
    return f"row {index + 1}" + (f" (id {row['id']!r})" if "id" in row else "")
