"""Adapters in PEFT's format, in both directions: adapter_config.json and its safetensors.

What adapter_config.json means is in `peft_json.py`, what an adapter does to its base in `lora.py`;
which tensor is which parameter says the table in `parameters.py`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from w2s_jax.distributed import to_host
from w2s_jax.errors import InputError
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.huggingface import (
    ADAPTER,
    ADAPTER_CONFIG,
    FLOATS,
    Tensors,
    about,
    equal,
    is_adapter,
    locate,
    open_file,
    read_json,
)
from w2s_jax.models.lora import FACTORS, LoraConfig, shard_adapter, stack_adapter, stack_experts
from w2s_jax.models.parameters import (
    LANGUAGE_HEAD,
    PROJECTIONS,
    Parameter,
    StoredHead,
    decoder_parameters,
    full_name,
    layer_name,
    module_of,
    reward_head,
    stored_head,
    stored_places,
    unstack_layers,
)
from w2s_jax.models.peft_json import is_target, module_lora, read_lora, write_lora
from w2s_jax.models.save import write_files
from w2s_jax.ops.sharding import DEFAULT_RULES, Rules

_PREFIX = "base_model.model."
_WRAPPERS = r"\.(base_layer|modules_to_save(\.default)?)(?=\.)"
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


def base_of(path_or_hub_id: str | Path) -> str:
    """The base that an adapter names: a hub id, or a folder, also relative to the adapter's own.

    Raises:
        InputError: Where it names none, and where the base is an adapter itself.
    """
    directory = locate(path_or_hub_id)
    name = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{directory / ADAPTER_CONFIG}: base_model_name_or_path is {name!r}; it must name the "
            "adapter's base"
        )
    # The adapter's own first: what lies about a working folder is there by chance.
    for place in (directory / Path(name).expanduser(), Path(name)):
        if place.is_dir():
            if is_adapter(place):
                raise InputError(f"{directory}: its base {name} is an adapter; merge that first")
            return str(place)
    return name


def base_folder(path_or_hub_id: str | Path) -> Path:
    """Where the base that an adapter names lies.

    Raises:
        InputError: As `base_of` does, and, naming the adapter, where the base is not there.
    """
    directory = locate(path_or_hub_id)
    name = base_of(directory)
    with about(f"{directory}: its base"):
        return locate(name)


def adapted_config(
    path_or_hub_id: str | Path, config: ModelConfig, *, head: StoredHead = LANGUAGE_HEAD
) -> ModelConfig:
    """The config of a base of `config` with this adapter on it.

    An adapter may hold an embedding or a head, of another vocabulary too. As PEFT has it, either
    alone, or both where they differ, unties them. A reward model, of another `head`, has but the
    embedding.

    Raises:
        InputError: For missing or damaged files.
    """
    directory = locate(path_or_hub_id)
    with about(directory):
        _, whole = _sorted(config, _open(directory), head)
    return _adapted(config, whole, head)


def _adapted(config: ModelConfig, whole: Tensors, head: StoredHead) -> ModelConfig:
    """`adapted_config`, given the adapter's whole tensors."""
    held = _held_vocabulary(config, whole)
    if not held or any(tensor.shape[1:] != (config.head_inputs,) for tensor in held):
        return config
    rows = held[0].shape[0]
    if head != LANGUAGE_HEAD:
        return replace(config, vocab_size=rows)
    if len(held) == 1:  # it has the rows of the base's other
        return replace(config, tied_embeddings=False)
    tied = config.tied_embeddings and equal(*held)
    return replace(config, tied_embeddings=tied, vocab_size=rows)


def _held_vocabulary(config: ModelConfig, whole: Tensors) -> list[Any]:
    """The embedding and the head that an adapter holds, of whole tensors by their full names."""
    embedding = decoder_parameters(config)["embed/embedding"].stored.name
    return [whole[name] for name in (embedding, stored_head(config).weight) if name in whole]


def load_adapter(
    path_or_hub_id: str | Path,
    config: ModelConfig,
    *,
    head: StoredHead = LANGUAGE_HEAD,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    scan_layers: bool = False,
) -> tuple[LoraConfig, dict[str, Any]]:
    """An adapter of PEFT's, to be attached to or merged into a base of this `adapted_config`.

    The tree is as `init_adapter` makes it, with whole parameters where PEFT saved them
    (`modules_to_save`, `bias`); a reward model's head under `head`'s name is "head". Modules that
    the files fuse (GPT-2's c_attn) give their projections one `lora_a`. Where `rank_pattern` or
    `alpha_pattern` scale a module unlike the others, lora_b holds the difference.

    Raises:
        InputError: For missing or damaged files, for what is not supported, named, for an adapter
            that was made for another base, and for any tensor unmapped, missing or duplicate.
    """
    directory = locate(path_or_hub_id)
    hf = read_json(directory / ADAPTER_CONFIG)
    tensors, modules = _open(directory), _modules(config)
    with about(directory / ADAPTER_CONFIG):
        lora = read_lora(hf)
        places = {module: module_lora(hf, lora, module) for module in modules}
        targets = {module for module in places if is_target(hf, module)}
    with about(directory):
        factors, whole = _sorted(config, tensors, head)
        _check_targets(factors, places, targets)
        adapted = _adapted(config, whole, head)
        held = _held_vocabulary(config, whole)
        if config.tied_embeddings and len(held) == 2 and equal(*held):
            del whole[stored_head(config).weight]  # the embedding again
        flat = _read_whole(config, whole, head)
        if head == LANGUAGE_HEAD and adapted != config:
            raise InputError("it unties the head from the embedding; take `adapted_config`")
        for module, pair in factors.items():
            flat |= _read_factors(module, modules[module], pair, places[module], lora)
    flat = stack_experts(config, flat)
    found = {path.split("/")[-2] for path in flat if path.endswith(FACTORS[0])}
    lora = replace(lora, targets=tuple(name for name in PROJECTIONS if name in found))
    adapter = unflatten_dict({path: jnp.asarray(x, dtype) for path, x in flat.items()}, sep="/")
    if scan_layers:
        adapter = stack_adapter(adapter, config.layers)
    return lora, adapter if mesh is None else shard_adapter(config, adapter, mesh, rules)


def load_factors(
    path_or_hub_id: str | Path,
    config: ModelConfig,
    *,
    mesh: Mesh | None = None,
    scan_layers: bool = False,
) -> tuple[LoraConfig, dict[str, Any]]:
    """An adapter in float32 that is to be trained further beside its base, of this config.

    Raises:
        InputError: As `load_adapter` does, for what is no adapter, and for one that holds whole
            parameters, which are not trained beside a base.
    """
    directory = locate(path_or_hub_id)
    if not is_adapter(directory):
        raise InputError(f"{directory} is no adapter: it holds no {ADAPTER_CONFIG}")
    lora, adapter = load_adapter(directory, config, mesh=mesh, scan_layers=scan_layers)
    leaves = flatten_dict(adapter, sep="/")
    whole = sorted(path for path in leaves if path.split("/")[-1] not in FACTORS)
    if whole:
        raise InputError(
            f"{directory}: {whole[0]} is a whole parameter, which is not trained beside a base; "
            f"merge the adapter: w2s convert {directory} TARGET"
        )
    return lora, adapter


def _open(directory: Path) -> Tensors:
    if (directory / ADAPTER).is_file():
        return open_file(directory / ADAPTER)
    pickled = (directory / ADAPTER).with_suffix(".bin")
    found = f"; {pickled.name} is pickle, which is never read" if pickled.is_file() else ""
    raise InputError(f"{directory}: no {ADAPTER}{found}")


def _modules(config: ModelConfig) -> dict[str, dict[str, Parameter]]:
    """The kernels that files keep in each module that can be adapted, by their places."""
    table = decoder_parameters(config)
    modules: dict[str, dict[str, Parameter]] = {}
    for layer in range(config.layers):
        for name in PROJECTIONS:
            path = f"{layer_name(layer)}/{module_of(config, name)}/kernel"
            for one in stored_places(config, path):
                if one in table:
                    module = table[one].stored.name.removesuffix(".weight")
                    modules.setdefault(module, {})[one.removesuffix("/kernel")] = table[one]
    return modules


def _sorted(
    config: ModelConfig, tensors: Tensors, head: StoredHead
) -> tuple[dict[str, dict[str, Any]], Tensors]:
    """The factors by the full name of their module, and whole tensors by their full names."""
    factors: dict[str, dict[str, Any]] = {}
    whole: Tensors = {}
    for name, values in tensors.items():
        bare = name.removeprefix(_PREFIX)
        match = _FACTOR.fullmatch(bare)
        if bare == name or (match is None and "lora_" in bare):
            raise InputError(f"tensor {name} is not supported in an adapter")
        if ".original_module." in bare:
            continue  # what stood there before `modules_to_save` did
        bare = re.sub(_WRAPPERS, "", bare)
        full = full_name(config, f"{match[1]}.weight" if match else bare, head)
        if full is None:
            continue
        held = factors.setdefault(full.removesuffix(".weight"), {}) if match else whole
        key = match[2] if match else full
        if key in held and not match and equal(values, held[key]):
            continue  # PEFT writes a resized embedding under its own name and its wrapper's
        if key in held:
            raise InputError(f"tensor {name} is there twice, under another name too")
        if values.dtype not in FLOATS:
            raise InputError(f"tensor {name} is {values.dtype}, not floating point")
        held[key] = values
    return factors, whole


def _check_targets(
    factors: Mapping[str, Mapping[str, Any]], known: Iterable[str], targets: set[str]
) -> None:
    """Raise InputError unless all targeted modules have both factors, and no others any."""
    last = list(dict.fromkeys(name.split(".")[-1] for name in known))
    for module, pair in factors.items():
        if module not in known:
            if module.split(".")[-1] in last:
                raise InputError(f"the adapter is for another base: this one has no {module}")
            raise InputError(f"adapting {module} is not supported; {', '.join(last)} can be")
        for name in "AB":
            if name not in pair:
                raise InputError(f"tensor {_tensor(module, name)} is missing")
        if module not in targets:
            raise InputError(f"adapts {module}, which {ADAPTER_CONFIG} does not target")
    for module in known:
        if module in targets and module not in factors:
            raise InputError(
                f"tensor {_tensor(module, 'A')} is missing, though {ADAPTER_CONFIG} targets it"
            )
    if not factors:
        raise InputError(f"{ADAPTER} adapts no module that its base has")


def _tensor(module: str, factor: str) -> str:
    return f"{_PREFIX}{module}.lora_{factor}.weight"


def _read_factors(
    module: str,
    kernels: Mapping[str, Parameter],
    pair: Mapping[str, Any],
    own: LoraConfig,
    lora: LoraConfig,
) -> dict[str, np.ndarray]:
    """lora_a and lora_b of one module's kernels; `own` is its scale, `lora` is to be it."""
    inputs, outputs = _sizes(kernels)
    for name, expected in (("A", (own.rank, inputs)), ("B", (outputs, own.rank))):
        _check_shape(_tensor(module, name), pair[name], expected)
    a, b = (np.asarray(pair[name][:], np.float32) for name in "AB")
    b = b * np.float32(own.scale / lora.scale)
    blocks = [row.stored.take(b, row.shape) for row in kernels.values()]
    factors = [(a, block) for block in blocks]
    if len(kernels) > 1 and own.rank == len(kernels) * lora.rank:
        factors = _apart(a, blocks) or factors
    flat: dict[str, np.ndarray] = {}
    for (place, row), (a, b) in zip(kernels.items(), factors, strict=True):
        if len(kernels) > 1 and not (a.any() or b.any()):
            continue
        split = row.stored.groups[0]
        flat[f"{place}/lora_a"] = a.T.reshape(*row.shape[:split], len(a))
        flat[f"{place}/lora_b"] = b.T.reshape(len(a), *row.shape[split:])
    return flat


def _sizes(kernels: Mapping[str, Parameter]) -> tuple[int, int]:
    """Inputs and outputs of the module that holds these kernels."""
    row = next(iter(kernels.values()))
    first, second = row.stored.shape(row.shape)
    return (second, first) if row.stored.transposed else (first, second)


def _check_shape(name: str, values: Any, expected: tuple[int, ...]) -> None:
    if values.shape != expected:
        raise InputError(
            f"the adapter is for another base: tensor {name} has shape {values.shape}, "
            f"expected {expected}"
        )


def _apart(a: np.ndarray, blocks: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """What `_joined` joined: each projection's own factors; None where they share them."""
    count, rank = len(blocks), len(a) // len(blocks)
    cells = [np.split(block, count, axis=1) for block in blocks]
    if any(cells[i][j].any() for i in range(count) for j in range(count) if i != j):
        return None
    return [(a[i * rank : (i + 1) * rank], cells[i][i]) for i in range(count)]


def _joined(
    factors: list[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, list[np.ndarray]]:
    """PEFT's A [r, inputs] of a module that fuses projections, and what of its B is each one's.

    Projections with factors of their own lie in blocks, which multiplies the rank.
    """
    first = factors[0][0]
    if all(np.array_equal(a, first) for a, _ in factors):
        return first, [b for _, b in factors]
    ranks = np.cumsum([0, *(len(a) for a, _ in factors)])
    blocks = [np.zeros((len(b), ranks[-1]), b.dtype) for _, b in factors]
    for block, (_, b), start, stop in zip(blocks, factors, ranks[:-1], ranks[1:], strict=True):
        block[:, start:stop] = b
    return np.concatenate([a for a, _ in factors]), blocks


def _read_whole(config: ModelConfig, whole: Tensors, head: StoredHead) -> dict[str, np.ndarray]:
    """Parameters that were saved whole, by path."""
    table = decoder_parameters(config, head)
    if head != LANGUAGE_HEAD and head.weight in whole:
        labels = whole[head.weight].shape[0]
        table |= reward_head(config, head, labels, bias=False)
    expected = {row.stored.name: row.stored.shape(row.shape) for row in table.values()}
    for name, values in whole.items():
        if name not in expected:
            tied = name == stored_head(config).weight and config.tied_embeddings
            why = "its base ties the head to the embedding" if tied else "its base has no such part"
            raise InputError(f"tensor {_PREFIX}{name} cannot be taken: {why}")
        _check_shape(f"{_PREFIX}{name}", values, expected[name])
    return {
        path: np.asarray(row.read(whole), np.float32)
        for path, row in table.items()
        if row.stored.name in whole
    }


def save_adapter(
    directory: str | Path,
    config: ModelConfig,
    lora: LoraConfig,
    adapter: Mapping[str, Any],
    base: str,
    *,
    tokenizer: Any = None,
) -> None:
    """Write an adapter, in either layout, that `load_adapter` and PEFT load onto `base`.

    Where files fuse projections (GPT-2's c_attn) that have factors of their own here, these are
    written as blocks of one adapter of as many times the rank. `tokenizer` is written beside it.

    Raises:
        InputError: For an adapter that holds whole parameters, and when the directory is not
            writable.
    """
    flat = flatten_dict(unstack_layers(dict(adapter)), sep="/")
    whole = [path for path in flat if not path.endswith(FACTORS)]
    if whole:
        raise InputError(
            f"the adapter holds {whole[0]} whole, which is not written in PEFT's format; merge it"
        )
    flat = {
        place: leaf[at] if at else leaf
        for path, leaf in flat.items()
        for place, at in stored_places(config, path).items()
    }
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    modules = _modules(config)
    for module, kernels in modules.items():
        pair = _module_factors(flat, kernels)
        if pair is not None:
            tensors |= {_tensor(module, name): x for name, x in zip("AB", pair, strict=True)}
            ranks[module] = len(pair[0])
    hf = write_lora(config, lora, base, ranks, list(modules))
    files, texts = {ADAPTER: list(tensors)}, {ADAPTER_CONFIG: hf}
    told: dict[str, Any] = {"sort": "an adapter", "tokenizer": tokenizer}
    write_files(directory, files, tensors.__getitem__, texts, (), **told)


def _module_factors(
    flat: Mapping[str, Any], kernels: Mapping[str, Parameter]
) -> tuple[np.ndarray, np.ndarray] | None:
    """PEFT's A and B of one module; None where nothing of it is adapted."""
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for place in kernels:
        if f"{place}/lora_a" in flat:
            a, b = to_host(tuple(flat[f"{place}/{name}"] for name in FACTORS))
            pairs[place] = a.reshape(-1, len(b)).T, b.reshape(len(b), -1).T
    if not pairs:
        return None
    none = np.zeros_like(next(iter(pairs.values()))[0])
    for place, row in kernels.items():
        outputs = row.stored.grouped(row.shape)[-1]
        pairs.setdefault(place, (none, np.zeros((outputs, len(none)), none.dtype)))
    a, blocks = _joined([pairs[place] for place in kernels])
    b = np.empty((_sizes(kernels)[1], len(a)), a.dtype)
    for row, block in zip(kernels.values(), blocks, strict=True):
        row.stored.put(b, block, row.shape)
    return a, b
