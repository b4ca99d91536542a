"""Shortlists against NumPy, draws against their distribution."""

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2s_jax.ops.sampling import Sampling, choose, draw, nucleus, shortlist

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
