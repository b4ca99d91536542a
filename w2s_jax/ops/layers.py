"""What a layer does with its parameters: products and lookups, and norms. None are made here.

Weights, and key/value entries, may be small integers with scales: symmetric rounding, values times
scales. Which parameters are quantised is in `models/quantize.py`. Norms are computed in float32; a
gradient keeps their input and computes the statistics again.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

T = TypeVar("T")
DEPTHS = (4, 8)
_SMALLEST = float(np.finfo(np.float32).tiny)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QTensor:
    """A weight as integers and the factors that they are multiplied by, in place of the array.

    values int8 or int4, in the weight's shape. scales float32 or bfloat16, in the same shape but
    for the axes that a product contracts: 1 where a scale serves a whole output channel; with
    `group` the last contracted axis, `axis` (counted from the end), has one entry a group.
    dtype is the weight's own, which it computes as. TPUs pack two int4 into a byte, CPUs do not.
    In place of both arrays may stand NumPy's, their shardings, or their logical axes.
    """

    values: Any
    scales: Any
    axis: int = field(metadata={"static": True})
    group: int | None = field(metadata={"static": True})
    dtype: str = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        """The weight's."""
        return len(self.values.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OutputMajor:
    """A weight kept with its outputs' axes first, in place of the array: how CPUs decode fastest.

    A CPU multiplies few rows two to three times as fast where the weight is on the left and each of
    its rows, an output's, is contiguous. An array of the usual shape with such strides in memory
    would not do: XLA copies it for every product.

    Attributes:
        values: [outputs, inputs], each the product of those axes; an array, or a QTensor.
        shape: The weight's own, as everything but a product sees it.
    """

    values: Any
    shape: tuple[int, ...] = field(metadata={"static": True})

    @property
    def ndim(self) -> int:
        """The weight's."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """What it computes as."""
        return self.values.dtype


Weight = Array | QTensor | OutputMajor


def output_major(weight: Array | QTensor, contract: tuple[int, ...]) -> OutputMajor:
    """The same weight with its outputs' axes first.

    Args:
        weight: Any but an OutputMajor.
        contract: The axes that a product sums over, from the start, in order.
    """
    order = (*(axis for axis in range(weight.ndim) if axis not in contract), *contract)
    outputs = weight.ndim - len(contract)

    def arranged(array: Array) -> Array:
        moved = array.transpose(order)
        return moved.reshape(math.prod(moved.shape[:outputs]), -1)

    shape = tuple(weight.shape)
    if not isinstance(weight, QTensor):
        return OutputMajor(arranged(weight), shape)
    values, scales = arranged(weight.values), arranged(weight.scales)
    return OutputMajor(replace(weight, values=values, scales=scales, axis=-1), shape)


def input_major(weight: OutputMajor, contract: tuple[int, ...]) -> Array | QTensor:
    """The weight that `output_major` was given, of which `contract` were the axes summed over."""
    order = (*(axis for axis in range(weight.ndim) if axis not in contract), *contract)

    def back(array: Array, shape: tuple[int, ...]) -> Array:
        apart = array.reshape([shape[axis] for axis in order])
        return apart.transpose([order.index(axis) for axis in range(weight.ndim)])

    kept = weight.values
    if not isinstance(kept, QTensor):
        return back(kept, weight.shape)
    summed = tuple(axis - weight.ndim for axis in contract)
    small = scales_shape(weight.shape, summed, kept.group)
    values, scales = back(kept.values, weight.shape), back(kept.scales, small)
    return replace(kept, values=values, scales=scales, axis=summed[-1])


def scales_shape(
    shape: tuple[int, ...], contracted: tuple[int, ...], group: int | None
) -> tuple[int, ...]:
    """The shape of the scales of a weight; `contracted` axes count from the end, in order.

    With `group`, which divides the last of them, the others keep their size.
    """
    sizes = list(shape)
    if group is None:
        for axis in contracted:
            sizes[axis] = 1
    else:
        sizes[contracted[-1]] //= group
    return tuple(sizes)


def quantize_array(
    array: Any,
    contracted: tuple[int, ...],
    *,
    bits: int = 8,
    group: int | None = None,
    scale_dtype: DTypeLike = jnp.float32,
) -> QTensor:
    """An array as integers of `bits` bits, each within half a scale of the array's entry.

    Scales are the largest magnitude over the contracted axes, or over `group` entries of the last
    of them, by 127 or 7. What is not finite stays so.

    Args:
        array: NumPy arrays give NumPy arrays, with the same bits as jax gives.
        contracted: The axes that a product sums over, counted from the end, in order.
        bits: 8 or 4.
        group: Entries of the last contracted axis that share a scale; None for all of them.
        scale_dtype: float32 or bfloat16.
    """
    xp: Any = np if isinstance(array, np.ndarray) else jnp
    most = 2 ** (bits - 1) - 1
    integer = (ml_dtypes.int4 if xp is np else jnp.int4) if bits == 4 else xp.int8
    wide, axes = _grouped(array.astype(xp.float32), contracted, group)
    with np.errstate(invalid="ignore", over="ignore"):
        largest = xp.max(xp.abs(wide), axis=axes, keepdims=True)
        # Not a division by the constant, of which XLA makes this product.
        scales = _rounded(xp, largest * np.float32(1 / most), scale_dtype)
        # Below it arithmetic is not the same everywhere; NaN, which is not below it, stays.
        scales = xp.where(scales < _SMALLEST, np.float32(1), scales)
        # Times the inverse, as XLA divides by what is broadcast; division would round otherwise.
        steps = xp.rint(wide * (np.float32(1) / scales))
        values = xp.clip(steps, -most, most).astype(xp.int8).astype(integer)
    return QTensor(
        values.reshape(array.shape),
        scales.reshape(scales_shape(tuple(array.shape), contracted, group)).astype(scale_dtype),
        contracted[-1],
        group,
        str(jnp.dtype(array.dtype)),
    )


def _rounded(xp: Any, scales: Any, dtype: DTypeLike) -> Any:
    """float32 scales that this dtype holds; XLA leaves out a conversion there and back."""
    if xp is np:
        return scales.astype(dtype).astype(np.float32)
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(scales, info.nexp, info.nmant)


def _grouped(
    wide: Any, contracted: tuple[int, ...], group: int | None
) -> tuple[Any, tuple[int, ...]]:
    """The array with groups apart, and the axes that share a scale."""
    if group is None:
        return wide, contracted
    at = wide.ndim + contracted[-1]
    shape = (*wide.shape[:at], wide.shape[at] // group, group, *wide.shape[at + 1 :])
    return wide.reshape(shape), (at + 1,)


def dequantize(tensor: QTensor, dtype: DTypeLike | None = None) -> Array:
    """The whole weight again, in its own dtype by default: for tests and for what is not a product.

    Computed in float32.
    """
    values = jnp.asarray(tensor.values).astype(jnp.float32)
    if tensor.group is None:
        whole = values * tensor.scales.astype(jnp.float32)
    else:
        apart, axes = _grouped(values, (tensor.axis,), tensor.group)
        scales = jnp.expand_dims(tensor.scales.astype(jnp.float32), axes[0])
        whole = (apart * scales).reshape(tensor.shape)
    return whole.astype(tensor.dtype if dtype is None else dtype)


def take_rows(table: Weight, index: Array) -> Array:
    """Entries of the leading axis of a table [V, D], in its dtype: [*index, D]."""
    held: Array | QTensor = table.values if isinstance(table, OutputMajor) else table
    if not isinstance(held, QTensor):
        return held[index]
    return dequantize(replace(held, values=held.values[index], scales=held.scales[index]))


def dot(
    x: Array,
    weight: Weight,
    contract: int = 1,
    *,
    transposed: bool = False,
    dtype: DTypeLike | None = None,
) -> Array:
    """x's last axes against the weight's first ones, or its last ones.

    Of a QTensor the values go into the product as they are, and the scales onto its result: of each
    channel once, of groups as they are summed. Where x has more rows than a group has entries,
    groups' scales go onto the values instead, which are fewer than the groups' results would be.

    Args:
        x: [.., in], of `contract` input axes.
        weight: [in, out], or [out, in] where `transposed`.
        contract: How many axes are summed over.
        transposed: Whether the weight's last axes are its input's.
        dtype: Of the result, and what products are summed in; x's by default.
    """
    if isinstance(weight, OutputMajor):
        outputs = weight.shape[:-contract] if transposed else weight.shape[contract:]
        rows = x.reshape(-1, weight.values.shape[1])
        product = _weight_first if 1 < len(rows) <= FEW_ROWS else _product
        out = _dot(rows, weight.values, ((1,), (1,)), dtype, product)
        return out.reshape(*x.shape[:-contract], *outputs)
    first = weight.ndim - contract if transposed else 0
    axes = (tuple(range(x.ndim - contract, x.ndim)), tuple(range(first, first + contract)))
    return _dot(x, weight, axes, dtype, _product)


_AxisPair = tuple[tuple[int, ...], tuple[int, ...]]


def _dot(
    x: Array,
    weight: Array | QTensor,
    axes: _AxisPair,
    dtype: DTypeLike | None,
    product: Callable[..., Array],
) -> Array:
    """The product over x's and the weight's `axes`."""
    if not isinstance(weight, QTensor):
        promoted = jnp.promote_types(x.dtype, weight.dtype)
        return product(x.astype(promoted), weight.astype(promoted), (axes, ((), ())), dtype)
    out_dtype = x.dtype if dtype is None else dtype
    # Tied to x, so that no loop over tokens converts the weight once and for all ahead of itself.
    x, values = jax.lax.optimization_barrier((x, weight.values))
    if weight.group is None:
        out = product(x, values, (axes, ((), ())), out_dtype)
        scales = jnp.squeeze(weight.scales, axes[1]).astype(jnp.float32)
        return (out * scales).astype(out_dtype)
    if math.prod(x.shape[: x.ndim - len(axes[0])]) > weight.group:
        held = QTensor(values, weight.scales, weight.axis, weight.group, weight.dtype)
        return product(x, dequantize(held, x.dtype), (axes, ((), ())), out_dtype)
    return _by_groups(x, values, weight, axes).astype(out_dtype)


def _product(x: Array, values: Array, numbers: Any, dtype: DTypeLike | None) -> Array:
    return jax.lax.dot_general(x, values.astype(x.dtype), numbers, preferred_element_type=dtype)


FEW_ROWS = 48
"""Up to so many rows a CPU multiplies faster with the weight on the left; from 64 on, and for one
row, both sides are alike."""


def _weight_first(x: Array, values: Array, numbers: Any, dtype: DTypeLike | None) -> Array:
    """`_product` of [rows, inputs] and [outputs, inputs], with the weight on the left."""
    out = jax.lax.dot_general(values.astype(x.dtype), x, numbers, preferred_element_type=dtype)
    # The compiler would swap the sides of a transposed product back.
    return jax.lax.optimization_barrier(out).T


def _by_groups(x: Array, values: Array, weight: QTensor, axes: _AxisPair) -> Array:
    """The product, each group of inputs apart, then summed with its scales; float32."""
    group, at = weight.group, weight.ndim + weight.axis
    apart, inner = _grouped(values, (weight.axis,), group)
    rows, _ = _grouped(x, (-1,), group)
    batch = ((*axes[0][:-1], x.ndim - 1), (*axes[1][:-1], at))
    numbers = (((x.ndim,), inner), batch)
    out = _product(rows, apart, numbers, jnp.float32)
    count, outputs = len(batch[0]), [a for a in range(weight.ndim) if a not in axes[1]]
    scales = jnp.transpose(weight.scales, (*batch[1], *outputs)).astype(jnp.float32)
    between = (1,) * (x.ndim - count)
    scales = scales.reshape(*scales.shape[:count], *between, *scales.shape[count:])
    return jnp.sum(out * scales, axis=tuple(range(count)))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, " D"], epsilon: float, offset: float = 0.0
) -> Float[Array, "*batch D"]:
    """Root-mean-square norm `x / rms(x) * (offset + scale)`, in float32, returned in x's dtype.

    Source: arXiv 1910.07467.

    Args:
        x: states.
        scale: The weight.
        epsilon: Added to the mean square.
        offset: 1 for Gemma, whose checkpoints store the scale less one.
    """
    wide = x.astype(jnp.float32)
    return (wide * _inverse(wide, epsilon) * (offset + scale.astype(jnp.float32))).astype(x.dtype)


def _inverse(centred: Array, epsilon: float) -> Array:
    return jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)


def _rms_forward(x: Array, scale: Array, epsilon: float, offset: float) -> tuple[Array, tuple]:
    return rms_norm(x, scale, epsilon, offset), (x, scale)


def _rms_backward(
    epsilon: float, offset: float, residuals: tuple[Array, Array], slope: Array
) -> tuple[Array, Array]:
    x, scale = residuals
    wide, slope = x.astype(jnp.float32), slope.astype(jnp.float32)
    inverse = _inverse(wide, epsilon)
    normed = wide * inverse
    inner = slope * (offset + scale.astype(jnp.float32))
    by_x = inverse * (inner - normed * jnp.mean(inner * normed, axis=-1, keepdims=True))
    by_scale = (slope * normed).sum(range(x.ndim - 1))
    return by_x.astype(x.dtype), by_scale.astype(scale.dtype)


rms_norm.defvjp(_rms_forward, _rms_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*batch D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    epsilon: float,
) -> Float[Array, "*batch D"]:
    """Layer norm with scale and bias, in float32, returned in x's dtype; arXiv 1607.06450."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = centred * _inverse(centred, epsilon) * scale.astype(jnp.float32)
    return (normed + bias.astype(jnp.float32)).astype(x.dtype)


def _layer_forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, tuple]:
    return layer_norm(x, scale, bias, epsilon), (x, scale)


def _layer_backward(
    epsilon: float, residuals: tuple[Array, Array], slope: Array
) -> tuple[Array, Array, Array]:
    x, scale = residuals
    wide, slope = x.astype(jnp.float32), slope.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = _inverse(centred, epsilon)
    normed = centred * inverse
    inner = slope * scale.astype(jnp.float32)
    along = normed * jnp.mean(inner * normed, axis=-1, keepdims=True)
    by_x = inverse * (inner - jnp.mean(inner, axis=-1, keepdims=True) - along)
    by_scale, by_bias = (row.sum(range(x.ndim - 1)) for row in (slope * normed, slope))
    return by_x.astype(x.dtype), by_scale.astype(scale.dtype), by_bias.astype(scale.dtype)


layer_norm.defvjp(_layer_forward, _layer_backward)


def choose(options: Sequence[T], index: int | Array | None) -> T:
    """One of several trees of arrays, by its index, which a scan over layers traces."""
    if len(options) == 1:
        return options[0]
    if isinstance(index, int):
        return options[index]

    def pick(*choices: Array) -> Array:
        return jnp.stack(jnp.broadcast_arrays(*choices))[index]

    return jax.tree.map(pick, *options)
