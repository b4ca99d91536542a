"""config.json in both directions: its names and transformers' defaults, per architecture.

Reads the files of 2023-24 (`rope_theta`, `rope_scaling`) and of transformers 5 (`rope_parameters`).
Opens no file: `load.py` does. A field that is wrong is named with what it lies in (`where`).
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from w2s_jax.errors import InputError, check_kind
from w2s_jax.models.config import ModelConfig
from w2s_jax.ops.attention import ROPE_KINDS, Rope

Json = Mapping[str, Any]


@dataclass(frozen=True)
class _Family:
    """One architecture.

    name: of transformers' class. names: fields of ModelConfig that files hold under another name,
    read as their type says. defaults: what transformers assumes where config.json is silent; an
    optional field that is not among them is not read. Sizes of matrices have no default: a file
    without them is a broken file. fixed: fields of ModelConfig that are always so.
    """

    name: str
    names: dict[str, str]
    defaults: dict[str, Any]
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)


_NAMES = {"vocab_size": "vocab_size", "tied_embeddings": "tie_word_embeddings"}
_ROTARY_NAMES = _NAMES | {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "mlp_width": "intermediate_size",
    "norm_epsilon": "rms_norm_eps",
    "activation": "hidden_act",
}
# Gemma's files hold it under two names.
_ACTIVATION_FIELDS = ("activation_function", "hidden_act", "hidden_activation")
# Where one of these is null, it follows from the other sizes.
_DERIVED = ("n_inner", "num_key_value_heads", "head_dim")
_BIASED = _ROTARY_NAMES | {"out_bias": "attention_bias", "qkv_bias": "attention_bias"}
_ROTARY: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_LLAMA = _ROTARY | {"bos_token_id": 1, "eos_token_id": 2}
_QWEN = _ROTARY | {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "max_position_embeddings": 32768,
}
_GEMMA = _ROTARY | {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_FAMILIES = {
    "gpt2": _Family(
        "GPT2LMHeadModel",
        _NAMES
        | {
            "width": "n_embd",
            "layers": "n_layer",
            "heads": "n_head",
            "mlp_width": "n_inner",
            "max_positions": "n_positions",
            "norm_epsilon": "layer_norm_epsilon",
            "activation": "activation_function",
        },
        {
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        },
        {"norm": "layer", "position": "learned", "gated_mlp": False}
        | dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True),
    ),
    "llama": _Family(
        "LlamaForCausalLM",
        _BIASED | {"mlp_bias": "mlp_bias"},
        _LLAMA | {"attention_bias": False, "mlp_bias": False, "max_position_embeddings": 2048},
    ),
    "mistral": _Family(
        "MistralForCausalLM",
        _ROTARY_NAMES,
        _LLAMA
        | {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    ),
    "qwen2": _Family("Qwen2ForCausalLM", _ROTARY_NAMES, _QWEN, {"qkv_bias": True}),
    "qwen3": _Family(
        "Qwen3ForCausalLM",
        _BIASED,
        _QWEN | {"head_dim": 128, "attention_bias": False},
        {"query_key_norm": True},
    ),
    "gemma": _Family("GemmaForCausalLM", _BIASED, _GEMMA, {"norm_offset": 1.0}),
    "gemma2": _Family(
        "Gemma2ForCausalLM",
        _BIASED
        | {
            "activation": "hidden_activation",
            "attention_softcap": "attn_logit_softcapping",
            "final_softcap": "final_logit_softcapping",
        },
        _GEMMA
        | {
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "layer_types": None,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        {"norm_offset": 1.0, "post_norms": True},
    ),
}
ARCHITECTURES = tuple(_FAMILIES)
_SUPPORTED = ", ".join(ARCHITECTURES)

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
_ACTIVATION_NAMES = {kind: name for name, kind in reversed(_ACTIVATIONS.items())}

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

    Raises:
        InputError: For an architecture, rope kind or activation that is not supported, for a
            malformed field, and for a field that would change the logits and is not honoured here.
    """
    check_kind("config_from_hf", hf, Mapping, "the contents of a config.json")
    architecture = hf.get("model_type")
    if architecture not in ARCHITECTURES:
        raise InputError(f"model_type {architecture!r} is not supported; supported: {_SUPPORTED}")
    for name in _REFUSED:
        if hf.get(name):
            raise InputError(f"config field {name} is set, which is not supported")
    _refuse_partial(hf)
    family = _FAMILIES[architecture]
    hf = {**family.defaults, **hf}
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
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"architecture {architecture!r} has no config.json; supported: {_SUPPORTED}"
        )
    family = _FAMILIES[architecture]
    activation = _ACTIVATION_NAMES[config.activation]
    hf = {
        "architectures": [family.name],
        "model_type": architecture,
        **{name: getattr(config, field) for field, name in family.names.items()},
        **{name: activation for name in _ACTIVATION_FIELDS if name in family.defaults},
        "bos_token_id": config.bos_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids or None,
        "pad_token_id": config.pad_id,
        **_write_windows(config, family.defaults),
    }
    if architecture == "gpt2":
        hf["scale_attn_weights"] = config.attention_scale is None
    else:
        # `rope_theta` and `rope_scaling` rather than `rope_parameters`: transformers 4 and 5 both
        # read them.
        hf["max_position_embeddings"] = config.max_positions
        hf["rope_theta"] = config.rope.theta
        hf["rope_scaling"] = _write_rope(config.rope, config.max_positions)
    if architecture == "gemma2":
        scale = config.attention_scale or config.head_width**-0.5
        hf["query_pre_attn_scalar"] = round(scale**-2)
    given, written = vars(config), vars(config_from_hf(hf))
    lost = [field for field in given if given[field] != written[field]]
    if lost:
        raise InputError(
            f"config.json of {architecture} cannot express this model's {', '.join(lost)}"
        )
    return hf


def _token_ids(hf: Json, name: str) -> list[int]:
    value = hf.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise refused(name, value, "one token id or a list")
    return [token for token in ids if token >= 0]  # some Llama files write -1 for "none"


def _read_shape(architecture: str, hf: Json) -> dict[str, Any]:
    """The fields of ModelConfig that say its shape and kinds."""
    family = _FAMILIES[architecture]
    if architecture == "gemma" and hf["hidden_act"] == "gelu":
        hf = {**hf, "hidden_act": "gelu_pytorch_tanh"}  # what the first Gemma files mean by it
    fields = read_fields(ModelConfig, family.names, hf)
    width, heads = fields["width"], fields["heads"]
    if architecture == "gpt2":
        if width % heads:
            raise InputError(f"config field n_embd is {width}, not a multiple of n_head, {heads}")
        fields["attention_scale"] = None if switch(hf, "scale_attn_weights") else 1.0
    else:
        fields["rope"], fields["max_positions"] = _read_rope(hf)
    if architecture in ("gemma", "gemma2"):
        fields["embedding_multiplier"] = math.sqrt(width)
    if architecture == "gemma2":
        fields["attention_scale"] = size(hf, "query_pre_attn_scalar") ** -0.5
    if "sliding_window" in family.defaults:
        fields["sliding_windows"] = _read_windows(family.defaults, hf, fields["layers"])
    return {"kv_heads": heads, "head_width": width // heads, "mlp_width": 4 * width} | fields


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
    if kinds is None:
        return tuple(None if layer % 2 else window for layer in range(layers))
    by_kind = {"full_attention": None, "sliding_attention": window}
    named = isinstance(kinds, list) and all(kind in [*by_kind] for kind in kinds)
    if not named or len(kinds) != layers:
        taken = f"a list that names one of {', '.join(by_kind)} for each of {layers} layers"
        raise refused("layer_types", kinds, taken)
    return tuple(by_kind[kind] for kind in kinds)


def _write_windows(config: ModelConfig, known: Json) -> dict[str, Any]:
    windows = config.sliding_windows or (None,) * config.layers
    window = next((size for size in windows if size), None)
    kinds = ["sliding_attention" if size else "full_attention" for size in windows]
    hf = {
        "use_sliding_window": window is not None,
        # transformers builds Gemma 2's windowed mask even where no layer uses it.
        "sliding_window": window or (4096 if config.architecture == "gemma2" else None),
        "max_window_layers": kinds.count("full_attention"),
        "layer_types": kinds,
    }
    return {name: value for name, value in hf.items() if name in known}


def size(hf: Json, name: str, *, least: int = 1, where: str = "") -> int:
    """A whole number from `least` on. Raises InputError for anything else."""
    if name not in hf:
        raise InputError(f"config field {where}{name} is missing")
    value = hf[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        taken = "a positive whole number" if least == 1 else f"a whole number from {least} on"
        raise refused(where + name, value, taken)
    return value


def number(
    hf: Json, name: str, *, above: float = -math.inf, least: float = -math.inf, where: str = ""
) -> float:
    """A finite number above one bound or from the other on. Raises InputError for anything else."""
    value = hf.get(name)
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # not of NaN; whole numbers may be too large for one
        and value > above
        and value >= least
    ):
        return float(value)
    taken = f"a number above {above:g}" if above > -math.inf else f"a number of at least {least:g}"
    raise refused(where + name, value, taken)


def optional_number(hf: Json, name: str, **bounds: Any) -> float | None:
    """`number`, or None where the field is null or not there."""
    return None if hf.get(name) is None else number(hf, name, **bounds)


def switch(hf: Json, name: str) -> bool:
    """true or false, which null is too. Raises InputError for anything else: texts are all true."""
    value = hf.get(name)
    if value not in (None, False, True):
        raise refused(name, value, "true or false")
    return bool(value)


def mapping(hf: Json, name: str, example: str) -> Json:
    """A JSON object, empty where the field is null or not there. Raises InputError otherwise."""
    value = hf.get(name)
    if not isinstance(value, Mapping | None):
        raise refused(name, value, f"a mapping such as {example}")
    return value or {}


def _activation(hf: Json, name: str) -> str:
    value = hf[name]
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise InputError(f"activation {value!r} is not supported; supported: {known}")
    return _ACTIVATIONS[value]


def refused(name: str, value: Any, taken: str) -> InputError:
    """The error that names a field, its value and what it takes."""
    told = repr(value)
    told = told if len(told) <= 80 else f"{told[:79]}…"
    return InputError(f"config field {name} is {told}; it must be {taken}")


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
        if name not in _DERIVED or hf[name] is not None
    }


_KINDS = (*ROPE_KINDS, "dynamic")
_ORIGINAL = "original_max_position_embeddings"
_EXAMPLE = '{"rope_type": "linear", "factor": 2.0}'
# Our fields of a rope, and what files call them, beside its factor and original positions.
_ROPE_NAMES = {
    "llama3": {
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
    },
    "yarn": {name: name for name in ("beta_fast", "beta_slow", "truncate", "attention_factor")},
}


def _read_rope(hf: Json) -> tuple[Rope, int]:
    """The rope, and how many positions it reaches: files name them before the scaling or after it.

    Where `original_max_position_embeddings` is there, the larger of `max_position_embeddings` and
    original × factor; without it `linear` and `yarn` stretch `max_position_embeddings`.
    """
    max_positions = size(hf, "max_position_embeddings")
    held = [(name, mapping(hf, name, _EXAMPLE)) for name in ("rope_scaling", "rope_parameters")]
    name, scaling = next((one for one in held if one[1]), held[0])
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise InputError("config field rope_parameters differs by layer, which is not supported")
    _refuse_partial(scaling)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
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
    if given:
        return rope, max(max_positions, int(given * rope.factor))
    return rope, int(max_positions * rope.factor) if kind in ("linear", "yarn") else max_positions


def _refuse_partial(hf: Json) -> None:
    """Raise InputError where only a part of each head is rotated."""
    if hf.get("partial_rotary_factor") not in (None, 1):
        raise InputError("config field partial_rotary_factor is not 1, which is not supported")


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

    factor = given("factor", max_positions / original, least=1)
    return scaled(
        factor=factor,
        attention_factor=_yarn_attention_factor(scaling, factor, where),
        beta_fast=given("beta_fast", 32.0, above=0),
        beta_slow=given("beta_slow", 1.0, above=0),
        truncate=switch({"truncate": True, **scaling}, "truncate"),
        original_max_positions=original,
    )


def _yarn_attention_factor(scaling: Json, factor: float, where: str) -> float | None:
    """The factor as given, or from DeepSeek's pair mscale, mscale_all_dim; None: the paper's."""
    read = partial(optional_number, scaling, where=where)
    over, under = (read(name, least=0) for name in ("mscale", "mscale_all_dim"))
    given = read("attention_factor", above=0)
    if given is not None or not over or not under:
        return given
    growth = 0.1 * math.log(max(factor, 1.0))
    return (over * growth + 1.0) / (under * growth + 1.0)


def _write_rope(rope: Rope, max_positions: int) -> dict[str, Any] | None:
    """The rope_scaling that `_read_rope` reads back; None for the plain rope."""
    if rope.kind == "default":
        return None
    names = _ROPE_NAMES.get(rope.kind, {})
    given = {name: getattr(rope, field) for field, name in names.items()}
    return {
        "rope_type": rope.kind,
        "factor": rope.factor,
        # So that the positions are not taken for those before the scaling.
        _ORIGINAL: rope.original_max_positions or int(max_positions / rope.factor),
        **{name: value for name, value in given.items() if value is not None},
    }
