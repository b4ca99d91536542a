"""The training loop: batches by step number, metrics to a file, checkpoints by the clock, resuming.

Holds no objective: the step and the batches are given.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from w2s_jax.train.checkpoint import Checkpoints
from w2s_jax.train.step import Batch, TrainState

StepFunction = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
BatchAt = Callable[[int], Batch]


def train(
    state: TrainState,
    step: StepFunction,
    batch_at: BatchAt,
    *,
    steps: int,
    directory: str | Path,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    evaluate_every: int = 0,
    log_every: int = 20,
    save_every_seconds: float = 60.0,
    name: str = "train",
) -> TrainState:
    """Run until `steps`, going on from the latest checkpoint under `directory` if there is one.

    `batch_at(i)` must depend on i alone: then the step number is the data position and a resumed
    run equals the uninterrupted one. `metrics.jsonl` gets one row every `log_every` steps, with
    the means since the row before and the seconds spent training over all runs, and one row per
    evaluation.
    """
    directory = Path(directory)
    checkpoints = Checkpoints(directory / "checkpoints")
    state = checkpoints.restore(state) or state
    first = int(state.step)
    log = directory / "metrics.jsonl"
    earlier = _keep_rows(log, first)
    started = saved = time.monotonic()
    pending: list[dict[str, Any]] = []
    bar = tqdm(total=steps, initial=first, desc=name, disable=not sys.stderr.isatty())
    with log.open("a") as out:

        def write(i: int, values: dict[str, float]) -> None:
            seconds = round(earlier + time.monotonic() - started, 2)
            out.write(json.dumps({"step": i, "seconds": seconds, **values}) + "\n")
            out.flush()

        for i in range(first, steps):
            state, metrics = step(state, batch_at(i))
            pending.append(metrics)
            bar.update()
            done = i + 1
            if done % log_every == 0 or done == steps:
                write(done, _means(pending))
                pending = []
            if evaluate is not None and (
                done == steps or (evaluate_every and done % evaluate_every == 0)
            ):
                write(done, {f"eval/{key}": value for key, value in evaluate(state).items()})
            if not pending and time.monotonic() - saved > save_every_seconds:
                checkpoints.save(state)
                saved = time.monotonic()
    bar.close()
    checkpoints.save(state)
    checkpoints.close()
    return state


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """The rows that `train` wrote."""
    log = Path(directory) / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    rows = jax.device_get(rows)
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def _keep_rows(log: Path, step: int) -> float:
    """Drop rows past the restored step and a half-written one; returns the seconds spent so far."""
    log.parent.mkdir(parents=True, exist_ok=True)
    kept: list[str] = []
    seconds = 0.0
    for line in log.read_text().splitlines() if log.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] > step:
            break
        kept.append(line)
        seconds = row["seconds"]
    log.write_text("".join(line + "\n" for line in kept))
    return seconds
