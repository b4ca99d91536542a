"""config.json in both directions: its names and transformers' defaults, per architecture.

Reads the files of 2023-24 (`rope_theta`, `rope_scaling`) and of transformers 5 (`rope_parameters`).
Opens no file: `models/huggingface.py` does.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from w2s_jax.errors import InputError, check_kind
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.config_json import (
    Json,
    number,
    optional_number,
    read_rope,
    refuse_partial,
    refused,
    size,
    switch,
    write_rope,
)

_CLASS_NAMES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}
ARCHITECTURES = tuple(_CLASS_NAMES)

# What transformers assumes where config.json is silent. Sizes of matrices have no default: a file
# without them is a broken file.
_ROTARY_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN_DEFAULTS = {
    **_ROTARY_DEFAULTS,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "max_position_embeddings": 32768,
}
_GEMMA_DEFAULTS = {
    **_ROTARY_DEFAULTS,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    "llama": {
        **_ROTARY_DEFAULTS,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": {
        **_ROTARY_DEFAULTS,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": _QWEN_DEFAULTS,
    "qwen3": {**_QWEN_DEFAULTS, "head_dim": 128},
    "gemma": _GEMMA_DEFAULTS,
    "gemma2": {
        **_GEMMA_DEFAULTS,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
}

# Every name config.json gives an activation; the first of each kind is the one written.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}

# Fields that change the logits when set, in ways the decoder does not follow.
_REFUSED = (
    "quantization_config",
    "per_layer_config",
    "add_cross_attention",
    "scale_attn_by_inverse_layer_idx",
    "use_bidirectional_attention",
    "use_mrope",
)


def config_from_hf(
    hf: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Read the contents of a config.json, with transformers' defaults for what it omits.

    The end-of-sequence ids of `generation_config` (generation_config.json) join its own.

    Raises InputError for an architecture, rope kind or activation that is not supported, for a
    malformed field, and for a field that would change the logits and is not honoured here.
    """
    check_kind("config_from_hf", hf, Mapping, "the contents of a config.json")
    return ModelConfig(**_read_fields(hf, generation_config or {}))


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The contents of a config.json that `config_from_hf` and transformers (4.41 and later) read.

    Raises InputError naming the fields that the architecture's config.json cannot express.
    """
    hf = _write_fields(config)
    written = config_from_hf(hf)
    lost = [
        field.name
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(written, field.name)
    ]
    if lost:
        raise InputError(
            f"config.json of {config.architecture} cannot express this model's {', '.join(lost)}"
        )
    return hf


def _read_fields(hf: Json, generation_config: Json) -> dict[str, Any]:
    """ModelConfig's fields from the contents of config.json and generation_config.json.

    Raises InputError as `config_from_hf` says.
    """
    architecture = hf.get("model_type")
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"model_type {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    _refuse_unsupported(hf)
    hf = {**_DEFAULTS[architecture], **hf}
    eos_ids = _token_ids(hf, "eos_token_id") + _token_ids(generation_config, "eos_token_id")
    return {
        "architecture": architecture,
        "vocab_size": size(hf, "vocab_size"),
        "tied_embeddings": switch(hf, "tie_word_embeddings"),
        "bos_id": next(iter(_token_ids(hf, "bos_token_id")), None),
        "eos_ids": tuple(dict.fromkeys(eos_ids)),
        "pad_id": next(iter(_token_ids(hf, "pad_token_id")), None),
        **(_read_gpt2(hf) if architecture == "gpt2" else _read_rotary(architecture, hf)),
    }


def _write_fields(config: ModelConfig) -> dict[str, Any]:
    """The contents of a config.json for `config`; what that file cannot express is dropped.

    Raises InputError for an architecture that is not supported.
    """
    if config.architecture not in ARCHITECTURES:
        raise InputError(
            f"architecture {config.architecture!r} has no config.json; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    one_eos = len(config.eos_ids) == 1
    return {
        "architectures": [_CLASS_NAMES[config.architecture]],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if one_eos else list(config.eos_ids) or None,
        "pad_token_id": config.pad_id,
        **(_write_gpt2(config) if config.architecture == "gpt2" else _write_rotary(config)),
    }


def _refuse_unsupported(hf: Json) -> None:
    for name in _REFUSED:
        if hf.get(name):
            raise InputError(f"config field {name} is set, which is not supported")
    refuse_partial(hf)


def _token_ids(hf: Json, name: str) -> list[int]:
    value = hf.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise refused(name, value, "one token id or a list")
    return [token for token in ids if token >= 0]  # some Llama files write -1 for "none"


def _activation(name: Any) -> str:
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise InputError(
            f"activation {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _activation_name(activation: str) -> str:
    return next(name for name, kind in _ACTIVATIONS.items() if kind == activation)


def _read_gpt2(hf: Json) -> dict[str, Any]:
    width, heads = size(hf, "n_embd"), size(hf, "n_head")
    if width % heads:
        raise InputError(f"config field n_embd is {width}, not a multiple of n_head, {heads}")
    return {
        "width": width,
        "layers": size(hf, "n_layer"),
        "heads": heads,
        "kv_heads": heads,
        "head_width": width // heads,
        "mlp_width": 4 * width if hf["n_inner"] is None else size(hf, "n_inner"),
        "max_positions": size(hf, "n_positions"),
        "norm": "layer",
        "norm_epsilon": number(hf, "layer_norm_epsilon", least=0),
        "position": "learned",
        "activation": _activation(hf["activation_function"]),
        "gated_mlp": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "attention_scale": None if switch(hf, "scale_attn_weights") else 1.0,
    }


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": _activation_name(config.activation),
        "scale_attn_weights": config.attention_scale is None,
    }


def _read_rotary(architecture: str, hf: Json) -> dict[str, Any]:
    width, heads = size(hf, "hidden_size"), size(hf, "num_attention_heads")
    layers = size(hf, "num_hidden_layers")
    rope, positions = read_rope(hf)
    kv_heads = heads if hf["num_key_value_heads"] is None else size(hf, "num_key_value_heads")
    fields: dict[str, Any] = {
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_width": width // heads if hf["head_dim"] is None else size(hf, "head_dim"),
        "mlp_width": size(hf, "intermediate_size"),
        "max_positions": positions,
        "norm_epsilon": number(hf, "rms_norm_eps", least=0),
        "rope": rope,
    }
    activation = hf["hidden_act"]
    if architecture in ("llama", "qwen3", "gemma", "gemma2"):
        fields["qkv_bias"] = fields["out_bias"] = switch(hf, "attention_bias")
    if architecture == "llama":
        fields["mlp_bias"] = switch(hf, "mlp_bias")
    if architecture == "qwen2":
        fields["qkv_bias"] = True
    if architecture == "qwen3":
        fields["query_key_norm"] = True
    if architecture in ("gemma", "gemma2"):
        fields |= {"norm_offset": 1.0, "embedding_multiplier": math.sqrt(width)}
    if architecture == "gemma" and activation == "gelu":
        activation = "gelu_pytorch_tanh"  # what the first Gemma files mean by "gelu"
    if architecture == "gemma2":
        activation = hf["hidden_activation"]
        fields |= {
            "post_norms": True,
            "attention_scale": size(hf, "query_pre_attn_scalar") ** -0.5,
            "attention_softcap": optional_number(hf, "attn_logit_softcapping", above=0),
            "final_softcap": optional_number(hf, "final_logit_softcapping", above=0),
        }
    fields["activation"] = _activation(activation)
    if architecture in ("mistral", "qwen2", "qwen3", "gemma2"):
        fields["sliding_windows"] = _read_windows(architecture, hf, layers)
    return fields


def _write_rotary(config: ModelConfig) -> dict[str, Any]:
    activation = _activation_name(config.activation)
    # `rope_theta` and `rope_scaling` rather than `rope_parameters`: transformers 4 and 5 both
    # read them.
    hf = {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope.theta,
        "rope_scaling": write_rope(config.rope, config.max_positions),
        "hidden_act": activation,
    }
    if config.architecture in ("llama", "qwen3", "gemma", "gemma2"):
        hf["attention_bias"] = config.qkv_bias
    if config.architecture == "llama":
        hf["mlp_bias"] = config.mlp_bias
    if config.architecture in ("gemma", "gemma2"):
        hf["hidden_activation"] = activation
    if config.architecture == "gemma2":
        scale = config.attention_scale or config.head_width**-0.5
        hf["query_pre_attn_scalar"] = round(scale**-2)
        hf["attn_logit_softcapping"] = config.attention_softcap
        hf["final_logit_softcapping"] = config.final_softcap
    return hf | _write_windows(config)


def _read_windows(architecture: str, hf: Json, layers: int) -> tuple[int | None, ...]:
    qwen = architecture in ("qwen2", "qwen3")
    if hf["sliding_window"] is None or (qwen and not switch(hf, "use_sliding_window")):
        return ()
    window = size(hf, "sliding_window")
    if architecture == "mistral":
        return (window,) * layers
    kinds = hf["layer_types"]
    if kinds is None and qwen:
        full = size(hf, "max_window_layers", least=0)
        return tuple(None if layer < full else window for layer in range(layers))
    if kinds is None:
        return tuple(None if layer % 2 else window for layer in range(layers))
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != layers or not all(k in [*known] for k in kinds):
        taken = f"a list that names one of {', '.join(known)} for each of {layers} layers"
        raise refused("layer_types", kinds, taken)
    return tuple(known[kind] for kind in kinds)


def _write_windows(config: ModelConfig) -> dict[str, Any]:
    windows = config.sliding_windows or (None,) * config.layers
    window = next((size for size in windows if size), None)
    kinds = ["sliding_attention" if size else "full_attention" for size in windows]
    if config.architecture == "mistral":
        return {"sliding_window": window}
    if config.architecture in ("qwen2", "qwen3"):
        return {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": kinds.count("full_attention"),
            "layer_types": kinds,
        }
    if config.architecture == "gemma2":
        # transformers builds the windowed mask even where no layer uses it.
        return {"sliding_window": window or 4096, "layer_types": kinds}
    return {}
