"""Weak-to-strong reasoning (arXiv 2407.13647): a run in stages, from questions to a report.

Public names load on first use, so that the config can be read without jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from w2s_jax.reasoning.config import ReasonConfig, StagesConfig
    from w2s_jax.reasoning.runner import plan, run

__all__ = ["ReasonConfig", "StagesConfig", "plan", "run"]

_HOMES = {"ReasonConfig": "config", "StagesConfig": "config", "plan": "runner", "run": "runner"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
