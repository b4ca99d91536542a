"""Reward models: heads on decoders, their checkpoints' layouts, and live parity with torch."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.models.checkpoints import CASES, build
from tests.tiny import VOCAB, tiny_model
from w2s_jax.errors import InputError
from w2s_jax.models.load import load_reward_model
from w2s_jax.models.model import hidden_states
from w2s_jax.models.parameters import is_output_major, unstack_layers
from w2s_jax.models.reward import Classifier, EncoderConfig, RewardModel, init_classifier
from w2s_jax.models.save import save_classifier, save_reward_model

WEIGHTS = "model.safetensors"
GPT2 = {
    "architecture": "gpt2", "position": "learned", "norm": "layer", "gated_mlp": False,
    "qkv_bias": True, "out_bias": True, "mlp_bias": True, "kv_heads": 4, "activation": "gelu_tanh",
    "tied_embeddings": True,
}  # fmt: skip


def tiny_reward_model(seed=0, labels=("reward",), *, bias=False, scan_layers=False, **fields):
    model = tiny_model(seed, scan_layers=scan_layers, **fields)
    rng = np.random.default_rng(seed + 1)
    head = {"kernel": jnp.asarray(rng.normal(size=(model.config.width, len(labels))), jnp.float32)}
    if bias:
        head["bias"] = jnp.asarray(rng.normal(size=len(labels)), jnp.float32)
    params = {name: tree for name, tree in model.params.items() if name != "head"}
    return RewardModel(model.config, params, head, labels)


@pytest.fixture
def batch():
    """Right-padded tokens [4, 9] with their mask; one row is full, one holds a single token."""
    tokens = np.random.default_rng(3).integers(0, VOCAB, (4, 9)).astype(np.int32)
    return tokens, np.arange(9) < np.array([[9], [4], [1], [7]])


@pytest.mark.parametrize(("bias", "scan_layers"), [(False, True), (True, False)])
def test_logits_are_the_head_on_the_last_tokens_state(batch, bias, scan_layers):
    tokens, mask = batch
    model = tiny_reward_model(labels=("a", "b", "c"), bias=bias, scan_layers=scan_layers)
    head = {name: np.asarray(leaf, np.float64) for name, leaf in model.head.items()}
    logits = model(tokens, mask)
    assert logits.dtype == jnp.float32
    states = jax.jit(hidden_states)(model.decoder, jnp.asarray(tokens))
    for row, keep, found in zip(states, mask, logits, strict=True):
        hidden = np.asarray(row)[keep.sum() - 1]
        expected = hidden.astype(np.float64) @ head["kernel"] + head.get("bias", 0.0)
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_padding_on_either_side_and_its_tokens_change_nothing(batch):
    tokens, mask = batch
    model = tiny_reward_model()
    expected = model(tokens, mask)
    np.testing.assert_allclose(model(np.where(mask, tokens, 5), mask), expected, atol=1e-5)
    wider, wider_mask = np.pad(tokens, ((0, 0), (0, 6))), np.pad(mask, ((0, 0), (0, 6)))
    np.testing.assert_allclose(model(wider, wider_mask), expected, atol=1e-5)
    shifts = 9 - mask.sum(axis=1)
    left = np.stack([np.roll(row, shift) for row, shift in zip(tokens, shifts, strict=True)])
    left_mask = np.stack([np.roll(row, shift) for row, shift in zip(mask, shifts, strict=True)])
    np.testing.assert_allclose(model(left, left_mask), expected, atol=1e-5)


def test_without_a_mask_the_last_token_counts(batch):
    tokens, _ = batch
    model = tiny_reward_model()
    np.testing.assert_allclose(model(tokens), model(tokens, np.ones((4, 9), bool)), atol=1e-6)


def test_the_head_is_callable_on_states_of_any_shape(batch):
    tokens, _ = batch
    model = tiny_reward_model(labels=("a", "b"))
    hidden = jax.jit(hidden_states)(model.decoder, jnp.asarray(tokens))
    every = model.head_of(hidden)
    assert every.shape == (4, 9, 2)
    np.testing.assert_allclose(every[:, -1], model(tokens), atol=1e-5)
    np.testing.assert_allclose(model.head_of(hidden[0, 3]), every[0, 3], atol=1e-5)


def test_half_precision_weights_give_float32_logits(batch):
    tokens, mask = batch
    model = tiny_reward_model(bias=True)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    assert half.dtype == jnp.bfloat16
    assert half(tokens, mask).dtype == jnp.float32


def test_more_tokens_than_learned_positions_are_refused():
    model = tiny_reward_model(**GPT2, max_positions=8)
    with pytest.raises(InputError, match="9 tokens for a model of 8 positions"):
        model(np.zeros((1, 9), np.int32))


@pytest.mark.parametrize(
    ("fields", "scan_layers"), [({}, True), ({"tied_embeddings": True}, False), (GPT2, False)]
)
def test_saved_and_loaded_again_it_is_the_same(tmp_path, fields, scan_layers):
    model = tiny_reward_model(labels=("bad", "good"), **fields)
    save_reward_model(model, tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    assert hf["architectures"][0] in (
        "LlamaForSequenceClassification",
        "GPT2ForSequenceClassification",
    )
    loaded = load_reward_model(tmp_path, scan_layers=scan_layers)
    assert loaded.decoder.scan_layers == scan_layers
    assert (loaded.config, loaded.labels) == (model.config, ("bad", "good"))
    jax.tree.map(np.testing.assert_array_equal, loaded.head, model.head)
    layers = unstack_layers(loaded.params)
    assert jax.tree.structure(layers) == jax.tree.structure(model.params)
    jax.tree.map(np.testing.assert_array_equal, layers, model.params)
    tokens = np.arange(12, dtype=np.int32)[None] + 3
    expected = np.asarray(model(tokens))
    decoding = load_reward_model(tmp_path, decoding=True)
    assert is_output_major(decoding.params)
    np.testing.assert_allclose(decoding(tokens), expected, atol=1e-5 * np.abs(expected).max())


def test_a_head_with_a_bias_keeps_it(tmp_path):
    model = tiny_reward_model(bias=True)
    save_reward_model(model, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, load_reward_model(tmp_path).head, model.head)


def test_on_a_cpu_the_dtype_is_float32_unless_told(tmp_path):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_reward_model())
    save_reward_model(half, tmp_path)
    for dtype, expected in ((None, "float32"), ("stored", "bfloat16"), ("float16", "float16")):
        loaded = load_reward_model(tmp_path, dtype=dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(expected)}


def test_an_encoder_classifier_loads_as_one(tmp_path):
    config = EncoderConfig(vocab_size=11, width=8, layers=1, heads=2, mlp_width=8, max_positions=8)
    save_classifier(init_classifier(config, jax.random.key(0)), tmp_path)
    assert isinstance(load_reward_model(tmp_path), Classifier)


# Layouts of published reward models, made of our own sequence classifier's tensors.


def edit_config(directory, **changes):
    path = directory / "config.json"
    hf = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in hf.items() if value is not None}))


def edit(directory, change):
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def rename(tensors, old, new):
    for name in [name for name in tensors if name.startswith(old)]:
        tensors[new + name.removeprefix(old)] = tensors.pop(name)


def as_ultra_rm(directory):
    edit(directory, lambda tensors: rename(tensors, "score.", "regression_head."))
    edit_config(directory, architectures=["LlamaRewardModel"], id2label=None, label2id=None)


def as_starling_rm(directory, decoder="transformer.", architecture="LLMForSequenceRegression"):
    def change(tensors):
        rename(tensors, "score.", "v_head.")
        rename(tensors, "model.", decoder)

    edit(directory, change)
    edit_config(directory, architectures=[architecture], id2label=None, label2id=None)


def with_both_copies(directory):
    """As torch's state_dict has it: the wrapped language model, and its body once more."""
    as_starling_rm(directory, "model.model.", "GPTRewardModel")

    def change(tensors):
        for name in [name for name in tensors if name.startswith("model.model.")]:
            tensors["transformer." + name.removeprefix("model.model.")] = tensors[name]
        tensors["model.lm_head.weight"] = np.ones((VOCAB, 16), np.float32)
        tensors["transformer.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    edit(directory, change)


LAYOUTS = {
    "UltraRM": as_ultra_rm,
    "Starling-RM": as_starling_rm,
    "Starling-RM, both copies": with_both_copies,
    "Starling-RM, plain names and the language model's config": lambda directory: as_starling_rm(
        directory, "model.", "LlamaForCausalLM"
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts(layout, tmp_path, batch):
    model = tiny_reward_model()
    save_reward_model(model, tmp_path)
    LAYOUTS[layout](tmp_path)
    loaded = load_reward_model(tmp_path)
    assert loaded.labels == ("reward",)
    np.testing.assert_array_equal(loaded(*batch), model(*batch))


def test_gpt2_in_starlings_layout(tmp_path):
    model = tiny_reward_model(**GPT2)
    save_reward_model(model, tmp_path)
    edit(tmp_path, lambda tensors: rename(tensors, "score.", "v_head."))
    edit(tmp_path, lambda tensors: rename(tensors, "transformer.", "model.transformer."))
    edit_config(tmp_path, architectures=["GPTRewardModel"])
    loaded = load_reward_model(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ({"id2label": {"1": "good", "0": "bad"}}, ("bad", "good")),
        ({"id2label": None, "num_labels": 2}, ("LABEL_0", "LABEL_1")),
        ({"id2label": None}, ("LABEL_0", "LABEL_1")),
    ],
)
def test_labels_are_named_by_the_config(names, labels, tmp_path):
    save_reward_model(tiny_reward_model(labels=("x", "y")), tmp_path)
    edit_config(tmp_path, **names)
    assert load_reward_model(tmp_path).labels == labels


def drop(name):
    return lambda directory: edit(directory, lambda tensors: tensors.pop(name))


def add(**tensors):
    held = {name.replace("__", "."): value for name, value in tensors.items()}
    return lambda directory: edit(directory, lambda there: there.update(held))


def differing_copies(directory):
    with_both_copies(directory)
    add(transformer__norm__weight=np.full(16, 7, np.float32))(directory)


def only_pickle(directory):
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")


def no_weights(directory):
    (directory / WEIGHTS).unlink()


def config(**changes):
    return lambda directory: edit_config(directory, **changes)


ONE = np.ones((1, 16), np.float32)
SPOILED = {
    "architecture": (config(model_type="bert"), "'bert' is not supported for a reward model"),
    "pickle": (only_pickle, "pytorch_model.bin is pickle, which is never read: convert it to safe"),
    "no weights": (no_weights, "no model.safetensors.*only safetensors are read: convert"),
    "no head": (drop("score.weight"), "holds no reward head; a reward model has one of score.wei"),
    "two heads": (add(v_head__weight=ONE), "holds score.weight and v_head.weight; a reward"),
    "other class": (
        config(architectures=["LlamaForTokenClassification"]),
        "LlamaForTokenClassification with a score.weight is not supported.*ForSequenceClass",
    ),
    "classes": (config(architectures="Llama"), "architectures is 'Llama', not a list"),
    "label names": (config(id2label={"0": "a", "2": "b"}), "id2label must name the labels 0, 1"),
    "label count": (
        config(id2label={"0": "a", "1": "b"}),
        r"tensor score.weight has shape \(1, 16\), expected \(2, 16\)",
    ),
    "missing": (drop("model.norm.weight"), "tensor model.norm.weight is missing"),
    "unmapped": (
        add(model__extra=ONE),
        "tensor model.extra is no part of a llama with score with this config.json",
    ),
    "language model's head": (
        add(lm_head__weight=np.ones((VOCAB, 16), np.float32)),
        "lm_head.weight is no part of a llama with score",
    ),
    "misshapen": (
        add(model__norm__weight=np.ones(15, np.float32)),
        r"model.norm.weight has shape \(15,\), expected \(16,\)",
    ),
    "bias": (add(score__bias=np.ones(3, np.float32)), r"score.bias has shape \(3,\), expected"),
    "copies differ": (differing_copies, "model.norm.weight is there twice, with different values"),
}


@pytest.mark.parametrize("problem", SPOILED)
def test_a_wrong_checkpoint_is_told_in_one_line(problem, tmp_path):
    spoil, message = SPOILED[problem]
    save_reward_model(tiny_reward_model(), tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_reward_model(tmp_path)
    assert "\n" not in str(caught.value)


MESH = """
import sys
import jax, numpy as np
from w2s_jax.models.load import load_reward_model
from w2s_jax.ops.sharding import make_mesh
from w2s_jax.ops.sharding import DEFAULT_RULES

mesh = make_mesh("data=2,fsdp=2,tensor=2")
rules = DEFAULT_RULES.replace(vocab=None)
plain = load_reward_model({folder!r})
split = load_reward_model({folder!r}, mesh=mesh, rules=rules)
jax.tree.map(np.testing.assert_array_equal, plain.params, split.params)
jax.tree.map(np.testing.assert_array_equal, plain.head, split.head)
assert split.head["kernel"].addressable_shards[0].data.shape == (8, 2)
assert split.params["layers_0"]["mlp"]["up"]["kernel"].addressable_shards[0].data.shape == (8, 12)
tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
mask = np.arange(6) < np.array([[6], [3]])
np.testing.assert_allclose(split(tokens, mask), plain(tokens, mask), atol=1e-5)
print("shards equal")
"""


def test_on_a_mesh_the_shards_and_the_rewards_are_the_same(run_python, tmp_path):
    save_reward_model(tiny_reward_model(labels=("a", "b")), tmp_path)
    assert "shards equal" in run_python(MESH.format(folder=str(tmp_path)), devices=8)


# Live parity with torch.

PARITY = [
    "llama", "llama_grouped", "mistral", "qwen2", "qwen3", "gpt2", "gemma", "gemma2",
    "phi3", "phi3_long", "gpt_neox", "gpt_neox_sequential", "opt", "opt_projected",
    "gemma3_text", "gemma3_text_capped", "olmo", "olmo2", "olmo3", "smollm3",
]  # fmt: skip


def padded(vocabulary, pad):
    """Tokens [3, 17] without `pad` but behind each row's end, and their mask."""
    lengths = np.array([[17], [5], [11]])
    mask = np.arange(17) < lengths
    tokens = np.random.default_rng(5).integers(pad + 1, vocabulary, (3, 17))
    return np.where(mask, tokens, pad).astype(np.int32), mask


@pytest.mark.parity
@pytest.mark.parametrize(("case", "labels"), list(zip(PARITY, itertools.cycle([1, 3]))))
def test_sequence_classifiers_equal_those_of_transformers(case, labels, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    architecture, arguments = CASES[case]
    hf = transformers.AutoConfig.for_model(
        architecture, **arguments | {"pad_token_id": 0, "num_labels": labels}
    )
    torch.manual_seed(0)
    theirs = transformers.AutoModelForSequenceClassification.from_config(
        hf, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            gain = parameter.shape[-1] ** -0.5
            parameter.normal_(std=gain) if parameter.ndim > 1 else parameter.uniform_(0.2, 1.2)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens, mask = padded(hf.vocab_size, 0)

    def reference(model):
        with torch.no_grad():
            ids, attention = torch.tensor(tokens).long(), torch.tensor(mask).long()
            return model(input_ids=ids, attention_mask=attention).logits.numpy()

    expected = reference(theirs)
    for scan_layers in (False, True):
        ours = load_reward_model(tmp_path / "theirs", scan_layers=scan_layers)
        np.testing.assert_allclose(ours(tokens, mask), expected, atol=1e-4, rtol=0)
    save_reward_model(ours, tmp_path / "ours")
    again, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    np.testing.assert_allclose(reference(again.eval()), expected, atol=1e-4, rtol=0)


@pytest.mark.parity
def test_ultra_rm_equals_its_published_forward(tmp_path):
    torch = pytest.importorskip("torch")
    lm = build("llama_grouped")
    head = torch.nn.Linear(lm.config.hidden_size, 1, bias=False)
    tokens, mask = padded(lm.config.vocab_size, 0)
    with torch.no_grad():
        attention = torch.tensor(mask).long()
        hidden = lm.model(torch.tensor(tokens).long(), attention_mask=attention)[0]
        rewards = head(hidden).squeeze(-1)
        ends = attention.cumsum(dim=1).argmax(dim=1).view(-1, 1)
        expected = torch.gather(rewards, 1, ends).numpy()
    lm.save_pretrained(tmp_path)
    tensors = {f"model.{name}": value.numpy() for name, value in lm.model.state_dict().items()}
    save_file(
        tensors | {"regression_head.weight": head.weight.detach().numpy()}, tmp_path / WEIGHTS
    )
    edit_config(tmp_path, architectures=["LlamaRewardModel"])
    ours = load_reward_model(tmp_path)
    np.testing.assert_allclose(ours(tokens, mask), expected, atol=1e-4, rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize("both_copies", [False, True])
def test_starling_rm_equals_its_published_forward(both_copies, tmp_path):
    torch = pytest.importorskip("torch")

    class GPTRewardModel(torch.nn.Module):
        """A language model as `model`, its body again as `transformer`, and `v_head`."""

        def __init__(self, model):
            super().__init__()
            self.model, self.transformer = model, model.model
            self.v_head = torch.nn.Linear(model.config.hidden_size, 1, bias=False)

        def forward(self, ids, attention, pad):
            """The value at the token before the first padding one."""
            values = self.v_head(self.transformer(ids, attention_mask=attention)[0]).squeeze(-1)
            ends = [(row == pad).nonzero() for row in ids]
            places = [int(end[0]) if len(end) else ids.shape[1] for end in ends]
            return torch.stack([row[place - 1] for row, place in zip(values, places, strict=True)])

    lm = build("llama")
    theirs = GPTRewardModel(lm).eval()
    tokens, mask = padded(lm.config.vocab_size, 0)
    with torch.no_grad():
        ids, attention = torch.tensor(tokens).long(), torch.tensor(mask).long()
        expected = theirs(ids, attention, 0).numpy()[:, None]
    lm.save_pretrained(tmp_path)
    tensors = {name: value.detach().numpy().copy() for name, value in theirs.state_dict().items()}
    assert {"model.model.norm.weight", "transformer.norm.weight"} <= set(tensors)
    if not both_copies:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("model.")}
    save_file(tensors, tmp_path / WEIGHTS)
    edit_config(tmp_path, architectures=["LLMForSequenceRegression"])
    ours = load_reward_model(tmp_path)
    np.testing.assert_allclose(ours(tokens, mask), expected, atol=1e-4, rtol=0)
