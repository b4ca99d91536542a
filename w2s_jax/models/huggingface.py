"""Decoder checkpoints in Hugging Face's format, in both directions: config.json and safetensors.

No code from a checkpoint is run: pickle files are refused and nothing trusts remote code. Which
tensor is which is in `models/names.py`, what config.json means in `models/config_json.py`.
"""

import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from w2s_jax.errors import InputError
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.layout import STACKED, layer_name
from w2s_jax.models.model import Model, abstract_model
from w2s_jax.models.names import HEAD, Stored, full_name, stored_parameters
from w2s_jax.ops.sharding import DEFAULT_RULES, Axes, Rules, resolve

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
)
LONGEST_PATH = 4000
_PATTERNS = (CONFIG, GENERATION_CONFIG, "model*.safetensors", INDEX, *TOKENIZER_PATTERNS)

Index = tuple[slice, ...]
Reader = Callable[[Index], np.ndarray]
Tensors = dict[str, Any]  # safetensors' slices: get_shape(), get_dtype() and [...] read lazily


@dataclass(frozen=True)
class _Parameter:
    """A parameter to be loaded: its shape, its logical axes and a reader of any part of it."""

    shape: tuple[int, ...]
    axes: Axes
    read: Reader


def load_model(
    path_or_hub_id: str | Path,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    scan_layers: bool = False,
) -> Model:
    """Load a decoder from a directory, or from the Hugging Face hub through its local cache.

    dtype: of the parameters; None keeps that of the checkpoint's embedding.
    mesh: every tensor is read slice by slice into its shards on this mesh, as `rules` say.
    scan_layers: stack the layers on a leading axis (see `models/layout.py`).

    Raises InputError for a missing directory, config.json or safetensors, an architecture that is
    not supported, a damaged file, and any tensor unmapped, missing, duplicate or misshapen.
    """
    directory = locate(path_or_hub_id)
    config = load_config(directory)
    per_layer = _abstract_parameters(config)
    stored = stored_parameters(config, per_layer)
    tensors = _match(directory, config, per_layer, stored)
    dtype = _parameter_dtype(dtype, tensors[stored["embed/embedding"].name])
    parameters = {
        path: _Parameter(shape, axes, _reader(stored[path], shape, tensors))
        for path, (shape, axes) in per_layer.items()
    }
    if scan_layers:
        parameters = _stacked(parameters, config.layers)
    shardings = _shardings(parameters, rules, mesh)
    params = {
        path: _materialise(parameter, dtype, shardings[path])
        for path, parameter in parameters.items()
    }
    return Model(config, unflatten_dict(params, sep="/"))


def load_config(path_or_hub_id: str | Path) -> ModelConfig:
    """The ModelConfig of a checkpoint, from its config.json and generation_config.json.

    Raises InputError for a missing or malformed file, and as ModelConfig.from_hf says.
    """
    directory = locate(path_or_hub_id)
    hf = read_json(directory / CONFIG)
    generation = directory / GENERATION_CONFIG
    generation_config = read_json(generation) if generation.is_file() else None
    try:
        return ModelConfig.from_hf(hf, generation_config)
    except InputError as error:
        raise InputError(f"{directory / CONFIG}: {error}") from None
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{directory / CONFIG}: a field has the wrong type ({error})") from None


def save_model(
    model: Model,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a checkpoint that `load_model` and transformers load; takes both layouts.

    `tokenizer` (anything with `save_pretrained`) is written beside it.

    Raises InputError when config.json cannot express the model or the directory is not writable.
    """
    config = model.config
    hf = config.to_hf() | {"torch_dtype": str(model.dtype)}
    leaves = _unstacked(flatten_dict(model.params, sep="/"), config.layers)
    stored = stored_parameters(config, leaves)
    parts: dict[str, list[str]] = {}
    for path, row in sorted(stored.items(), key=lambda item: item[1].part or 0):
        parts.setdefault(row.name, []).append(path)

    def fetch(name: str) -> np.ndarray:
        arrays = [_arranged(stored[path], leaves[path]()) for path in parts[name]]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)

    per_layer = _abstract_parameters(config)
    sizes = {
        name: model.dtype.itemsize * sum(math.prod(per_layer[path][0]) for path in paths)
        for name, paths in parts.items()
    }
    write_checkpoint(directory, hf, sizes, fetch, max_shard_bytes=max_shard_bytes)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))


def locate(path_or_hub_id: str | Path, patterns: tuple[str, ...] = _PATTERNS) -> Path:
    """The directory of a checkpoint: the path itself, or the cached snapshot of a hub id.

    Only files that match `patterns` are fetched. Raises InputError when there is neither.
    """
    path, name = Path(path_or_hub_id).expanduser(), str(path_or_hub_id)
    if len(name) > LONGEST_PATH:
        raise InputError(f"{name[:40]}...: a path of {len(name)} characters is too long")
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{path} is a file; give the directory that holds {CONFIG}")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise InputError(f"{name}: no such directory")
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{name}: no such directory, and as a Hugging Face id it is neither cached nor "
            f"reachable ({type(error).__name__}: {reason})"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError when it is missing, malformed or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent}: no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def open_tensors(directory: Path) -> Tensors:
    """Every tensor of a directory's safetensors, single or sharded, by name; values stay on disk.

    Raises InputError when there are none, when a file is damaged or missing, when the index and
    the files disagree, and when two files hold the same tensor.
    """
    names = [SINGLE]
    weight_map: dict[str, str] = {}
    if not (directory / SINGLE).is_file():
        if not (directory / INDEX).is_file():
            raise InputError(f"{directory}: no {SINGLE} or {INDEX}{_other_weights(directory)}")
        weight_map = read_json(directory / INDEX).get("weight_map") or {}
        if not isinstance(weight_map, dict) or not all(map(_is_text, weight_map.values())):
            raise InputError(f"{directory / INDEX}: weight_map must map tensor names to file names")
        names = sorted(set(weight_map.values()))
    tensors: Tensors = {}
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{directory / INDEX} names {name!r}, a file outside its directory")
        for tensor, values in _open_file(directory / name).items():
            if tensor in tensors:
                raise InputError(
                    f"{directory}: tensor {tensor} is in two files, {name} and another"
                )
            tensors[tensor] = values
    for tensor, name in weight_map.items():
        if tensor not in tensors:
            raise InputError(f"{directory}: {INDEX} puts tensor {tensor} in {name}, which lacks it")
    return tensors


def write_checkpoint(
    directory: str | Path,
    hf: Mapping[str, Any],
    sizes: Mapping[str, int],
    fetch: Callable[[str], np.ndarray],
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config.json, generation_config.json and the tensors `fetch(name)` as safetensors.

    `sizes` gives every tensor's bytes; above `max_shard_bytes` the files are sharded. Everything is
    written beside its place first, then renamed, config.json last: an interrupted write leaves the
    old checkpoint, or at worst a directory that is refused for its missing config.json.
    Raises InputError when the directory is not writable.
    """
    directory = Path(directory)
    shards = _shards(sizes, max_shard_bytes)
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    tokens = {key: hf[key] for key in hf if key.endswith("_token_id") and hf[key] is not None}
    texts = ({INDEX: index} if len(shards) > 1 else {}) | {GENERATION_CONFIG: tokens, CONFIG: hf}
    places = {file: directory / f".{file}.part" for file in (*shards, *texts)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file, value in texts.items():
            places[file].write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        for file, names in shards.items():
            tensors = {name: np.ascontiguousarray(fetch(name)) for name in names}
            save_file(tensors, places[file], metadata={"format": "pt"})
            # safetensors leaves its files readable to their owner alone.
            places[file].chmod(places[CONFIG].stat().st_mode)
        for old in (directory / CONFIG, directory / INDEX, *directory.glob("model*.safetensors")):
            old.unlink(missing_ok=True)
        for file, place in places.items():
            os.replace(place, directory / file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write a checkpoint to {directory}: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            for place in places.values():
                place.unlink(missing_ok=True)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _shards(sizes: Mapping[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
    """File names with the tensors that go in each, in order."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > max_shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": names
        for number, names in enumerate(groups, start=1)
    }


def _other_weights(directory: Path) -> str:
    others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    return (
        f"; {others[0]} is pickle, which is never read: convert it to safetensors" if others else ""
    )


def _open_file(path: Path) -> Tensors:
    try:
        file = safe_open(path, framework="numpy")
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"{path.parent}: {path.name}, named by {INDEX}, is missing") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error})") from None


def _abstract_parameters(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], Axes]]:
    """Shape and logical axes of every parameter of the per-layer layout, by path."""
    model, axes = abstract_model(config, scan_layers=True)
    named = flatten_dict(axes, sep="/")
    parameters = {}
    for path, leaf in flatten_dict(model.params, sep="/").items():
        kind, _, rest = path.partition("/")
        if kind != STACKED:
            parameters[path] = (leaf.shape, named[path])
            continue
        for layer in range(config.layers):
            parameters[f"{layer_name(layer)}/{rest}"] = (leaf.shape[1:], named[path][1:])
    return parameters


def _match(
    directory: Path,
    config: ModelConfig,
    per_layer: Mapping[str, tuple[tuple[int, ...], Axes]],
    stored: Mapping[str, Stored],
) -> Tensors:
    """The directory's tensors by full name, exactly those that the parameters ask for."""
    shapes = {row.name: row.shape(per_layer[path][0]) for path, row in stored.items()}
    tensors: Tensors = {}
    for name, values in open_tensors(directory).items():
        full = full_name(config, name)
        if full in tensors:
            raise InputError(
                f"{directory}: tensor {full} is there twice, with its prefix and without"
            )
        if full is not None:
            tensors[full] = values
    if config.tied_embeddings and HEAD in tensors:
        embedding = tensors.get(stored["embed/embedding"].name)
        if embedding is not None and not _equal(tensors.pop(HEAD), embedding):
            raise InputError(
                f"{directory}: {HEAD} differs from the embedding, though {CONFIG} ties them"
            )
    for problem, names in (
        ("is missing", shapes.keys() - tensors.keys()),
        (
            f"is no part of a {config.architecture} with this {CONFIG}",
            tensors.keys() - shapes.keys(),
        ),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise InputError(f"{directory}: tensor {min(names)} {problem}{more}")
    for name, shape in shapes.items():
        found, kind = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
        if found != shape:
            raise InputError(f"{directory}: tensor {name} has shape {found}, expected {shape}")
        if kind not in ("F64", "F32", "F16", "BF16"):
            raise InputError(
                f"{directory}: tensor {name} is stored as {kind}, not as floating point"
            )
    return tensors


def _equal(one: Any, other: Any) -> bool:
    if one.get_shape() != other.get_shape():
        return False
    rows = one.get_shape()[0]
    blocks = (slice(start, min(start + 4096, rows)) for start in range(0, rows, 4096))
    return all(np.array_equal(one[block], other[block]) for block in blocks)


def _parameter_dtype(dtype: Any, embedding: Any) -> jnp.dtype:
    if dtype is None:
        dtype = embedding[:0].dtype
    try:
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:
        raise InputError(f"dtype {dtype!r} is unknown; try float32 or bfloat16") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"dtype {dtype} is not a floating-point type; try float32 or bfloat16")
    return dtype


def _reader(row: Stored, shape: tuple[int, ...], tensors: Tensors) -> Callable[[Index], np.ndarray]:
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


def _arranged(row: Stored, array: np.ndarray) -> np.ndarray:
    """A parameter as the files keep it (or its part of a stored tensor)."""
    flat = array.reshape(row.grouped(array.shape))
    return flat.T if row.transposed else flat


def _stacked(per_layer: Mapping[str, _Parameter], layers: int) -> dict[str, _Parameter]:
    """The parameters of the stacked layout, reading from those of the per-layer layout."""
    first = f"{layer_name(0)}/"
    parameters = {}
    for path, parameter in per_layer.items():
        if not path.startswith(f"{STACKED}_"):
            parameters[path] = parameter
        elif path.startswith(first):
            rest = path.removeprefix(first)
            readers = [per_layer[f"{layer_name(layer)}/{rest}"].read for layer in range(layers)]
            parameters[f"{STACKED}/{rest}"] = _Parameter(
                (layers, *parameter.shape),
                ("layers", *parameter.axes),
                functools.partial(_read_stacked, readers),
            )
    return parameters


def _read_stacked(readers: list[Reader], index: Index) -> np.ndarray:
    return np.stack([read(index[1:]) for read in readers[index[0]]])


def _unstacked(flat: Mapping[str, jax.Array], layers: int) -> dict[str, Callable[[], np.ndarray]]:
    """Fetchers of the parameters of the per-layer layout, from either layout's flat dict."""
    fetchers: dict[str, Callable[[], np.ndarray]] = {}
    for path, leaf in flat.items():
        kind, _, rest = path.partition("/")
        if kind != STACKED:
            fetchers[path] = functools.partial(np.asarray, leaf)
            continue
        for layer in range(layers):
            fetchers[f"{layer_name(layer)}/{rest}"] = functools.partial(_fetch_layer, leaf, layer)
    return fetchers


def _fetch_layer(leaf: jax.Array, layer: int) -> np.ndarray:
    return np.asarray(leaf[layer])


def _shardings(
    parameters: Mapping[str, _Parameter], rules: Rules, mesh: Mesh | None
) -> dict[str, NamedSharding | None]:
    if mesh is None:
        return dict.fromkeys(parameters)
    return {
        path: resolve(parameter.axes, rules, mesh, parameter.shape, name=path)
        for path, parameter in parameters.items()
    }


def _materialise(
    parameter: _Parameter, dtype: jnp.dtype, sharding: NamedSharding | None
) -> jax.Array:
    if sharding is None:
        return jnp.asarray(parameter.read((slice(None),) * len(parameter.shape)), dtype)
    replicas: dict[tuple, np.ndarray] = {}

    def shard(index: Index | None) -> np.ndarray:
        index = index or ()
        key = tuple((part.start, part.stop) for part in index)
        if key not in replicas:
            replicas[key] = parameter.read(index).astype(dtype)
        return replicas[key]

    return jax.make_array_from_callback(parameter.shape, sharding, shard)
