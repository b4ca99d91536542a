"""Losses on single responses: KTO, which judges each by a label, and WSPO, which judges none.

Log-probs are in nats; one loss per response, Float["B"], float32 for float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from w2s_jax.train.losses import Mean, Metrics
from w2s_jax.train.preference_losses import Logprobs

TokenLogprobs = Float[Array, "B X"]


def kto_kl(policy_mismatched: Logprobs, reference_mismatched: Logprobs) -> Float[Array, ""]:
    """KTO's estimate of KL(policy || reference): the batch mean log-ratio of mismatched responses.

    The responses are those of the batch, each behind the prompt of another row (TRL: of the next).
    Held at 0 from below and without gradient, arXiv 2402.01306, as in TRL.
    """
    kl = (policy_mismatched - reference_mismatched).mean()
    return jax.lax.stop_gradient(jnp.maximum(kl, 0.0))


def kto(
    policy: Logprobs,
    reference: Logprobs,
    labels: Bool[Array, " B"],
    kl: Float[Array, ""],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Logprobs:
    """KTO: w_d (1 - s(b (c - kl))) where `labels`, else w_u (1 - s(b (kl - c))).

    arXiv 2402.01306 eq. 7, c = log p(y|x) - log p_ref(y|x), `kl` from `kto_kl`. The paper and
    TRL's KTOTrainer agree. With kl = 0 it is TRL's `apo_zero_unpaired`.
    """
    rewards = beta * (policy - reference - kl)
    weights = jnp.where(labels, desirable_weight, undesirable_weight)
    return weights * jax.nn.sigmoid(jnp.where(labels, -rewards, rewards))


def kto_metrics(
    policy: Logprobs,
    reference: Logprobs,
    labels: Bool[Array, " B"],
    kl: Float[Array, ""],
    *,
    beta: float = 0.1,
) -> Metrics:
    """TRL's metrics of a KTO batch: means over its desirable and over its undesirable responses.

    A mean has its own count, as a batch may hold few of a kind, or none; the margin is the mean of
    the desirable ones less that of the others.
    """
    rewards = beta * (policy - reference)

    def mean(values: Logprobs, where: Bool[Array, " B"]) -> Mean:
        return Mean(jnp.where(where, values, 0.0).sum(), where.sum().astype(jnp.float32))

    chosen, rejected = mean(rewards, labels), mean(rewards, ~labels)
    margins = Mean(
        jnp.stack([chosen.total, -rejected.total]), jnp.stack([chosen.count, rejected.count])
    )
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "logps/chosen": mean(policy, labels),
        "logps/rejected": mean(policy, ~labels),
        "kl": kl,
    }


def wspo(
    policy: TokenLogprobs,
    reference: TokenLogprobs,
    tuned: TokenLogprobs,
    untuned: TokenLogprobs,
    mask: Bool[Array, "B X"],
    *,
    beta: float = 0.1,
) -> Logprobs:
    """WSPO: the mean over the response's tokens of (b (log p - log p_ref) - (log p_t - log p_u))^2.

    arXiv 2410.18640: the policy learns the shift of the guide from untuned (u) to tuned (t) at
    1 / b of its strength, b the paper's gamma. The paper writes the squared L2 distance of the
    log-ratios; which vector it is of follows the code published with it: that of the tokens where
    `mask` is True, divided by their number. Arguments are log-probs per token, log p(token |
    before), of the same response under four models of one vocabulary; TRL has no such loss.
    """
    error = jnp.where(mask, beta * (policy - reference) - (tuned - untuned), 0.0)
    return (error**2).sum(-1) / jnp.maximum(mask.sum(-1), 1)
