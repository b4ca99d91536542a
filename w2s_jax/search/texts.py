"""Scorers of texts: what they are given, what they return, and any Python function as one.

Those that read with a model – another vocabulary's guide, a reward model – are in `reading.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from w2s_jax.errors import InputError
from w2s_jax.exchange import from_first
from w2s_jax.text.conversations import Conversation, plain
from w2s_jax.typed import check_fields, shown


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
    blame = getattr(scorer, "blame", lambda memory, place: (f"scorer {type(scorer).__name__}",))
    failed: dict[int, tuple[str, ...]] = {}
    for index in np.flatnonzero(~np.isfinite(scores)).tolist():
        one = candidates[index]
        names = blame(memory, (one.slot, one.row))
        failed |= {one.slot: names} if names else {}
    return failed


@dataclass(frozen=True)
class FunctionScorer:
    """Any function of (prompts, responses) to numbers, called once a chunk with all candidates.

    A prompt is its bare text, or the content of its only message, or its messages as lines. Raises
    InputError where the function raises, returns another count, or what is not a finite number.
    """

    function: Callable[[list[str], list[str]], Sequence[Any]]
    weight: float | int = 1.0

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InputError(f"a FunctionScorer takes a function, not {shown(self.function)}")
        check_fields(self)

    def start(self, slots: int, hypotheses: int, successors: int, chunk_length: int) -> None:
        return None

    def insert(self, memory: None, slot: int, conversation: Conversation) -> None:
        return None

    def score(self, memory: None, candidates: Sequence[Candidate]) -> tuple[None, np.ndarray]:
        """Called on the first of several hosts alone, as it need not say the same twice."""
        like = np.zeros(len(candidates), np.float32)
        return None, from_first(lambda: self._scores(candidates), like)

    def _scores(self, candidates: Sequence[Candidate]) -> np.ndarray:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        prompts = [plain(candidate.conversation) for candidate in candidates]
        try:
            said = self.function(prompts, [candidate.response for candidate in candidates])
        except (Exception, SystemExit) as error:  # it is the user's own code
            raise InputError(f"the scorer {name} raised {type(error).__name__}: {error}") from error
        try:
            scores = np.asarray(said, np.float32)
        except (TypeError, ValueError):
            raise InputError(f"the scorer {name} returned what is not a list of numbers") from None
        if scores.shape != (len(candidates),):
            raise InputError(
                f"the scorer {name} returned an array of shape {scores.shape} for "
                f"{len(candidates)} responses; it must return one number each"
            )
        if not np.isfinite(scores).all():
            raise InputError(f"the scorer {name} returned a score that is not a finite number")
        return scores

    def keep(self, memory: None, parents: np.ndarray, rows: np.ndarray) -> None:
        return None
