"""The table of architectures: what their files call things, and what transformers assumes.

A row says how config.json names fields and how checkpoints name tensors; no code is here.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

QKV = ("query", "key", "value")
_LLAMA_TENSORS = {
    "embed": "model.embed_tokens",
    "layers/attention_norm": "model.layers.{i}.input_layernorm",
    "layers/attention/query": "model.layers.{i}.self_attn.q_proj",
    "layers/attention/key": "model.layers.{i}.self_attn.k_proj",
    "layers/attention/value": "model.layers.{i}.self_attn.v_proj",
    "layers/attention/query_norm": "model.layers.{i}.self_attn.q_norm",
    "layers/attention/key_norm": "model.layers.{i}.self_attn.k_norm",
    "layers/attention/out": "model.layers.{i}.self_attn.o_proj",
    "layers/mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "layers/mlp/gate": "model.layers.{i}.mlp.gate_proj",
    "layers/mlp/up": "model.layers.{i}.mlp.up_proj",
    "layers/mlp/down": "model.layers.{i}.mlp.down_proj",
    "final_norm": "model.norm",
}
# Gemma 2 gives the name post_attention_layernorm to a norm that others do not have.
_GEMMA2_TENSORS = _LLAMA_TENSORS | {
    "layers/post_attention_norm": "model.layers.{i}.post_attention_layernorm",
    "layers/mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "layers/post_mlp_norm": "model.layers.{i}.post_feedforward_layernorm",
}
_OLMO2_TENSORS = _LLAMA_TENSORS | {
    "layers/attention_norm": "model.layers.{i}.post_attention_layernorm",
    "layers/mlp_norm": "model.layers.{i}.post_feedforward_layernorm",
}
_PHI3_TENSORS = (
    _LLAMA_TENSORS
    | {f"layers/attention/{name}": "model.layers.{i}.self_attn.qkv_proj" for name in QKV}
    | {f"layers/mlp/{name}": "model.layers.{i}.mlp.gate_up_proj" for name in ("gate", "up")}
)
# Of experts by their number; the router is named after what it decides.
_EXPERTS = {
    f"layers/mlp/experts/{name}": f"model.layers.{{i}}.mlp.experts.{{e}}.{name}_proj"
    for name in ("gate", "up", "down")
}
_QWEN_MOE_TENSORS = _LLAMA_TENSORS | _EXPERTS | {"layers/mlp/router": "model.layers.{i}.mlp.gate"}
_MIXTRAL = "model.layers.{i}.block_sparse_moe"
_MIXTRAL_TENSORS = _LLAMA_TENSORS | {
    "layers/mlp/router": f"{_MIXTRAL}.gate",
    "layers/mlp/experts/gate": f"{_MIXTRAL}.experts.{{e}}.w1",
    "layers/mlp/experts/up": f"{_MIXTRAL}.experts.{{e}}.w3",
    "layers/mlp/experts/down": f"{_MIXTRAL}.experts.{{e}}.w2",
}
_GPT_NEOX_TENSORS = {
    "embed": "gpt_neox.embed_in",
    "layers/attention_norm": "gpt_neox.layers.{i}.input_layernorm",
    **{f"layers/attention/{name}": "gpt_neox.layers.{i}.attention.query_key_value" for name in QKV},
    "layers/attention/out": "gpt_neox.layers.{i}.attention.dense",
    "layers/mlp_norm": "gpt_neox.layers.{i}.post_attention_layernorm",
    "layers/mlp/up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
    "layers/mlp/down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
    "final_norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
}
_OPT_TENSORS = {
    "embed": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "project_in": "model.decoder.project_in",
    "project_out": "model.decoder.project_out",
    "layers/attention_norm": "model.decoder.layers.{i}.self_attn_layer_norm",
    "layers/attention/query": "model.decoder.layers.{i}.self_attn.q_proj",
    "layers/attention/key": "model.decoder.layers.{i}.self_attn.k_proj",
    "layers/attention/value": "model.decoder.layers.{i}.self_attn.v_proj",
    "layers/attention/out": "model.decoder.layers.{i}.self_attn.out_proj",
    "layers/mlp_norm": "model.decoder.layers.{i}.final_layer_norm",
    "layers/mlp/up": "model.decoder.layers.{i}.fc1",
    "layers/mlp/down": "model.decoder.layers.{i}.fc2",
    "final_norm": "model.decoder.final_layer_norm",
}
_GPT2_TENSORS = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "layers/attention_norm": "transformer.h.{i}.ln_1",
    "layers/attention/query": "transformer.h.{i}.attn.c_attn",
    "layers/attention/key": "transformer.h.{i}.attn.c_attn",
    "layers/attention/value": "transformer.h.{i}.attn.c_attn",
    "layers/attention/out": "transformer.h.{i}.attn.c_proj",
    "layers/mlp_norm": "transformer.h.{i}.ln_2",
    "layers/mlp/up": "transformer.h.{i}.mlp.c_fc",
    "layers/mlp/down": "transformer.h.{i}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
}


@dataclass(frozen=True)
class Family:
    """One architecture.

    name: of transformers' class. names: fields of ModelConfig that files hold under another name,
    read as their type says. defaults: what transformers assumes where config.json is silent; an
    optional field that is not among them is not read. Sizes of matrices have no default: a file
    without them is a broken file. fixed: fields of ModelConfig that are always so. tensors: the
    modules' names in checkpoints, with {i} for a layer's number and {e} for an expert's. prefix:
    what stands before the tensors' names in the files of a language model, and not in those of the
    decoder alone. Modules of one name are one tensor, query before key before value, gate before
    up: interleaved says that they are so in each head, and else side by side. aliases: what files
    call fields that others have under the name behind it. sliding_theta: the field that holds the
    base of the plain rope of layers with a sliding window, where `rope_scaling` is for the others.
    classifier: transformers' class of sequence classifiers, where it is not named after `name`.
    """

    name: str
    names: dict[str, str]
    defaults: dict[str, Any]
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    tensors: dict[str, str] = dataclasses.field(default_factory=lambda: _LLAMA_TENSORS)
    prefix: str = "model."
    interleaved: bool = False
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)
    sliding_theta: str | None = None
    classifier: str | None = None


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
ACTIVATION_FIELDS = ("activation_function", "hidden_act", "hidden_activation")
# Where one of these is null, it follows from the other sizes.
DERIVED = ("n_inner", "num_key_value_heads", "head_dim")
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
_EXPERT_NAMES = {
    "experts_per_token": "num_experts_per_tok",
    "normalised_experts": "norm_topk_prob",
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
_OLMO = _ROTARY | {
    "attention_bias": False,
    "max_position_embeddings": 2048,
    "pad_token_id": 1,
    "eos_token_id": 50279,
}
_GEMMA2_NAMES = _BIASED | {
    "activation": "hidden_activation",
    "final_softcap": "final_logit_softcapping",
}
_GEMMA2 = _GEMMA | {
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "sliding_window_pattern": 2,
    "final_logit_softcapping": None,
}
FAMILIES = {
    "gpt2": Family(
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
        _GPT2_TENSORS,
        "transformer.",
    ),
    "llama": Family(
        "LlamaForCausalLM",
        _BIASED | {"mlp_bias": "mlp_bias"},
        _LLAMA | {"attention_bias": False, "mlp_bias": False, "max_position_embeddings": 2048},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _ROTARY_NAMES,
        _LLAMA
        | {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        _BIASED | {"norm_epsilon": "layer_norm_eps", "parallel_residual": "use_parallel_residual"},
        _ROTARY
        | {
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
            "attention_bias": True,
            "partial_rotary_factor": 0.25,
            "max_position_embeddings": 2048,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        {"norm": "layer", "gated_mlp": False, "mlp_bias": True},
        _GPT_NEOX_TENSORS,
        "gpt_neox.",
        interleaved=True,
        aliases={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
    ),
    "opt": Family(
        "OPTForCausalLM",
        _NAMES
        | {
            "width": "hidden_size",
            "layers": "num_hidden_layers",
            "heads": "num_attention_heads",
            "mlp_width": "ffn_dim",
            "max_positions": "max_position_embeddings",
            "activation": "activation_function",
        }
        | dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), "enable_bias"),
        {
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "word_embed_proj_dim": None,
            "enable_bias": True,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        {"norm": "layer", "position": "learned", "position_offset": 2, "gated_mlp": False},
        _OPT_TENSORS,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _ROTARY_NAMES,
        _LLAMA
        | {
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "partial_rotary_factor": 1.0,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
        },
        tensors=_PHI3_TENSORS,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _ROTARY_NAMES
        | {"experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
        _LLAMA
        | {
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
        },
        {"normalised_experts": True},
        _MIXTRAL_TENSORS,
    ),
    "qwen2": Family("Qwen2ForCausalLM", _ROTARY_NAMES, _QWEN, {"qkv_bias": True}),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _BIASED,
        _QWEN | {"head_dim": 128, "attention_bias": False},
        {"query_key_norm": "head"},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _BIASED | _EXPERT_NAMES | {"mlp_width": "moe_intermediate_size", "experts": "num_experts"},
        _ROTARY
        | {
            "attention_bias": False,
            "norm_topk_prob": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
        },
        {"query_key_norm": "head"},
        _QWEN_MOE_TENSORS,
    ),
    "gemma": Family("GemmaForCausalLM", _BIASED, _GEMMA, {"norm_offset": 1.0}),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA2_NAMES | {"attention_softcap": "attn_logit_softcapping"},
        _GEMMA2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        {"norm_offset": 1.0, "norm_placement": "sandwich"},
        _GEMMA2_TENSORS,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        # The positions are those after the scaling.
        _GEMMA2_NAMES | {"max_positions": "max_position_embeddings"},
        _GEMMA2
        | {
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "max_position_embeddings": 131072,
            # Published files leave these out where they are so.
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
        {"norm_offset": 1.0, "norm_placement": "sandwich", "query_key_norm": "head"},
        _GEMMA2_TENSORS,
        sliding_theta="rope_local_base_freq",
        classifier="Gemma3TextForSequenceClassification",
    ),
    "olmo": Family(
        "OlmoForCausalLM",
        {field: name for field, name in _BIASED.items() if field != "norm_epsilon"}
        | {"qkv_clip": "clip_qkv"},
        _OLMO,
        {"norm": "layer_plain", "norm_epsilon": 1e-5},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        _BIASED,
        _OLMO | {"rms_norm_eps": 1e-5},
        {"norm_placement": "branch", "query_key_norm": "width"},
        _OLMO2_TENSORS,
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        _BIASED,
        _OLMO
        | {
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "layer_types": None,
            "sliding_window_pattern": 4,
            "rope_theta": 5e5,
        },
        {"norm_placement": "branch", "query_key_norm": "width"},
        _OLMO2_TENSORS,
        sliding_theta="rope_theta",
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _BIASED | {"mlp_bias": "mlp_bias"},
        _ROTARY
        | {
            "num_key_value_heads": 4,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "rope_theta": 2e6,
            "max_position_embeddings": 32768,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 128004,
        },
    ),
    "granite": Family(
        "GraniteForCausalLM",
        _BIASED
        | {
            "mlp_bias": "mlp_bias",
            "embedding_multiplier": "embedding_multiplier",
            "attention_scale": "attention_multiplier",
            "residual_multiplier": "residual_multiplier",
            "logit_divisor": "logits_scaling",
        },
        _LLAMA
        | {"attention_bias": False, "mlp_bias": False, "max_position_embeddings": 2048}
        | dict.fromkeys(
            (
                "embedding_multiplier",
                "attention_multiplier",
                "residual_multiplier",
                "logits_scaling",
            ),
            1.0,
        ),
    ),
}
# Multimodal architectures, of which the text part is read, and what it is.
TEXT_PARTS = {"gemma3": "gemma3_text"}
ARCHITECTURES = (*FAMILIES, *TEXT_PARTS)

OWN = Family("", {}, {})
"""What stands for an architecture of one's own: tensors as Llama's."""
