"""Proposers: which models read token by token, and the logits that successors are sampled from."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

from w2s_jax.decode.chunk import Logits
from w2s_jax.errors import InputError
from w2s_jax.models.model import Model
from w2s_jax.ops.logprobs import token_logprobs
from w2s_jax.search.guides import SearchModels


@runtime_checkable
class Proposer(Protocol):
    """Extends hypotheses by tokens drawn from mixed logits. A frozen, hashable value."""

    @property
    def values_tokens(self) -> bool:
        """Whether `value` yields the implicit reward of each drawn token as a by-product."""

    def readers(self, models: SearchModels) -> tuple[Model, ...]:
        """The models that read every token; each keeps a cache."""

    def mix(self, models: SearchModels, logits: Logits) -> Float[Array, "*rows V"]:
        """The logits to sample from, given those of the readers."""

    def value(
        self, models: SearchModels, logits: Logits, tokens: Int[Array, "*rows"]
    ) -> Float[Array, "*rows"]:
        """The implicit reward of drawn tokens, from the readers' logits."""


@dataclass(frozen=True)
class PolicyProposer:
    """Samples from the policy alone."""

    @property
    def values_tokens(self) -> bool:
        return False

    def readers(self, models: SearchModels) -> tuple[Model, ...]:
        return (models.policy,)

    def mix(self, models: SearchModels, logits: Logits) -> Float[Array, "*rows V"]:
        return logits[0][..., : models.vocabulary]

    def value(
        self, models: SearchModels, logits: Logits, tokens: Int[Array, "*rows"]
    ) -> Float[Array, "*rows"]:
        raise TypeError("the policy alone says nothing of the implicit reward")


@dataclass(frozen=True)
class EFTProposer:
    """Emulated fine-tuning: samples from softmax(policy + β·Σ_i w_i·(tuned_i − untuned_i)).

    The differences are of log-probabilities; a constant a row does not change the softmax. As all
    models read each token, its implicit reward costs nothing more. Sources: arXiv 2310.12962
    eq. 3, arXiv 2405.19262 section 4.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise InputError(f"beta is {self.beta}; it must be 0 or above, and finite")

    @property
    def values_tokens(self) -> bool:
        return True

    def readers(self, models: SearchModels) -> tuple[Model, ...]:
        pairs = [(guide.tuned, guide.untuned) for guide in models.guides]
        return (models.policy, *(model for pair in pairs for model in pair))

    def mix(self, models: SearchModels, logits: Logits) -> Float[Array, "*rows V"]:
        policy, *others = (jax.nn.log_softmax(x, axis=-1)[..., : models.vocabulary] for x in logits)
        mixed = policy
        for guide, tuned, untuned in zip(models.guides, others[0::2], others[1::2], strict=True):
            mixed = mixed + self.beta * guide.weight * (tuned - untuned)
        return mixed

    def value(
        self, models: SearchModels, logits: Logits, tokens: Int[Array, "*rows"]
    ) -> Float[Array, "*rows"]:
        return implicit_reward(models, tuple(token_logprobs(x, tokens) for x in logits[1:]))


def implicit_reward(models: SearchModels, logprobs: tuple[Array, ...]) -> Float[Array, "*rows"]:
    """Σ_i w_i·(log p_tuned_i − log p_untuned_i) ; logprobs go tuned, untuned, tuned, ..."""
    tuned, untuned = logprobs[0::2], logprobs[1::2]
    total = None
    for guide, up, down in zip(models.guides, tuned, untuned, strict=True):
        term = guide.weight * (up - down)
        total = term if total is None else total + term
    if total is None:
        raise InputError("the implicit reward needs at least one guide (tuned and untuned)")
    return total
