"""Attention over parts against plain softmax attention in NumPy."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2s_jax.ops import attention
from w2s_jax.ops.attention import (
    Split,
    attend_in_blocks,
    attend_part,
    concatenate,
    goes_in_blocks,
    in_turns,
    merge,
    unseen,
)
from w2s_jax.ops.sequences import Reach, attend_sequence


def plain(query, keys, values, mask, scale, softcap=None):
    """One slot, one group: query [m H C], keys [J G C], mask [m J], in float64."""
    heads, kv_heads = query.shape[1], keys.shape[1]
    keys = np.repeat(keys, heads // kv_heads, axis=1).astype(np.float64)
    values = np.repeat(values, heads // kv_heads, axis=1).astype(np.float64)
    scores = np.einsum("mhc,jhc->mhj", query.astype(np.float64), keys) * scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(mask[:, None, :], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("mhj,jhc->mhc", weights / weights.sum(-1, keepdims=True), values)


@partial(jax.jit, static_argnames=("scale", "softcap", "splits"))
def attended(query, keys, values, mask, *scales, splits=(), **options):
    """In parts that end at the splits, merged; one program, not one for each operation."""
    parts = [
        attend_part(
            query,
            *(x[:, :, first:last] for x in (keys, values)),
            mask[..., first:last],
            *(x[:, :, first:last] for x in scales),
            **options,
        )
        for first, last in pairwise((0, *splits, keys.shape[2]))
        if first < last
    ]
    return merge(parts)


def batch(array):
    return np.asarray(array)[None, None]


@settings(max_examples=12)
@given(
    split=st.sampled_from([0, 4, 9]),
    seed=st.integers(0, 2**16),
    magnitude=st.sampled_from([0.1, 1.0, 30.0]),
    softcap=st.sampled_from([None, 5.0]),
)
def test_parts_merge_to_the_whole(split, seed, magnitude, softcap):
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(3, 4, 8)).astype(np.float32) * magnitude
    keys, values = rng.normal(size=(2, 9, 2, 8)).astype(np.float32)
    mask = rng.random((3, 9)) < 0.5
    mask[np.arange(3), rng.integers(0, 9, 3)] = True
    given = map(batch, (query, keys, values, mask))
    found = attended(*given, splits=(split,), scale=0.3, softcap=softcap)
    expected = plain(query, keys, values, mask, 0.3, softcap)
    np.testing.assert_allclose(found[0, 0], expected, atol=2e-5, rtol=2e-5)


def test_rows_of_a_group_share_its_keys():
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 3, 5, 4, 8)).astype(np.float32)
    keys, values = rng.normal(size=(2, 2, 3, 7, 4, 8)).astype(np.float32)
    mask = np.ones((2, 1, 1, 7), bool)
    out = attended(query, keys, values, mask, scale=1.0)
    for slot in range(2):
        for group in range(3):
            pieces = (array[slot, group] for array in (query, keys, values))
            expected = plain(*pieces, np.ones((5, 7), bool), 1.0)
            np.testing.assert_allclose(out[slot, group], expected, atol=1e-5)


def test_a_part_that_is_not_seen_has_no_weight():
    rng = np.random.default_rng(0)
    query = rng.normal(size=(1, 1, 2, 2, 4)).astype(np.float32)
    keys, values = rng.normal(size=(2, 1, 1, 3, 2, 4)).astype(np.float32)

    @jax.jit
    def merged(query, keys, values):
        whole, none = jnp.ones((1, 1, 1, 3), bool), jnp.zeros((1, 1, 1, 3), bool)
        seen = attend_part(query, keys, values, whole, scale=1.0)
        masked = attend_part(query, keys, values * 1e6, none, scale=1.0)
        return merge([seen]), merge([seen, masked]), merge([seen, unseen(query)])

    alone, *others = merged(query, keys, values)
    for other in others:
        np.testing.assert_array_equal(other, alone)


def test_partials_stand_side_by_side():
    rng = np.random.default_rng(1)
    query = rng.normal(size=(1, 2, 3, 2, 4)).astype(np.float32)
    keys, values = rng.normal(size=(2, 1, 2, 5, 2, 4)).astype(np.float32)

    @jax.jit
    def merged(query, keys, values):
        mask = jnp.ones((1, 1, 1, 5), bool)
        attend = partial(attend_part, keys=keys, values=values, mask=mask, scale=1.0)
        whole = attend(query)
        apart = concatenate([attend(query[:, :, :1]), attend(query[:, :, 1:])], 2)
        return merge([whole]), merge([apart]), merge([whole.reshape(1, 1, 6)])

    whole, apart, regrouped = merged(query, keys, values)
    np.testing.assert_allclose(apart, whole, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(
        np.asarray(regrouped)[0, 0], np.asarray(whole)[0].reshape(6, 2, 4)
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(dtype):
    rng = np.random.default_rng(2)
    query, keys, values = (rng.normal(size=(1, 1, 64, 2, 16)).astype(dtype) for _ in range(3))
    out = attended(query, keys, values, np.ones((1, 1, 1, 64), bool), scale=0.25)
    assert out.dtype == jnp.float32
    wide = (np.asarray(x[0, 0], np.float32) for x in (query, keys, values))
    expected = plain(*wide, np.ones((64, 64), bool), 0.25)
    np.testing.assert_allclose(out[0, 0], expected, atol=5e-3)


def pulled_by(function, slope, *arrays):
    out, pull = jax.vjp(function, *arrays)
    return out, pull(slope)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_whole_sequence_has_the_value_and_the_gradient_of_its_parts(softcap):
    rng = np.random.default_rng(3)
    query = rng.normal(size=(2, 1, 6, 4, 8)).astype(np.float32)
    keys, values = rng.normal(size=(2, 2, 1, 6, 2, 8)).astype(np.float32)
    reach = Reach()
    mask = np.tril(np.ones((6, 6), bool))[None, None]
    slope = rng.normal(size=query.shape).astype(np.float32)

    def parts(*arrays):
        return merge([attend_part(*arrays, jnp.asarray(mask), scale=0.5, softcap=softcap)])

    def whole(*arrays):
        return attend_sequence(*arrays, reach, scale=0.5, softcap=softcap)

    (expected, wanted), (found, pulled) = (
        jax.jit(partial(pulled_by, function))(slope, query, keys, values)
        for function in (parts, whole)
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)
    for ours, theirs in zip(pulled, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def rounded(x):
    """Keys or values in int8 with a scale for each token and head, and what they stand for."""
    scales = np.abs(x).max(axis=-1, keepdims=True) / 127
    values = np.rint(x / scales).astype(np.int8)
    return values, scales.astype(np.float32), (values * scales).astype(np.float32)


@given(seed=st.integers(0, 2**16), softcap=st.sampled_from([None, 5.0]))
def test_int8_keys_and_values_count_as_what_they_stand_for(seed, softcap):
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(3, 4, 8)).astype(np.float32)
    keys, values = rng.normal(size=(2, 9, 2, 8)).astype(np.float32)
    mask = rng.random((3, 9)) < 0.5
    mask[:, 0] = True
    (k, k_scales, k_whole), (v, v_scales, v_whole) = rounded(keys), rounded(values)
    held = (batch(k), batch(v), batch(mask), batch(k_scales), batch(v_scales))
    found = attended(batch(query), *held, scale=0.3, softcap=softcap)[0, 0]
    expected = plain(query, k_whole, v_whole, mask, 0.3, softcap)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)
    # An entry is off by half a scale, a score by Δ = Σ|q|·half a scale at most (a soft-cap is no
    # steeper than 1), a weight by the factor e^2Δ; and a mean of values by half a value's scale.
    delta = 0.3 * np.abs(query).sum(-1).max() * k_scales.max() / 2
    bound = np.expm1(2 * delta) * np.abs(values).max() + v_scales.max() / 2
    assert np.abs(found - plain(query, keys, values, mask, 0.3, softcap)).max() <= bound + 1e-5


@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**16),
    total=st.integers(4, 23),
    largest=st.integers(1, 4),
    int8=st.booleans(),
    softcap=st.sampled_from([None, 5.0]),
)
def test_blocks_of_keys_are_the_whole(seed, total, largest, int8, softcap):
    """Of any number of keys, some of the blocks without one that a query sees."""
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(3, 4, 8)).astype(np.float32) * 10
    keys, values = rng.normal(size=(2, total, 2, 8)).astype(np.float32)
    mask = rng.random((3, total)) < 0.3
    mask[np.arange(3), rng.integers(0, total, 3)] = True
    held, known = (keys, values), (keys, values)
    scales = (None, None)
    if int8:
        (k, k_scales, k_whole), (v, v_scales, v_whole) = rounded(keys), rounded(values)
        held, scales, known = (k, v), (batch(k_scales), batch(v_scales)), (k_whole, v_whole)
    options = {"scale": 0.3, "softcap": softcap}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "LANES", 2)
        patch.setattr(attention, "BLOCK_KEYS", 2 * largest)
        patch.setattr(attention, "BLOCK_BYTES", 1)
        patch.setattr(attention, "TPU_BLOCK_BYTES", 1)
        given = (batch(query), *map(batch, held), batch(mask), *scales)
        run = jax.jit(lambda *given: merge([attend_in_blocks(*given, **options)]))
        text, found = str(run.trace(*given).jaxpr), run(*given)[0, 0]
    assert ("scan[" in text) == (total > 2 * largest)
    np.testing.assert_allclose(found, plain(query, *known, mask, **options), atol=2e-5, rtol=2e-5)


def test_a_block_is_no_larger_than_its_bytes():
    """4 bytes × 2 slots × 3 queries × 4 heads over 2 devices: 48 bytes a key."""
    query, keys = jnp.zeros((2, 1, 3, 4, 8)), jnp.zeros((2, 1, 1000, 2, 8))
    mask = jnp.ones((1, 1, 1, 1000), bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK_KEYS", 128)
        for bytes_, size in ((48 * 256, 256), (48 * 700, 512), (48, 128), (48 * 1024, 1000)):
            patch.setattr(attention, "BLOCK_BYTES", bytes_)
            patch.setattr(attention, "TPU_BLOCK_BYTES", bytes_)
            text = str(
                jax.make_jaxpr(
                    lambda *given: attend_in_blocks(*given, scale=1.0, devices=2)
                )(query, keys, keys, mask)
            )  # fmt: skip
            assert f"f32[2,1,2,3,2,{size}]" in text, (bytes_, size)


@pytest.mark.parametrize(
    ("platform", "total", "looped"),
    [("tpu", 1024, False), ("tpu", 2048, True), ("cpu", 2048, False), ("cpu", 32768, True)],
)
def test_tpus_take_small_blocks_and_others_large_ones(platform, total, looped):
    """Scores of 16 KiB a key: 16 MiB of 1,024 keys, 512 MiB of 32,768."""
    shapes = [(1, 1, 64, 64, 8), (1, 1, total, 8, 8), (1, 1, total, 8, 8), (1, 1, 1, total)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes[:3]]
    mask = jax.ShapeDtypeStruct(shapes[3], jnp.bool_)
    traced = jax.jit(lambda *given: attend_in_blocks(*given, scale=1.0)).trace(*arrays, mask)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.while" in text) == looped


def mixed(query, held):
    keys, values, masks = held
    return merge([attend_part(query, keys, values, masks, scale=0.3)]).astype(query.dtype)


@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**16),
    devices=st.integers(1, 3),
    turns=st.integers(1, 3),
    together=st.integers(1, 3),
    shared=st.booleans(),
)
def test_turns_of_slots_are_the_whole(seed, devices, turns, together, shared):
    rng = np.random.default_rng(seed)
    slots = devices * turns * together
    query = rng.normal(size=(slots, 2, 3, 4, 8)).astype(np.float32)
    keys, values = rng.normal(size=(2, slots, 2, 5, 2, 8)).astype(np.float32)
    mask = rng.random((1 if shared else slots, 2, 3, 5)) < 0.5
    mask[..., 0] = True
    options = {"split": Split(devices), "together": together}
    held = (keys, values, mask)
    found = jax.jit(partial(attention._turned, mixed, **options))(query, held)
    masks = np.broadcast_to(mask, (slots, *mask.shape[1:]))
    expected = [
        [plain(*group, 0.3) for group in zip(*slot, strict=True)]
        for slot in zip(query, keys, values, masks, strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("platform", "slots", "split", "turns"),
    [("tpu", 4, Split(), 0), ("tpu", 8, Split(), 4), ("tpu", 9, Split(), 9), ("cpu", 8, Split(), 0),
     ("tpu", 8, Split(2), 0), ("tpu", 8, Split(1, 2), 0), ("tpu", 16, Split(2, 2), 0),
     ("tpu", 32, Split(2, 2), 4)],
)  # fmt: skip
def test_tpus_take_slots_in_turns_where_scores_of_all_are_many(platform, slots, split, turns):
    """Scores of 1 MiB a slot, 4 bytes × 512 keys × 2 groups × 32 queries × 8 heads: 2 a turn."""
    shapes = [(slots, 2, 32, 8, 8), (slots, 2, 5, 2, 8), (slots, 2, 5, 2, 8), (1, 1, 1, 5)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes[:3]]
    mask = jax.ShapeDtypeStruct(shapes[3], jnp.bool_)
    run = jax.jit(lambda query, *held: in_turns(mixed, query, held, split))
    text = run.trace(*arrays, mask).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.while" in text) == bool(turns)
    if turns:
        assert f"stablehlo.constant dense<{turns}> : tensor<i32>" in text


@settings(max_examples=30, deadline=None)
@given(
    slots=st.integers(1, 5),
    split=st.sampled_from([Split(), Split(2), Split(1, 4), Split(2, 2)]),
    count=st.sampled_from([1, 4, 60, 240]),
    keys=st.integers(1, 128),
)
def test_whether_keys_go_in_blocks_is_known_before(slots, split, count, keys):
    """As programs for TPUs have them."""
    keys, turns, told = keys * 256, [], []
    shapes = [(slots * split.slots, 2, n, heads, 8) for n, heads in ((count, 8), (keys, 4))]
    query, held = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    mask = jax.ShapeDtypeStruct((1, 1, 1, keys), jnp.bool_)

    def blocks(query, keys, *_, largest, **__):
        turns[-1] = keys.shape[2] > largest
        return attention.unseen(query)

    def run(query, held):
        turns.append(False)
        part = attend_in_blocks(query, *held, scale=1.0, devices=split.devices)
        return merge([part]).astype(query.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_blocks", blocks)
        tpu = lambda *arrays, tpu, default: tpu(*arrays)  # noqa: E731
        patch.setattr(jax.lax, "platform_dependent", tpu)
        jax.eval_shape(lambda *given: in_turns(run, *given, split), query, (held, held, mask))
    jax.eval_shape(lambda query: told.append(goes_in_blocks(query, keys, split)), query)
    # Before it takes turns it asks for the result's shape, of all slots.
    assert told == turns[-1:]


TURNS = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from w2s_jax.ops import attention
from w2s_jax.ops.sharding import make_mesh

def mixed(query, held):
    keys, values, mask = held
    part = attention.attend_part(query, keys, values, mask, scale=0.3)
    return attention.merge([part]).astype(query.dtype)

def turned(query, *held):
    split = attention.Split(slots=4, heads=2)
    return attention._turned(mixed, query, held, split=split, together=2)

rng = np.random.default_rng(0)
shapes = [(16, 2, 3, 4, 8), (16, 2, 5, 2, 8), (16, 2, 5, 2, 8)]
arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
mask = rng.random((16, 2, 3, 5)) < 0.7
mask[..., 0] = True
mesh = make_mesh("fsdp=4,tensor=2", jax.devices())
split = NamedSharding(mesh, P("fsdp", None, None, "tensor"))
placed = [jax.device_put(array, split) for array in arrays]
placed.append(jax.device_put(mask, NamedSharding(mesh, P("fsdp"))))
compiled = jax.jit(turned).lower(*placed).compile()
found, text = compiled(*placed), compiled.as_text()
assert " while(" in text
for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
    assert kind not in text, kind
assert found.sharding.is_equivalent_to(split, found.ndim), found.sharding
wanted = jax.jit(mixed)(arrays[0], (*arrays[1:], mask))
np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=2e-5)
"""


def test_devices_take_turns_of_their_own_slots(run_python):
    """Nothing is exchanged, and what comes out lies where the queries lay."""
    run_python(TURNS, devices=8)
