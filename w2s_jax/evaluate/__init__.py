"""Measures of what was written: gold rewards, lm-eval's tasks, what quantising a policy changes.

Public names load on first use, so that `config.py` can be read without jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from w2s_jax.evaluate.harness import lm_eval
    from w2s_jax.evaluate.judging import judge
    from w2s_jax.evaluate.quantisation import report_quantisation

__all__ = ["judge", "lm_eval", "report_quantisation"]

_HOMES = {"judge": "judging", "lm_eval": "harness", "report_quantisation": "quantisation"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
