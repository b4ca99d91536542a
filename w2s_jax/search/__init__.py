"""Search: proposers × scorers × selectors, the jitted step, and the run over many prompts.

Public names load on first use, so that `settings.py` can be read without jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from w2s_jax.search.config import SearchConfig
    from w2s_jax.search.models import Guide, SearchModels, search_models
    from w2s_jax.search.results import Hypothesis, Request, SearchResult
    from w2s_jax.search.run import search
    from w2s_jax.search.state import SearchState, insert_prompt, start_search
    from w2s_jax.search.step import search_step
    from w2s_jax.search.texts import FunctionScorer, TextScorer

__all__ = [
    "FunctionScorer",
    "Guide",
    "Hypothesis",
    "Request",
    "SearchConfig",
    "SearchModels",
    "SearchResult",
    "SearchState",
    "TextScorer",
    "insert_prompt",
    "search",
    "search_models",
    "search_step",
    "start_search",
]

_HOMES = {
    "FunctionScorer": "texts",
    "Guide": "models",
    "Hypothesis": "results",
    "Request": "results",
    "SearchConfig": "config",
    "SearchModels": "models",
    "SearchResult": "results",
    "SearchState": "state",
    "TextScorer": "texts",
    "insert_prompt": "state",
    "search": "run",
    "search_models": "models",
    "search_step": "step",
    "start_search": "state",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
