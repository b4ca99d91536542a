"""The step as a program for machines that are not here: it lowers for TPU and for CUDA."""

import jax
import pytest

from tests.tiny import tiny_model
from w2s_jax.search import Guide, search_models, search_step, start_search
from w2s_jax.search.presets import cbs, eft


@pytest.mark.parametrize(
    ("platform", "config"), [("tpu", cbs(2, 2, 3)), ("cuda", eft(0.5))], ids=["cbs", "eft"]
)
def test_the_step_lowers_for(platform, config):
    models = search_models(tiny_model(0), Guide(tiny_model(1), tiny_model(2)))
    state = start_search(models, config, slots=2, prefix_capacity=16)
    traced = search_step.trace(models, state)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.while") >= 1, "the token loop should be one loop in the program"


def test_the_whole_state_is_donated():
    models = search_models(tiny_model(0), Guide(tiny_model(1), tiny_model(2)))
    state = start_search(models, cbs(2, 2, 3), slots=2, prefix_capacity=16)
    arrays = jax.tree.leaves((state.proposer, state.scorer, state.tokens, state.objectives))
    search_step(models, state)
    assert all(array.is_deleted() for array in arrays)
