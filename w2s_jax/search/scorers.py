"""Scorers: on tokens, inside the compiled step, and on texts, which the host reads between steps.

A scorer on tokens says which models read a proposed chunk, and scores each of its tokens. A scorer
on texts is given whole responses: any Python function is one; those that read with models – guides
of other vocabularies, reward models – are in `model_scorers.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from w2s_jax.distributed import from_first, gather_values
from w2s_jax.errors import SCORER, InputError, check_fields, shown
from w2s_jax.search.models import SearchModels
from w2s_jax.search.proposers import implicit_rewards
from w2s_jax.text.prompts import Conversation, plain

Values = Float[Array, "P R n J"]
_NOT_FINITE = "gave a score that is not a finite number"


@runtime_checkable
class Scorer(Protocol):
    """Values hypotheses by J sums over the tokens of their responses. A frozen, hashable value.

    What a subclass does not say is as of scores of the guides for which no model reads anything.
    """

    @property
    def needs_values(self) -> bool:
        """Whether the scores are made of what the proposer said of its tokens."""
        return False

    def objectives(self, models: SearchModels) -> int:
        """J, how many scores a token gets."""
        return len(models.guides)

    def readers(self, models: SearchModels) -> tuple[int, ...]:
        """The members (their places in `models.members`) that read every chunk, teacher-forced."""
        return ()

    def token_scores(
        self,
        models: SearchModels,
        logprobs: tuple[Array, ...],
        values: Values | None,
        like: Float[Array, "P R n"],
    ) -> Values:
        """Float32 scores of tokens from the readers' log-probs or the proposer's values."""


@dataclass(frozen=True)
class LogRatio(Scorer):
    """The implicit rewards w_i·(log p_tuned_i − log p_untuned_i); arXiv 2405.19262 eq. 5."""

    def readers(self, models: SearchModels) -> tuple[int, ...]:
        return tuple(range(1, len(models.members)))

    def token_scores(
        self,
        models: SearchModels,
        logprobs: tuple[Array, ...],
        values: Values | None,
        like: Float[Array, "P R n"],
    ) -> Values:
        return implicit_rewards(models, logprobs)


@dataclass(frozen=True)
class ProposedLogRatio(Scorer):
    """The same scores, taken from a proposer whose guides have read every token already.

    With an EFT proposer under chunk-level beam search this is Integrated Value Guidance's union of
    token-wise and chunk-wise guidance (arXiv 2409.17819).
    """

    @property
    def needs_values(self) -> bool:
        return True

    def token_scores(
        self,
        models: SearchModels,
        logprobs: tuple[Array, ...],
        values: Values | None,
        like: Float[Array, "P R n"],
    ) -> Values:
        if values is None:
            raise TypeError("this scorer needs a proposer that values its tokens")
        return values


@dataclass(frozen=True)
class NoScore(Scorer):
    """No scores on tokens: plain sampling, or a search that only texts decide."""

    def objectives(self, models: SearchModels) -> int:
        return 0

    def token_scores(
        self,
        models: SearchModels,
        logprobs: tuple[Array, ...],
        values: Values | None,
        like: Float[Array, "P R n"],
    ) -> Values:
        return jnp.zeros((*like.shape, 0), jnp.float32)


@dataclass(frozen=True)
class Candidate:
    """A response, whole so far, that may be kept.

    row (0 .. R − 1) of a slot continues hypothesis parent = row // K. finished: it ended by EOS,
    which is scored behind it.
    """

    slot: int
    row: int
    parent: int
    conversation: Conversation
    response: str
    finished: bool


@runtime_checkable
class TextScorer(Protocol):
    """Values whole responses as texts. A frozen value; what it remembers goes in and comes out.

    The score of a hypothesis gains weight · score. What was scored before and kept is told by
    `keep`, so that a scorer may read only what is new. Where a score is not finite, `blame` (which
    a scorer may lack) tells which of its models is at fault.
    """

    @property
    def weight(self) -> float | int:
        """What scores are multiplied by."""

    def start(self, slots: int, hypotheses: int, successors: int, chunk_length: int) -> Any:
        """An empty memory for so many slots, hypotheses W, successors K and tokens L of a chunk."""

    def insert(self, memory: Any, slot: int, conversation: Conversation) -> Any:
        """The memory once a slot holds a new prompt."""

    def score(self, memory: Any, candidates: Sequence[Candidate]) -> tuple[Any, np.ndarray]:
        """The memory with these read, and a float32 score, unweighted, of each."""

    def keep(self, memory: Any, parents: np.ndarray, rows: np.ndarray) -> Any:
        """The memory of the kept hypotheses, int [P, W]: of which old one, and of which row."""


def at_fault(
    scorer: TextScorer, memory: Any, candidates: Sequence[Candidate], scores: np.ndarray
) -> dict[int, tuple[str, ...]]:
    """Slots with a score that is not finite as models failed, and their names.

    memory: what `score` gave with the scores. A scorer may say `blame(memory, (slot, row))`: the
    names of its models whose logits were NaN or infinite, none where a token's probability is 0.
    One that does not is itself at fault.
    """
    usual = (f"{SCORER}{type(scorer).__name__} {_NOT_FINITE}",)
    blame = getattr(scorer, "blame", lambda memory, place: usual)
    failed: dict[int, tuple[str, ...]] = {}
    for index in np.flatnonzero(~np.isfinite(scores)).tolist():
        one = candidates[index]
        names = blame(memory, (one.slot, one.row))
        failed |= {one.slot: names} if names else {}
    return failed


@dataclass(frozen=True)
class FunctionScorer:
    """Any function of (prompts, responses) to numbers, called once a chunk with all candidates.

    A prompt is its bare text, or the content of its only message, or its messages as lines. Where
    the function raises it is called for each prompt alone: prompts at which it raises again, and
    those with a number that is not finite, fail, and the others go on. Raises InputError where it
    raises for all of several prompts, and for what is not one number for each response.
    """

    function: Callable[[list[str], list[str]], Sequence[Any]]
    weight: float | int = 1.0

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InputError(f"a FunctionScorer takes a function, not {shown(self.function)}")
        check_fields(self)

    def start(self, slots: int, hypotheses: int, successors: int, chunk_length: int) -> None:
        return None

    def insert(self, memory: Any, slot: int, conversation: Conversation) -> Any:
        return memory

    def score(
        self, memory: Any, candidates: Sequence[Candidate]
    ) -> tuple[dict[int, str], np.ndarray]:
        """The errors by slot, and the scores, NaN where there is one.

        Called on the first of several hosts alone, as it need not say the same twice.
        """
        like = np.zeros(len(candidates), np.float32)
        raised: dict[int, str] = {}
        scores = from_first(lambda: self._scores(candidates, raised), like)
        if not np.isfinite(scores).all():
            first, *_ = gather_values(list(raised.items()))
            raised = dict(first)
        return raised, scores

    def blame(self, memory: dict[int, str], place: tuple[int, int]) -> tuple[str, ...]:
        """The function, and what it did."""
        error = memory.get(place[0])
        did = _NOT_FINITE if error is None else f"raised {error}"
        return (f"{SCORER}{self._name} {did}",)

    def keep(self, memory: Any, parents: np.ndarray, rows: np.ndarray) -> Any:
        return memory

    @property
    def _name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def _scores(self, candidates: Sequence[Candidate], raised: dict[int, str]) -> np.ndarray:
        try:
            said = self._said(candidates)
        except (Exception, SystemExit) as error:  # it is the user's own code
            return self._apart(candidates, raised, error)
        return self._numbers(said, len(candidates))

    def _apart(
        self, candidates: Sequence[Candidate], raised: dict[int, str], error: BaseException
    ) -> np.ndarray:
        """The scores of each slot alone; what is raised there goes to `raised`."""
        slots = sorted({candidate.slot for candidate in candidates})
        scores = np.full(len(candidates), np.nan, np.float32)
        for slot in slots:
            own = [i for i, candidate in enumerate(candidates) if candidate.slot == slot]
            try:
                if len(slots) == 1:  # which has been tried
                    raise error
                said = self._said([candidates[i] for i in own])
            except (Exception, SystemExit) as fault:
                raised[slot] = _told(fault)
                continue
            scores[own] = self._numbers(said, len(own))
        if len(raised) == len(slots) > 1:  # the function's own fault rather than a prompt's
            raise InputError(f"the scorer {self._name} raised {_told(error)}") from error
        return scores

    def _said(self, candidates: Sequence[Candidate]) -> Any:
        prompts = [plain(candidate.conversation) for candidate in candidates]
        return self.function(prompts, [candidate.response for candidate in candidates])

    def _numbers(self, said: Any, count: int) -> np.ndarray:
        try:
            scores = np.asarray(said, np.float32)
        except (TypeError, ValueError):
            raise InputError(
                f"the scorer {self._name} returned what is not a list of numbers"
            ) from None
        if scores.shape != (count,):
            raise InputError(
                f"the scorer {self._name} returned an array of shape {scores.shape} for "
                f"{count} responses; it must return one number each"
            )
        return scores


def _told(error: BaseException) -> str:
    """An error's kind, and the beginning of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:80]}" if lines else type(error).__name__
