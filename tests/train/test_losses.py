import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from w2s_jax.train import losses
from w2s_jax.train.preference_config import PairLogprobs, PreferenceConfig, preference_loss

logps = arrays(np.float32, (4, 3), elements=st.floats(-60, 0, width=32))


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


@given(rows=logps)
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
