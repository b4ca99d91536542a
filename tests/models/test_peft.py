"""PEFT's adapters in and out, against golden files of PEFT; live in test_lora_parity.py."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.models.test_lora import GPT2, LORA, TOKENS, adapted
from tests.tiny import tiny_model
from w2s_jax.errors import InputError
from w2s_jax.models.load import load_adapted, load_config, load_model
from w2s_jax.models.lora import LoraConfig, attach, merge, stack_adapter
from w2s_jax.models.model import Model
from w2s_jax.models.peft import base_of, load_adapter, save_adapter
from w2s_jax.models.save import save_model
from w2s_jax.ops.sharding import make_mesh

GOLDEN = Path(__file__).parent.parent / "golden" / "adapters"
CASES = sorted(path.name for path in GOLDEN.iterdir())
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.0."


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


# gemma_embedding: modules_to_save holds the embedding of a tied base.
@pytest.mark.parametrize(
    ("case", "scan_layers"), list(zip(CASES, [False, True, False, True], strict=True))
)
def test_logits_are_those_of_peft(case, scan_layers):
    expected = load_file(GOLDEN / case / "expected.safetensors")
    model = load_model(GOLDEN / case, scan_layers=scan_layers)
    assert model.scan_layers == scan_layers
    np.testing.assert_allclose(model(expected["tokens"]), expected["logits"], atol=1e-4, rtol=0)
    base = load_model(base_of(GOLDEN / case), scan_layers=scan_layers)
    beside = load_adapted(GOLDEN / case, base, merged=False)
    np.testing.assert_allclose(beside(expected["tokens"]), expected["logits"], atol=1e-4, rtol=0)
    assert np.abs(base(expected["tokens"]) - expected["logits"]).max() > 0.1


@pytest.mark.parametrize(("fields", "lora"), [
    (GPT2, LORA), (GPT2, LoraConfig(rank=4, alpha=8.0, targets=("value",))),
    ({}, LoraConfig(rank=2, alpha=3.5, dropout=0.25, rslora=True, targets=("query", "down"))),
])  # fmt: skip
def test_saved_and_loaded_again_it_is_the_same(tmp_path, fields, lora):
    model = tiny_model(0, **fields)
    adapter = adapted(model, lora)
    save_adapter(tmp_path / "one", model.config, lora, adapter, "base")
    again, tree = load_adapter(tmp_path / "one", model.config)
    assert_same(tree, adapter)
    assert again.scale == pytest.approx(lora.scale, rel=1e-12)
    assert (again.rank, again.dropout, again.rslora) == (lora.rank, lora.dropout, lora.rslora)
    held = {name for layer in adapter.values() for part in layer.values() for name in part}
    assert set(again.targets) == held
    stacked = stack_adapter(adapter, 2)
    save_adapter(tmp_path / "two", model.config, lora, stacked, "base")
    assert_same(load_adapter(tmp_path / "two", model.config)[1], adapter)
    assert_same(load_adapter(tmp_path / "two", model.config, scan_layers=True)[1], stacked)


def test_what_is_written_is_small_and_named_as_peft_names_it(tmp_path):
    model = tiny_model(0)
    lora = LoraConfig(rank=2, alpha=4.0, targets=("query", "down"))
    save_adapter(tmp_path, model.config, lora, adapted(model, lora), "org/base")
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
    hf = json.loads((tmp_path / CONFIG).read_text())
    assert hf["target_modules"] == ["q_proj", "down_proj"]
    assert (hf["r"], hf["lora_alpha"], hf["base_model_name_or_path"]) == (2, 4, "org/base")
    tensors = load_file(tmp_path / WEIGHTS)
    assert len(tensors) == 8
    assert tensors[LAYER + "self_attn.q_proj.lora_A.weight"].shape == (2, 16)
    assert tensors[LAYER + "mlp.down_proj.lora_B.weight"].shape == (16, 2)


def test_fused_projections_with_factors_of_their_own_lie_in_blocks(tmp_path):
    model = tiny_model(0, **GPT2)
    lora = LoraConfig(rank=2, alpha=4.0, targets=("query", "value", "out"))
    save_adapter(tmp_path, model.config, lora, adapted(model, lora), "base")
    hf = json.loads((tmp_path / CONFIG).read_text())
    assert hf["target_modules"] == ["c_attn", "attn.c_proj"]
    assert hf["rank_pattern"] == {"c_attn": 6}
    assert hf["alpha_pattern"] == {"c_attn": 12}
    b = load_file(tmp_path / WEIGHTS)["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    assert b.shape == (48, 6)
    assert b[:16, :2].all()
    assert not b[:16, 2:].any()
    assert not b[16:32].any()


def test_layers_of_different_kinds_are_written_module_by_module(tmp_path):
    model = tiny_model(0)
    small, large = (adapted(model, LoraConfig(rank=r)) for r in (2, 4))
    mixed = {"layers_0": small["layers_0"], "layers_1": {"mlp": large["layers_1"]["mlp"]}}
    lora = LoraConfig(rank=2, alpha=3.0)
    save_adapter(tmp_path, model.config, lora, mixed, "base")
    again, tree = load_adapter(tmp_path, model.config)
    assert_same(tree, mixed)
    expected = Model(model.config, attach(model.params, mixed, lora))(TOKENS)
    found = Model(model.config, attach(model.params, tree, again))(TOKENS)
    np.testing.assert_array_equal(found, expected)


def test_an_adapter_takes_the_dtype_asked_for(tmp_path):
    model = tiny_model(0)
    save_adapter(tmp_path, model.config, LORA, adapted(model), "base")
    _, tree = load_adapter(tmp_path, model.config, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.bfloat16)}
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    for merged in (True, False):
        found = load_adapted(tmp_path, half, merged=merged)
        assert found.dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} <= {
            jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
        }  # fmt: skip
        full = load_adapted(tmp_path, model, merged=merged)
        np.testing.assert_allclose(found(TOKENS), full(TOKENS), atol=0.15)


def test_onto_a_mesh(tmp_path):
    model = tiny_model(0)
    save_model(model, tmp_path / "base")
    save_adapter(tmp_path / "adapter", model.config, LORA, adapted(model), "../base")
    expected = load_model(tmp_path / "adapter")
    found = load_model(tmp_path / "adapter", mesh=make_mesh("data=1"))
    np.testing.assert_allclose(found(TOKENS), expected(TOKENS), atol=1e-6)


def test_the_base_may_lie_beside_the_adapter(tmp_path, monkeypatch):
    model = tiny_model(0)
    # Where the tokenizer is looked for too, whatever lies about the working folder.
    (tmp_path / "elsewhere" / "base").mkdir(parents=True)
    (tmp_path / "elsewhere" / "here").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere" / "here")
    save_model(model, tmp_path / "base")
    save_adapter(tmp_path / "adapter", model.config, LORA, adapted(model), "../base")
    assert load_config(tmp_path / "adapter") == model.config
    shutil.move(tmp_path / "base", tmp_path / "gone")
    (tmp_path / "elsewhere" / "base").rmdir()
    with pytest.raises(InputError, match=r"its base: \.\./base: no such directory"):
        load_model(tmp_path / "adapter")


def config(**changes):
    def change(folder):
        hf = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(hf | changes))

    return change


def tensors(edit):
    def change(folder):
        held = load_file(folder / WEIGHTS)
        edit(held)
        save_file(held, folder / WEIGHTS)

    return change


def rename(old, new):
    return tensors(lambda held: held.__setitem__(new, held.pop(old)))


def add(name, *shape):
    return tensors(lambda held: held.__setitem__(name, np.zeros(shape, np.float32)))


QUERY = LAYER + "self_attn.q_proj.lora_A.weight"
SPOILED = {
    "another method": (config(peft_type="LOHA"), "peft_type 'LOHA' is not supported"),
    "DoRA": (config(use_dora=True), "use_dora is not supported"),
    "bias of B": (config(lora_bias=True), "lora_bias is not supported"),
    "new tokens": (config(trainable_token_indices=[3]), "trainable_token_indices is not"),
    "a changed base": (config(init_lora_weights="pissa"), "'pissa' changed the base's weights"),
    "rank 0": (config(r=0), "LoRA rank 0"),
    "rank of another kind": (config(r=[4]), "must be numbers"),
    "rank that is no number": (config(r="a"), "must be numbers"),
    "rank that differs": (config(r=4), "for another base: tensor"),
    "rank pattern": (config(rank_pattern={"q_proj": 5}), "expected (5, 16)"),
    "malformed pattern": (config(alpha_pattern=["x"]), "it maps modules to numbers"),
    "pattern of alpha": (config(alpha_pattern={"(": 2}), "is no pattern of module names"),
    "targets of another kind": (config(target_modules=5), "takes a list of names or a pattern"),
    "more targets": (config(target_modules="all-linear"), "k_proj.lora_A.weight is missing"),
    "fewer targets": (config(target_modules=["down_proj"]), "q_proj, which adapter_config.json"),
    "one factor": (tensors(lambda held: held.pop(QUERY)), f"tensor {QUERY} is missing"),
    "an adapted head": (
        add("base_model.model.lm_head.lora_A.weight", 3, 16),
        "adapting lm_head is not supported; q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj",
    ),
    "another layer": (
        add("base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", 3, 16),
        "for another base: this one has no model.layers.9.mlp.up_proj",
    ),
    "a magnitude": (add(LAYER + "self_attn.q_proj.lora_magnitude_vector", 16), "is not supported"),
    "a foreign name": (rename(QUERY, "q_proj.lora_A"), "tensor q_proj.lora_A is not supported"),
    "twice": (
        add("base_model.model.layers.0.self_attn.q_proj.lora_A.weight", 3, 16),
        "is there twice",
    ),
    "a part of no base": (
        add("base_model.model.model.extra.weight", 2), "cannot be taken: its base has no such part"
    ),
    "a grown vocabulary": (
        add("base_model.model.model.embed_tokens.weight", 40, 16),
        "for another base: tensor base_model.model.model.embed_tokens.weight has shape (40, 16)",
    ),
    "whole numbers": (
        tensors(lambda held: held.__setitem__(QUERY, np.zeros((3, 16), np.int8))), "is I8, not"
    ),
    "damaged": (lambda folder: (folder / WEIGHTS).write_bytes(b"no"), "is not a whole safetensors"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    "pickle": (
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
        "adapter_model.bin is pickle, which is never read",
    ),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "is not readable JSON"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The base of an adapter that is in order, and the folder of that adapter."""
    folder = tmp_path_factory.mktemp("whole")
    model, lora = tiny_model(0), LoraConfig(rank=3, targets=("query", "down"))
    save_adapter(folder, model.config, lora, adapted(model, lora), "base")
    return model, folder


@pytest.mark.parametrize("problem", SPOILED)
def test_a_spoiled_adapter_is_refused_in_one_line(problem, whole, tmp_path):
    spoil, message = SPOILED[problem]
    model, folder = whole
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    with pytest.raises(InputError) as error:
        load_adapter(tmp_path, model.config)
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("fields", "message"), [
    ({"width": 24}, "for another base: tensor .*.lora_.* has shape"),
    ({"layers": 1}, "for another base: this one has no model.layers.1"),
    ({"layers": 3}, "layers.2.*lora_A.weight is missing, though adapter_config.json targets it"),
    (GPT2, "adapting transformer.model.layers.0.* is not supported; c_attn, c_proj, c_fc can"),
])  # fmt: skip
def test_an_adapter_for_another_base_is_refused(fields, message, tmp_path):
    model, other = tiny_model(0), tiny_model(0, **fields)
    save_adapter(tmp_path, model.config, LORA, adapted(model), "base")
    with pytest.raises(InputError, match=message):
        load_adapter(tmp_path, other.config)


def test_a_head_of_its_own_on_tied_embeddings_is_refused(tmp_path):
    model = tiny_model(0, tied_embeddings=True)
    save_adapter(tmp_path, model.config, LORA, adapted(model), "base")
    add("base_model.model.lm_head.weight", 23, 16)(tmp_path)
    with pytest.raises(InputError, match="its base ties the head to the embedding"):
        load_adapter(tmp_path, model.config)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(("held", "rows"), [
    ((EMBEDDING,), 23), ((HEAD,), 23), ((EMBEDDING, HEAD), 23), ((EMBEDDING, HEAD), 29),
])  # fmt: skip
def test_an_embedding_or_head_of_an_adapters_own_unties_them_as_in_peft(tmp_path, held, rows):
    model = tiny_model(0, tied_embeddings=True)
    save_model(model, tmp_path / "base")
    save_adapter(tmp_path / "adapter", model.config, LORA, adapted(model), "../base")
    rng = np.random.default_rng(0)
    new = {name: rng.normal(size=(rows, 16)).astype(np.float32) for name in held}
    # Of a resized vocabulary PEFT writes what was there before too, and the new under two names.
    module = "model.embed_tokens"
    extra = {f"{module}.original_module.weight": np.zeros((rows, 16), np.float32)}
    extra |= {f"{module}.modules_to_save.weight": new[name] for name in held if name == EMBEDDING}
    written = {f"base_model.model.{name}": x for name, x in (new | extra).items()}
    tensors(lambda found: found.update(written))(tmp_path / "adapter")
    found = load_model(tmp_path / "adapter")
    config = load_config(tmp_path / "adapter")
    assert found.config == config == dataclasses.replace(
        model.config, tied_embeddings=False, vocab_size=rows
    )  # fmt: skip
    lora, tree = load_adapter(tmp_path / "adapter", config)
    own = np.asarray(model.params["embed"]["embedding"])
    params = model.params | {
        "embed": {"embedding": jnp.asarray(new.get(EMBEDDING, own))},
        "head": {"kernel": jnp.asarray(new.get(HEAD, own).T)},
    }
    tree = {name: subtree for name, subtree in tree.items() if name.startswith("layers")}
    for into, merged in ((merge, True), (attach, False)):
        expected = into(params, tree, lora)
        loaded = load_adapted(tmp_path / "adapter", merged=merged)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)


def test_a_tied_vocabulary_that_grew_stays_tied(tmp_path):
    model = tiny_model(0, tied_embeddings=True)
    save_model(model, tmp_path / "base")
    save_adapter(tmp_path / "adapter", model.config, LORA, adapted(model), "../base")
    grown = np.random.default_rng(0).normal(size=(29, 16)).astype(np.float32)
    written = {f"base_model.model.{name}": grown for name in (EMBEDDING, HEAD)}
    tensors(lambda found: found.update(written))(tmp_path / "adapter")
    found = load_model(tmp_path / "adapter")
    assert found.config == dataclasses.replace(model.config, vocab_size=29)
    assert "head" not in found.params
    np.testing.assert_array_equal(found.params["embed"]["embedding"], grown)


@pytest.mark.parametrize("name", [None, "", 3])
def test_an_adapter_that_names_no_base_is_refused(name, tmp_path):
    model = tiny_model(0)
    save_adapter(tmp_path, model.config, LORA, adapted(model), "base")
    config(base_model_name_or_path=name)(tmp_path)
    with pytest.raises(InputError, match="it must name the adapter's base"):
        load_model(tmp_path)


def test_an_adapter_on_an_adapter_is_refused(tmp_path):
    model = tiny_model(0)
    save_adapter(tmp_path / "one", model.config, LORA, adapted(model), "../base")
    save_adapter(tmp_path / "two", model.config, LORA, adapted(model), "../one")
    with pytest.raises(InputError, match="its base ../one is an adapter; merge that first"):
        load_model(tmp_path / "two")


def test_whole_parameters_are_not_written(tmp_path):
    model = tiny_model(0)
    adapter = adapted(model) | {"head": model.params["head"]}
    with pytest.raises(InputError, match="holds head/kernel whole, .*; merge it"):
        save_adapter(tmp_path, model.config, LORA, adapter, "base")


def test_an_unwritable_output_is_refused_in_one_line(tmp_path):
    model = tiny_model(0)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write an adapter to .*file"):
        save_adapter(tmp_path / "file" / "a", model.config, LORA, adapted(model), "base")
