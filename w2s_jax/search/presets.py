"""The published methods as settings of one core: CBS, best-of-N, EFT, plain sampling."""

from typing import Any

from w2s_jax.errors import InputError
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.proposers import EFTProposer
from w2s_jax.search.scorers import NoScore, ProposedLogRatio
from w2s_jax.search.selectors import KeepAll

METHODS = ("cbs", "bon", "eft", "ivg", "sample")

SAMPLES_CHUNK = 16
"""At most this many tokens between two looks at which prompts have ended, where a method has no
chunks of its own."""


def _even_chunk(max_new_tokens: int) -> int:
    """A chunk length whose multiples overshoot max_new_tokens least, at most SAMPLES_CHUNK."""
    chunks = -(-max_new_tokens // SAMPLES_CHUNK)
    return -(-max_new_tokens // chunks) if chunks else 1


def _in_place(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of methods that keep every hypothesis; what the caller gave goes before."""
    tokens = settings.get("max_new_tokens", SearchConfig.max_new_tokens)
    # What is no number is told with the other settings.
    length = _even_chunk(tokens) if isinstance(tokens, int) else SAMPLES_CHUNK
    return {"chunk_length": length, "selector": KeepAll(), "successors": 1} | settings


def cbs(w: int = 4, k: int = 4, l: int = 5, **settings: Any) -> SearchConfig:  # noqa: E741
    """Chunk-level beam search: W hypotheses, K successors, L tokens; arXiv 2405.19262 section 4.2.

    `settings` are further fields of SearchConfig, here and below.
    """
    return SearchConfig(beam_width=w, successors=k, chunk_length=l, **settings)


def best_of_n(n: int = 16, **settings: Any) -> SearchConfig:
    """Best-of-N: N whole samples, the best by implicit reward first.

    It is CBS with W = 1, K = N, L = ∞. Run as W = N, K = 1 it draws and scores the same, in short
    chunks: a prompt whose samples have all ended leaves its slot at once.
    """
    return SearchConfig(beam_width=n, **_in_place(settings))


def eft(beta: float | int = 1.0, *, eft_top_k: int = 0, **settings: Any) -> SearchConfig:
    """Emulated fine-tuning: one sample from policy + β·(tuned − untuned); arXiv 2310.12962.

    With eft_top_k only among the policy's so many likeliest tokens (PAD, arXiv 2410.04070).
    """
    fixed = {"proposer": EFTProposer(beta, eft_top_k), "scorer": ProposedLogRatio()}
    return SearchConfig(**({"beam_width": 1} | _in_place(settings) | fixed))


def ivg(
    w: int = 4,
    k: int = 4,
    l: int = 5,  # noqa: E741
    beta: float | int = 1.0,
    *,
    eft_top_k: int = 0,
    **settings: Any,
) -> SearchConfig:
    """Integrated value guidance: CBS whose successors are sampled by EFT; arXiv 2409.17819.

    The guides' log-ratio steers every token (implicitly) and chooses among chunks; it is read once.
    """
    fixed = {"proposer": EFTProposer(beta, eft_top_k), "scorer": ProposedLogRatio()}
    return cbs(w, k, l, **(settings | fixed))


def sample(n: int = 1, **settings: Any) -> SearchConfig:
    """N plain samples of the policy; every score is zero."""
    return SearchConfig(beam_width=n, scorer=NoScore(), **_in_place(settings))


def preset(
    method: str,
    *,
    w: int = 4,
    k: int = 4,
    l: int = 5,  # noqa: E741
    n: int = 16,
    beta: float | int = 1.0,
    eft_top_k: int = 0,
    **settings: Any,
) -> SearchConfig:
    """The settings of a method by name; each reads of w, k, l, n, beta what its paper defines.

    Raises InputError for a method that is none of METHODS.
    """
    if method == "cbs":
        return cbs(w, k, l, **settings)
    if method == "bon":
        return best_of_n(n, **settings)
    if method == "eft":
        return eft(beta, eft_top_k=eft_top_k, **settings)
    if method == "ivg":
        return ivg(w, k, l, beta, eft_top_k=eft_top_k, **settings)
    if method == "sample":
        return sample(**settings)
    raise InputError(f"method {method!r} is none of {', '.join(METHODS)}")
