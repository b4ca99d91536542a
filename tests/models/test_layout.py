from pathlib import Path

import jax
import numpy as np
import pytest

from w2s_jax.models.load import load_config, load_model
from w2s_jax.models.model import abstract_model
from w2s_jax.models.tensors import stack_layers, unstack_layers

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module")
def params():
    return load_model(GOLDEN / "qwen2").params  # three layers


def test_stacking_and_unstacking_undo_each_other(params):
    stacked = stack_layers(params, 3)
    assert stacked["layers"]["mlp"]["up"]["kernel"].shape == (3, 24, 40)
    np.testing.assert_array_equal(
        stacked["layers"]["mlp"]["up"]["kernel"][2], params["layers_2"]["mlp"]["up"]["kernel"]
    )
    back = unstack_layers(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_layout_that_is_there_already_is_left_alone(params):
    stacked = stack_layers(params, 3)
    assert unstack_layers(params) is params
    assert stack_layers(stacked, 3) is stacked


def test_stacked_parameters_have_the_tree_of_a_model_made_stacked(params):
    config = load_config(GOLDEN / "qwen2")
    made, _ = abstract_model(config, scan_layers=True)
    assert jax.tree.map(np.shape, made.params) == jax.tree.map(np.shape, stack_layers(params, 3))
