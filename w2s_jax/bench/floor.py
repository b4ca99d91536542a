"""The floor of a search: the least time its matmuls and its bytes can take on this machine.

Counts follow from shapes alone; the two rates they are divided by are measured. Nothing is searched
here.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from w2s_jax.models.config import ModelConfig
from w2s_jax.search.config import SearchConfig

PHASES = ("prefill", "proposing", "scoring", "selecting")
DRIFT = 0.1
"""By more than this the rates before and after differ on a machine that is not steady."""


@dataclass(frozen=True)
class Work:
    """Matmul operations (a multiply and an add are two) and bytes that cannot be avoided."""

    operations: int | float = 0.0
    bytes: int | float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.operations + other.operations, self.bytes + other.bytes)


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second: matmul operations, and bytes moved to or from memory."""

    operations: float
    bytes: float

    def seconds(self, work: Work) -> float:
        """The larger of the work's operations and its bytes over their rates."""
        return max(work.operations / self.operations, work.bytes / self.bytes)


@dataclass(frozen=True)
class MeanRates(Rates):
    """The means of the rates before and after what was timed, since machines drift.

    drift: by what share the higher exceeds the lower, of the rate that differs more.
    steady: whether that is at most `DRIFT`.
    """

    before: Rates
    after: Rates
    drift: float
    steady: bool

    def __str__(self) -> str:
        told = (
            f"{self.operations / 1e9:.0f} GFLOP/s in matmuls and {self.bytes / 1e9:.1f} GB/s of "
            "memory, the means of before and after what was timed"
        )
        return told if self.steady else f"{told}; not steady: these differ by {self.drift:.0%}"


def mean_rates(before: Rates, after: Rates) -> MeanRates:
    """The means of two measurements, and how far these are apart."""
    pairs = ((before.operations, after.operations), (before.bytes, after.bytes))
    operations, moved = (sum(pair) / 2 for pair in pairs)
    drift = max(max(pair) / min(pair) for pair in pairs) - 1
    return MeanRates(operations, moved, before, after, drift, drift <= DRIFT)


def read_work(
    config: ModelConfig, size: int, *, rows: int, context: float, cached: int, scored: int
) -> Work:
    """One call that reads `rows` tokens, each behind `context` tokens, with `size` bytes a number.

    `cached` counts the cached tokens that must be read (those shared by rows once), `scored` the
    tokens whose logits are needed.
    """
    weights = config.matmul_parameters
    head = config.width * config.vocab_size if scored else 0
    attention = 4 * config.layers * config.heads * config.head_width * rows * context
    entry = 2 * config.layers * config.kv_heads * config.head_width
    return Work(
        2 * weights * rows + 2 * head * scored + attention,
        size * (weights + head + entry * (cached + rows)) + 4 * config.vocab_size * scored,
    )


def search_work(
    policy: ModelConfig,
    guides: tuple[ModelConfig, ...],
    config: SearchConfig,
    *,
    prompt_tokens: int,
    slots: int,
    size: int,
) -> dict[str, Work]:
    """The work of each phase of one batch: `slots` prompts through CBS with a log-ratio scorer."""
    width, rows, length = config.beam_width, config.rows, config.length
    prefix = prompt_tokens - 1
    work = dict.fromkeys(PHASES, Work())

    def read(
        phase: str, model: ModelConfig, tokens: int, context: float, cached: int, scored: bool
    ) -> None:
        """Add a call that reads so many tokens of every slot, behind `cached` others of it."""
        work[phase] += read_work(
            model,
            size,
            rows=slots * tokens,
            context=context,
            cached=slots * cached,
            scored=slots * tokens if scored else 0,
        )

    for model in (policy, *guides):
        read("prefill", model, prefix, prefix / 2, 0, scored=False)
    for committed in range(0, config.chunks * length, length):
        behind, start = prefix + width * committed, float(prefix + committed)
        read("proposing", policy, width, start, behind, scored=True)
        for step in range(1, length):
            written = behind + width + rows * (step - 1)
            read("proposing", policy, rows, start + step, written, scored=True)
        for guide in guides:
            tokens = width + rows * (length - 1)
            read("scoring", guide, tokens, start + length / 2, behind, scored=True)
        if committed + length < config.chunks * length:
            entries = sum(2 * m.layers * m.kv_heads * m.head_width for m in (policy, *guides))
            moved = slots * width * (committed + length)
            work["selecting"] += Work(0.0, 2 * size * entries * moved)
    return work


def measure_rates(
    dtype: DTypeLike, *, side: int | None = None, megabytes: int | None = None
) -> Rates:
    """Measure both rates: a side³ matmul in `dtype`, and the fastest way found to read an array.

    Bytes are read by a sum and by a product with a vector, as weights are; the faster one counts,
    since a floor must not be undercut. Sizes that are not given take a CPU a tenth of a second, and
    an accelerator a millisecond, which is many times what starting a program takes.
    """
    on_cpu = jax.default_backend() == "cpu"
    side = side or (2048 if on_cpu else 8192)
    megabytes = megabytes or (512 if on_cpu else 4096)
    # Of random numbers: a GPU multiplies ones and zeros faster.
    square = jax.jit(lambda key: jax.random.normal(key, (side, side), dtype))(jax.random.key(0))
    matmul = best_seconds(jax.jit(lambda a: a @ a), square)
    wide = jnp.ones((megabytes * 2**18 // side, side), jnp.float32)
    vector = jnp.ones((side, 8), jnp.float32)
    reads = (
        best_seconds(jax.jit(jnp.sum), wide),
        best_seconds(jax.jit(lambda a, v: a @ v[:, 0]), wide, vector),
        best_seconds(jax.jit(jnp.matmul), wide, vector),
    )
    return Rates(2 * side**3 / matmul, wide.nbytes / min(reads))


def best_seconds(run: Callable, *arguments: object, repeats: int = 5) -> float:
    """The least wall time of a call, compilation left out."""
    jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def timed_twice(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds of the first run, with compilation, and the median of so many further ones."""

    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return once(), statistics.median(once() for _ in range(repeats))
