"""A pass over the three-part cache: new tokens of every hypothesis, behind what the caches hold.

`Layout` says which new tokens share keys, `View` what they see, and `forward` runs the stack. Whole
sequences are read by `decoder.read_sequences`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from w2s_jax.models.cache import (
    KV,
    KVCache,
    LayersKV,
    any_layer,
    put_layer,
    quantize_part,
    take_layer,
    write_committed,
)
from w2s_jax.models.config import ModelConfig, layer_ropes, layer_windows
from w2s_jax.models.decoder import (
    Block,
    attention_scale,
    embed,
    final_norm,
    turns_of,
)
from w2s_jax.ops import attention, tpu
from w2s_jax.ops.layers import choose
from w2s_jax.ops.sharding import ON_ONE_DEVICE, Placement
from w2s_jax.ops.tpu import parts_kernel

_FAR = 2**30
"""The window of layers without one, where others have one; more than any model's positions."""


@dataclass(frozen=True)
class Layout:
    """How the M new tokens of each hypothesis are arranged: [stem?][successor 0][successor 1]...

    The stem is one token of the hypothesis itself; it is written to the committed part and seen by
    all its successors. Each of the `successors` then has `length` tokens of its own.
    A plain sequence is Layout(False, 1, X); a token step of K successors is Layout(False, K, 1).
    """

    stem: bool
    successors: int
    length: int

    @property
    def tokens(self) -> int:
        """M, the new tokens of one hypothesis."""
        return int(self.stem) + self.successors * self.length


class Masks(NamedTuple):
    """True where a new token sees a key of a part; None where that part is absent.

    prefix [P 1 . S], committed [P W . T], chunk [. . L J]. window is the layers' sliding window, a
    scalar, which a kernel asks for; None where no layer of the model has one.
    """

    prefix: Array | None
    committed: Array | None
    chunk: Array | None
    window: Array | None = None


@dataclass(frozen=True)
class View:
    """What new tokens may see beside themselves, for all layers of one call.

    masks: one for every distinct sliding window. stem_start [P, W] is where stems are written and
    how long the committed part was before, prefix_length [P] that of the prefix, offsets [M] how
    far new tokens stand behind both; chunk_start (a scalar) is where branch tokens are written in a
    chunk buffer. placement says where the cache lies.
    """

    config: ModelConfig
    layout: Layout
    masks: tuple[Masks, ...]
    stem_start: Array
    prefix_length: Array
    chunk_start: Array | None = None
    offsets: Array | None = None
    placement: Placement = ON_ONE_DEVICE


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stacked:
    """Two parts of all layers before new tokens are written, and the number of the layer that runs.

    A kernel reads them where they lie: a layer taken out for it would be a copy.
    """

    prefix: KV
    committed: KV
    layer: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerKV:
    """One layer's keys and values of the three parts; the chunk is None where nothing branches.

    stacked: what its prefix and committed part were taken from, where layers are stacked.
    """

    prefix: KV
    committed: KV
    chunk: KV | None
    stacked: Stacked | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Forward:
    """The result of one pass.

    hidden [P, W, M, D]: states after the last norm. cache: with the stems committed. chunk: the
    branch tokens' keys and values, [P, R, ., G, C] a layer, of as many tokens of a row as a chunk
    buffer or else the layout has; None where there are none.
    """

    hidden: Array
    cache: KVCache
    chunk: LayersKV | None


def forward(
    config: ModelConfig,
    params: dict,
    tokens: Int[Array, "P W M"],
    layout: Layout,
    *,
    cache: KVCache,
    chunk: LayersKV | None = None,
    chunk_start: Int[Array, ""] | None = None,
) -> Forward:
    """Read M new tokens of every hypothesis, arranged as `layout`, behind what the caches hold.

    Args:
        config: The decoder's.
        params: Its parameters, in either layout.
        tokens: Token ids.
        layout: Which of them are stems, and how the others lie.
        cache: What the model remembers; stems are written to its committed part.
        chunk: A buffer [P, R, capacity, G, C] a layer. Branch tokens are written to it and see it
            up to themselves; without it they see one another causally.
        chunk_start: Where in the buffer.

    Returns:
        States, and the cache and the chunk with the new tokens.
    """
    offsets = _offsets(layout, chunk_start)
    base = cache.prefix_length[:, None] + cache.committed_length
    positions = (base[:, :, None] + offsets).astype(jnp.int32)
    capacity = layout.length if chunk is None else any_layer(chunk).room
    windows, _ = layer_windows(config)
    reaches = [None if windows == (None,) else jnp.int32(one or _FAR) for one in windows]
    masks = (_masks(one, positions, layout, cache, capacity, chunk_start) for one in windows)
    view = View(
        config,
        layout,
        tuple(one._replace(window=reach) for one, reach in zip(masks, reaches, strict=True)),
        cache.committed_length,
        cache.prefix_length,
        chunk_start,
        offsets,
        cache.placement,
    )
    x = embed(config, params, tokens, positions)
    # Widths are whole, or else a token step would gather weights.
    place = replace(cache.placement, rules=cache.placement.rules.replace(embed=None))
    block, turns = Block(config, x.dtype, place), turns_of(config, positions)

    def apply(params: dict, x: Array, kv: LayerKV, window: Any, rope: Any) -> tuple[Array, LayerKV]:
        attend = partial(_attend_layer, kv, choose(view.masks, window), view)
        return block.apply({"params": params}, x, choose(turns, rope), attend)

    run = _run_stacked if "layers" in params else _run_layers
    x, committed, chunk = run(params, x, cache, chunk, view, apply)
    lengths = cache.committed_length + int(layout.stem)
    cache = replace(cache, committed=committed, committed_length=lengths)
    return Forward(final_norm(config, params, x), cache, chunk)


Apply = Callable[[dict, Array, LayerKV, Any, Any], tuple[Array, LayerKV]]
"""The last two: which of the distinct windows and ropes is the layer's."""


def _run_layers(
    params: dict, x: Array, cache: KVCache, chunk: Any, view: View, apply: Apply
) -> tuple[Array, Any, Any]:
    """Each layer's caches go in and come out by themselves."""
    parts: list[LayerKV] = []
    # A program within the program: layers that are alike are traced and lowered once.
    apply = jax.jit(apply, static_argnums=(3, 4))
    prefix: Any = cache.prefix
    committed: Any = cache.committed
    kinds = zip(layer_windows(view.config)[1], layer_ropes(view.config)[1], strict=True)
    for i, kind in enumerate(kinds):
        kv = LayerKV(prefix[i], committed[i], None if chunk is None else chunk[i])
        x, kv = apply(params[f"layers_{i}"], x, kv, *kind)
        parts.append(kv)
    chunks = None if parts[0].chunk is None else tuple(kv.chunk for kv in parts)
    return x, tuple(kv.committed for kv in parts), chunks


def _run_stacked(
    params: dict, x: Array, cache: KVCache, chunk: Any, view: View, apply: Apply
) -> tuple[Array, Any, Any]:
    """Scan over stacked layers; parts that are written ride in the carry and change in place.

    Writing a cache through scanned inputs and outputs would cost a full extra copy of it.
    """
    prefix: Any = cache.prefix
    committed: Any = cache.committed
    stem = view.layout.stem
    kinds = [jnp.asarray(of(view.config)[1], jnp.int32) for of in (layer_windows, layer_ropes)]
    scanned = (params["layers"], prefix, None if stem else committed, kinds)

    def body(carry: tuple, layer: tuple) -> tuple[tuple, KV | None]:
        x, (stems, buffer), index = carry
        layer_params, own_prefix, read, kind = layer
        at = partial(jax.tree.map, partial(take_layer, index=index))
        kv = LayerKV(
            own_prefix,
            read if stems is None else at(stems),
            at(buffer),
            Stacked(prefix, stems or committed, index),
        )
        x, kv = apply(layer_params, x, kv, *kind)
        fresh = kv.chunk if buffer is None else None
        stems = None if stems is None else put_layer(stems, kv.committed, index)
        buffer = None if buffer is None else put_layer(buffer, kv.chunk, index)
        return (x, (stems, buffer), index + 1), fresh

    start = (x, (committed if stem else None, chunk), jnp.zeros((), jnp.int32))
    (x, (stems, buffer), _), fresh = jax.lax.scan(body, start, scanned)
    return x, committed if stems is None else stems, fresh if buffer is None else buffer


def _offsets(layout: Layout, chunk_start: Array | None) -> Array:
    """How far the new tokens [M] stand behind what a cache holds."""
    stem = int(layout.stem)
    steps = jnp.arange(layout.length) + stem + (0 if chunk_start is None else chunk_start)
    offsets = [jnp.zeros(stem, jnp.int32), jnp.tile(steps, layout.successors)]
    return jnp.concatenate(offsets).astype(jnp.int32)


def _masks(
    window: int | None,
    positions: Array,
    layout: Layout,
    cache: KVCache,
    capacity: int,
    chunk_start: Array | None,
) -> Masks:
    index = jnp.arange(any_layer(cache.prefix).room)
    prefix = (index < cache.prefix_length[:, None])[:, None, None, :]
    if window is not None:
        queries = positions.reshape(positions.shape[0], 1, -1, 1)
        prefix = prefix & (index > queries - window)
    index = jnp.arange(any_layer(cache.committed).room)
    limit = cache.committed_length + int(layout.stem)
    committed = (index < limit[:, :, None])[:, :, None, :]
    if window is not None:
        keys = cache.prefix_length[:, None, None, None] + index
        committed = committed & (keys > positions[..., None] - window)
    chunk = None
    if layout.successors * layout.length:
        query = jnp.arange(layout.length)[:, None] + (0 if chunk_start is None else chunk_start)
        key = jnp.arange(capacity)
        chunk = key <= query
        if window is not None:
            chunk = chunk & (key > query - window)
        chunk = chunk[None, None]
    return Masks(prefix, committed, chunk)


def _attend_layer(
    before: LayerKV, masks: Masks, view: View, query: Array, key: Array, value: Array
) -> tuple[Array, LayerKV]:
    """Write the new tokens' keys and values into their parts, and attend to all of them."""
    new = KV(key, value)
    new = quantize_part(new) if before.prefix.is_quantized else new
    kv = _extend(before, new, view)
    mixed = attend_by_kernel(query, before, new, kv.chunk, masks, view)
    return attend_parts(query, kv, masks, view) if mixed is None else mixed, kv


def _extend(kv: LayerKV, new: KV, view: View) -> LayerKV:
    """Put the stems' keys and values into the committed part, the branches' into the chunk."""
    layout, committed, branches = view.layout, kv.committed, None
    if layout.stem:
        stem = jax.tree.map(lambda x: x[:, :, :1], new)
        committed = write_committed(committed, stem, view.stem_start)
    if layout.successors * layout.length:
        branches = jax.tree.map(lambda x: _branches(x, layout), new)
        if kv.chunk is not None:
            assert view.chunk_start is not None, "a buffer needs the place to write at"
            write = partial(_write_chunk, view.chunk_start)
            branches = kv.chunk.map(write, branches.arranged(kv.chunk.head_major))
    return LayerKV(kv.prefix, committed, branches)


def _write_chunk(start: Array, chunk: Array, new: Array, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(chunk, new, start, axis)


def _branches(x: Array, layout: Layout) -> Array:
    """[P, W, M, ...] without its stems, as rows [P, W·K, length, ...]."""
    slots, hypotheses = x.shape[:2]
    rows = hypotheses * layout.successors
    return x[:, :, int(layout.stem) :].reshape(slots, rows, layout.length, *x.shape[3:])


def _split(query: Array, placement: Placement) -> attention.Split:
    slots, heads = query.shape[0], query.shape[-2]
    return attention.Split(placement.parts("slots", slots), placement.parts("heads", heads))


def attend_parts(query: Array, kv: LayerKV, masks: Masks, view: View) -> Array:
    """Attention over what there is of prefix, committed response and chunk, in turns of slots."""
    config, layout, split = view.config, view.layout, _split(query, view.placement)
    options: Any = {
        "scale": attention_scale(config),
        "softcap": config.attention_softcap,
        "devices": split.devices,
    }

    def attend(queries: Array, part: KV, mask: Array | None) -> attention.Partial:
        held: Any = (part.keys, part.values, mask, part.key_scales, part.value_scales)
        return attention.attend_in_blocks(queries, *held, head_major=part.head_major, **options)

    def of_slots(query: Array, held: tuple[LayerKV, tuple]) -> Array:
        kv, (prefix_mask, committed_mask, chunk_mask) = held
        slots, hypotheses, count = query.shape[:3]
        shared = query.reshape(slots, 1, hypotheses * count, *query.shape[3:])
        prefix = attend(shared, jax.tree.map(lambda x: x[:, None], kv.prefix), prefix_mask)
        partials = [
            prefix.reshape(slots, hypotheses, count),
            attend(query, kv.committed, committed_mask),
        ]
        if kv.chunk is not None:
            own = attend(_branches(query, layout), kv.chunk, chunk_mask)
            own = own.reshape(slots, hypotheses, layout.successors * layout.length)
            if layout.stem:
                own = attention.concatenate([attention.unseen(query[:, :, :1]), own], axis=2)
            partials.append(own)
        return attention.merge(partials).astype(query.dtype)

    return attention.in_turns(of_slots, query, (kv, tuple(masks[:3])), split)


def attend_by_kernel(
    query: Array, before: LayerKV, new: KV, chunk: KV | None, masks: Masks, view: View
) -> Array | None:
    """As `attend_parts`, by the kernel for chips that need one; None where it takes no such case.

    before: the parts before the new tokens are written; chunk: after.
    """
    config, layout, placement = view.config, view.layout, view.placement
    split = _split(query, placement)
    keys = max(before.prefix.room, before.committed.room)
    several = config.kv_heads // split.heads > 1
    in_blocks = several and attention.goes_in_blocks(query, keys, split)
    if not tpu.has_kernel(query.dtype, placement, in_blocks):
        return None
    stacked, window = before.stacked, None
    source: Any = before if stacked is None else stacked
    parts = (
        _as_part(source.prefix, before.prefix, view.prefix_length),
        _as_part(source.committed, before.committed, view.stem_start),
    )
    room = 0 if chunk is None else layout.successors * chunk.keys.shape[2]
    if not parts_kernel.takes(query, *parts, int(layout.stem) + room, placement):
        return None
    if masks.window is not None:
        assert view.offsets is not None
        window = parts_kernel.Window(masks.window, view.offsets)
    own, mask = _own(new, chunk, masks.chunk, layout, query.shape[1])
    if window is not None and layout.stem:
        mask = mask.at[:, 0].set(window.offsets < window.size)
    return parts_kernel.attend(
        query,
        *parts,
        own,
        mask,
        None if stacked is None else stacked.layer,
        window,
        scale=attention_scale(config),
        softcap=config.attention_softcap,
        placement=placement,
    )


def _as_part(held: KV, layer: KV, lengths: Array | None = None) -> parts_kernel.Part:
    """A part as the kernel takes it: held, maybe of all layers, but with the scales of one."""
    return parts_kernel.Part(held.keys, held.values, lengths, layer.key_scales, layer.value_scales)


def _own(
    new: KV, chunk: KV | None, mask: Array | None, layout: Layout, width: int
) -> tuple[parts_kernel.Part, Array]:
    """Keys and values [P W X G C] of a hypothesis' stem and chunk, and which [M X] a token sees.

    A branch sees the stem and, by `mask` [1 1 length J], its own row of the chunk.
    """
    stem = int(layout.stem)
    rows = layout.successors if chunk is not None else 0
    room = 0 if chunk is None else chunk.keys.shape[2]
    seen = jnp.zeros((layout.tokens, stem + rows * room), bool)
    if stem:
        seen = seen.at[:, 0].set(True)
    if chunk is not None:
        assert mask is not None
        branches = jnp.kron(jnp.eye(rows, dtype=jnp.int32), mask[0, 0].astype(jnp.int32))
        seen = seen.at[stem:, stem:].set(branches > 0)

    def held(fresh: Array, written: Array | None = None) -> Array:
        parts = [fresh[:, :, :stem]]
        if written is not None:
            parts.append(written.reshape(len(fresh), width, rows * room, *written.shape[3:]))
        return jnp.concatenate(parts, axis=2)

    own = jax.tree.map(held, new) if chunk is None else jax.tree.map(held, new, chunk)
    return _as_part(own, own), seen
