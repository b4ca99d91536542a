"""Registers frozen dataclasses as pytrees whose rebuilding skips `__init__`.

Run-time type checks (jaxtyping with beartype) sit in `__init__`; jax rebuilds pytrees with
placeholders that would fail them.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def pytree(*, static: tuple[str, ...] = ()) -> Callable[[type[T]], type[T]]:
    """Class decorator: a frozen dataclass that is a pytree; the fields in `static` are hashed."""

    def register(cls: type[T]) -> type[T]:
        frozen = dataclasses.dataclass(frozen=True)(cls)
        names = [field.name for field in dataclasses.fields(frozen)]  # type: ignore[arg-type]
        dynamic = tuple(name for name in names if name not in static)

        def flatten_with_keys(
            value: T,
        ) -> tuple[list[tuple[jax.tree_util.GetAttrKey, object]], tuple]:
            children = [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in dynamic]
            return children, tuple(getattr(value, name) for name in static)

        def flatten(value: T) -> tuple[tuple, tuple]:
            return (
                tuple(getattr(value, name) for name in dynamic),
                tuple(getattr(value, name) for name in static),
            )

        def unflatten(aux: tuple, children: Iterable[Any]) -> T:
            value = object.__new__(frozen)
            for name, child in zip((*dynamic, *static), (*children, *aux), strict=True):
                object.__setattr__(value, name, child)
            return value

        jax.tree_util.register_pytree_with_keys(frozen, flatten_with_keys, unflatten, flatten)
        return frozen

    return register
