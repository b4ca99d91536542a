"""Named shapes of models to be measured, and random weights of them made where they are used."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from w2s_jax.errors import InputError
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.model import Model, abstract_model
from w2s_jax.models.published import KNOWN

SHAPES = {"llama-1b": "meta-llama/Llama-3.2-1B", "llama-8b": "meta-llama/Meta-Llama-3-8B"}
GUIDE_SHAPE = "llama-1b"
"""The shape of the guides of a policy of a named shape."""
SPREAD = 0.02
"""Standard deviation of the weights."""


def named_shape(name: str) -> ModelConfig:
    """The config of a shape of `SHAPES`; InputError, with the known ones, for another name."""
    if name not in SHAPES:
        raise InputError(f"--shape {name}: no such shape; known are {', '.join(SHAPES)}")
    return ModelConfig.from_hf(KNOWN[SHAPES[name]])


def refuse_beside_shape(options: object, names: tuple[str, ...]) -> None:
    """Raise InputError where options that a named shape decides are set beside it."""
    usual = type(options)()
    for name in names:
        if getattr(options, name) != getattr(usual, name):
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is set beside --shape, which decides it; leave one out")


def random_model(config: ModelConfig, seed: int, *, dtype: DTypeLike = jnp.float32) -> Model:
    """A model of random weights (normal; norms at one, biases at zero), the same for the same seed.

    They are drawn on the device in their own dtype, one array after another: what that takes beside
    the weights is of one of them, and a program is compiled for each shape alone.
    """
    shapes, _ = abstract_model(config, dtype=dtype)
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes.params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        _draw(key, path[-1].key, leaf.shape, leaf.dtype)
        for key, (path, leaf) in zip(keys, leaves, strict=True)
    ]
    return Model(config, jax.tree.unflatten(structure, drawn))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: Array, name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    if name in ("scale", "bias"):
        return jnp.full(shape, float(name == "scale"), dtype)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(SPREAD, dtype)
