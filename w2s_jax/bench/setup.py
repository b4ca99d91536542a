"""What measurements are made of: shapes with random weights, other programs, and their files."""

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from w2s_jax.bench.config import BenchConfig
from w2s_jax.errors import InputError
from w2s_jax.models.config import KNOWN, ModelConfig
from w2s_jax.models.config_json import config_from_hf
from w2s_jax.models.model import Model, abstract_model
from w2s_jax.text.rows import check_writable

PEERS = str(Path(__file__).with_name("peers.py"))
"""The program that runs other packages, by an interpreter that has them."""


def check_settings(config: BenchConfig, least: Mapping[str, int], by_shape: Sequence[str]) -> None:
    """Raise InputError for a file that cannot be written, and for sizes that are wrong.

    Args:
        config: The settings.
        least: Fields and the least that each may be.
        by_shape: Fields that a named shape decides. Widths among them are of whole heads.
    """
    if config.json is not None:
        check_writable(config.json)
    shape = getattr(config, "shape", None)
    if shape is not None:
        named_shape(shape)
    for field in fields(config):
        name, value, flag = field.name, getattr(config, field.name), field.name.replace("_", "-")
        if shape is not None and name in by_shape and value != field.default:
            raise InputError(f"--{flag} is set beside --shape, which decides it; leave one out")
        if name in least and value < least[name]:
            raise InputError(f"--{flag} is {value}; it must be at least {least[name]}")
        if name in by_shape and name.endswith("width") and (value < HEAD or value % HEAD):
            raise InputError(
                f"--{flag} is {value}; it must be a multiple of {HEAD}, the width of a head"
            )


def write_figures(config: BenchConfig, figures: Any, **more: Any) -> None:
    """Write the settings, more of them, and the figures, a dataclass, where the config says."""
    if config.json is not None:
        text = json.dumps({"options": config.as_row() | more, **asdict(figures)}, indent=2)
        Path(config.json).write_text(text + "\n")


def call(job: Mapping[str, Any], *command: str, seconds: float | None = None) -> dict[str, Any]:
    """The JSON line that a program prints for a job, whose file is its last argument.

    Raises:
        RuntimeError: With the program's last words, where it fails.
        subprocess.TimeoutExpired: where it takes longer than so many seconds; it is ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        done = _run(*command, str(path), seconds=seconds)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def missing(python: str, modules: str, advice: str) -> str | None:
    """Why modules ("torch, trl") cannot be imported by this interpreter, or None."""
    try:
        done = _run(python, "-c", f"import {modules}")
    except OSError as error:
        return f"{python}: {error.strerror}"
    if done.returncode == 0:
        return None
    last = (done.stderr.strip().splitlines() or ["it failed"])[-1]
    return f"{python}: {last}; {advice}"


def _run(*command: str, seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)


SHAPES = {"llama-1b": "meta-llama/Llama-3.2-1B", "llama-8b": "meta-llama/Meta-Llama-3-8B"}
HEAD = 64
"""Numbers of a head, where no shape is named."""
GUIDE_SHAPE = "llama-1b"
"""The shape of the guides of a policy of a named shape."""
SPREAD = 0.02
"""Standard deviation of the weights."""


def named_shape(name: str) -> ModelConfig:
    """The config of a shape of `SHAPES`; InputError, with the known ones, for another name."""
    if name not in SHAPES:
        raise InputError(f"--shape {name}: no such shape; known are {', '.join(SHAPES)}")
    return config_from_hf(KNOWN[SHAPES[name]])


def gpt2(vocab: int, width: int, layers: int, positions: int) -> ModelConfig:
    """A GPT-2-shaped decoder, with heads of `HEAD` numbers."""
    heads = width // HEAD
    return ModelConfig(
        "gpt2", vocab, width, layers, heads, kv_heads=heads, head_width=HEAD, mlp_width=4 * width,
        max_positions=positions, norm="layer", position="learned", activation="gelu_tanh",
        gated_mlp=False, qkv_bias=True, out_bias=True, mlp_bias=True, tied_embeddings=True,
    )  # fmt: skip


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
