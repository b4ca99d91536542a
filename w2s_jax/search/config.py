"""The settings of a search as one frozen value, and the published methods as such settings.

CBS, best-of-N, EFT, IVG and plain sampling are settings of one core.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from w2s_jax.errors import InputError, check_fields
from w2s_jax.ops.logits import Sampling
from w2s_jax.search import methods

POLICY_CACHES = ("auto", "int8")


@dataclass(frozen=True)
class SearchConfig:
    """Chunk-level beam search (arXiv 2405.19262, algorithm 1) and its variations.

    Each of the W hypotheses gets K continuations of L tokens, of which the selector keeps W. A
    response ends at an EOS id, at a stop string, or after max_new_tokens.

    Attributes:
        beam_width: W.
        successors: K.
        chunk_length: L.
        max_new_tokens: Tokens of a response at most.
        sampling: temperature, top_k and top_p of the draws.
        proposer: Which logits are sampled from.
        scorer: What values tokens.
        selector: What keeps W candidates.
        eos_ids: Token ids that end a response; None for the policy's.
        stop: Strings that end a response and are not part of it.
        seed: Of the run, 0 .. 2**32 − 1.
        slots: P, prompts searched side by side; None for 8 or fewer.
        reference_quirks: Follow the published code: a finished hypothesis is a candidate K times,
            and one cut by length is scored with an EOS behind it.
        policy_cache: What the policy's keys and values are kept as: "auto" (the dtype of its
            weights) or "int8". Those of guides keep their dtype, since log-ratios are small
            differences.

    Raises:
        InputError: For a size below 1, a seed out of range, an unknown policy_cache, an empty stop
            string, and a scorer that needs values which the proposer does not compute.
    """

    beam_width: int = 4
    successors: int = 4
    chunk_length: int = 5
    max_new_tokens: int = 50
    sampling: Sampling = field(default_factory=lambda: Sampling(0.7, 50, 1.0))
    proposer: methods.Proposer = field(default_factory=methods.PolicyProposer)
    scorer: methods.Scorer = field(default_factory=methods.LogRatio)
    selector: methods.Selector = field(default_factory=methods.TopW)
    eos_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    slots: int | None = None
    reference_quirks: bool = False
    policy_cache: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        sizes = {
            "beam_width (W)": self.beam_width,
            "successors (K)": self.successors,
            "chunk_length (L)": self.chunk_length,
            "max_new_tokens": self.max_new_tokens,
            "slots": 1 if self.slots is None else self.slots,
        }
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name} is {size}; it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; it must lie in 0 .. 2**32 - 1")
        if self.policy_cache not in POLICY_CACHES:
            raise InputError(f"policy_cache is {self.policy_cache!r}; it must be auto or int8")
        if any(not text for text in self.stop):
            raise InputError("a stop string is empty; give at least one character")
        if self.scorer.needs_values and not self.proposer.values_tokens:
            raise InputError(
                f"{type(self.scorer).__name__} needs a proposer that values its tokens; "
                f"{type(self.proposer).__name__} does not"
            )

    @property
    def rows(self) -> int:
        """R = W·K."""
        return self.beam_width * self.successors

    @property
    def length(self) -> int:
        """Sampled tokens of a chunk: L, or max_new_tokens where that is less."""
        return min(self.chunk_length, self.max_new_tokens)

    @property
    def chunks(self) -> int:
        """Chunks until max_new_tokens."""
        return -(-self.max_new_tokens // self.length)

    @property
    def capacity(self) -> int:
        """Tokens that a hypothesis may hold: whole chunks."""
        return self.chunks * self.length


SAMPLES_CHUNK = 16
"""The longest chunk, in tokens, of methods without chunks of their own.

Between chunks, prompts that have ended leave their slots."""


def _even_chunk(max_new_tokens: int) -> int:
    """The chunk length, at most SAMPLES_CHUNK, whose multiples exceed max_new_tokens least."""
    chunks = -(-max_new_tokens // SAMPLES_CHUNK)
    return -(-max_new_tokens // chunks) if chunks else 1


def _in_place(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of methods that keep every hypothesis, with the caller's over them."""
    tokens = settings.get("max_new_tokens", SearchConfig.max_new_tokens)
    # SearchConfig refuses what is no number.
    length = _even_chunk(tokens) if isinstance(tokens, int) else SAMPLES_CHUNK
    return {"chunk_length": length, "selector": methods.KeepAll(), "successors": 1} | settings


def cbs(w: int = 4, k: int = 4, l: int = 5, **settings: Any) -> SearchConfig:  # noqa: E741
    """Chunk-level beam search: W hypotheses, K successors, L tokens; arXiv 2405.19262 section 4.2.

    `settings` are further fields of SearchConfig, here and below.
    """
    return SearchConfig(beam_width=w, successors=k, chunk_length=l, **settings)


def best_of_n(n: int = 16, **settings: Any) -> SearchConfig:
    """Best-of-N: N whole samples, the best by implicit reward first.

    It is CBS with W = 1, K = N, L = ∞. Run as W = N, K = 1 it samples and scores the same, in short
    chunks, so that a prompt whose samples have all ended frees its slot at once.
    """
    return SearchConfig(beam_width=n, **_in_place(settings))


def eft(beta: float | int = 1.0, *, eft_top_k: int = 0, **settings: Any) -> SearchConfig:
    """Emulated fine-tuning: one sample from policy + β·(tuned − untuned); arXiv 2310.12962.

    With eft_top_k above 0, only among the policy's eft_top_k likeliest tokens (PAD, arXiv
    2410.04070).
    """
    fixed = {"proposer": methods.EFTProposer(beta, eft_top_k), "scorer": methods.ProposedLogRatio()}
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

    The guides read each token once: their log-ratio steers its draw, and scores the chunk.
    """
    fixed = {"proposer": methods.EFTProposer(beta, eft_top_k), "scorer": methods.ProposedLogRatio()}
    return cbs(w, k, l, **(settings | fixed))


def sample(n: int = 1, **settings: Any) -> SearchConfig:
    """N plain samples of the policy; every score is zero."""
    return SearchConfig(beam_width=n, scorer=methods.NoScore(), **_in_place(settings))


LETTERS = ("w", "k", "l", "n", "beta", "eft_top_k")

_METHODS: dict[str, tuple[Callable[..., SearchConfig], tuple[str, ...]]] = {
    "cbs": (cbs, ("w", "k", "l")),
    "bon": (best_of_n, ("n",)),
    "eft": (eft, ("beta", "eft_top_k")),
    "ivg": (ivg, ("w", "k", "l", "beta", "eft_top_k")),
    "sample": (sample, ()),
}
METHODS = tuple(_METHODS)


def preset(method: str, **settings: Any) -> SearchConfig:
    """The settings of a method by name.

    Args:
        method: One of METHODS.
        **settings: Those of LETTERS, of which each method reads its own and ignores the others; and
            further fields of SearchConfig.

    Raises:
        InputError: For another method.
    """
    if method not in METHODS:
        raise InputError(f"method {method!r} is none of {', '.join(METHODS)}")
    make, letters = _METHODS[method]
    unread = set(LETTERS) - set(letters)
    return make(**{name: value for name, value in settings.items() if name not in unread})
