"""The step as a program for machines that are not here: it lowers for TPU and for CUDA."""

import jax
import pytest

from tests.tiny import tiny_model
from w2s_jax.search import Guide, search_models, search_step, start_search
from w2s_jax.search.config import cbs


@pytest.fixture(scope="module")
def state_and_step():
    policy, tuned, untuned = (tiny_model(seed, layers=1) for seed in range(3))
    models = search_models(policy, Guide(tuned, untuned))
    state = start_search(models, cbs(2, 2, 3), slots=2, prefix_capacity=16)
    return state, search_step.trace(models, state)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_step_lowers_for(state_and_step, platform):
    _, traced = state_and_step
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.while") >= 1, "the token loop should be one loop in the program"


def test_the_whole_state_is_donated(state_and_step):
    """And each of its arrays is written where it was."""
    state, traced = state_and_step
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tf.aliasing_output") == len(jax.tree.leaves(state))
