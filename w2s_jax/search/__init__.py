"""Search: proposers × scorers × selectors, the jitted step, and the run over many prompts."""

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
