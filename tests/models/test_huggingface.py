"""Checkpoints in and out, against golden files of transformers; live in test_parity.py."""

import dataclasses
import itertools
import json
import shutil
import stat
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import w2s_jax.models.save as save
from w2s_jax.errors import InputError
from w2s_jax.models import huggingface
from w2s_jax.models.load import load_config, load_model
from w2s_jax.models.model import Model, for_decoding, shard_model
from w2s_jax.models.parameters import (
    input_major_params,
    is_output_major,
    output_major_params,
    stack_layers,
)
from w2s_jax.models.quantize import quantize, read_quantize
from w2s_jax.models.save import save_model
from w2s_jax.ops.sharding import make_mesh
from w2s_jax.train.logprobs import sequence_scores

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
SHARDED = "mistral"


@pytest.fixture
def checkpoint(tmp_path):
    """Copies a golden checkpoint, so that a test may spoil it."""

    def copy(case):
        return Path(shutil.copytree(GOLDEN / case, tmp_path / case))

    return copy


def retouch(directory, change, file="model.safetensors"):
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file)


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, other[name], err_msg=name)


def assert_same_params(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


LAYOUTS = ({}, {"scan_layers": True}, {"decoding": True})


@pytest.mark.parametrize(("case", "layout"), list(zip(CASES, itertools.cycle(LAYOUTS))), ids=str)
def test_logits_are_those_of_transformers(case, layout):
    expected = load_file(GOLDEN / case / "expected.safetensors")
    model = load_model(GOLDEN / case, **layout)
    assert model.scan_layers == ("scan_layers" in layout)
    assert is_output_major(model.params) == ("decoding" in layout)
    logits = model(jnp.asarray(expected["tokens"]))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_saved_files_hold_the_tensors_that_were_loaded(case, tmp_path):
    original = {}
    for file in (GOLDEN / case).glob("model*.safetensors"):
        original |= load_file(file)
    for decoding in (False, True):
        model = load_model(GOLDEN / case, decoding=decoding)
        save_model(model, tmp_path)
        assert_same_tensors(load_file(tmp_path / "model.safetensors"), original)
        assert load_config(tmp_path) == model.config
    plain = load_model(GOLDEN / case).params
    assert_same_params(input_major_params(model.params), plain)
    again = output_major_params(plain, tied=model.config.tied_embeddings)
    assert_same_params(again, model.params)


@pytest.mark.parametrize("decoding", [False, True])
def test_parameters_share_no_memory_with_files_nor_host_arrays_that_change(
    decoding, checkpoint, monkeypatch
):
    made, aligned = [], huggingface._aligned

    def noted(*args):
        made.append(aligned(*args))
        return made[-1]

    monkeypatch.setattr(huggingface, "_aligned", noted)
    folder = checkpoint("llama_grouped")
    params = load_model(folder, decoding=decoding).params
    leaves = jax.tree.leaves(params)
    assert len(made) == (len(leaves) if decoding else 0)
    held = {leaf.unsafe_buffer_pointer() for leaf in leaves}
    assert held.issuperset(host.ctypes.data for host in made)
    before, hosts = jax.tree.map(np.array, params), [host.copy() for host in made]
    file = folder / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert_same_params(params, before)
    donated = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    assert_same_params(donated(params), jax.tree.map(lambda leaf: leaf + 1, before))
    np.testing.assert_equal(made, hosts)


def test_what_takes_parameters_takes_those_for_decoding():
    plain = load_model(GOLDEN / "llama_grouped")
    decoding = for_decoding(plain)
    assert is_output_major(decoding.params)
    tokens = np.arange(12, dtype=np.int32)[None] + 3
    expected = np.asarray(sequence_scores(plain, tokens, np.ones_like(tokens)).logprobs)
    found = sequence_scores(decoding, tokens, np.ones_like(tokens)).logprobs
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    layers = plain.config.layers
    stacked = stack_layers(decoding.params, layers)
    assert_same_params(stacked, stack_layers(plain.params, layers))
    mesh = make_mesh("data=1")
    assert_same_params(shard_model(decoding, mesh).params, plain.params)
    eighths = quantize(plain.params, read_quantize("int8"))
    kept = for_decoding(dataclasses.replace(plain, params=eighths))
    assert is_output_major(kept.params)
    assert_same_params(shard_model(kept, mesh).params, eighths)
    # Products with scales of groups are no faster so.
    grouped = quantize(decoding.params, read_quantize("int8:4"))
    assert_same_params(
        grouped["layers_0"], quantize(plain.params, read_quantize("int8:4"))["layers_0"]
    )
    again = output_major_params(grouped, tied=False)
    assert_same_params(again["layers_0"], grouped["layers_0"])
    with pytest.raises(InputError, match="for_decoding takes what load_model gives"):
        for_decoding(GOLDEN)


def test_the_decoding_layout_is_of_layers_apart_on_one_cpu():
    for options in ({"scan_layers": True}, {"mesh": make_mesh("data=1")}):
        assert not is_output_major(load_model(GOLDEN / "gpt2", decoding=True, **options).params)


@pytest.mark.parametrize("text", ["language_model.model.", "model.language_model."])
def test_of_a_multimodal_checkpoint_the_text_part_is_read(text, checkpoint, caplog):
    folder = checkpoint("gemma3_text")
    plain = load_model(folder)
    hf = json.loads((folder / "config.json").read_text())
    hf = {"model_type": "gemma3", "text_config": hf, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(hf))

    def wrap(tensors):
        for name in list(tensors):
            tensors[name.replace("model.", text, 1)] = tensors.pop(name)
        tensors["vision_tower.patch"] = tensors["multi_modal_projector.norm"] = np.ones(3)

    retouch(folder, wrap)
    found = load_model(folder)
    assert found.config == plain.config
    assert_same_params(found.params, plain.params)
    assert "only its text part is read; 2 tensors read images" in caplog.text


def test_both_layouts_are_saved_alike(tmp_path):
    save_model(load_model(GOLDEN / "gpt2"), tmp_path / "layers")
    save_model(load_model(GOLDEN / "gpt2", scan_layers=True), tmp_path / "stacked")
    one, other = (
        load_file(tmp_path / name / "model.safetensors") for name in ("layers", "stacked")
    )
    assert_same_tensors(one, other)


def test_the_stacked_layout_is_the_layers_stacked():
    layers, stacked = load_model(GOLDEN / "qwen2"), load_model(GOLDEN / "qwen2", scan_layers=True)
    assert_same_params(stack_layers(layers.params, layers.config.layers), stacked.params)


def test_a_large_model_is_saved_in_shards(tmp_path):
    model = load_model(GOLDEN / "llama_3_1")
    save_model(model, tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(
        leaf.nbytes for leaf in jax.tree.leaves(model.params)
    )
    assert_same_params(load_model(tmp_path).params, model.params)


def test_saving_again_leaves_nothing_of_what_was_there(tmp_path):
    save_model(load_model(GOLDEN / "llama_3_1"), tmp_path, max_shard_bytes=20_000)
    save_model(load_model(GOLDEN / "gpt2"), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]
    assert load_config(tmp_path).architecture == "gpt2"


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old, new = load_model(GOLDEN / "llama_3_1"), load_model(GOLDEN / "gpt2")
    save_model(old, tmp_path)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(save, "save_file", fail)
    with pytest.raises(InputError, match="cannot write a checkpoint to .*no space left"):
        save_model(new, tmp_path)
    assert_same_params(load_model(tmp_path).params, old.params)
    assert len(list(tmp_path.iterdir())) == 3


def test_saved_weights_are_as_readable_as_the_config(tmp_path):
    save_model(load_model(GOLDEN / "gpt2"), tmp_path)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_the_tokenizer_is_written_beside_the_model(tmp_path):
    class Tokenizer:
        def save_pretrained(self, directory):
            (Path(directory) / "tokenizer.json").write_text("{}")

    save_model(load_model(GOLDEN / "gpt2"), tmp_path / "deep" / "down", tokenizer=Tokenizer())
    assert (tmp_path / "deep" / "down" / "tokenizer.json").is_file()


def test_end_of_sequence_ids_go_to_both_files(tmp_path):
    model = load_model(GOLDEN / "llama_3_1")
    config = dataclasses.replace(model.config, eos_ids=(3, 4))
    save_model(Model(config, model.params), tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": [3, 4]}
    assert load_config(tmp_path) == config


def test_generation_config_adds_its_end_of_sequence_ids(checkpoint):
    directory = checkpoint("llama_3_1")
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_config(directory).eos_ids == (2, 7)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_bfloat16_is_kept_and_other_types_are_made_of_it(tmp_path, scan_layers):
    model = load_model(GOLDEN / "qwen3", dtype="bfloat16", scan_layers=scan_layers)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    kept = load_model(tmp_path, scan_layers=scan_layers)
    assert_same_params(kept.params, model.params)
    assert load_model(tmp_path, dtype=jnp.float32).dtype == jnp.float32


def test_one_dtype_throughout_where_files_mix_them(checkpoint):
    directory = checkpoint("llama_3_1")
    half = {"model.norm.weight", "lm_head.weight"}
    retouch(directory, lambda t: t.update({n: t[n].astype(np.float16) for n in half}))
    model = load_model(directory)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}


def test_gpt2_without_its_prefix_and_with_old_buffers(checkpoint):
    directory = checkpoint("gpt2")
    expected = load_model(directory)

    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.uint8)
        tensors["h.1.attn.masked_bias"] = np.full((), -1e4, np.float32)

    retouch(directory, change)
    assert_same_params(load_model(directory).params, expected.params)


def test_llama_with_old_buffers_and_a_second_copy_of_the_tied_head(checkpoint):
    directory = checkpoint("llama_grouped")
    expected = load_model(directory)

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    retouch(directory, change)
    assert_same_params(load_model(directory).params, expected.params)


MESH = """
import sys
import jax, numpy as np
from pathlib import Path
from w2s_jax.models.load import load_model
from w2s_jax.models.parameters import unstack_layers
from w2s_jax.ops.sharding import make_mesh
from w2s_jax.ops.sharding import DEFAULT_RULES

folder = Path("tests/golden")
mesh = make_mesh("data=2,fsdp=2,tensor=2")
# These tiny vocabularies are odd.
rules = DEFAULT_RULES.replace(vocab=None)
for case in ("llama_grouped", "qwen2", "mistral", "gpt2"):
    for scan_layers in (False, True):
        plain = load_model(folder / case, scan_layers=scan_layers).params
        model = load_model(folder / case, mesh=mesh, rules=rules, scan_layers=scan_layers)
        assert jax.tree.structure(plain) == jax.tree.structure(model.params)
        jax.tree.map(np.testing.assert_array_equal, plain, model.params)
        layer = unstack_layers(model.params)["layers_0"]
        kernel = layer["mlp"]["up"]["kernel"]
        shard = kernel.addressable_shards[0].data
        assert shard.shape == (kernel.shape[0] // 2, kernel.shape[1] // 2), shard.shape
        query = layer["attention"]["query"]["kernel"]
        assert query.addressable_shards[0].data.shape == (12, 2, query.shape[2])
print("shards equal")
"""


def test_shards_on_a_mesh_hold_what_one_device_would(run_python):
    assert "shards equal" in run_python(MESH, devices=8)


def test_with_a_mesh_of_one_device_nothing_changes():
    mesh = make_mesh("data=1", jax.devices()[:1])
    model = load_model(GOLDEN / "gemma2", mesh=mesh)
    assert_same_params(model.params, load_model(GOLDEN / "gemma2").params)


def test_a_hub_id_is_fetched_without_pickle(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(GOLDEN / "gpt2")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load_model("somebody/tiny-gpt2").config.architecture == "gpt2"
    for patterns in asked.values():
        chosen = list(
            huggingface_hub.utils.filter_repo_objects(
                ["config.json", "pytorch_model.bin", "model-00001-of-00002.safetensors", "a.py"],
                allow_patterns=patterns,
            )
        )
        assert chosen == ["config.json", "model-00001-of-00002.safetensors"]


# What is wrong in a directory, by how it was spoiled: (checkpoint, change, what the error says).


def drop(name):
    return lambda directory: retouch(directory, lambda tensors: tensors.pop(name))


def add(name, value):
    return lambda directory: retouch(directory, lambda tensors: tensors.update({name: value}))


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def garble(directory):
    (directory / "model.safetensors").write_bytes(b"not a tensor file at all")


def unlink(name):
    return lambda directory: (directory / name).unlink()


def only_pickle(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def set_config(**changes):
    def change(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def rewrite(name, text):
    return lambda directory: (directory / name).write_text(text)


def doubled(directory):
    file = "model-00002-of-00003.safetensors"
    first = load_file(directory / "model-00001-of-00003.safetensors")
    retouch(directory, lambda tensors: tensors.update(first), file)


def both_prefixes(directory):
    retouch(directory, lambda t: t.update({"wte.weight": t["transformer.wte.weight"]}))


def index(**changes):
    def change(directory):
        path = directory / "model.safetensors.index.json"
        value = json.loads(path.read_text())
        value["weight_map"] |= {name.replace("__", "."): file for name, file in changes.items()}
        path.write_text(json.dumps(value))

    return change


SPOILED = {
    "no config": ("gpt2", unlink("config.json"), "no config.json"),
    "malformed config": ("gpt2", rewrite("config.json", "{"), "config.json is not readable JSON"),
    "config is a list": ("gpt2", rewrite("config.json", "[]"), "holds a list, not a JSON object"),
    "architecture": (
        "gpt2",
        set_config(model_type="bloom"),
        "config.json: model_type 'bloom' is not supported; supported: gpt2, llama",
    ),
    "no safetensors": (
        "gpt2",
        unlink("model.safetensors"),
        "no model.safetensors or model.safetensors.index.json",
    ),
    "pickle": ("gpt2", only_pickle, "pytorch_model.bin is pickle, which is never read: convert it"),
    "truncated": ("gpt2", truncate, "model.safetensors is not a whole safetensors file"),
    "pointer": (
        "gpt2",
        rewrite("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "model.safetensors is a Git LFS pointer, not the file; run git lfs pull there",
    ),
    "config is a pointer": (
        "gpt2",
        rewrite("config.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "config.json is a Git LFS pointer",
    ),
    "garbled": ("gpt2", garble, "model.safetensors is not a whole safetensors file"),
    "missing tensor": (
        "llama_3_1",
        drop("model.layers.1.mlp.up_proj.weight"),
        "tensor model.layers.1.mlp.up_proj.weight is missing",
    ),
    "missing head": ("llama_3_1", drop("lm_head.weight"), "tensor lm_head.weight is missing"),
    "unmapped tensor": (
        "llama_3_1",
        add("model.layers.0.self_attn.q_proj.bias", np.zeros(48, np.float32)),
        "tensor model.layers.0.self_attn.q_proj.bias is no part of a llama with this config.json",
    ),
    "several unmapped": ("llama_3_1", set_config(num_hidden_layers=1), "(and 8 more)"),
    "too few layers": ("gpt2", set_config(n_layer=3), "tensor transformer.h.2.attn.c_attn.bias is"),
    "untied head differs": (
        "llama_grouped",
        add("lm_head.weight", np.zeros((67, 24), np.float32)),
        "lm_head.weight differs from the embedding, though config.json ties them",
    ),
    "misshapen tensor": (
        "llama_3_1",
        add("model.norm.weight", np.ones(25, np.float32)),
        "tensor model.norm.weight has shape (25,), expected (24,)",
    ),
    "misshapen fused tensor": (
        "gpt2",
        add("transformer.h.0.attn.c_attn.weight", np.ones((24, 71), np.float32)),
        "c_attn.weight has shape (24, 71), expected (24, 72)",
    ),
    "transposed vocabulary": (
        "llama_3_1",
        set_config(vocab_size=54),
        "has shape (53, 24), expected (54, 24)",
    ),
    "integers": (
        "llama_3_1",
        add("model.norm.weight", np.ones(24, np.int8)),
        "tensor model.norm.weight is stored as I8, not as floating point",
    ),
    "duplicate tensor": (SHARDED, doubled, "is in two files, model-00002-of-00003.safetensors"),
    "both prefixes": ("gpt2", both_prefixes, "tensor transformer.wte.weight is there twice"),
    "missing shard": (
        SHARDED,
        unlink("model-00002-of-00003.safetensors"),
        "model-00002-of-00003.safetensors, named by model.safetensors.index.json, is missing",
    ),
    "index disagrees": (
        SHARDED,
        index(extra__weight="model-00001-of-00003.safetensors"),
        "puts tensor extra.weight in model-00001-of-00003.safetensors, which lacks it",
    ),
    "index reaches out": (SHARDED, index(x="../elsewhere.safetensors"), "outside its directory"),
    "malformed index": (
        SHARDED,
        rewrite("model.safetensors.index.json", "no"),
        "not readable JSON",
    ),
}


@pytest.mark.parametrize("problem", SPOILED)
def test_a_spoiled_checkpoint_is_refused_in_one_line(problem, checkpoint):
    case, spoil, message = SPOILED[problem]
    directory = checkpoint(case)
    spoil(directory)
    with pytest.raises(InputError) as error:
        load_model(directory)
    assert message in str(error.value)
    assert str(error.value).startswith(str(directory))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/place", "/no/such/place: no such directory"),
        ("./missing", "./missing: no such directory"),
        ("some/deep/missing", "some/deep/missing: no such directory"),
        ("nobody/nothing", "as a Hugging Face id it is neither cached nor reachable"),
        (str(GOLDEN / "gpt2" / "config.json"), "is a file; give the directory that holds"),
    ],
)
def test_a_place_without_a_checkpoint_is_refused_in_one_line(name, message):
    with pytest.raises(InputError) as error:
        load_model(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [("float31", "dtype 'float31' is unknown"), ("int32", "dtype int32 is not")],
)
def test_a_dtype_is_a_floating_point_type(dtype, message):
    with pytest.raises(InputError, match=message):
        load_model(GOLDEN / "gpt2", dtype=dtype)


def test_an_unwritable_output_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write a checkpoint to .*file"):
        save_model(load_model(GOLDEN / "gpt2"), tmp_path / "file" / "model")


def test_a_model_without_a_config_json_is_not_saved(tmp_path):
    model = load_model(GOLDEN / "llama_3_1")
    odd = Model(dataclasses.replace(model.config, final_softcap=5.0), model.params)
    with pytest.raises(InputError, match="cannot express this model's final_softcap"):
        save_model(odd, tmp_path / "model")
    assert not (tmp_path / "model").exists()
