"""Norms against NumPy in float64, their gradients against jax's own of the plain formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.ops.norms import layer_norm, rms_norm


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, 5, 8)) * 3 + 1
    return tuple(np.float32(a) for a in (x, rng.normal(size=8), rng.normal(size=8)))


def plain_rms(x, scale, offset):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * (offset + scale)


def plain_layer(x, scale, bias):
    variance = jnp.var(x, axis=-1, keepdims=True)
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(variance + 1e-5) * scale + bias


@partial(jax.jit, static_argnums=0)
def pull(norm, slope, *arguments):
    out, pulled = jax.vjp(norm, *arguments)
    return out, pulled(slope)


def compare(ours, theirs, arguments):
    slope = np.float32(np.random.default_rng(1).normal(size=arguments[0].shape))
    (out, pulled), (wanted, expected) = (pull(norm, slope, *arguments) for norm in (ours, theirs))
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    for one, other in zip(pulled, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


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
    given = [a.astype(jnp.bfloat16) for a in arrays()]
    out, pulled = pull(partial(layer_norm, epsilon=1e-5), given[0], *given)
    assert [a.dtype for a in (out, *pulled)] == [jnp.dtype(jnp.bfloat16)] * 4
