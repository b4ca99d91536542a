"""The door to what a directory holds: a decoder, or an adapter with the base that it names."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from w2s_jax.errors import InputError
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.huggingface import is_adapter, load_decoder, load_decoder_config, locate
from w2s_jax.models.lora import attach, merge
from w2s_jax.models.lora_huggingface import (
    adapted_config,
    base_folder,
    base_of,
    load_adapter,
    with_vocabulary,
)
from w2s_jax.models.model import STORED, Model
from w2s_jax.models.quantize import QuantizeConfig, is_quantized
from w2s_jax.ops.sharding import DEFAULT_RULES, Rules


def load_model(
    path_or_hub_id: str | Path,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    scan_layers: bool = False,
    quantize: QuantizeConfig | None = None,
) -> Model:
    """Load a decoder from a directory, or from the Hugging Face hub through its local cache.

    A directory of a LoRA adapter gives the base that it names with the adapter merged into it.
    dtype: of the parameters. None is as stored (as the embedding is), but float32 on a CPU, which
        computes slowly in the half-sized types, and with an adapter; "stored" is so everywhere.
    mesh: every tensor is read slice by slice into its shards on this mesh, as `rules` say.
    scan_layers: stack the layers on a leading axis (see `models/tensors.py`).
    quantize: weights become QTensors as they are read; adapters then stay beside them.

    Host memory stays below the process's part of the model and three times the largest tensor (with
    scan_layers, of the process's part of the largest stack).

    Raises InputError for a missing directory, config.json or safetensors, an architecture that is
    not supported, a damaged file, and any tensor unmapped, missing, duplicate or misshapen.
    """
    directory = locate(path_or_hub_id)
    options: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "rules": rules}
    options |= {"scan_layers": scan_layers, "quantize": quantize}
    load = load_adapted if is_adapter(directory) else load_decoder
    return load(directory, **options)


def load_adapted(
    path_or_hub_id: str | Path,
    base: Model | None = None,
    *,
    merged: bool = True,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    scan_layers: bool = False,
    quantize: QuantizeConfig | None = None,
) -> Model:
    """A base with an adapter on it: merged into its kernels, or beside the base's own arrays.

    base None loads the one that the adapter names; the other arguments are as in `load_model`, but
    without a dtype, or as "stored", what is merged is float32: a dtype of fewer bits, as bases are
    often stored in, would lose most of an adapter. On a quantised base the adapter stays beside it,
    `merged` or not.

    Raises InputError as `load_model` and `load_adapter` do.
    """
    directory = locate(path_or_hub_id)
    if base is None:
        name = base_of(directory)
        if dtype in (None, STORED) and merged and quantize is None:
            dtype = "float32"
        try:
            base = load_model(
                name,
                dtype=dtype,
                mesh=mesh,
                rules=rules,
                scan_layers=scan_layers,
                quantize=quantize,
            )
        except InputError as error:
            raise InputError(f"{directory}: its base: {error}") from None
    config = adapted_config(directory, base.config)
    lora, adapter = load_adapter(
        directory,
        config,
        dtype=base.dtype,
        mesh=mesh,
        rules=rules,
        scan_layers=base.scan_layers,
    )
    base = with_vocabulary(base, config, adapter)
    into = merge if merged and not is_quantized(base.params) else attach
    return Model(base.config, into(base.params, adapter, lora), base.placement)


def load_config(path_or_hub_id: str | Path) -> ModelConfig:
    """The ModelConfig of a checkpoint, from its config.json and generation_config.json.

    For an adapter it is that of the base it names, with what the adapter changes of it.

    Raises InputError for a missing or malformed file, and as `config_from_hf` says.
    """
    directory = locate(path_or_hub_id)
    if is_adapter(directory):
        return adapted_config(directory, load_config(base_folder(directory)))
    return load_decoder_config(directory)
