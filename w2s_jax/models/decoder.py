"""The decoder's layers as thin Flax linen modules, told everything by their ModelConfig.

One block serves training, prefill, token steps and scoring; `Layout` says which new tokens share
keys. Running the whole stack is in `forward.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from w2s_jax.models.cache import KV, quantize_part, write_committed
from w2s_jax.models.config import ModelConfig
from w2s_jax.ops import attention, tpu
from w2s_jax.ops.norms import layer_norm, rms_norm
from w2s_jax.ops.quantized import QTensor, dot
from w2s_jax.ops.rotary import rotate
from w2s_jax.ops.sequences import Reach, attend_sequence
from w2s_jax.ops.sharding import ON_ONE_DEVICE, Placement
from w2s_jax.ops.tpu import parts_kernel
from w2s_jax.pytrees import pytree

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


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


@pytree()
class View:
    """What new tokens may see beside themselves, for all layers of one call.

    masks: for every distinct sliding window, one mask a part, in the order prefix, committed,
    chunk (None where that part is absent), and the window (None: there is none); whole sequences,
    which have no other part and no chunk buffer, have a Reach for the chunk's. stem_start [P, W] is
    where stems are written and how long the committed part was before, prefix_length [P] that of
    the prefix, offsets [M] how far new tokens stand behind both; chunk_start (a scalar) is where
    branch tokens are written in a chunk buffer.
    """

    masks: tuple[tuple[Array | None, Array | None, Array | Reach | None, Array | None], ...]
    stem_start: Array | None = None
    chunk_start: Array | None = None
    prefix_length: Array | None = None
    offsets: Array | None = None


@pytree()
class Stacked:
    """Two parts of all layers before new tokens are written, and the number of the layer that runs.

    A kernel reads them where they lie: a layer taken out for it would be a copy.
    """

    prefix: KV
    committed: KV
    layer: Array


@pytree()
class LayerKV:
    """One layer's keys and values of the three parts; None where a part is absent.

    stacked: what its prefix and committed part were taken from, where layers are stacked.
    """

    prefix: KV | None
    committed: KV | None
    chunk: KV | None
    stacked: Stacked | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether what is written to it is int8."""
        parts = (self.prefix, self.committed, self.chunk)
        return any(part is not None and part.is_quantized for part in parts)


class Linear(nn.Module):
    """Contracts the last `contract` axes of x with the kernel's first ones.

    The kernel may be a QTensor (`models/quantize.py`). Where the parameters hold an adapter beside
    it (`models/lora.py`) its product is added; its dropout acts only in calls that are given a
    "dropout" key.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    contract: int = 1
    bias: bool = False
    dtype: DTypeLike = jnp.float32
    placement: Placement = ON_ONE_DEVICE

    @nn.compact
    def __call__(self, x: Array) -> Array:
        initialise = nn.initializers.normal(0.02)
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(initialise, self.axes), self.shape, self.dtype
        )
        out = dot(x, self._gathered(kernel), self.contract)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[self.contract :])
            out = out + self.param("bias", zeros, self.shape[self.contract :], self.dtype)
        if self.has_variable("params", "lora_a"):
            out = out + self._low_rank(x)
        return out

    def _gathered(self, kernel: Array | QTensor) -> Array | QTensor:
        if isinstance(kernel, QTensor):
            return replace(kernel, values=self._gathered(kernel.values))
        return self.placement.gather_axis(kernel, self.axes, "embed")

    def _low_rank(self, x: Array) -> Array:
        a, b, scale, rate = (
            self.get_variable("params", f"lora_{name}") for name in ("a", "b", "scale", "dropout")
        )
        if self.has_rng("dropout"):
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - rate, x.shape)
            x = jnp.where(kept, x / (1.0 - rate).astype(x.dtype), 0)
        hidden = scale * jnp.tensordot(x, a.astype(x.dtype), axes=self.contract)
        return jnp.tensordot(hidden.astype(x.dtype), b.astype(x.dtype), axes=1)


class Norm(nn.Module):
    """The config's norm over the last axis."""

    config: ModelConfig
    axis: str = "embed"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, shape = self.config, (x.shape[-1],)
        start = nn.initializers.constant(1.0 - config.norm_offset)
        scale = self.param(
            "scale", nn.with_logical_partitioning(start, (self.axis,)), shape, self.dtype
        )
        if config.norm == "rms":
            return rms_norm(x, scale, epsilon=config.norm_epsilon, offset=config.norm_offset)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (self.axis,))
        bias = self.param("bias", zeros, shape, self.dtype)
        return layer_norm(x, scale, bias, epsilon=config.norm_epsilon)


class Attention(nn.Module):
    """Self-attention of the new tokens over prefix, committed response and chunk.

    held: where a cache lies.
    """

    config: ModelConfig
    layout: Layout
    dtype: DTypeLike
    placement: Placement = ON_ONE_DEVICE
    held: Placement = ON_ONE_DEVICE

    @nn.compact
    def __call__(
        self, x: Array, turn: tuple[Array, Array] | None, kv: LayerKV, masks: tuple, view: View
    ) -> tuple[Array, LayerKV]:
        config = self.config

        def project(name: str, heads: int, axis: str) -> Array:
            shape, axes = (config.width, heads, config.head_width), ("embed", axis, "head_width")
            options: Any = {"dtype": self.dtype, "placement": self.placement, "name": name}
            return Linear(shape, axes, bias=config.qkv_bias, **options)(x)

        query = project("query", config.heads, "heads")
        key = project("key", config.kv_heads, "kv_heads")
        value = project("value", config.kv_heads, "kv_heads")
        if config.query_key_norm:
            query = Norm(config, "head_width", self.dtype, name="query_norm")(query)
            key = Norm(config, "head_width", self.dtype, name="key_norm")(key)
        if turn is not None:
            query, key = rotate(query, *turn), rotate(key, *turn)
        new, before = KV(key, value), kv
        new = quantize_part(new) if kv.is_quantized else new
        kv = _extend(before, new, self.layout, view)
        mixed = _attend_by_kernel(
            query, before, new, kv.chunk, masks, view, self.layout, config, self.held
        )
        if mixed is None:
            mixed = _attend(query, kv, masks, self.layout, config, self.held)
        mixed = mixed.astype(x.dtype)
        shape = (config.heads, config.head_width, config.width)
        axes = ("heads", "head_width", "embed")
        options: Any = {"dtype": self.dtype, "placement": self.placement, "name": "out"}
        return Linear(shape, axes, contract=2, bias=config.out_bias, **options)(mixed), kv


def _extend(kv: LayerKV, new: KV, layout: Layout, view: View) -> LayerKV:
    """Put the stems' keys and values into the committed part, the branches' into the chunk."""
    committed, branches = kv.committed, None
    if layout.stem:
        start = _given(view.stem_start)
        stem = jax.tree.map(lambda x: x[:, :, :1], new)
        committed = jax.tree.map(partial(write_committed, start=start), committed, stem)
    if layout.successors * layout.length:
        branches = jax.tree.map(lambda x: _branches(x, layout), new)
        if kv.chunk is not None:
            start = _given(view.chunk_start)
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=2)
            branches = jax.tree.map(write, kv.chunk, branches)
    return LayerKV(kv.prefix, committed, branches)


def _given(start: Array | None) -> Array:
    assert start is not None, "a part that is written to needs the place to write at"
    return start


def _branches(x: Array, layout: Layout) -> Array:
    """[P, W, M, ...] without its stems, as rows [P, W·K, length, ...]."""
    slots, hypotheses = x.shape[:2]
    rows = hypotheses * layout.successors
    return x[:, :, int(layout.stem) :].reshape(slots, rows, layout.length, *x.shape[3:])


def _split(query: Array, placement: Placement) -> attention.Split:
    slots, heads = query.shape[0], query.shape[-2]
    return attention.Split(placement.parts("slots", slots), placement.parts("heads", heads))


def _scale(config: ModelConfig) -> float | int:
    return config.head_width**-0.5 if config.attention_scale is None else config.attention_scale


def _attend(
    query: Array,
    kv: LayerKV,
    masks: tuple,
    layout: Layout,
    config: ModelConfig,
    placement: Placement = ON_ONE_DEVICE,
) -> Array:
    scale, softcap = _scale(config), config.attention_softcap
    if isinstance(masks[2], Reach):
        assert kv.chunk is not None
        rows = _branches(query, layout)
        whole = attend_sequence(
            rows, kv.chunk.keys, kv.chunk.values, masks[2], scale=scale, softcap=softcap
        )
        return whole.reshape(query.shape)

    split = _split(query, placement)

    def attend(queries: Array, part: KV, mask: Array) -> attention.Partial:
        held = (part.keys, part.values, mask, part.key_scales, part.value_scales)
        options: Any = {"scale": scale, "softcap": softcap, "devices": split.devices}
        return attention.attend_in_blocks(queries, *held, **options)

    def of_slots(query: Array, held: tuple[LayerKV, tuple]) -> Array:
        return _attend_parts(query, *held, layout, attend).astype(query.dtype)

    return attention.in_turns(of_slots, query, (kv, masks[:3]), split)


def _attend_parts(
    query: Array,
    kv: LayerKV,
    masks: tuple,
    layout: Layout,
    attend: Callable[[Array, KV, Array], attention.Partial],
) -> Array:
    """Attention over what there is of prefix, committed response and chunk, float32."""
    slots, hypotheses, count = query.shape[:3]
    partials = []
    if kv.prefix is not None:
        shared = query.reshape(slots, 1, hypotheses * count, *query.shape[3:])
        prefix = attend(shared, jax.tree.map(lambda x: x[:, None], kv.prefix), masks[0])
        partials.append(prefix.reshape(slots, hypotheses, count))
    if kv.committed is not None:
        partials.append(attend(query, kv.committed, masks[1]))
    if kv.chunk is not None:
        rows = _branches(query, layout)
        own = attend(rows, kv.chunk, masks[2])
        own = own.reshape(slots, hypotheses, layout.successors * layout.length)
        if layout.stem:
            own = attention.concatenate([attention.unseen(query[:, :, :1]), own], axis=2)
        partials.append(own)
    return attention.merge(partials)


def _attend_by_kernel(
    query: Array,
    before: LayerKV,
    new: KV,
    chunk: KV | None,
    masks: tuple,
    view: View,
    layout: Layout,
    config: ModelConfig,
    placement: Placement,
) -> Array | None:
    """As `_attend`, by the kernel for chips that need one; None where it does not take the case.

    before: the parts before the new tokens are written; chunk: after.
    """
    if before.prefix is None or before.committed is None:
        return None
    split = _split(query, placement)
    keys = max(part.keys.shape[-3] for part in (before.prefix, before.committed))
    several = config.kv_heads // split.heads > 1
    in_blocks = several and attention.goes_in_blocks(query, keys, split)
    if not tpu.has_kernel(query.dtype, placement, in_blocks):
        return None
    stacked, window = before.stacked, None
    source: Any = before if stacked is None else stacked
    parts = (
        _as_part(source.prefix, before.prefix, _given(view.prefix_length)),
        _as_part(source.committed, before.committed, _given(view.stem_start)),
    )
    room = 0 if chunk is None else layout.successors * chunk.keys.shape[2]
    if not parts_kernel.takes(query, *parts, int(layout.stem) + room, placement):
        return None
    if masks[3] is not None:
        window = parts_kernel.Window(masks[3], _given(view.offsets))
    own, mask = _own(new, chunk, masks[2], layout, query.shape[1])
    if window is not None and layout.stem:
        mask = mask.at[:, 0].set(window.offsets < window.size)
    return parts_kernel.attend(
        query,
        *parts,
        own,
        mask,
        None if stacked is None else stacked.layer,
        window,
        scale=_scale(config),
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


class MLP(nn.Module):
    """The feed-forward layer, gated or plain."""

    config: ModelConfig
    dtype: DTypeLike
    placement: Placement = ON_ONE_DEVICE

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        activation = ACTIVATIONS[config.activation]
        into, out = (config.width, config.mlp_width), (config.mlp_width, config.width)

        # A gradient keeps what goes into the activation and nothing of what is inside it.
        @jax.checkpoint
        def activate(gate: Array, up: Array | None) -> Array:
            return activation(gate) if up is None else activation(gate) * up

        options: Any = {
            "bias": config.mlp_bias, "dtype": self.dtype, "placement": self.placement
        }  # fmt: skip

        def wide(name: str) -> Array:
            return Linear(into, ("embed", "mlp"), name=name, **options)(x)

        if config.gated_mlp:
            hidden = activate(wide("gate"), wide("up"))
        else:
            hidden = activate(wide("up"), None)
        return Linear(out, ("mlp", "embed"), name="down", **options)(hidden)


class Block(nn.Module):
    """One decoder layer: attention and MLP, each behind its norm and added to the stream."""

    config: ModelConfig
    layout: Layout
    dtype: DTypeLike
    placement: Placement = ON_ONE_DEVICE
    held: Placement = ON_ONE_DEVICE

    @nn.compact
    def __call__(
        self, x: Array, turn: tuple[Array, Array] | None, kv: LayerKV, masks: tuple, view: View
    ) -> tuple[Array, LayerKV]:
        config = self.config
        normed = Norm(config, dtype=self.dtype, name="attention_norm")(x)
        where = (self.placement, self.held)
        attention = Attention(config, self.layout, self.dtype, *where, name="attention")
        mixed, kv = attention(normed, turn, kv, masks, view)
        if config.post_norms:
            mixed = Norm(config, dtype=self.dtype, name="post_attention_norm")(mixed)
        x = x + mixed
        normed = Norm(config, dtype=self.dtype, name="mlp_norm")(x)
        mixed = MLP(config, self.dtype, self.placement, name="mlp")(normed)
        if config.post_norms:
            mixed = Norm(config, dtype=self.dtype, name="post_mlp_norm")(mixed)
        return x + mixed, kv
