"""What callers in Python hand over, against what is taken: one line in the place of a traceback."""

import dataclasses
import operator
import os
import types
import typing
from collections.abc import Mapping
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import numpy as np

from w2s_jax.errors import InputError

_TAKEN = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
_PLURAL = {int: "whole numbers", float: "numbers", str: "texts"}
_NUMBERS: Mapping[type, type] = {int: Integral, float: Real}


def check_kind(name: str, value: Any, kind: Any, taken: str) -> None:
    """Raise InputError, "NAME takes TAKEN, not ..", unless a value is of this kind.

    kind: an annotation; int and float stand for all whole and all real numbers, without bool.
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
    return held.item() if isinstance(held, np.number) else held


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
