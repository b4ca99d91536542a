"""A DPO step of adapters on an accelerator, against the CPU."""

import math

import jax
import numpy as np
import pytest

from tests.tiny import VOCAB
from w2s_jax.models.lora import LoraConfig, init_adapter
from w2s_jax.train.config import OptimizerConfig, PreferenceConfig
from w2s_jax.train.objectives import BASE, Policy, pair_loss
from w2s_jax.train.step import init_state, make_optimizer, make_train_step

pytestmark = pytest.mark.accelerator
# Plain steps: Adam's first ones are signs, which rounding turns where a gradient is near zero.
OPTIMIZER = OptimizerConfig(optimizer="sgd", learning_rate=0.5, schedule="constant", warmup=0.0)


def pairs(length):
    rng = np.random.default_rng(0)
    place = np.broadcast_to(np.arange(length), (4, 2, length))
    ends = rng.integers(length // 2, length + 1, (4, 2, 1))
    return {
        "tokens": rng.integers(4, VOCAB, (4, 2, length)).astype(np.int32),
        "segments": (place < ends).astype(np.int32),
        "targets": (place >= 3) & (place < ends),
    }


def steps(base, adapter, lora, batch, dtype):
    """Loss and norm of the gradients of two steps, and the adapter behind them."""
    optimizer = make_optimizer(OPTIMIZER, 2)
    step = make_train_step(
        pair_loss(Policy(base.config, lora), PreferenceConfig()), optimizer, compute_dtype=dtype
    )
    state, told = init_state(adapter, optimizer, jax.random.key(0)), []
    for _ in range(2):
        state, metrics = step(state, {BASE: base}, batch)
        told.append({name: float(metrics[name]) for name in ("loss", "grad_norm")})
    return told, state.params


@pytest.fixture(scope="module")
def task(make, toy):
    base, lora = make(0), LoraConfig(rank=4)
    adapter = init_adapter(base.config, lora, jax.random.key(1))
    return base, adapter, lora, pairs(12 if toy else 256)


@pytest.fixture(scope="module")
def expected(task, on_cpu):
    """The same steps on the CPU in float32."""
    base, adapter, lora, batch = task
    run = lambda base, adapter, batch: steps(base, adapter, lora, batch, None)  # noqa: E731
    with jax.default_matmul_precision("highest"):
        return on_cpu(run, base, adapter, batch)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_dpo_steps_of_adapters(dtype, task, expected, exact, distance):
    told, tuned = steps(*task, dtype)
    assert told[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert told[1]["loss"] < told[0]["loss"]
    near = 1e-3 if dtype is None else 0.05
    for ours, right in zip(told, expected[0], strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(right[name], rel=near), name
    for ours, right in zip(jax.tree.leaves(tuned), jax.tree.leaves(expected[1]), strict=True):
        assert distance(ours, right) < 2 * near
