"""Quantised decoders: every architecture, both layouts, meshes, files and adapters."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.tiny import tiny_config, tiny_model
from w2s_jax.errors import InputError
from w2s_jax.models.load import load_model
from w2s_jax.models.lora import LoraConfig, attach, init_adapter, merge
from w2s_jax.models.model import Model, abstract_model
from w2s_jax.models.parameters import stack_layers, unstack_layers
from w2s_jax.models.quantize import (
    QuantizeConfig,
    is_quantized,
    quantize,
    read_quantize,
    weight_bytes,
)
from w2s_jax.models.save import save_model
from w2s_jax.ops.layers import QTensor, dequantize

GOLDEN = Path(__file__).parent.parent / "golden"
INT8, INT4 = read_quantize("int8"), read_quantize("int4:2+head+embedding")
TOKENS = np.arange(12, dtype=np.int32)[None] + 3


def is_qtensor(leaf):
    return isinstance(leaf, QTensor)


@jax.jit
def plain(params):
    """The parameters with every QTensor multiplied out."""
    undo = lambda leaf: dequantize(leaf) if is_qtensor(leaf) else leaf  # noqa: E731
    return jax.tree.map(undo, params, is_leaf=is_qtensor)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


# Biases and a tied head, grouped heads: quantised products know no more of a model.
@pytest.mark.parametrize(("case", "config"), [("gpt2", INT4), ("llama_grouped", INT8)], ids=str)
def test_a_quantised_model_computes_with_what_its_weights_stand_for(case, config):
    model = load_model(GOLDEN / case)
    params = quantize(model.params, config)
    whole = Model(model.config, plain(params))(TOKENS)
    assert np.abs(whole - model(TOKENS)).max() > 1e-5
    stacked = stack_layers(params, model.config.layers)
    held = stacked if case == "gpt2" else params
    np.testing.assert_allclose(Model(model.config, held)(TOKENS), whole, atol=2e-4)
    assert_same(quantize(stack_layers(model.params, model.config.layers), config), stacked)
    assert_same(unstack_layers(stacked), params)


@pytest.mark.parametrize(
    ("case", "config", "dtype", "layout"),
    [
        ("gpt2", INT4, "float32", "scan_layers"),
        ("gpt2", INT4, "float32", "decoding"),
        ("llama_grouped", INT8, "bfloat16", None),
        ("llama_grouped", INT8, "bfloat16", "decoding"),
        ("llama_grouped", INT4, "bfloat16", "scan_layers"),
    ],
    ids=str,
)
def test_loading_quantises_as_one_would_afterwards(case, config, dtype, layout, monkeypatch):
    monkeypatch.setattr("w2s_jax.models.huggingface.BLOCK_BYTES", 300)
    options = {"dtype": dtype} | ({layout: True} if layout else {})
    loaded = load_model(GOLDEN / case, quantize=config, **options)
    assert loaded.dtype == dtype
    assert_same(loaded.params, quantize(load_model(GOLDEN / case, **options).params, config))


def test_norms_biases_and_what_is_not_named_stay():
    model = load_model(GOLDEN / "llama_grouped")
    flat, before = flatten_dict(quantize(model.params, INT8)), flatten_dict(model.params)
    for path, leaf in flat.items():
        is_kernel = path[-1] == "kernel" and path[0].startswith("layers_")
        assert is_qtensor(leaf) == is_kernel, path
        if is_kernel:
            assert leaf.values.dtype == jnp.int8
            assert leaf.shape == before[path].shape
            outputs = 2 if path[-2] in ("query", "key", "value") else 1
            kept = leaf.shape[-outputs:]
            assert leaf.scales.shape == (*(1,) * (leaf.ndim - outputs), *kept)
        else:
            assert leaf is before[path]
    assert is_quantized(quantize(model.params, INT8))
    assert not is_quantized(model.params)
    only = QuantizeConfig(targets=("down",))
    named = {path[-2] for path, leaf in flatten_dict(quantize(model.params, only)).items()
             if is_qtensor(leaf)}  # fmt: skip
    assert named == {"down"}


def test_bytes_are_those_of_packed_integers():
    model = tiny_model(0, width=64, mlp_width=128, head_width=16)
    count = sum(leaf.size for path, leaf in flatten_dict(model.params).items()
                if path[-1] == "kernel" and path[0] != "head")  # fmt: skip
    rest = weight_bytes(model.params) - 4 * count
    scales = 2 * (4 * 16 + 2 * 2 * 16 + 64 + 2 * 128 + 64) * 4
    assert weight_bytes(quantize(model.params, INT8)) == rest + count + scales
    found = weight_bytes(quantize(model.params, read_quantize("int4:16")))
    assert found == rest + count // 2 + count // 16 * 4


def test_shapes_and_axes_are_known_without_allocating():
    for scan_layers in (False, True):
        made, axes = abstract_model(tiny_config(), scan_layers=scan_layers, quantize_as=INT4)
        real = quantize(tiny_model(0, scan_layers=scan_layers).params, INT4)
        assert jax.tree.map(np.shape, made.params) == jax.tree.map(np.shape, real)
        is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
        named = flatten_dict(jax.tree.map(len, axes, is_leaf=is_axes))
        assert named == flatten_dict(jax.tree.map(np.ndim, real))


MESH = """
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from tests.models.test_quantize import GOLDEN, TOKENS, assert_same
from w2s_jax.errors import InputError
from w2s_jax.models.load import load_model
from w2s_jax.models.model import Model, shard_model
from w2s_jax.models.quantize import quantize, read_quantize
from w2s_jax.ops.sharding import make_mesh
from w2s_jax.ops.sharding import DEFAULT_RULES

mesh = make_mesh("data=2,fsdp=2,tensor=2")
rules = DEFAULT_RULES.replace(vocab=None)  # these tiny vocabularies are odd
for case, spec, scan_layers in (
    ("gpt2", "int8", False), ("llama_grouped", "int4:2+head+embedding", True)
):
    config = read_quantize(spec)
    plain = load_model(GOLDEN / case, scan_layers=scan_layers)
    one = Model(plain.config, quantize(plain.params, config))
    options = {"mesh": mesh, "rules": rules, "scan_layers": scan_layers}
    loaded = load_model(GOLDEN / case, quantize=config, **options)
    sharded = shard_model(one, mesh, rules)
    later = quantize(shard_model(plain, mesh, rules).params, config)
    for many in (loaded.params, sharded.params, later):
        assert_same(many, one.params)
        jax.tree.map(lambda x, y: np.testing.assert_equal(
            x.sharding.is_equivalent_to(y.sharding, x.ndim), True), many, sharded.params)
    layer = loaded.params["layers"] if scan_layers else loaded.params["layers_0"]
    lead = (None,) * scan_layers
    up, down = layer["mlp"]["up"]["kernel"], layer["mlp"]["down"]["kernel"]
    assert up.values.sharding.spec == P(*lead, "fsdp", "tensor")
    assert down.values.sharding.spec == P(*lead, "tensor", "fsdp")
    inputs = ("fsdp", "tensor") if up.group else (None, None)
    assert up.scales.sharding.spec == P(*lead, inputs[0], "tensor"), up.scales.sharding
    assert down.scales.sharding.spec == P(*lead, inputs[1], "fsdp"), down.scales.sharding
    np.testing.assert_allclose(loaded(TOKENS), one(TOKENS), atol=1e-4)

# Groups of the whole axis: one scale for what the mesh splits.
config = read_quantize("int4:64")
one = quantize(load_model(GOLDEN / "llama_grouped").params, config)
many = load_model(GOLDEN / "llama_grouped", quantize=config, mesh=mesh, rules=rules)
assert_same(many.params, one)

# 24 inputs in 3 groups of 8 do not go onto 2 devices, though 24 do.
try:
    load_model(GOLDEN / "llama_grouped", quantize=read_quantize("int8:8"), mesh=mesh, rules=rules)
except InputError as error:
    assert "kernel/scales: embed of size 3 is not" in str(error), error
else:
    raise AssertionError("groups that the mesh does not divide must be refused")
try:
    plain = load_model(GOLDEN / "llama_grouped", mesh=mesh, rules=rules)
    quantize(plain.params, read_quantize("int8:8"))
except InputError as error:
    assert "kernel/scales: groups of 8 make the scales (3, " in str(error), error
else:
    raise AssertionError("groups that the mesh does not divide must be refused")
print("same")
"""


def test_eight_devices_hold_what_one_does(run_python):
    assert run_python(MESH, devices=8).endswith("same\n")


def test_an_adapter_stays_beside_a_quantised_base():
    model, lora = tiny_model(0, layers=1), LoraConfig(rank=2)
    adapter = init_adapter(model.config, lora, jax.random.key(0))
    adapter = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.1), adapter)
    params = quantize(model.params, INT8)
    found = Model(model.config, attach(params, adapter, lora))(TOKENS)
    expected = Model(model.config, merge(plain(params), adapter, lora))(TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    with pytest.raises(InputError, match="is quantised, which no adapter is merged into"):
        merge(params, adapter, lora)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: read_quantize("int3"), "quantisation 'int3' is not int8 or int4"),
        (lambda: read_quantize("int8:1"), "groups of 1; it must be at least 2"),
        (lambda: read_quantize("int8+norm"), "unknown quantisation target 'norm'; known are query"),
        (lambda: QuantizeConfig(2), "quantisation to 2 bits; it must be 4 or 8"),
        (
            lambda: QuantizeConfig(scale_dtype="int8"),
            "scales of int8; they are float32 or bfloat16",
        ),
        (
            lambda: quantize(tiny_model(0, layers=1).params, read_quantize("int4:5")),
            "layers_0/attention/.*/kernel: 16 inputs are not divisible into groups of 5; give 8$",
        ),
        (
            lambda: read_quantize("int4").group_of((576, 8), (0,), "w"),
            "w: 576 inputs are not divisible into groups of 128; give 32, 64 or 96$",
        ),
        (
            lambda: read_quantize("int4:5").group_of((17, 8), (0,), "w"),
            "w: 17 inputs are not divisible into groups of 5; give 17, which is one group$",
        ),
        (
            lambda: quantize(quantize(tiny_model(0, layers=1).params, INT8), INT8),
            "kernel is quantised already",
        ),
    ],
)
def test_what_cannot_be_quantised_is_one_line(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_quantised_model_is_not_saved(tmp_path):
    model = tiny_model(0, layers=1)
    with pytest.raises(InputError, match="a quantised model is not saved"):
        save_model(Model(model.config, quantize(model.params, INT8)), tmp_path)


def test_specs_read_as_they_are_written():
    for spec in ("int8", "int8:64", "int4:128", "int4:32+head+embedding"):
        assert str(read_quantize(spec)) == spec
    assert str(read_quantize("int4")) == "int4:128"
