"""Float32 log-probabilities of given tokens, without keeping more of the vocabulary than needed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_logprobs(
    logits: Float[Array, "*#rows V"], tokens: Int[Array, "*#rows"]
) -> Float[Array, "*rows"]:
    """log softmax(logits)[token] in float32, without the normalised [.., V] array.

    Rows broadcast: several tokens may be looked up in one row of logits.
    """
    wide = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(wide, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(wide, axis=-1)


def blocked_token_logprobs(
    hidden: Float[Array, "rows D"],
    targets: Int[Array, "rows n"],
    head: Callable[[Array], Array],
    *,
    block: int,
) -> Float[Array, "rows n"]:
    """Log-probabilities of n targets after each hidden state, float32.

    `head` maps [m D] to float32 logits [m V]; at most `block` rows of logits are alive at a time.
    """

    def score(hidden: Array, targets: Array) -> Array:
        logits = head(hidden)
        normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return jnp.take_along_axis(logits, targets, axis=-1) - normaliser

    rows, width = targets.shape
    if rows <= block:
        return score(hidden, targets)
    blocks = -(-rows // block)
    padding = ((0, blocks * block - rows), (0, 0))
    hidden = jnp.pad(hidden, padding).reshape(blocks, block, -1)
    targets = jnp.pad(targets, padding).reshape(blocks, block, width)
    return jax.lax.map(lambda pair: score(*pair), (hidden, targets)).reshape(-1, width)[:rows]
