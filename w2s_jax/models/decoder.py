"""The decoder: thin Flax linen modules told everything by their ModelConfig, and whole sequences.

The modules declare each parameter once: shape, logical axes and initialiser, from which the table
in `parameters.py` is read. One block serves training, prefill, token steps and scoring; what its
queries attend to is a function that it is given. Passes over a search's cache are in `forward.py`.

Parameters lie in one of two layouts. A subtree for each layer is quick to decode on a CPU or a
single device: GPT-2-124M in float32, 16 rows, on 2 cores, makes 247 tokens/s so, and 54 with its
layers stacked under a scan. Stacked on a leading axis, layers are compiled once for all of them,
and a gradient can recompute each. Of layers apart, the matrices may be kept output-major, which
CPUs multiply with few rows more than twice as fast (`ops.layers.OutputMajor`).

Matmuls are in the parameters' dtype; norms, rotary angles, softmax and logits in float32. Scores
are small differences of two models' log-probs, of which rounding to bfloat16 would leave little.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from w2s_jax.models.cache import KV, LayersKV
from w2s_jax.models.config import ModelConfig, layer_ropes, layer_windows
from w2s_jax.ops.attention import rotate, rotation
from w2s_jax.ops.experts import AXES, ExpertWeight, mixture, route
from w2s_jax.ops.layers import (
    OutputMajor,
    QTensor,
    Weight,
    choose,
    dot,
    layer_norm,
    rms_norm,
    take_rows,
)
from w2s_jax.ops.sequences import Reach, attend_sequence
from w2s_jax.ops.sharding import ON_ONE_DEVICE, Axes, Placement

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
NORMAL, ZEROS = nn.initializers.normal(0.02), nn.initializers.zeros

Turn = tuple[Array, Array] | None
"""Cosines and sines of the rotary angles; None where positions are learned."""

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""query [P W M H C], key, value [P W M G C] → mixed [P W M H C], and what its layer hands on."""

Remat = Literal["none", "full", "dots"]
"""What a backward pass computes anew in every layer: nothing, all, or all but the matmuls.

XLA's CPU compiler merges it again with the forward pass unless the layers are stacked.
"""

_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _declare(
    module: Any, name: str, initialise: Callable[..., Array], axes: Axes, shape: tuple[int, ...]
) -> Any:
    """A parameter of a module: the one place where its shape, axes and initialiser are said."""
    if isinstance(held := module.get_variable("params", name), OutputMajor):
        return held  # of another shape inside, which Flax would refuse
    boxed = nn.with_logical_partitioning(initialise, axes)
    return module.param(name, boxed, shape, module.dtype)


class Linear(nn.Module):
    """Contracts the last `contract` axes of x with the kernel's first ones.

    The kernel may be a QTensor (`quantize.py`), or kept output-major (`parameters.py`), or both.
    Where the parameters hold an adapter beside it
    (`lora.py`) its product is added; its dropout acts only in calls with a "dropout" key.
    """

    shape: tuple[int, ...]
    axes: Axes
    contract: int = 1
    bias: bool = False
    dtype: DTypeLike = jnp.float32
    placement: Placement = ON_ONE_DEVICE

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = _declare(self, "kernel", NORMAL, self.axes, self.shape)
        out = dot(x, self._gathered(kernel), self.contract)
        if self.bias:
            outputs = slice(self.contract, None)
            out = out + _declare(self, "bias", ZEROS, self.axes[outputs], self.shape[outputs])
        if self.has_variable("params", "lora_a"):
            out = out + self._low_rank(x)
        return out

    def _gathered(self, kernel: Weight) -> Weight:
        if isinstance(kernel, OutputMajor):
            return kernel
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
    """The config's norm over the last axes, as many as are named."""

    config: ModelConfig
    axes: tuple[str, ...] = ("embed",)
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, shape = self.config, x.shape[x.ndim - len(self.axes) :]
        flat, epsilon = x.reshape(*x.shape[: x.ndim - len(shape)], -1), config.norm_epsilon

        def vector(name: str, start: Callable[..., Array]) -> Array:
            if config.norm == "layer_plain":
                return start(None, flat.shape[-1:])
            return _declare(self, name, start, self.axes, shape).reshape(-1)

        scale = vector("scale", nn.initializers.constant(1.0 - config.norm_offset))
        if config.norm == "rms":
            normed = rms_norm(flat, scale, epsilon=epsilon, offset=config.norm_offset)
        else:
            normed = layer_norm(flat, scale, vector("bias", ZEROS), epsilon=epsilon)
        return normed.reshape(x.shape)


class Attention(nn.Module):
    """Self-attention: the new tokens' query, key and value, to be mixed by `attend`."""

    config: ModelConfig
    dtype: DTypeLike
    placement: Placement = ON_ONE_DEVICE

    @nn.compact
    def __call__(self, x: Array, turn: Turn, attend: Attend) -> tuple[Array, Any]:
        config = self.config
        linear: Any = partial(Linear, dtype=self.dtype, placement=self.placement)

        def project(name: str, heads: int, axis: str) -> Array:
            shape, axes = (config.width, heads, config.head_width), ("embed", axis, "head_width")
            return linear(shape, axes, bias=config.qkv_bias, name=name)(x)

        query = project("query", config.heads, "heads")
        key = project("key", config.kv_heads, "kv_heads")
        value = project("value", config.kv_heads, "kv_heads")
        if config.query_key_norm != "none":
            own = slice(int(config.query_key_norm == "head"), None)
            query_axes, key_axes = ("heads", "head_width")[own], ("kv_heads", "head_width")[own]
            query = Norm(config, query_axes, self.dtype, name="query_norm")(query)
            key = Norm(config, key_axes, self.dtype, name="key_norm")(key)
        if config.qkv_clip is not None:
            bounds = -config.qkv_clip, config.qkv_clip
            query, key, value = (jnp.clip(x, *bounds) for x in (query, key, value))
        if turn is not None:
            query, key = rotate(query, *turn), rotate(key, *turn)
        mixed, kept = attend(query, key, value)
        shape = (config.heads, config.head_width, config.width)
        axes = ("heads", "head_width", "embed")
        out = linear(shape, axes, contract=2, bias=config.out_bias, name="out")
        return out(mixed.astype(x.dtype)), kept


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
        linear: Any = partial(
            Linear, bias=config.mlp_bias, dtype=self.dtype, placement=self.placement
        )

        # A gradient keeps what goes into the activation and nothing of what is inside it.
        @jax.checkpoint
        def activate(gate: Array, *up: Array) -> Array:
            return activation(gate) * up[0] if up else activation(gate)

        names = ("gate", "up") if config.gated_mlp else ("up",)
        wide = [linear(into, ("embed", "mlp"), name=name)(x) for name in names]
        return linear(out, ("mlp", "embed"), name="down")(activate(*wide))


class Experts(nn.Module):
    """The MLPs of a mixture, of which each token is read by those that were chosen for it."""

    config: ModelConfig
    dtype: DTypeLike
    placement: Placement = ON_ONE_DEVICE

    @nn.compact
    def __call__(self, x: Array, weights: Array, chosen: Array) -> Array:
        config, placement = self.config, self.placement
        into = (config.experts, config.width, config.mlp_width)
        kernels = {
            name: ExpertKernel(
                into if name != "down" else (into[0], into[2], into[1]),
                AXES[name],
                self.dtype,
                placement,
                name=name,
            )()
            for name in AXES
        }
        if self.is_initializing():
            return x
        activation = ACTIVATIONS[config.activation]
        return mixture(x, weights, chosen, kernels, activation, placement)


class ExpertKernel(nn.Module):
    """The kernels of a projection, one for each expert, which may be a QTensor."""

    shape: tuple[int, ...]
    axes: Axes
    dtype: DTypeLike
    placement: Placement

    @nn.compact
    def __call__(self) -> ExpertWeight:
        gather = partial(self.placement.gather_axis, axes=self.axes, axis="embed")
        kernel = _declare(self, "kernel", NORMAL, self.axes, self.shape)
        if isinstance(kernel, QTensor):
            kernel = replace(kernel, values=gather(kernel.values))
        else:
            kernel = gather(kernel)
        names = ("lora_a", "lora_b", "lora_scale")
        return ExpertWeight(kernel, *(self.get_variable("params", name) for name in names))


class Mixture(nn.Module):
    """Experts in an MLP's place, and the router that chooses among them, in float32."""

    config: ModelConfig
    dtype: DTypeLike
    placement: Placement = ON_ONE_DEVICE

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        place: Any = {"dtype": self.dtype, "placement": self.placement}
        router = Linear((config.width, config.experts), ("embed", None), **place, name="router")
        every, weights, chosen = route(
            router(x.astype(jnp.float32)),
            config.experts_per_token,
            normalised=config.normalised_experts,
        )
        self.sow("routing", "chosen", (every, chosen))
        return Experts(config, **place, name="experts")(x, weights, chosen)


class Block(nn.Module):
    """One decoder layer: attention and MLP added to the stream, normed as the config says."""

    config: ModelConfig
    dtype: DTypeLike
    placement: Placement = ON_ONE_DEVICE

    @nn.compact
    def __call__(self, x: Array, turn: Turn, attend: Attend) -> tuple[Array, Any]:
        config, where = self.config, self.config.norm_placement
        norm: Any = partial(Norm, config, dtype=self.dtype)

        def read(name: str) -> Array:
            return norm(name=f"{name}_norm")(x) if where in ("pre", "sandwich") else x

        def add(name: str, mixed: Array) -> Array:
            if where in ("sandwich", "branch"):
                after = f"post_{name}_norm" if where == "sandwich" else f"{name}_norm"
                mixed = norm(name=after)(mixed)
            mixed = mixed if config.residual_multiplier == 1 else mixed * config.residual_multiplier
            return norm(name=f"{name}_norm")(x + mixed) if where == "residual" else x + mixed

        attention = Attention(config, self.dtype, self.placement, name="attention")
        mixed, kept = attention(read("attention"), turn, attend)
        kind = MLP if config.experts == 1 else Mixture
        mlp = kind(config, self.dtype, self.placement, name="mlp")
        if config.parallel_residual:
            x = add("mlp", mlp(read("mlp")))
            return add("attention", mixed), kept
        x = add("attention", mixed)
        return add("mlp", mlp(read("mlp"))), kept


def initial_params(config: ModelConfig, key: Array, dtype: DTypeLike, scan_layers: bool) -> dict:
    """Random parameters, boxed with their logical axes (`flax.core.meta`).

    Call under `jax.eval_shape` for shapes and axes alone; `meta.unbox` strips the boxes.
    """
    keys = iter(jax.random.split(key, config.layers + 6))

    def embedding(axis: str, size: int, width: int) -> dict[str, Any]:
        draw = nn.with_logical_partitioning(NORMAL, (axis, "embed"))
        return {"embedding": draw(next(keys), (size, width), dtype)}

    def block(key: Array) -> dict:
        x = jnp.zeros((1, 1, 1, config.width), dtype)
        turn = turns_of(config, jnp.zeros((1, 1, 1), jnp.int32))[0]
        idle = lambda query, key, value: (query, None)  # noqa: E731
        return Block(config, dtype).init(key, x, turn, idle)["params"]

    params = {"embed": embedding("vocab", config.vocab_size, config.head_inputs)}
    if config.position == "learned":
        rows = config.max_positions + (config.position_offset or 0)
        params["positions"] = embedding("positions", rows, config.width)
    layer_keys = jnp.stack([next(keys) for _ in range(config.layers)])
    if scan_layers:
        params["layers"] = jax.tree.map(
            lambda box: box.add_axis(0, {nn.PARTITION_NAME: "layers"}),
            jax.vmap(block)(layer_keys),
            is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata),
        )
    else:
        params |= {f"layers_{i}": block(key) for i, key in enumerate(layer_keys)}
    example = jnp.zeros((1, config.width), dtype)
    last = Norm(config, dtype=dtype).init(next(keys), example)
    if last and config.norm_placement != "residual":
        params["final_norm"] = last["params"]

    def linear(inputs: int, outputs: int, axes: Axes) -> dict[str, Any]:
        given = jnp.zeros((1, inputs), dtype)
        return Linear((inputs, outputs), axes, dtype=dtype).init(next(keys), given)["params"]

    narrow = config.head_inputs
    if config.embed_width is not None:
        params["project_in"] = linear(narrow, config.width, (None, "embed"))
        params["project_out"] = linear(config.width, narrow, ("embed", None))
    if not config.tied_embeddings:
        params["head"] = linear(narrow, config.vocab_size, ("embed", "vocab"))
    return params


def embed(
    config: ModelConfig, params: dict, tokens: Int[Array, "P W M"], positions: Int[Array, "P W M"]
) -> Float[Array, "P W M D"]:
    """Token (and learned position) embeddings, in the parameters' dtype."""
    table = params["embed"]["embedding"]
    x = take_rows(table, tokens)
    if config.embedding_multiplier != 1.0:
        x = x * jnp.asarray(config.embedding_multiplier, table.dtype)
    if config.embed_width is not None:
        x = dot(x, params["project_in"]["kernel"])
    if config.position == "learned":
        x = x + params["positions"]["embedding"][positions + (config.position_offset or 0)]
    return x


def turns_of(config: ModelConfig, positions: Int[Array, "P W M"]) -> tuple[Turn, ...]:
    """The rotary angles of these positions by each of the `layer_ropes`, once for all layers."""
    if config.position != "rotary":
        return (None,)
    return tuple(rotation(positions, rope, config.rotated) for rope in layer_ropes(config)[0])


def final_norm(config: ModelConfig, params: dict, x: Float[Array, "*rows D"]) -> Array:
    """The states that the head reads, of those behind the last layer."""
    if config.norm_placement != "residual":
        x = Norm(config).apply({"params": params.get("final_norm", {})}, x)
    return x if config.embed_width is None else dot(x, params["project_out"]["kernel"])


def logits(
    config: ModelConfig, params: dict, hidden: Float[Array, "*rows D"]
) -> Float[Array, "*rows V"]:
    """Float32 logits of hidden states, soft-capped where the config says so."""
    if config.tied_embeddings:
        out = dot(hidden, params["embed"]["embedding"], transposed=True, dtype=jnp.float32)
    else:
        out = dot(hidden, params["head"]["kernel"], dtype=jnp.float32)
    if config.logit_divisor != 1:
        out = out / config.logit_divisor
    if config.final_softcap is not None:
        out = config.final_softcap * jnp.tanh(out / config.final_softcap)
    return out


def attention_scale(config: ModelConfig) -> float | int:
    """The factor on query·key."""
    return config.head_width**-0.5 if config.attention_scale is None else config.attention_scale


def read_sequences(
    config: ModelConfig,
    params: dict,
    tokens: Int[Array, "B X"],
    *,
    mask: Bool[Array, "B X"] | None = None,
    segments: Int[Array, "B X"] | None = None,
    remat: Remat = "none",
    key: Array | None = None,
    placement: Placement = ON_ONE_DEVICE,
) -> tuple[Float[Array, "B X D"], LayersKV]:
    """Read whole sequences, every token seeing itself and what stands before it.

    Args:
        config: The decoder's.
        params: Its parameters, in either layout.
        tokens: Token ids.
        mask: False on padding, which is then neither seen nor counted.
        segments: In its stead, numbers of the documents packed in a row: a token sees its own
            segment alone, and its position counts from the segment's first token.
        remat: What a gradient of this pass recomputes.
        key: Switches dropout on; each layer draws from its own fold.
        placement: That of the parameters, which states, and gradients, follow.

    Returns:
        The states after the last norm, and all tokens' keys and values, [B X G C] a layer.
    """
    tokens = tokens[:, None]  # one hypothesis a row
    mask, segments = (None if rows is None else rows[:, None] for rows in (mask, segments))
    positions = _positions(tokens, mask, segments)
    windows, window_of = layer_windows(config)
    x = placement.spread_lookup(embed(config, params, tokens, positions), "embed")
    turns, (_, rope_of) = turns_of(config, positions), layer_ropes(config)
    block = Block(config, x.dtype, placement)

    def apply(params: dict, x: Array, turns: Any, rope: Any, reach: Reach, key: Any) -> Any:
        attend = partial(_attend_sequence, config, reach)
        rngs = None if key is None else {"dropout": key}
        x, kv = block.apply({"params": params}, x, choose(turns, rope), attend, rngs=rngs)
        return placement.spread(x), kv

    scanned = "layers" in params
    if remat != "none":
        # In a scan nothing can be merged with the forward pass, and the guard would cost copies.
        apply = jax.checkpoint(apply, policy=_POLICIES[remat], prevent_cse=not scanned)

    kv: LayersKV

    def fold(layer: int | Array) -> Array | None:
        return None if key is None else jax.random.fold_in(key, layer)

    if scanned:
        every = Reach(windows, None, mask, segments, placement)

        def body(carry: tuple[Array, Array], layer: tuple[dict, Array, Array]) -> tuple[Any, KV]:
            (x, index), (layer_params, window, rope) = carry, layer
            reach = replace(every, chosen=window) if len(windows) > 1 else every
            x, kv = apply(layer_params, x, turns, rope, reach, fold(index))
            return (x, index + 1), kv

        scan = (params["layers"], jnp.asarray(window_of), jnp.asarray(rope_of))
        (x, _), kv = jax.lax.scan(body, (x, jnp.zeros((), jnp.int32)), scan)
    else:
        layers, apply = [], jax.jit(apply)  # those alike are traced and lowered once
        for i in range(config.layers):
            reach = Reach((windows[window_of[i]],), None, mask, segments, placement)
            x, own = apply(params[f"layers_{i}"], x, (turns[rope_of[i]],), None, reach, fold(i))
            layers.append(own)
        kv = tuple(layers)
    return final_norm(config, params, x)[:, 0], kv


def _attend_sequence(
    config: ModelConfig, reach: Reach, query: Array, key: Array, value: Array
) -> tuple[Array, KV]:
    options: Any = {"scale": attention_scale(config), "softcap": config.attention_softcap}
    mixed = attend_sequence(query, key, value, reach, **options)
    return mixed, KV(key[:, 0], value[:, 0])


def _positions(tokens: Array, mask: Array | None, segments: Array | None) -> Array:
    """Positions of the tokens of whole sequences."""
    index = jnp.arange(tokens.shape[-1], dtype=jnp.int32)
    if segments is not None:
        first = segments != jnp.roll(segments, 1, axis=-1)
        starts = jax.lax.cummax(jnp.where(first, index, 0), axis=segments.ndim - 1)
        return (index - starts).astype(jnp.int32)
    if mask is not None:
        return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0).astype(jnp.int32)
    return jnp.broadcast_to(index, tokens.shape)
