"""What Python's entries are given in place of what they take: one line each."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import w2s_jax
from tests.tiny import tiny_model
from w2s_jax.cli.train import DPO
from w2s_jax.errors import InputError
from w2s_jax.models.config_json import config_from_hf
from w2s_jax.models.lora import LoraConfig
from w2s_jax.models.model import check_tokens, floating_dtype, init_model, parameter_dtype
from w2s_jax.ops.logits import Sampling
from w2s_jax.search import FunctionScorer, Guide, SearchConfig, search
from w2s_jax.search.config import cbs
from w2s_jax.text.chat import Template
from w2s_jax.text.prompts import encode_prompt
from w2s_jax.text.training_data import DataConfig
from w2s_jax.train.config import LoopConfig, OptimizerConfig, PreferenceConfig

GPT2 = Path(__file__).parent / "golden" / "gpt2"
CONFIG = cbs(2, 2, 3, max_new_tokens=4)
SCORER = FunctionScorer(lambda prompts, responses: [0.0] * len(responses))


@pytest.fixture(scope="module")
def policy():
    return tiny_model(0, layers=1)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: encode_prompt(None, ["text"]), "a prompt takes text, not list ['text']"),
        (lambda: encode_prompt(None, b"text"), "a prompt takes text, not bytes b'text'"),
        (lambda: check_tokens("text"), "a model takes an array of token ids, rows by positions, n"),
        (lambda: check_tokens([1, 2]), "rows by positions, not list [1, 2]"),
        (lambda: check_tokens(np.ones(2, int)), "not int64 of shape (2,)"),
        (lambda: check_tokens(np.ones((1, 2))), "not float64 of shape (1, 2)"),
        (
            lambda: check_tokens(np.ones((1, 2), int), np.ones((1, 3), bool)),
            "the mask is of shape (1, 3), the tokens of (1, 2)",
        ),
        (lambda: w2s_jax.load_model(GPT2, dtype="float64"), "dtype float64: JAX computes in 32 bi"),
        (lambda: w2s_jax.load_model(None), "a checkpoint's place takes a folder or a hub id, not "),
        (lambda: w2s_jax.load_tokenizer(3), "a tokenizer's place takes a folder or a hub id, not "),
        (lambda: w2s_jax.load_model(GPT2, mesh="data=2"), "mesh takes a jax.sharding.Mesh, as"),
        (lambda: w2s_jax.load_model(GPT2, rules="search"), "rules takes what ops.sharding.parse_r"),
        (lambda: w2s_jax.load_model(GPT2, quantize="int8"), "quantize takes a QuantizeConfig, not"),
        (lambda: w2s_jax.save_model("x", "y"), "save_model takes what load_model gives, not str '"),
        (lambda: config_from_hf("x"), "config_from_hf takes the contents of"),
        (lambda: init_model("gpt2", jax.random.key(0)), "init_model takes a ModelConfig, not str"),
        (lambda: floating_dtype("float99"), "dtype 'float99' is unknown"),
        (lambda: PreferenceConfig(loss_type="kto"),
         "loss_type takes a tuple of texts such as ('kto',), not str 'kto'"),
        (lambda: DPO(model="m", data=("a",), output="o", loss_type="kto").run(),
         "loss_type takes a tuple of texts such as ('kto',), not str 'kto'"),
        (lambda: DPO(model="m", data="a.jsonl", output="o").run(),
         "data takes a tuple of texts such as ('a.jsonl',), not str 'a.jsonl'"),
        (lambda: PreferenceConfig(beta="0.1"), "beta takes a number, not str '0.1'"),
        (lambda: PreferenceConfig(loss_weights=("1",)), "loss_weights takes a tuple of numbers, n"),
        (lambda: DataConfig(data="rows.jsonl"), "data takes a tuple of texts such as ('row"),
        (lambda: DataConfig(data=("a",), limit="3"), "limit takes a whole number, not str '3'"),
        (lambda: Template(None, "none").render("text"), "a template takes a Conversation, not str"),
        (lambda: LoopConfig(log_every=1.5), "log_every takes a whole number, not float 1.5"),
        (lambda: OptimizerConfig(b2="0.9"), "b2 takes a number, not str '0.9'"),
        (lambda: LoraConfig(targets="query"), "targets takes a tuple of texts such as ('query',)"),
        (lambda: Sampling("0.7"), "temperature takes a number, not str '0.7'"),
        (lambda: cbs(2, 2, 3, max_new_tokens="4"), "max_new_tokens takes a whole number, not str"),
        (lambda: cbs(2, True), "successors takes a whole number, not bool True"),
        (lambda: SearchConfig(stop="abc"), "stop takes a tuple of texts such as ('abc',), not str"),
        (lambda: SearchConfig(sampling=0.7), "sampling takes a Sampling, not float 0.7"),
        (lambda: FunctionScorer("a"), "a FunctionScorer takes a function, not str 'a'"),
        (lambda: FunctionScorer(len, "a"), "weight takes a number, not str 'a'"),
    ],
)  # fmt: skip
def test_an_entry_says_what_it_takes(call, told):
    with pytest.raises(InputError) as error:
        call()
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"row_ids": 3}, "row_ids takes a list of whole numbers, not int 3"),
        ({"row_ids": ["a"]}, "row_ids takes a list of whole numbers, not str 'a'"),
        (
            {"scorers": SCORER},
            "scorers takes a list of scorers such as FunctionScorer, not Function",
        ),
        ({"scorers": [len]}, "scorers takes a list of scorers such as FunctionScorer, not builtin"),
        (
            {"scorers": [SCORER], "conversations": ["x"]},
            "takes a list of Conversation, not str 'x'",
        ),
        ({"mesh": "data=1"}, "mesh takes a jax.sharding.Mesh"),
    ],
)
def test_a_search_says_what_it_takes(policy, options, told):
    with pytest.raises(InputError) as error:
        search(policy, Guide(policy, policy), [[1, 2]], CONFIG, decode=str, **options)
    assert told in str(error.value)


def test_a_list_in_the_place_of_a_tuple_becomes_one():
    assert PreferenceConfig(loss_type=["sigmoid"]) == PreferenceConfig(loss_type=("sigmoid",))
    assert hash(cbs(2, 2, 3, eos_ids=[3]))


def test_numbers_of_numpy_and_paths_become_what_files_hold():
    config = DataConfig(data=(Path("a"), "b"), limit=np.int64(3))
    assert (config.data, config.limit, type(config.limit)) == (("a", "b"), 3, int)
    assert type(PreferenceConfig(beta=np.float32(0.5)).beta) is float


def test_what_is_stored_in_64_bits_is_read_in_32():
    assert parameter_dtype("stored", np.float64) == jnp.float32


def test_shapes_are_judged_where_arrays_are_traced():
    def read(tokens):
        check_tokens(tokens)
        return tokens

    assert jax.eval_shape(read, jax.ShapeDtypeStruct((1, 2), jnp.int32)).shape == (1, 2)
