"""The settings of a search as one frozen value. How they make a method is in `presets.py`."""

from dataclasses import dataclass, field

from w2s_jax.errors import InputError
from w2s_jax.ops.sampling import Sampling
from w2s_jax.search.proposers import PolicyProposer, Proposer
from w2s_jax.search.scorers import LogRatio, Scorer
from w2s_jax.search.selectors import Selector, TopW
from w2s_jax.typed import check_fields

POLICY_CACHES = ("auto", "int8")


@dataclass(frozen=True)
class SearchConfig:
    """Chunk-level beam search (arXiv 2405.19262, algorithm 1) and what varies it.

    beam_width W hypotheses each get `successors` K continuations of chunk_length L tokens; the
    selector keeps W; responses end at a token of eos_ids (None: the policy's own), at a stop
    string, or after max_new_tokens. slots prompts are searched side by side (None: up to 8).
    reference_quirks follows the published code: a finished hypothesis takes part K times, and one
    cut by length is scored with an EOS behind it. policy_cache: what the policy's keys and values
    are kept as, "auto" (the dtype of its weights) or "int8"; those of guides stay as they are,
    since log-ratios are small differences.

    Raises InputError for a size below 1, an unknown policy_cache, or for a scorer that needs values
    which the proposer does not give.
    """

    beam_width: int = 4
    successors: int = 4
    chunk_length: int = 5
    max_new_tokens: int = 50
    sampling: Sampling = field(default_factory=lambda: Sampling(0.7, 50, 1.0))
    proposer: Proposer = field(default_factory=PolicyProposer)
    scorer: Scorer = field(default_factory=LogRatio)
    selector: Selector = field(default_factory=TopW)
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
        """The tokens of a chunk that are sampled: L, or fewer when no response is that long."""
        return min(self.chunk_length, self.max_new_tokens)

    @property
    def chunks(self) -> int:
        """Chunks until max_new_tokens."""
        return -(-self.max_new_tokens // self.length)

    @property
    def capacity(self) -> int:
        """Tokens that a hypothesis may hold: whole chunks."""
        return self.chunks * self.length
