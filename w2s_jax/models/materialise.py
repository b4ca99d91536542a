"""Parameters from files onto devices, each device's part alone, quantised on the way where asked.

What is in host memory at a time is one device's part of one parameter and a block of a file.
Opens no file: readers come from `models/arrange.py`.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding

from w2s_jax.models.arrange import Index, Parameter
from w2s_jax.models.quantize import QuantizeConfig, scale_axes
from w2s_jax.ops.quantized import QTensor, quantize_array, scales_shape
from w2s_jax.ops.sharding import Rules, resolve

BLOCK_BYTES = 1 << 24
"""About so many bytes of a parameter are read from a file at a time."""

Placed = NamedSharding | None


def materialise(
    parameters: Mapping[str, Parameter],
    dtype: jnp.dtype,
    rules: Rules,
    mesh: Mesh | None,
    quantize: QuantizeConfig | None = None,
) -> dict[str, jax.Array | QTensor]:
    """The parameters' values, on a mesh each read part by part into its shards, as `rules` say.

    Weights that `quantize` names are quantised as they are read. Where a mesh splits the inputs of
    a weight with one scale a channel, all inputs of a part's channels are read, by each process, so
    that the scales are those of the whole; where groups have scales, no more than the part is.

    Raises InputError, before anything is read, where the mesh does not divide a parameter, its
    scales, or a group it.
    """
    makers: dict[str, Callable[[], jax.Array | QTensor]] = {}
    for path, parameter in parameters.items():
        contracted = None if quantize is None else quantize.contracted(path)
        if quantize is None or contracted is None:
            makers[path] = _plain(path, parameter, dtype, rules, mesh)
        else:
            makers[path] = _quantized(path, parameter, dtype, rules, mesh, quantize, contracted)
    return {path: make() for path, make in makers.items()}


def _plain(
    path: str, parameter: Parameter, dtype: jnp.dtype, rules: Rules, mesh: Mesh | None
) -> Callable[[], jax.Array]:
    shape = parameter.shape
    sharding = _resolved(path, parameter.axes, shape, rules, mesh)

    def part(index: Index) -> tuple[np.ndarray]:
        host = np.empty([stop - start for start, stop in _bounds(index, shape)], dtype)
        for block, place in _blocks(index, shape, parameter.major, host.dtype.itemsize):
            host[place] = parameter.read(block)
        return (host,)

    return lambda: _place((shape,), (sharding,), (None,), lambda index: index, part)[0]


def _quantized(
    path: str,
    parameter: Parameter,
    dtype: jnp.dtype,
    rules: Rules,
    mesh: Mesh | None,
    config: QuantizeConfig,
    contracted: tuple[int, ...],
) -> Callable[[], QTensor]:
    shape, axes = parameter.shape, parameter.axes
    group = config.group_of(shape, contracted, path)
    small = scales_shape(shape, contracted, group)
    shardings = (
        _resolved(f"{path}/values", axes, shape, rules, mesh),
        _resolved(f"{path}/scales", scale_axes(axes, small), small, rules, mesh),
    )
    # Axes of which one scale serves all, so that a shard of them does not know it.
    whole = tuple(len(shape) + axis for axis in contracted if small[axis] == 1)
    # Blocks hold all that shares a scale.
    inputs = {len(shape) + axis for axis in contracted}
    split = tuple(axis for axis in range(len(shape)) if axis not in inputs)

    def widened(index: Index) -> Index:
        return tuple(slice(None) if axis in whole else part for axis, part in enumerate(index))

    def part(index: Index) -> tuple[np.ndarray, np.ndarray]:
        sizes = tuple(stop - start for start, stop in _bounds(index, shape))
        values = np.empty(sizes, ml_dtypes.int4 if config.bits == 4 else np.int8)
        scales = np.empty(scales_shape(sizes, contracted, group), jnp.dtype(config.scale_dtype))
        for block, place in _blocks(index, shape, split, 4):
            made = quantize_array(
                parameter.read(block).astype(dtype),
                contracted,
                bits=config.bits,
                group=group,
                scale_dtype=scales.dtype,
            )
            values[place], scales[place] = made.values, made.scales
        return values, scales

    steps = (None, tuple(large // few for large, few in zip(shape, small, strict=True)))

    def make() -> QTensor:
        values, scales = _place((shape, small), shardings, steps, widened, part)
        return QTensor(values, scales, contracted[-1], group, str(jnp.dtype(dtype)))

    return make


def _resolved(
    path: str, axes: Any, shape: tuple[int, ...], rules: Rules, mesh: Mesh | None
) -> Placed:
    return None if mesh is None else resolve(axes, rules, mesh, shape, name=path)


@dataclass(frozen=True)
class _Shard:
    """What one device holds of an array: its place, and where that is in the part read for it."""

    device: jax.Device | None
    index: Index


def _place(
    shapes: tuple[tuple[int, ...], ...],
    shardings: tuple[Placed, ...],
    steps: tuple[tuple[int, ...] | None, ...],
    widened: Callable[[Index], Index],
    part: Callable[[Index], tuple[np.ndarray, ...]],
) -> list[jax.Array]:
    """Arrays that are made together, part by part: the first one's shards say which parts.

    widened: the part to be made for a shard of the first array; what several shards need is made
    once. steps: entries of the first array for one of each other, an axis.
    """
    shape, sharding = shapes[0], shardings[0]
    if sharding is None:
        whole = (slice(None),) * len(shape)
        return [jax.device_put(host) for host in part(widened(whole))]
    wanted: dict[tuple, list[_Shard]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        index = index or ()
        wanted.setdefault(_bounds(widened(index), shape), []).append(_Shard(device, index))
    held: list[list[jax.Array]] = [[] for _ in shapes]
    for bounds, shards in wanted.items():
        hosts = part(tuple(slice(*pair) for pair in bounds))
        for shard in shards:
            inside = tuple(
                slice(start - first, stop - first)
                for (start, stop), (first, _) in zip(
                    _bounds(shard.index, shape), bounds, strict=True
                )
            )
            for arrays, host, step in zip(held, hosts, steps, strict=True):
                cut = host[_coarser(inside, step, host.shape)]
                arrays.append(jax.device_put(cut, shard.device))
        del hosts
    return [
        jax.make_array_from_single_device_arrays(shape, sharding, arrays)
        for shape, sharding, arrays in zip(shapes, shardings, held, strict=True)
        if sharding is not None
    ]


def _coarser(index: Index, step: tuple[int, ...] | None, shape: tuple[int, ...]) -> Index:
    """The place of scales, each of which stands for `step` entries, given that of the entries."""
    if step is None:
        return index
    return tuple(
        slice(0, 1) if size == 1 else slice(part.start // each, part.stop // each)
        for part, each, size in zip(index, step, shape, strict=True)
    )


def _bounds(index: Index, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _blocks(
    index: Index, shape: tuple[int, ...], axes: tuple[int, ...], itemsize: int
) -> Iterator[tuple[Index, Index]]:
    """Blocks of a part, of about BLOCK_BYTES: where in the parameter, and where in the part.

    The axes given are cut, the outer ones into single entries as long as that is too much.
    """
    bounds = _bounds(index, shape)
    sizes = [stop - start for start, stop in bounds]
    each = itemsize * int(np.prod(sizes, dtype=np.int64))
    steps = {}
    for axis in axes:
        if each <= BLOCK_BYTES:
            break
        one = each // max(1, sizes[axis])
        steps[axis] = max(1, BLOCK_BYTES // max(1, one))
        each = one
    starts = [range(0, sizes[axis], step) for axis, step in steps.items()]
    for places in itertools.product(*starts):
        inside = [slice(0, size) for size in sizes]
        for (axis, step), start in zip(steps.items(), places, strict=True):
            inside[axis] = slice(start, min(start + step, sizes[axis]))
        there = tuple(
            slice(first + part.start, first + part.stop)
            for part, (first, _) in zip(inside, bounds, strict=True)
        )
        yield there, tuple(inside)
