"""The door to what a folder holds: a decoder, an adapter on its base, a reward model, an encoder.

What is in the files is in `huggingface.py`, which tensor is which parameter in `parameters.py`.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from w2s_jax.errors import InputError, check_kind
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.config_json import config_from_hf
from w2s_jax.models.families import ARCHITECTURES
from w2s_jax.models.huggingface import (
    ADAPTER_CONFIG,
    CONFIG,
    FLOATS,
    GENERATION_CONFIG,
    Source,
    Tensors,
    about,
    equal,
    expert_sources,
    is_adapter,
    locate,
    materialise,
    open_tensors,
    output_major_sources,
    read_json,
    stacked_sources,
)
from w2s_jax.models.lora import attach, merge, take_vocabulary, with_vocabulary
from w2s_jax.models.model import STORED, Model, decodes_output_major, parameter_dtype
from w2s_jax.models.parameters import (
    LANGUAGE_HEAD,
    REWARD_HEADS,
    Parameter,
    StoredHead,
    decoder_parameters,
    full_name,
    is_of_images,
    is_output_major,
    output_major_leaf,
    output_major_params,
    reward_head,
    stored_head,
)
from w2s_jax.models.peft import adapted_config, base_folder, base_of, load_adapter
from w2s_jax.models.quantize import QuantizeConfig, is_quantized
from w2s_jax.models.reward import (
    ENCODER,
    ENCODER_CLASS,
    SCORE,
    Classifier,
    EncoderConfig,
    RewardModel,
    encoder_from_hf,
    init_classifier,
    stored_in_encoder,
)
from w2s_jax.ops.layers import OutputMajor
from w2s_jax.ops.sharding import DEFAULT_RULES, Placement, Rules, check_placing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loading:
    """How parameters are read; `load_model` says what each field means."""

    dtype: Any = None
    mesh: Mesh | None = None
    rules: Rules = DEFAULT_RULES
    scan_layers: bool = False
    quantize: QuantizeConfig | None = None
    decoding: bool = False

    @property
    def output_major(self) -> bool:
        """Whether matrices are kept as CPUs decode."""
        return self.decoding and decodes_output_major(self.mesh, scan_layers=self.scan_layers)

    @property
    def placement(self) -> Placement:
        """Where what is read will lie."""
        return Placement(self.mesh, self.rules)


def load_model(
    path_or_hub_id: str | Path,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    scan_layers: bool = False,
    quantize: QuantizeConfig | None = None,
    decoding: bool = False,
) -> Model:
    """Load a decoder from a directory, or from the Hugging Face hub through its local cache.

    A directory of a LoRA adapter gives the base that it names with the adapter merged into it. Host
    memory stays below the process's part of the model and three times the largest tensor (with
    scan_layers, of the process's part of the largest stack).

    Args:
        path_or_hub_id: The directory, or an id on the hub.
        dtype: Of the parameters. None is as stored (as the embedding is), but float32 on a CPU,
            which computes slowly in the half-sized types, and with an adapter; "stored" is so
            everywhere.
        mesh: Every tensor is read slice by slice into its shards on this mesh.
        rules: Which axes of it split which of the parameters' logical axes.
        scan_layers: Stack the layers on a leading axis (see `decoder.py`).
        quantize: Weights become QTensors as they are read; adapters then stay beside them.
        decoding: Keep matrices output-major where a CPU is to read few tokens at a time, as in a
            search: twice as fast there. Nothing changes elsewhere, on a mesh, or with scan_layers.

    Returns:
        The model, which knows where its parameters lie.

    Raises:
        InputError: For a missing directory, config.json or safetensors, an architecture that is not
            supported, a damaged file, and any tensor unmapped, missing, duplicate or misshapen.
    """
    directory = locate(path_or_hub_id)
    how = Loading(dtype, mesh, rules, scan_layers, quantize, decoding)
    if is_adapter(directory):
        return _load_adapted(directory, None, True, how)
    config = _own_config(directory)
    table = decoder_parameters(config)
    params = load_parameters(directory, config, table, open_tensors(directory), how)
    return Model(config, params, how.placement)


def load_adapted(
    path_or_hub_id: str | Path, base: Model | None = None, *, merged: bool = True, **options: Any
) -> Model:
    """A base with an adapter on it: merged into its kernels, or beside the base's own arrays.

    base None loads the one that the adapter names; the options are those of `load_model`, but
    without a dtype, or as "stored", what is merged is float32: a dtype of fewer bits, as bases are
    often stored in, would lose most of an adapter. On a quantised base the adapter stays beside it,
    `merged` or not.

    Raises:
        InputError: As `load_model` and `load_adapter` do.
    """
    return _load_adapted(locate(path_or_hub_id), base, merged, Loading(**options))


def _load_adapted(directory: Path, base: Model | None, merged: bool, how: Loading) -> Model:
    if base is None:
        name = base_of(directory)
        if how.dtype in (None, STORED) and merged and how.quantize is None:
            how = replace(how, dtype="float32")
        with about(f"{directory}: its base"):
            base = load_model(name, **vars(how))
    config = adapted_config(directory, base.config)
    place: dict[str, Any] = {"mesh": how.mesh, "rules": how.rules, "scan_layers": base.scan_layers}
    lora, adapter = load_adapter(directory, config, dtype=base.dtype, **place)
    base = with_vocabulary(base, config, adapter)
    into = merge if merged and not is_quantized(base.params) else attach
    params = into(base.params, adapter, lora)
    if is_output_major(base.params):  # what the adapter replaces is not yet
        params = output_major_params(params, tied=config.tied_embeddings)
    return Model(base.config, params, base.placement)


def load_config(path_or_hub_id: str | Path) -> ModelConfig:
    """The ModelConfig of a checkpoint, from its config.json and generation_config.json.

    For an adapter it is that of the base it names, with what the adapter changes of it.

    Raises:
        InputError: For a missing or malformed file, and as `config_from_hf` says.
    """
    directory = locate(path_or_hub_id)
    if is_adapter(directory):
        return adapted_config(directory, load_config(base_folder(directory)))
    return _own_config(directory)


def _own_config(directory: Path) -> ModelConfig:
    """What a directory's own config.json and generation_config.json say."""
    hf = read_json(directory / CONFIG)
    generation = directory / GENERATION_CONFIG
    generation_config = read_json(generation) if generation.is_file() else None
    try:
        return config_from_hf(hf, generation_config)
    except InputError as error:
        raise InputError(f"{directory / CONFIG}: {error}") from None
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{directory / CONFIG}: a field has the wrong type ({error})") from None


def load_parameters(
    directory: Path,
    config: ModelConfig,
    table: Mapping[str, Parameter],
    tensors: Tensors,
    how: Loading,
    *,
    head: StoredHead = LANGUAGE_HEAD,
) -> dict[str, Any]:
    """The parameters of the table, as a nested dict, from the tensors of `directory`.

    `head` says under which name their "head/kernel" is kept.

    Raises:
        InputError: For any tensor unmapped, missing, duplicate or misshapen.
    """
    check_placing(how.mesh, how.rules)
    check_kind("quantize", how.quantize, QuantizeConfig | None, "a QuantizeConfig")
    tensors = _match(directory, config, table, tensors, head)
    dtype = parameter_dtype(how.dtype, tensors[table["embed/embedding"].stored.name][:0].dtype)
    sources = {
        path: Source(row.shape, row.axes, partial(row.read, tensors), (row.stored.major_axis,))
        for path, row in table.items()
    }
    sources = expert_sources(sources, config.experts)
    if how.scan_layers:
        sources = stacked_sources(sources, config.layers)
    tied = config.tied_embeddings and head == LANGUAGE_HEAD
    read = partial(materialise, dtype=dtype, rules=how.rules, mesh=how.mesh, quantize=how.quantize)
    if not how.output_major:
        return unflatten_dict(read(sources), sep="/")
    rows_first = output_major_sources(table, tensors, tied, how.quantize)
    params: dict[str, Any] = {**read(sources | rows_first, aligned=True)}
    for path in params:  # one by one, so that no more than one of them is held twice
        if path in rows_first:
            params[path] = OutputMajor(params[path], table[path].shape)
        params[path] = output_major_leaf(path, params[path], tied=tied)
    return unflatten_dict(params, sep="/")


def _match(
    directory: Path,
    config: ModelConfig,
    table: Mapping[str, Parameter],
    found: Tensors,
    head: StoredHead,
) -> Tensors:
    """The directory's tensors by full name, exactly those that the parameters ask for."""
    shapes = {row.stored.name: row.stored.shape(row.shape) for row in table.values()}
    images = sum(is_of_images(config, name) for name in found)
    if images:
        log.warning("%s: only its text part is read; %d tensors read images", directory, images)
    tensors: Tensors = {}
    for name, values in found.items():
        full = full_name(config, name, head)
        if full in tensors and not (head.wrapped and equal(values, tensors[full])):
            how = "with different values" if head.wrapped else "with its prefix and without"
            raise InputError(f"{directory}: tensor {full} is there twice, {how}")
        if full is not None:
            tensors[full] = values
    own = stored_head(config, head).weight
    if config.tied_embeddings and head == LANGUAGE_HEAD and own in tensors:
        embedding = tensors.get(table["embed/embedding"].stored.name)
        if embedding is not None and not equal(tensors.pop(own), embedding):
            raise InputError(
                f"{directory}: {own} differs from the embedding, though {CONFIG} ties them"
            )
    kind = config.architecture + (f" with {head.name}" if head != LANGUAGE_HEAD else "")
    problems = {
        "is missing": shapes.keys() - tensors.keys(),
        f"is no part of a {kind} with this {CONFIG}": tensors.keys() - shapes.keys(),
    }
    for problem, names in problems.items():
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise InputError(f"{directory}: tensor {min(names)} {problem}{more}")
    for name, shape in shapes.items():
        held, dtype = tensors[name].shape, tensors[name].dtype
        if held != shape:
            raise InputError(f"{directory}: tensor {name} has shape {held}, expected {shape}")
        if dtype not in FLOATS:
            raise InputError(
                f"{directory}: tensor {name} is stored as {dtype}, not as floating point"
            )
    return tensors


def load_reward_model(
    path_or_hub_id: str | Path,
    *,
    base: str | Path | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    scan_layers: bool = False,
    decoding: bool = False,
) -> RewardModel | Classifier:
    """Load a reward model from a directory or a hub id: a decoder's, or an encoder classifier.

    The head's tensors tell the layout: `score` of transformers' sequence classifiers,
    `regression_head` of UltraRM (arXiv 2310.01377), `v_head` of Starling-RM, whose decoder may be
    named `model`, `transformer` or `model.model`. An adapter is merged into `base`, by default the
    one it names, a reward model or a language model; its head may be in its own files. The options
    are those of `load_model` but for `quantize`; an encoder is small and stays whole.

    Raises:
        InputError: As `load_model` does, and for a checkpoint with no head that is known here.
    """
    directory = locate(path_or_hub_id)
    how = Loading(dtype, mesh, rules, scan_layers, decoding=decoding)
    if is_adapter(directory):
        return _load_adapted_reward(directory, base_of(directory) if base is None else base, how)
    config = load_reward_config(directory)
    if isinstance(config, EncoderConfig):
        return load_classifier(directory, dtype=how.dtype)
    tensors = open_tensors(directory)
    head, labels = _find_head(directory, tensors)
    rows = reward_head(config, head, len(labels), bias=head.bias in tensors)
    table = decoder_parameters(config, head) | rows
    params = load_parameters(directory, config, table, tensors, how, head=head)
    own = params.pop("head")
    return RewardModel(config, params, own, labels, how.placement)


def _load_adapted_reward(directory: Path, base: str | Path, how: Loading) -> RewardModel:
    """An adapter merged into its base, with the head of either."""
    base = locate(base)
    # Weights of fewer bits, as bases are often stored in, would lose most of an adapter.
    how = replace(how, dtype=how.dtype or "float32")
    head, labels, config = _adapted_head(directory, base)
    if isinstance(config, EncoderConfig):
        raise InputError(f"{directory}: adapters on encoders ({base}) are not supported")
    place: dict[str, Any] = {"mesh": how.mesh, "rules": how.rules, "scan_layers": how.scan_layers}
    read = load_reward_model if is_reward_model(base) else load_model
    found = read(base, dtype=how.dtype, decoding=how.decoding, **place)
    assert isinstance(found, RewardModel | Model)
    old = dict(found.head) if isinstance(found, RewardModel) else {}
    params = {name: subtree for name, subtree in found.params.items() if name != "head"}
    lora, adapter = load_adapter(directory, config, head=head, dtype=found.dtype, **place)
    new = old | adapter.pop("head", {})
    params = take_vocabulary(params, adapter)
    if not new:
        raise InputError(f"{directory}: neither the adapter nor its base {base} has a reward head")
    labels = _adapted_labels(labels, new)
    merged = merge(params, adapter, lora)
    if is_output_major(found.params):
        merged = output_major_params(merged, tied=False)
    return RewardModel(config, merged, new, labels, found.placement)


def is_reward_model(path_or_hub_id: str | Path) -> bool:
    """Whether a checkpoint has a reward head, or is an adapter of a task or on a base with one."""
    directory = locate(path_or_hub_id)
    if is_adapter(directory):
        of_task = read_json(directory / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"
        return of_task or is_reward_model(base_of(directory))
    encoder = read_json(directory / CONFIG).get("model_type") == ENCODER
    return encoder or any(head.weight in open_tensors(directory) for head in REWARD_HEADS)


def load_reward_config(path_or_hub_id: str | Path) -> ModelConfig | EncoderConfig:
    """The config of a reward model, a decoder's or an encoder's, without its weights.

    Raises:
        InputError: For a missing or malformed file and for a model that is not supported.
    """
    directory = locate(path_or_hub_id)
    if is_adapter(directory):
        return _adapted_head(directory, locate(base_of(directory)))[2]
    kind = read_json(directory / CONFIG).get("model_type")
    if kind == ENCODER:
        return _encoder_config(directory)
    if kind not in ARCHITECTURES:
        raise InputError(
            f"{directory / CONFIG}: model_type {kind!r} is not supported for a reward model; "
            f"supported: {', '.join((*ARCHITECTURES, ENCODER))}"
        )
    return load_config(directory)


def load_reward_labels(path_or_hub_id: str | Path) -> tuple[str, ...]:
    """The names of a reward model's labels, one for each logit, without its weights.

    Raises:
        InputError: As `load_reward_model` does, but for the tensors' shapes.
    """
    directory = locate(path_or_hub_id)
    config = load_reward_config(directory)
    if isinstance(config, EncoderConfig):
        return config.label_names
    if not is_adapter(directory):
        return _find_head(directory, open_tensors(directory))[1]
    head, labels, _ = _adapted_head(directory, locate(base_of(directory)))
    _, adapter = load_adapter(directory, config, head=head)
    return _adapted_labels(labels, adapter["head"]) if "head" in adapter else labels


def _adapted_head(
    directory: Path, base: Path
) -> tuple[StoredHead, tuple[str, ...], ModelConfig | EncoderConfig]:
    """The head and the labels of an adapter's base, which may have none, and the adapted config."""
    config = load_reward_config(base)
    if isinstance(config, EncoderConfig):
        return SCORE, (), config
    whole = is_reward_model(base)
    head, labels = _find_head(base, open_tensors(base)) if whole else (SCORE, ())
    return head, labels, adapted_config(directory, config, head=head)


def _adapted_labels(labels: tuple[str, ...], head: Mapping[str, Any]) -> tuple[str, ...]:
    """The base's labels, or transformers' own names where the adapter's head has others."""
    count = head["kernel"].shape[-1]
    return labels if len(labels) == count else tuple(f"LABEL_{i}" for i in range(count))


def _find_head(directory: Path, tensors: Tensors) -> tuple[StoredHead, tuple[str, ...]]:
    """The one reward head among the tensors, of a class that config.json may name; its labels."""
    hf = read_json(directory / CONFIG)
    heads = [head for head in REWARD_HEADS if head.weight in tensors]
    if len(heads) != 1:
        found = " and ".join(head.weight for head in heads) or "no reward head"
        known = ", ".join(head.weight for head in REWARD_HEADS)
        raise InputError(f"{directory}: holds {found}; a reward model has one of {known}")
    classes = hf.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InputError(f"{directory / CONFIG}: architectures is {classes!r}, not a list of names")
    known = heads[0].classes.replace(".*", "*").replace("|", ", ")
    for name in classes:
        if not re.fullmatch(heads[0].classes, name):
            raise InputError(
                f"{directory / CONFIG}: architecture {name} with a {heads[0].weight} is not "
                f"supported as a reward model; supported: {known}"
            )
    return heads[0], _labels(directory, hf) if heads[0] == SCORE else ("reward",)


def _labels(directory: Path, hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a sequence classifier's labels; transformers' own where config.json has none."""
    names, count = hf.get("id2label"), hf.get("num_labels", 2)
    if names is None and isinstance(count, int) and count > 0:
        names = {str(i): f"LABEL_{i}" for i in range(count)}
    numbers = [str(i) for i in range(len(names))] if isinstance(names, dict) else []
    if not isinstance(names, dict) or not numbers or set(names) != {*numbers}:
        raise InputError(
            f"{directory / CONFIG}: id2label must name the labels 0, 1, ... (or num_labels be "
            "their number)"
        )
    return tuple(str(names[number]) for number in numbers)


def load_classifier(path_or_hub_id: str | Path, *, dtype: Any = None) -> Classifier:
    """Load an encoder classifier from a directory or a hub id; `dtype` as in `load_model`.

    Raises:
        InputError: For a missing directory or file, another architecture, an activation other than
            GELU, and any tensor missing, misshapen or too many.
    """
    directory = locate(path_or_hub_id)
    config = _encoder_config(directory)
    tensors = open_tensors(directory)
    shapes = jax.eval_shape(lambda key: init_classifier(config, key), jax.random.key(0)).params
    leaves = {}
    for path, leaf in flatten_dict(shapes, sep="/").items():
        row = stored_in_encoder(path)
        if row.name not in tensors:
            raise InputError(f"{directory}: tensor {row.name} is missing")
        values = tensors.pop(row.name)
        found, expected = values.shape, row.shape(leaf.shape)
        if found != expected:
            raise InputError(f"{directory}: tensor {row.name} has shape {found}, not {expected}")
        whole = row.read(values, leaf.shape, (slice(None),) * leaf.ndim)
        leaves[path] = jnp.asarray(whole, parameter_dtype(dtype, whole.dtype))
    if tensors:
        raise InputError(f"{directory}: tensor {min(tensors)} is no part of a {ENCODER_CLASS}")
    return Classifier(config, unflatten_dict(leaves, sep="/"))


def _encoder_config(directory: Path) -> EncoderConfig:
    value = read_json(directory / CONFIG)
    with about(directory / CONFIG):
        return encoder_from_hf(value)
