import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.errors import InputError
from w2s_jax.train.config import OptimizerConfig
from w2s_jax.train.step import make_optimizer, make_schedule

SHAPES = {
    "embed": {"embedding": (5, 4)},
    "layers_0": {
        "norm": {"scale": (4,)},
        "attention": {
            "query": {"kernel": (4, 2, 2), "bias": (2, 2)},
            "out": {"kernel": (2, 2, 4)},
        },
        "mlp": {"up": {"kernel": (4, 8)}},
    },
}
PARAMS = jax.tree.map(
    lambda shape: np.ones(shape, np.float32), SHAPES, is_leaf=lambda one: isinstance(one, tuple)
)


def rates(config, steps, at):
    schedule = make_schedule(config, steps)
    return [float(schedule(step)) for step in at]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0]),
        ("cosine", [0, 0.5, 1, 0.853553, 0.5, 0]),
        ("trapezoid", [0, 0.5, 1, 1, 1, 0]),
    ],
)
def test_schedules_warm_up_and_then_fall(kind, expected):
    config = OptimizerConfig(learning_rate=1.0, schedule=kind, warmup=0.2, decay=0.4)
    np.testing.assert_allclose(rates(config, 100, [0, 10, 20, 40, 60, 100]), expected, atol=1e-6)


def test_a_trapezoid_is_the_same_before_its_fall_whatever_the_steps():
    # A number of steps from 1 on, a share below.
    for warmup, steps in ((1.0, 1), (0.99, 99), (10.0, 10)):
        config = OptimizerConfig(learning_rate=1.0, warmup=warmup, schedule="cosine")
        schedule = make_schedule(config, 100)
        assert [float(schedule(step)) for step in (0, steps)] == [0.0, 1.0]
    config = OptimizerConfig(schedule="trapezoid", warmup=10.0, decay=0.5)
    np.testing.assert_array_equal(rates(config, 100, range(50)), rates(config, 400, range(50)))


def test_the_rate_falls_to_its_final_share():
    config = OptimizerConfig(learning_rate=2.0, schedule="linear", warmup=0.0, final=0.1)
    np.testing.assert_allclose(rates(config, 50, [50, 80]), 0.2, rtol=1e-6)


WEIGHTS = ("kernel", "embedding")
DECAYED = dict.fromkeys(("adamw", "adafactor", "lion", "sgd"), WEIGHTS) | {"muon": ("kernel",)}


@pytest.mark.parametrize(("name", "ends"), DECAYED.items())
def test_weight_decay_spares_norms_and_biases(name, ends):
    config = OptimizerConfig(optimizer=name, schedule="constant", warmup=0.0, weight_decay=0.5)
    optimizer = make_optimizer(config, 10)
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    updates = updated(optimizer, zeros, PARAMS)
    moved = {
        "/".join(entry.key for entry in path): bool(np.any(leaf != 0))
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
    }
    assert {path for path, decayed in moved.items() if decayed} == {
        path for path in moved if path.endswith(ends)
    }


def gradients():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), PARAMS)


def updated(optimizer, gradients, params, steps=1):
    """The last of so many updates by the same gradients."""

    @jax.jit
    def run(gradients, params):
        state = optimizer.init(params)
        for _ in range(steps):
            updates, state = optimizer.update(gradients, state, params)
        return updates

    return jax.device_get(run(gradients, params))


def updates_of(name, **fields):
    """The first updates, at a learning rate of 0.1."""
    config = OptimizerConfig(
        optimizer=name,
        learning_rate=0.1,
        schedule="constant",
        max_grad_norm=0.0,
        **fields,
    )
    return updated(make_optimizer(config, 10), gradients(), PARAMS)


def same(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), left, right)


def test_sgd_follows_the_gradient():
    same(updates_of("sgd"), jax.tree.map(lambda g: -0.1 * g, gradients()))


def test_lion_moves_by_the_sign_and_forgets_as_in_its_paper():
    same(updates_of("lion"), jax.tree.map(lambda g: -0.1 * np.sign(g), gradients()))
    decayed = jax.tree.map(lambda g, p: -0.1 * (np.sign(g) + 0.5 * p), gradients(), PARAMS)
    kernel = lambda tree: tree["layers_0"]["mlp"]["up"]["kernel"]  # noqa: E731
    same(kernel(updates_of("lion", weight_decay=0.5)), kernel(decayed))


def test_adafactor_holds_a_row_and_a_column_of_a_matrix_and_clips_its_update():
    wide = {"embed": {"embedding": np.ones((256, 128), np.float32)}}
    optimizer = make_optimizer(OptimizerConfig(optimizer="adafactor", max_grad_norm=0.0), 10)
    held = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, wide)))
    assert held < 2 * (256 + 128)
    for leaf in jax.tree.leaves(updates_of("adafactor")):
        assert float(np.sqrt(np.mean(np.square(leaf)))) <= 0.1 * 1.001


@pytest.mark.parametrize("name", DECAYED)
def test_each_optimizer_goes_downhill(name):
    weights = jnp.full((4, 4), 3.0)
    params = {"layers_0": {"up": {"kernel": weights}}}
    config = OptimizerConfig(optimizer=name, learning_rate=0.1, muon_learning_rate=0.1, warmup=0.0)
    optimizer = make_optimizer(config, 50)
    state = optimizer.init(params)
    loss = lambda tree: jnp.mean(tree["layers_0"]["up"]["kernel"] ** 2)  # noqa: E731

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (jax.tree.map(jnp.add, params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=50))((params, state))
    assert float(loss(params)) < 0.95 * 9


def test_muon_orthogonalises_layer_matrices():
    config = OptimizerConfig(
        optimizer="muon", learning_rate=1.0, muon_learning_rate=1.0, schedule="constant",
        max_grad_norm=0.0,
    )  # fmt: skip
    optimizer = make_optimizer(config, 10)
    gradient = jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), PARAMS
    )
    updates = updated(optimizer, gradient, PARAMS)
    attention = updates["layers_0"]["attention"]
    for kernel in (attention["query"]["kernel"], attention["out"]["kernel"]):
        values = np.linalg.svd(np.asarray(kernel).reshape(4, 4), compute_uv=False)
        assert 0.3 < values.min() <= values.max() < 1.5


def test_muon_treats_stacked_layers_as_single_ones():
    rng = np.random.default_rng(0)
    shapes = {"mlp": {"up": (4, 6)}, "attention": {"query": (4, 2, 3), "out": (2, 3, 4)}}
    layers = [
        {
            room: {name: {"kernel": rng.normal(size=shape).astype(np.float32)}}
            for room, kernels in shapes.items()
            for name, shape in kernels.items()
        }
        for _ in range(2)
    ]
    stacked = {"layers": jax.tree.map(lambda *x: np.stack(x), *layers)}
    optimizer = make_optimizer(OptimizerConfig(optimizer="muon", max_grad_norm=0.0), 10)

    def update(params):
        return updated(optimizer, params, params, steps=2)

    alone = update({f"layers_{i}": layer for i, layer in enumerate(layers)})
    together = jax.tree.map(lambda *x: np.stack(x), alone["layers_0"], alone["layers_1"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        update(stacked)["layers"],
        together,
    )


def test_the_global_norm_is_clipped_before_the_update():
    config = OptimizerConfig(
        learning_rate=1.0, schedule="constant", warmup=0.0, max_grad_norm=1e-12
    )
    optimizer = make_optimizer(config, 10)
    updates = updated(optimizer, PARAMS, PARAMS)
    # Adam would move every weight by 1; a gradient far below its epsilon moves almost nothing.
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(updates)) < 1e-3


WRONG = {
    "warmup": (-1.0, np.nan), "decay": (0.0, np.nan), "learning_rate": (0.0, np.nan, np.inf),
    "muon_learning_rate": (0.0, np.nan), "final": (-1.0, np.nan), "weight_decay": (-1.0, np.nan),
    "b1": (-1.0, 1.0, np.nan), "b2": (-1.0, 1.0), "max_grad_norm": (-1.0, np.nan),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, vs in WRONG.items() for v in vs])
def test_wrong_settings_are_told(name, value):
    with pytest.raises(InputError, match=f"^{name} {value} must be"):
        OptimizerConfig(**{name: value})
