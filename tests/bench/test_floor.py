"""The floor's counts against hand-made ones and against the compiler's own."""

import jax
import jax.numpy as jnp
import pytest

from tests.tiny import tiny_config, tiny_model
from w2s_jax.bench.floor import Rates, Work, mean_rates, read_work, search_work
from w2s_jax.search.config import cbs


def test_work_takes_the_larger_of_its_two_times():
    rates = Rates(operations=100.0, bytes=10.0)
    assert rates.seconds(Work(200.0, 10.0)) == 2.0
    assert rates.seconds(Work(200.0, 30.0)) == 3.0
    assert Work(1.0, 2.0) + Work(3.0, 4.0) == Work(4.0, 6.0)


def test_a_machine_that_drifts_is_said():
    before = Rates(100e9, 10e9)
    rates = mean_rates(before, Rates(108e9, 10e9))
    assert (rates.operations, rates.bytes, rates.steady) == (104e9, 10e9, True)
    assert rates.seconds(Work(208e9, 0.0)) == 2.0
    assert "not steady" not in str(rates)
    rates = mean_rates(before, Rates(100e9, 8e9))
    assert rates.drift == pytest.approx(0.25)
    assert "not steady: these differ by 25%" in str(rates)


@pytest.mark.parametrize("fields", [{}, {"gated_mlp": False}, {"heads": 2, "kv_heads": 1}])
def test_layer_parameters_are_the_kernels(fields):
    model = tiny_model(0, **fields)
    kernels = [
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)
        if "layers_" in str(path) and path[-1].key == "kernel"
    ]
    assert model.config.matmul_parameters == sum(kernels)


def test_operations_of_a_forward_pass_agree_with_the_compiler():
    model, tokens = tiny_model(0, width=64, mlp_width=256, head_width=16), 32
    run = jax.jit(lambda model, x: model(x)).lower(model, jnp.zeros((1, tokens), jnp.int32))
    counted = run.compile().cost_analysis()["flops"]
    work = read_work(model.config, 4, rows=tokens, context=float(tokens), cached=0, scored=tokens)
    assert work.operations == pytest.approx(counted, rel=0.15)


def test_a_search_by_hand():
    config = tiny_config(layers=1)
    beam = cbs(2, 3, 2, max_new_tokens=4)
    work = search_work(config, (config,), beam, prompt_tokens=3, slots=1, size=4)
    weights, head, attention = config.matmul_parameters, 16 * 23, 4 * 4 * 4
    assert work["prefill"].operations == 2 * (2 * weights * 2 + attention * 2 * 1)
    # Two chunks: each reads 2 last tokens, then one token of 6 rows, with logits for all.
    proposing = sum(
        2 * (weights + head) * (2 + 6) + attention * (2 * (2 + c) + 6 * (2 + c + 1)) for c in (0, 2)
    )
    assert work["proposing"].operations == proposing
    scoring = sum(2 * (weights + head) * 8 + attention * 8 * (2 + c + 1) for c in (0, 2))
    assert work["scoring"].operations == scoring
    assert work["selecting"] == Work(0.0, 2 * 4 * 2 * (2 * 2 * 4) * 2 * 2)
