from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from w2s_jax.models.load import load_config, load_model
from w2s_jax.models.model import abstract_model
from w2s_jax.models.parameters import decoder_parameters, stack_layers, unstack_layers

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


@pytest.mark.parametrize("case", CASES)
def test_the_table_names_every_tensor_of_a_checkpoint_and_its_shape(case):
    files = (GOLDEN / case).glob("model*.safetensors")
    held = {name: tensor.shape for file in files for name, tensor in load_file(file).items()}
    table = decoder_parameters(load_config(GOLDEN / case))
    assert {row.stored.name: row.stored.shape(row.shape) for row in table.values()} == held


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
