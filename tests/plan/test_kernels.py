"""Attention in programs compiled for TPUs: its kernel, its memory, the bytes that it moves."""

import importlib.util

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("libtpu"), reason="needs libtpu, the TPU compiler"
    ),
]

START = r"""
import dataclasses, re
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from w2s_jax.models.decoder import Layout
from w2s_jax.models.model import Model, abstract_model, hidden_states
from w2s_jax.ops.attention import attend_sequence
from w2s_jax.ops.flash import Reach
from w2s_jax.ops.meshes import make_mesh
from w2s_jax.ops.sharding import DEFAULT_RULES, Placement, resolve_tree
from w2s_jax.plan.shapes import shape_of
from w2s_jax.plan.topology import open_slice

place = open_slice("v5e:4x4", 1)
mesh = make_mesh("fsdp=4,tensor=4", place.devices)
placement = Placement(mesh, DEFAULT_RULES)

def given(shape, *spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

def compiled(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()

def square(text, length):
    shapes = set(re.findall(r"\b[a-z]+\d*\[[\d,]+\]", text))
    return [one for one in shapes if re.findall(r"\d+", one.split("[")[1]).count(str(length)) > 1]
"""

ATTENTION = """
rows, length, text = %r
def attend(query, keys, values, text):
    reach = Reach(text=text, placement=placement)
    return attend_sequence(query, keys, values, reach, scale=128**-0.5).astype(jnp.bfloat16)

def step(*arrays):
    *arrays, text, slope = arrays
    return jax.vjp(lambda *three: attend(*three, text), *arrays)[1](slope)

split = "fsdp" if rows > 1 else None
shapes = [given((rows, 1, length, heads, 128), split, None, None, "tensor") for heads in (32, 8, 8)]
text = given((rows, 1, length), split, dtype=jnp.bool_) if text else None
used = {}
for name, function, more in (("forward", attend, ()), ("gradient", step, (shapes[0],))):
    found = compiled(function, *shapes, text, *more)
    used[name] = found.memory_analysis().temp_size_in_bytes
    assert found.as_text().count("tpu_custom_call") == {"forward": 1, "gradient": 3}[name]
    assert not square(found.as_text(), length), square(found.as_text(), length)
    assert not re.search("all-gather|all-to-all", found.as_text())
# All scores of a device would be rows/4 x 8 heads x length x length numbers of four bytes.
scores = 4 * max(1, rows // 4) * 8 * length**2
print(used, scores)
assert max(used.values()) < scores / 2
"""


@pytest.mark.parametrize("case", [(1, 4096, False), (8, 4096, True), (1, 32768, False)])
def test_attention_of_8b_shapes_is_the_kernel(run_python, case):
    print(run_python(START + ATTENTION % (case,)))


MODEL = """
rows, length, windows, told = %r
whole = shape_of("meta-llama/Meta-Llama-3-8B-Instruct")
small = {"layers": 2, "mlp_width": 1024, "vocab_size": 1024}
config = dataclasses.replace(whole, **small, sliding_windows=windows)
model, axes = abstract_model(config, dtype="bfloat16", scan_layers=True)
placed = resolve_tree(axes, model.params, DEFAULT_RULES, mesh)
params = jax.tree.map(
    lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), model.params, placed
)

def loss(params, tokens, told):
    own = Model(config, params, placement)
    read = hidden_states(own, tokens, remat="full", **told)
    return jnp.square(read.astype(jnp.float32)).mean()

tokens = given((rows, length), "fsdp", dtype=jnp.int32)
kinds = {"mask": jnp.bool_, "segments": jnp.int32}
more = {told: given((rows, length), "fsdp", dtype=kinds[told])} if told else {}
found = compiled(jax.grad(loss), params, tokens, more)
text = found.as_text()
assert all(f"splash_mha_{phase}" in text for phase in ("fwd", "dq", "dkv"))
assert not square(text, length), square(text, length)
print(found.memory_analysis().temp_size_in_bytes / 2**20)
"""


@pytest.mark.parametrize(
    "case", [(8, 2560, (None, None), "mask"), (8, 2560, (None, 1024), "segments")]
)
def test_a_gradient_of_8b_layers_holds_no_scores_and_no_mask(run_python, case):
    print(run_python(START + MODEL % (case,), timeout=900))


TOKEN_STEP = """
from tests.plan.traffic import main_memory_bytes
from w2s_jax.models.cache import KV
from w2s_jax.models.decoder import LayerKV, _attend

# Llama-3-70B on v6e, heads over 8 chips: what one of them has of a layer, 8 of 16 slots.
prefix, quantized = %r
slots, width, successors, committed, chunk = 8, 2, 2, 2048, 30
whole = shape_of("meta-llama/Meta-Llama-3-70B-Instruct")
config = dataclasses.replace(whole, heads=8, kv_heads=1)
mesh = make_mesh("data=1", open_slice("v6e:2x2").devices[:1])

def kept(*axes):
    if not quantized:
        return KV(*(given((*axes, 1, 128)) for _ in range(2)))
    values = (given((*axes, 1, 128), dtype=jnp.int8) for _ in range(2))
    return KV(*values, *(given((*axes, 1, 1), dtype=jnp.float32) for _ in range(2)))

for stem in (True, False):
    layout = Layout(True, 0, 0) if stem else Layout(False, successors, 1)
    own = None if stem else kept(slots, width * successors, chunk)
    kv = LayerKV(kept(slots, prefix), kept(slots, width, committed), own)
    query = given((slots, width, layout.tokens, 8, 128))
    lengths = [given(shape, dtype=jnp.int32) for shape in ((slots,), (slots, width), ())]

    def attend(query, kv, prefixes, lengths, start):
        masks = (
            (jnp.arange(prefix) < prefixes[:, None])[:, None, None],
            (jnp.arange(committed) < lengths[:, :, None])[:, :, None],
            (jnp.arange(chunk) <= start)[None, None, None],
        )
        return _attend(query, kv, masks, layout, config).astype(jnp.bfloat16)

    found = compiled(attend, query, kv, *lengths)
    must = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((query, kv, query)))
    ratio = main_memory_bytes(found.as_text()) / must
    print(prefix, quantized, stem, must, ratio)
    assert 0.99 < ratio < 1.3
"""


@pytest.mark.parametrize("case", [(512, False), (4096, False), (512, True)])
def test_a_token_step_reads_keys_and_values_once(run_python, case):
    """So the attention over three parts needs no kernel of its own: a kernel could save nothing."""
    print(run_python(START + TOKEN_STEP % (case,)))
