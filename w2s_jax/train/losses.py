"""Losses without a reference model and on single responses, and what all losses share.

KTO judges each response by a label, WSPO by none; ORPO, CPO, SimPO and GenARM judge pairs.
Log-probs are in nats; one loss per pair or response, Float["B"], float32 for float32. Metrics have
TRL's names.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Bool, Float, Int

from w2s_jax.train.preference_losses import Lengths, Logprobs, per_token, sft, smoothed_logistic

Metrics = dict[str, Any]
"""Scalars by name, means with the weight of the batch; or `Mean`s, which have their own counts."""


class Mean(NamedTuple):
    """A mean as sum and count, so that those of several batches make one: they are added.

    Of more than one entry, the value is the sum of the entries' means. Where an entry counts
    nothing there is nothing to report: the value is nan.
    """

    total: Any
    count: Any

    @property
    def value(self) -> Any:
        """The value; arrays of any library."""
        return (self.total / self.count).sum()


def preference_metrics(
    policy_chosen: Float[Array, " B"],
    policy_rejected: Float[Array, " B"],
    chosen_rewards: Float[Array, " B"],
    rejected_rewards: Float[Array, " B"],
) -> Metrics:
    """Batch means under TRL's names: rewards, how far and how often chosen is above, log-probs.

    A pair with equal rewards counts as not above. All are scalars, float32 for float32.
    """
    margins = chosen_rewards - rejected_rewards
    return {
        "rewards/chosen": chosen_rewards.mean(),
        "rewards/rejected": rejected_rewards.mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).mean(dtype=jnp.float32),
        "logps/chosen": policy_chosen.mean(),
        "logps/rejected": policy_rejected.mean(),
    }


def classification(
    logits: Float[Array, "B labels"], labels: Int[Array, " B"]
) -> tuple[Float[Array, ""], Metrics]:
    """Mean cross-entropy of integer labels, in nats, with the accuracy of the largest logit."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    loss = -jnp.take_along_axis(logprobs, labels[:, None], axis=1).mean()
    accuracy = (logits.argmax(-1) == labels).mean(dtype=jnp.float32)
    return loss, {"loss": loss, "accuracy": accuracy}


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


def orpo(
    policy_chosen: Logprobs,
    policy_rejected: Logprobs,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    chosen_nll: Logprobs | None = None,
    *,
    beta: float = 0.1,
) -> Logprobs:
    """ORPO: NLL(chosen) - b log s(log odds(chosen) - log odds(rejected)), b the paper's lambda.

    arXiv 2403.07691 eqs. 4, 6 and 7, with odds = p / (1 - p) and p the geometric mean of a
    response's token probabilities. The NLL is that of `sft`, over the response as in the paper;
    TRL takes it over prompt and response. `chosen_nll` takes its place where given.
    """
    nll = sft(policy_chosen, chosen_lengths) if chosen_nll is None else chosen_nll
    chosen = log_odds(per_token(policy_chosen, chosen_lengths))
    rejected = log_odds(per_token(policy_rejected, rejected_lengths))
    return nll - beta * log_sigmoid(chosen - rejected)


def cpo(
    policy_chosen: Logprobs,
    policy_rejected: Logprobs,
    chosen_lengths: Lengths,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 1.0,
) -> Logprobs:
    """CPO: -log s(b (log p(chosen) - log p(rejected))) + alpha NLL(chosen), arXiv 2401.08417 eq. 3.

    TRL's CPOTrainer with `loss_type="sigmoid"`, its label smoothing (that of cDPO) included. The
    NLL is that of `sft`. The paper has alpha = 1.
    """
    margins = beta * (policy_chosen - policy_rejected)
    return smoothed_logistic(margins, label_smoothing) + cpo_alpha * sft(
        policy_chosen, chosen_lengths
    )


def simpo(
    policy_chosen: Logprobs,
    policy_rejected: Logprobs,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
) -> Logprobs:
    """SimPO: -log s(b log p(chosen) / |chosen| - b log p(rejected) / |rejected| - gamma).

    arXiv 2405.14734 eq. 6. TRL's CPOTrainer with `loss_type="simpo"` adds `cpo_alpha` (1 unless
    set to 0) times the NLL of the chosen response; here `sft` is mixed in by `loss_weights`. The
    default beta is TRL's; the paper uses 2 to 2.5, with gamma 0.3 to 1.6.
    """
    chosen = per_token(policy_chosen, chosen_lengths)
    rejected = per_token(policy_rejected, rejected_lengths)
    return smoothed_logistic(beta * (chosen - rejected) - simpo_gamma, label_smoothing)


def genarm(
    policy_chosen: Logprobs,
    policy_rejected: Logprobs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Logprobs:
    """The autoregressive reward model of GenARM: -log s(b (log p(chosen) - log p(rejected))).

    arXiv 2410.08193, the training objective: the reward of a response is its log-prob under the
    model trained, a sum over tokens; preferences follow Bradley and Terry, b is the paper's beta_r.
    TRL has no such loss; label smoothing is that of cDPO, as in the trainer published with the
    paper. It is `sigmoid` with a constant reference, and `cpo` at alpha = 0.
    """
    return smoothed_logistic(beta * (policy_chosen - policy_rejected), label_smoothing)


def log_odds(logprobs: Logprobs) -> Logprobs:
    """log p - log(1 - p) of p = exp(logprobs); p at 1 or above is taken just below 1."""
    below = jnp.minimum(logprobs, -jnp.finfo(logprobs.dtype).eps)
    small = below < -math.log(2)
    # Each branch gets an argument at which its derivative is finite, chosen or not.
    far = jnp.log1p(-jnp.exp(jnp.where(small, below, -1.0)))
    near = jnp.log(-jnp.expm1(jnp.where(small, -1.0, below)))
    return logprobs - jnp.where(small, far, near)
