"""Selectors: which candidates become the hypotheses of the next chunk."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from w2s_jax.pytrees import pytree


@pytree()
class Candidates:
    """What may be kept: the rows of a chunk, then the finished hypotheses.

    scores [P, R + W] float32, −inf where there is no candidate: entry r < R is row r, entry R + w
    is hypothesis w as it was (a candidate once it has finished).
    """

    scores: Array


@runtime_checkable
class Selector(Protocol):
    """Keeps W of the candidates. A frozen, hashable value."""

    @property
    def reorders(self) -> bool:
        """Whether a hypothesis may descend from another one; if not, no cache is moved."""

    def select(self, candidates: Candidates, hypotheses: int, successors: int) -> Int[Array, "P W"]:
        """Indices into the candidates, best first unless hypotheses stay in place."""


@dataclass(frozen=True)
class TopW:
    """The W candidates of highest score; ties go to the lower index."""

    @property
    def reorders(self) -> bool:
        return True

    def select(self, candidates: Candidates, hypotheses: int, successors: int) -> Int[Array, "P W"]:
        return jax.lax.top_k(candidates.scores, hypotheses)[1].astype(jnp.int32)


@dataclass(frozen=True)
class KeepAll:
    """Every hypothesis goes on with its only successor, or stays as it is once finished.

    With W = N and K = 1 this is N independent samples: the best of them is best-of-N.
    """

    @property
    def reorders(self) -> bool:
        return False

    def select(self, candidates: Candidates, hypotheses: int, successors: int) -> Int[Array, "P W"]:
        if successors != 1:
            raise ValueError(f"KeepAll keeps one successor a hypothesis, not {successors}")
        own = jnp.arange(hypotheses, dtype=jnp.int32)
        goes_on: Float[Array, "P W"] = candidates.scores[:, :hypotheses]
        return jnp.where(jnp.isneginf(goes_on), own + hypotheses, own)
