import jax
import jax.numpy as jnp
import pytest

from tests.tiny import tiny_model
from w2s_jax.plan.compiled import matmul_operations


def test_loops_branches_and_calls_are_counted():
    def step(x, w):
        def body(x, _):
            return jax.checkpoint(jnp.tanh)(x @ w), None

        x, _ = jax.lax.scan(body, x, None, length=5)
        return jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    jaxpr = jax.make_jaxpr(jax.jit(step))(jnp.ones((3, 4)), jnp.ones((4, 4)))
    assert matmul_operations(jaxpr) == (5 + 2) * 2 * 3 * 4 * 4


KERNEL = """
import jax, jax.numpy as jnp
from tests.ops.tpu.test_parts_kernel import case
from w2s_jax.ops.sharding import make_mesh
from w2s_jax.ops.tpu.parts_kernel import attend
from w2s_jax.ops.sharding import ON_ONE_DEVICE, SEARCH_RULES, Placement
from w2s_jax.plan.compiled import matmul_operations
arrays = case(0, 4, 2, 3, 4, 2, (20, 9), 4, 2)
for placement in (
    ON_ONE_DEVICE, Placement(make_mesh("data=2,fsdp=2,tensor=2", jax.devices()), SEARCH_RULES)
):
    def run(*arrays):
        return attend(*arrays, jnp.int32(1), scale=0.3, placement=placement, interpret=True)
    # Two products of 4 slots x 2 rows x 3 tokens x 8 heads with 33 keys 8 wide.
    found = matmul_operations(jax.make_jaxpr(jax.jit(run))(*arrays))
    assert found == 2 * 2 * (4 * 2 * 3 * 8) * (20 + 9 + 4) * 8, found
"""


def test_a_kernel_counts_on_every_device_for_its_share(run_python):
    run_python(KERNEL, devices=8)


@pytest.mark.parametrize("scan", [False, True])
def test_a_model_costs_two_operations_a_parameter_and_token(scan):
    model = tiny_model(0, scan_layers=scan)
    tokens = jnp.ones((2, 5), jnp.int32)
    config = model.config
    found = matmul_operations(jax.make_jaxpr(lambda m, t: m(t))(model, tokens))
    weights = 2 * (config.matmul_parameters + config.width * config.vocab_size)
    attention = 4 * config.layers * config.heads * config.head_width * 5
    assert found == 10 * (weights + attention)
