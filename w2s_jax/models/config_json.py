"""config.json in both directions: its names and transformers' defaults, per architecture.

Reads the files of 2023-24 (`rope_theta`, `rope_scaling`) and of transformers 5 (`rope_parameters`).
Opens no file: `huggingface.py` does. A field that is wrong is named with what it lies in (`where`).
"""

import dataclasses
import math
import sys
from collections.abc import Mapping
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

    name: of transformers' class. defaults: what transformers assumes where config.json is silent;
    an optional field that is not among them is not read. Sizes of matrices have no default: a file
    without them is a broken file. fixed: fields of ModelConfig that are always so.
    """

    name: str
    defaults: dict[str, Any]
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)


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
        _LLAMA | {"attention_bias": False, "mlp_bias": False, "max_position_embeddings": 2048},
    ),
    "mistral": _Family(
        "MistralForCausalLM",
        _LLAMA
        | {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    ),
    "qwen2": _Family("Qwen2ForCausalLM", _QWEN, {"qkv_bias": True}),
    "qwen3": _Family(
        "Qwen3ForCausalLM",
        _QWEN | {"head_dim": 128, "attention_bias": False},
        {"query_key_norm": True},
    ),
    "gemma": _Family("GemmaForCausalLM", _GEMMA, {"norm_offset": 1.0}),
    "gemma2": _Family(
        "Gemma2ForCausalLM",
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

# Our sizes, and what files call them. Where one of _DERIVED is null, it follows from the others.
_GPT2_NAMES = {
    "width": "n_embd",
    "layers": "n_layer",
    "heads": "n_head",
    "mlp_width": "n_inner",
    "max_positions": "n_positions",
}
_ROTARY_NAMES = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "mlp_width": "intermediate_size",
}
_DERIVED = ("n_inner", "num_key_value_heads", "head_dim")

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

    Raises InputError for an architecture, rope kind or activation that is not supported, for a
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
        vocab_size=size(hf, "vocab_size"),
        tied_embeddings=switch(hf, "tie_word_embeddings"),
        bos_id=next(iter(_token_ids(hf, "bos_token_id")), None),
        eos_ids=tuple(dict.fromkeys(eos_ids)),
        pad_id=next(iter(_token_ids(hf, "pad_token_id")), None),
        **family.fixed,
        **_read_shape(architecture, hf),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The contents of a config.json that `config_from_hf` and transformers (4.41 and later) read.

    Raises InputError naming the fields that the architecture's config.json cannot express.
    """
    if config.architecture not in ARCHITECTURES:
        raise InputError(
            f"architecture {config.architecture!r} has no config.json; supported: {_SUPPORTED}"
        )
    eos_ids = list(config.eos_ids)
    hf = {
        "architectures": [_FAMILIES[config.architecture].name],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids or None,
        "pad_token_id": config.pad_id,
        **(_write_gpt2(config) if config.architecture == "gpt2" else _write_rotary(config)),
    }
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


def _token_ids(hf: Json, name: str) -> list[int]:
    value = hf.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise refused(name, value, "one token id or a list")
    return [token for token in ids if token >= 0]  # some Llama files write -1 for "none"


def _activation(name: Any) -> str:
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise InputError(f"activation {name!r} is not supported; supported: {known}")
    return _ACTIVATIONS[name]


def _read_shape(architecture: str, hf: Json) -> dict[str, Any]:
    """The fields of ModelConfig that say its shape and kinds."""
    known = _FAMILIES[architecture].defaults
    names = _GPT2_NAMES if architecture == "gpt2" else _ROTARY_NAMES
    fields: dict[str, Any] = {
        field: size(hf, name)
        for field, name in names.items()
        if name not in _DERIVED or hf[name] is not None
    }
    width, heads = fields["width"], fields["heads"]
    if architecture == "gpt2":
        if width % heads:
            raise InputError(f"config field n_embd is {width}, not a multiple of n_head, {heads}")
        epsilon, activation = "layer_norm_epsilon", hf["activation_function"]
        fields["attention_scale"] = None if switch(hf, "scale_attn_weights") else 1.0
    else:
        epsilon, activation = "rms_norm_eps", hf["hidden_act"]
        fields["rope"], fields["max_positions"] = read_rope(hf)
    derived = {"kv_heads": heads, "head_width": width // heads, "mlp_width": 4 * width}
    fields = derived | fields | {"norm_epsilon": number(hf, epsilon, least=0)}
    if "attention_bias" in known:
        fields["qkv_bias"] = fields["out_bias"] = switch(hf, "attention_bias")
    if "mlp_bias" in known:
        fields["mlp_bias"] = switch(hf, "mlp_bias")
    if architecture in ("gemma", "gemma2"):
        fields["embedding_multiplier"] = math.sqrt(width)
    if architecture == "gemma" and activation == "gelu":
        activation = "gelu_pytorch_tanh"  # what the first Gemma files mean by "gelu"
    if architecture == "gemma2":
        activation = hf["hidden_activation"]
        fields |= {
            "attention_scale": size(hf, "query_pre_attn_scalar") ** -0.5,
            "attention_softcap": optional_number(hf, "attn_logit_softcapping", above=0),
            "final_softcap": optional_number(hf, "final_logit_softcapping", above=0),
        }
    fields["activation"] = _activation(activation)
    if "sliding_window" in known:
        fields["sliding_windows"] = _read_windows(architecture, hf, fields["layers"])
    return fields


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {name: getattr(config, field) for field, name in _GPT2_NAMES.items()} | {
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": _ACTIVATION_NAMES[config.activation],
        "scale_attn_weights": config.attention_scale is None,
    }


def _write_rotary(config: ModelConfig) -> dict[str, Any]:
    known = _FAMILIES[config.architecture].defaults
    activation = _ACTIVATION_NAMES[config.activation]
    # `rope_theta` and `rope_scaling` rather than `rope_parameters`: transformers 4 and 5 both
    # read them.
    hf = {name: getattr(config, field) for field, name in _ROTARY_NAMES.items()} | {
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope.theta,
        "rope_scaling": write_rope(config.rope, config.max_positions),
        "hidden_act": activation,
    }
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    optional = {**biases, "hidden_activation": activation}
    hf |= {name: value for name, value in optional.items() if name in known}
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


def refused(name: str, value: Any, taken: str) -> InputError:
    """The error that names a field, its value and what it takes."""
    told = repr(value)
    told = told if len(told) <= 80 else f"{told[:79]}…"
    return InputError(f"config field {name} is {told}; it must be {taken}")


_KINDS = (*ROPE_KINDS, "dynamic")
_EXAMPLE = '{"rope_type": "linear", "factor": 2.0}'


def read_rope(hf: Json) -> tuple[Rope, int]:
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
    given = _original_positions(hf, scaling, f"{name}.")
    if kind == "dynamic":
        # Its angles change with the length only beyond the original positions.
        return Rope(theta=theta), min(max_positions, given or max_positions)
    original = given or max_positions
    rope = _scaled_rope(kind, theta, scaling, original, max_positions, f"{name}.")
    if given:
        return rope, max(max_positions, int(given * rope.factor))
    return rope, int(max_positions * rope.factor) if kind in ("linear", "yarn") else max_positions


def _refuse_partial(hf: Json) -> None:
    """Raise InputError where only a part of each head is rotated."""
    if hf.get("partial_rotary_factor") not in (None, 1):
        raise InputError("config field partial_rotary_factor is not 1, which is not supported")


def _original_positions(hf: Json, scaling: Json, where: str) -> int | None:
    """How many positions a model was first trained on, where the file says so."""
    name = "original_max_position_embeddings"
    if hf.get(name) is not None:
        return size(hf, name)
    return None if scaling.get(name) is None else size(scaling, name, where=where)


def _scaled_rope(
    kind: str, theta: float, scaling: Json, original: int, max_positions: int, where: str
) -> Rope:
    if kind == "default":
        return Rope(theta=theta)
    read = partial(number, scaling, where=where)
    if kind == "linear":
        return Rope(theta, kind, read("factor", least=1))
    if kind == "llama3":
        low = read("low_freq_factor", above=0)
        factor, high = read("factor", least=1), read("high_freq_factor", above=low)
        return Rope(theta, kind, factor, low, high, original_max_positions=original)

    def given(name: str, usual: float, **bounds: Any) -> float:
        return usual if scaling.get(name) is None else read(name, **bounds)

    factor = given("factor", max_positions / original, least=1)
    return Rope(
        theta,
        kind,
        factor,
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


def write_rope(rope: Rope, max_positions: int) -> dict[str, Any] | None:
    """The rope_scaling that `read_rope` reads back; None for the plain rope."""
    if rope.kind == "default":
        return None
    hf: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    # So that the positions are not taken for those before the scaling.
    original = rope.original_max_positions or int(max_positions / rope.factor)
    hf["original_max_position_embeddings"] = original
    if rope.kind == "llama3":
        hf["low_freq_factor"] = rope.low_frequency_factor
        hf["high_freq_factor"] = rope.high_frequency_factor
    if rope.kind == "yarn":
        names = ("beta_fast", "beta_slow", "truncate", "attention_factor")
        hf |= {name: getattr(rope, name) for name in names if getattr(rope, name) is not None}
    return hf
