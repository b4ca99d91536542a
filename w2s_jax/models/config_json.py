"""config.json in both directions: its names and transformers' defaults, per architecture.

Reads the files of 2023-24 (`rope_theta`, `rope_scaling`) and of transformers 5 (`rope_parameters`).
Opens no file: `load.py` does. What the architectures' files hold is in `families.py`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from w2s_jax.errors import InputError, check_kind
from w2s_jax.models.config import (
    Json,
    ModelConfig,
    mapping,
    number,
    optional_number,
    refused,
    size,
    switch,
)
from w2s_jax.models.families import ACTIVATION_FIELDS, ARCHITECTURES, DERIVED, FAMILIES, TEXT_PARTS
from w2s_jax.ops.attention import ROPE_KINDS, Rope

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
ACTIVATION_NAMES = {kind: name for name, kind in reversed(_ACTIVATIONS.items())}

FULL, SLIDING = "full_attention", "sliding_attention"
_KINDS = (*ROPE_KINDS, "dynamic")
_SHARE = "partial_rotary_factor"
_ORIGINAL = "original_max_position_embeddings"
_EXAMPLE = '{"rope_type": "linear", "factor": 2.0}'
# Our fields of a rope, and what files call them, beside its factor and original positions.
_ROPE_NAMES = {
    "llama3": {
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
    },
    "yarn": {name: name for name in ("beta_fast", "beta_slow", "truncate", "attention_factor")},
    "longrope": {name: name for name in ("short_factor", "long_factor", "attention_factor")},
}


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


def _activation(hf: Json, name: str) -> str:
    value = hf[name]
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise InputError(f"activation {value!r} is not supported; supported: {known}")
    return _ACTIVATIONS[value]


_READERS: dict[Any, Callable[..., Any]] = {
    int: size,
    bool: switch,
    float: partial(number, least=0),
    float | None: partial(optional_number, above=0),
}


def read_fields(config: type, names: Mapping[str, str], hf: Json) -> dict[str, Any]:
    """Fields of a config from those of a file that are named, each checked by the field's type.

    Sizes that follow from others, where they are null, are left out.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(config)}
    return {
        field: _READERS.get(kinds[field], _activation)(hf, name)
        for field, name in names.items()
        if name not in DERIVED or hf[name] is not None
    }


def read_ropes(hf: Json, sliding_theta: str | None) -> dict[str, Any]:
    """A ModelConfig's ropes and positions; `sliding_theta` as of a Family."""
    rope, max_positions = read_rope(_of_kind(hf, FULL) if sliding_theta else hf)
    fields = {"rope": rope, "max_positions": max_positions}
    if sliding_theta is not None:
        local = _of_kind(hf, SLIDING) | {"rope_theta": hf[sliding_theta]}
        fields["sliding_rope"] = read_rope(local)[0]
    return fields


def _of_kind(hf: Json, kind: str) -> dict[str, Any]:
    """The same file with what it says of the rope of one kind of layers alone."""
    scaling = _scaling(hf)[1]
    by_kind = scaling.keys() <= {FULL, SLIDING}
    own = mapping(scaling, kind, _EXAMPLE) if by_kind else scaling if kind == FULL else {}
    return {**hf, "rope_scaling": None, "rope_parameters": own}


def read_rope(hf: Json) -> tuple[Rope, int]:
    """The rope, and how many positions it reaches: files name them before the scaling or after it.

    Where `original_max_position_embeddings` is there, the larger of `max_position_embeddings` and
    original × factor; without it `linear` and `yarn` stretch `max_position_embeddings`.
    """
    max_positions = size(hf, "max_position_embeddings")
    name, scaling = _scaling(hf)
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise InputError("config field rope_parameters differs by layer, which is not supported")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "su" or (kind == "yarn" and "short_factor" in scaling):
        kind = "longrope"  # the first Phi-3 files' names of it
    if kind not in _KINDS:
        raise InputError(f"rope kind {kind!r} is not supported; supported: {', '.join(_KINDS)}")
    # The bounds of YaRN's rotations are logarithms to this base.
    theta = number({"rope_theta": 1e4, **hf, **scaling}, "rope_theta", above=int(kind == "yarn"))
    place, where = (scaling, f"{name}.") if hf.get(_ORIGINAL) is None else (hf, "")
    given = None if place.get(_ORIGINAL) is None else size(place, _ORIGINAL, where=where)
    if kind == "dynamic":
        # Its angles change with the length only beyond the original positions.
        return Rope(theta=theta), min(max_positions, given or max_positions)
    original = given or max_positions
    rope = _scaled_rope(Rope(theta, kind), scaling, original, max_positions, f"{name}.")
    if kind == "default":
        return rope, max_positions
    if kind == "longrope":
        return rope, original
    if given:
        return rope, max(max_positions, int(given * rope.factor))
    return rope, int(max_positions * rope.factor) if kind in ("linear", "yarn") else max_positions


def _scaling(hf: Json) -> tuple[str, Json]:
    """What a file says of its rope, and under which name."""
    held = [(name, mapping(hf, name, _EXAMPLE)) for name in ("rope_scaling", "rope_parameters")]
    return next((one for one in held if one[1]), held[0])


def read_rotary_width(hf: Json, head_width: int, *, known: bool) -> int | None:
    """How many entries of each head are rotated; None for all.

    Raises:
        InputError: Where they are not all, unless that is `known` of the architecture.
    """
    share = {_SHARE: 1.0}
    for place in (hf, _scaling(hf)[1]):
        share |= {_SHARE: place[_SHARE]} if place.get(_SHARE) is not None else {}
    width = int(head_width * number(share, _SHARE, above=0))
    if share[_SHARE] != 1 and not known:
        raise InputError(f"config field {_SHARE} is not 1, which is not supported")
    return None if width == head_width else width


def rotary_share(config: Any) -> float:
    """The share of each head that a ModelConfig rotates, from which readers find the width."""
    share = config.rotated / config.head_width
    return share if int(config.head_width * share) == config.rotated else math.nextafter(share, 1)


def _scaled_rope(rope: Rope, scaling: Json, original: int, max_positions: int, where: str) -> Rope:
    """A plain rope of a kind with what its scaling says."""
    read, scaled = partial(number, scaling, where=where), partial(dataclasses.replace, rope)
    if rope.kind == "default":
        return rope
    if rope.kind == "linear":
        return scaled(factor=read("factor", least=1))
    if rope.kind == "llama3":
        low = read("low_freq_factor", above=0)
        return scaled(
            factor=read("factor", least=1),
            low_frequency_factor=low,
            high_frequency_factor=read("high_freq_factor", above=low),
            original_max_positions=original,
        )

    def given(name: str, usual: float, **bounds: Any) -> float:
        return usual if scaling.get(name) is None else read(name, **bounds)

    if rope.kind == "longrope":
        return scaled(
            factor=max(1.0, max_positions / original),
            attention_factor=optional_number(scaling, "attention_factor", above=0, where=where),
            original_max_positions=original,
            short_factor=_factors(scaling, "short_factor", where),
            long_factor=_factors(scaling, "long_factor", where),
        )
    factor = given("factor", max_positions / original, least=1)
    return scaled(
        factor=factor,
        attention_factor=_yarn_attention_factor(scaling, factor, where),
        beta_fast=given("beta_fast", 32.0, above=0),
        beta_slow=given("beta_slow", 1.0, above=0),
        truncate=switch({"truncate": True, **scaling}, "truncate"),
        original_max_positions=original,
    )


def _factors(scaling: Json, name: str, where: str) -> tuple[float, ...]:
    values = scaling.get(name)
    if not isinstance(values, list):
        raise refused(where + name, values, "a list of numbers above 0")
    return tuple(number({name: value}, name, above=0, where=where) for value in values)


def _yarn_attention_factor(scaling: Json, factor: float, where: str) -> float | None:
    """The factor as given, or from DeepSeek's pair mscale, mscale_all_dim; None: the paper's."""
    read = partial(optional_number, scaling, where=where)
    over, under = (read(name, least=0) for name in ("mscale", "mscale_all_dim"))
    given = read("attention_factor", above=0)
    if given is not None or not over or not under:
        return given
    growth = 0.1 * math.log(max(factor, 1.0))
    return (over * growth + 1.0) / (under * growth + 1.0)


def write_ropes(config: Any, sliding_theta: str | None) -> dict[str, Any]:
    """The fields of a config.json that `read_ropes` reads back, of a ModelConfig."""
    hf = write_rope(config.rope, config.max_positions)
    if sliding_theta is None:
        return hf
    sliding = config.rope if config.sliding_rope is None else config.sliding_rope
    by_kind = {}
    for kind, rope in ((FULL, config.rope), (SLIDING, sliding)):
        scaling = write_rope(rope, config.max_positions)["rope_scaling"]
        by_kind[kind] = {"rope_theta": rope.theta} | (scaling or {"rope_type": "default"})
    # By kind for transformers 5 and, for 4, as it has it.
    return {sliding_theta: sliding.theta} | hf | {"rope_parameters": by_kind}


def write_rope(rope: Rope, max_positions: int) -> dict[str, Any]:
    """The fields of a config.json that `read_rope` reads back.

    `rope_theta` and `rope_scaling` rather than `rope_parameters`: transformers 4 and 5 read them.
    """
    hf: dict[str, Any] = {"max_position_embeddings": max_positions, "rope_theta": rope.theta}
    if rope.kind == "default":
        return hf | {"rope_scaling": None}
    names = _ROPE_NAMES.get(rope.kind, {})
    given = {name: getattr(rope, field) for field, name in names.items()}
    given = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in given.items()
        if value is not None
    }
    original = rope.original_max_positions or int(max_positions / rope.factor)
    if rope.kind == "longrope":
        # Its positions are those of the long factors, and transformers 4 takes no other fields.
        hf["max_position_embeddings"] = round(original * rope.factor)
        return hf | {_ORIGINAL: original, "rope_scaling": {"type": rope.kind, **given}}
    # With the original positions, so that the others are not taken for those before the scaling.
    scaling = {"rope_type": rope.kind, "factor": rope.factor, _ORIGINAL: original, **given}
    return hf | {"rope_scaling": scaling}
