"""Writes checkpoints that transformers and `load.py` read: config.json and safetensors.

Everything is written beside its place first, so that an interrupted save spoils nothing.
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
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from w2s_jax.distributed import is_first, to_host
from w2s_jax.errors import InputError, check_kind
from w2s_jax.models.config_json import config_to_hf
from w2s_jax.models.families import FAMILIES
from w2s_jax.models.huggingface import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    SINGLE,
)
from w2s_jax.models.model import Model
from w2s_jax.models.parameters import (
    Parameter,
    decoder_parameters,
    input_major_leaf,
    reward_head,
    stored_places,
)
from w2s_jax.models.quantize import is_quantized
from w2s_jax.models.reward import SCORE, Classifier, RewardModel, encoder_to_hf, stored_in_encoder

SHARD_BYTES = 5_000_000_000


def save_model(
    model: Model,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint that `load_model` and transformers load; takes both layouts.

    `tokenizer` (anything with `save_pretrained`) is written beside it.

    Raises:
        InputError: When config.json cannot express the model, when the model is quantised, or the
            directory is not writable.
    """
    check_kind("save_model", model, Model, "what load_model gives")
    check_kind("save_model's directory", directory, str | Path, "a path")
    if is_quantized(model.params):
        raise InputError(f"{directory}: a quantised model is not saved; save it as it was stored")
    hf = config_to_hf(model.config) | {"torch_dtype": str(model.dtype)}
    table = decoder_parameters(model.config)
    _save(model, model.params, table, hf, directory, tokenizer, max_shard_bytes)


def save_reward_model(
    model: RewardModel,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a sequence classifier that `load_reward_model` and transformers load.

    transformers' classes have no bias in their head and leave out one that is there. `tokenizer`
    (anything with `save_pretrained`) is written beside it.

    Raises:
        InputError: When config.json cannot express the model or the directory is not writable.
    """
    hf = config_to_hf(model.config)
    family = FAMILIES[model.config.architecture]
    usual = re.sub("LMHeadModel|ForCausalLM", "ForSequenceClassification", family.name)
    hf |= {
        "architectures": [family.classifier or usual],
        "torch_dtype": str(model.dtype),
        "id2label": {str(i): name for i, name in enumerate(model.labels)},
        "label2id": {name: i for i, name in enumerate(model.labels)},
    }
    params = {**model.params, "head": model.head}
    rows = reward_head(model.config, SCORE, len(model.labels), bias="bias" in model.head)
    table = decoder_parameters(model.config) | rows
    _save(model, params, table, hf, directory, tokenizer, max_shard_bytes)


def save_classifier(
    classifier: Classifier, directory: str | Path, *, tokenizer: Any = None
) -> None:
    """Write config.json and model.safetensors, as transformers and `load_classifier` read them.

    `tokenizer` (anything with `save_pretrained`) is written beside them.

    Raises:
        InputError: When the directory is not writable.
    """
    leaves = {}
    for path, leaf in flatten_dict(classifier.params, sep="/").items():
        row = stored_in_encoder(path)
        leaves[row.name] = row.arranged(np.asarray(leaf))
    dtype = next(iter(leaves.values())).dtype.name
    sizes = {name: leaf.nbytes for name, leaf in leaves.items()}
    hf = encoder_to_hf(classifier.config) | {"torch_dtype": dtype}
    write_checkpoint(directory, hf, sizes, leaves.__getitem__, tokenizer)


def _save(
    model: Model | RewardModel,
    params: Mapping[str, Any],
    table: Mapping[str, Parameter],
    hf: Mapping[str, Any],
    directory: str | Path,
    tokenizer: Any,
    max_shard_bytes: int,
) -> None:
    """Write parameters, in either layout and of one dtype, with `hf` as their config.json."""
    flat = flatten_dict(dict(params), sep="/")
    leaves: dict[str, tuple[Any, tuple[int, ...]]] = {}
    for path, leaf in flat.items():
        places = stored_places(model.config, path)
        leaves |= {place: (leaf, at) for place, at in places.items()}
    stored = {path: table[path].stored for path in leaves}
    sharing: dict[str, list[str]] = {}
    for path, row in stored.items():
        sharing.setdefault(row.name, []).append(path)

    def host(path: str) -> np.ndarray:
        leaf, at = input_major_leaf(path, leaves[path][0]), leaves[path][1]
        return to_host(leaf[at] if at else leaf)

    def fetch(name: str) -> np.ndarray:
        first, *others = sharing[name]
        if not others:
            return stored[first].arranged(host(first))
        whole = np.empty(stored[first].shape(table[first].shape), model.dtype)
        for path in sharing[name]:
            stored[path].write(whole, host(path))
        return whole

    sizes = {
        name: model.dtype.itemsize * sum(math.prod(table[path].shape) for path in paths)
        for name, paths in sharing.items()
    }
    write_checkpoint(directory, hf, sizes, fetch, tokenizer, max_shard_bytes)


def write_checkpoint(
    directory: str | Path,
    hf: Mapping[str, Any],
    sizes: Mapping[str, int],
    fetch: Callable[[str], np.ndarray],
    tokenizer: Any,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json, generation_config.json and the tensors `fetch(name)` as safetensors.

    `sizes` gives every tensor's bytes; above `max_shard_bytes` the files are sharded. Everything is
    written beside its place first, then renamed, config.json last: an interrupted write leaves the
    old checkpoint, or at worst a directory that is refused for its missing config.json.

    Raises:
        InputError: When the directory is not writable.
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
    write_files(directory, shards, fetch, texts, old, sort="a checkpoint", tokenizer=tokenizer)


def write_files(
    directory: str | Path,
    tensors: Mapping[str, Iterable[str]],
    fetch: Callable[[str], np.ndarray],
    texts: Mapping[str, Mapping[str, Any]],
    old: Iterable[str],
    *,
    sort: str,
    tokenizer: Any = None,
) -> None:
    """Write safetensors files of the tensors `fetch(name)`, and JSON files of `texts`.

    All are written beside their places first, then files that match `old` go and these take their
    places, in order; a tokenizer's follow. Of several hosts, which must all call this, the first
    alone writes.

    Raises:
        InputError: Saying what `sort` of files, when that is not possible.
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
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))


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
