import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from w2s_jax.train.step import init_state, make_train_step


def loss(params, frozen, batch, key):
    """Masked mean of squared errors: rows of unequal weight, as with tokens."""
    errors = jnp.where(batch["mask"], (batch["x"] @ params["w"] - batch["y"]) ** 2, 0.0)
    weight = batch["mask"].sum()
    value = errors.sum() / weight
    return value, weight, {"loss": value}


def noisy(params, frozen, batch, key):
    value, weight, metrics = loss(params, frozen, batch, key)
    return value + params["w"].sum() * jax.random.normal(key), weight, metrics


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(8, 3)).astype(np.float32),
        "y": rng.normal(size=8).astype(np.float32),
        "mask": np.array([1, 1, 1, 1, 1, 0, 0, 0], bool),
    }
    return {"w": jnp.arange(3.0)}, batch


def run(problem, function, accumulate=1, steps=3):
    params, batch = problem
    optimizer = optax.adam(0.1)
    step = make_train_step(function, optimizer, accumulate=accumulate)
    state = init_state(params, optimizer, jax.random.key(0))
    for _ in range(steps):
        state, metrics = step(state, None, batch)
    return state, metrics


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_steps_equal_whole_ones_though_weights_differ(problem, accumulate):
    params, batch = problem
    batch = batch | {"mask": np.array([1, 1, 1, 0, 1, 0, 1, 0], bool)}
    whole, whole_metrics = run((params, batch), loss)
    parts, parts_metrics = run((params, batch), loss, accumulate)
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-5)
    assert parts_metrics["loss"] == pytest.approx(float(whole_metrics["loss"]), rel=1e-5)
    assert parts_metrics["grad_norm"] == pytest.approx(float(whole_metrics["grad_norm"]), rel=1e-5)


def test_each_step_draws_anew_and_runs_repeat(problem):
    first, _ = run(problem, noisy)
    again, _ = run(problem, noisy)
    np.testing.assert_array_equal(first.params["w"], again.params["w"])
    assert int(first.step) == 3
    once = run(problem, noisy, steps=1)[0].params["w"]
    assert not np.allclose(once - problem[0]["w"], first.params["w"] - once)


def test_the_caller_keeps_its_parameters(problem):
    run(problem, loss)
    np.testing.assert_array_equal(problem[0]["w"], np.arange(3.0))
