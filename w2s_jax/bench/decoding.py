"""Measures plain decoding on random weights, and that of transformers beside it on the same rows.

transformers runs in a process of its own (`peers.py`), first, so that its memory is
free again when this package's models are made.
"""

import sys
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from w2s_jax.bench.floor import measure_rates, search_work, timed_twice
from w2s_jax.bench.setup import PEERS, call, missing, random_model
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.config_json import config_to_hf
from w2s_jax.models.model import for_decoding
from w2s_jax.ops.logits import Sampling
from w2s_jax.search import search
from w2s_jax.search.config import SearchConfig, sample

NO_TRANSFORMERS = "install torch beside transformers, or name another interpreter"
SAMPLING = Sampling(0.7, 50, 1.0)


@dataclass(frozen=True)
class Options:
    """What is decoded: `samples` responses of `new_tokens` tokens to each of `prompts` prompts.

    python: the interpreter that has torch and transformers. seconds: what transformers may take.
    """

    prompts: int = 4
    samples: int = 16
    prompt_tokens: int = 512
    new_tokens: int = 50
    dtype: str = "bfloat16"
    repeats: int = 3
    python: str = sys.executable
    seconds: float | None = None


@dataclass(frozen=True)
class Side:
    """Seconds of all rows: the median, and what the first run took more than that."""

    seconds: float
    tokens_per_second: float
    first_seconds: float


@dataclass(frozen=True)
class Figures:
    """This package, transformers where it could run, and the floor; seconds are of all rows."""

    own: Side
    transformers: Side | None
    no_transformers: str | None
    floor_seconds: float
    throughput: float | None


def run(config: ModelConfig, options: Options) -> Figures:
    """Measure plain decoding of a shape and print a table."""
    theirs, why = transformers_seconds(config, options)
    own = own_seconds(config, options)
    rates = measure_rates(jnp.dtype(options.dtype))
    work = search_work(
        config,
        (),
        settings(options),
        prompt_tokens=options.prompt_tokens,
        slots=options.prompts,
        size=jnp.dtype(options.dtype).itemsize,
    )
    figures = Figures(
        own=own,
        transformers=theirs,
        no_transformers=why,
        floor_seconds=sum(rates.seconds(one) for one in work.values()),
        throughput=None if theirs is None else theirs.seconds / own.seconds,
    )
    report(Console(), config, options, figures)
    return figures


def settings(options: Options) -> SearchConfig:
    """Plain sampling of the rows; no token ends one early."""
    return sample(
        options.samples,
        max_new_tokens=options.new_tokens,
        sampling=SAMPLING,
        slots=options.prompts,
        eos_ids=(),
    )


def prompts_of(config: ModelConfig, options: Options) -> list[list[int]]:
    """Random prompts, the same for both."""
    size = (options.prompts, options.prompt_tokens)
    return np.random.default_rng(0).integers(2, config.vocab_size, size).tolist()


def own_seconds(config: ModelConfig, options: Options) -> Side:
    """What this package takes."""
    model = for_decoding(random_model(config, 0, dtype=options.dtype))
    whole = partial(search, model, None, prompts_of(config, options), settings(options))
    return _side(options, *timed_twice(whole, options.repeats))


def transformers_seconds(config: ModelConfig, options: Options) -> tuple[Side | None, str | None]:
    """What transformers takes, on a GPU where jax has one; or why it was not measured."""
    why = missing(options.python, "torch, transformers", NO_TRANSFORMERS)
    if why is not None:
        return None, why
    job = asdict(options) | {
        "config": config_to_hf(config),
        "prompts": prompts_of(config, options),
        "temperature": SAMPLING.temperature,
        "top_k": SAMPLING.top_k,
        "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
    }
    took = call(job, options.python, "-P", PEERS, seconds=options.seconds)
    return _side(options, took["first_seconds"], took["seconds"]), None


def _side(options: Options, first: float, seconds: float) -> Side:
    tokens = options.prompts * options.samples * options.new_tokens
    return Side(seconds, tokens / seconds, first - seconds)


def report(console: Console, config: ModelConfig, options: Options, figures: Figures) -> None:
    """Print the figures as a table, a row for each."""
    console.print(
        f"plain decoding: {config.layers} × {config.width}, vocabulary {config.vocab_size}, "
        f"{options.dtype}; {options.prompts} × {options.samples} rows of {options.prompt_tokens} + "
        f"{options.new_tokens} tokens"
    )
    table = Table("", "seconds", "tokens/s", "first run more")
    rows: dict[str, Any] = {"w2s": figures.own, "transformers": figures.transformers}
    for name, side in rows.items():
        if side is not None:
            more = f"{side.first_seconds:.1f}"
            table.add_row(name, f"{side.seconds:.2f}", f"{side.tokens_per_second:.0f}", more)
    console.print(table)
    line = f"share of the floor {figures.floor_seconds / figures.own.seconds:.0%}"
    if figures.throughput is not None:
        line += f"; {figures.throughput:.2f} times transformers' throughput"
    console.print(line)
    if figures.no_transformers is not None:
        console.print(f"transformers was not measured: {figures.no_transformers}")
