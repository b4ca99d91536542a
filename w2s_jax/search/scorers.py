"""Scorers: which models read a proposed chunk, and the score of each of its tokens."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from w2s_jax.models.model import Model
from w2s_jax.search.guides import SearchModels
from w2s_jax.search.proposers import implicit_reward


@runtime_checkable
class Scorer(Protocol):
    """Values hypotheses by a sum over the tokens of their responses. A frozen, hashable value."""

    @property
    def needs_values(self) -> bool:
        """Whether the score is made of what the proposer said of its tokens."""

    def readers(self, models: SearchModels) -> tuple[Model, ...]:
        """The models that read every chunk, teacher-forced; each keeps a cache."""

    def token_scores(
        self,
        models: SearchModels,
        logprobs: tuple[Array, ...],
        values: Float[Array, "P R n"] | None,
        like: Float[Array, "P R n"],
    ) -> Float[Array, "P R n"]:
        """Float32 scores of tokens from the readers' log-probs or the proposer's values."""


@dataclass(frozen=True)
class LogRatio:
    """The implicit reward Σ_i w_i·(log p_tuned_i − log p_untuned_i); arXiv 2405.19262 eq. 5."""

    @property
    def needs_values(self) -> bool:
        return False

    def readers(self, models: SearchModels) -> tuple[Model, ...]:
        return tuple(model for guide in models.guides for model in (guide.tuned, guide.untuned))

    def token_scores(
        self,
        models: SearchModels,
        logprobs: tuple[Array, ...],
        values: Float[Array, "P R n"] | None,
        like: Float[Array, "P R n"],
    ) -> Float[Array, "P R n"]:
        return implicit_reward(models, logprobs)


@dataclass(frozen=True)
class ProposedLogRatio:
    """The same score, taken from a proposer whose guides have read every token already."""

    @property
    def needs_values(self) -> bool:
        return True

    def readers(self, models: SearchModels) -> tuple[Model, ...]:
        return ()

    def token_scores(
        self,
        models: SearchModels,
        logprobs: tuple[Array, ...],
        values: Float[Array, "P R n"] | None,
        like: Float[Array, "P R n"],
    ) -> Float[Array, "P R n"]:
        if values is None:
            raise TypeError("this scorer needs a proposer that values its tokens")
        return values


@dataclass(frozen=True)
class NoScore:
    """Every response scores zero: plain sampling."""

    @property
    def needs_values(self) -> bool:
        return False

    def readers(self, models: SearchModels) -> tuple[Model, ...]:
        return ()

    def token_scores(
        self,
        models: SearchModels,
        logprobs: tuple[Array, ...],
        values: Float[Array, "P R n"] | None,
        like: Float[Array, "P R n"],
    ) -> Float[Array, "P R n"]:
        return jnp.zeros_like(like)
