"""Token log-probs against NumPy in float64."""

import jax
import numpy as np
import pytest

from w2s_jax.ops.logprobs import Head, Spread, blocked_token_logprobs, token_logprobs

compiled = jax.jit(token_logprobs)


def reference(logits):
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_token_logprobs(scale):
    rng = np.random.default_rng(0)
    logits = np.float32(rng.normal(size=(3, 4, 11)) * scale)
    tokens = rng.integers(0, 11, (3, 4))
    expected = np.take_along_axis(reference(logits), tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(compiled(logits, tokens), expected, rtol=1e-5, atol=1e-5)


def test_several_tokens_of_one_row():
    rng = np.random.default_rng(1)
    logits = np.float32(rng.normal(size=(2, 1, 7)))
    tokens = rng.integers(0, 7, (2, 5))
    expected = np.take_along_axis(reference(logits)[:, 0], tokens, -1)
    np.testing.assert_allclose(compiled(logits, tokens), expected, rtol=1e-5)


# One row, some that divide the rows and some that do not, all, and more than there are.
@pytest.mark.parametrize(("block", "groups"), [(1, 2), (4, 2), (5, 1), (10, 2), (64, 1)])
def test_blocks_and_groups_change_nothing(block, groups):
    rng = np.random.default_rng(2)
    hidden = np.float32(rng.normal(size=(groups, 10, 6)))
    head = np.float32(rng.normal(size=(6, 13)))
    targets = rng.integers(0, 13, (groups, 10, 3))
    run = jax.jit(lambda *given: blocked_token_logprobs(*given, lambda h: h @ head, block=block))
    out = run(hidden, targets)
    expected = np.take_along_axis(reference(hidden @ head), targets, -1)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("states", "blocks"), [(None, 2), (4096, 2), (2048, 4), (1, 2048)])
def test_states_that_a_device_gathers_are_bounded(states, blocks):
    """Of 8 groups of 2,048 rows, with logits of 64 rows over 128 parts of the vocabulary."""

    class Parts(Spread):
        parts = property(lambda self: 128)
        row_parts = property(lambda self: 2)

    assert Head(1, 64, None, Parts(), states).blocks(8, 2048) == blocks
