import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.tiny import VOCAB, tiny_model
from w2s_jax.train.logprobs import scored_tokens, sequence_scores
from w2s_jax.train.losses import Mean
from w2s_jax.train.step import init_state, make_train_step


def loss(params, frozen, batch, key):
    """Masked mean of squared errors: rows of unequal weight, as with tokens."""
    errors = jnp.where(batch["mask"], (batch["x"] @ params["w"] - batch["y"]) ** 2, 0.0)
    weight = batch["mask"].sum()
    value = errors.sum() / weight
    rare = batch["mask"] & (batch["y"] > 0)
    return value, weight, {"loss": value, "rare": Mean((rare * batch["y"]).sum(), rare.sum())}


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


def test_accumulated_steps_equal_whole_ones_though_weights_differ(problem):
    params, batch = problem
    batch = batch | {"mask": np.array([1, 1, 1, 0, 1, 0, 1, 0], bool)}
    whole, whole_metrics = run((params, batch), loss)
    parts, parts_metrics = run((params, batch), loss, accumulate=4)
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-5)
    assert parts_metrics["loss"] == pytest.approx(float(whole_metrics["loss"]), rel=1e-5)
    assert parts_metrics["grad_norm"] == pytest.approx(float(whole_metrics["grad_norm"]), rel=1e-5)
    positive = [y for y, counts in zip(batch["y"], batch["mask"], strict=True) if counts and y > 0]
    for metrics in (whole_metrics, parts_metrics):
        assert metrics["rare"].value == pytest.approx(np.mean(positive), rel=1e-5)


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


def decoder_problem():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (4, 10)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[1, 4:], segments[3, 2:] = 0, 0
    return {"tokens": tokens, "segments": segments}


def decoder_loss(params, frozen, batch, key):
    scores = sequence_scores(params, batch["tokens"], batch["segments"])
    weight = scored_tokens(batch["segments"]).sum()
    value = -scores.logprobs.sum() / weight
    seen = {str(leaf.dtype) for leaf in jax.tree.leaves((params, frozen))}
    metrics = {"loss": value, "num_tokens": weight, "narrow": jnp.float32(seen == {"bfloat16"})}
    return value, weight, metrics


def test_a_decoder_on_micro_batches_equals_the_large_batch():
    optimizer = optax.sgd(0.1)
    found = []
    for accumulate in (1, 4):
        step = make_train_step(decoder_loss, optimizer, accumulate=accumulate)
        state = init_state(tiny_model(0, layers=1), optimizer, jax.random.key(0))
        found.append(step(state, None, decoder_problem()))
    (whole, metrics), (state, others) = found
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, whole.params
    )
    assert float(others["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)
    assert float(others["num_tokens"]) == float(metrics["num_tokens"]) == 9 + 3 + 9 + 1


def test_half_precision_computes_narrow_and_keeps_float32_masters():
    optimizer = optax.adam(1e-4)
    step = make_train_step(decoder_loss, optimizer, compute_dtype=jnp.bfloat16)
    start, frozen = tiny_model(0, layers=1, sharpness=4.0), tiny_model(1, layers=1)
    state = init_state(start, optimizer, jax.random.key(0))
    losses = []
    for _ in range(3):
        state, metrics = step(state, frozen, decoder_problem())
        losses.append(float(metrics["loss"]))
    assert metrics["narrow"] == 1
    held = jax.tree.leaves((state.params, state.optimizer[0].mu, frozen))
    assert {leaf.dtype for leaf in held} == {jnp.dtype(jnp.float32)}
    # Steps of 1e-4 vanish in bfloat16 weights near 1: the sums are kept in float32.
    assert losses[2] < losses[0]
    scale = state.params.params["final_norm"]["scale"]
    assert 0 < float(jnp.abs(scale - start.params["final_norm"]["scale"]).max()) < 1e-3


def test_what_is_frozen_is_read_and_neither_changed_nor_donated():
    def distance(params, frozen, batch, key):
        value = ((params["w"] - frozen["w"]) ** 2).sum()
        return value, jnp.float32(1.0), {"loss": value}

    optimizer = optax.sgd(0.25)
    step = make_train_step(distance, optimizer)
    frozen = {"w": jnp.full(3, 2.0)}
    state = init_state({"w": jnp.zeros(3)}, optimizer, jax.random.key(0))
    for _ in range(2):
        state, _ = step(state, frozen, {})
    np.testing.assert_allclose(state.params["w"], 1.5)
    np.testing.assert_array_equal(frozen["w"], np.full(3, 2.0))


def test_a_micro_batch_of_no_weight_is_left_out_though_its_values_are_nan(problem):
    params, batch = problem
    rows = dict(batch, mask=np.array([1, 1, 1, 1, 0, 0, 0, 0], bool))
    optimizer = optax.sgd(0.1)
    whole = make_train_step(loss, optimizer)
    parts = make_train_step(loss, optimizer, accumulate=2)  # 0 / 0 in the second part
    start = lambda: init_state(params, optimizer, jax.random.key(0))  # noqa: E731
    (expected, _), (found, metrics) = whole(start(), None, rows), parts(start(), None, rows)
    np.testing.assert_allclose(found.params["w"], expected.params["w"], rtol=1e-5)
    assert np.isfinite(float(metrics["loss"]))
