"""Tiny random models with sharp distributions, for tests of decoding and search."""

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.models.config import ModelConfig
from w2s_jax.models.layout import stack_layers
from w2s_jax.models.model import Model, abstract_model

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
    """Random weights large enough that log-probs differ and choices can be told apart.

    Both layouts of a seed hold the same numbers. Drawn in NumPy: nothing is compiled.
    """
    config = tiny_config(**fields)
    shapes, _ = abstract_model(config)
    rng = np.random.default_rng(seed)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if len(leaf.shape) == 1:
            return jnp.asarray(1.0 + 0.1 * rng.normal(size=leaf.shape), leaf.dtype)
        return jnp.asarray(0.02 * sharpness * rng.normal(size=leaf.shape), leaf.dtype)

    params = jax.tree.map(fill, shapes.params)
    return Model(config, stack_layers(params, config.layers) if scan_layers else params)
