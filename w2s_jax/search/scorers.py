"""Scorers on tokens: which models read a proposed chunk, and the scores of each of its tokens.

Those that read texts – other vocabularies, reward models, functions – are in `texts.py`.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from w2s_jax.search.models import SearchModels
from w2s_jax.search.proposers import implicit_rewards

Values = Float[Array, "P R n J"]


@runtime_checkable
class Scorer(Protocol):
    """Values hypotheses by J sums over the tokens of their responses. A frozen, hashable value."""

    @property
    def needs_values(self) -> bool:
        """Whether the scores are made of what the proposer said of its tokens."""

    def objectives(self, models: SearchModels) -> int:
        """J, how many scores a token gets."""

    def readers(self, models: SearchModels) -> tuple[int, ...]:
        """The members (their places in `models.members`) that read every chunk, teacher-forced."""

    def token_scores(
        self,
        models: SearchModels,
        logprobs: tuple[Array, ...],
        values: Values | None,
        like: Float[Array, "P R n"],
    ) -> Values:
        """Float32 scores of tokens from the readers' log-probs or the proposer's values."""


@dataclass(frozen=True)
class LogRatio:
    """The implicit rewards w_i·(log p_tuned_i − log p_untuned_i); arXiv 2405.19262 eq. 5."""

    @property
    def needs_values(self) -> bool:
        return False

    def objectives(self, models: SearchModels) -> int:
        return len(models.guides)

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
class ProposedLogRatio:
    """The same scores, taken from a proposer whose guides have read every token already.

    With an EFT proposer under chunk-level beam search this is Integrated Value Guidance's union of
    token-wise and chunk-wise guidance (arXiv 2409.17819).
    """

    @property
    def needs_values(self) -> bool:
        return True

    def objectives(self, models: SearchModels) -> int:
        return len(models.guides)

    def readers(self, models: SearchModels) -> tuple[int, ...]:
        return ()

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
class NoScore:
    """No scores on tokens: plain sampling, or a search that only texts decide."""

    @property
    def needs_values(self) -> bool:
        return False

    def objectives(self, models: SearchModels) -> int:
        return 0

    def readers(self, models: SearchModels) -> tuple[int, ...]:
        return ()

    def token_scores(
        self,
        models: SearchModels,
        logprobs: tuple[Array, ...],
        values: Values | None,
        like: Float[Array, "P R n"],
    ) -> Values:
        return jnp.zeros((*like.shape, 0), jnp.float32)
