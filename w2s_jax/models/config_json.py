"""config.json in both directions: its names and transformers' defaults, per architecture.

Reads the files of 2023-24 (`rope_theta`, `rope_scaling`) and of transformers 5 (`rope_parameters`).
Opens no file: `load.py` does. What the architectures' files hold is in `families.py`.
"""

import math
from collections.abc import Mapping
from typing import Any

from w2s_jax.errors import InputError, check_kind
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.config_fields import (
    ACTIVATION_NAMES,
    FULL,
    SLIDING,
    Json,
    mapping,
    read_fields,
    read_ropes,
    read_rotary_width,
    refused,
    rotary_share,
    size,
    switch,
    write_ropes,
)
from w2s_jax.models.families import ACTIVATION_FIELDS, ARCHITECTURES, FAMILIES, TEXT_PARTS

_SUPPORTED = ", ".join(ARCHITECTURES)

# Fields that change the logits when set, in ways the decoder does not follow.
_REFUSED = (
    "quantization_config",
    "per_layer_config",
    "add_cross_attention",
    "clip_qkv",
    "mlp_only_layers",
    "scale_attn_by_inverse_layer_idx",
    "use_bidirectional_attention",
    "use_mrope",
    "_remove_final_layer_norm",
)


def config_from_hf(
    hf: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Read the contents of a config.json, with transformers' defaults for what it omits.

    The end-of-sequence ids of `generation_config` (generation_config.json) join its own.

    Raises:
        InputError: For an architecture, rope kind or activation that is not supported, for a
            malformed field, and for a field that would change the logits and is not honoured here.
    """
    check_kind("config_from_hf", hf, Mapping, "the contents of a config.json")
    architecture = hf.get("model_type")
    if architecture not in ARCHITECTURES:
        raise InputError(f"model_type {architecture!r} is not supported; supported: {_SUPPORTED}")
    if architecture in TEXT_PARTS:
        hf = _text_part(hf)
        architecture = hf["model_type"]
    for name in _REFUSED:
        if hf.get(name) and name not in FAMILIES[architecture].names.values():
            raise InputError(f"config field {name} is set, which is not supported")
    family = FAMILIES[architecture]
    if "experts" in family.names:
        if hf.get("decoder_sparse_step", 1) != 1:
            raise InputError("config field decoder_sparse_step is not 1, which is not supported")
        counts = [hf[name] for name in ("num_experts", "num_local_experts") if name in hf]
        hf = {**hf, family.names["experts"]: counts[0]} if counts else hf
    named = {name: hf[alias] for alias, name in family.aliases.items() if alias in hf}
    hf = {**family.defaults, **named, **hf}
    eos_ids = _token_ids(hf, "eos_token_id")
    eos_ids += _token_ids(generation_config or {}, "eos_token_id")
    return ModelConfig(
        architecture=architecture,
        bos_id=next(iter(_token_ids(hf, "bos_token_id")), None),
        eos_ids=tuple(dict.fromkeys(eos_ids)),
        pad_id=next(iter(_token_ids(hf, "pad_token_id")), None),
        **family.fixed,
        **_read_shape(architecture, hf),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The contents of a config.json that `config_from_hf` and transformers (4.41 and later) read.

    Raises:
        InputError: Naming the fields that the architecture's config.json cannot express.
    """
    architecture, eos_ids = config.architecture, list(config.eos_ids)
    if architecture not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(f"architecture {architecture!r} has no config.json; supported: {known}")
    family = FAMILIES[architecture]
    activation = ACTIVATION_NAMES[config.activation]
    hf = {
        "architectures": [family.name],
        "model_type": architecture,
        **{name: getattr(config, field) for field, name in family.names.items()},
        **{name: activation for name in ACTIVATION_FIELDS if name in family.defaults},
        "bos_token_id": config.bos_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids or None,
        "pad_token_id": config.pad_id,
        **_write_layers(config, family.defaults),
    }
    if architecture == "gpt2":
        hf["scale_attn_weights"] = config.attention_scale is None
    elif architecture == "opt":
        hf["do_layer_norm_before"] = config.norm_placement == "pre"
        hf["word_embed_proj_dim"] = config.head_inputs
    else:
        hf |= write_ropes(config, family.sliding_theta)
    if "partial_rotary_factor" in family.defaults:
        hf["partial_rotary_factor"] = rotary_share(config)
    if "query_pre_attn_scalar" in family.defaults:
        scale = config.attention_scale or config.head_width**-0.5
        hf["query_pre_attn_scalar"] = round(scale**-2)
    hf = {**hf, **{alias: hf.pop(name) for alias, name in family.aliases.items()}}
    given, written = vars(config), vars(config_from_hf(hf))
    lost = [field for field in given if given[field] != written[field]]
    if lost:
        raise InputError(
            f"config.json of {architecture} cannot express this model's {', '.join(lost)}"
        )
    return hf


def _text_part(hf: Json) -> Json:
    """What the config.json of a multimodal model says of its text part."""
    kind = TEXT_PARTS[hf["model_type"]]
    part = mapping(hf, "text_config", f'{{"model_type": "{kind}", ..}}')
    found = part.get("model_type", kind)
    if not part or found != kind:
        told = f"a text_config of {found!r}" if part else "no text_config"
        raise InputError(f"a {hf['model_type']} with {told} is not supported; it has a {kind!r}")
    return {**hf, **part, "model_type": kind}


def _token_ids(hf: Json, name: str) -> list[int]:
    value = hf.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise refused(name, value, "one token id or a list")
    return [token for token in ids if token >= 0]  # some Llama files write -1 for "none"


def _read_shape(architecture: str, hf: Json) -> dict[str, Any]:
    """The fields of ModelConfig that say its shape and kinds."""
    family = FAMILIES[architecture]
    if architecture == "gemma" and hf["hidden_act"] == "gelu":
        hf = {**hf, "hidden_act": "gelu_pytorch_tanh"}  # what the first Gemma files mean by it
    fields = read_fields(ModelConfig, family.names, hf)
    width, heads = fields["width"], fields["heads"]
    if architecture == "gpt2":
        if width % heads:
            raise InputError(f"config field n_embd is {width}, not a multiple of n_head, {heads}")
        fields["attention_scale"] = None if switch(hf, "scale_attn_weights") else 1.0
    elif architecture == "opt":
        fields |= _read_opt(hf, width)
    else:
        fields = read_ropes(hf, family.sliding_theta) | fields
    if architecture.startswith("gemma"):
        fields["embedding_multiplier"] = math.sqrt(width)
    if "query_pre_attn_scalar" in family.defaults:
        fields["attention_scale"] = size(hf, "query_pre_attn_scalar") ** -0.5
    if "no_rope_layers" in family.defaults:
        fields["rope_layers"] = _read_rope_layers(hf, fields["layers"])
    if "sliding_window" in family.defaults:
        fields["sliding_windows"] = _read_windows(family.defaults, hf, fields["layers"])
    fields = {"kv_heads": heads, "head_width": width // heads, "mlp_width": 4 * width} | fields
    if "rope" in fields:
        known = "partial_rotary_factor" in family.defaults
        fields["rotary_width"] = read_rotary_width(hf, fields["head_width"], known=known)
    return fields


def _read_opt(hf: Json, width: int) -> dict[str, Any]:
    """Where OPT's norms are, and how wide its embedding is."""
    if not switch({"layer_norm_elementwise_affine": True, **hf}, "layer_norm_elementwise_affine"):
        raise InputError("config field layer_norm_elementwise_affine is off, which is unsupported")
    given = hf["word_embed_proj_dim"]
    narrow = width if given is None else size(hf, "word_embed_proj_dim")
    return {
        "norm_placement": "pre" if switch(hf, "do_layer_norm_before") else "residual",
        "embed_width": None if narrow == width else narrow,
    }


def _read_rope_layers(hf: Json, layers: int) -> tuple[bool, ...]:
    """Which layers rotate queries and keys: those with a 1 under no_rope_layers."""
    turned = hf["no_rope_layers"]
    if turned is None:
        every = size(hf, "no_rope_layer_interval")
        return tuple(layer % every > 0 for layer in range(1, layers + 1))
    if not isinstance(turned, list) or len(turned) < layers or {*map(repr, turned)} - {"0", "1"}:
        raise refused("no_rope_layers", turned, f"a list of 0 or 1 for each of {layers} layers")
    return tuple(map(bool, turned[:layers]))


def _read_windows(known: Json, hf: Json, layers: int) -> tuple[int | None, ...]:
    if hf["sliding_window"] is None:
        return ()
    if "use_sliding_window" in known and not switch(hf, "use_sliding_window"):
        return ()
    window, kinds = size(hf, "sliding_window"), hf.get("layer_types")
    if "layer_types" not in known:
        return (window,) * layers
    if kinds is None and "max_window_layers" in known:
        full = min(size(hf, "max_window_layers", least=0), layers)
        return (None,) * full + (window,) * (layers - full)
    if kinds is None and "no_rope_layers" in known:
        turned = _read_rope_layers(hf, layers)
        return tuple(None if rotated else window for rotated in turned)
    if kinds is None:
        every = size(hf, "sliding_window_pattern")
        return tuple(window if layer % every else None for layer in range(1, layers + 1))
    by_kind = {FULL: None, SLIDING: window}
    named = isinstance(kinds, list) and all(kind in [*by_kind] for kind in kinds)
    if not named or len(kinds) != layers:
        taken = f"a list that names one of {', '.join(by_kind)} for each of {layers} layers"
        raise refused("layer_types", kinds, taken)
    return tuple(by_kind[kind] for kind in kinds)


def _write_layers(config: ModelConfig, known: Json) -> dict[str, Any]:
    windows = config.sliding_windows or (None,) * config.layers
    window = next((size for size in windows if size), None)
    kinds = [SLIDING if size else FULL for size in windows]
    hf = {
        "use_sliding_window": window is not None,
        # transformers builds some models' windowed mask even where no layer uses it.
        "sliding_window": window or (4096 if "sliding_window_pattern" in known else None),
        "max_window_layers": kinds.count(FULL),
        "layer_types": kinds,
        "no_rope_layers": [*map(int, config.rope_layers or (True,) * config.layers)],
    }
    return {name: value for name, value in hf.items() if name in known}
