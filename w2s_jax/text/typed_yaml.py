"""YAML files as mappings and as nested frozen dataclasses, strictly.

Unknown names and values of the wrong type are errors.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from w2s_jax.errors import InputError
from w2s_jax.text.rows import read_bytes


def read_mapping(path: str | Path) -> dict[Any, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        InputError: For a file that cannot be read, is neither YAML nor JSON, or holds no mapping.
    """
    values = _read(Path(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a mapping of names to values")
    return values


T = TypeVar("T")


def read_typed(cls: type[T], path: str | Path) -> T:
    """Read a file as a dataclass.

    Its `extends` names a file, relative to its folder, from which missing fields are taken.

    Raises:
        InputError: Naming a missing file, an unknown field or a wrong value.
    """
    return from_mapping(cls, _load(Path(path)), str(path))


def from_mapping(cls: type[T], value: Any, where: str) -> T:
    """Build a dataclass, and those nested in it, from YAML values; `where` begins every error."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: expected fields of {cls.__name__}, not {value!r}")
    kinds = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in value:
        if name not in fields:
            raise InputError(f"{where}: unknown field {name!r}; there are {', '.join(fields)}")
    for name, item in fields.items():
        required = item.default is item.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise InputError(f"{where}: field {name!r} is missing")
    try:
        return cls(
            **{name: _convert(kinds[name], value[name], f"{where}: {name}") for name in value}
        )
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(where) else f"{where}: {text}") from None


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_mapping(typing.cast(type, kind), value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(k for k in arguments if k is not type(None)), value, where)
    if origin is dict and isinstance(value, dict):
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], item, where) for item in value)
    if origin is typing.Literal:
        if value not in arguments:
            raise InputError(f"{where}: {value!r} is none of {', '.join(map(str, arguments))}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{where}: {value!r} is no {getattr(kind, '__name__', kind)}")
    return value


def _load(path: Path, above: tuple[Path, ...] = ()) -> Any:
    value = _read(path)
    if not isinstance(value, Mapping) or not isinstance(value.get("extends"), str):
        return value
    if path.resolve() in above:
        raise InputError(f"{path}: extends itself, through {above[-1]}")
    base = _load(path.parent / value["extends"], (*above, path.resolve()))
    own = {name: part for name, part in value.items() if name != "extends"}
    return {**base, **own} if isinstance(base, Mapping) else base


def _read(path: Path) -> Any:
    """The value in a YAML or JSON file.

    Raises:
        InputError: If it cannot be read, or is neither.
    """
    try:
        return yaml.safe_load(read_bytes(path).decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start + 1})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
