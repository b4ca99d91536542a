"""Folders in Hugging Face's format: where they lie, what files hold, and how parts become arrays.

No code from a checkpoint is run: pickle files are refused and nothing trusts remote code. What is
in host memory at a time is one device's part of one parameter and a block of a file; weights are
quantised on the way where asked. Which tensor is which parameter is in `parameters.py`.
"""

import contextlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open

from w2s_jax.errors import InputError, check_fetched, check_kind
from w2s_jax.models.parameters import (
    EXPERTS,
    STACKED,
    Index,
    Parameter,
    layer_name,
    of_expert,
    summed_axes,
)
from w2s_jax.models.quantize import QuantizeConfig, scale_axes
from w2s_jax.ops.layers import QTensor, quantize_array, scales_shape
from w2s_jax.ops.sharding import Axes, Rules, resolve

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# An adapter's, which stand in the place of config.json and model.safetensors.
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
LONGEST_PATH = 4000
_PATTERNS = (
    CONFIG,
    GENERATION_CONFIG,
    "model*.safetensors",
    INDEX,
    ADAPTER_CONFIG,
    ADAPTER,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
)


@contextlib.contextmanager
def about(place: str | Path) -> Iterator[None]:
    """Errors told behind what they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def locate(path_or_hub_id: str | Path, patterns: tuple[str, ...] = _PATTERNS) -> Path:
    """The directory of a checkpoint: the path itself, or the cached snapshot of a hub id.

    Only files that match `patterns` are fetched.

    Raises:
        InputError: When there is neither.
    """
    check_kind("a checkpoint's place", path_or_hub_id, str | Path, "a folder or a hub id")
    path, name = Path(path_or_hub_id).expanduser(), str(path_or_hub_id)
    if len(name) > LONGEST_PATH:
        raise InputError(f"{name[:40]}...: a path of {len(name)} characters is too long")
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{path} is a file; give the directory that holds {CONFIG}")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise InputError(f"{name}: no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{name}: no such directory, and as a Hugging Face id it is neither cached nor "
            f"reachable ({type(error).__name__}: {reason})"
        ) from None


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter, and no whole model beside it."""
    whole = (directory / SINGLE).is_file() or (directory / INDEX).is_file()
    return (directory / ADAPTER_CONFIG).is_file() and not whole


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError when it is missing, malformed or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent}: no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        check_fetched(path)
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, which is opened for each read and closed again.

    Files are mapped, and what was read of a mapped file counts as the process's memory till then.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def __getitem__(self, index: Any) -> np.ndarray:
        try:
            with safe_open(self.path, framework="numpy") as file:
                return file.get_slice(self.name)[index]
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.path} can no longer be read ({error})") from None


Tensors = dict[str, StoredTensor]


def open_file(path: Path) -> Tensors:
    """The tensors of one safetensors file by name; values stay on disk.

    Raises:
        InputError: When it is missing or damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(path, name, tuple(values.get_shape()), values.get_dtype())
                for name, values in found.items()
            }
    except FileNotFoundError:
        raise InputError(f"{path.parent}: {path.name}, named by {INDEX}, is missing") from None
    except (OSError, SafetensorError) as error:
        check_fetched(path)
        raise InputError(f"{path} is not a whole safetensors file ({error})") from None


def equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same values, read in blocks."""
    if one.shape != other.shape:
        return False
    rows = one.shape[0]
    blocks = (slice(start, min(start + 4096, rows)) for start in range(0, rows, 4096))
    return all(np.array_equal(one[block], other[block]) for block in blocks)


def open_tensors(directory: Path) -> Tensors:
    """Every tensor of a directory's safetensors, single or sharded, by name; values stay on disk.

    Raises:
        InputError: When there are none, when a file is damaged or missing, when the index and the
            files disagree, and when two files hold the same tensor.
    """
    names = [SINGLE]
    weight_map: dict[str, str] = {}
    if not (directory / SINGLE).is_file():
        if not (directory / INDEX).is_file():
            raise InputError(f"{directory}: no {SINGLE} or {INDEX}{_other_weights(directory)}")
        weight_map = read_json(directory / INDEX).get("weight_map") or {}
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            raise InputError(f"{directory / INDEX}: weight_map must map tensor names to file names")
        names = sorted(set(weight_map.values()))
    tensors: Tensors = {}
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{directory / INDEX} names {name!r}, a file outside its directory")
        for tensor, values in open_file(directory / name).items():
            if tensor in tensors:
                raise InputError(
                    f"{directory}: tensor {tensor} is in two files, {name} and another"
                )
            tensors[tensor] = values
    for tensor, name in weight_map.items():
        if tensor not in tensors:
            raise InputError(f"{directory}: {INDEX} puts tensor {tensor} in {name}, which lacks it")
    return tensors


def _other_weights(directory: Path) -> str:
    others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if not others:
        return "; only safetensors are read: convert other files to it"
    return f"; {others[0]} is pickle, which is never read: convert it to safetensors"


BLOCK_BYTES = 1 << 21
"""About so many bytes of a parameter are read from a file at a time: what a CPU's caches hold."""

STRIP = 32
"""So many rows of a file are transposed at a time: one cache line of each column."""


@dataclass(frozen=True)
class Source:
    """A parameter to be loaded: its shape, its logical axes and a reader of any part of it.

    major: the axes along which files hold it in one piece after the other, outermost first.
    """

    shape: tuple[int, ...]
    axes: Axes
    read: Callable[[Index], np.ndarray]
    major: tuple[int, ...] = (0,)


def stacked_sources(per_layer: Mapping[str, Source], layers: int) -> dict[str, Source]:
    """The parameters of the stacked layout, reading from those of the per-layer layout."""
    stacked = {path: one for path, one in per_layer.items() if not path.startswith(f"{STACKED}_")}
    first = f"{layer_name(0)}/"
    for path in per_layer:
        if path.startswith(first):
            rest = path.removeprefix(first)
            every = [per_layer[f"{layer_name(layer)}/{rest}"] for layer in range(layers)]
            stacked[f"{STACKED}/{rest}"] = _side_by_side(every, STACKED)
    return stacked


def expert_sources(per_expert: Mapping[str, Source], experts: int) -> dict[str, Source]:
    """The parameters of all experts side by side, reading from those of each."""
    found: dict[str, Source] = {}
    for path, one in per_expert.items():
        first, match, last = path.partition(f"/{EXPERTS}/0/")
        if match:
            whole = f"{first}/{EXPERTS}/{last}"
            every = [per_expert[of_expert(whole, expert)] for expert in range(experts)]
            found[whole] = _side_by_side(every, EXPERTS)
        elif f"/{EXPERTS}/" not in path:
            found[path] = one
    return found


def _side_by_side(sources: list[Source], axis: str) -> Source:
    """Sources of one shape as one, with a leading axis of this name."""

    def read(index: Index) -> np.ndarray:
        return np.stack([source.read(index[1:]) for source in sources[index[0]]])

    one = sources[0]
    major = (0, *(place + 1 for place in one.major))
    return Source((len(sources), *one.shape), (axis, *one.axes), read, major)


def output_major_sources(
    table: Mapping[str, Parameter],
    tensors: Mapping[str, StoredTensor],
    tied: bool,
    quantize: QuantizeConfig | None,
) -> dict[str, Source]:
    """The matrices as [outputs, inputs], as most files hold them; without those to be quantised."""
    sources: dict[str, Source] = {}
    for path, row in table.items():
        axes = summed_axes(path, tied)
        if axes is None or (quantize and quantize.contracted(path)):
            continue
        inputs = math.prod(row.shape[axis] for axis in axes)
        shape = (math.prod(row.shape) // inputs, inputs)
        read = partial(row.read_outputs, tensors, axes)
        sources[path] = Source(shape, (None, None), read)
    return sources


def materialise(
    sources: Mapping[str, Source],
    dtype: jnp.dtype,
    rules: Rules,
    mesh: Mesh | None,
    quantize: QuantizeConfig | None = None,
    aligned: bool = False,
) -> dict[str, jax.Array | QTensor]:
    """The parameters' values, on a mesh each read part by part into its shards, as `rules` say.

    Weights that `quantize` names are quantised as they are read. Where a mesh splits the inputs of
    a weight with one scale a channel, all inputs of a part's channels are read, by each process, so
    that the scales are those of the whole; where groups have scales, no more than the part is.
    `aligned` arrays are those that a CPU takes without a copy: where they are donated, they are
    copied only then, so it is for parameters that are only read.

    Raises:
        InputError: Before anything is read, where the mesh does not divide a parameter, its scales,
            or a group it.
    """

    def shard(path: str, axes: Axes, shape: tuple[int, ...]) -> NamedSharding | None:
        return None if mesh is None else resolve(axes, rules, mesh, shape, name=path)

    makers: dict[str, Callable[[], jax.Array | QTensor]] = {}
    for path, source in sources.items():
        contracted = None if quantize is None else quantize.contracted(path)
        if quantize is None or contracted is None:
            makers[path] = _plain(path, source, dtype, shard, aligned)
        else:
            makers[path] = _quantized(path, source, dtype, shard, quantize, contracted)
    return {path: make() for path, make in makers.items()}


Shard = Callable[[str, Axes, tuple[int, ...]], NamedSharding | None]


def _plain(
    path: str, source: Source, dtype: jnp.dtype, shard: Shard, aligned: bool
) -> Callable[[], jax.Array]:
    shape = source.shape
    sharding = shard(path, source.axes, shape)

    def part(index: Index) -> list[np.ndarray]:
        sizes = [stop - start for start, stop in _bounds(index, shape)]
        host = _aligned(sizes, np.dtype(dtype)) if aligned else np.empty(sizes, dtype)
        for block, place in _blocks(index, shape, source.major, host.dtype.itemsize):
            _copy(source.read(block), host[place])
        return [host]

    return lambda: _place([shape], [sharding], lambda index: index, part)[0]


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """New memory at a multiple of 64 bytes, which `jax.device_put` on a CPU takes as it is."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _copy(values: np.ndarray, into: np.ndarray) -> None:
    """Write values into an array of perhaps another dtype, transposed ones strip by strip."""
    if values.flags.c_contiguous:
        into[...] = values
        return
    bits = np.dtype(f"u{into.dtype.itemsize}")  # bfloat16 NumPy moves one by one
    axis = int(np.argmax(values.strides))
    step = max(1, STRIP // math.prod(values.shape[axis + 1 :]))
    for start in range(0, values.shape[axis], step):
        strip = (*(slice(None),) * axis, slice(start, start + step))
        into[strip].view(bits)[...] = values[strip].astype(into.dtype, copy=False).view(bits)


def _quantized(
    path: str,
    source: Source,
    dtype: jnp.dtype,
    shard: Shard,
    config: QuantizeConfig,
    contracted: tuple[int, ...],
) -> Callable[[], QTensor]:
    shape, axes = source.shape, source.axes
    group = config.group_of(shape, contracted, path)
    small = scales_shape(shape, contracted, group)
    shardings = [
        shard(f"{path}/values", axes, shape),
        shard(f"{path}/scales", scale_axes(axes, small), small),
    ]
    inputs = {len(shape) + axis for axis in contracted}
    # Axes of which one scale serves all, so that a shard of them does not know it.
    whole = {axis for axis in inputs if small[axis] == 1}
    # Blocks hold all that shares a scale.
    split = tuple(axis for axis in range(len(shape)) if axis not in inputs)

    def widened(index: Index) -> Index:
        return tuple(slice(None) if axis in whole else part for axis, part in enumerate(index))

    def part(index: Index) -> list[np.ndarray]:
        sizes = tuple(stop - start for start, stop in _bounds(index, shape))
        values = np.empty(sizes, ml_dtypes.int4 if config.bits == 4 else np.int8)
        scales = np.empty(scales_shape(sizes, contracted, group), jnp.dtype(config.scale_dtype))
        options: Any = {"bits": config.bits, "group": group, "scale_dtype": scales.dtype}
        for block, place in _blocks(index, shape, split, 4):
            made = quantize_array(source.read(block).astype(dtype), contracted, **options)
            values[place], scales[place] = made.values, made.scales
        return [values, scales]

    def make() -> QTensor:
        values, scales = _place([shape, small], shardings, widened, part)
        return QTensor(values, scales, contracted[-1], group, str(jnp.dtype(dtype)))

    return make


def _place(
    shapes: list[tuple[int, ...]],
    shardings: list[NamedSharding | None],
    widened: Callable[[Index], Index],
    part: Callable[[Index], list[np.ndarray]],
) -> list[jax.Array]:
    """Arrays that are made together, part by part: the first one's shards say which parts.

    widened: the part to be made for a shard of the first array; what several shards need is made
    once. Entries of the others stand for as many of the first one's as there are more of these.
    """
    shape, sharding = shapes[0], shardings[0]
    if sharding is None:
        return [jax.device_put(host) for host in part(widened((slice(None),) * len(shape)))]
    wanted: dict[tuple, list[tuple[jax.Device, Index]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        index = index or ()
        wanted.setdefault(_bounds(widened(index), shape), []).append((device, index))
    held: list[list[jax.Array]] = [[] for _ in shapes]
    for bounds, shards in wanted.items():
        hosts = part(tuple(slice(*pair) for pair in bounds))
        for device, index in shards:
            inside = [
                (start - first, stop - first)
                for (start, stop), (first, _) in zip(_bounds(index, shape), bounds, strict=True)
            ]
            for arrays, host in zip(held, hosts, strict=True):
                cut = tuple(
                    slice(start * few // many, max(1, stop * few // many))
                    for (start, stop), few, many in zip(
                        inside, host.shape, hosts[0].shape, strict=True
                    )
                )
                arrays.append(jax.device_put(host[cut], device))
        del hosts
    return [
        jax.make_array_from_single_device_arrays(shape, sharding, arrays)
        for shape, sharding, arrays in zip(shapes, shardings, held, strict=True)
        if sharding is not None
    ]


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
