"""Norms against NumPy in float64, their gradients against jax's own of the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.ops.norms import layer_norm, rms_norm


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, 5, 8)) * 3 + 1
    return tuple(jnp.asarray(a, jnp.float32) for a in (x, rng.normal(size=8), rng.normal(size=8)))


def plain_rms(x, scale, offset):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * (offset + scale)


def plain_layer(x, scale, bias):
    variance = jnp.var(x, axis=-1, keepdims=True)
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(variance + 1e-5) * scale + bias


def compare(ours, theirs, arguments):
    np.testing.assert_allclose(ours(*arguments), theirs(*arguments), atol=1e-5)
    slope = jnp.asarray(np.random.default_rng(1).normal(size=arguments[0].shape), jnp.float32)
    pulled = jax.vjp(ours, *arguments)[1](slope)
    for found, expected in zip(pulled, jax.vjp(theirs, *arguments)[1](slope), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset):
    x, scale, _ = arrays()
    compare(
        lambda x, s: rms_norm(x, s, epsilon=1e-5, offset=offset),
        lambda x, s: plain_rms(x, s, offset),
        (x, scale),
    )


def test_layer_norm():
    compare(lambda *a: layer_norm(*a, epsilon=1e-5), plain_layer, arrays())


def test_half_precision_comes_back_in_its_dtype():
    x, scale, bias = (a.astype(jnp.bfloat16) for a in arrays())
    out, pull = jax.vjp(lambda *a: layer_norm(*a, epsilon=1e-5), x, scale, bias)
    assert [a.dtype for a in (out, *pull(out))] == [jnp.dtype(jnp.bfloat16)] * 4
