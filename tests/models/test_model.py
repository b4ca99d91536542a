"""The model value: masks, layouts, abstract shapes, and that no token sees the future."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import VOCAB, tiny_config, tiny_model
from w2s_jax.errors import InputError
from w2s_jax.models.decoder import initial_params
from w2s_jax.models.model import Model, abstract_model, hidden_states, init_model

KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 7)).astype(np.int32)


def test_logits_are_float32_and_of_the_right_shape():
    for dtype in (jnp.float32, jnp.bfloat16):
        logits = init_model(tiny_config(layers=1), jax.random.key(0), dtype=dtype)(TOKENS)
        assert logits.shape == (2, 7, VOCAB)
        assert logits.dtype == jnp.float32


@pytest.mark.parametrize("position", ["rotary", "learned"])
@pytest.mark.parametrize("before", [True, False])
def test_padding_on_either_side_changes_nothing(position, before):
    model = tiny_model(0, position=position, sliding_windows=(3, None))
    pad, real = np.full((2, 3), 5, np.int32), np.ones((2, 7), bool)
    tokens = np.concatenate([pad, TOKENS] if before else [TOKENS, pad], axis=1)
    mask = np.concatenate([pad < 0, real] if before else [real, pad < 0], axis=1)
    logits = model(tokens, mask)[:, 3:] if before else model(tokens, mask)[:, :7]
    np.testing.assert_allclose(logits, model(TOKENS), atol=1e-4)


def test_more_tokens_than_learned_positions_are_refused():
    model = tiny_model(0, layers=1, position="learned", max_positions=6)
    with pytest.raises(InputError, match="7 tokens for a model of 6 positions"):
        model(TOKENS)


def test_no_token_sees_the_future():
    model = tiny_model(0)

    def third(embedding):
        params = model.params | {"embed": {"embedding": embedding}}
        return hidden_states(Model(model.config, params), jnp.arange(7)[None])[0, 2].sum()

    gradient = jax.jit(jax.grad(third))(model.params["embed"]["embedding"])
    assert np.abs(gradient[:3]).sum(axis=1).all()
    np.testing.assert_array_equal(gradient[3:], 0)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_abstract_shapes_and_axes_are_those_of_the_parameters(scan_layers):
    config = tiny_config(query_key_norm="head", norm_placement="sandwich", qkv_bias=True)
    shapes, axes = abstract_model(config, scan_layers=scan_layers)
    real = init_model(config, jax.random.key(0), scan_layers=scan_layers)
    assert jax.tree.map(jnp.shape, real.params) == jax.tree.map(lambda x: x.shape, shapes.params)
    ranks = jax.tree.map(len, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert ranks == jax.tree.map(lambda x: x.ndim, shapes.params)
    assert real.scan_layers == scan_layers


def test_stacked_parameters_have_a_layer_axis():
    _, axes = abstract_model(tiny_config(), scan_layers=True)
    kernel = axes["layers"]["attention"]["query"]["kernel"]
    assert kernel == ("layers", "embed", "heads", "head_width")


def test_parameters_are_drawn_apart():
    params = init_model(tiny_config(), KEY).params
    first, second = (params[f"layers_{i}"]["mlp"]["up"]["kernel"] for i in range(2))
    assert not np.allclose(first, second)
    boxed = jax.eval_shape(lambda key: initial_params(tiny_config(), key, jnp.float32, False), KEY)
    assert set(boxed) == set(params)
