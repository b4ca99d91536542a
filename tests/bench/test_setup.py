"""Named shapes and the random weights that are made of them."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from tests.tiny import tiny_config
from w2s_jax.bench import decoding, search, train
from w2s_jax.bench.config import GenerateBenchConfig, SearchBenchConfig, TrainBenchConfig
from w2s_jax.bench.setup import _draw, named_shape, random_model
from w2s_jax.errors import InputError

NAMES = ("scale", "bias", "kernel")


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt2", 0.1236), ("qwen2.5-0.5b", 0.494), ("llama-1b", 1.236), ("llama-3b", 3.213),
        ("llama-8b", 8.030),
    ],
)  # fmt: skip
def test_shapes_are_of_their_published_sizes(name, billions):
    config = named_shape(name)
    embeddings = config.vocab_size * config.width * (1 if config.tied_embeddings else 2)
    assert config.matmul_parameters + embeddings == pytest.approx(billions * 1e9, rel=1e-3)


def test_a_shape_stands_in_place_of_sizes():
    policy, guide = search.shapes_of(SearchBenchConfig(shape="llama-8b"))
    assert (policy, guide) == (named_shape("llama-8b"), named_shape("llama-1b"))
    assert train.shape(TrainBenchConfig(shape="llama-1b")) == guide
    assert search.shapes_of(SearchBenchConfig(shape="gpt2")) == (named_shape("gpt2"),) * 2


@pytest.mark.parametrize(
    ("check", "config"), [(search.check, SearchBenchConfig), (train.check, TrainBenchConfig)]
)
@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"shape": "llama-9b"},
            "--shape llama-9b: no such shape; known are gpt2, qwen2.5-0.5b, llama",
        ),
        ({"shape": "llama-1b", "vocab": 9}, "--vocab is set beside --shape, which decides it"),
    ],
)
def test_wrong_shapes_are_refused(check, config, fields, told):
    with pytest.raises(InputError, match=told):
        check(config(**fields))


@pytest.mark.parametrize(
    ("check", "config"),
    [
        (search.check, SearchBenchConfig(shape="gpt2", prompt_tokens=1000)),
        (decoding.run, GenerateBenchConfig(shape="gpt2", curve=("prompt_tokens=9,1000",))),
        (train.check, TrainBenchConfig(shape="gpt2", length=1050)),
    ],
)
def test_a_shape_without_room_is_refused(check, config):
    with pytest.raises(InputError, match="1050 tokens; a model of --shape has 1024 positions"):
        check(config)


def test_weights_are_drawn_in_their_own_dtype():
    low = _draw.lower(jax.random.key(0), "kernel", (48, 40), jnp.dtype("bfloat16")).as_text()
    assert "48x40xbf16" in low
    assert "48x40xf32" not in low
    made = jax.eval_shape(partial(random_model, tiny_config(qkv_bias=True), 0, dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(made.params)} == {jnp.dtype("bfloat16")}
    values = {name: _draw(jax.random.key(0), name, (64,), jnp.dtype("float32")) for name in NAMES}
    assert (values["scale"] == 1).all()
    assert not values["bias"].any()
    assert 0.01 < values["kernel"].std() < 0.03
