"""Reward models: a decoder with a linear head that reads its state at a sequence's last token.

Checkpoint directories are read and written in models/reward_huggingface.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from w2s_jax.errors import InputError
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.model import Model, hidden_states
from w2s_jax.ops.sharding import ON_ONE_DEVICE, Placement
from w2s_jax.pytrees import pytree


@pytree(static=("config", "labels", "placement"))
class RewardModel:
    """A decoder without a language model's head, and a head with one logit for each label.

    params: as a Model's, in either layout, but for "head". head: "kernel" [D, labels] and perhaps
    "bias" [labels]. labels: the logits' names; a reward model proper has one.
    """

    config: ModelConfig
    params: dict
    head: dict
    labels: tuple[str, ...]
    placement: Placement = ON_ONE_DEVICE

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
        if self.config.position == "learned" and tokens.shape[1] > self.config.max_positions:
            raise InputError(
                f"{tokens.shape[1]} tokens for a model of {self.config.max_positions} positions"
            )
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
