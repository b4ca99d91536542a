"""Shapes of published models by their hub ids, so that neither a plan nor a bench needs a download.

Contents of their config.json files, as far as they decide on shapes.
"""

from typing import Any


def _llama(width: int, layers: int, heads: int, kv_heads: int, mlp: int, **other: Any) -> dict:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | other


_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
_LLAMA_3_8B = _llama(4096, 32, 32, 8, 14336, **_LLAMA_3)
_LLAMA_3_70B = _llama(8192, 80, 64, 8, 28672, **_LLAMA_3)
_LLAMA_3_2_1B = _llama(
    2048, 16, 32, 8, 8192, **_LLAMA_3 | {
        "head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
)  # fmt: skip
_LLAMA_2_7B = _llama(4096, 32, 32, 32, 11008)
_LLAMA_2_70B = _llama(8192, 80, 64, 8, 28672)
_MISTRAL_7B = _llama(
    4096, 32, 32, 8, 14336, model_type="mistral", max_position_embeddings=32768, sliding_window=4096
)
KNOWN: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-70B": _LLAMA_3_70B,
    "meta-llama/Meta-Llama-3-70B-Instruct": _LLAMA_3_70B,
    "meta-llama/Llama-3.2-1B": _LLAMA_3_2_1B,
    "meta-llama/Llama-2-7b-hf": _LLAMA_2_7B,
    "meta-llama/Llama-2-7b-chat-hf": _LLAMA_2_7B,
    "meta-llama/Llama-2-13b-chat-hf": _llama(5120, 40, 40, 40, 13824),
    "meta-llama/Llama-2-70b-hf": _LLAMA_2_70B,
    "meta-llama/Llama-2-70b-chat-hf": _LLAMA_2_70B,
    "mistralai/Mistral-7B-v0.1": _MISTRAL_7B,
    "HuggingFaceH4/mistral-7b-sft-beta": _MISTRAL_7B,
    "HuggingFaceH4/zephyr-7b-beta": _MISTRAL_7B,
}
