"""The exception for wrong input, and checks of what callers in Python hand over.

Internal faults are not raised through it. How a training ends early is here too, as a command line
tells these ends apart without loading the trainer.
"""

import dataclasses
import operator
import os
import types
import typing
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any

POINTER = b"version https://git-lfs.github.com/spec/"
"""What Git LFS leaves in the place of a file that was not fetched begins so."""

SCORER = "scorer "
"""In the place of a model's name: a scorer without one, and what it did, begin so."""


class InputError(ValueError):
    """A wrong input, told in one line: what is wrong, where, and what would be right."""

    def at(self, place: str) -> "InputError":
        """The same error behind what it is about."""
        return InputError(f"{place}: {self}")


class Undivided(InputError):
    """A mesh that does not divide an array: what is wrong, meshes that do, what rules would help.

    without_rules: the same for those who cannot give rules.
    """

    def __init__(self, told: str, meshes: Sequence[str], rules: str):
        self.told, self._meshes, self._rules = told, tuple(meshes), rules
        use = [f"use {' | '.join(meshes)}"] if meshes else []
        self.without_rules = "; ".join([told, *use])
        super().__init__(f"{told}; {', or '.join([*use, rules])}")

    def at(self, place: str) -> "Undivided":
        """The same error behind what it is about."""
        return Undivided(f"{place}: {self.told}", self._meshes, self._rules)


class RowFailed(InputError):
    """A row that came to nothing: models gave it logits that are no distribution.

    That is where one is NaN or +inf, or all are −inf. models: the names of those at fault, or what
    a scorer without a model did, as SCORER begins it; none where a score is no finite number though
    all logits are sound.
    """

    def __init__(self, row_id: int, models: Sequence[str]) -> None:
        self.row_id, self.models = row_id, tuple(models)
        super().__init__(f"row {row_id}: {self.fault}")

    @property
    def fault(self) -> str:
        """What happened, without the row."""
        return _fault(self.models)


class RowsFailed(InputError):
    """Rows that failed, after all others were done.

    failures: in the order of the row ids. results: of all rows in the order asked for, None for one
    that failed. Told as "WHERE NUMBER, NUMBER ..", by the `number` of each row id.
    """

    SHOWN = 8

    def __init__(
        self,
        failures: Sequence[RowFailed],
        results: Sequence[Any] = (),
        *,
        where: str = "row",
        number: Callable[[int], Any] = lambda row_id: row_id,
    ) -> None:
        self.failures = tuple(sorted(failures, key=lambda failure: failure.row_id))
        self.results = tuple(results)
        rows: dict[tuple[str, ...], list[Any]] = defaultdict(list)
        for failure in self.failures:
            rows[failure.models].append(number(failure.row_id))
        told = [f"{where} {self._listed(own)}: {_fault(models)}" for models, own in rows.items()]
        if len(told) > self.SHOWN:
            rest = sum(map(len, list(rows.values())[self.SHOWN :]))
            told = [*told[: self.SHOWN], f"and {rest} rows more"]
        super().__init__("; ".join(told))

    def named(
        self, models: Mapping[str, str], *, where: str, number: Callable[[int], Any]
    ) -> "RowsFailed":
        """The same with models and rows called otherwise."""
        failures = [
            RowFailed(failure.row_id, [models.get(name, name) for name in failure.models])
            for failure in self.failures
        ]
        return RowsFailed(failures, self.results, where=where, number=number)

    def _listed(self, numbers: Sequence[Any]) -> str:
        shown = ", ".join(map(str, numbers[: self.SHOWN]))
        more = len(numbers) - self.SHOWN
        return f"{shown} and {more} more" if more > 0 else shown


def _fault(models: Sequence[str]) -> str:
    advice = "weights may be damaged, or overflow in this dtype"
    if not models:
        return f"a score is not a finite number; {advice}"
    scorers = [name for name in models if name.startswith(SCORER)]
    names = [name for name in models if not name.startswith(SCORER)]
    told = [f"the {name}" for name in scorers]
    if names:
        told.append(f"logits of the {' and the '.join(names)} are NaN or infinite; {advice}")
    return ", and ".join(told)


class EndpointError(InputError):
    """An endpoint that refuses, stops answering or answers nonsense; told in one line."""


class Preempted(Exception):
    """A signal asked the run to stop; `step` steps are done and saved, and a rerun goes on."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}, which is saved; run again to go on")
        self.step = step


class Diverged(Exception):
    """The loss or a gradient is not finite; nothing was saved after it.

    `step` is the number of the failing step (the first is 1), `rows` the names of the rows of its
    batch, `good` the step of the last sound checkpoint (None without one).
    """

    def __init__(self, step: int, what: str, rows: tuple[str, ...], good: int | None, where: str):
        named = f"; its batch: {', '.join(rows)}" if rows else ""
        kept = "there is no checkpoint yet" if good is None else f"the last good one is step {good}"
        super().__init__(f"{what} at step {step}{named}; of the checkpoints in {where} {kept}")
        self.step = step
        self.rows = rows
        self.good = good


def check_fetched(path: Path) -> None:
    """Raise InputError where a file is a pointer of Git LFS, which stands for the file itself."""
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except OSError:
        return
    if start == POINTER:
        raise InputError(f"{path} is a Git LFS pointer, not the file; run git lfs pull there")


_TAKEN = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
_PLURAL = {int: "whole numbers", float: "numbers", str: "texts"}
_NUMBERS: Mapping[type, type] = {int: Integral, float: Real}


def check_kind(name: str, value: Any, kind: Any, taken: str) -> None:
    """Raise InputError, "NAME takes TAKEN, not ..", unless a value is of this kind.

    Args:
        name: What the value is called.
        value: anything.
        kind: An annotation; int and float stand for all whole and all real numbers, without bool.
        taken: What the kind is called.
    """
    if not _fits(kind, value):
        raise InputError(f"{name} takes {taken}, not {shown(value)}")


def check_fields(value: Any) -> None:
    """Raise InputError for a field of a dataclass that is not of the kind it is annotated as.

    For `__post_init__`. A list in the place of a tuple becomes one, a number of NumPy's one of
    Python's, and a path text. Which of a Literal's values it is, is not looked at.
    """
    cls: Any = type(value)
    hints = _hints(cls)
    for field in dataclasses.fields(value):
        kind, held = hints[field.name], getattr(value, field.name)
        plain = _plain(kind, held)
        if plain is not held:
            object.__setattr__(value, field.name, plain)
            held = plain
        if not _fits(kind, held):
            raise InputError(f"{field.name} takes {_taken(kind, held)}, not {shown(held)}")


def _plain(kind: Any, held: Any) -> Any:
    """What stands for a value in files and identities, if it is none of them itself."""
    items = _tuple_of(kind)
    if items is not None and isinstance(held, list | tuple):
        parts = tuple(_plain(items, item) for item in held)
        same = isinstance(held, tuple) and all(map(operator.is_, parts, held))
        return held if same else parts
    if isinstance(held, os.PathLike) and str in _parts(kind):
        return os.fspath(held)
    # Told by name, as NumPy itself takes long to import.
    numpys = isinstance(held, Real) and type(held).__module__ == "numpy"
    return held.item() if numpys else held


def shown(value: Any) -> str:
    """A value's type, and the value itself where it is short."""
    if not isinstance(value, str | bytes | int | float | list | tuple | dict):
        return type(value).__name__
    told = repr(value)
    return f"{type(value).__name__} {told if len(told) <= 40 else told[:39] + '…'}"


@lru_cache(maxsize=64)
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _parts(kind: Any) -> tuple[Any, ...]:
    """The kinds of a union, or the kind alone."""
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return typing.get_args(kind) if union else (kind,)


def _tuple_of(kind: Any) -> Any:
    """What a tuple of any length holds; None for other kinds."""
    for part in _parts(kind):
        items = typing.get_args(part)
        if typing.get_origin(part) is tuple and items[-1:] == (...,):
            return items[0]
    return None


def _fits(kind: Any, value: Any) -> bool:
    return any(_is(part, value) for part in _parts(kind))


def _is(kind: Any, value: Any) -> bool:
    if kind in _NUMBERS:
        return isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool)
    items = _tuple_of(kind)
    if items is not None:
        return isinstance(value, tuple) and all(_fits(items, item) for item in value)
    return isinstance(value, kind) if isinstance(kind, type) else True


def _taken(kind: Any, given: Any) -> str:
    items = _tuple_of(kind)
    if items is not None:
        plural = " and ".join(_PLURAL.get(part, "values") for part in _parts(items)[:1])
        example = f" such as {(given,)!r}" if _fits(items, given) else ""
        return f"a tuple of {plural}{example}"
    parts = [part for part in _parts(kind) if part is not types.NoneType]
    if float in parts:
        parts = [part for part in parts if part is not int]
    return " or ".join(_TAKEN.get(part, f"a {getattr(part, '__name__', part)}") for part in parts)
