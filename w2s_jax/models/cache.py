"""The key/value cache in three parts, each stored once for all the rows that attend to it.

One slot of P, here with W = 2 hypotheses and K = 2 successors of each, R = W·K rows in all:

    prefix [P, S]           committed [P, W, T]              chunk [P, R, L − 1]

                                                         ┌── row 0   (w = 0, k = 0)
                        ┌── hypothesis 0 ────────────────┤
    the prompt but      │   prompt's last token,         └── row 1   (w = 0, k = 1)
    its last token ─────┤   response so far
                        │                                ┌── row 2   (w = 1, k = 0)
                        └── hypothesis 1 ────────────────┤
                                                         └── row 3   (w = 1, k = 1)

A row attends to the path from the prompt to itself. Rows under one part join the query axis of one
product, so that its keys and values are read once, not W or R times. After selection the
winners' chunks go behind their parents' responses; the prefix stays where it is.

The last token of a chunk is sampled and scored, but read only when the next chunk begins: by then W
hypotheses are left of the R rows, so that W tokens are read where R would have been. The prompt's
last token lies in the committed part for the same reason: every chunk, the first too, begins by
reading one token of each hypothesis, in one program.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from w2s_jax.models.config import ModelConfig
from w2s_jax.ops.layers import quantize_array
from w2s_jax.ops.sharding import ON_ONE_DEVICE, Placement


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KV:
    """Keys and values of one part, one array each or, for stacked layers, with a leading N axis.

    prefix [P, S, G, C]; committed [P, W, T, G, C]; chunk [P, R, L − 1, G, C], as its last
    token is read with the next one. Where they are int8, each entry is to be multiplied by its
    scale: float32, of the same shape but for a C of 1.

    head_major: the J entries lie behind the heads, keys [.., G, C, J] and values [.., G, J, C]. So
    a CPU's products take them; laid out otherwise they are copied in every token step. Not of int8.
    """

    keys: Array
    values: Array
    key_scales: Array | None = None
    value_scales: Array | None = None
    head_major: bool = field(default=False, metadata={"static": True})

    @property
    def is_quantized(self) -> bool:
        """Whether the entries are int8."""
        return self.key_scales is not None

    @property
    def room(self) -> int:
        """J, the entries that it has room for."""
        return self.keys.shape[-1 if self.head_major else -3]

    def map(self, apply: Callable[..., Array], *others: "KV") -> "KV":
        """`apply(array, *arrays of others, axis)` of keys, values and scales.

        The axis is the one of the entries in the array, counted from the last.
        """
        names = ("keys", "values", *(("key_scales", "value_scales") if self.is_quantized else ()))
        axes = {"keys": -1, "values": -2} if self.head_major else {}
        made: dict[str, Any] = {
            name: apply(*(getattr(kv, name) for kv in (self, *others)), axes.get(name, -3))
            for name in names
        }
        return replace(self, **made)

    def arranged(self, head_major: bool) -> "KV":
        """The same entries, which lie in their usual order now, in the order told."""
        if not head_major or self.head_major:
            return self
        moved = replace(self, head_major=True)
        return moved.map(lambda array, axis: jnp.moveaxis(array, -3, axis))


MOVED = 128
"""Entries of each hypothesis that a selection moves at a time, where there are more."""

LayersKV = tuple[KV, ...] | KV
"""One part for every layer: a tuple in the per-layer layout, one stacked KV in the other."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """What one model remembers of the slots under search, between chunks.

    prefix and committed hold a KV per layer (a tuple), or one KV stacked over layers.
    prefix_length [P] and committed_length [P, W] count the valid entries; entries beyond them are
    arbitrary but finite, unless a model's own numbers are not. The committed part begins with the
    prompt's last token, so that the tokens whose next-token logits a chunk needs first are always
    those of the hypotheses. placement says where the arrays lie.
    """

    prefix: LayersKV
    committed: LayersKV
    prefix_length: Array
    committed_length: Array
    placement: Placement = field(default=ON_ONE_DEVICE, metadata={"static": True})

    def constrain(self) -> "KVCache":
        """Inside jit, the cache with its arrays held to their shardings."""
        if self.placement.mesh is None:
            return self
        return self.placement.constrain(self, cache_axes(self))


def empty_part(
    config: ModelConfig,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    stacked: bool,
    head_major: bool = False,
) -> LayersKV:
    """Zeros for one part of every layer; `shape` is the part's shape without [G, C].

    dtype int8 is with scales, any other as it is.
    """
    full = (*shape, config.kv_heads, config.head_width)
    if stacked:
        return _zeros((config.layers, *full), dtype)
    return tuple(_zeros(full, dtype).arranged(head_major) for _ in range(config.layers))


def _zeros(shape: tuple[int, ...], dtype: DTypeLike) -> KV:
    both = (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    if jnp.dtype(dtype) != jnp.int8:
        return KV(*both)
    each = (*shape[:-1], 1)
    return KV(*both, jnp.ones(each, jnp.float32), jnp.ones(each, jnp.float32))


def quantize_part(part: KV) -> KV:
    """The same keys and values in int8, each token's of each head with a scale of its own.

    By the largest magnitude of its C entries, so that none is off by more than half a scale.
    """
    if part.is_quantized:
        return part
    keys, values = (quantize_array(held, (-1,)) for held in (part.keys, part.values))
    return KV(keys.values, values.values, keys.scales, values.scales)


def any_layer(part: LayersKV) -> KV:
    """A layer of a part, or the stack of all: what holds of it holds of every layer."""
    return part if isinstance(part, KV) else part[0]


def part_dtype(part: LayersKV) -> jnp.dtype:
    """What a part's keys and values are kept as; int8 where they are quantised."""
    return any_layer(part).keys.dtype


def empty_cache(
    config: ModelConfig,
    *,
    slots: int,
    hypotheses: int,
    prefix_capacity: int,
    committed_capacity: int,
    dtype: DTypeLike,
    stacked: bool,
    head_major: bool = False,
    placement: Placement = ON_ONE_DEVICE,
) -> KVCache:
    """A cache of zeros with room for prefix_capacity + committed_capacity tokens a hypothesis."""
    empty = partial(empty_part, config, dtype=dtype, stacked=stacked, head_major=head_major)
    return KVCache(
        prefix=empty((slots, prefix_capacity)),
        committed=empty((slots, hypotheses, committed_capacity)),
        prefix_length=jnp.zeros((slots,), jnp.int32),
        committed_length=jnp.zeros((slots, hypotheses), jnp.int32),
        placement=placement,
    )


def cache_axes(cache: KVCache) -> KVCache:
    """The logical axes of a cache's arrays, in its own structure."""
    stacked = isinstance(cache.prefix, KV)

    def part(layers: LayersKV, *axes: str) -> LayersKV:
        layer = any_layer(layers)
        names = (*(("layers",) if stacked else ()), *axes, "kv_heads", "head_width")
        scales = (*names[:-1], None) if layer.is_quantized else None

        def of_entries(old: Any, axis: int) -> Any:
            *others, entry, heads, width = old
            ends = {-1: (heads, width, entry), -2: (heads, entry, width)}
            return (*others, *ends.get(axis, (entry, heads, width)))

        named: Any = {"keys": names, "values": names, "key_scales": scales, "value_scales": scales}
        kv = replace(layer, **named).map(of_entries)
        return kv if isinstance(layers, KV) else (kv,) * len(layers)

    return replace(
        cache,
        prefix=part(cache.prefix, "slots", "prefix"),
        committed=part(cache.committed, "slots", "hypotheses", "committed"),
        prefix_length=("slots",),  # type: ignore[arg-type]
        committed_length=("slots", "hypotheses"),  # type: ignore[arg-type]
    )


def write_committed(committed: KV, new: KV, start: Int[Array, "P W"]) -> KV:
    """Write n entries of each hypothesis from its own start; what would pass T is dropped.

    Args:
        committed: The committed part of a layer.
        new: The entries, [P, W, n, G, C], in their usual order.
        start: int32 [P, W].
    """
    slots, hypotheses, count = new.keys.shape[:3]
    index = start[:, :, None] + jnp.arange(count)
    slot = jnp.arange(slots)[:, None, None]
    hypothesis = jnp.arange(hypotheses)[None, :, None]

    def write(committed: Array, new: Array, axis: int) -> Array:
        place = (slot, hypothesis, *(slice(None),) * (axis + 3), index)
        return committed.at[place].set(
            new, mode="drop", unique_indices=True, indices_are_sorted=True
        )

    return committed.map(write, new)


def commit_chunk(
    cache: KVCache,
    chunk: LayersKV | None,
    *,
    parents: Int[Array, "P W"] | None,
    rows: Int[Array, "P W"],
    count: int,
) -> KVCache:
    """The cache of the kept hypotheses: each parent's response, then its kept row's chunk.

    parents names the old hypothesis of each new one (None: every one is its own, nothing moves);
    rows the successor of which the first `count` entries of chunk [P, R, ., G, C] are appended.
    The prefix is untouched.
    """
    lengths, committed = cache.committed_length, cache.committed
    if parents is not None:
        lengths = jnp.take_along_axis(lengths, parents, axis=1)
        committed = _follow(committed, parents, jnp.max(lengths))

    def take(written: Array, axis: int) -> Array:
        first = jax.lax.slice_in_dim(written, 0, count, axis=written.ndim + axis)
        kept = jnp.take_along_axis(first, rows[:, :, None, None, None], axis=1)
        return jnp.moveaxis(kept, axis, -3)

    def append(committed: KV, written: KV) -> KV:
        kept = replace(written.map(take), head_major=False)
        return write_committed(committed, kept, lengths)

    if chunk is not None and count:
        if isinstance(committed, KV):
            assert isinstance(chunk, KV)
            committed = _layer_by_layer(append, committed, chunk)
        else:
            assert isinstance(chunk, tuple)
            committed = tuple(map(append, committed, chunk))
    return replace(cache, committed=committed, committed_length=lengths + count)


def _follow(committed: LayersKV, parents: Int[Array, "P W"], longest: Int[Array, ""]) -> LayersKV:
    """Every hypothesis's entries replaced by its parent's, of which none has more than `longest`.

    In place, some entries of all after the others: moved at once, all would be held twice, and on a
    CPU the pages of that copy would take longer than the copying.
    """

    def move(held: Array, axis: int, start: Int[Array, ""] | int, size: int) -> Array:
        old = jax.lax.dynamic_slice_in_dim(held, start, size, axis)
        stacked = (1,) * (held.ndim - 5)
        new = jnp.take_along_axis(old, parents.reshape(*stacked, *parents.shape, 1, 1, 1), axis=-4)
        return jax.lax.dynamic_update_slice_in_dim(held, new, start, axis)

    def block(committed: LayersKV, start: Int[Array, ""] | int, size: int) -> LayersKV:
        apply = partial(move, start=start, size=size)
        if isinstance(committed, KV):
            return committed.map(apply)
        return tuple(layer.map(apply) for layer in committed)

    blocks, left = divmod(any_layer(committed).room, MOVED)
    if blocks:
        used = jnp.minimum(blocks, -(-longest // MOVED))
        step = lambda index, committed: block(committed, index * MOVED, MOVED)  # noqa: E731
        committed = jax.lax.fori_loop(0, used, step, committed)
    return block(committed, blocks * MOVED, left) if left else committed


def _layer_by_layer(append: Callable[[KV, KV], KV], stack: KV, chunk: KV) -> KV:
    """`append` on a stack of layers, one after another and in place."""

    def body(index: Array, stack: KV) -> KV:
        layers = jax.tree.map(partial(take_layer, index=index), (stack, chunk))
        return put_layer(stack, append(*layers), index)

    return jax.lax.fori_loop(0, stack.keys.shape[0], body, stack)


def take_layer(stack: Array, index: Array) -> Array:
    """One layer's array of a stack of them."""
    return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)


def put_layer(stack: KV, layer: KV | None, index: Array) -> KV:
    """A stack of layers with one of them in its place, which inside jit changes no other."""
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, index, 0), stack, layer
    )
