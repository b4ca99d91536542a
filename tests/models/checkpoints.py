"""Tiny random checkpoints of every architecture, made with transformers and torch."""

import json
from pathlib import Path
from typing import Any

SMALL = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
SMALL_GPT2 = {
    "vocab_size": 61,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 300.0,
    "short_factor": [1.0, 1.25, 2.5],
    "long_factor": [1.0, 2.0, 8.0],
}


def small(**changes: Any) -> dict[str, Any]:
    return SMALL | changes


# name: (architecture, arguments of its transformers config). Sliding windows are shorter than the
# sequences they are tried on.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", SMALL_GPT2),
    "gpt2_variant": (
        "gpt2",
        SMALL_GPT2
        | {
            "n_inner": 36,
            "activation_function": "relu",
            "scale_attn_weights": False,
            "tie_word_embeddings": False,
        },
    ),
    "llama": ("llama", small()),
    "llama_grouped": (
        "llama",
        small(
            num_key_value_heads=2,
            head_dim=16,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            vocab_size=67,
        ),
    ),
    "llama_3_1": ("llama", small(num_key_value_heads=1, head_dim=12, rope_parameters=LLAMA3_ROPE)),
    "llama_linear": ("llama", small(rope_parameters={"rope_type": "linear", "factor": 2.5})),
    "mistral": ("mistral", small(num_key_value_heads=2, sliding_window=5)),
    "mistral_full": ("mistral", small(sliding_window=None, head_dim=8, hidden_act="gelu")),
    "gpt_neox": ("gpt_neox", small(hidden_size=32, rotary_pct=0.5, vocab_size=59)),
    "gpt_neox_sequential": (
        "gpt_neox",
        small(
            use_parallel_residual=False,
            rotary_pct=1.0,
            rotary_emb_base=500,
            attention_bias=False,
            tie_word_embeddings=True,
        ),
    ),
    "opt": ("opt", small(ffn_dim=36)),
    "opt_projected": (
        "opt",
        small(ffn_dim=36, word_embed_proj_dim=10, do_layer_norm_before=False),
    ),
    "opt_bare": (
        "opt",
        small(
            ffn_dim=20,
            word_embed_proj_dim=16,
            enable_bias=False,
            tie_word_embeddings=False,
            activation_function="gelu",
        ),
    ),
    "phi3": ("phi3", small(num_key_value_heads=1, sliding_window=5, vocab_size=59)),
    "phi3_long": (
        "phi3",
        small(
            hidden_size=32,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            partial_rotary_factor=0.75,
            original_max_position_embeddings=20,
            rope_parameters=LONGROPE,
        ),
    ),
    "mixtral": (
        "mixtral",
        small(num_key_value_heads=2, sliding_window=5, num_local_experts=5, num_experts_per_tok=2),
    ),
    "mixtral_all": ("mixtral", small(num_local_experts=3, num_experts_per_tok=3, head_dim=8)),
    "qwen3_moe": (
        "qwen3_moe",
        small(
            num_key_value_heads=2,
            head_dim=10,
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=12,
            norm_topk_prob=True,
        ),
    ),
    "qwen3_moe_biased": (
        "qwen3_moe",
        small(
            attention_bias=True,
            num_experts=4,
            num_experts_per_tok=1,
            moe_intermediate_size=20,
            use_sliding_window=True,
            sliding_window=4,
            tie_word_embeddings=True,
        ),
    ),
    "qwen2": (
        "qwen2",
        small(
            num_hidden_layers=3,
            num_key_value_heads=2,
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=1,
        ),
    ),
    "qwen2_yarn": ("qwen2", small(tie_word_embeddings=True, rope_parameters=YARN_ROPE)),
    "qwen2_yarn_tuned": (
        "qwen2",
        small(
            rope_parameters=YARN_ROPE
            | {"attention_factor": 0.8, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}
        ),
    ),
    "qwen3": ("qwen3", small(num_key_value_heads=2, head_dim=10, tie_word_embeddings=True)),
    "qwen3_biased": (
        "qwen3",
        small(
            attention_bias=True,
            head_dim=6,
            use_sliding_window=True,
            sliding_window=3,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "gemma": ("gemma", small(num_key_value_heads=1, head_dim=16)),
    "gemma_untied": ("gemma", small(head_dim=6, tie_word_embeddings=False, attention_bias=True)),
    "gemma2": (
        "gemma2",
        small(
            num_hidden_layers=3,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=20,
            sliding_window=4,
            final_logit_softcapping=3.0,
            attn_logit_softcapping=2.0,
        ),
    ),
    "gemma2_uncapped": (
        "gemma2",
        small(
            head_dim=12,
            query_pre_attn_scalar=12,
            sliding_window=6,
            layer_types=["full_attention", "sliding_attention"],
            final_logit_softcapping=None,
            attn_logit_softcapping=None,
        ),
    ),
    "gemma3_text": (
        "gemma3_text",
        small(
            num_hidden_layers=7,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=120,
            sliding_window=4,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
        ),
    ),
    "gemma3_text_capped": (
        "gemma3_text",
        small(
            head_dim=12,
            attention_bias=True,
            tie_word_embeddings=False,
            sliding_window=6,
            layer_types=["full_attention", "sliding_attention"],
            final_logit_softcapping=3.0,
            attn_logit_softcapping=2.0,  # transformers does not apply it
        ),
    ),
    "olmo": ("olmo", small(num_key_value_heads=2, clip_qkv=0.8)),
    "olmo_biased": ("olmo", small(attention_bias=True, tie_word_embeddings=True)),
    "olmo2": ("olmo2", small(num_key_value_heads=2, vocab_size=47)),
    "olmo2_biased": ("olmo2", small(attention_bias=True, tie_word_embeddings=True)),
    "olmo3": (
        "olmo3",
        small(
            num_hidden_layers=5,
            num_key_value_heads=2,
            sliding_window=4,
            rope_parameters={
                "full_attention": YARN_ROPE | {"rope_theta": 500000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
            },
        ),
    ),
    "olmo3_full": ("olmo3", small(layer_types=["full_attention"] * 2, attention_bias=True)),
    "smollm3": ("smollm3", small(num_hidden_layers=5, num_key_value_heads=2)),
    "smollm3_sliding": (
        "smollm3",
        small(
            num_hidden_layers=3,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
            use_sliding_window=True,
            sliding_window=5,
            no_rope_layers=[0, 1, 0],
        ),
    ),
    "granite": (
        "granite",
        small(
            num_key_value_heads=2,
            tie_word_embeddings=True,
            embedding_multiplier=3.0,
            attention_multiplier=0.3,
            residual_multiplier=0.4,
            logits_scaling=1.7,
        ),
    ),
    "granite_biased": ("granite", small(attention_bias=True, mlp_bias=True, residual_multiplier=2)),
}


def build(case: str, seed: int = 0) -> Any:
    """A transformers model of the case in evaluation mode, every parameter random."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture, arguments = CASES[case]
    config = AutoConfig.for_model(architecture, **json.loads(json.dumps(arguments)))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Matrices of unit gain and vectors near one, so that no part of the model is idle.
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.uniform_(0.2, 1.2)
    return model


def logits_of(model: Any, tokens: Any) -> Any:
    """Float32 logits [B, X, V] of a transformers model as a NumPy array."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def as_of_2024(hf: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 as its versions of 2023-24 would have written it."""
    hf = dict(hf)
    hf["torch_dtype"] = hf.pop("dtype")
    rope = hf.pop("rope_parameters", None)
    if rope is not None:
        by_kind = "full_attention" in rope
        if by_kind:
            hf["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        rope = dict(rope)
        neox = hf["model_type"] == "gpt_neox"
        hf["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            share = rope.pop("partial_rotary_factor")
            hf["rotary_pct" if neox else "partial_rotary_factor"] = share
        kind = rope.pop("rope_type")
        key = "rope_type" if kind == "llama3" or by_kind else "type"  # the older name of the key
        hf["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    if hf["model_type"] == "gemma":
        hf |= {"hidden_act": "gelu", "hidden_activation": None}
    if "layer_types" in hf and hf["layer_types"] == _layer_types_of_2024(hf):
        hf.pop("layer_types")
    return hf


def _layer_types_of_2024(hf: dict[str, Any]) -> list[str]:
    pattern = {"gemma2": 2, "gemma3_text": 6, "olmo3": 4}.get(hf["model_type"])
    if pattern:
        windowed = [layer % pattern > 0 for layer in range(1, hf["num_hidden_layers"] + 1)]
    else:
        first = hf.get("max_window_layers", 0) if hf.get("use_sliding_window") else 10**6
        windowed = [layer >= first for layer in range(hf["num_hidden_layers"])]
    return ["sliding_attention" if window else "full_attention" for window in windowed]


def rewrite_as_of_2024(directory: Path) -> None:
    """Replace a checkpoint's config.json by the older form of the same."""
    path = directory / "config.json"
    path.write_text(json.dumps(as_of_2024(json.loads(path.read_text())), indent=2))
