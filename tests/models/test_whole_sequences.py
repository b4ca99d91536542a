"""Passes over whole sequences, lowered for TPUs: layers have the kernel, and no scores.

In a scan, jax may leave zeros in a mask's stead, which XLA drops (tests/plan/test_kernels.py).
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from tests.tiny import tiny_model
from w2s_jax.models.model import hidden_states
from w2s_jax.ops.sequences import CHUNK
from w2s_jax.search.decode import prefill, start_cache

LENGTH = 144


def text_of(function, *arguments, platform="tpu"):
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def phases(text):
    """Which of the kernels a program has: of a pass, and of the two parts of a gradient."""
    return {found for found in ("fwd", "dq", "dkv") if f"splash_mha_{found}" in text}


def windowed(scan, *windows):
    model = tiny_model(0, scan_layers=scan)
    return replace(model, config=replace(model.config, sliding_windows=windows))


@pytest.mark.parametrize(
    ("scan", "windows", "told", "remat"),
    [
        (False, (None, None), "mask", "full"),
        (True, (None, 40), "segments", "full"),
        (True, (None, 40), None, "none"),
    ],
)
def test_a_gradient_has_the_kernel(scan, windows, told, remat):
    model = windowed(scan, *windows)
    tokens = jnp.ones((2, LENGTH), jnp.int32)
    given = {told: jnp.ones((2, LENGTH), bool if told == "mask" else jnp.int32)} if told else {}

    def loss(params):
        read = hidden_states(replace(model, params=params), tokens, remat=remat, **given)
        return jnp.square(read).mean()

    text = text_of(jax.grad(loss), model.params)
    assert phases(text) == {"fwd", "dq", "dkv"}
    scores = f"{LENGTH - CHUNK}x{LENGTH}xf32"  # of the last chunk of queries
    assert scores not in text
    assert f"{LENGTH}x{LENGTH}xf32" not in text
    assert scores in text_of(jax.grad(loss), model.params, platform="cpu")


@pytest.mark.parametrize("scan", [False, True])
def test_prefill_has_the_kernel(scan):
    model = tiny_model(0, scan_layers=scan)
    cache = start_cache(model, slots=2, hypotheses=2, prefix_capacity=LENGTH, committed_capacity=8)
    prompt, zero = jnp.ones(LENGTH, jnp.int32), jnp.int32(0)
    text = text_of(prefill, model, cache, zero, prompt, zero)
    assert phases(text) == {"fwd"}
    assert f"{LENGTH}x{LENGTH}xf32" not in text
