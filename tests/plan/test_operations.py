import jax
import jax.numpy as jnp
import pytest

from tests.tiny import tiny_model
from w2s_jax.bench.floor import layer_parameters
from w2s_jax.plan.operations import matmul_operations


def test_loops_branches_and_calls_are_counted():
    def step(x, w):
        def body(x, _):
            return jax.checkpoint(jnp.tanh)(x @ w), None

        x, _ = jax.lax.scan(body, x, None, length=5)
        return jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    jaxpr = jax.make_jaxpr(jax.jit(step))(jnp.ones((3, 4)), jnp.ones((4, 4)))
    assert matmul_operations(jaxpr) == (5 + 2) * 2 * 3 * 4 * 4


@pytest.mark.parametrize("scan", [False, True])
def test_a_model_costs_two_operations_a_parameter_and_token(scan):
    model = tiny_model(0, scan_layers=scan)
    tokens = jnp.ones((2, 5), jnp.int32)
    config = model.config
    found = matmul_operations(jax.make_jaxpr(lambda m, t: m(t))(model, tokens))
    weights = 2 * (layer_parameters(config) + config.width * config.vocab_size)
    attention = 4 * config.layers * config.heads * config.head_width * 5
    assert found == 10 * (weights + attention)
