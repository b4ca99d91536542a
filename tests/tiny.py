"""Tiny random models with sharp distributions, for tests of decoding and search."""

import jax
import numpy as np

from w2s_jax.models.config import ModelConfig
from w2s_jax.models.model import Model, abstract_model
from w2s_jax.models.parameters import STACKED, layer_name

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

    Both layouts of a seed hold the same numbers. Made in NumPy: nothing is compiled.
    """
    config = tiny_config(**fields)
    shapes, _ = abstract_model(config)
    rng = np.random.default_rng(seed)

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        drawn = rng.normal(size=leaf.shape)
        wide = 1.0 + 0.1 * drawn if drawn.ndim == 1 else 0.02 * sharpness * drawn
        return wide.astype(leaf.dtype)

    params = jax.tree.map(fill, shapes.params)
    if scan_layers:
        layers = [params.pop(layer_name(layer)) for layer in range(config.layers)]
        params[STACKED] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    return Model(config, jax.device_put(params))
