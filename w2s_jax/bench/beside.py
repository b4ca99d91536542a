"""What transformers takes for the same work, in a process of its own (`peers.py`)."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from rich.console import Console

from w2s_jax.bench.config import DecodingConfig
from w2s_jax.bench.setup import PEERS, call, missing
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.config_json import config_to_hf
from w2s_jax.ops.logits import Sampling

SAMPLING = Sampling(0.7, 50, 1.0)
"""Of all that is measured."""
NO_TORCH = "install torch beside transformers, or name another interpreter by --torch-python"
NAMES = {"hf": "the same search in transformers", "generate": "transformers' generate of the rows"}


@dataclass(frozen=True)
class Side:
    """Seconds of all rows: the median, and what the first run took more; and peak memory."""

    seconds: float
    first_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Beside:
    """By name: the sides that were compared with, and why others were not.

    ratios: the sides' seconds over this package's.
    """

    sides: dict[str, Side]
    missing: dict[str, str]
    ratios: dict[str, float] = field(default_factory=dict)

    def over(self, seconds: float) -> "Beside":
        """The same beside this package's seconds."""
        return replace(self, ratios={k: one.seconds / seconds for k, one in self.sides.items()})


def prompts_of(config: ModelConfig, options: DecodingConfig) -> list[list[int]]:
    """Random prompts, the same for all sides."""
    size = (options.batch_size, options.prompt_tokens)
    return np.random.default_rng(0).integers(2, config.vocab_size, size).tolist()


def job_of(config: ModelConfig, options: DecodingConfig) -> dict[str, Any]:
    """What every program is told; on a GPU it runs where jax has one."""
    return {
        "prompts": prompts_of(config, options),
        "new_tokens": options.max_new_tokens,
        "temperature": SAMPLING.temperature,
        "top_k": SAMPLING.top_k,
        "dtype": options.dtype,
        "repeats": options.repeats,
        "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
    }


def generate_job(config: ModelConfig, samples: int) -> dict[str, Any]:
    """Plain sampling of so many rows for each prompt, from random weights of a shape."""
    return {"config": config_to_hf(config), "samples": samples}


def compare(
    config: ModelConfig, options: DecodingConfig, jobs: Mapping[Any, Mapping[str, Any]]
) -> Beside:
    """Run each of the jobs, told what `job_of` says as well."""
    found = Beside({}, {})
    python = options.torch_python or sys.executable
    for name, job in jobs.items():
        why = missing(python, "torch, transformers", NO_TORCH)
        if why is None:
            told, most = job_of(config, options) | dict(job), options.compare_seconds
            try:
                took = call(told, python, "-P", PEERS, seconds=most)
            except subprocess.TimeoutExpired:
                why = f"it took more than {most:g} seconds"
        if why is not None:
            found.missing[name] = why
            continue
        first, seconds = took["first_seconds"], took["seconds"]
        found.sides[name] = Side(seconds, first - seconds, took["peak_bytes"])
    return found


def report_beside(console: Console, found: Beside) -> None:
    """Print a line for each side."""
    for name, side in found.sides.items():
        console.print(
            f"{found.ratios[name]:.2f} times the throughput of {NAMES[name]}, which took "
            f"{side.seconds:.3g} s and {side.peak_bytes / 2**30:.2f} GiB"
        )
    for name, why in found.missing.items():
        console.print(f"{NAMES[name]} was not measured: {why}")


def beside_cells(found: Beside) -> dict[str, str]:
    """The ratios as entries of a table."""
    return {f"× {name}": f"{ratio:.2f}" for name, ratio in found.ratios.items()}
