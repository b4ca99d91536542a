"""Tiny random models with sharp distributions, for tests of decoding and search."""

import jax

from w2s_jax.models.config import ModelConfig
from w2s_jax.models.model import Model, init_model

VOCAB = 23
EOS = 3


def tiny_config(**fields) -> ModelConfig:
    base = {
        "architecture": "llama",
        "vocab_size": VOCAB,
        "width": 16,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_width": 4,
        "mlp_width": 24,
        "max_positions": 128,
        "eos_ids": (EOS,),
    }
    return ModelConfig(**(base | fields))


def tiny_model(seed: int, *, scan_layers: bool = False, sharpness: float = 12.0, **fields) -> Model:
    """Random weights scaled up, so that log-probs differ enough to tell choices apart."""
    model = init_model(tiny_config(**fields), jax.random.key(seed), scan_layers=False)
    params = jax.tree.map(lambda x: x * sharpness if x.ndim > 1 else x, model.params)
    if scan_layers:
        from w2s_jax.models.layout import stack_layers

        params = stack_layers(params, model.config.layers)
    return Model(model.config, params)
