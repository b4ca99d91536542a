"""Mixtures of experts: which experts read a token, and products of rows grouped by expert.

No expert has a capacity and no token is dropped: rows are sorted by expert, and each expert
multiplies as many as came to it. On a mesh every device multiplies the rows of the experts it
holds, and the results are summed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from w2s_jax.ops.layers import QTensor, dequantize, dot
from w2s_jax.ops.sharding import Axes, Placement

_INTO: Axes = ("experts", "embed", "expert_width")
AXES: dict[str, Axes] = {"gate": _INTO, "up": _INTO, "down": ("experts", "expert_width", "embed")}
"""Logical axes of the experts' kernels, [E D F] and [E F D]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertWeight:
    """A kernel of all experts, [E inputs outputs], perhaps with an adapter beside it.

    lora_a [E inputs rank] and lora_b [E rank outputs], of which the product times `scale` is added.
    """

    kernel: Any
    lora_a: Any = None
    lora_b: Any = None
    scale: Any = None


def route(
    logits: Float[Array, "*rows E"], count: int, *, normalised: bool
) -> tuple[Float[Array, "*rows E"], Float[Array, "*rows k"], Int[Array, "*rows k"]]:
    """The experts that read each row, and the weights of their results.

    Args:
        logits: The router's, float32.
        count: Experts a row.
        normalised: Whether the weights of a row sum to one.

    Returns:
        Probabilities of all experts, weights of the chosen ones, and their numbers.
    """
    every = jax.nn.softmax(logits, axis=-1)
    weights, chosen = jax.lax.top_k(every, count)
    if normalised:
        weights = weights / weights.sum(-1, keepdims=True)
    return every, weights, chosen


def load_balance(
    every: Float[Array, "*rows E"], chosen: Int[Array, "*rows k"], counted: Array
) -> Float[Array, "2 E"]:
    """How many of the counted rows chose each expert, and the sum of their probabilities of it."""
    counted = counted.astype(jnp.float32)[..., None]
    picked = jax.nn.one_hot(chosen, every.shape[-1], dtype=jnp.float32).sum(-2)
    rows = tuple(range(every.ndim - 1))
    return jnp.stack([(counted * x).sum(rows) for x in (picked, every)])


def balance_loss(loads: Float[Array, "N 2 E"], rows: Float[Array, ""]) -> Float[Array, ""]:
    """The load-balancing loss of the Switch Transformer (arXiv 2101.03961), over all layers.

    As transformers' load_balancing_loss_func: the number of experts times the sum over them of the
    share of rows that chose one, times its mean probability; k where routing is even.

    Args:
        loads: Of each layer, by `load_balance`.
        rows: The counted rows of a layer.
    """
    chosen, probabilities = loads.sum(0) / jnp.maximum(rows * len(loads), 1.0)
    return loads.shape[-1] * (jax.lax.stop_gradient(chosen) * probabilities).sum()


def mixture(
    x: Float[Array, "P *batch D"],
    weights: Float[Array, "P *batch k"],
    chosen: Int[Array, "P *batch k"],
    kernels: Mapping[str, ExpertWeight],
    activation: Callable[[Array], Array],
    placement: Placement,
) -> Float[Array, "P *batch D"]:
    """Gated experts' results for the rows that chose them, summed by the rows' weights.

    Args:
        x: States.
        weights: Of the chosen experts, float32.
        chosen: Their numbers.
        kernels: Of "gate", "up" and "down".
        activation: Of the gate.
        placement: Where the kernels lie. The leading axis of x follows the rules' batch, but for
            mesh axes that split the experts: rows are read on all of those.
    """
    mesh = placement.mesh
    if mesh is None:
        platform = jax.default_backend()
        return _local(x, weights, chosen, kernels, activation, platform, 0)
    experts = kernels["up"].kernel.shape[0]
    width = kernels["up"].kernel.shape[2]
    split = placement.mesh_axes("experts", experts)
    shared = (*split, *placement.mesh_axes("expert_width", width))
    platform = mesh.devices.flat[0].platform
    rows = tuple(axis for axis in placement.rules.mesh_axes("batch") if axis not in shared)
    if x.shape[0] % math.prod(mesh.shape[axis] for axis in rows):
        rows = ()
    own = experts // math.prod(mesh.shape[axis] for axis in split)

    def on_device(x: Array, weights: Array, chosen: Array, kernels: Any) -> Array:
        first = jax.lax.axis_index(split) * own if split else 0
        out = _local(x, weights, chosen, kernels, activation, platform, first)
        return jax.lax.psum(out, shared) if shared else out

    by_rows = PartitionSpec(rows)
    specs = {name: _specs(one, AXES[name], placement) for name, one in kernels.items()}
    run = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(by_rows, by_rows, by_rows, specs),
        out_specs=by_rows,
        check_vma=False,
    )
    return run(x, weights, chosen, dict(kernels))


def _specs(weight: ExpertWeight, axes: Axes, placement: Placement) -> Any:
    """How a weight's arrays are split, all widths of the model whole."""
    sizes = weight.kernel.shape
    targets = [
        () if axis in (None, "embed") else placement.mesh_axes(axis, size)
        for axis, size in zip(axes, sizes, strict=True)
    ]

    def spec(leaf: Any) -> PartitionSpec:
        # A scale of a whole channel and the rank of an adapter are never split.
        if leaf.ndim == 0:
            return PartitionSpec()
        ranks = {1: weight.lora_b, 2: weight.lora_a}
        kept = [
            None if leaf.shape[axis] == 1 or leaf is ranks.get(axis) else target
            for axis, target in enumerate(targets)
        ]
        return PartitionSpec(*kept)

    return jax.tree.map(spec, weight)


def _local(
    x: Array,
    weights: Array,
    chosen: Array,
    kernels: Mapping[str, ExpertWeight],
    activation: Callable[[Array], Array],
    platform: str,
    first: int | Array,
) -> Array:
    """`mixture` by the experts from `first` on, of which the kernels are; other rows get zeros."""
    own, count = kernels["up"].kernel.shape[0], chosen.shape[-1]
    # Rows of experts that are elsewhere go to the end.
    expert = chosen.reshape(-1) - first
    expert = jnp.where((expert >= 0) & (expert < own), expert, own)
    order = jnp.argsort(expert)
    sizes = jnp.zeros(own, jnp.int32).at[expert].add(1, mode="drop")
    rows = x.reshape(-1, x.shape[-1])[order // count]

    def product(x: Array, name: str) -> Array:
        weight = kernels[name]
        out = grouped_product(x, weight.kernel, sizes, platform)
        if weight.lora_a is None:
            return out
        a, b = (factor.astype(x.dtype) for factor in (weight.lora_a, weight.lora_b))
        hidden = weight.scale * grouped_product(x, a, sizes, platform)
        return out + grouped_product(hidden.astype(x.dtype), b, sizes, platform)

    # A gradient keeps what goes into the activation and nothing of what is inside it.
    activate = jax.checkpoint(lambda gate, up: activation(gate) * up)
    out = product(activate(product(rows, "gate"), product(rows, "up")), "down")
    apart = out[jnp.argsort(order)].reshape(-1, count, out.shape[-1])
    mixed = jnp.einsum("rkd,rk->rd", apart.astype(jnp.float32), weights.reshape(-1, count))
    return mixed.astype(x.dtype).reshape(x.shape)


def grouped_product(
    x: Float[Array, "M inputs"],
    weight: Array | QTensor,
    sizes: Int[Array, " E"],
    platform: str,
) -> Float[Array, "M outputs"]:
    """Rows times the weight of their group; rows behind all groups give zeros.

    Args:
        x: Rows, those of a group side by side, groups in order.
        weight: [E inputs outputs].
        sizes: Rows of each group.
        platform: Of the devices that run it. A CPU, for which the compiler would multiply all rows
            by all weights, goes over the groups in blocks of rows, and reads the chosen experts
            alone: of 64 float32 kernels [1024 512], 8 a token, it takes 1.4 ms for one token and
            4.5 ms for 16 on 2 cores, ragged_dot 40 and 71 ms, a gather of kernels 1.0 and 62 ms.
    """
    if not isinstance(weight, QTensor):
        return _grouped(x, weight.astype(x.dtype), sizes, platform)
    if platform == "cpu":
        return _by_blocks(x, weight, sizes, False)
    if weight.group is not None:
        return _grouped(x, dequantize(weight, x.dtype), sizes, platform)
    as_stored = platform == "tpu" and weight.values.dtype == jnp.int8
    values = weight.values if as_stored else weight.values.astype(x.dtype)
    group = jnp.repeat(
        jnp.arange(len(sizes)), sizes, total_repeat_length=len(x)
    )  # the last one's for the rows behind
    scales = weight.scales[:, 0].astype(jnp.float32)[group]
    return (_ragged(x, values, sizes, False) * scales).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(x: Array, weight: Array, sizes: Array, platform: str) -> Array:
    return _product(x, weight, sizes, platform, False)


def _product(x: Array, weight: Array, sizes: Array, platform: str, transposed: bool) -> Array:
    return (_by_blocks if platform == "cpu" else _ragged)(x, weight, sizes, transposed)


def _grouped_forward(
    x: Array, weight: Array, sizes: Array, platform: str
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _grouped(x, weight, sizes, platform), (x, weight, sizes)


def _grouped_backward(
    platform: str, kept: tuple[Array, Array, Array], slope: Array
) -> tuple[Array, Array, None]:
    x, weight, sizes = kept
    return (
        _product(slope, weight, sizes, platform, True),
        _outer(x, slope, sizes).astype(weight.dtype),
        None,
    )


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _ragged(x: Array, weight: Array, sizes: Array, transposed: bool) -> Array:
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transposed else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    out = jax.lax.ragged_dot_general(x, weight, sizes, numbers, preferred_element_type=x.dtype)
    return _behind(out, sizes)


def _behind(out: Array, sizes: Array) -> Array:
    """Zeros in the rows behind all groups."""
    return jnp.where(jnp.arange(len(out))[:, None] < sizes.sum(), out, 0)


@dataclass(frozen=True)
class _Blocks:
    """Blocks of `size` rows, each of one group: how many, and of each its group and its rows.

    length: how many of a block's rows are its group's; the others are of the next groups.
    """

    size: int
    count: Array
    group: Array
    start: Array
    length: Array


def _blocks(rows: int, sizes: Array) -> _Blocks:
    """Every group cut into blocks about as long as groups are on average."""
    size = 1 << max(3, min(9, (-(-rows // len(sizes)) - 1).bit_length()))
    each = -(-sizes // size)
    ends = jnp.cumsum(each)
    index = jnp.arange(rows // size + min(rows, len(sizes)))
    group = jnp.minimum(jnp.searchsorted(ends, index, side="right"), len(sizes) - 1)
    before = (index - (ends - each)[group]) * size
    start = (jnp.cumsum(sizes) - sizes)[group] + before
    return _Blocks(size, ends[-1], group, start, sizes[group] - before)


def _by_blocks(x: Array, weight: Array | QTensor, sizes: Array, transposed: bool) -> Array:
    """The product of each block of rows in turn, one reading of a group's weight a block."""
    blocks = _blocks(len(x), sizes)
    wide = jnp.pad(x, ((0, blocks.size), (0, 0)))
    outputs = weight.shape[1 if transposed else 2]

    def multiply(i: Array, out: Array) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(wide, blocks.start[i], blocks.size)
        take = partial(jax.lax.dynamic_index_in_dim, index=blocks.group[i], keepdims=False)
        found = dot(rows, jax.tree.map(take, weight), transposed=transposed)
        # What it writes for rows of the next groups, those write anew.
        return jax.lax.dynamic_update_slice_in_dim(out, found, blocks.start[i], axis=0)

    start = jnp.zeros((len(wide), outputs), x.dtype)
    return _behind(jax.lax.fori_loop(0, blocks.count, multiply, start)[: len(x)], sizes)


def _outer(x: Array, slope: Array, sizes: Array) -> Array:
    """The sum over each group's rows of x [M inputs] times slope [M outputs], float32."""
    blocks = _blocks(len(x), sizes)
    x, slope = (jnp.pad(rows, ((0, blocks.size), (0, 0))) for rows in (x, slope))

    def add(i: Array, total: Array) -> Array:
        rows, slopes = (
            jax.lax.dynamic_slice_in_dim(held, blocks.start[i], blocks.size) for held in (x, slope)
        )
        rows = jnp.where(jnp.arange(blocks.size)[:, None] < blocks.length[i], rows, 0)
        product = jnp.matmul(rows.T, slopes, preferred_element_type=jnp.float32)
        return total.at[blocks.group[i]].add(product)

    start = jnp.zeros((len(sizes), x.shape[1], slope.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, blocks.count, add, start)
