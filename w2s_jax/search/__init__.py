"""Search: proposers × scorers × selectors, the jitted step, and the run over many prompts.

Public names load on first use, so that `settings.py` can be read without jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from w2s_jax.search.config import SearchConfig
    from w2s_jax.search.file import search_file
    from w2s_jax.search.models import Guide, SearchModels, search_models
    from w2s_jax.search.results import Hypothesis, Request, SearchResult
    from w2s_jax.search.run import search
    from w2s_jax.search.scorers import FunctionScorer, TextScorer
    from w2s_jax.search.settings import SearchFileConfig
    from w2s_jax.search.step import SearchState, insert_prompt, search_step, start_search

__all__ = [
    "FunctionScorer",
    "Guide",
    "Hypothesis",
    "Request",
    "SearchConfig",
    "SearchFileConfig",
    "SearchModels",
    "SearchResult",
    "SearchState",
    "TextScorer",
    "insert_prompt",
    "search",
    "search_file",
    "search_models",
    "search_step",
    "start_search",
]

_HOMES = {
    "config": ("SearchConfig",),
    "file": ("search_file",),
    "models": ("Guide", "SearchModels", "search_models"),
    "results": ("Hypothesis", "Request", "SearchResult"),
    "run": ("search",),
    "scorers": ("FunctionScorer", "TextScorer"),
    "settings": ("SearchFileConfig",),
    "step": ("SearchState", "insert_prompt", "search_step", "start_search"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
