"""Between parameters and the tensors of files: parts read on demand, put onto devices.

Parameters are a subtree for each layer, which decode faster on a single device, or stacked for
`lax.scan`. What is in host memory at a time is one device's part of one parameter and a block of a
file; weights are quantised on the way where asked.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open

from w2s_jax.distributed import to_host
from w2s_jax.errors import InputError, check_fetched
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.model import abstract_model
from w2s_jax.models.parameters import Stored
from w2s_jax.models.quantize import QuantizeConfig, scale_axes
from w2s_jax.ops.quantized import QTensor, quantize_array, scales_shape
from w2s_jax.ops.sharding import Axes, Rules, resolve

STACKED = "layers"


def layer_name(layer: int) -> str:
    """The key of one layer's subtree in the per-layer layout."""
    return f"{STACKED}_{layer}"


def stack_layers(params: dict, layers: int) -> dict:
    """The same parameters with the `layers_{i}` subtrees stacked as `layers`, [N, ...] each leaf.

    Stacked parameters are returned as they are.
    """
    if STACKED in params:
        return params
    names = [layer_name(layer) for layer in range(layers)]
    rest = {name: subtree for name, subtree in params.items() if name not in names}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
    return rest | {STACKED: stacked}


def unstack_layers(params: dict) -> dict:
    """The same parameters with `layers` [N, ...] split into `layers_{i}` subtrees.

    Per-layer parameters are returned as they are.
    """
    if STACKED not in params:
        return params
    rest = {name: subtree for name, subtree in params.items() if name != STACKED}
    layers = jax.tree.leaves(params[STACKED])[0].shape[0]
    split = {
        layer_name(layer): jax.tree.map(lambda leaf, i=layer: leaf[i], params[STACKED])
        for layer in range(layers)
    }
    return rest | split


Index = tuple[slice, ...]
Reader = Callable[[Index], np.ndarray]
Parameters = dict[str, tuple[tuple[int, ...], Axes]]
Tensors = dict[str, Any]  # safetensors' slices: get_shape(), get_dtype() and [...] read lazily


@dataclass(frozen=True)
class Parameter:
    """A parameter to be loaded: its shape, its logical axes and a reader of any part of it.

    major: the axes along which files hold it in one piece after the other, outermost first.
    """

    shape: tuple[int, ...]
    axes: Axes
    read: Reader
    major: tuple[int, ...] = (0,)


def decoder_parameters(config: ModelConfig) -> Parameters:
    """Shape and logical axes of every parameter of the per-layer layout, by path."""
    model, axes = abstract_model(config, scan_layers=True)
    named = flatten_dict(axes, sep="/")
    parameters: Parameters = {}
    for path, leaf in flatten_dict(model.params, sep="/").items():
        kind, _, rest = path.partition("/")
        if kind != STACKED:
            parameters[path] = (leaf.shape, named[path])
            continue
        for layer in range(config.layers):
            parameters[f"{layer_name(layer)}/{rest}"] = (leaf.shape[1:], named[path][1:])
    return parameters


def reader(row: Stored, shape: tuple[int, ...], tensors: Tensors) -> Reader:
    """Reads any rectangular part of a parameter, touching only the stored bytes that cover it."""

    def read(index: Index) -> np.ndarray:
        ranges, lengths, inner, axis = [], [], [], 0
        for group in row.groups:
            major, *minor = shape[axis : axis + group]
            start, stop, _ = index[axis].indices(major)
            step = math.prod(minor)
            ranges.append((start * step, stop * step))
            lengths += [stop - start, *minor]
            inner += [slice(None), *index[axis + 1 : axis + group]]
            axis += group
        if row.part is not None:
            offset = row.part * math.prod(shape[-row.groups[-1] :])
            ranges[-1] = (ranges[-1][0] + offset, ranges[-1][1] + offset)
        slices = tuple(slice(*bounds) for bounds in ranges)
        values = tensors[row.name]
        array = values[slices[::-1]].T if row.transposed else values[slices]
        return array.reshape(lengths)[tuple(inner)]

    return read


def major_axis(row: Stored) -> int:
    """The axis of a parameter that the tensor's first one begins with."""
    return sum(row.groups[:-1]) if row.transposed else 0


def arranged(row: Stored, array: np.ndarray) -> np.ndarray:
    """A parameter as the files keep it (or its part of a stored tensor)."""
    flat = array.reshape(row.grouped(array.shape))
    return flat.T if row.transposed else flat


def stacked(per_layer: Mapping[str, Parameter], layers: int) -> dict[str, Parameter]:
    """The parameters of the stacked layout, reading from those of the per-layer layout."""
    first = f"{layer_name(0)}/"
    parameters = {}
    for path, parameter in per_layer.items():
        if not path.startswith(f"{STACKED}_"):
            parameters[path] = parameter
        elif path.startswith(first):
            rest = path.removeprefix(first)
            readers = [per_layer[f"{layer_name(layer)}/{rest}"].read for layer in range(layers)]
            parameters[f"{STACKED}/{rest}"] = Parameter(
                (layers, *parameter.shape),
                ("layers", *parameter.axes),
                functools.partial(_read_stacked, readers),
                (0, *(axis + 1 for axis in parameter.major)),
            )
    return parameters


def _read_stacked(readers: list[Reader], index: Index) -> np.ndarray:
    return np.stack([read(index[1:]) for read in readers[index[0]]])


def unstacked(flat: Mapping[str, jax.Array], layers: int) -> dict[str, Callable[[], np.ndarray]]:
    """Fetchers of the parameters of the per-layer layout, from either layout's flat dict."""
    fetchers: dict[str, Callable[[], np.ndarray]] = {}
    for path, leaf in flat.items():
        kind, _, rest = path.partition("/")
        if kind != STACKED:
            fetchers[path] = functools.partial(to_host, leaf)
            continue
        for layer in range(layers):
            fetchers[f"{layer_name(layer)}/{rest}"] = functools.partial(_fetch_layer, leaf, layer)
    return fetchers


def _fetch_layer(leaf: jax.Array, layer: int) -> np.ndarray:
    return to_host(leaf[layer])


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a file, which is opened for each read and closed again.

    Files are mapped, and what was read of a mapped file counts as the process's memory till then.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        try:
            with safe_open(self.path, framework="numpy") as file:
                return file.get_slice(self.name)[index]
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.path} can no longer be read ({error})") from None


def open_file(path: Path) -> Tensors:
    """The tensors of one safetensors file by name; values stay on disk.

    Raises InputError when it is missing or damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: _Tensor(path, name, tuple(values.get_shape()), values.get_dtype())
                for name, values in found.items()
            }
    except FileNotFoundError:
        raise InputError(f"{path.parent}: {path.name}, named by {INDEX}, is missing") from None
    except (OSError, SafetensorError) as error:
        check_fetched(path)
        raise InputError(f"{path} is not a whole safetensors file ({error})") from None


def equal(one: Any, other: Any) -> bool:
    """Whether two tensors hold the same values, read in blocks."""
    if one.get_shape() != other.get_shape():
        return False
    rows = one.get_shape()[0]
    blocks = (slice(start, min(start + 4096, rows)) for start in range(0, rows, 4096))
    return all(np.array_equal(one[block], other[block]) for block in blocks)


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
