"""Layer normalisations on arrays, computed in float32. No parameters are made here."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*batch D"],
    scale: Float[Array, " D"],
    *,
    epsilon: float,
    offset: float = 0.0,
) -> Float[Array, "*batch D"]:
    """Root-mean-square norm `x / rms(x) * (offset + scale)`, in float32, returned in x's dtype.

    `offset` is 1 for Gemma, whose checkpoints store the scale less one. Source: arXiv 1910.07467.
    """
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * (offset + scale.astype(jnp.float32))).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*batch D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    *,
    epsilon: float,
) -> Float[Array, "*batch D"]:
    """Layer norm with scale and bias, in float32, returned in x's dtype; arXiv 1607.06450."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    normed = centred * inverse * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return normed.astype(x.dtype)
