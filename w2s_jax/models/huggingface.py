"""Decoder checkpoints in Hugging Face's format, in both directions: config.json and safetensors.

No code from a checkpoint is run: pickle files are refused and nothing trusts remote code. Which
tensor is which is in `models/names.py`, how it lies there in `models/tensors.py`, what config.json
means in `models/config_json.py`.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import save_file

from w2s_jax.distributed import is_first
from w2s_jax.errors import InputError, check_fetched, check_kind
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.config_json import config_from_hf, config_to_hf
from w2s_jax.models.model import Model, parameter_dtype
from w2s_jax.models.parameters import (
    LANGUAGE_HEAD,
    Stored,
    StoredHead,
    full_name,
    stored_parameters,
)
from w2s_jax.models.quantize import QuantizeConfig, is_quantized
from w2s_jax.models.tensors import (
    INDEX,
    SINGLE,
    Parameter,
    Parameters,
    Tensors,
    arranged,
    decoder_parameters,
    equal,
    major_axis,
    materialise,
    open_file,
    reader,
    stacked,
    unstacked,
)
from w2s_jax.ops.sharding import DEFAULT_RULES, Placement, Rules, check_placing

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
)
LONGEST_PATH = 4000
# An adapter's, which stand in the place of config.json and model.safetensors.
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
_PATTERNS = (
    CONFIG,
    GENERATION_CONFIG,
    "model*.safetensors",
    INDEX,
    ADAPTER_CONFIG,
    ADAPTER,
    *TOKENIZER_PATTERNS,
)


def load_decoder(
    directory: Path,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    scan_layers: bool = False,
    quantize: QuantizeConfig | None = None,
) -> Model:
    """The decoder that a directory's own files hold; arguments and errors as of `load_model`."""
    config = load_decoder_config(directory)
    params = load_parameters(
        directory,
        config,
        decoder_parameters(config),
        open_tensors(directory),
        dtype=dtype,
        mesh=mesh,
        rules=rules,
        scan_layers=scan_layers,
        quantize=quantize,
    )
    return Model(config, params, Placement(mesh, rules))


def load_parameters(
    directory: Path,
    config: ModelConfig,
    per_layer: Parameters,
    tensors: Tensors,
    *,
    head: StoredHead = LANGUAGE_HEAD,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    scan_layers: bool = False,
    quantize: QuantizeConfig | None = None,
) -> dict[str, Any]:
    """The parameters `per_layer` names, as a nested dict, from the tensors of `directory`.

    `head` says under which name their "head/kernel" is kept; the rest is as in `load_model`.

    Raises InputError for any tensor unmapped, missing, duplicate or misshapen.
    """
    check_placing(mesh, rules)
    check_kind("quantize", quantize, QuantizeConfig | None, "a QuantizeConfig")
    stored = stored_parameters(config, per_layer, head)
    tensors = _match(directory, config, per_layer, stored, tensors, head)
    dtype = parameter_dtype(dtype, tensors[stored["embed/embedding"].name][:0].dtype)
    parameters = {
        path: Parameter(
            shape, axes, reader(stored[path], shape, tensors), (major_axis(stored[path]),)
        )
        for path, (shape, axes) in per_layer.items()
    }
    if scan_layers:
        parameters = stacked(parameters, config.layers)
    params = materialise(parameters, dtype, rules, mesh, quantize)
    return unflatten_dict(params, sep="/")


def load_decoder_config(directory: Path) -> ModelConfig:
    """The ModelConfig that a directory's own config.json and generation_config.json say.

    Raises InputError for a missing or malformed file, and as `config_from_hf` says.
    """
    hf = read_json(directory / CONFIG)
    generation = directory / GENERATION_CONFIG
    generation_config = read_json(generation) if generation.is_file() else None
    try:
        return config_from_hf(hf, generation_config)
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

    Raises InputError when config.json cannot express the model, when the model is quantised, or the
    directory is not writable.
    """
    check_kind("save_model", model, Model, "what load_model gives")
    check_kind("save_model's directory", directory, str | Path, "a path")
    if is_quantized(model.params):
        raise InputError(f"{directory}: a quantised model is not saved; save it as it was stored")
    hf = config_to_hf(model.config) | {"torch_dtype": str(model.dtype)}
    save_parameters(model.config, model.params, directory, hf, max_shard_bytes=max_shard_bytes)
    if tokenizer is not None and is_first():
        tokenizer.save_pretrained(str(directory))


def save_parameters(
    config: ModelConfig,
    params: Mapping[str, Any],
    directory: str | Path,
    hf: Mapping[str, Any],
    *,
    head: StoredHead = LANGUAGE_HEAD,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write parameters, in either layout and of one dtype, with `hf` as their config.json.

    Raises InputError when the directory is not writable.
    """
    flat = flatten_dict(params, sep="/")
    leaves = unstacked(flat, config.layers)
    stored = stored_parameters(config, leaves, head)
    parts: dict[str, list[str]] = {}
    for path, row in sorted(stored.items(), key=lambda item: item[1].part or 0):
        parts.setdefault(row.name, []).append(path)

    def fetch(name: str) -> np.ndarray:
        arrays = [arranged(stored[path], leaves[path]()) for path in parts[name]]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)

    shapes = {path: shape for path, (shape, _) in decoder_parameters(config).items()} | {
        path: leaf.shape for path, leaf in flat.items() if path.startswith("head/")
    }
    itemsize = flat["embed/embedding"].dtype.itemsize
    sizes = {
        name: itemsize * sum(math.prod(shapes[path]) for path in paths)
        for name, paths in parts.items()
    }
    write_checkpoint(directory, hf, sizes, fetch, max_shard_bytes=max_shard_bytes)


def locate(path_or_hub_id: str | Path, patterns: tuple[str, ...] = _PATTERNS) -> Path:
    """The directory of a checkpoint: the path itself, or the cached snapshot of a hub id.

    Only files that match `patterns` are fetched. Raises InputError when there is neither.
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
    shards = _shards(sizes, max_shard_bytes)
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    tokens = {key: hf[key] for key in hf if key.endswith("_token_id") and hf[key] is not None}
    texts = ({INDEX: index} if len(shards) > 1 else {}) | {GENERATION_CONFIG: tokens, CONFIG: hf}
    # An adapter's files are a checkpoint too, which PEFT would take for the one that is here.
    old = (CONFIG, INDEX, "model*.safetensors", ADAPTER_CONFIG, ADAPTER)
    write_files(directory, shards, fetch, texts, old, sort="a checkpoint")


def write_files(
    directory: str | Path,
    tensors: Mapping[str, Iterable[str]],
    fetch: Callable[[str], np.ndarray],
    texts: Mapping[str, Mapping[str, Any]],
    old: Iterable[str],
    *,
    sort: str,
) -> None:
    """Write safetensors files of the tensors `fetch(name)`, and JSON files of `texts`.

    All are written beside their places first, then files that match `old` go and these take their
    places, in order. Of several hosts, which must all call this, the first alone writes. Raises
    InputError, saying what `sort` of files, when that is not possible.
    """
    if not is_first():
        for names in tensors.values():
            for name in names:
                fetch(name)  # which may take all hosts
        return
    directory = Path(directory)
    places = {file: directory / f".{file}.part" for file in (*tensors, *texts)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file, value in texts.items():
            places[file].write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        mode = places[next(iter(texts))].stat().st_mode
        for file, names in tensors.items():
            held = {name: np.ascontiguousarray(fetch(name)) for name in names}
            save_file(held, places[file], metadata={"format": "pt"})
            # safetensors leaves its files readable to their owner alone.
            places[file].chmod(mode)
        for pattern in old:
            for path in directory.glob(pattern):
                path.unlink(missing_ok=True)
        for file, place in places.items():
            os.replace(place, directory / file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {sort} to {directory}: {error}") from None
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
    if not others:
        return "; only safetensors are read: convert other files to it"
    return f"; {others[0]} is pickle, which is never read: convert it to safetensors"


def _match(
    directory: Path,
    config: ModelConfig,
    per_layer: Parameters,
    stored: Mapping[str, Stored],
    found: Tensors,
    head: StoredHead,
) -> Tensors:
    """The directory's tensors by full name, exactly those that the parameters ask for."""
    shapes = {row.name: row.shape(per_layer[path][0]) for path, row in stored.items()}
    tensors: Tensors = {}
    for name, values in found.items():
        full = full_name(config, name, head)
        if full in tensors and not (head.wrapped and equal(values, tensors[full])):
            how = "with different values" if head.wrapped else "with its prefix and without"
            raise InputError(f"{directory}: tensor {full} is there twice, {how}")
        if full is not None:
            tensors[full] = values
    if config.tied_embeddings and head == LANGUAGE_HEAD and head.weight in tensors:
        embedding = tensors.get(stored["embed/embedding"].name)
        if embedding is not None and not equal(tensors.pop(head.weight), embedding):
            raise InputError(
                f"{directory}: {head.weight} differs from the embedding, though {CONFIG} ties them"
            )
    kind = (
        config.architecture if head == LANGUAGE_HEAD else f"{config.architecture} with {head.name}"
    )
    for problem, names in (
        ("is missing", shapes.keys() - tensors.keys()),
        (
            f"is no part of a {kind} with this {CONFIG}",
            tensors.keys() - shapes.keys(),
        ),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise InputError(f"{directory}: tensor {min(names)} {problem}{more}")
    for name, shape in shapes.items():
        held, dtype = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
        if held != shape:
            raise InputError(f"{directory}: tensor {name} has shape {held}, expected {shape}")
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise InputError(
                f"{directory}: tensor {name} is stored as {dtype}, not as floating point"
            )
    return tensors
