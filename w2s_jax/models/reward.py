"""Reward models: a decoder with a linear head that reads its state at a sequence's last token.

Their labels, and which logits make the reward. `load.load_reward_model` reads the checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from w2s_jax.errors import InputError
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.encoder import Classifier
from w2s_jax.models.model import Model, check_positions, hidden_states
from w2s_jax.models.parameters import REWARD_HEADS
from w2s_jax.ops.sharding import ON_ONE_DEVICE, Placement

SCORE = REWARD_HEADS[0]
"""The head as transformers' sequence classifiers keep it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RewardModel:
    """A decoder without a language model's head, and a head with one logit for each label.

    params: as a Model's, in either layout, but for "head". head: "kernel" [D, labels] and perhaps
    "bias" [labels]. labels: the logits' names; a reward model proper has one.
    """

    config: ModelConfig = field(metadata={"static": True})
    params: dict
    head: dict
    labels: tuple[str, ...] = field(metadata={"static": True})
    placement: Placement = field(default=ON_ONE_DEVICE, metadata={"static": True})

    @property
    def decoder(self) -> Model:
        """The decoder alone, for caches and hidden states; it has no logits of tokens."""
        return Model(self.config, self.params, self.placement)

    @property
    def dtype(self) -> jnp.dtype:
        """The parameters' dtype."""
        return self.decoder.dtype

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B X"],
        mask: Bool[Array | np.ndarray, "B X"] | None = None,
    ) -> Float32[Array, "B labels"]:
        """The labels' logits, read at each row's last unmasked token.

        `mask` is False on padding, on either side; padding is not seen and takes no position.
        Raises InputError for more tokens than learned positions.
        """
        check_positions(self.config, tokens.shape[1])
        return _label_logits(self, jnp.asarray(tokens), None if mask is None else jnp.asarray(mask))

    def head_of(self, hidden: Float[Array, "*rows D"]) -> Float32[Array, "*rows labels"]:
        """The labels' logits of states after the last norm, as `forward` gives them."""
        kernel, contract = self.head["kernel"], ((hidden.ndim - 1,), (0,))
        out = jax.lax.dot_general(
            hidden, kernel, (contract, ((), ())), preferred_element_type=jnp.float32
        )
        return out + self.head["bias"].astype(jnp.float32) if "bias" in self.head else out


def last_tokens(mask: Bool[Array, "B X"]) -> Int[Array, " B"]:
    """The index of each row's last unmasked token; 0 where there is none."""
    return jnp.argmax(jnp.cumsum(mask, axis=1), axis=1)


@jax.jit
def _label_logits(
    model: RewardModel, tokens: Int[Array, "B X"], mask: Bool[Array, "B X"] | None
) -> Float32[Array, "B labels"]:
    hidden = hidden_states(model.decoder, tokens, mask)
    if mask is None:
        return model.head_of(hidden[:, -1])
    last = last_tokens(mask)
    return model.head_of(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])


NEGATIVE, POSITIVE = 0, 1


def label_names(model: RewardModel | Classifier) -> tuple[str, ...]:
    """The names of a model's labels, one for each logit."""
    if isinstance(model, RewardModel):
        return model.labels
    return model.config.label_names or tuple(f"LABEL_{i}" for i in range(model.config.labels))


def contrast(names: Sequence[str], label: str | int | None = None) -> Float32[np.ndarray, " n"]:
    """Weights of the labels' logits in the reward.

    With a `label`, by name or number, that logit alone; without, the only one, or of two the
    positive (1) minus the negative (0). Raises InputError for an unknown label, and for more than
    two labels and no choice.
    """
    weights = np.zeros(len(names), np.float32)
    if label is None and len(names) == 2:
        weights[[NEGATIVE, POSITIVE]] = -1.0, 1.0
        return weights
    if label is None and len(names) > 2:
        raise InputError(
            f"the reward model has {len(names)} labels; choose one of {_listed(names)}"
        )
    chosen = 0 if label is None else _find_label(names, label)
    weights[chosen] = 1.0
    return weights


def _find_label(names: Sequence[str], label: str | int) -> int:
    if str(label) in names:
        return list(names).index(str(label))
    if str(label).isdecimal() and int(label) < len(names):
        return int(label)
    raise InputError(f"the reward model has no label {label!r}; choose one of {_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"{i} ({name})" for i, name in enumerate(names))
