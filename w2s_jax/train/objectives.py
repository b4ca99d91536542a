"""Binds a decoder to a loss: from a batch of token ids to the value that a step differentiates.

The formulas themselves are in losses.py. Batches hold `tokens` Int["B X"], `targets` Bool["B X"]
(tokens whose log-probs count) and, where rows are padded, `mask` Bool["B X"].
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from w2s_jax.models.config import ModelConfig
from w2s_jax.models.model import Model
from w2s_jax.ops.logprobs import token_logprobs
from w2s_jax.train import losses
from w2s_jax.train.step import Batch, LossFunction, Metrics


def next_token_logprobs(
    model: Model, tokens: Int[Array, "B X"], mask: Bool[Array, "B X"] | None = None
) -> Float[Array, "B X-1"]:
    """Float32 log p(token | tokens before it) of every token but the first."""
    return token_logprobs(model(tokens, mask)[:, :-1], tokens[:, 1:])


def response_logprobs(
    model: Model, tokens: Int[Array, "B X"], mask: Bool[Array, "B X"], targets: Bool[Array, "B X"]
) -> Float[Array, " B"]:
    """Summed log-prob of each row's targets; one in first place has none and is left out."""
    return jnp.where(targets[:, 1:], next_token_logprobs(model, tokens, mask), 0.0).sum(-1)


def sft_loss(config: ModelConfig) -> LossFunction:
    """Next-token loss over `targets`, weighted by their number."""

    def loss(params: Any, batch: Batch, key: Array) -> tuple[Array, Array, Metrics]:
        logprobs = next_token_logprobs(Model(config, params), batch["tokens"], batch.get("mask"))
        value, metrics = losses.sft(logprobs, batch["targets"][:, 1:])
        return value, metrics.pop("num_tokens"), metrics

    return loss


def dpo_loss(
    config: ModelConfig, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> LossFunction:
    """DPO over pairs laid out side by side: every array of the batch is [B, 2, ..], chosen first.

    `reference` Float["B 2"] holds the reference model's log-probs of the same targets.
    """

    def loss(params: Any, batch: Batch, key: Array) -> tuple[Array, Array, Metrics]:
        model = Model(config, params)
        rows = [
            batch[name].reshape(-1, batch[name].shape[-1]) for name in ("tokens", "mask", "targets")
        ]
        logprobs = response_logprobs(model, *rows).reshape(-1, 2)
        reference = batch["reference"]
        value, metrics = losses.dpo(
            logprobs[:, 0], logprobs[:, 1], reference[:, 0], reference[:, 1],
            beta=beta, label_smoothing=label_smoothing,
        )  # fmt: skip
        return value, jnp.float32(len(reference)), metrics

    return loss
