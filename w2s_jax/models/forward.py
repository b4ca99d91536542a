"""The whole decoder: embeddings, the stack of blocks in either layout, the head, the parameters.

Pure functions of (config, params, tokens, caches). The user's value is in `model.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from w2s_jax.models.cache import KV, KVCache, LayersKV
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.decoder import Block, LayerKV, Layout, Linear, Norm, Stacked, View
from w2s_jax.ops.quantized import dot, take_rows
from w2s_jax.ops.rotary import rotation
from w2s_jax.ops.sequences import Reach
from w2s_jax.ops.sharding import ON_ONE_DEVICE, Placement
from w2s_jax.pytrees import pytree

Remat = Literal["none", "full", "dots"]
"""What a backward pass computes anew in every layer: nothing, all, or all but the matmuls.

XLA's CPU compiler merges it again with the forward pass unless the layers are stacked.
"""

_FAR = 2**30
"""The window of layers without one, where others have one; more than any model's positions."""
_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@pytree()
class Forward:
    """The result of one pass.

    hidden [P, W, M, D]: states after the last norm. cache: with the stems committed (None without a
    cache). chunk: the branch tokens' keys and values, [P, R, L, G, C] a layer.
    """

    hidden: Array
    cache: KVCache | None
    chunk: LayersKV | None


def forward(
    config: ModelConfig,
    params: dict,
    tokens: Int[Array, "P W M"],
    layout: Layout,
    *,
    cache: KVCache | None = None,
    chunk: LayersKV | None = None,
    chunk_start: Int[Array, ""] | None = None,
    mask: Bool[Array, "P W M"] | None = None,
    segments: Int[Array, "P W M"] | None = None,
    remat: Remat = "none",
    key: Array | None = None,
    placement: Placement = ON_ONE_DEVICE,
) -> Forward:
    """Read M new tokens of every hypothesis, arranged as `layout`, behind what the caches hold.

    With `chunk` (a buffer [P, R, capacity, G, C] a layer) branch tokens are written at
    `chunk_start` and see the buffer up to themselves; without it they see one another causally.
    `mask` (only without a cache) is False on padding, which is then neither seen nor counted.
    `segments` (only without a cache, a mask and branches) numbers the documents packed in a row: a
    token sees its own segment alone, and its position counts from the segment's first token.
    `remat` says what a gradient of this pass recomputes; `key` switches dropout on, each layer
    drawing from its own fold. `placement` is that of the parameters: states of whole sequences, and
    gradients, follow it.
    """
    offsets = _offsets(layout, chunk_start)
    positions = _positions(tokens, offsets, cache, mask, segments)
    capacity = layout.length if chunk is None else _first(chunk).keys.shape[2]
    windows, _ = _windows(config)
    whole = cache is None and chunk is None
    view = View(
        masks=tuple(
            (None, None, Reach((window,), None, mask, segments, placement), None)
            if whole
            else (
                *_masks(window, positions, layout, cache, capacity, chunk_start),
                None if windows == (None,) else jnp.int32(window or _FAR),
            )
            for window in windows
        ),
        stem_start=None if cache is None else cache.committed_length,
        chunk_start=chunk_start,
        prefix_length=None if cache is None else cache.prefix_length,
        offsets=offsets,
    )
    held = ON_ONE_DEVICE
    if cache is not None:
        placement, held = ON_ONE_DEVICE, cache.placement
    x = placement.spread_lookup(embed(config, params, tokens, positions), "embed")
    turn = None
    if config.position == "rotary":
        turn = rotation(positions, config.rope, config.head_width)
    run = _run_stacked if "layers" in params else _run_layers
    block = Block(config, layout, x.dtype, placement, held)
    apply = _block(block, remat, scanned="layers" in params)
    x, committed, chunk = run(config, params, x, turn, layout, cache, chunk, view, apply, key)
    hidden = Norm(config).apply({"params": params["final_norm"]}, x)
    if cache is not None:
        lengths = cache.committed_length + int(layout.stem)
        cache = replace(cache, committed=committed, committed_length=lengths)
    return Forward(hidden, cache, chunk)


def embed(
    config: ModelConfig, params: dict, tokens: Int[Array, "P W M"], positions: Int[Array, "P W M"]
) -> Float[Array, "P W M D"]:
    """Token (and learned position) embeddings, in the parameters' dtype."""
    table = params["embed"]["embedding"]
    x = take_rows(table, tokens)
    if config.embedding_multiplier != 1.0:
        x = x * jnp.asarray(config.embedding_multiplier, table.dtype)
    if config.position == "learned":
        x = x + params["positions"]["embedding"][positions]
    return x


def logits(
    config: ModelConfig, params: dict, hidden: Float[Array, "*rows D"]
) -> Float[Array, "*rows V"]:
    """Float32 logits of hidden states, soft-capped where the config says so."""
    if config.tied_embeddings:
        out = dot(hidden, params["embed"]["embedding"], transposed=True, dtype=jnp.float32)
    else:
        out = dot(hidden, params["head"]["kernel"], dtype=jnp.float32)
    if config.final_softcap is not None:
        out = config.final_softcap * jnp.tanh(out / config.final_softcap)
    return out


def initial_params(config: ModelConfig, key: Array, dtype: DTypeLike, scan_layers: bool) -> dict:
    """Random parameters, boxed with their logical axes (`flax.core.meta`).

    Call under `jax.eval_shape` for shapes and axes alone; `meta.unbox` strips the boxes.
    """
    keys = iter(jax.random.split(key, config.layers + 4))
    table = nn.initializers.normal(0.02)
    embedding = lambda axes, shape: nn.with_logical_partitioning(table, axes)(  # noqa: E731
        next(keys), shape, dtype
    )
    params = {
        "embed": {"embedding": embedding(("vocab", "embed"), (config.vocab_size, config.width))}
    }
    if config.position == "learned":
        shape = (config.max_positions, config.width)
        params["positions"] = {"embedding": embedding(("positions", "embed"), shape)}
    layer_keys = jnp.stack([next(keys) for _ in range(config.layers)])
    if scan_layers:
        stacked = jax.vmap(lambda k: _initial_block(config, k, dtype))(layer_keys)
        params["layers"] = jax.tree.map(
            lambda box: box.add_axis(0, {nn.PARTITION_NAME: "layers"}),
            stacked,
            is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata),
        )
    else:
        for i in range(config.layers):
            params[f"layers_{i}"] = _initial_block(config, layer_keys[i], dtype)
    example = jnp.zeros((1, config.width), dtype)
    params["final_norm"] = Norm(config, dtype=dtype).init(next(keys), example)["params"]
    if not config.tied_embeddings:
        head = Linear((config.width, config.vocab_size), ("embed", "vocab"), dtype=dtype)
        params["head"] = head.init(next(keys), example)["params"]
    return params


def _initial_block(config: ModelConfig, key: Array, dtype: DTypeLike) -> dict:
    layout = Layout(False, 1, 1)
    x = jnp.zeros((1, 1, 1, config.width), dtype)
    turn = None
    if config.position == "rotary":
        turn = rotation(jnp.zeros((1, 1, 1), jnp.int32), config.rope, config.head_width)
    masks = (None, None, jnp.ones((1, 1, 1, 1), bool), None)
    view, kv = View((masks,)), LayerKV(None, None, None)
    return Block(config, layout, dtype).init(key, x, turn, kv, masks, view)["params"]


def _block(block: Block, remat: Remat, *, scanned: bool) -> Callable[..., tuple[Array, Any]]:
    """(layer's params, x, turn, kv, masks, view, dropout key or None) -> (x, kv)."""

    def apply(
        params: dict,
        x: Array,
        turn: tuple[Array, Array] | None,
        kv: LayerKV,
        masks: tuple,
        view: View,
        key: Array | None,
    ) -> tuple[Array, LayerKV]:
        rngs = None if key is None else {"dropout": key}
        x, kv = block.apply({"params": params}, x, turn, kv, masks, view, rngs=rngs)
        return block.placement.spread(x), kv

    if remat == "none":
        return apply
    # Inside a scan nothing can be merged with the forward pass, and the guard would cost copies.
    return jax.checkpoint(apply, policy=_POLICIES[remat], prevent_cse=not scanned)


def _fold(key: Array | None, layer: int | Array) -> Array | None:
    return None if key is None else jax.random.fold_in(key, layer)


def _windows(config: ModelConfig) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
    """The distinct sliding windows, and for every layer the index of its own among them."""
    windows = config.sliding_windows or (None,) * config.layers
    distinct = tuple(dict.fromkeys(windows))
    return distinct, tuple(distinct.index(window) for window in windows)


def _run_layers(
    config: ModelConfig,
    params: dict,
    x: Array,
    turn: tuple[Array, Array] | None,
    layout: Layout,
    cache: KVCache | None,
    chunk: Any,
    view: View,
    apply: Callable[..., tuple[Array, Any]],
    key: Array | None,
) -> tuple[Array, Any, Any]:
    prefix: Any = None if cache is None else cache.prefix
    old: Any = None if cache is None else cache.committed
    committed, chunks = [], []
    _, window_of = _windows(config)
    for i in range(config.layers):
        kv = LayerKV(
            None if prefix is None else prefix[i],
            None if old is None else old[i],
            None if chunk is None else chunk[i],
        )
        masks = view.masks[window_of[i]]
        x, kv = apply(params[f"layers_{i}"], x, turn, kv, masks, view, _fold(key, i))
        committed.append(kv.committed)
        chunks.append(kv.chunk)
    return x, _present(committed), _present(chunks)


def _present(parts: list[KV | None]) -> tuple[KV, ...] | None:
    """The layers' parts, or None where the call has no such part."""
    held = tuple(part for part in parts if part is not None)
    return held or None


def _run_stacked(
    config: ModelConfig,
    params: dict,
    x: Array,
    turn: tuple[Array, Array] | None,
    layout: Layout,
    cache: KVCache | None,
    chunk: Any,
    view: View,
    apply: Callable[..., tuple[Array, Any]],
    key: Array | None,
) -> tuple[Array, Any, Any]:
    """Scan over stacked layers; parts that are written ride in the carry and change in place.

    Writing a cache through scanned inputs and outputs would cost a full extra copy of it.
    """
    committed: Any = None if cache is None else cache.committed
    whole: Any = None if cache is None else cache.prefix
    carried = (committed if layout.stem else None, chunk)
    scanned = (
        params["layers"],
        whole,
        None if layout.stem else committed,
        jnp.asarray(_windows(config)[1], jnp.int32),
    )

    def body(carry: tuple, layer: tuple) -> tuple[tuple, KV | None]:
        x, (stems, buffer), index = carry
        layer_params, prefix, read, window = layer
        kv = LayerKV(
            prefix,
            read if stems is None else _at(stems, index),
            None if buffer is None else _at(buffer, index),
            None if cache is None else Stacked(whole, stems or committed, index),
        )
        masks = _choose(view.masks, window)
        x, kv = apply(layer_params, x, turn, kv, masks, view, _fold(key, index))
        fresh = kv.chunk if buffer is None else None
        stems = None if stems is None else _put(stems, kv.committed, index)
        buffer = None if buffer is None else _put(buffer, kv.chunk, index)
        return (x, (stems, buffer), index + 1), fresh

    start = (x, carried, jnp.zeros((), jnp.int32))
    (x, (stems, buffer), _), fresh = jax.lax.scan(body, start, scanned)
    return x, committed if stems is None else stems, fresh if buffer is None else buffer


def _at(stack: KV, index: Array) -> KV:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), stack)


def _put(stack: KV, layer: KV, index: Array) -> KV:
    return jax.tree.map(
        lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, index, 0), stack, layer
    )


def _choose(masks: tuple, window: Array) -> tuple:
    if len(masks) == 1:
        return masks[0]

    def pick(part: tuple[Any, ...]) -> Array | Reach | None:
        choices = [choice for choice in part if choice is not None]
        if not choices:
            return None
        if isinstance(choices[0], Reach):
            windows = tuple(one for choice in choices for one in choice.windows)
            return replace(choices[0], windows=windows, chosen=window)
        shape = jnp.broadcast_shapes(*(choice.shape for choice in choices))
        return jnp.stack([jnp.broadcast_to(choice, shape) for choice in choices])[window]

    return tuple(pick(part) for part in zip(*masks, strict=True))


def _first(chunk: LayersKV) -> KV:
    """One layer's chunk, or the stacked chunk without its layer axis's extent counted."""
    if isinstance(chunk, KV):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), chunk)
    return chunk[0]


def _offsets(layout: Layout, chunk_start: Array | None) -> Array:
    """How far the new tokens [M] stand behind what a cache holds."""
    stem = int(layout.stem)
    steps = jnp.arange(layout.length) + stem + (0 if chunk_start is None else chunk_start)
    offsets = [jnp.zeros(stem, jnp.int32), jnp.tile(steps, layout.successors)]
    return jnp.concatenate(offsets).astype(jnp.int32)


def _positions(
    tokens: Array,
    offsets: Array,
    cache: KVCache | None,
    mask: Array | None,
    segments: Array | None,
) -> Array:
    """Absolute positions [P, W, M] of the new tokens."""
    if segments is not None:
        index = jnp.arange(segments.shape[-1], dtype=jnp.int32)
        first = segments != jnp.roll(segments, 1, axis=-1)
        starts = jax.lax.cummax(jnp.where(first, index, 0), axis=segments.ndim - 1)
        return (index - starts).astype(jnp.int32)
    if mask is not None:
        return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0).astype(jnp.int32)
    base = jnp.zeros(tokens.shape[:2], jnp.int32)
    if cache is not None:
        base = cache.prefix_length[:, None] + cache.committed_length
    return (base[:, :, None] + offsets).astype(jnp.int32)


def _masks(
    window: int | None,
    positions: Array,
    layout: Layout,
    cache: KVCache | None,
    capacity: int,
    chunk_start: Array | None,
) -> tuple[Array | None, Array | None, Array | None]:
    """True where a new token sees a key: prefix [P,1,·,S], committed [P,W,·,T], chunk [·,·,L,J]."""
    prefix = committed = chunk = None
    if cache is not None:
        prefix_keys, committed_keys = _capacities(cache)
        index = jnp.arange(prefix_keys)
        prefix = (index < cache.prefix_length[:, None])[:, None, None, :]
        if window is not None:
            queries = positions.reshape(positions.shape[0], 1, -1, 1)
            prefix = prefix & (index > queries - window)
        index = jnp.arange(committed_keys)
        limit = cache.committed_length + int(layout.stem)
        committed = (index < limit[:, :, None])[:, :, None, :]
        if window is not None:
            keys = cache.prefix_length[:, None, None, None] + index
            committed = committed & (keys > positions[..., None] - window)
    if layout.successors * layout.length:
        query = jnp.arange(layout.length)[:, None] + (0 if chunk_start is None else chunk_start)
        key = jnp.arange(capacity)
        chunk = key <= query
        if window is not None:
            chunk = chunk & (key > query - window)
        chunk = chunk[None, None]
    return prefix, committed, chunk


def _capacities(cache: KVCache) -> tuple[int, int]:
    """S and T, the capacities of the prefix and committed parts."""
    if isinstance(cache.prefix, KV):
        return cache.prefix.keys.shape[2], cache.committed.keys.shape[3]  # type: ignore[union-attr]
    return cache.prefix[0].keys.shape[1], cache.committed[0].keys.shape[2]  # type: ignore[index]
