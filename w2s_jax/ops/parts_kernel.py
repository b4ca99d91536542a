"""Attention over prefix, committed response and chunk as one Pallas kernel, for some TPUs.

The two cores of a v5p share no vector memory, so that a compiler keeps scores in main memory. The
kernel holds scores and sums of one slot in a core's own, and reads every key and value once, as
the caches lie. Other chips need none; which version runs is decided in `models/decoder.py`.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from w2s_jax.ops.sharding import ON_ONE_DEVICE, Placement
from w2s_jax.pytrees import pytree

CHIPS = ("TPU v5", "TPU v5p")
"""Kinds of devices whose cores share no vector memory."""
MASKED = -1e30
LANES, SUBLANES = 128, 16
"""Sides of a tile of bfloat16 numbers."""
SCORES = 2 * 2**20
"""Bytes of scores at a time, and with them how many keys a block has."""
LONGEST = 512
ROOM, LIMIT = 32 * 2**20, 60 * 2**20
"""Bytes of vector memory that the kernel is judged to take at most, and may take; there are 64.

Beyond the first it would still compile, for minutes.
"""


@pytree()
class Part:
    """Keys and values that new tokens see: [P J G C], or [P W J G C], of one layer or of all.

    lengths: how many from the first are seen, int32 [P], or [P W].
    """

    keys: Array
    values: Array
    lengths: Array


@pytree()
class Window:
    """A sliding window: new tokens see the last `size` tokens, their own among them.

    size: a scalar; offsets [M]: how far the new tokens stand behind the committed part; int32.
    """

    size: Array
    offsets: Array


@dataclass(frozen=True)
class _Sizes:
    """W, rows of a hypothesis (M · H/G), G, and of both parts J, a block's keys, and blocks."""

    width: int
    rows: int
    kv_heads: int
    prefix: tuple[int, int, int]
    committed: tuple[int, int, int]

    @property
    def steps(self) -> int:
        return self.prefix[2] + self.width * self.committed[2] + 1


def has_kernel(dtype: Any, placement: Placement) -> bool:
    """Whether arrays of a dtype, so placed, are read on chips for which there is a kernel.

    Without a mesh only where there is one device: arrays that lie on several all the same could not
    be read, since no compiler splits a kernel.
    """
    devices = jax.devices() if placement.mesh is None else placement.mesh.devices.flat
    if placement.mesh is None and len(devices) > 1:
        return False
    return devices[0].device_kind in CHIPS and dtype == jnp.bfloat16


def takes(
    query: Float[Array, "P W M H C"],
    prefix: Part,
    committed: Part,
    own: int,
    placement: Placement,
) -> bool:
    """Whether the kernel takes a case: what it holds fits, and is neither empty nor quantised.

    own: how many keys of its own a hypothesis has (X).

    Heads must be a multiple of 128 wide, and as many as a power of two for a key/value head, which
    tiles hold without gaps; devices of a mesh must have the key/value heads of their queries.
    """
    heads, size = query.shape[-2:]
    kv_heads = prefix.keys.shape[-2]
    if (heads // kv_heads).bit_count() > 1 or not all(x.keys.size for x in (prefix, committed)):
        return False
    if size % LANES or {x.keys.dtype for x in (prefix, committed)} != {query.dtype}:
        return False
    if _axes(placement, "heads", heads) != _axes(placement, "kv_heads", kv_heads):
        return False
    share = _sizes(query, prefix, committed, placement.parts("heads", heads))
    return _room(share, own, size, query.dtype.itemsize) <= ROOM


def _axes(placement: Placement, axis: str, size: int) -> tuple[str, ...] | None:
    """The mesh axes that split a logical axis, if any."""
    if placement.mesh is None:
        return None
    return placement.rules.targets(axis, size, placement.mesh.shape) or None


def _sizes(query: Array, prefix: Part, committed: Part, parts: int = 1) -> _Sizes:
    _, width, count, heads, _ = query.shape
    kv_heads = prefix.keys.shape[-2]
    rows = count * (heads // kv_heads)
    longest = min(LONGEST, max(LANES, SCORES // (4 * rows) // LANES * LANES))

    def blocks(keys: int) -> tuple[int, int, int]:
        size = min(longest, keys)
        return keys, size, -(-keys // size)

    each = (blocks(part.keys.shape[-3]) for part in (prefix, committed))
    return _Sizes(width, rows, kv_heads // parts, *each)


def _room(sizes: _Sizes, own: int, head_width: int, itemsize: int) -> int:
    """Bytes of vector memory: sums, and twice what comes and goes; scores, and own tokens' mask."""
    each = _up(sizes.rows, SUBLANES)
    rows = sizes.width * sizes.kv_heads * each
    sums = 4 * rows * (head_width + 2 * LANES)
    ends = 2 * 2 * rows * head_width * itemsize
    blocks = (sizes.prefix[1], sizes.committed[1])
    a_key = 2 * sizes.kv_heads * head_width * itemsize
    held = 2 * (sum(blocks) + sizes.width * _up(own, SUBLANES)) * a_key
    mask = 2 * 4 * each * _up(own, LANES)
    # Besides as they lie, keys and values stand head by head, and scores as weights.
    again = (max(blocks) + own) * a_key + 4 * 4 * each * max(*blocks, _up(own, LANES))
    return sums + ends + held + mask + again


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def attend(
    query: Float[Array, "P W M H C"],
    prefix: Part,
    committed: Part,
    own: tuple[Float[Array, "P W X G C"], Float[Array, "P W X G C"]],
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

    own: the keys and values of the new tokens themselves, and of those written in a chunk before
    them, all of which `own_mask` tells. With `layer` the keys and values of both parts have all
    layers in front. Every query must see a key. Scores and sums are float32, the result as the
    query. Each device of a mesh attends for its own slots and heads.
    """
    run = functools.partial(_attend, scale=scale, softcap=softcap, interpret=interpret)
    layer_axes = () if layer is None else (None,)
    layer = jnp.zeros((), jnp.int32) if layer is None else layer
    arrays = (query, prefix, committed, own, own_mask, layer, window)
    mesh = placement.mesh
    if mesh is None:
        return run(*arrays)
    slots = _axes(placement, "slots", query.shape[0])
    heads = _axes(placement, "heads", query.shape[3])
    kept = PartitionSpec(*layer_axes, slots, None, heads, None)
    branched = PartitionSpec(*layer_axes, slots, None, None, heads, None)
    by_slots, whole = PartitionSpec(slots), PartitionSpec()
    each = PartitionSpec(slots, None, None, heads, None)
    shared: Any = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(
            each,
            Part(kept, kept, by_slots),  # type: ignore[arg-type]
            Part(branched, branched, by_slots),  # type: ignore[arg-type]
            (each, each),
            *(whole,) * 3,
        ),
        out_specs=each,
        check_vma=False,
    )
    return shared(*arrays)


def _attend(
    query: Array,
    prefix: Part,
    committed: Part,
    own: tuple[Array, Array],
    own_mask: Array,
    layer: Array,
    window: Window | None,
    *,
    scale: float | int,
    softcap: float | None,
    interpret: bool,
) -> Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    sizes = _sizes(query, prefix, committed)
    slots, width, count, heads, size = query.shape
    groups, rows = sizes.kv_heads, sizes.rows
    layered = prefix.keys.ndim == 5
    # One head has no axis of its own, whose tiles would be filled up.
    one = (lambda x: x.squeeze(-2)) if groups == 1 else lambda x: x
    lift = (lambda x: one(x)) if layered else lambda x: one(x)[None]
    extra = -own[0].shape[2] % SUBLANES
    fill = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, extra), (0, 0), (0, 0)])  # noqa: E731
    own_mask = jnp.pad(jnp.repeat(own_mask, heads // groups, axis=0), [(0, 0), (0, extra)])
    offsets = jnp.zeros(count, jnp.int32) if window is None else window.offsets
    offsets = jnp.repeat(offsets, heads // groups)[:, None]
    reach = jnp.zeros((), jnp.int32) if window is None else window.size
    tail = (groups, size) if groups > 1 else (size,)
    zeros = (0,) * len(tail)

    # What lies behind the last one that is seen is not fetched.
    def at_prefix(slot: Any, step: Any, known: Any) -> Any:
        return jnp.minimum(step, _last(known[1][slot], sizes.prefix))

    def at_committed(slot: Any, step: Any, known: Any) -> tuple[Any, Any]:
        blocks = sizes.committed[2]
        at = jnp.clip(step - sizes.prefix[2], 0, width * blocks - 1)
        row = jax.lax.div(at, blocks)
        return row, jnp.minimum(
            jax.lax.rem(at, blocks), _last(known[2][slot * width + row], sizes.committed)
        )

    kept = pl.BlockSpec(
        (1, 1, sizes.prefix[1], *tail),
        lambda p, j, *n: (n[0][0], p, at_prefix(p, j, n), *zeros),
    )
    branched = pl.BlockSpec(
        (1, 1, 1, sizes.committed[1], *tail),
        lambda p, j, *n: (n[0][0], p, *at_committed(p, j, n), *zeros),
    )
    new = pl.BlockSpec(
        (1, width, own[0].shape[2] + extra, *tail), lambda p, j, *n: (p, 0, 0, *zeros)
    )
    ends = pl.BlockSpec((1, width, count, heads, size), lambda p, j, *n: (p, 0, 0, 0, 0))
    whole = [pl.BlockSpec(x.shape, lambda p, j, *n: (0, 0)) for x in (own_mask, offsets)]
    sums = [pltpu.VMEM((width, groups, rows, n), jnp.float32) for n in (size, LANES, LANES)]
    call = pl.pallas_call(
        functools.partial(
            _kernel, sizes=sizes, scale=scale, softcap=softcap, windowed=window is not None
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(slots, sizes.steps),
            in_specs=[ends, kept, kept, branched, branched, new, new, *whole],
            out_specs=ends,
            scratch_shapes=sums,
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=LIMIT
        ),
        cost_estimate=_cost(query, (prefix, committed), own),
        interpret=interpret,
        name="attention_of_parts",
    )
    # In one axis each, since another would be filled up to a tile.
    lengths = [part.lengths.astype(jnp.int32).reshape(-1) for part in (prefix, committed)]
    return call(
        layer.reshape(1).astype(jnp.int32), *lengths, reach.reshape(1), query,
        lift(prefix.keys), lift(prefix.values), lift(committed.keys), lift(committed.values),
        *(one(fill(x)) for x in own), own_mask.astype(jnp.int32), offsets,
    )  # fmt: skip


def _cost(query: Array, parts: tuple[Part, Part], own: tuple[Array, Array]) -> Any:
    """What it takes to read everything there is room for, once."""
    from jax.experimental import pallas as pl

    seen = sum(part.keys.shape[-3] for part in parts) + own[0].shape[2]
    once = [x for part in parts for x in (part.keys, part.values)]
    layers = parts[0].keys.shape[0] if parts[0].keys.ndim == 5 else 1
    moved = sum(x.size * x.dtype.itemsize for x in once) // layers
    moved += sum(x.size * x.dtype.itemsize for x in (query, query, *own))
    scores = query.size // query.shape[-1] * seen
    return pl.CostEstimate(4 * scores * query.shape[-1], scores, moved)


def _last(length: Any, part: tuple[int, int, int]) -> Any:
    """The number of the last block of which something is seen."""
    return jnp.clip(jax.lax.div(length - 1, part[1]), 0, part[2] - 1)


def _kernel(
    layer: Any, prefix_lengths: Any, lengths: Any, window: Any,
    query: Any, prefix_keys: Any, prefix_values: Any, keys: Any, values: Any,
    own_keys: Any, own_values: Any, own_mask: Any, offsets: Any,
    out: Any, weighted: Any, total: Any, maximum: Any,
    *, sizes: _Sizes, scale: float | int, softcap: float | None, windowed: bool,
) -> None:  # fmt: skip
    """A block of the prefix, of one hypothesis' response, or at last its own new tokens."""
    from jax.experimental import pallas as pl

    slot, step = pl.program_id(0), pl.program_id(1)
    here = slot * sizes.width
    first, blocks = sizes.prefix[2], sizes.committed[2]
    read: Any = functools.partial(
        _read, query, weighted, total, maximum, sizes=sizes, scale=scale, softcap=softcap
    )

    @pl.when(step == 0)
    def _start() -> None:
        weighted[...] = jnp.zeros_like(weighted)
        total[...] = jnp.zeros_like(total)
        maximum[...] = jnp.full_like(maximum, MASKED)

    def seen(block: Any, part: tuple[int, int, int], length: Any, nearest: Any) -> Array:
        """[1 J], or [rows J] of a window: `nearest` is the place of the first new token."""
        place = block * part[1] + jax.lax.broadcasted_iota(jnp.int32, (1, part[1]), 1)
        near = place < jnp.minimum(length, part[0])
        return near & (place > nearest - window[0] + offsets[...]) if windowed else near

    @pl.when((step < first) & (step * sizes.prefix[1] < prefix_lengths[slot]))
    def _prefix() -> None:
        held = [_block(x[0, 0], step, sizes.prefix) for x in (prefix_keys, prefix_values)]
        length = prefix_lengths[slot]

        def one(row: Any, _: None) -> None:
            read(row, *held, seen(step, sizes.prefix, length, length + lengths[here + row]))

        jax.lax.fori_loop(0, sizes.width, one, None)

    row = jnp.clip(jax.lax.div(step - first, blocks), 0, sizes.width - 1)
    block, length = jax.lax.rem(step - first, blocks), lengths[here + row]
    is_committed = (step >= first) & (step < sizes.steps - 1)

    @pl.when(is_committed & (block * sizes.committed[1] < length))
    def _committed() -> None:
        held = [_block(x[0, 0, 0], block, sizes.committed) for x in (keys, values)]
        read(row, *held, seen(block, sizes.committed, length, length))

    @pl.when(step == sizes.steps - 1)
    def _own() -> None:
        def one(row: Any, _: None) -> None:
            read(row, own_keys[0, row], own_values[0, row], own_mask[...] > 0)
            for group in range(sizes.kv_heads):
                mixed = (weighted[row, group] / total[row, group][:, :1]).astype(out.dtype)
                out[0, row, :, _heads(out, group, sizes)] = mixed.reshape(
                    out.shape[2], -1, out.shape[-1]
                )

        jax.lax.fori_loop(0, sizes.width, one, None)


def _block(held: Array, block: Any, part: tuple[int, int, int]) -> Array:
    """Keys or values [J G C] of a block; zeros where the last one passes the end."""
    length, size, _ = part
    if length % size == 0:
        return held
    place = block * size + jax.lax.broadcasted_iota(jnp.int32, held.shape, 0)
    return jnp.where(place < length, held, jnp.zeros_like(held))


def _read(
    query: Any, weighted: Any, total: Any, maximum: Any,
    hypothesis: Any, keys: Array, values: Array, seen: Array,
    *, sizes: _Sizes, scale: float | int, softcap: float | None,
) -> None:  # fmt: skip
    """Online softmax (arXiv 1805.02867) of a hypothesis' queries over keys [J G C], or [J C]."""
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    if sizes.kv_heads == 1:
        keys, values = keys[None], values[None]
    else:
        keys, values = keys.swapaxes(0, 1), values.swapaxes(0, 1)
    for group in range(sizes.kv_heads):
        at = (hypothesis, group)
        rows = query[0, hypothesis, :, _heads(query, group, sizes)].reshape(sizes.rows, -1)
        scores = dot(rows, keys[group], (((1,), (1,)), ((), ()))) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(seen, scores, MASKED)
        before = maximum[at]
        now = jnp.maximum(before, scores.max(axis=-1, keepdims=True))
        factor, weights = jnp.exp(before - now), jnp.exp(scores - now[:, :1])
        maximum[at] = now
        total[at] = total[at] * factor + weights.sum(axis=-1, keepdims=True)
        new = dot(weights.astype(values.dtype), values[group], (((1,), (0,)), ((), ())))
        weighted[at] = weighted[at] * factor[:, :1] + new


def _heads(query: Any, group: int, sizes: _Sizes) -> slice:
    each = query.shape[3] // sizes.kv_heads
    return slice(group * each, (group + 1) * each)
