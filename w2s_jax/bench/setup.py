"""What measurements are made of: named shapes with random weights, and other programs."""

import json
import subprocess
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from w2s_jax.errors import InputError
from w2s_jax.models.config import KNOWN, ModelConfig
from w2s_jax.models.config_json import config_from_hf
from w2s_jax.models.model import Model, abstract_model


def call(command: list[str], *, seconds: float | None = None) -> dict[str, Any]:
    """The JSON line that a program prints; RuntimeError with its last words where it fails.

    Raises subprocess.TimeoutExpired for one that takes longer than so many seconds, and ends it.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def missing(python: str, modules: str, advice: str) -> str | None:
    """Why modules ("torch, trl") cannot be imported by this interpreter, or None."""
    try:
        done = subprocess.run(
            [python, "-c", f"import {modules}"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        return f"{python}: {error.strerror}"
    if done.returncode == 0:
        return None
    last = (done.stderr.strip().splitlines() or ["it failed"])[-1]
    return f"{python}: {last}; {advice}"


SHAPES = {"llama-1b": "meta-llama/Llama-3.2-1B", "llama-8b": "meta-llama/Meta-Llama-3-8B"}
GUIDE_SHAPE = "llama-1b"
"""The shape of the guides of a policy of a named shape."""
SPREAD = 0.02
"""Standard deviation of the weights."""


def named_shape(name: str) -> ModelConfig:
    """The config of a shape of `SHAPES`; InputError, with the known ones, for another name."""
    if name not in SHAPES:
        raise InputError(f"--shape {name}: no such shape; known are {', '.join(SHAPES)}")
    return config_from_hf(KNOWN[SHAPES[name]])


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
