"""The step as a program for machines that are not here: it lowers for TPU and for CUDA."""

import jax
import pytest

from tests.tiny import tiny_model
from w2s_jax.search import Guide, search_models, search_step, start_search
from w2s_jax.search.presets import cbs


@pytest.fixture(scope="module")
def models():
    policy, tuned, untuned = (tiny_model(seed, layers=1) for seed in range(3))
    return search_models(policy, Guide(tuned, untuned))


def state_of(models):
    return start_search(models, cbs(2, 2, 3), slots=2, prefix_capacity=16)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_step_lowers_for(models, platform):
    traced = search_step.trace(models, state_of(models))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.while") >= 1, "the token loop should be one loop in the program"


def test_the_whole_state_is_donated(models):
    state = state_of(models)
    arrays = jax.tree.leaves((state.proposer, state.scorer, state.tokens, state.objectives))
    search_step(models, state)
    assert all(array.is_deleted() for array in arrays)
