"""Between parameters and the tensors of files: parts read on demand, layers stacked or split.

Knows names and arrangements by `models/names.py`; opens no file. Values get onto devices in
`models/materialise.py`.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from w2s_jax.exchange import whole
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.layout import STACKED, layer_name
from w2s_jax.models.model import abstract_model
from w2s_jax.models.names import Stored
from w2s_jax.ops.sharding import Axes

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
            fetchers[path] = functools.partial(whole, leaf)
            continue
        for layer in range(layers):
            fetchers[f"{layer_name(layer)}/{rest}"] = functools.partial(_fetch_layer, leaf, layer)
    return fetchers


def _fetch_layer(leaf: jax.Array, layer: int) -> np.ndarray:
    return whole(leaf[layer])
