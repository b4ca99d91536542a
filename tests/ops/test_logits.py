"""Shortlists and token log-probs against NumPy, draws against their distribution."""

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2s_jax.ops.logits import (
    Head,
    Sampling,
    Spread,
    blocked_token_logprobs,
    choose,
    draw,
    nucleus,
    shortlist,
    token_logprobs,
)

LOGITS = np.float32([2.0, -1.0, 0.5, 3.0, 0.5, -4.0])
# A program: its operations one by one would each be compiled.
drawn = jax.jit(draw, static_argnames="sampling")


def allowed(sampling):
    """The ids a draw may take, and their probabilities, by NumPy."""
    logits = np.asarray(LOGITS, np.float64) / sampling.temperature
    order = np.argsort(-logits, kind="stable")[: sampling.top_k or None]
    p = np.exp(logits[order] - logits[order].max())
    p /= p.sum()
    keep = np.cumsum(p) - p < sampling.top_p
    p = np.where(keep, p, 0)
    full = np.zeros(len(logits))
    full[order] = p / p.sum()
    return full


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.5),
        Sampling(1.0, top_k=3),
        Sampling(1.0, top_k=99),
        Sampling(1.5, top_p=0.8),
        Sampling(0.9, top_k=4, top_p=0.7),
    ],
)
def test_draws_follow_the_distribution(sampling):
    keys = jax.random.split(jax.random.key(0), 20000)
    tokens = drawn(np.broadcast_to(LOGITS, (20000, 6)), keys, sampling)
    shares = np.bincount(tokens, minlength=6) / 20000
    expected = allowed(sampling)
    assert not shares[expected == 0].any()
    np.testing.assert_allclose(shares, expected, atol=0.015)


def test_greedy_takes_the_first_of_the_largest():
    logits = np.float32([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    np.testing.assert_array_equal(drawn(logits, keys, Sampling(0.0, top_k=2)), [1, 0])


def test_the_likeliest_token_always_stays():
    kept = jax.jit(partial(nucleus, top_p=1e-9))(np.sort(LOGITS)[::-1])
    np.testing.assert_array_equal(np.asarray(kept) > -np.inf, [1, 0, 0, 0, 0, 0])


def test_draws_share_a_shortlist_and_keep_their_own_keys():
    keys = jax.random.split(jax.random.key(3), (2, 5))
    rows, sampling = np.stack([LOGITS, -LOGITS]), Sampling(1.0, top_k=4)
    shared = jax.jit(lambda rows: choose(*shortlist(rows[:, None], sampling), keys))(rows)
    for slot in range(2):
        alone = [int(drawn(rows[slot], keys[slot, i], sampling)) for i in range(5)]
        assert shared[slot].tolist() == alone


@settings(max_examples=12)
@given(seed=st.integers(0, 1000), neighbours=st.integers(0, 3))
def test_a_draw_does_not_see_its_neighbours(seed, neighbours):
    key = jax.random.key(seed)
    sampling = Sampling(1.0, top_p=0.95)
    alone = int(drawn(LOGITS, key, sampling))
    others = jax.random.split(jax.random.key(seed + 1), neighbours + 1).at[-1].set(key)
    rows = np.concatenate([np.zeros((neighbours, 6), np.float32), LOGITS[None]])
    assert int(drawn(rows, others, sampling)[-1]) == alone


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
