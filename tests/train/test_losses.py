"""Losses against formulas in float64 NumPy, and the identities that their formulas imply."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from w2s_jax.train import losses
from w2s_jax.train.config import LOSSES, LossInputs, PreferenceConfig
from w2s_jax.train.losses import (
    PAIR_LOSSES,
    PairLogprobs,
    kto,
    kto_kl,
    kto_metrics,
    preference_loss,
    wspo,
)

B = 3
LENGTHS = np.array([[3, 1, 7], [2, 5, 4]], np.int32)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
FEW = settings(max_examples=8)
"""For what every loss is asked."""
BY_BATCH = {"aot", "aot_unpaired"}
WITH_REFERENCE = [name for name in PAIR_LOSSES if LOSSES[name].reference]

logprobs = arrays(np.float32, (4, B), elements=st.floats(-60, 0, width=32))
extreme = arrays(
    np.float32,
    (4, B),
    elements=st.sampled_from([-1e4, -100, -1, 0, 1, 100, 1e4]) | st.floats(-1e4, 1e4, width=32),
)
tokens = arrays(np.float32, (4, B, 5), elements=st.floats(-20, 0, width=32))
masks = arrays(bool, (B, 5))


def log_sigmoid(x):
    """In float64, without overflow."""
    x = np.asarray(x, np.float64)
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


def config_of(name, **options):
    if name == "exo_pair":
        options = {"label_smoothing": 1e-3, **options}
    return PreferenceConfig((name,), **options)


@cache
def compiled(config):
    """The losses on rows chosen, rejected and the reference's two, and their sum's gradient."""

    def total(rows):
        values, metrics = preference_loss(config, PairLogprobs(*rows, *jnp.asarray(LENGTHS)))
        return values.sum(), (values, metrics)

    return jax.jit(jax.grad(total, has_aux=True))


def evaluate(name, rows, **options):
    """Losses [B] of a drawn batch; the rest of the tests' options go to the config."""
    return np.asarray(compiled(config_of(name, **options))(jnp.asarray(rows))[1][0])


def log_ratios(rows):
    chosen, rejected, reference_chosen, reference_rejected = rows.astype(np.float64)
    return chosen - reference_chosen, rejected - reference_rejected


# What TRL does not have, or has otherwise, by hand.


@given(rows=logprobs)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_sigmoid_is_conservative_dpo(smoothing, rows):
    chosen, rejected = log_ratios(rows)
    margins = 0.7 * (chosen - rejected)
    expected = -(1 - smoothing) * log_sigmoid(margins) - smoothing * log_sigmoid(-margins)
    values = evaluate("sigmoid", rows, beta=0.7, label_smoothing=smoothing)
    np.testing.assert_allclose(values, expected, **CLOSE)


@given(rows=logprobs)
def test_genarm_is_bradley_terry_on_log_probs(rows):
    chosen, rejected = rows[:2].astype(np.float64)
    values = evaluate("genarm", rows, beta=0.05, label_smoothing=0.2)
    margins = 0.05 * (chosen - rejected)
    expected = -0.8 * log_sigmoid(margins) - 0.2 * log_sigmoid(-margins)
    np.testing.assert_allclose(values, expected, **CLOSE)


@partial(jax.jit, static_argnames="beta")
def wspo_losses(rows, mask, beta):
    return wspo(*rows, mask, beta=beta)


@given(rows=tokens, mask=masks)
def test_wspo_by_hand(rows, mask):
    policy, reference, tuned, untuned = rows.astype(np.float64)
    values = wspo_losses(rows, mask, beta=0.5)
    for i in range(B):
        errors = [
            (0.5 * (policy[i, x] - reference[i, x]) - (tuned[i, x] - untuned[i, x])) ** 2
            for x in range(5)
            if mask[i, x]
        ]
        np.testing.assert_allclose(values[i], np.mean(errors) if errors else 0.0, **CLOSE)


def test_wspo_ignores_what_is_masked_in_its_gradient_too():
    rows, mask = np.full((4, 1, 2), -1.0, np.float32), np.array([[True, False]])
    rows[:, 0, 1] = -np.inf
    slope = jax.jit(jax.grad(lambda rows: wspo_losses(rows, mask, beta=0.1).sum()))
    gradient = slope(np.concatenate([rows[:1] + 1, rows[1:]]))[0]
    assert np.isfinite(gradient).all()
    assert gradient[0, 1] == 0


@given(rows=tokens, mask=masks)
def test_wspo_is_zero_at_its_target(rows, mask):
    _, reference, tuned, untuned = rows
    policy = reference + (tuned - untuned) / 0.25
    values = wspo_losses(np.stack((policy, *rows[1:])), mask, beta=0.25)
    np.testing.assert_allclose(values, 0.0, atol=1e-6)


@given(rows=logprobs)
def test_orpo_in_probabilities(rows):
    rows = np.minimum(rows, -0.01)
    means = np.exp(rows[:2].astype(np.float64) / LENGTHS)
    chosen, rejected = means / (1 - means)
    nll = -rows[0].astype(np.float64).sum() / LENGTHS[0].sum()
    expected = nll - 0.3 * log_sigmoid(np.log(chosen / rejected)).mean()
    np.testing.assert_allclose(evaluate("orpo", rows, beta=0.3).mean(), expected, rtol=1e-4)


def test_orpo_takes_another_nll():
    pair, nll = jnp.array([-2.0]), jnp.array([7.0])
    values = losses.orpo(
        PairLogprobs(pair, pair, None, None, jnp.array([2]), jnp.array([2]), nll), beta=0.5
    )
    np.testing.assert_allclose(values, 7 + 0.5 * np.log(2), rtol=1e-6)


def test_sft_is_the_token_mean_of_the_chosen_responses():
    logprobs = np.array([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]], np.float32)
    mask = np.array([[True, True, True], [False, True, False]])
    sums = np.where(mask, logprobs, 0.0).sum(-1, dtype=np.float32)
    lengths = jnp.asarray(mask.sum(-1, dtype=np.int32))
    pairs = PairLogprobs(jnp.asarray(sums), jnp.asarray(sums), chosen_lengths=lengths)
    values = jax.jit(losses.sft)(pairs)
    np.testing.assert_allclose(values.mean(), -logprobs[mask].mean(), rtol=1e-6)


# Extremes, invariances, limits.


@pytest.mark.parametrize("name", PAIR_LOSSES)
@FEW
@given(rows=extreme)
def test_gradients_are_finite_at_extremes(name, rows):
    gradient, (values, metrics) = compiled(config_of(name))(jnp.asarray(rows))
    assert np.isfinite(values).all()
    assert np.isfinite(gradient).all()
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("name", WITH_REFERENCE)
@FEW
@given(rows=logprobs, shifts=arrays(np.float32, (2, B), elements=st.floats(-9, 9, width=32)))
def test_a_constant_on_policy_and_reference_changes_nothing(name, rows, shifts):
    values = evaluate(name, rows)
    if name == "aot":  # it compares margins before it subtracts the reference's: one shift for all
        shifts = np.broadcast_to(shifts[:, :1], shifts.shape)
    moved = evaluate(name, rows + np.concatenate([shifts, shifts]))
    np.testing.assert_allclose(moved, values, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", sorted(set(PAIR_LOSSES) - BY_BATCH - {"sft", "orpo", "cpo"}))
@FEW
@given(rows=logprobs)
def test_a_pair_does_not_see_its_neighbours(name, rows):
    other = rows.copy()
    other[:, 1:] -= 5
    assert evaluate(name, rows)[0] == evaluate(name, other)[0]


@pytest.mark.parametrize("name", sorted(BY_BATCH))
@given(rows=logprobs)
def test_transport_does_not_see_the_order(name, rows):
    np.testing.assert_array_equal(evaluate(name, rows), evaluate(name, rows[:, ::-1]))


@pytest.mark.parametrize("name", sorted(BY_BATCH))
@given(rows=arrays(np.float32, (4, 1), elements=st.floats(-60, 0, width=32)))
def test_transport_of_one_pair_is_dpo(name, rows):
    single = PairLogprobs(*(jnp.asarray(row) for row in rows))
    values = PAIR_LOSSES[name](single, beta=0.4, label_smoothing=0.1)
    expected = losses.sigmoid(single, beta=0.4, label_smoothing=0.1)
    np.testing.assert_allclose(values, expected, **CLOSE)


@given(rows=logprobs)
def test_swapping_chosen_and_rejected(rows):
    swapped = rows[[1, 0, 3, 2]]
    chosen, rejected = log_ratios(rows)
    margins = 0.1 * (chosen - rejected)

    def both(name, **options):
        return evaluate(name, rows, **options), evaluate(name, swapped, **options)

    straight, mirrored = both("sigmoid")
    np.testing.assert_allclose(mirrored - straight, margins, rtol=1e-4, atol=1e-5)
    straight, mirrored = both("robust", label_smoothing=0.2)
    np.testing.assert_allclose(mirrored - straight, margins / 0.6, rtol=1e-4, atol=1e-5)
    straight, mirrored = both("apo_zero")
    np.testing.assert_allclose(straight + mirrored, 2.0, **CLOSE)
    straight, mirrored = both("hinge")
    np.testing.assert_allclose(np.maximum(straight, mirrored), 1 + abs(margins), **CLOSE)
    straight, mirrored = both("genarm")
    plain = 0.1 * (rows[0].astype(np.float64) - rows[1])
    np.testing.assert_allclose(mirrored - straight, plain, rtol=1e-4, atol=1e-5)


@given(rows=logprobs)
def test_relatives(rows):
    """Losses that become one another at some value of an option."""
    plain = evaluate("sigmoid", rows)
    np.testing.assert_array_equal(evaluate("robust", rows), plain)
    np.testing.assert_allclose(plain, -log_sigmoid(0.1 * np.subtract(*log_ratios(rows))), **CLOSE)
    zero_reference = np.concatenate([rows[:2], 0 * rows[:2]])
    constant = evaluate("sigmoid", zero_reference)
    np.testing.assert_allclose(evaluate("genarm", rows), constant, **CLOSE)
    np.testing.assert_allclose(evaluate("cpo", rows, cpo_alpha=0.0), constant, **CLOSE)
    normalised = evaluate("sigmoid_norm", zero_reference)
    np.testing.assert_allclose(evaluate("simpo", rows, simpo_gamma=0.0), normalised, **CLOSE)
    difference = evaluate("cpo", rows) - evaluate("cpo", rows, cpo_alpha=0.0)
    np.testing.assert_allclose(difference, evaluate("sft", rows), **CLOSE)


AT_REFERENCE = {
    "sigmoid": np.log(2), "hinge": 1.0, "nca_pair": 2 * np.log(2), "robust": np.log(2),
    "bco_pair": 2 * np.log(2), "aot": np.log(2), "aot_unpaired": np.log(2), "apo_zero": 1.0,
    "apo_down": 1.0, "discopop": (np.log(2) + 1) / 2, "sigmoid_norm": np.log(2),
}  # fmt: skip


@pytest.mark.parametrize("name", AT_REFERENCE)
@FEW
@given(rows=logprobs)
def test_at_the_reference(name, rows):
    at_reference = evaluate(name, rows[[0, 1, 0, 1]])
    np.testing.assert_allclose(at_reference, AT_REFERENCE[name], rtol=1e-5)


def test_exo_is_least_where_the_policy_has_the_smoothed_odds():
    zeros = jnp.zeros(3)
    best = np.log(0.9 / 0.1)
    margins = jnp.array([best, best - 0.5, best + 0.5], jnp.float32)
    pairs = PairLogprobs(margins, zeros, zeros, zeros)
    values = losses.exo_pair(pairs, beta=1.0, label_smoothing=0.1)
    np.testing.assert_allclose(values[0], 0, atol=1e-6)
    assert (values[1:] > 1e-3).all()


# KTO: single responses with labels.


@jax.jit
def kto_losses(rows, labels):
    return kto(rows[0], rows[1], labels, kto_kl(rows[2], rows[3]))


@given(rows=logprobs, labels=arrays(bool, B))
def test_kto_of_a_label_and_of_its_opposite_make_one(rows, labels):
    straight, opposite = kto_losses(rows, labels), kto_losses(rows, ~labels)
    np.testing.assert_allclose(straight + opposite, 1.0, rtol=1e-6)


@jax.jit
@jax.grad
def kto_gradient(rows, labels):
    kl = kto_kl(rows[2], rows[3])
    return kto(rows[0], rows[1], labels, kl, undesirable_weight=2.0).sum()


@given(rows=extreme, labels=arrays(bool, B))
def test_kto_is_finite_at_extremes_and_its_kl_has_no_gradient(rows, labels):
    gradient = kto_gradient(jnp.asarray(rows), labels)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[2:], 0)
    assert kto_kl(*jnp.asarray(rows[2:])) >= 0


def test_kto_metrics_of_parts_make_those_of_the_whole():
    policy, reference = np.float32([[-3.0, -5.0, -1.0, -4.0], [-4.0, -6.0, -4.0, -4.5]])
    labels = np.array([True, True, False, True])

    @jax.jit
    def of(policy, reference, labels):
        return kto_metrics(policy, reference, labels, jnp.float32(0), beta=0.5)

    def metrics(rows):
        return of(policy[rows], reference[rows], labels[rows])

    whole, *parts = (metrics(slice(*rows)) for rows in ((0, 4), (0, 2), (2, 4)))
    assert whole["rewards/chosen"].value == pytest.approx(1.25 / 3)
    assert whole["rewards/margins"].value == pytest.approx(1.25 / 3 - 1.5)
    assert parts[0]["logps/chosen"].value == -4
    assert np.isnan(parts[0]["rewards/rejected"].value)
    assert np.isnan(parts[0]["rewards/margins"].value)
    for name in whole.keys() - {"kl"}:
        added = type(whole[name])(*map(jnp.add, *(part[name] for part in parts)))
        assert added.value == pytest.approx(float(whole[name].value))


# By hand.


def dpo(rows, **options):
    config = PreferenceConfig(**{name: float(value) for name, value in options.items()})
    values, metrics = preference_loss(config, PairLogprobs(*(jnp.asarray(row) for row in rows)))
    return values.mean(), metrics


def test_dpo_by_hand():
    chosen, rejected = np.array([-10.0, -20.0]), np.array([-12.0, -19.0])
    reference_chosen, reference_rejected = np.array([-11.0, -18.0]), np.array([-11.5, -22.0])
    # Margins: 0.5 * ((1) - (-0.5)) = 0.75 and 0.5 * ((-2) - (3)) = -2.5.
    expected = (np.log(1 + np.exp(-0.75)) + np.log(1 + np.exp(2.5))) / 2
    rows = [chosen, rejected, reference_chosen, reference_rejected]
    loss, metrics = dpo([row.astype(np.float32) for row in rows], beta=0.5)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/chosen"], (0.5 - 1.0) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/rejected"], (-0.25 + 1.5) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/margins"], (0.75 - 2.5) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/accuracies"], 0.5)
    np.testing.assert_allclose(metrics["logps/chosen"], -15.0)
    np.testing.assert_allclose(metrics["logps/rejected"], -15.5)


@pytest.mark.parametrize("per_token", [False, True])
def test_a_new_loss_logs_rewards_as_its_entry_says(monkeypatch, per_token):
    arrays = ("policy_chosen", "policy_rejected", "chosen_lengths", "rejected_lengths")
    monkeypatch.setitem(LOSSES, "new", LossInputs(arrays, per_token=per_token))
    monkeypatch.setitem(PAIR_LOSSES, "new", lambda pairs, *, beta: pairs.policy_rejected * beta)
    rows, lengths = np.float32([[-6.0, -8.0], [-9.0, -4.0]]), np.int32([[2, 4], [3, 1]])
    pairs = PairLogprobs(*map(jnp.asarray, rows), None, None, *map(jnp.asarray, lengths))
    _, metrics = preference_loss(PreferenceConfig(("new",), beta=0.5), pairs)
    chosen, rejected = rows / lengths if per_token else rows
    assert metrics["logps/chosen"] == chosen.mean()
    assert metrics["rewards/chosen"] == 0.5 * chosen.mean()
    assert metrics["rewards/margins"] == 0.5 * (chosen - rejected).mean()


@given(rows=logprobs)
def test_swapping_chosen_and_rejected_mirrors_the_margin(rows):
    straight, mirrored = dpo(rows)[1], dpo(rows[[1, 0, 3, 2]])[1]
    np.testing.assert_array_equal(straight["rewards/margins"], -mirrored["rewards/margins"])
    np.testing.assert_array_equal(straight["rewards/chosen"], mirrored["rewards/rejected"])


def test_classification_is_cross_entropy():
    logits = jnp.array([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    loss, metrics = losses.classification(logits, jnp.array([0, 1, 1]))
    expected = (np.log1p(np.exp(-2)) + np.log1p(np.exp(-1)) + np.log1p(np.exp(2))) / 3
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["accuracy"] == pytest.approx(2 / 3)
