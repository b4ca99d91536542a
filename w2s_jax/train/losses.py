"""What losses share: metrics under TRL's names, and the classifier's loss.

The losses of pairs and responses are in preference_losses.py, reference_free_losses.py and
response_losses.py. Holds no model, no batch layout and no optimizer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
