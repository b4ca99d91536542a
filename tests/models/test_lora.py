"""Adapters on a decoder: against a projection written out, both layouts, dropout, shardings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.tiny import VOCAB, tiny_model
from w2s_jax.errors import InputError
from w2s_jax.models.decoder import Linear
from w2s_jax.models.lora import (
    LoraConfig,
    adapter_axes,
    attach,
    init_adapter,
    merge,
    stack_adapter,
    targeted,
)
from w2s_jax.models.model import Model, hidden_states
from w2s_jax.models.parameters import PROJECTIONS, stack_layers

LORA = LoraConfig(rank=3, alpha=5.0)
GPT2 = {
    "architecture": "gpt2", "position": "learned", "norm": "layer", "gated_mlp": False,
    "qkv_bias": True, "out_bias": True, "mlp_bias": True, "kv_heads": 4, "activation": "gelu_tanh",
    "tied_embeddings": True,
}  # fmt: skip
TOKENS = np.random.default_rng(5).integers(0, VOCAB, (2, 9)).astype(np.int32)


def filled(adapter, seed=0, scale=0.2):
    """The same adapter with random numbers everywhere, so that B is not zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype(x.dtype), adapter)


def adapted(model, lora=LORA, **options):
    return filled(init_adapter(model.config, lora, jax.random.key(0), **options))


@jax.jit
def merged(params, adapter):
    """In one program, not one for every operation."""
    return merge(params, adapter, LORA)


def assert_close(one, other):
    np.testing.assert_allclose(one, other, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("name", "shape", "contract"), [
    ("query", (8, 2, 4), 1), ("out", (2, 4, 8), 2), ("up", (8, 12), 1),
])  # fmt: skip
def test_a_projection_adds_scale_a_b(name, shape, contract):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5, *shape[:contract]))
    kernel, a = rng.normal(size=shape), rng.normal(size=(*shape[:contract], 2))
    b = rng.normal(size=(2, *shape[contract:]))
    layer = Linear(shape, ("embed",) * len(shape), contract=contract)
    leaves = {"kernel": kernel, "lora_a": a, "lora_b": b, "lora_scale": 0.7, "lora_dropout": 0.5}
    params = {key: np.float32(leaf) for key, leaf in leaves.items()}
    flat = x.reshape(15, -1)
    change = flat @ a.reshape(flat.shape[1], 2) @ b.reshape(2, -1)
    expected = flat @ kernel.reshape(flat.shape[1], -1) + 0.7 * change
    found = np.asarray(jax.jit(layer.apply)({"params": params}, np.float32(x)))
    assert_close(found.reshape(15, -1), expected)


def test_dropout_acts_on_the_adapters_input_alone_and_only_with_a_key():
    layer = Linear((1000, 1), ("embed", "mlp"))
    params = {
        "kernel": np.full((1000, 1), 1.0), "lora_a": np.eye(1000), "lora_b": np.ones((1000, 1)),
        "lora_scale": 2.0, "lora_dropout": 0.25,
    }  # fmt: skip
    params, x = jax.tree.map(np.float32, params), np.ones((4, 1000), np.float32)
    apply = jax.jit(lambda **rngs: layer.apply({"params": params}, x, rngs=rngs))
    np.testing.assert_allclose(apply(), 3000.0)
    once, again = (apply(dropout=jax.random.key(1)) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    kept = (np.asarray(once)[:, 0] - 1000) / 2 * 0.75  # how many of 1000 inputs were kept
    assert np.all(np.abs(kept - 750) < 5 * np.sqrt(1000 * 0.25 * 0.75))
    assert len(np.unique(kept)) > 1
    other = apply(dropout=jax.random.key(2))
    assert np.any(np.asarray(other) != np.asarray(once))


def test_dropout_through_the_whole_decoder_is_alike_in_both_layouts():
    model, key = tiny_model(1), jax.random.key(4)
    states = jax.jit(lambda model, key: hidden_states(model, jnp.asarray(TOKENS), key=key))
    for rate in (0.0, 0.5):
        lora = dataclasses.replace(LORA, dropout=rate)
        attached = Model(model.config, attach(model.params, adapted(model, lora), lora))
        plain, dropped = (np.asarray(states(attached, given)) for given in (None, key))
        assert (np.abs(plain - dropped).max() > 0.05) == (rate > 0)
        stacked = Model(model.config, stack_layers(attached.params, 2))
        assert_close(states(stacked, key), dropped)


@pytest.mark.parametrize(
    ("fields", "scan_layers"),
    [({}, True), ({"qkv_bias": True, "tied_embeddings": True}, False), (GPT2, False)],
)
def test_attached_and_merged_say_the_same_and_differ_from_the_base(fields, scan_layers):
    model = tiny_model(1, scan_layers=scan_layers, **fields)
    adapter = adapted(model, scan_layers=scan_layers)
    beside = Model(model.config, attach(model.params, adapter, LORA))(TOKENS)
    within = Model(model.config, merged(model.params, adapter))(TOKENS)
    assert_close(beside, within)
    assert np.abs(beside - model(TOKENS)).max() > 0.05


def test_a_fresh_adapter_changes_nothing():
    model = tiny_model(1)
    adapter = init_adapter(model.config, LORA, jax.random.key(0))
    attached = Model(model.config, attach(model.params, adapter, LORA))
    np.testing.assert_array_equal(attached(TOKENS), model(TOKENS))
    limits = {path: np.abs(leaf).max() for path, leaf in flatten_dict(adapter, sep="/").items()}
    assert 0.15 < limits["layers_0/attention/query/lora_a"] <= 16**-0.5
    assert 0.15 < limits["layers_1/mlp/down/lora_a"] <= 24**-0.5
    assert limits["layers_1/mlp/down/lora_b"] == 0


def test_both_layouts_hold_the_same_numbers_and_may_be_mixed():
    model = tiny_model(1)
    one = init_adapter(model.config, LORA, jax.random.key(3))
    other = init_adapter(model.config, LORA, jax.random.key(3), scan_layers=True)
    jax.tree.map(np.testing.assert_array_equal, stack_layers(one, 2), other)
    one = filled(one)
    expected = Model(model.config, attach(model.params, one, LORA))(TOKENS)
    stacked = Model(model.config, stack_layers(model.params, 2))
    mixed = attach(stacked.params, one, LORA)
    assert mixed["layers"]["mlp"]["up"]["lora_scale"].shape == (2,)
    assert_close(Model(model.config, mixed)(TOKENS), expected)
    again = attach(model.params, stack_adapter(one, 2), LORA)
    assert_close(Model(model.config, again)(TOKENS), expected)


def test_layers_that_differ_are_filled_up_with_zeros_when_stacked():
    model = tiny_model(1)
    small, large = (adapted(model, dataclasses.replace(LORA, rank=r)) for r in (2, 4))
    mixed = {"layers_0": small["layers_0"], "layers_1": {"mlp": large["layers_1"]["mlp"]}}
    expected = Model(model.config, attach(model.params, mixed, LORA))(TOKENS)
    stacked = stack_layers(model.params, 2)
    assert_close(Model(model.config, attach(stacked, mixed, LORA))(TOKENS), expected)
    assert_close(Model(model.config, merged(stacked, mixed))(TOKENS), expected)


def test_the_attached_model_holds_the_bases_own_arrays():
    model = tiny_model(1)
    attached = flatten_dict(attach(model.params, adapted(model), LORA))
    for path, leaf in flatten_dict(model.params).items():
        assert attached[path] is leaf


def test_a_whole_parameter_stands_in_for_the_bases():
    model = tiny_model(1)
    head = model.params["head"]["kernel"] * 2
    adapter = adapted(model) | {"head": {"kernel": head}}
    for change in (attach, merge):
        np.testing.assert_array_equal(change(model.params, adapter, LORA)["head"]["kernel"], head)


def test_merging_rounds_once_to_the_kernels_dtype():
    model = tiny_model(1)
    half = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), model.params)
    adapter = adapted(model)
    found = merged(half, adapter)["layers_0"]["mlp"]["up"]["kernel"]
    kernel = np.asarray(half["layers_0"]["mlp"]["up"]["kernel"], np.float64)
    a, b = (np.asarray(adapter["layers_0"]["mlp"]["up"][f"lora_{x}"], np.float64) for x in "ab")
    assert found.dtype == jnp.bfloat16
    expected = np.float32(kernel + 5 / 3 * a @ b).astype(jnp.bfloat16)
    assert np.mean(np.asarray(found) != expected) < 0.02  # ties of rounding


def test_gradients_reach_the_adapter_alone():
    model = tiny_model(1)
    adapter = adapted(model, LoraConfig(rank=2, targets=("query", "down")))

    def loss(adapter):
        return jnp.sum(Model(model.config, attach(model.params, adapter, LORA))(TOKENS) ** 2)

    gradients = jax.jit(jax.grad(loss))(adapter)
    assert set(flatten_dict(gradients, sep="/")) == {
        f"layers_{i}/{place}/lora_{x}"
        for i in range(2) for place in ("attention/query", "mlp/down") for x in "ab"
    }  # fmt: skip
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_the_scale_is_alpha_by_rank_or_by_its_root():
    assert LoraConfig(rank=16, alpha=32.0).scale == 2.0
    assert LoraConfig(rank=16, alpha=32.0, rslora=True).scale == 8.0


@pytest.mark.parametrize(("targets", "gated", "expected"), [
    (PROJECTIONS, True, PROJECTIONS),
    (PROJECTIONS, False, ("query", "key", "value", "out", "up", "down")),
    (("q_proj", "self_attn.v_proj"), True, ("query", "value")),
    (("c_attn",), False, ("query", "key", "value")),
    (("c_proj",), False, ("out", "down")),
    (("mlp.c_proj", "c_fc"), False, ("up", "down")),
    (("all-linear",), True, PROJECTIONS),
])  # fmt: skip
def test_targets_go_by_our_names_and_checkpoints(targets, gated, expected):
    config = tiny_model(0, gated_mlp=gated).config
    assert targeted(config, LoraConfig(targets=targets)) == expected


@pytest.mark.parametrize(("fields", "message"), [
    ({"rank": 0}, "rank 0"), ({"alpha": 0.0}, "alpha 0.0"), ({"alpha": float("nan")}, "alpha nan"),
    ({"dropout": 1.0}, "dropout 1.0"), ({"targets": ("lm_head",)}, "unknown LoRA target 'lm_head'"),
    ({"targets": ("mlp.q",)}, "unknown LoRA target 'mlp.q'"),
])  # fmt: skip
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        LoraConfig(**fields)


def test_targets_that_the_model_lacks_are_refused():
    config = tiny_model(0, gated_mlp=False).config
    for targets in (("gate",), ()):
        with pytest.raises(InputError, match="has none of them; it has query, key"):
            init_adapter(config, LoraConfig(targets=targets), jax.random.key(0))


@pytest.mark.parametrize(("fields", "message"), [
    ({"width": 24}, r"for another base: layers_0/attention/\w+/lora_a has shape \(24, 3\)"),
    ({"layers": 3}, "changes layers_2/attention/.*, which its base does not have"),
    ({"mlp_width": 20}, "for another base: layers_0/mlp/"),
])  # fmt: skip
def test_an_adapter_for_another_base_is_refused(fields, message):
    model, other = tiny_model(0), tiny_model(0, **fields)
    for change in (attach, merge):
        with pytest.raises(InputError, match=message):
            change(model.params, adapted(other), LORA)


SHARDED = """
import jax, numpy as np
from tests.tiny import tiny_model
from tests.models.test_lora import LORA, TOKENS, adapted
from w2s_jax.models.lora import attach, merge, shard_adapter
from w2s_jax.models.model import Model, shard_model
from w2s_jax.ops.sharding import make_mesh

mesh = make_mesh("data=2,fsdp=2,tensor=2")
for scan_layers in (False, True):
    model = tiny_model(1, layers=1, scan_layers=scan_layers, vocab_size=24)
    adapter = adapted(model, scan_layers=scan_layers)
    expected = Model(model.config, attach(model.params, adapter, LORA))(TOKENS)
    split, base = shard_adapter(model.config, adapter, mesh), shard_model(model, mesh)
    layer = split["layers"] if scan_layers else split["layers_0"]
    a, b = layer["attention"]["out"]["lora_a"], layer["mlp"]["up"]["lora_b"]
    assert "tensor" in str(a.sharding.spec) and "fsdp" not in str(a.sharding.spec), a.sharding
    assert "tensor" in str(b.sharding.spec), b.sharding
    for change in (attach, merge):
        held = jax.jit(lambda *given: change(*given, LORA))(base.params, split)
        found = Model(model.config, held)(TOKENS)
        np.testing.assert_allclose(found, expected, atol=3e-5)
"""


def test_adapters_are_split_over_a_mesh_as_their_base_is(run_python):
    run_python(SHARDED, devices=8)


def test_axes_are_those_of_the_kernels():
    model = tiny_model(0)
    axes = adapter_axes(model.config, adapted(model, scan_layers=True))["layers"]
    assert axes["attention"]["query"]["lora_a"] == ("layers", "embed", None)
    assert axes["attention"]["query"]["lora_b"] == ("layers", None, "heads", "head_width")
    assert axes["attention"]["out"]["lora_a"] == ("layers", "heads", "head_width", None)
    assert axes["mlp"]["down"]["lora_b"] == ("layers", None, "embed")
