"""Answers graded, and put in one form for votes, in workers that can be killed.

What an answer is and which answers are equal is for the checkers in `answers.py`.
"""

import importlib
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

from w2s_jax.errors import InputError
from w2s_jax.reasoning.answers import Checker, check_installed, make_checker
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
    *,
    workers: int | None = None,
    seconds: float | int = 5.0,
    memory_mb: int = 1024,
) -> list[Row]:
    """The rows with "pred", and where there are golds with "gold" and "result", in their order.

    rows: each with "response", and with "id" where there are golds; golds: a row's id -> its gold
    final answer. checker_name: a name of `make_checker`, or "module:attribute" of a checker of
    one's own, called with the kind. An answer that hangs, crashes or takes too much memory has the
    result False (or the empty pred, if it was being extracted) and says why in "error".
    Raises InputError for a row without a response or a gold answer, and as `make_checker` does.
    """
    responses = [_response(row, index) for index, row in enumerate(rows)]
    wanted = None if golds is None else [_gold(row, golds, i) for i, row in enumerate(rows)]
    with _checking(checker_name, kind, workers, seconds, memory_mb) as pool:
        preds = _run(pool, [("extract", response) for response in responses])
        errors = [pred.reason if isinstance(pred, Failure) else "" for pred in preds]
        texts = ["" if isinstance(pred, Failure) else pred for pred in preds]
        graded = [dict(row) | {"pred": text} for row, text in zip(rows, texts, strict=True)]
        if wanted is not None:
            pairs = zip(texts, wanted, strict=True)
            verdicts = _run(pool, [("equal", text, gold) for text, gold in pairs])
            for index, verdict in enumerate(verdicts):
                failed = isinstance(verdict, Failure)
                graded[index] |= {"gold": wanted[index], "result": not failed and verdict}
                if failed:
                    errors[index] = errors[index] or verdict.reason
    for row, error in zip(graded, errors, strict=True):
        row.pop("error", None)
        if error:
            row["error"] = error
    return graded


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
    known = [index for index, row in enumerate(rows) if row["id"] in golds]
    verdicts = grade([rows[index] for index in known], golds, judge, kind) if known else []
    found = dict(zip(known, verdicts, strict=True))
    if voter == judge:
        others = [index for index in range(len(rows)) if index not in found]
        rest = grade([rows[index] for index in others], None, voter, kind) if others else []
        found |= dict(zip(others, rest, strict=True))
        return [found[index] for index in range(len(rows))]
    graded = grade(rows, None, voter, kind)
    for index, one in found.items():
        graded[index] |= {"gold": one["gold"], "result": one["result"]}
    return graded


def canonical_answers(
    preds: Sequence[str],
    checker_name: str,
    kind: str,
    *,
    workers: int | None = None,
    seconds: float | int = 5.0,
    memory_mb: int = 1024,
) -> list[str]:
    """Each final answer in the checker's one form per value; as it is where that cannot be found.

    Raises InputError as `make_checker` does.
    """
    with _checking(checker_name, kind, workers, seconds, memory_mb) as pool:
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
        with _checking(checker_name, kind, None, 5.0, 1024) as pool:
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


def _checking(
    checker_name: str, kind: str, workers: int | None, seconds: float | int, memory_mb: int
) -> Workers:
    if ":" not in checker_name:
        check_installed(checker_name)
        make_checker(checker_name, kind)
    return Workers(
        f"{__name__}:methods",
        (checker_name, kind),
        workers=workers,
        seconds=seconds,
        memory_mb=memory_mb,
    )


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
