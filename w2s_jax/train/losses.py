"""The losses as pure functions of log-probs: the DPO family, KTO, WSPO, and shared parts.

Pair losses take a `PairLogprobs` and return one loss per pair, Float["B"], in the dtype of the
log-probs (nats). They are named as the `loss_type`s of TRL 1.16; means, weights and metrics are the
caller's (`preference_loss`). Metrics have TRL's names.

In the formulas c and r are the log-ratios log p(y|x) - log p_ref(y|x) of the chosen and of the
rejected response, b is `beta`, e is `label_smoothing`, s is the logistic function.

A new pair loss takes a function here, an entry of `PAIR_LOSSES`, and an entry of `LOSSES` in
config.py that says which arrays and options it reads; of single responses, see README.md.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Bool, Float, Int

from w2s_jax.errors import InputError
from w2s_jax.train.config import LOSSES, PreferenceConfig

Logprobs = Float[Array, " B"]
Lengths = Int[Array, " B"]
TokenLogprobs = Float[Array, "B X"]

Metrics = dict[str, Any]
"""Scalars by name: means with the weight of the batch, or `Mean`s with counts of their own."""


class Mean(NamedTuple):
    """A mean as sum and count, so that the means of several batches combine by addition.

    With several entries, the value is the sum of the entries' means; it is NaN if one has count 0.
    """

    total: Any
    count: Any

    @property
    def value(self) -> Any:
        """The mean; works on arrays of any library."""
        return (self.total / self.count).sum()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairLogprobs:
    """Log-probs of a batch of pairs, in nats.

    Attributes:
        policy_chosen, policy_rejected: Under the policy, summed over the response, [B].
        reference_chosen, reference_rejected: Under the reference; None if no loss reads them.
        chosen_lengths, rejected_lengths: Tokens in the sums, [B]; None if no loss reads them.
        chosen_nll: Replaces ORPO's own NLL term if given.
    """

    policy_chosen: Logprobs
    policy_rejected: Logprobs
    reference_chosen: Logprobs | None = None
    reference_rejected: Logprobs | None = None
    chosen_lengths: Lengths | None = None
    rejected_lengths: Lengths | None = None
    chosen_nll: Logprobs | None = None

    @property
    def chosen(self) -> Logprobs:
        """c: the log-ratio of the chosen response, policy to reference."""
        assert self.reference_chosen is not None
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected(self) -> Logprobs:
        """r: the log-ratio of the rejected response, policy to reference."""
        assert self.reference_rejected is not None
        return self.policy_rejected - self.reference_rejected

    @property
    def margins(self) -> Logprobs:
        """c - r."""
        return self.chosen - self.rejected


Loss = Callable[..., Logprobs]
"""(pairs, **options) -> one loss per pair; `LOSSES` in config.py lists the options."""


def preference_loss(config: PreferenceConfig, pairs: PairLogprobs) -> tuple[Logprobs, Metrics]:
    """The weighted sum of the config's losses for each pair, and the metrics' batch means.

    Its mean over the batch is TRL's loss. With `aot`, `aot_unpaired` and terms that weigh tokens
    (`sft`, `orpo`, `cpo`) an entry depends on the whole batch. Rewards are beta times the log-ratio
    to the reference, or times the log-prob if there is none.

    Args:
        config: Which losses, their weights and options.
        pairs: Log-probs of B pairs.

    Returns:
        The losses [B], and scalars under TRL's names, without gradient.

    Raises:
        InputError: If an array that a loss needs is missing, or a loss is not one on pairs.
    """
    weights = config.loss_weights or (1.0,) * len(config.losses)
    total = jnp.zeros_like(pairs.policy_chosen)
    for name, weight in zip(config.losses, weights, strict=True):
        if name not in PAIR_LOSSES:
            raise InputError(f"loss type {name!r} is not a loss on pairs of responses")
        for array in LOSSES[name].arrays:
            if getattr(pairs, array) is None:
                raise InputError(f"loss type {name!r} needs {array}, which this batch has not")
        total = total + weight * PAIR_LOSSES[name](pairs, **config.options(name))
    return total, jax.lax.stop_gradient(_pair_metrics(config, pairs))


def _pair_metrics(config: PreferenceConfig, pairs: PairLogprobs) -> Metrics:
    first = next((name for name in config.losses if name != "sft"), "sft")
    chosen, rejected = pairs.policy_chosen, pairs.policy_rejected
    # As in TRL, the metrics of such losses use mean log-probs per token.
    if LOSSES[first].per_token:
        chosen = per_token(chosen, pairs.chosen_lengths)
        rejected = per_token(rejected, pairs.rejected_lengths)
    rewards = config.beta * chosen, config.beta * rejected
    referenced = first == "sft" or LOSSES[first].reference
    if referenced and pairs.reference_chosen is not None:
        rewards = config.beta * pairs.chosen, config.beta * pairs.rejected
    return preference_metrics(chosen, rejected, *rewards)


def preference_metrics(
    policy_chosen: Logprobs,
    policy_rejected: Logprobs,
    chosen_rewards: Logprobs,
    rejected_rewards: Logprobs,
) -> Metrics:
    """Batch means under TRL's names: rewards, margins, accuracies, log-probs.

    A pair with equal rewards counts as wrong. All are scalars in the dtype of the log-probs.
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


def smoothed_logistic(margins: Logprobs, label_smoothing: float) -> Logprobs:
    """-(1 - e) log s(m) - e log s(-m): a preference label that is wrong with probability e."""
    return -(1 - label_smoothing) * log_sigmoid(margins) - label_smoothing * log_sigmoid(-margins)


def per_token(logprobs: Logprobs, lengths: Lengths | None) -> Logprobs:
    """Mean log-prob over a response's tokens; the sum for an empty response."""
    assert lengths is not None
    return logprobs / jnp.maximum(lengths, 1)


def sigmoid(pairs: PairLogprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Logprobs:
    """DPO: -(1 - e) log s(b (c - r)) - e log s(-b (c - r)).

    arXiv 2305.18290 eq. 7 at e = 0; with e > 0, the share of flipped labels assumed, conservative
    DPO (E. Mitchell, "A note on DPO with noisy preferences"). TRL's `sigmoid` ignores
    `label_smoothing`: equal to it at e = 0.
    """
    return smoothed_logistic(beta * pairs.margins, label_smoothing)


def sigmoid_norm(pairs: PairLogprobs, *, beta: float = 0.1) -> Logprobs:
    """Length-normalised DPO: -log s(b (c / |chosen| - r / |rejected|)), Tulu 3, arXiv 2411.15124.

    As TRL has it, without label smoothing.
    """
    chosen = per_token(pairs.chosen, pairs.chosen_lengths)
    rejected = per_token(pairs.rejected, pairs.rejected_lengths)
    return -log_sigmoid(beta * (chosen - rejected))


def hinge(pairs: PairLogprobs, *, beta: float = 0.1) -> Logprobs:
    """max(0, 1 - b (c - r)): SLiC, arXiv 2305.10425, as RSO writes it, arXiv 2309.06657.

    As TRL has it. The derivative at the corner is 0.
    """
    return jax.nn.relu(1 - beta * pairs.margins)


def ipo(pairs: PairLogprobs, *, beta: float = 0.1) -> Logprobs:
    """IPO: (c / |chosen| - r / |rejected| - 1 / (2 b))^2, arXiv 2310.12036 eq. 17, b its tau.

    Follows TRL, which divides by the lengths; the equation in the paper does not.
    """
    chosen = per_token(pairs.chosen, pairs.chosen_lengths)
    rejected = per_token(pairs.rejected, pairs.rejected_lengths)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def robust(pairs: PairLogprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Logprobs:
    """Robust DPO: (-(1 - e) log s(m) + e log s(-m)) / (1 - 2 e), m = b (c - r), arXiv 2403.00409.

    Unbiased when a share e < 1/2 of the labels is flipped; may be negative. TRL and the
    paper agree.
    """
    margins = beta * pairs.margins
    clean = -(1 - label_smoothing) * log_sigmoid(margins)
    flipped = -label_smoothing * log_sigmoid(-margins)
    return (clean - flipped) / (1 - 2 * label_smoothing)


def exo_pair(pairs: PairLogprobs, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Logprobs:
    """EXO: KL of (s(m), s(-m)) from (1 - e, e), m = b (c - r), arXiv 2402.00856 eq. 16, K = 2.

    Needs e > 0, or the divergence is infinite. TRL and the paper agree.
    """
    margins = beta * pairs.margins
    chosen = jax.nn.sigmoid(margins) * (log_sigmoid(margins) - jnp.log1p(-label_smoothing))
    rejected = jax.nn.sigmoid(-margins) * (log_sigmoid(-margins) - jnp.log(label_smoothing))
    return chosen + rejected


def nca_pair(pairs: PairLogprobs, *, beta: float = 0.1) -> Logprobs:
    """NCA at two responses: -log s(b c) - log s(-b c) / 2 - log s(-b r) / 2, arXiv 2402.05369.

    TRL and the paper agree.
    """
    chosen, rejected = beta * pairs.chosen, beta * pairs.rejected
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def bco_pair(pairs: PairLogprobs, *, beta: float = 0.1) -> Logprobs:
    """BCO on pairs: -log s(b c) - log s(-b r), arXiv 2404.04656.

    Follows TRL, whose pair form leaves out the paper's shift (a running mean of the rewards).
    """
    return -log_sigmoid(beta * pairs.chosen) - log_sigmoid(-beta * pairs.rejected)


def sppo_hard(pairs: PairLogprobs, *, beta: float = 0.1) -> Logprobs:
    """SPPO: (c - 1 / (2 b))^2 + (r + 1 / (2 b))^2, arXiv 2405.00675 eq. 4.7, b = 1 / its eta.

    Follows TRL: the win rates of the paper, estimated there by a judge, are set to 1 and 0.
    """
    return (pairs.chosen - 0.5 / beta) ** 2 + (pairs.rejected + 0.5 / beta) ** 2


def aot(pairs: PairLogprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Logprobs:
    """Paired AOT: `sigmoid` of the sorted margins of the policy minus those of the reference.

    arXiv 2406.05882. The i-th smallest policy_chosen - policy_rejected of the batch is compared
    with the i-th smallest reference_chosen - reference_rejected, so that entry i belongs to no row
    and the loss depends on the batch. TRL and the paper agree.
    """
    assert pairs.reference_chosen is not None
    assert pairs.reference_rejected is not None
    policy = jnp.sort(pairs.policy_chosen - pairs.policy_rejected)
    reference = jnp.sort(pairs.reference_chosen - pairs.reference_rejected)
    return smoothed_logistic(beta * (policy - reference), label_smoothing)


def aot_unpaired(
    pairs: PairLogprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Logprobs:
    """Unpaired AOT: `sigmoid` of the sorted c minus the sorted r of the batch, arXiv 2406.05882.

    Older releases of TRL called it `aot_pair`. Entry i belongs to no row and the loss depends on
    the batch. TRL and the paper agree.
    """
    margins = jnp.sort(pairs.chosen) - jnp.sort(pairs.rejected)
    return smoothed_logistic(beta * margins, label_smoothing)


def apo_zero(pairs: PairLogprobs, *, beta: float = 0.1) -> Logprobs:
    """APO-zero: 1 - s(b c) + s(b r), arXiv 2408.06266 eq. 7: chosen up, rejected down.

    Follows TRL, which adds 1 to the paper's loss.
    """
    return jax.nn.sigmoid(-beta * pairs.chosen) + jax.nn.sigmoid(beta * pairs.rejected)


def apo_down(pairs: PairLogprobs, *, beta: float = 0.1) -> Logprobs:
    """APO-down: s(b c) + 1 - s(b (c - r)), arXiv 2408.06266 eq. 8: both down, rejected further.

    Follows TRL, which adds 1 to the paper's loss.
    """
    chosen, rejected = beta * pairs.chosen, beta * pairs.rejected
    return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)


def discopop(pairs: PairLogprobs, *, beta: float = 0.1, discopop_tau: float = 0.05) -> Logprobs:
    """DiscoPOP: -(1 - w) log s(m) + w exp(-m), w = s(m / tau), m = b (c - r).

    arXiv 2406.08414 eq. 5 (the log-ratio modulated loss). TRL and the paper agree; here w exp(-m)
    is one exponential, which stays finite where m is far below 0 and exp(-m) alone does not.
    """
    margins = beta * pairs.margins
    modulation = margins / discopop_tau
    logistic = -log_sigmoid(margins) * jax.nn.sigmoid(-modulation)
    return logistic + jnp.exp(log_sigmoid(modulation) - margins)


def sft(pairs: PairLogprobs) -> Logprobs:
    """Next-token loss of the chosen responses; its batch mean is the mean over all their tokens.

    -log p(chosen) / (mean length in the batch): every token has the same weight, as in TRL, where
    the loss of each pair is that mean. Mixed into others by `loss_type` and `loss_weights`, as in
    MPO (arXiv 2411.10442) and iterative RPO (arXiv 2404.19733).
    """
    assert pairs.chosen_lengths is not None
    return -pairs.policy_chosen / jnp.maximum(pairs.chosen_lengths.mean(), 1.0)


def orpo(pairs: PairLogprobs, *, beta: float = 0.1) -> Logprobs:
    """ORPO: NLL(chosen) - b log s(log odds(chosen) - log odds(rejected)), b the paper's lambda.

    arXiv 2403.07691 eqs. 4, 6 and 7, with odds = p / (1 - p) and p the geometric mean of a
    response's token probabilities. The NLL is that of `sft`, over the response as in the paper;
    TRL takes it over prompt and response. `chosen_nll` takes its place where given.
    """
    nll = sft(pairs) if pairs.chosen_nll is None else pairs.chosen_nll
    chosen = log_odds(per_token(pairs.policy_chosen, pairs.chosen_lengths))
    rejected = log_odds(per_token(pairs.policy_rejected, pairs.rejected_lengths))
    return nll - beta * log_sigmoid(chosen - rejected)


def cpo(
    pairs: PairLogprobs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 1.0,
) -> Logprobs:
    """CPO: -log s(b (log p(chosen) - log p(rejected))) + alpha NLL(chosen), arXiv 2401.08417 eq. 3.

    TRL's CPOTrainer with `loss_type="sigmoid"`, its label smoothing (that of cDPO) included. The
    NLL is that of `sft`. The paper has alpha = 1.
    """
    margins = beta * (pairs.policy_chosen - pairs.policy_rejected)
    return smoothed_logistic(margins, label_smoothing) + cpo_alpha * sft(pairs)


def simpo(
    pairs: PairLogprobs,
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
    chosen = per_token(pairs.policy_chosen, pairs.chosen_lengths)
    rejected = per_token(pairs.policy_rejected, pairs.rejected_lengths)
    return smoothed_logistic(beta * (chosen - rejected) - simpo_gamma, label_smoothing)


def genarm(pairs: PairLogprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Logprobs:
    """The autoregressive reward model of GenARM: -log s(b (log p(chosen) - log p(rejected))).

    arXiv 2410.08193, the training objective: the reward of a response is its log-prob under the
    model trained, a sum over tokens; preferences follow Bradley and Terry, b is the paper's beta_r.
    TRL has no such loss; label smoothing is that of cDPO, as in the trainer published with the
    paper. It is `sigmoid` with a constant reference, and `cpo` at alpha = 0.
    """
    margins = beta * (pairs.policy_chosen - pairs.policy_rejected)
    return smoothed_logistic(margins, label_smoothing)


PAIR_LOSSES: Mapping[str, Loss] = {
    loss.__name__: loss
    for loss in (
        sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired,
        apo_zero, apo_down, discopop, sigmoid_norm, sft, orpo, cpo, simpo, genarm,
    )
}  # fmt: skip


def log_odds(logprobs: Logprobs) -> Logprobs:
    """log p - log(1 - p) for p = exp(logprobs); p of 1 or above is set just below 1."""
    below = jnp.minimum(logprobs, -jnp.finfo(logprobs.dtype).eps)
    small = below < -math.log(2)
    # Each branch gets an argument with a finite derivative, also where it is not selected.
    far = jnp.log1p(-jnp.exp(jnp.where(small, below, -1.0)))
    near = jnp.log(-jnp.expm1(jnp.where(small, -1.0, below)))
    return logprobs - jnp.where(small, far, near)


def kto_kl(policy_mismatched: Logprobs, reference_mismatched: Logprobs) -> Float[Array, ""]:
    """KTO's estimate of KL(policy || reference): the mean log-ratio of mismatched responses.

    The responses are those of the batch, each after the prompt of another row (TRL: of the next).
    Clipped at 0 from below and without gradient, arXiv 2402.01306, as in TRL.
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
    """TRL's metrics of a KTO batch: means over the desirable and over the undesirable responses.

    Each mean has a count of its own, as a batch may hold few responses of a kind, or none. The
    margin is the mean of the desirable ones minus that of the undesirable ones.
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

    arXiv 2410.18640: the policy learns the shift of the guide from untuned (u) to tuned (t) at 1 /
    b of its strength. The paper writes the squared L2 distance of the log-ratios without defining
    the vector; as in the code published with it, here it is over the tokens where `mask` is True,
    divided by their number. TRL has no such loss.

    Args:
        policy: log p(token | before) of the responses, [B, X], in nats.
        reference: The same tokens under the reference.
        tuned: Under the guide's tuned model, which has the same vocabulary.
        untuned: Under the guide's untuned model.
        mask: True on the tokens of the responses.
        beta: The paper's gamma.
    """
    error = jnp.where(mask, beta * (policy - reference) - (tuned - untuned), 0.0)
    return (error**2).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def classification(
    logits: Float[Array, "B labels"], labels: Int[Array, " B"]
) -> tuple[Float[Array, ""], Metrics]:
    """Mean cross-entropy of integer labels, in nats, and the accuracy of the largest logit."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    loss = -jnp.take_along_axis(logprobs, labels[:, None], axis=1).mean()
    accuracy = (logits.argmax(-1) == labels).mean(dtype=jnp.float32)
    return loss, {"loss": loss, "accuracy": accuracy}
