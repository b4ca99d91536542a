"""Layer normalisations on arrays, computed in float32. No parameters are made here.

A gradient keeps the input and computes the statistics again.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, " D"], epsilon: float, offset: float = 0.0
) -> Float[Array, "*batch D"]:
    """Root-mean-square norm `x / rms(x) * (offset + scale)`, in float32, returned in x's dtype.

    `offset` is 1 for Gemma, whose checkpoints store the scale less one. Source: arXiv 1910.07467.
    """
    wide = x.astype(jnp.float32)
    return (wide * _inverse(wide, epsilon) * (offset + scale.astype(jnp.float32))).astype(x.dtype)


def _inverse(centred: Array, epsilon: float) -> Array:
    return jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)


def _rms_forward(x: Array, scale: Array, epsilon: float, offset: float) -> tuple[Array, tuple]:
    return rms_norm(x, scale, epsilon, offset), (x, scale)


def _rms_backward(
    epsilon: float, offset: float, residuals: tuple[Array, Array], slope: Array
) -> tuple[Array, Array]:
    x, scale = residuals
    wide, slope = x.astype(jnp.float32), slope.astype(jnp.float32)
    inverse = _inverse(wide, epsilon)
    normed = wide * inverse
    inner = slope * (offset + scale.astype(jnp.float32))
    by_x = inverse * (inner - normed * jnp.mean(inner * normed, axis=-1, keepdims=True))
    by_scale = (slope * normed).sum(range(x.ndim - 1))
    return by_x.astype(x.dtype), by_scale.astype(scale.dtype)


rms_norm.defvjp(_rms_forward, _rms_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*batch D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    epsilon: float,
) -> Float[Array, "*batch D"]:
    """Layer norm with scale and bias, in float32, returned in x's dtype; arXiv 1607.06450."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = centred * _inverse(centred, epsilon) * scale.astype(jnp.float32)
    return (normed + bias.astype(jnp.float32)).astype(x.dtype)


def _layer_forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, tuple]:
    return layer_norm(x, scale, bias, epsilon), (x, scale)


def _layer_backward(
    epsilon: float, residuals: tuple[Array, Array], slope: Array
) -> tuple[Array, Array, Array]:
    x, scale = residuals
    wide, slope = x.astype(jnp.float32), slope.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = _inverse(centred, epsilon)
    normed = centred * inverse
    inner = slope * scale.astype(jnp.float32)
    along = normed * jnp.mean(inner * normed, axis=-1, keepdims=True)
    by_x = inverse * (inner - jnp.mean(inner, axis=-1, keepdims=True) - along)
    by_scale, by_bias = (row.sum(range(x.ndim - 1)) for row in (slope * normed, slope))
    return by_x.astype(x.dtype), by_scale.astype(scale.dtype), by_bias.astype(scale.dtype)


layer_norm.defvjp(_layer_forward, _layer_backward)
