"""What measurements are made of: shapes with random weights, other programs, and their files."""

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from w2s_jax.bench.config import BenchConfig, ModelBenchConfig
from w2s_jax.errors import InputError
from w2s_jax.models.config import KNOWN, ModelConfig
from w2s_jax.models.config_json import config_from_hf
from w2s_jax.models.model import Model, abstract_model
from w2s_jax.text.rows import check_writable
from w2s_jax.train.estimate import peak_memory

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
    shape = config.shape
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


def write_figures(config: BenchConfig, figures: Mapping[str, Any], **more: Any) -> None:
    """Write the settings, more of them, the machine and the figures where the config says."""
    if config.json is not None:
        told = {"options": config.as_row() | more, "machine": machine(), **figures}
        Path(config.json).write_text(json.dumps(told, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """The hardware and the version of jax."""
    devices = jax.devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cores": cores,
        "jax": jax.__version__,
    }


def told_machine() -> str:
    """The same as a line."""
    return "{devices} × {device}, {cores} CPU cores, jax {jax}".format(**machine())


def reset_peak() -> None:
    """Have `peak_bytes` forget what was before, where the system can; a GPU's cannot."""
    time.sleep(0.2)  # What is no longer held is given back a moment later.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory that was held: on the device, or by this process where that is a CPU."""
    held = jax.devices()[0].memory_stats()
    return held["peak_bytes_in_use"] if held else peak_memory()


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


@cache
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


SHAPES = {
    "gpt2": "openai-community/gpt2",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "llama-1b": "meta-llama/Llama-3.2-1B",
    "llama-3b": "meta-llama/Llama-3.2-3B",
    "llama-8b": "meta-llama/Meta-Llama-3-8B",
}
MODEL_SIZES = ("architecture", "layers", "width", "vocab")
"""Settings of a single model that a named shape decides."""
HEAD = 64
"""Numbers of a head, where no shape is named."""
SPREAD = 0.02
"""Standard deviation of the weights."""


def named_shape(name: str) -> ModelConfig:
    """The config of a shape of `SHAPES`; InputError, with the known ones, for another name."""
    if name not in SHAPES:
        raise InputError(f"--shape {name}: no such shape; known are {', '.join(SHAPES)}")
    return config_from_hf(KNOWN[SHAPES[name]])


def guide_shape(name: str) -> ModelConfig:
    """The shape of the guides of a policy of a named shape: the first of the same vocabulary."""
    wanted = named_shape(name).vocab_size
    return next(one for one in map(named_shape, SHAPES) if one.vocab_size == wanted)


def check_positions(config: ModelConfig, tokens: int) -> None:
    """Raise InputError where a model has no room for so many tokens."""
    if tokens > config.max_positions:
        raise InputError(
            f"{tokens} tokens; a model of --shape has {config.max_positions} positions"
        )


def model_shape(options: ModelBenchConfig, positions: int) -> ModelConfig:
    """The decoder that a single model's options describe, with room for so many tokens."""
    if options.shape is not None:
        return named_shape(options.shape)
    found = gpt2(options.vocab, options.width, options.layers, positions)
    if options.architecture == "gpt2":
        return found
    same = ("vocab_size", "width", "layers", "heads", "head_width", "mlp_width", "max_positions")
    sizes: dict[str, Any] = {name: getattr(found, name) for name in same}
    kv_heads = found.heads // 4 or found.heads
    return ModelConfig("llama", kv_heads=kv_heads, tied_embeddings=True, **sizes)


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
