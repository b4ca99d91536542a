"""Measures plain decoding on random weights, and transformers' beside it on the same rows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from w2s_jax.bench.beside import (
    SAMPLING,
    Beside,
    Side,
    beside_cells,
    compare,
    generate_job,
    prompts_of,
    report_beside,
)
from w2s_jax.bench.config import GenerateBenchConfig
from w2s_jax.bench.curves import points, run_points
from w2s_jax.bench.floor import MeanRates, mean_rates, measure_rates, search_work, timed_twice
from w2s_jax.bench.setup import (
    MODEL_SIZES,
    check_positions,
    check_settings,
    model_shape,
    peak_bytes,
    random_model,
    reset_peak,
)
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.model import Model, for_decoding
from w2s_jax.search import search
from w2s_jax.search.config import SearchConfig, sample

LEAST = {
    "layers": 1, "vocab": 3, "batch_size": 1, "samples": 1, "prompt_tokens": 1, "repeats": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """This package, what was measured beside it, and the floor; seconds are of all rows."""

    own: Side
    tokens_per_second: float
    floor_seconds: float
    floor_share: float
    rates: MeanRates
    beside: Beside


def run(options: GenerateBenchConfig) -> list[Figures]:
    """Measure the point or those of the curve, print tables, and write what was asked for.

    Raises:
        InputError: For sizes out of range and for a path that cannot be written.
    """
    each = points(options).values()
    for point in each:
        check_settings(point, LEAST, MODEL_SIZES)
        check_positions(shape(point), point.prompt_tokens + settings(point).max_new_tokens)
    config = max(map(shape, each), key=lambda config: config.max_positions)

    @cache
    def model() -> Model:
        return for_decoding(random_model(config, 0, dtype=jnp.dtype(options.dtype)))

    return run_points(options, partial(measure, model), report, cells)


def shape(options: GenerateBenchConfig) -> ModelConfig:
    """The model's."""
    return model_shape(options, options.prompt_tokens + options.max_new_tokens)


def settings(options: GenerateBenchConfig) -> SearchConfig:
    """Plain sampling of the rows; no token ends one early."""
    return sample(
        options.samples,
        max_new_tokens=options.max_new_tokens,
        sampling=SAMPLING,
        slots=options.batch_size,
        eos_ids=(),
    )


def measure(make: Callable[[], Model], options: GenerateBenchConfig) -> Figures:
    """Time whole runs (the median of the repeats), behind transformers' own.

    The model is made behind them as well, so that memory need not hold both.
    """
    config, dtype = shape(options), jnp.dtype(options.dtype)
    job = generate_job(config, options.samples)
    found = compare(config, options, dict.fromkeys(options.compare, job))
    model = make()
    jax.clear_caches()
    before = measure_rates(dtype)
    reset_peak()
    whole = partial(search, model, None, prompts_of(config, options), settings(options))
    first, seconds = timed_twice(whole, options.repeats)
    own = Side(seconds, first - seconds, peak_bytes())
    rates = mean_rates(before, measure_rates(dtype))
    work = search_work(
        config,
        (),
        settings(options),
        prompt_tokens=options.prompt_tokens,
        slots=options.batch_size,
        size=dtype.itemsize,
    )
    floor = sum(rates.seconds(one) for one in work.values())
    tokens = options.batch_size * options.samples * options.max_new_tokens
    return Figures(own, tokens / seconds, floor, floor / seconds, rates, found.over(seconds))


def report(console: Console, options: GenerateBenchConfig, figures: Figures) -> None:
    """Print the figures as a table, a row for each side."""
    config = shape(options)
    console.print(
        f"plain decoding: {config.layers} × {config.width}, vocabulary {config.vocab_size}, "
        f"{options.dtype}; {options.batch_size} × {options.samples} rows of "
        f"{options.prompt_tokens} + {options.max_new_tokens} tokens"
    )
    table = Table("", "seconds", "tokens/s", "first run more", "peak GiB")
    for name, side in {"w2s": figures.own, **figures.beside.sides}.items():
        tokens = figures.tokens_per_second * figures.own.seconds / side.seconds
        table.add_row(
            name, f"{side.seconds:.2f}", f"{tokens:.0f}", f"{side.first_seconds:.1f}",
            f"{side.peak_bytes / 2**30:.2f}",
        )  # fmt: skip
    console.print(table)
    report_beside(console, figures.beside)
    console.print(f"share of the floor {figures.floor_share:.0%}, at {figures.rates}")


def cells(figures: Figures) -> dict[str, str]:
    """A row of the table of a curve."""
    return {
        "tokens/s": f"{figures.tokens_per_second:.0f}",
        "floor": f"{figures.floor_share:.0%}",
        "compile": f"{figures.own.first_seconds:.1f}",
        "GiB": f"{figures.own.peak_bytes / 2**30:.2f}",
        **beside_cells(figures.beside),
        "drift": f"{figures.rates.drift:.0%}",
    }
