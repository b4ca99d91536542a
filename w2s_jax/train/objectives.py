"""Binds models to losses: from a batch of token ids to the value that a step differentiates.

The formulas are in losses.py. Batches hold `tokens` Int["B X"], `segments` Int["B X"] (0 on
padding) and `targets` Bool["B X"] (tokens whose log-probs count); pairs hold the same with shape
["B 2 X"], chosen first.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from w2s_jax.models.config import ModelConfig
from w2s_jax.models.decoder import Remat
from w2s_jax.models.lora import LoraConfig, attach
from w2s_jax.models.model import Model
from w2s_jax.ops.sharding import ON_ONE_DEVICE, Placement
from w2s_jax.train.config import PreferenceConfig
from w2s_jax.train.logprobs import (
    READ,
    REFERENCE,
    TokenScores,
    flat_rows,
    response_logprobs,
    scored_tokens,
    sequence_scores,
    weighted_logprob,
)
from w2s_jax.train.losses import (
    Mean,
    Metrics,
    PairLogprobs,
    kto,
    kto_kl,
    kto_metrics,
    preference_loss,
    wspo,
)
from w2s_jax.train.step import Batch, LossFunction

Frozen = Mapping[str, Model]

BASE, TUNED, UNTUNED = "base", "tuned", "untuned"
"""Roles of frozen models other than REFERENCE: the base of adapters, and a guide."""


@dataclass(frozen=True)
class Policy:
    """The model in training, as a function of its trained and its frozen parameters.

    Attributes:
        config: The model's config.
        lora: Adapters on a frozen base, which are then what is trained; None trains the model
            itself.
        remat: What a layer's backward pass recomputes, as in `models.model.hidden_states`.
        placement: Where the model lies, and with it the rows of a batch.
    """

    config: ModelConfig
    lora: LoraConfig | None = None
    remat: Remat = "none"
    placement: Placement = ON_ONE_DEVICE

    def model(self, params: Any, frozen: Frozen) -> Model:
        """The model with these parameters; shares the arrays of a frozen base."""
        if self.lora is None:
            return Model(self.config, params, self.placement)
        whole = attach(frozen[BASE].params, params, self.lora)
        return Model(self.config, whole, self.placement)

    def scores(self, params: Any, frozen: Frozen, batch: Batch, key: Array | None) -> TokenScores:
        """Scores of the tokens of a batch [B, X] under the model; `key` is for dropout."""
        return _scores(self.model(params, frozen), batch, **self.reading(key))

    def reading(self, key: Array | None) -> dict[str, Any]:
        """Options for reading a batch in training; without dropout a key would only cost time."""
        drops = self.lora is not None and self.lora.dropout > 0
        return {"remat": self.remat, "key": key if drops else None}


def reference_of(frozen: Frozen) -> Model:
    """The reference model: the one given, or the base, which adapters equal before training."""
    return frozen[REFERENCE] if REFERENCE in frozen else frozen[BASE]


def sft_loss(policy: Policy) -> LossFunction:
    """Next-token loss in nats: the mean over a batch's targets [B, X], weighted by their number.

    Every target has the same weight, so that long rows count for more than short ones, as in TRL.
    """

    def loss(params: Any, frozen: Any, batch: Batch, key: Any) -> tuple[Array, Array, Metrics]:
        batch = _on_device(batch)
        targets = scored_tokens(batch["segments"], batch["targets"])
        count = targets.sum().astype(jnp.float32)
        total, scores = weighted_logprob(
            policy.model(params, frozen), batch["tokens"], batch["segments"],
            targets / jnp.maximum(count, 1.0), **policy.reading(key),
        )  # fmt: skip
        metrics = {"loss": -total, "mean_token_accuracy": _accuracy(scores, targets)}
        return -total, count, metrics | {"num_tokens": _read(batch)}

    return loss


def pair_loss(policy: Policy, preference: PreferenceConfig) -> LossFunction:
    """The losses of a PreferenceConfig over pairs [B, 2, X], chosen first.

    A pair has weight 1, or that in `weights` Float["B"] of the batch: the loss is the sum of weight
    × loss over the sum of the weights, over all micro-batches of a step. Losses that couple the
    pairs of a batch (aot, aot_unpaired, the next-token terms) do so within a micro-batch.

    The reference's log-probs are `reference` Float["B 2"] of the batch, or else are computed by the
    frozen reference.
    """

    def loss(params: Any, frozen: Any, batch: Batch, key: Any) -> tuple[Array, Array, Metrics]:
        batch = _on_device(batch)
        flat, shape = flat_rows(batch)
        scores = policy.scores(params, frozen, flat, key)
        logprobs = jnp.where(flat["targets"], scores.logprobs, 0.0).sum(-1).reshape(shape)
        lengths = flat["targets"].sum(-1).reshape(shape)
        held = {"policy": logprobs}
        if preference.needs_reference:
            held["reference"] = _reference(frozen, batch)
        columns = {
            f"{name}_{side}": array[:, i]
            for name, array in held.items()
            for i, side in enumerate(("chosen", "rejected"))
        }
        pairs = PairLogprobs(
            **columns, chosen_lengths=lengths[:, 0], rejected_lengths=lengths[:, 1]
        )
        values, metrics = preference_loss(preference, pairs)
        weights = batch.get("weights", jnp.ones(shape[0], jnp.float32))
        weight = weights.sum()
        value = (weights * values).sum() / weight
        chosen = batch["targets"].at[:, 1].set(False).reshape(flat["targets"].shape)
        accuracy = _accuracy(scores, chosen)
        metrics |= {"loss": value, "mean_token_accuracy": accuracy, "num_tokens": _read(batch)}
        return value, weight, metrics

    return loss


def kto_loss(policy: Policy, preference: PreferenceConfig) -> LossFunction:
    """KTO over rows [B, 2, X]: a response, and one of another row after the same prompt.

    `labels` Bool["B"] says which responses are desirable; `reference` is as in `pair_loss`. The
    mismatched responses serve only to estimate the KL divergence, and have no backward pass.
    """
    options = preference.options("kto")
    beta = options["beta"]

    def loss(params: Any, frozen: Any, batch: Batch, key: Any) -> tuple[Array, Array, Metrics]:
        batch = _on_device(batch)
        own, mismatched = ({name: batch[name][:, i] for name in READ} for i in (0, 1))
        scores = policy.scores(params, frozen, own, key)
        logprobs = jnp.where(own["targets"], scores.logprobs, 0.0).sum(-1)
        fixed = policy.model(jax.lax.stop_gradient(params), frozen)
        reference = _reference(frozen, batch)
        kl = kto_kl(response_logprobs(fixed, mismatched), reference[:, 1])
        labels = batch["labels"]
        values = kto(logprobs, reference[:, 0], labels, kl, **options)
        metrics = kto_metrics(logprobs, reference[:, 0], labels, kl, beta=beta)
        value, weight = values.mean(), jnp.float32(len(labels))
        metrics |= {"loss": value, "num_tokens": _read(batch)}
        return value, weight, jax.lax.stop_gradient(metrics)

    return loss


def wspo_loss(policy: Policy, preference: PreferenceConfig) -> LossFunction:
    """WSPO over responses [B, X] under four models: in training, reference, tuned, untuned.

    The guide and the reference are frozen. Each response has weight 1.
    """

    def loss(params: Any, frozen: Any, batch: Batch, key: Any) -> tuple[Array, Array, Metrics]:
        batch = _on_device(batch)
        scores = policy.scores(params, frozen, batch, key)
        fixed = [_scores(model, batch).logprobs for model in (
            reference_of(frozen), frozen[TUNED], frozen[UNTUNED]
        )]  # fmt: skip
        targets = batch["targets"]
        reference, tuned, untuned = map(jax.lax.stop_gradient, fixed)
        values = wspo(scores.logprobs, reference, tuned, untuned, targets, beta=preference.beta)
        value, weight = values.mean(), jnp.float32(len(targets))
        shift = jnp.where(targets, scores.logprobs - reference, 0.0).sum(-1)
        guide = jnp.where(targets, tuned - untuned, 0.0).sum(-1)
        metrics = {
            "loss": value,
            "rewards/policy": preference.beta * shift.mean(),
            "rewards/guide": guide.mean(),
            "mean_token_accuracy": _accuracy(scores, targets),
            "num_tokens": _read(batch),
        }
        return value, weight, jax.lax.stop_gradient(metrics)

    return loss


def preference_objective(policy: Policy, preference: PreferenceConfig) -> LossFunction:
    """The loss function for the losses that a PreferenceConfig names."""
    alone: dict[str, Callable[[Policy, PreferenceConfig], LossFunction]] = {
        "kto": kto_loss, "wspo": wspo_loss
    }  # fmt: skip
    return alone.get(preference.losses[0], pair_loss)(policy, preference)


def _scores(model: Model, batch: Batch, **reading: Any) -> TokenScores:
    return sequence_scores(
        model, batch["tokens"], batch["segments"], targets=batch["targets"], **reading
    )


def _on_device(batch: Batch) -> Batch:
    """The batch as jax arrays; it may come as NumPy arrays."""
    return {name: jnp.asarray(array) for name, array in batch.items()}


def _reference(frozen: Frozen, batch: Batch) -> Float[Array, "B 2"]:
    if REFERENCE in batch:
        return batch[REFERENCE]
    return jax.lax.stop_gradient(response_logprobs(reference_of(frozen), batch))


def _accuracy(scores: TokenScores, targets: Bool[Array, "B X"]) -> Mean:
    """Share of the targets that are the model's likeliest token."""
    counts = (mask.sum().astype(jnp.float32) for mask in (scores.correct & targets, targets))
    return jax.lax.stop_gradient(Mean(*counts))


def _read(batch: Batch) -> Float[Array, ""]:
    """Number of tokens in a batch, prompts included, padding excluded."""
    return (batch["segments"] > 0).sum().astype(jnp.float32)
