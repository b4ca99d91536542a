"""Which candidates are kept, against choices written out and a fine grid of weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.search.oracle import log_mean_exp, spread_over_simplex, worst_weights
from w2s_jax.errors import InputError
from w2s_jax.search.methods import Candidates, KeepAll, Maximin, TopW

C, J = 8, 3
DEAD = 1e9
"""What stands where there is no candidate; anything may."""


@partial(jax.jit, static_argnums=0)
def weights_of(selector, candidates):
    return selector.weights(candidates)


@partial(jax.jit, static_argnums=(0, 2))
def selected(selector, candidates, hypotheses):
    return selector.select(candidates, hypotheses, 2)


def candidates_of(values, alive=None):
    """One slot's candidates [c, J], padded to C of which the rest are dead."""
    values = np.asarray(values, np.float32)
    alive = np.ones(len(values), bool) if alive is None else alive
    padded = np.full((1, C, values.shape[1]), DEAD, np.float32)
    padded[0, : len(values)] = np.where(alive[:, None], values, DEAD)
    is_alive = np.zeros((1, C), bool)
    is_alive[0, : len(values)] = alive
    return Candidates(jnp.asarray(padded), jnp.asarray(is_alive))


def excess(values, weights, scale):
    """By how much the weights miss the minimum, in the values' units."""
    best = worst_weights(values, scale)
    found, least = log_mean_exp(values, np.stack([weights, best]), scale)
    return found - least


@pytest.mark.parametrize(("objectives", "scale"), [(2, 1.0), (3, 0.1), (3, 30.0)])
def test_maximin_weights_are_the_worst_of_a_fine_grid(objectives, scale):
    rng = np.random.default_rng(objectives)
    slots, count = 24, 14
    magnitudes = rng.choice([1, 5, 20, 50], (slots, 1, 1))
    values = rng.normal(size=(slots, count, objectives)) * magnitudes
    shifts = rng.normal(size=(slots, 1, objectives)) * magnitudes
    values[::3] += shifts[::3]
    values[::5] = values[::5].round()
    alive = rng.random((slots, count)) < 0.7
    alive[:, 0] = True
    shown = np.where(alive[..., None], values, DEAD).astype(np.float32)
    candidates = Candidates(jnp.asarray(shown), jnp.asarray(alive))
    weights = np.asarray(weights_of(Maximin(scale), candidates))
    inside = 0
    for slot in range(slots):
        kept = shown[slot][alive[slot]]
        # In float32 sums of values far apart, times a large scale, say no more.
        tolerance = max(1e-3, 3e-5 * float(np.ptp(kept)))
        # Below the grid's minimum is nearer to the true one, which nothing on the simplex passes.
        assert excess(kept, weights[slot], scale) < tolerance, (slot, kept)
        assert weights[slot].min() >= 0
        assert weights[slot].sum() == pytest.approx(1, abs=1e-5)
        inside += bool((weights[slot] > 0.02).all())
    # Corners alone could be found by trying them.
    assert inside >= 3


def test_the_grid_is_fine_enough_to_judge_by():
    """At its minimum no weight can be moved to another objective to any use."""
    values = np.random.default_rng(0).normal(size=(9, 3)) * 20
    best = worst_weights(values, 1.0)
    around = best + 1e-3 * (spread_over_simplex(3, 4) - 1 / 3)
    around = around[(around >= 0).all(axis=1)]
    least = log_mean_exp(values, best[None], 1.0)[0]
    assert least <= log_mean_exp(values, around, 1.0).min() + 1e-5
    np.testing.assert_allclose(spread_over_simplex(3, 4).sum(axis=1), 1)


VALUES = arrays(np.float64, (C - 1, J), elements=st.integers(-50, 50).map(float))
ALIVE = arrays(bool, (C - 1,)).filter(lambda alive: alive.sum() >= 2)


@settings(max_examples=30)
@given(values=VALUES, alive=ALIVE, order=st.permutations(range(C - 1)))
def test_dead_candidates_and_their_order_say_nothing(values, alive, order):
    selector = Maximin()
    order = np.array(order)
    given_so = candidates_of(values, alive)
    others = {
        "another order": candidates_of(values[order], alive[order]),
        "without the dead": candidates_of(values[alive]),
        "all moved alike": candidates_of(values + 7.0, alive),
    }
    weights = np.asarray(weights_of(selector, given_so))[0]
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    kept = values[alive]
    assert abs(excess(kept, weights, 1.0)) < 1e-3
    for name, candidates in others.items():
        other = np.asarray(weights_of(selector, candidates))[0]
        found = log_mean_exp(kept, np.stack([weights, other]), 1.0)
        assert found[0] == pytest.approx(found[1], abs=2e-3), name
    chosen = np.asarray(selected(selector, given_so, 2))[0]
    assert alive[chosen].all()
    assert len(set(chosen)) == 2
    # The two best under the found weights, best first.
    worst = values @ weights.astype(np.float64)
    ranked = np.sort(worst[alive])[::-1][:2]
    np.testing.assert_allclose(worst[chosen], ranked, atol=1e-3)


@settings(max_examples=30)
@given(values=arrays(np.float64, (C - 1, 1), elements=st.integers(-3, 3).map(float)), alive=ALIVE)
def test_with_one_objective_maximin_is_top_w(values, alive):
    candidates = candidates_of(values, alive)
    chosen = [np.asarray(selected(s, candidates, 2)) for s in (TopW(), Maximin(3.0))]
    np.testing.assert_array_equal(*chosen)


def test_without_objectives_maximin_keeps_the_first():
    candidates = Candidates(jnp.zeros((1, C, 0)), jnp.arange(C)[None] > 1)
    assert selected(Maximin(), candidates, 2).tolist() == [[2, 3]]


def test_a_large_scale_finds_the_candidate_of_highest_least_objective():
    """Where one candidate and one objective are each other's answer, the game has that value."""
    rng = np.random.default_rng(0)
    differ = 0
    for _ in range(20):
        values = rng.normal(size=(C, J)) * 10
        even, weak = rng.integers(C), rng.integers(J)
        values[even] = np.abs(values[even]) + 1
        values[even, weak] = 0.5
        values[:, weak] = np.where(np.arange(C) == even, 0.5, -np.abs(values[:, weak]))
        (chosen,) = np.asarray(selected(Maximin(1000.0), candidates_of(values), 1))[0]
        assert chosen == even == np.argmax(values.min(axis=1))
        differ += even != np.argmax(values.sum(axis=1))
    assert differ > 5


def test_a_small_scale_weighs_the_mean_of_each_objective():
    """As scale → 0 the worst objective is the one of the least mean over the candidates."""
    values = np.random.default_rng(1).normal(size=(C, J)) * 5
    weights = np.asarray(weights_of(Maximin(1e-4), candidates_of(values)))[0]
    assert weights[np.argmin(values.mean(axis=0))] > 0.99


@settings(max_examples=30)
@given(values=VALUES, alive=ALIVE)
def test_top_w_is_a_stable_sort_of_the_living(values, alive):
    order = sorted(np.flatnonzero(alive), key=lambda c: -values[c].sum())
    chosen = np.asarray(selected(TopW(), candidates_of(values, alive), 2))[0]
    assert chosen.tolist() == order[:2]


def test_keep_all_keeps_rows_in_place_and_ended_hypotheses_as_they_are():
    ended = np.array([[False, True, False], [True, True, True]])
    alive = jnp.asarray(np.concatenate([~ended, ended], axis=1))
    candidates = Candidates(jnp.zeros((2, 6, 1)), alive)
    assert KeepAll().select(candidates, 3, 1).tolist() == [[0, 4, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="one successor"):
        KeepAll().select(candidates, 3, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": 0.0}, "the maximin scale is 0.0; it must be above 0"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"steps": 0}, "steps are 0; there must be at least 1"),
    ],
)
def test_maximin_values_out_of_range_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Maximin(**fields)
