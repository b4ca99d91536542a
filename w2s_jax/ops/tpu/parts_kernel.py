"""Attention over prefix, committed response and chunk as one Pallas kernel, for some TPUs.

The two cores of a v5p share no vector memory, so that a compiler keeps scores in main memory. On
other chips it brings keys of several heads into another order where it reads them block by block.
The kernel holds scores and sums of one slot in a core's own, and reads every key and value once, as
the caches lie. Which version runs is decided in `models/forward.py`.

A slot is gone through step by step: the blocks of its prefix, which all hypotheses read at once;
then block by block each hypothesis' response; at last each one's own new tokens, after which
nothing is left to see and the sums are divided.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from w2s_jax.ops.attention import MASKED
from w2s_jax.ops.sharding import ON_ONE_DEVICE, Placement
from w2s_jax.ops.tpu.parts_sizes import (
    LANES,
    SUBLANES,
    Part,
    Sizes,
    by_heads,
    filled,
    room,
    sizes_of,
)

ROOM, LIMIT = 32 * 2**20, 60 * 2**20
"""Bytes of vector memory that the kernel is judged to take at most, and may take; a v5p has 64 MiB.

Beyond the first it would still compile, for minutes.
"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window:
    """A sliding window: new tokens see the last `size` tokens, their own among them.

    size: a scalar; offsets [M]: how far the new tokens stand behind the committed part; int32.
    """

    size: Array
    offsets: Array


def takes(
    query: Float[Array, "P W M H C"], prefix: Part, committed: Part, own: int, placement: Placement
) -> bool:
    """Whether the kernel takes a case: what it holds fits, and no part has less than two keys.

    own: how many keys of its own a hypothesis has (X). Heads must be a multiple of 128 wide, and
    devices of a mesh have the key/value heads of their queries. Keys are as queries, or int8.
    """
    heads, size = query.shape[-2:]
    kv_heads = prefix.keys.shape[-2]
    parts = (prefix, committed)
    if min(part.keys.shape[-3] for part in parts) < 2:
        return False
    if size % LANES or any(x.keys.dtype not in (query.dtype, jnp.int8) for x in parts):
        return False
    if placement.mesh_axes("heads", heads) != placement.mesh_axes("kv_heads", kv_heads):
        return False
    share = sizes_of(query, prefix, committed, own, placement.parts("heads", heads))
    itemsizes = query.dtype.itemsize, max(part.keys.dtype.itemsize for part in parts)
    return room(share, size, *itemsizes) <= ROOM


def attend(
    query: Float[Array, "P W M H C"],
    prefix: Part,
    committed: Part,
    own: Part,
    own_mask: Bool[Array, "M X"],
    layer: Int[Array, ""] | None = None,
    window: Window | None = None,
    *,
    scale: float | int,
    softcap: float | None = None,
    placement: Placement = ON_ONE_DEVICE,
    interpret: bool = False,
) -> Float[Array, "P W M H C"]:
    """Softmax attention of M new tokens of every hypothesis over its prefix, response and `own`.

    Scores and sums are float32, the result as the query. A key's scale is a factor of its scores, a
    value's of its weights. Each device of a mesh attends for its own slots and heads.

    Args:
        query: Every one must see a key.
        prefix: The prompts' keys and values [P S G C].
        committed: Those of the responses [P W T G C].
        own: Those [P W X G C] of the new tokens themselves, and of those written in a chunk before
            them.
        own_mask: Which of `own` a new token sees.
        layer: The number of the layer, where the other two parts have all layers in front.
        window: The sliding window, where there is one.
        scale: The factor on query·key.
        softcap: C of c·tanh(s/c), to which a score s is mapped.
        placement: Where the arrays lie.
        interpret: Whether it runs on any device, slowly.
    """
    run = functools.partial(_attend, scale=scale, softcap=softcap, interpret=interpret)
    layer_axes = () if layer is None else (None,)
    layer = jnp.zeros((), jnp.int32) if layer is None else layer
    arrays = (query, prefix, committed, own, own_mask, layer, window)
    mesh = placement.mesh
    if mesh is None:
        return run(*arrays)
    slots = placement.mesh_axes("slots", query.shape[0]) or None
    heads = placement.mesh_axes("heads", query.shape[3]) or None

    def split(part: Part, *rows: None) -> Part:
        front = () if part.lengths is None else layer_axes
        held, scales = (PartitionSpec(*x, slots, *rows, None, heads, None) for x in (front, ()))
        return _like(part, held, PartitionSpec(slots), scales)

    each, whole = PartitionSpec(slots, None, None, heads, None), PartitionSpec()
    shared: Any = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(
            each, split(prefix), split(committed, None), split(own, None), *(whole,) * 3,
        ),
        out_specs=each,
        check_vma=False,
    )  # fmt: skip
    return shared(*arrays)


def _attend(
    query: Array,
    prefix: Part,
    committed: Part,
    own: Part,
    own_mask: Array,
    layer: Array,
    window: Window | None,
    *,
    interpret: bool,
    **options: Any,
) -> Array:
    """As `attend`, of the slots and heads of one device."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    sizes = sizes_of(query, prefix, committed, own.keys.shape[2])
    groups, given = sizes.kv_heads, query.shape
    query = _with_filled_heads(query, groups)
    slots, width, count, heads, size = query.shape
    each = heads // groups
    extra, more = sizes.own - own.keys.shape[2], sizes.rows - sizes.queries
    own_mask = jnp.pad(jnp.repeat(own_mask, each, axis=0), [(0, more), (0, extra)])
    offsets = jnp.zeros(count, jnp.int32) if window is None else window.offsets
    offsets = jnp.pad(jnp.repeat(offsets, each), [(0, more)])[:, None]
    reach = jnp.zeros((), jnp.int32) if window is None else window.size
    # Known before the first block is fetched, so that they can say which blocks are. In one axis
    # each, since another would be filled up to a tile: with thousands of slots the scalar memory
    # would not hold that.
    known = jax.tree.leaves((layer, prefix.lengths, committed.lengths, reach))
    known = [x.astype(jnp.int32).reshape(-1) for x in known]
    fill = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, extra), (0, 0), (0, 0)])  # noqa: E731
    is_layered = prefix.keys.ndim == 5
    parts = (
        _laid(prefix, is_layered),
        _laid(committed, is_layered),
        _laid(jax.tree.map(fill, own), False),
    )
    # Queries come, and results go, once a slot: their block is the same in all of its steps.
    ends = pl.BlockSpec((1, width, count, heads, size), lambda p, j, *n: (p, 0, 0, 0, 0))
    whole = [pl.BlockSpec(x.shape, lambda p, j, *n: (0, 0)) for x in (own_mask, offsets)]
    # Queries as float32 rows of a key head, since they are cut by row, and rows of half as wide a
    # dtype lie in pairs. Totals and maxima have a number a row, in every lane: a column would take
    # whole tiles too.
    rows, kinds = width * sizes.rows, (size, size, LANES, LANES)
    call = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, windowed=window is not None, **options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(slots, sizes.steps),
            in_specs=[ends, *_blocks(parts, sizes), *whole],
            out_specs=ends,
            scratch_shapes=[pltpu.VMEM((groups, rows, n), jnp.float32) for n in kinds],
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        # Slots know nothing of each other, so that two cores may share them; steps add to one sum.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=LIMIT
        ),
        cost_estimate=_cost(query, (prefix, committed), own),
        interpret=interpret,
        name="attention_of_parts",
    )
    out = call(*known, query, *parts, own_mask.astype(jnp.int32), offsets)
    out = out.reshape(*given[:3], groups, each, size)
    return out[..., : given[3] // groups, :].reshape(given)


def _with_filled_heads(query: Array, groups: int) -> Array:
    slots, width, count, heads, size = query.shape
    each = heads // groups
    query = query.reshape(slots, width, count, groups, each, size)
    query = jnp.pad(query, [(0, 0)] * 4 + [(0, filled(each) - each), (0, 0)])
    return query.reshape(slots, width, count, -1, size)


def _like(part: Part, held: Any, lengths: Any, scales: Any) -> Part:
    """What is given for its arrays in their places, where it has such."""
    leaves = [held, held]
    leaves += [] if part.lengths is None else [lengths]
    leaves += [] if part.key_scales is None else [scales, scales]
    return jax.tree.unflatten(jax.tree.structure(part), leaves)


def _laid(part: Part, is_layered: bool) -> Part:
    """Keys and values with layers in front, [.. G J C] if by heads, and scales [1 .. G J].

    A kernel's operands lie in the order of their axes. So axes are swapped here where a compiler
    lays heads first, which then copies nothing, and are not where it does not. Scales are few:
    theirs are always brought into the order in which they multiply scores.
    """

    def held(x: Array) -> Array:
        x = x.swapaxes(-3, -2) if by_heads(x.shape[-2], x.dtype) else x
        return x if is_layered else x[None]

    def turned(x: Array | None) -> Array | None:
        return None if x is None else jnp.swapaxes(x[None, ..., 0], -1, -2)

    scales = map(turned, (part.key_scales, part.value_scales))
    return Part(held(part.keys), held(part.values), None, *scales)


def _blocks(parts: tuple[Part, Part, Part], sizes: Sizes) -> tuple[Part, Part, Part]:
    """What a step has of prefix, response and own tokens: a BlockSpec in each array's place.

    What lies behind the last token that is seen is not fetched: a step that asks for the block of
    the step before costs no traffic. So a part names its last block while others are read.
    """
    from jax.experimental import pallas as pl

    def of_prefix(slot: Any, step: Any, known: Any) -> tuple[Any, ...]:
        return slot, jnp.minimum(step, _last(known[1][slot], sizes.prefix))

    def of_committed(slot: Any, step: Any, known: Any) -> tuple[Any, ...]:
        blocks = sizes.committed[2]
        at = jnp.clip(step - sizes.prefix[2], 0, sizes.width * blocks - 1)
        row = jax.lax.div(at, blocks)
        last = _last(known[2][slot * sizes.width + row], sizes.committed)
        return slot, row, jnp.minimum(jax.lax.rem(at, blocks), last)

    def of_own(slot: Any, step: Any, known: Any) -> tuple[Any, ...]:
        return slot, 0, 0

    def specs(part: Part, at: Any, rows: tuple[int, ...], keys: int) -> Part:
        groups, size = sizes.kv_heads, part.keys.shape[-1]
        is_by_heads = by_heads(groups, part.keys.dtype)
        block = (groups, keys, size) if is_by_heads else (keys, groups, size)

        def held(slot: Any, step: Any, *known: Any) -> tuple[Any, ...]:
            layer = known[0][0] if part.keys.shape[0] > 1 else 0
            *row, place = at(slot, step, known)
            return layer, *row, *((0, place) if is_by_heads else (place, 0)), 0

        def scales(slot: Any, step: Any, *known: Any) -> tuple[Any, ...]:
            *row, place = at(slot, step, known)
            return 0, *row, 0, place

        factors = pl.BlockSpec((1, *rows, groups, keys), scales)
        return _like(part, pl.BlockSpec((1, *rows, *block), held), None, factors)

    prefix, committed, own = parts
    return (
        specs(prefix, of_prefix, (1,), sizes.prefix[1]),
        specs(committed, of_committed, (1, 1), sizes.committed[1]),
        specs(own, of_own, (1, sizes.width), sizes.own),
    )


def _cost(query: Array, parts: tuple[Part, Part], own: Part) -> Any:
    """What it takes to read everything there is room for, once."""
    from jax.experimental import pallas as pl

    seen = sum(part.keys.shape[-3] for part in parts) + own.keys.shape[2]
    layers = parts[0].keys.shape[0] if parts[0].keys.ndim == 5 else 1
    moved = sum(2 * x.keys.size * x.keys.dtype.itemsize for x in parts) // layers
    factors = [(x.key_scales, x.value_scales) for x in parts]
    once = jax.tree.leaves((query, query, own, factors))
    moved += sum(x.size * x.dtype.itemsize for x in once)
    scores = query.size // query.shape[-1] * seen
    return pl.CostEstimate(4 * scores * query.shape[-1], scores, moved)


def _last(length: Any, part: tuple[int, int, int]) -> Any:
    """The number of the last block of which something is seen."""
    return jnp.clip(jax.lax.div(length - 1, part[1]), 0, part[2] - 1)


def _kernel(
    layer: Any, prefix_lengths: Any, lengths: Any, window: Any,
    query: Any, prefix: Part, committed: Part, own: Part, own_mask: Any, offsets: Any,
    out: Any, asked: Any, weighted: Any, total: Any, maximum: Any,
    *, sizes: Sizes, scale: float | int, softcap: float | None, windowed: bool,
) -> None:  # fmt: skip
    """A block of the prefix, of one hypothesis' response, or at last its own new tokens."""
    from jax.experimental import pallas as pl

    slot, step = pl.program_id(0), pl.program_id(1)
    here = slot * sizes.width
    first, blocks = sizes.prefix[2], sizes.committed[2]
    cut = functools.partial(_block, kv_heads=sizes.kv_heads, dtype=query.dtype)
    seen = functools.partial(_seen, window=window if windowed else None)
    sums = (asked, weighted, total, maximum)
    read: Any = functools.partial(_read, *sums, scale=scale, softcap=softcap, dtype=query.dtype)
    pl.when(step == 0)(functools.partial(_start, sizes, query, *sums))

    # Blocks of which nothing is seen are not fetched (`_blocks`), so they must not be read either:
    # what lies there is the block before.
    @pl.when((step < first) & (step * sizes.prefix[1] < prefix_lengths[slot]))
    def _prefix() -> None:
        held = cut(prefix, (0, 0), step, sizes.prefix)
        length = prefix_lengths[slot]
        nearest = [length + lengths[here + row] + offsets[...] for row in range(sizes.width)]
        read(slice(None), held, seen(step, sizes.prefix, length, jnp.concatenate(nearest)))

    row = jnp.clip(jax.lax.div(step - first, blocks), 0, sizes.width - 1)
    block, length = jax.lax.rem(step - first, blocks), lengths[here + row]
    is_committed = (step >= first) & (step < sizes.steps - 1)

    @pl.when(is_committed & (block * sizes.committed[1] < length))
    def _committed() -> None:
        held = cut(committed, (0, 0, 0), block, sizes.committed)
        at = _rows(row, sizes, sizes.rows)
        read(at, held, seen(block, sizes.committed, length, length + offsets[...]))

    @pl.when(step == sizes.steps - 1)
    def _own() -> None:
        def one(row: Any, _: None) -> None:
            held = cut(own, (0, 0, row), 0, (sizes.own, sizes.own, 1))
            read(_rows(row, sizes, sizes.rows), held, own_mask[...] > 0)
            for group in range(sizes.kv_heads):
                at = (group, _rows(row, sizes, sizes.queries))
                mixed = (weighted[at] / total[at][:, :1]).astype(out.dtype)
                mixed = mixed.reshape(out.shape[2], -1, out.shape[-1])
                out[0, row, :, _of_head(group, query, sizes)] = mixed

        jax.lax.fori_loop(0, sizes.width, one, None)


def _start(sizes: Sizes, query: Any, asked: Any, weighted: Any, total: Any, maximum: Any) -> None:
    """Sums of nothing, and the queries of each key head together: its keys meet them in a product.

    Rows that fill up a tile are zeros, since they are multiplied too.
    """
    for held in (asked, weighted, total):
        held[...] = jnp.zeros_like(held)
    maximum[...] = jnp.full_like(maximum, MASKED)

    def one(row: Any, _: None) -> None:
        for group in range(sizes.kv_heads):
            own = query[0, row, :, _of_head(group, query, sizes)].reshape(sizes.queries, -1)
            asked[group, _rows(row, sizes, sizes.queries)] = own.astype(asked.dtype)

    jax.lax.fori_loop(0, sizes.width, one, None)


def _rows(hypothesis: Any, sizes: Sizes, count: int) -> Any:
    """The first rows of a hypothesis; they begin with a tile of float32, which is said."""
    from jax.experimental import pallas as pl

    return pl.ds(pl.multiple_of(hypothesis * sizes.rows, SUBLANES // 2), count)


def _of_head(group: int, query: Any, sizes: Sizes) -> slice:
    """The query heads of a key head."""
    each = query.shape[3] // sizes.kv_heads
    return slice(group * each, (group + 1) * each)


def _seen(
    block: Any, part: tuple[int, int, int], length: Any, nearest: Any, *, window: Any
) -> Array:
    """[1 J], or [rows J] of a window: `nearest` is the place of the first new token."""
    place = block * part[1] + jax.lax.broadcasted_iota(jnp.int32, (1, part[1]), 1)
    near = place < jnp.minimum(length, part[0])
    return near if window is None else near & (place > nearest - window[0])


def _block(
    part: Part, at: tuple, block: Any, blocks: tuple[int, int, int], *, kv_heads: int, dtype: Any
) -> Part:
    """Keys and values [G J C] of a block and scales [G J]; zeros where the last passes the end.

    What lies behind the end is anything, NaN too, and a weight of zero would not hide that.
    """
    length, size, _ = blocks

    def ended(x: Array) -> Array:
        if length % size == 0:
            return x
        place = block * size + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where(place < length, x, jnp.zeros_like(x))

    def held(x: Any) -> Array:
        own = x[at].astype(dtype)
        return ended(own if by_heads(kv_heads, x.dtype) else own.swapaxes(0, 1))

    def factors(x: Any) -> Array | None:
        return None if x is None else ended(x[at])

    scales = map(factors, (part.key_scales, part.value_scales))
    return Part(held(part.keys), held(part.values), None, *scales)


def _read(
    asked: Any, weighted: Any, total: Any, maximum: Any, rows: Any, held: Part, seen: Array,
    *, scale: float | int, softcap: float | None, dtype: Any,
) -> None:  # fmt: skip
    """Online softmax (arXiv 1805.02867) of some rows of queries over a block."""
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    for group in range(asked.shape[0]):
        at = (group, rows)
        scores = dot(asked[at].astype(dtype), held.keys[group], (((1,), (1,)), ((), ()))) * scale
        if held.key_scales is not None:
            scores = scores * held.key_scales[group : group + 1]
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(seen, scores, MASKED)
        before = maximum[at]
        now = jnp.maximum(before, scores.max(axis=-1, keepdims=True))
        factor, weights = jnp.exp(before - now), jnp.exp(scores - now[:, :1])
        maximum[at] = now
        total[at] = total[at] * factor + weights.sum(axis=-1, keepdims=True)
        if held.value_scales is not None:
            weights = weights * held.value_scales[group : group + 1]
        new = dot(weights.astype(dtype), held.values[group], (((1,), (0,)), ((), ())))
        weighted[at] = weighted[at] * factor[:, :1] + new
