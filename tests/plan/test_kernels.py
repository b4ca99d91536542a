"""Attention of a search in programs compiled for TPUs: its kernel, and the bytes that it moves."""

import functools

import pytest

from tests.plan.conftest import NEEDS_LIBTPU
from tests.plan.programs import START

pytestmark = NEEDS_LIBTPU

DECODE = """
from tests.plan.traffic import main_memory_bytes
from w2s_jax.models.cache import KV
from w2s_jax.models.forward import LayerKV, Masks, View, attend_by_kernel, attend_parts

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
        masks = Masks(
            (jnp.arange(prefix) < prefixes[:, None])[:, None, None],
            (jnp.arange(committed) < lengths[:, :, None])[:, :, None],
            (jnp.arange(room) <= places)[None, None],
        )
        view = View(config, layout, (masks,), lengths, prefixes, start)
        return attend_parts(query, kv, masks, view).astype(jnp.bfloat16)

    def attend_as_the_model(query, kv, new, prefixes, lengths, start):
        places = start + jnp.arange(layout.length)[:, None]
        masks = Masks(None, None, (jnp.arange(room) <= places)[None, None])
        place = Placement(mesh, SEARCH_RULES)
        view = View(config, layout, (masks,), lengths, prefixes, start, placement=place)
        found = attend_by_kernel(query, kv, new, kv.chunk, masks, view)
        return attend(query, kv, prefixes, lengths, start) if found is None else found

    found = compiled(attend_as_the_model, query, kv, kept(slots, width, 1), *lengths)
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
V5E, V6E, V5P = "v5e:2x2", "v6e:2x2", "v5p:2x2x1"

# Each case: chip, its heads (H, G); slots, W, K, tokens of the prefix, int8 keys; programs.
TOKEN_STEPS = [
    # All keys at once; the same of int8; a prefix in blocks, with most rows.
    (V6E, POLICY, (8, 2, 2, 512, False), STEPS),
    (V6E, POLICY, (8, 2, 2, 512, True), STEPS),
    (V5E, POLICY, (16, 4, 4, 4096, False), STEPS),
]
CHUNKS = [
    # Slots in turns, of one head and of several; with the prefix in blocks; with both parts.
    (V6E, GUIDE, (8, 2, 2, 512, False), SCORING),
    (V5E, MHA_GUIDE, (8, 2, 2, 512, False), SCORING),
    (V5E, GUIDE, (8, 2, 2, 32768, False), SCORING),
    (V5E, POLICY, (16, 4, 4, 4096, False), SCORING),
]
MANY_KEYS = [
    # Tiles of 2 and 4 heads; blocks cut to the vector memory, of both parts; whole tiles of heads,
    # and int8; keys that lie head by head.
    (V5E, (2, 2), (8, 2, 2, 8192, False), SCORING),
    (V6E, MHA_GUIDE, (8, 2, 2, 32768, False), SCORING),
    (V5E, (32, 32), (8, 2, 2, 4096, False), SCORING),
    (V6E, (32, 8), (8, 2, 2, 8192, False), STEPS[1:]),
    (V5E, (32, 8), (8, 2, 2, 8192, True), STEPS[1:]),
    (V6E, (10, 10), (8, 2, 2, 8192, False), SCORING),
]
TWO_CORES = [
    # One head: a prefix in one block and in several, of steps and of chunks, where scores cut it.
    (V5P, POLICY, (8, 2, 2, 512, False), STEPS),
    (V5P, POLICY, (16, 4, 4, 4096, False), STEPS),
    (V5P, GUIDE, (8, 2, 2, 512, False), SCORING),
    (V5P, GUIDE, (16, 4, 4, 4096, False), SCORING),
    # Several heads, with a last block that passes the end, many blocks, and whole tiles.
    (V5P, (16, 2), (16, 4, 4, 1000, False), STEPS),
    (V5P, MHA_GUIDE, (8, 2, 2, 32768, False), SCORING),
    (V5P, (32, 8), (8, 2, 2, 512, False), SCORING),
    # int8: one head, two that lie head by head, whole tiles, and more than that.
    (V5P, POLICY, (8, 2, 2, 512, True), STEPS),
    (V5P, (16, 2), (8, 2, 2, 512, True), STEPS),
    (V5P, (32, 8), (8, 2, 2, 512, True), STEPS),
    (V5P, (12, 12), (8, 2, 2, 512, True), STEPS),
    # Seven queries of a head, which are filled up; ten heads, which lie head by head.
    (V5P, (28, 4), (8, 2, 2, 512, False), STEPS),
    (V5P, (40, 10), (8, 2, 2, 512, False), STEPS),
    # Lengths of thousands of slots, in the scalar memory.
    (V5P, POLICY, (2048, 2, 2, 128, False), STEPS[:1]),
]
# With each list: whether it has the kernel, and how much of what it must move it may move.
KINDS = [
    (TOKEN_STEPS, False, 1.05), (CHUNKS, False, 1.15), (MANY_KEYS, True, 1.05),
    (TWO_CORES, True, 1.2),
]  # fmt: skip


def named(case):
    return " ".join(str(part) for part in case)


@pytest.fixture(scope="module")
def check(run_together):
    """Checks a case; the first of a chip compiles all that the chip has, in one process."""

    @functools.cache
    def programs_of(chip):
        sources = {}
        for cases, by_kernel, most in KINDS:
            for case in cases:
                own, heads, sizes, names = case
                if own == chip:
                    filled = ((own, *heads), sizes, (names, by_kernel, most))
                    sources[named(case)] = START + DECODE % filled
        if chip == V5P:
            sources["texts"] = START + TEXTS
        return run_together(sources)

    return lambda chip, name: print(programs_of(chip)(name))


@pytest.mark.parametrize("case", TOKEN_STEPS, ids=named)
def test_a_token_step_reads_keys_and_values_once(check, case):
    """So the attention over three parts needs no kernel of its own: a kernel could save nothing."""
    check(case[0], named(case))


@pytest.mark.parametrize("case", CHUNKS, ids=named)
def test_scoring_a_chunk_reads_keys_and_values_once(check, case):
    """Scores of all its slots and keys would not fit the vector memory; some at a time do."""
    check(case[0], named(case))


@pytest.mark.parametrize("case", MANY_KEYS, ids=named)
def test_many_keys_of_several_heads_have_the_kernel(check, case):
    """Where the compiler would move 1.5 to 4.5 times as much as it must."""
    check(case[0], named(case))


@pytest.mark.parametrize("case", TWO_CORES, ids=named)
def test_chips_of_two_cores_have_a_kernel(check, case):
    """The cores of a v5p share no vector memory, so that a compiler keeps nothing there."""
    check(case[0], named(case))


TEXTS = """
from w2s_jax.search.decode import start_cache
from w2s_jax.models.cache import cache_axes
from w2s_jax.ops.sharding import SEARCH_RULES, with_shardings
from w2s_jax.search.incremental_text import read_rows
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
tokens = [given(shape, dtype=jnp.int32) for shape in ((4, 2), (4, 2), (4, 4, 12))]
model = Model(config, params, placement)
found = read_rows.trace(model, cache, *tokens).lower(lowering_platforms=("tpu",))
assert found.compile().as_text().count("tpu_custom_call") == 1
"""


def test_rows_of_texts_have_the_kernel_too(check):
    """They are read behind hypotheses that an encoding of their own has moved."""
    check(V5P, "texts")
