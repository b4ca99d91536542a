"""Training losses as pure functions of log-probs, each with its metrics under TRL's names.

Holds no model, no batch layout and no optimizer.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Metrics = dict[str, Array]


def sft(
    logprobs: Float[Array, "B X"], mask: Bool[Array, "B X"]
) -> tuple[Float[Array, ""], Metrics]:
    """Mean next-token negative log-likelihood over the tokens where `mask` is True, in nats.

    `logprobs[b, x]` is log p(token x | tokens before x). Every target token weighs the same, so
    long rows count for more than short ones. An empty mask gives 0.
    """
    tokens = mask.sum()
    loss = -jnp.where(mask, logprobs, 0.0).sum() / jnp.maximum(tokens, 1)
    return loss, {"loss": loss, "num_tokens": tokens.astype(jnp.float32)}


def dpo(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    reference_chosen: Float[Array, " B"],
    reference_rejected: Float[Array, " B"],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """Direct preference optimisation, arXiv 2305.18290 eq. 7, averaged over the pairs.

    With the implicit reward r(y) = beta (log p(y|x) - log p_ref(y|x)) and m = r(chosen) -
    r(rejected), the loss of a pair is -(1 - e) log sigmoid(m) - e log sigmoid(-m), where e is
    `label_smoothing`, the assumed share of flipped labels (conservative DPO). Arguments are
    log-probs summed over the response.
    """
    chosen_rewards = beta * (chosen - reference_chosen)
    rejected_rewards = beta * (rejected - reference_rejected)
    margins = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(
        margins
    ) - label_smoothing * jax.nn.log_sigmoid(-margins)
    loss = losses.mean()
    metrics = {
        "loss": loss,
        "rewards/chosen": chosen_rewards.mean(),
        "rewards/rejected": rejected_rewards.mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).mean(dtype=jnp.float32),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
    }
    return loss, metrics


def classification(
    logits: Float[Array, "B labels"], labels: Int[Array, " B"]
) -> tuple[Float[Array, ""], Metrics]:
    """Mean cross-entropy of integer labels, in nats, with the accuracy of the largest logit."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    loss = -jnp.take_along_axis(logprobs, labels[:, None], axis=1).mean()
    accuracy = (logits.argmax(-1) == labels).mean(dtype=jnp.float32)
    return loss, {"loss": loss, "accuracy": accuracy}
