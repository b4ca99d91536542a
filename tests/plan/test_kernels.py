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
from w2s_jax.ops.sharding import DEFAULT_RULES, SEARCH_RULES, Placement, resolve_tree
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


DECODE = """
from tests.plan.traffic import main_memory_bytes
from w2s_jax.models.cache import KV
from w2s_jax.models.decoder import LayerKV, View, _attend, _attend_by_kernel

# One layer, of which a chip has these heads of a model that tensor=8 splits.
chip, heads, kv_heads = %r
slots, width, successors, prefix, quantized = %r
committed, chunk = 2048, 30
layouts = {
    "stems": Layout(True, 0, 0),
    "token step": Layout(False, successors, 1),
    "scoring": Layout(True, successors, chunk - 1),
}
whole = shape_of("meta-llama/Meta-Llama-3-70B-Instruct")
config = dataclasses.replace(whole, heads=heads, kv_heads=kv_heads)
mesh = make_mesh("data=1", open_slice(chip).devices[:1])

def kept(*axes):
    shape = (*axes, kv_heads, 128)
    if not quantized:
        return KV(*(given(shape) for _ in range(2)))
    values = (given(shape, dtype=jnp.int8) for _ in range(2))
    return KV(*values, *(given((*shape[:-1], 1), dtype=jnp.float32) for _ in range(2)))

def must_and_moved(name):
    layout = layouts[name]
    room = {"stems": 0, "token step": chunk, "scoring": chunk - 1}[name]
    own = kept(slots, width * successors, room) if room else None
    kv = LayerKV(kept(slots, prefix), kept(slots, width, committed), own)
    query = given((slots, width, layout.tokens, heads, 128))
    lengths = [given(shape, dtype=jnp.int32) for shape in ((slots,), (slots, width), ())]

    def attend(query, kv, prefixes, lengths, start):
        places = start + jnp.arange(layout.length)[:, None]
        masks = (
            (jnp.arange(prefix) < prefixes[:, None])[:, None, None],
            (jnp.arange(committed) < lengths[:, :, None])[:, :, None],
            (jnp.arange(room) <= places)[None, None],
        )
        return _attend(query, kv, masks, layout, config).astype(jnp.bfloat16)

    def attend_by_kernel(query, kv, new, prefixes, lengths, start):
        places = start + jnp.arange(layout.length)[:, None]
        masks = (None, None, (jnp.arange(room) <= places)[None, None], None)
        view = View((masks,), lengths, start, prefixes)
        found = _attend_by_kernel(
            query, kv, new, kv.chunk, masks, view, layout, config, Placement(mesh, SEARCH_RULES)
        )
        return attend(query, kv, prefixes, lengths, start) if found is None else found

    found = compiled(attend_by_kernel, query, kv, kept(slots, width, 1), *lengths)
    assert ("tpu_custom_call" in found.as_text()) == by_kernel
    must = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((query, kv, query)))
    return must, main_memory_bytes(found.as_text())

names, by_kernel, most = %r
for name in names:
    must, moved = must_and_moved(name)
    print(name, must, moved / must)
    assert 0.99 < moved / must < most, (name, moved / must)
"""

POLICY, GUIDE, MHA_GUIDE = (8, 1), (4, 1), (4, 4)
"""What a chip has of the heads of Llama-3-70B, and of guides like Mistral-7B and Llama-2-7B."""
STEPS, SCORING = ("stems", "token step"), ("scoring",)


@pytest.mark.parametrize(("prefix", "quantized"), [(512, False), (4096, False), (512, True)])
def test_a_token_step_reads_keys_and_values_once(run_python, prefix, quantized):
    """So the attention over three parts needs no kernel of its own: a kernel could save nothing."""
    case = (("v6e:2x2", *POLICY), (8, 2, 2, prefix, quantized), (STEPS, False, 1.05))
    print(run_python(START + DECODE % case))


@pytest.mark.parametrize(
    ("heads", "sizes", "names"),
    [(POLICY, (8, 2, 2, 512, False), STEPS), (POLICY, (16, 4, 4, 4096, False), STEPS),
     ((16, 2), (16, 4, 4, 1000, False), STEPS), (GUIDE, (8, 2, 2, 512, False), SCORING),
     (GUIDE, (16, 4, 4, 4096, False), SCORING), (MHA_GUIDE, (8, 2, 2, 512, False), SCORING),
     (MHA_GUIDE, (8, 2, 2, 32768, False), SCORING), ((32, 8), (8, 2, 2, 512, False), SCORING),
     (POLICY, (8, 2, 2, 512, True), STEPS), (POLICY, (16, 4, 4, 4096, True), STEPS),
     ((16, 2), (8, 2, 2, 512, True), STEPS), ((32, 8), (8, 2, 2, 512, True), STEPS),
     ((28, 4), (8, 2, 2, 512, False), STEPS), ((40, 10), (8, 2, 2, 512, False), STEPS),
     ((12, 12), (8, 2, 2, 512, True), STEPS), (POLICY, (2048, 2, 2, 128, False), STEPS[:1])],
)  # fmt: skip
def test_chips_of_two_cores_have_a_kernel(run_python, heads, sizes, names):
    """The cores of a v5p share no vector memory, so that a compiler keeps nothing there.

    Lengths of thousands of slots fit the scalar memory.
    """
    case = (("v5p:2x2x1", *heads), sizes, (names, True, 1.2))
    print(run_python(START + DECODE % case))


@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize(
    ("heads", "sizes"),
    [(GUIDE, (8, 2, 2, 512)), (MHA_GUIDE, (8, 2, 2, 512)), (POLICY, (8, 2, 2, 4096)),
     (GUIDE, (8, 2, 2, 32768)), (GUIDE, (16, 4, 4, 512)), (MHA_GUIDE, (16, 4, 4, 512)),
     (POLICY, (16, 4, 4, 4096))],
)  # fmt: skip
def test_scoring_a_chunk_reads_keys_and_values_once(run_python, chip, heads, sizes):
    """Scores of all its slots and keys would not fit the vector memory; some at a time do."""
    print(run_python(START + DECODE % ((chip, *heads), (*sizes, False), (SCORING, False, 1.15))))


@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize(
    ("heads", "sizes", "names"),
    [((2, 2), (8, 2, 2, 8192, False), SCORING), (MHA_GUIDE, (8, 2, 2, 32768, False), SCORING),
     ((32, 32), (8, 2, 2, 4096, False), SCORING), ((16, 4), (8, 2, 2, 16384, False), STEPS[1:]),
     ((32, 8), (8, 2, 2, 8192, False), STEPS[1:]), ((32, 8), (8, 2, 2, 8192, True), STEPS[1:]),
     ((10, 10), (8, 2, 2, 8192, False), SCORING)],
)  # fmt: skip
def test_many_keys_of_several_heads_have_the_kernel(run_python, chip, heads, sizes, names):
    """Where the compiler would move 1.5 to 4.5 times as much as it must."""
    print(run_python(START + DECODE % ((chip, *heads), sizes, (names, True, 1.05))))


@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("prefix", [512, 4096])
def test_many_rows_read_keys_and_values_once(run_python, chip, prefix):
    case = ((chip, *POLICY), (16, 4, 4, prefix, False), (STEPS, False, 1.05))
    print(run_python(START + DECODE % case))


LONGER = """
from w2s_jax.decode.reader import start_cache
from w2s_jax.models.cache import cache_axes
from w2s_jax.ops.sharding import SEARCH_RULES, with_shardings
from w2s_jax.search.reading_programs import read_rows
from tests.tiny import tiny_config

mesh = make_mesh("data=2,tensor=2", open_slice("v5p:2x2x1").devices)
placement = Placement(mesh, SEARCH_RULES)
config = tiny_config(
    width=256, heads=4, kv_heads=2, head_width=128, mlp_width=256, vocab_size=512
)
bare, axes = abstract_model(config, dtype="bfloat16", scan_layers=True)
params = with_shardings(bare.params, resolve_tree(axes, bare.params, SEARCH_RULES, mesh))
cache = jax.eval_shape(lambda: start_cache(
    bare, slots=4, hypotheses=2, prefix_capacity=256, committed_capacity=256, dtype=jnp.bfloat16
))
cache = dataclasses.replace(cache, placement=placement)
cache = with_shardings(cache, resolve_tree(cache_axes(cache), cache, SEARCH_RULES, mesh))
tokens = [given(shape, dtype=jnp.int32) for shape in ((4, 2), (4, 2), (4, 4, 12), (2, 3))]
model = Model(config, params, placement)
found = read_rows.trace(model, cache, *tokens, first=8).lower(lowering_platforms=("tpu",))
assert found.compile().as_text().count("tpu_custom_call") == 2
"""


def test_rows_that_are_read_on_have_the_kernel_too(run_python):
    """Three of them, which the two parts of the slots' axis do not divide."""
    run_python(START + LONGER)
