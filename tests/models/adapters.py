"""Adapters made with PEFT on the tiny checkpoints; imported where torch and peft are."""

from pathlib import Path
from typing import Any

from tests.models.checkpoints import build

# name: (case of the base, arguments of PEFT's LoraConfig)
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2_fused": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "gpt2_all": (
        "gpt2_variant",
        {"target_modules": "all-linear", "bias": "all", "fan_in_fan_out": True},
    ),
    "llama": ("llama_grouped", {"target_modules": "all-linear", "use_rslora": True}),
    "llama_pattern": (
        "llama",
        {
            "target_modules": r".*\.layers\.\d+\.self_attn\.(q|o)_proj",
            "modules_to_save": ["lm_head", "embed_tokens"],
        },
    ),
    "mistral": ("mistral", {"target_modules": ["o_proj", "down_proj", "k_proj"], "lora_alpha": 3}),
    "gpt_neox": (
        "gpt_neox",
        {"target_modules": ["query_key_value", "dense", "dense_4h_to_h"], "bias": "lora_only"},
    ),
    "gpt_neox_all": ("gpt_neox_sequential", {"target_modules": "all-linear"}),
    "opt": ("opt_projected", {"target_modules": ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]}),
    "phi3": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "phi3_ranks": (
        "phi3_long",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"qkv_proj": 2},
            "alpha_pattern": {"gate_up_proj": 3},
        },
    ),
    "qwen2": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "qwen2_ranks": (
        "qwen2",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"down_proj": 3, r"layers\.1\.mlp\.up_proj": 1},
            "modules_to_save": ["norm"],
        },
    ),
    "qwen3": ("qwen3", {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.0\..*"}),
    "gemma": (
        "gemma",
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1], "use_rslora": True},
    ),
    # Of a tied base: what PEFT saves is the embedding's own, and the head stays the base's.
    "gemma_embedding": (
        "gemma",
        {"target_modules": ["v_proj", "down_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "gemma3": (
        "gemma3_text",
        {"target_modules": ["q_proj", "o_proj", "up_proj"], "layers_to_transform": [0, 5]},
    ),
    "granite": ("granite", {"target_modules": ["q_proj", "o_proj", "up_proj"]}),
    "olmo": ("olmo_biased", {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    "olmo3": ("olmo3", {"target_modules": "all-linear", "modules_to_save": ["q_norm"]}),
    "smollm3": ("smollm3", {"target_modules": ["k_proj", "v_proj", "gate_proj"]}),
    "gemma2": ("gemma2", {"target_modules": "all-linear", "lora_dropout": 0.1}),
}


def adapt(name: str, base: Path, adapter: Path) -> Any:
    """Save a base, and an adapter of PEFT's on it; the model of both, in evaluation mode."""
    import torch
    from peft import LoraConfig, get_peft_model

    case, arguments = ADAPTERS[name]
    model = build(case)
    model.save_pretrained(base)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **arguments))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(adapter)
    return model.eval()
