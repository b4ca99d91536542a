"""The kernel over prefix, committed response and own tokens, interpreted, against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.ops.test_attention import plain
from w2s_jax.ops.sharding import ON_ONE_DEVICE
from w2s_jax.ops.tpu import parts_sizes
from w2s_jax.ops.tpu.parts_kernel import Part, Window, attend, takes

SIZE = 8


def case(seed, slots, width, count, groups, each, lengths, own, layers=None, quantized=False):
    """Random arrays (query, prefix, committed, own, own mask); every token sees one of its own."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    front = () if layers is None else (layers,)
    query = draw(slots, width, count, groups * each, SIZE) * 3
    shapes = [(*front, slots, lengths[0]), (*front, slots, width, lengths[1]), (slots, width, own)]
    held = [(draw(*shape, groups, SIZE), draw(*shape, groups, SIZE)) for shape in shapes]
    # Some parts are empty, and some lengths pass what there is room for.
    rows = [(slots,), (slots, width)]
    seen = [rng.integers(0, room + 2, shape) for room, shape in zip(lengths, rows, strict=True)]
    own_mask = rng.random((count, own)) < 0.5
    own_mask[np.arange(count), rng.integers(0, own, count)] = True

    def part(pair, lengths):
        if not quantized:
            return Part(*pair, lengths)
        whole = [(x * 50).clip(-127, 127).astype(np.int8) for x in pair]
        stack = 0 if lengths is None else len(front)
        shapes = [(*x.shape[stack:-1], 1) for x in pair]
        scales = [rng.uniform(0.005, 0.02, shape).astype(np.float32) for shape in shapes]
        return Part(*whole, lengths, *scales)

    parts = [part(pair, lengths) for pair, lengths in zip(held, [*seen, None], strict=True)]
    return query, *parts, own_mask


def numbers(part, at):
    """A layer's keys and values, with their scales multiplied out."""
    pairs = (part.keys, part.key_scales), (part.values, part.value_scales)
    return [held[at] if scales is None else held[at] * scales for held, scales in pairs]


def expected(query, prefix, committed, own, own_mask, layer=None, window=None, **options):
    at = () if layer is None else (layer,)
    arrays = jax.tree.map(np.asarray, (query, prefix, committed, own, own_mask))
    query, prefix, committed, own, own_mask = arrays
    out = np.zeros(query.shape)
    held = numbers(prefix, at), numbers(committed, at), numbers(own, ())
    for slot, row in np.ndindex(query.shape[:2]):
        places = slot, (slot, row), (slot, row)
        keys, values = (
            np.concatenate([both[i][place] for both, place in zip(held, places, strict=True)])
            for i in range(2)
        )
        room, more = prefix.keys.shape[-3], committed.keys.shape[-3]
        lengths = min(prefix.lengths[slot], room), min(committed.lengths[slot, row], more)
        seen = np.concatenate([np.arange(room) < lengths[0], np.arange(more) < lengths[1]])
        seen = np.broadcast_to(seen, (query.shape[2], room + more))
        if window is not None:
            places = np.concatenate([np.arange(room), prefix.lengths[slot] + np.arange(more)])
            now = prefix.lengths[slot] + committed.lengths[slot, row] + np.asarray(window.offsets)
            seen = seen & (places > now[:, None] - int(window.size))
        mask = np.concatenate([seen, own_mask], axis=1)
        out[slot, row] = plain(query[slot, row], keys, values, mask, **options)
    return out


# All at once, and none of it; what is drawn lies between.
@example(0, 2, 3, 2, 3, (20, 7), 5, 5.0, 2, 9, True)
@example(1, 1, 1, 1, 1, (4, 1), 1, None, None, None, False)
@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    width=st.integers(1, 2),
    count=st.integers(1, 3),
    groups=st.integers(1, 2),
    each=st.integers(1, 3),
    lengths=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    own=st.integers(1, 5),
    softcap=st.sampled_from([None, 5.0]),
    layers=st.sampled_from([None, 2]),
    size=st.sampled_from([None, 1, 9]),
    quantized=st.booleans(),
)
def test_the_kernel_is_softmax_attention_over_all_three(
    seed, width, count, groups, each, lengths, own, softcap, layers, size, quantized
):
    """Of any lengths: blocks of four keys here, the last of which may pass the end."""
    arrays = case(seed, 2, width, count, groups, each, lengths, own, layers, quantized)
    options = {"scale": 0.3, "softcap": softcap}
    layer = None if layers is None else 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_sizes, "LANES", 4)
        patch.setattr(parts_sizes, "BLOCK", (4, 2**20))
        patch.setattr(parts_sizes, "KEYS", 4)
        number = None if layer is None else np.int32(layer)
        window = None if size is None else Window(np.int32(size), np.arange(count) + 1)
        found = jax.jit(partial(attend, **options, interpret=True))(*arrays, number, window)
    wanted = expected(*arrays, layer, window, **options)
    np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=2e-5)


def test_half_precision_is_summed_in_float32():
    def cast(arrays, dtype):
        is_number = lambda x: x.dtype.kind != "i" and x.dtype != bool  # noqa: E731
        return jax.tree.map(lambda x: x.astype(dtype) if is_number(x) else x, arrays)

    arrays = cast(case(0, 1, 2, 3, 2, 2, (300, 200), 4), jnp.bfloat16)
    found = jax.jit(partial(attend, scale=0.3, interpret=True))(*arrays)
    assert found.dtype == jnp.bfloat16
    known = cast(arrays, np.float32)
    np.testing.assert_allclose(np.float32(found), expected(*known, scale=0.3), atol=0.03)


SHARES = """
import jax, numpy as np
from tests.ops.tpu.test_parts_kernel import case, expected
from w2s_jax.ops.sharding import make_mesh
from w2s_jax.ops.tpu.parts_kernel import Part, attend
from w2s_jax.ops.sharding import SEARCH_RULES, Placement
placement = Placement(make_mesh("data=2,fsdp=2,tensor=2", jax.devices()), SEARCH_RULES)
def run(*arrays):
    return attend(*arrays, jax.numpy.int32(1), scale=0.3, placement=placement, interpret=True)
arrays = case(0, 4, 2, 3, 4, 2, (20, 9), 4, 2, quantized=True)
found = jax.jit(run)(*arrays)
wanted = jax.sharding.PartitionSpec(("data", "fsdp"), None, None, "tensor")
assert found.sharding.spec == wanted, found.sharding
np.testing.assert_allclose(found, expected(*arrays, 1, scale=0.3), atol=2e-5, rtol=2e-5)
"""


def is_taken(
    placement=ON_ONE_DEVICE,
    query=(8, 2, 60, 8, 128),
    keys=512,
    groups=1,
    dtype=jnp.bfloat16,
    held=jnp.bfloat16,
    own=60,
):
    slots, width, _, _, size = query
    answers = []

    def ask():
        prefix = jnp.zeros((slots, keys, groups, size), held)
        more = jnp.zeros((slots, width, 2048, groups, size), held)
        lengths = jnp.ones((slots, width), int)
        parts = Part(prefix, prefix, lengths[:, 0]), Part(more, more, lengths)
        answers.append(takes(jnp.zeros(query, dtype), *parts, own, placement))

    jax.eval_shape(ask)
    return answers[0]


@pytest.mark.parametrize(
    ("given", "taken"),
    [({}, True), ({"groups": 8}, True), ({"query": (8, 2, 60, 8, 64)}, False),
     ({"held": jnp.int8}, True), ({"held": jnp.float16}, False), ({"keys": 500}, True),
     ({"keys": 0}, False), ({"keys": 1}, False),
     ({"query": (1, 8, 4, 32, 128), "groups": 8, "own": 1024}, False), ({"own": 16384}, False),
     ({"query": (1, 1, 820, 8, 128), "own": 820}, False),
     ({"query": (8, 2, 60, 28, 128), "groups": 4}, True),
     ({"query": (8, 2, 59, 32, 128), "groups": 8}, True),
     ({"query": (8, 4, 117, 32, 128), "groups": 8}, False)],
)  # fmt: skip
def test_what_the_kernel_takes(given, taken):
    """Whole tiles, where they fit the vector memory."""
    assert is_taken(**given) == taken


MESHES = """
from tests.ops.tpu.test_parts_kernel import is_taken
for spec, groups, taken in (("data=8", 1, True), ("tensor=8", 8, True), ("tensor=8", 2, False)):
    placement = Placement(make_mesh(spec, jax.devices()), SEARCH_RULES)
    assert is_taken(placement, groups=groups) == taken, spec
"""


def test_devices_attend_for_their_own_slots_and_heads(run_python):
    """Where the heads of a share have their keys."""
    run_python(SHARES + MESHES, devices=8)
