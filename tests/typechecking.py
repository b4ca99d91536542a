"""What jaxtyping's hook lays around the package's functions while tests run."""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def outermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """Types are checked where a function or a class is defined once.

    beartype writes and compiles code for each definition, so for a function within a function at
    every call of the outer one: a fifth of the time of tests of training commands.
    """
    return function if "<locals>" in function.__qualname__ else beartype(function)
