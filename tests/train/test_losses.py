import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from w2s_jax.train import losses
from w2s_jax.train.preference_config import PairLogprobs, PreferenceConfig, preference_loss

logps = arrays(np.float32, (4, 3), elements=st.floats(-60, 0, width=32))


def log_sigmoid(x):
    """In float64, without overflow."""
    x = np.asarray(x, np.float64)
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


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


@given(rows=arrays(np.float32, (4, 3), elements=st.floats(-60, 0, width=32)))
def test_dpo_is_trl_s_sigmoid_formula(rows):
    chosen, rejected, reference_chosen, reference_rejected = rows.astype(np.float64)
    delta = (chosen - reference_chosen) - (rejected - reference_rejected)
    expected = -log_sigmoid(0.1 * delta).mean()
    np.testing.assert_allclose(dpo(rows, beta=0.1)[0], expected, rtol=1e-5, atol=1e-6)


@given(rows=logps, smoothing=st.floats(0, 0.5, exclude_max=True))
def test_label_smoothing_mixes_in_the_swapped_loss(rows, smoothing):
    loss = dpo(rows, beta=0.3, label_smoothing=smoothing)[0]
    straight = dpo(rows, beta=0.3)[0]
    swapped = dpo(rows[[1, 0, 3, 2]], beta=0.3)[0]
    expected = (1 - smoothing) * straight + smoothing * swapped
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)


@given(rows=logps)
def test_swapping_chosen_and_rejected_mirrors_the_margin(rows):
    straight, mirrored = dpo(rows)[1], dpo(rows[[1, 0, 3, 2]])[1]
    np.testing.assert_array_equal(straight["rewards/margins"], -mirrored["rewards/margins"])
    np.testing.assert_array_equal(straight["rewards/chosen"], mirrored["rewards/rejected"])


@given(rows=logps)
def test_tuned_equal_to_the_reference_gives_log_two(rows):
    loss, metrics = dpo(rows[[0, 1, 0, 1]])
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    assert metrics["rewards/margins"] == 0


def test_dpo_s_gradient_pushes_the_pair_apart():
    rows = [jnp.array([-5.0]), jnp.array([-5.0]), jnp.array([-5.0]), jnp.array([-5.0])]
    gradient = jax.grad(lambda c, r: dpo([c, r, *rows[2:]], beta=0.2)[0], argnums=(0, 1))
    chosen, rejected = gradient(*rows[:2])
    # d/dm of -log sigmoid(m) at 0 is -1/2; m moves by beta.
    np.testing.assert_allclose([chosen[0], rejected[0]], [-0.1, 0.1], rtol=1e-6)


def test_classification_is_cross_entropy():
    logits = jnp.array([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    loss, metrics = losses.classification(logits, jnp.array([0, 1, 1]))
    expected = (np.log1p(np.exp(-2)) + np.log1p(np.exp(-1)) + np.log1p(np.exp(2))) / 3
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["accuracy"] == pytest.approx(2 / 3)
