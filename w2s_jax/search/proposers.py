"""Proposers: which models read token by token, and the logits that successors are sampled from."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from w2s_jax.errors import InputError, check_fields
from w2s_jax.ops.logits import token_logprobs
from w2s_jax.search.decode import Logits
from w2s_jax.search.models import SearchModels


@runtime_checkable
class Proposer(Protocol):
    """Extends hypotheses by tokens drawn from mixed logits. A frozen, hashable value."""

    @property
    def values_tokens(self) -> bool:
        """Whether `value` yields the implicit rewards of each drawn token as a by-product."""

    def readers(self, models: SearchModels) -> tuple[int, ...]:
        """The members (their places in `models.members`) that read every token."""

    def mix(
        self, models: SearchModels, logits: Logits, beta: Float[Array, " P"]
    ) -> Float[Array, "P *rows V"]:
        """The logits to sample from, given those of the readers and each slot's β."""

    def value(
        self, models: SearchModels, logits: Logits, tokens: Int[Array, "P *rows"]
    ) -> Float[Array, "P *rows J"]:
        """The implicit rewards of drawn tokens, one of each guide, from the readers' logits."""

    def faults(
        self, models: SearchModels, logits: Logits, mark: Float[Array, "P *rows"]
    ) -> Bool[Array, "P *rows F"]:
        """Which of `SearchModels.sources` gave logits that are no distribution.

        That is where one is NaN or +inf, or all are −inf. mark: a number that is finite where the
        mixed logits are one: their normaliser, or the logit of what was drawn.
        """


@dataclass(frozen=True)
class PolicyProposer:
    """Samples from the policy alone."""

    @property
    def values_tokens(self) -> bool:
        return False

    def readers(self, models: SearchModels) -> tuple[int, ...]:
        return (0,)

    def mix(
        self, models: SearchModels, logits: Logits, beta: Float[Array, " P"]
    ) -> Float[Array, "P *rows V"]:
        return logits[0][..., : models.vocabulary]

    def value(
        self, models: SearchModels, logits: Logits, tokens: Int[Array, "P *rows"]
    ) -> Float[Array, "P *rows J"]:
        raise TypeError("the policy alone says nothing of the implicit reward")

    def faults(
        self, models: SearchModels, logits: Logits, mark: Float[Array, "P *rows"]
    ) -> Bool[Array, "P *rows F"]:
        others = jnp.zeros((*mark.shape, len(models.members)), bool)
        return jnp.concatenate([~jnp.isfinite(mark)[..., None], others], axis=-1)


@dataclass(frozen=True)
class EFTProposer:
    """Emulated fine-tuning: samples from softmax(policy + β·Σ_i w_i·(tuned_i − untuned_i)).

    The differences are of log-probabilities; a constant a row does not change the softmax. As all
    models read each token, its implicit reward costs nothing more. With top_k above 0 only the
    policy's top_k likeliest tokens may be drawn, so that the guides never bring in a token that the
    policy finds unlikely (PAD, arXiv 2410.04070 section 3.4). Where β is above 0, a token to which
    a member of a guide gives probability 0 is not drawn, as its log-ratio is no number. Sources:
    arXiv 2310.12962 eq. 3, arXiv 2405.19262 section 4. Raises InputError for a beta or a top_k out
    of range.
    """

    beta: float | int = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.beta < math.inf:
            raise InputError(f"beta is {self.beta}; it must be 0 or above, and finite")
        if self.top_k < 0:
            raise InputError(f"the proposer's top_k is {self.top_k}; it must be 0 (off) or above")

    @property
    def values_tokens(self) -> bool:
        return True

    def readers(self, models: SearchModels) -> tuple[int, ...]:
        return tuple(range(len(models.members)))

    def mix(
        self, models: SearchModels, logits: Logits, beta: Float[Array, " P"]
    ) -> Float[Array, "P *rows V"]:
        policy, *others = (jax.nn.log_softmax(x, axis=-1)[..., : models.vocabulary] for x in logits)
        beta = beta.reshape(-1, *(1,) * (policy.ndim - 1))
        mixed = policy
        for guide, tuned, untuned in zip(models.guides, others[0::2], others[1::2], strict=True):
            ratio = tuned - untuned
            steer = jnp.where(jnp.isfinite(ratio), beta * guide.weight * ratio, -jnp.inf)
            mixed = mixed + jnp.where(beta * guide.weight == 0, 0.0, steer)
        if 0 < self.top_k < models.vocabulary:
            least = jax.lax.top_k(policy, self.top_k)[0][..., -1:]
            mixed = jnp.where(policy >= least, mixed, -jnp.inf)
        return mixed

    def value(
        self, models: SearchModels, logits: Logits, tokens: Int[Array, "P *rows"]
    ) -> Float[Array, "P *rows J"]:
        return implicit_rewards(models, tuple(token_logprobs(x, tokens) for x in logits[1:]))

    def faults(
        self, models: SearchModels, logits: Logits, mark: Float[Array, "P *rows"]
    ) -> Bool[Array, "P *rows F"]:
        # The softmaxes of `mix` need these maxima too: they are computed once.
        largest = (jnp.broadcast_to(x.max(axis=-1), mark.shape) for x in logits)
        return ~jnp.isfinite(jnp.stack([*largest, mark], axis=-1))


def implicit_rewards(models: SearchModels, logprobs: tuple[Array, ...]) -> Float[Array, "*rows J"]:
    """w_i·(log p_tuned_i − log p_untuned_i) of each guide; logprobs go tuned, untuned, tuned, ...

    Raises InputError where there is no guide.
    """
    if not models.guides:
        raise InputError(
            "the implicit reward needs at least one guide (tuned and untuned), or scorers of texts"
        )
    pairs = zip(models.guides, logprobs[0::2], logprobs[1::2], strict=True)
    return jnp.stack([guide.weight * (up - down) for guide, up, down in pairs], axis=-1)
