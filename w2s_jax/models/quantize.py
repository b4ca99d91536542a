"""Which parameters of a decoder are quantised, and how; weight-only, activations stay as they are.

The arithmetic is in `ops/layers.py`, quantising while loading in `models/huggingface.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding

from w2s_jax.errors import InputError
from w2s_jax.models.parameters import PROJECTIONS, input_major_leaf, kernel_axes
from w2s_jax.ops.layers import DEPTHS, OutputMajor, QTensor, quantize_array, scales_shape
from w2s_jax.ops.sharding import Axes

_WEIGHTS = (*PROJECTIONS, "head", "embedding")
USUAL_GROUP = 128
SCALES = ("float32", "bfloat16")


@dataclass(frozen=True)
class QuantizeConfig:
    """How weights are quantised: symmetric, in integers of `bits` bits.

    Raises InputError for a value out of range and for an unknown target.
    """

    bits: int = 8
    """4 or 8."""
    group: int | None = None
    """Inputs that share a scale; None is all of an output channel's. Where the axis is shorter, as
    a head's width may be, all of it."""
    targets: tuple[str, ...] = PROJECTIONS
    """Of query, key, value, out, gate, up, down; also head and embedding (which tied models use as
    their head: one scale a token or group)."""
    scale_dtype: str = "float32"
    """float32 or bfloat16."""

    def __post_init__(self) -> None:
        if self.bits not in DEPTHS:
            raise InputError(f"quantisation to {self.bits} bits; it must be 4 or 8")
        if self.group is not None and self.group < 2:
            raise InputError(f"quantisation in groups of {self.group}; it must be at least 2")
        for target in self.targets:
            if target not in _WEIGHTS:
                known = ", ".join(_WEIGHTS)
                raise InputError(f"unknown quantisation target {target!r}; known are {known}")
        if self.scale_dtype not in SCALES:
            raise InputError(f"scales of {self.scale_dtype}; they are float32 or bfloat16")

    def contracted(self, path: str) -> tuple[int, ...] | None:
        """The axes of the parameter at "layers_0/mlp/up/kernel" that a product contracts.

        Counted from the end, the same whether layers are stacked. None where it is not quantised.
        """
        *_, module, leaf = ("", *path.split("/"))
        name = "embedding" if path == "embed/embedding" else module
        is_weight = leaf == "kernel" or name == "embedding"
        if not is_weight or name not in self.targets:
            return None
        if name == "embedding":  # a tied head contracts its last axis
            return (-1,)
        inputs, outputs = kernel_axes(name)
        return tuple(range(-inputs - outputs, -outputs))

    def group_of(
        self, shape: tuple[int, ...], contracted: tuple[int, ...], path: str
    ) -> int | None:
        """The group of a weight of this shape; InputError, naming it, where it does not divide."""
        if self.group is None:
            return None
        size = shape[contracted[-1]]
        if size > self.group and size % self.group:
            raise InputError(
                f"{path}: {size} inputs are not divisible into groups of {self.group}; give "
                + (_groups_that_divide(size) or f"{size}, which is one group")
            )
        return min(self.group, size)

    def __str__(self) -> str:
        others = "".join(f"+{name}" for name in self.targets if name not in PROJECTIONS)
        return f"int{self.bits}" + (f":{self.group}" if self.group else "") + others


def _groups_that_divide(size: int) -> str:
    """Up to three groups for so many inputs, multiples of as much of 32 as can be."""
    known = range(2, min(size, USUAL_GROUP + 1))
    for step in (32, 16, 8, 1):
        groups = [str(group) for group in known if group % step == 0 and size % group == 0][:3]
        if groups:
            return " or ".join([", ".join(groups[:-1]), groups[-1]] if groups[1:] else groups)
    return ""


def read_quantize(spec: str) -> QuantizeConfig:
    """A config from "int8", "int8:128", "int4" (in groups of 128), "int4:64+head+embedding".

    Raises:
        InputError: For anything else.
    """
    match = re.fullmatch(r"int(4|8)(?::(\d+))?((?:\+\w+)*)", spec)
    if match is None:
        raise InputError(
            f"quantisation {spec!r} is not int8 or int4, with :GROUP, +head or +embedding behind it"
        )
    bits, group, others = int(match[1]), match[2], tuple(match[3].split("+")[1:])
    usual = USUAL_GROUP if bits == 4 else None
    return QuantizeConfig(bits, int(group) if group else usual, (*PROJECTIONS, *others))


def is_quantized(params: Mapping[str, Any]) -> bool:
    """Whether any of a decoder's parameters is a QTensor, in itself or as an `OutputMajor`'s."""
    leaves = jax.tree.leaves(dict(params), is_leaf=lambda leaf: isinstance(leaf, QTensor))
    return any(isinstance(leaf, QTensor) for leaf in leaves)


def quantize(params: Mapping[str, Any], config: QuantizeConfig) -> dict[str, Any]:
    """The parameters, in either layout, with QTensors in place of the weights that `config` names.

    Under `jax.eval_shape` their shapes. Arrays on a mesh stay as they are split, and their scales
    are those of the whole.

    Raises:
        InputError: For parameters that are quantised already, a group that does not divide a
            weight, and a mesh that does not divide the groups.
    """
    flat = flatten_dict(dict(params), sep="/")
    for path, leaf in flat.items():
        contracted = config.contracted(path)
        if is_quantized({path: leaf}):
            raise InputError(f"{path} is quantised already; take the weights as they were stored")
        if contracted is not None:
            flat[path] = _quantized(leaf, contracted, config, path)
    return unflatten_dict(flat, sep="/")


# Compiled always: outside a program, and so elsewhere, the same arithmetic may round otherwise.
_compiled = jax.jit(quantize_array, static_argnames=("contracted", "bits", "group", "scale_dtype"))


def _quantized(
    leaf: Any, contracted: tuple[int, ...], config: QuantizeConfig, path: str
) -> QTensor | OutputMajor:
    group = config.group_of(tuple(leaf.shape), contracted, path)
    options: dict[str, Any] = {"bits": config.bits, "group": group}
    options |= {"contracted": contracted, "scale_dtype": jnp.dtype(config.scale_dtype)}
    if isinstance(leaf, OutputMajor) and group is not None:
        leaf = input_major_leaf(path, leaf)
    elif isinstance(leaf, OutputMajor):
        kept = _compiled(leaf.values, **options | {"contracted": (-1,)})
        return OutputMajor(kept, leaf.shape)
    shardings = _shardings(leaf, contracted, group, path)
    if shardings is None:
        return _compiled(leaf, **options)
    return jax.jit(partial(quantize_array, **options), out_shardings=shardings)(leaf)


def _shardings(leaf: Any, contracted: tuple[int, ...], group: int | None, path: str) -> Any:
    """Where an array on a mesh keeps its values and scales; None leaves it to the compiler."""
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return None
    held = leaf.sharding
    if not isinstance(held, NamedSharding):
        return None
    spec = [*held.spec, *(None,) * (leaf.ndim - len(held.spec))]
    shape = scales_shape(tuple(leaf.shape), contracted, group)
    split = [target if size > 1 else None for target, size in zip(spec, shape, strict=True)]
    scales = NamedSharding(held.mesh, jax.sharding.PartitionSpec(*split))
    try:
        scales.shard_shape(shape)
    except ValueError:
        raise InputError(
            f"{path}/scales: groups of {group} make the scales {shape}, which mesh "
            f"{dict(held.mesh.shape)} does not divide as it does the weight; give a smaller group"
        ) from None
    return QTensor(held, scales, contracted[-1], group, str(leaf.dtype))


def quantized_axes(axes: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Logical axes of parameters some of which are QTensors, from those of the plain ones."""
    flat, named = flatten_dict(dict(params)), flatten_dict(dict(axes))
    return unflatten_dict({path: _leaf_axes(leaf, named[path]) for path, leaf in flat.items()})


def _leaf_axes(leaf: Any, axes: Axes) -> Any:
    if not isinstance(leaf, QTensor):
        return axes
    own = scale_axes(axes, tuple(leaf.scales.shape))
    return QTensor(axes, own, leaf.axis, leaf.group, leaf.dtype)


def scale_axes(axes: Axes, shape: tuple[int, ...]) -> Axes:
    """Logical axes of a weight's scales, which have this shape: a single entry is never split."""
    return tuple(axis if size > 1 else None for axis, size in zip(axes, shape, strict=True))


def weight_bytes(params: Mapping[str, Any]) -> int:
    """Bytes of the parameters where they are packed: an int4 counts a half."""

    def bits(leaf: Any) -> int:
        return leaf.size * (4 if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize)

    return sum(map(bits, jax.tree.leaves(dict(params)))) // 8
