"""The training loop: batches by step number, metrics to a file, checkpoints, resuming, stopping.

It knows no objective: the step and the batches are arguments. A run that is killed at any moment
and started again gives the same bits as one that was not.

metrics.jsonl has a row every `log_every` steps with the means since the row before, `seconds` and
`num_tokens` over all runs, `tokens_per_second` and, on a device whose peak is known, `mfu`; and a
row per evaluation, its names under "eval/". Samples go to samples.jsonl.
"""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from w2s_jax.distributed import gather_values, is_first, started
from w2s_jax.errors import Diverged, InputError, Preempted, RowsFailed
from w2s_jax.text.rows import locked
from w2s_jax.train.checkpoint import Checkpoints
from w2s_jax.train.config import LoopConfig
from w2s_jax.train.step import Batch, TrainState
from w2s_jax.train.watch import (
    METRICS,
    SAMPLES,
    Meter,
    RowFile,
    Sink,
    Values,
    Writer,
    cut_back,
    peak_flops,
)
from w2s_jax.train.watch import read_metrics as read_metrics

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in a run's folder."""


class Interrupted(BaseException):
    """Raised by a signal inside `Stop.interruptible`; no `except Exception` catches it."""


class Stop:
    """Inside its `with` block SIGTERM and SIGINT set `asked`; a second SIGINT interrupts at once.

    Has no effect outside the main thread, where Python allows no signal handlers.
    """

    def __init__(self) -> None:
        self.asked = False
        self._interruptible = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that changes no state: a signal before or in it ends it with Interrupted."""
        self._interruptible = True
        try:
            if self.asked:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.asked
        self.asked = True
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._interruptible:
            self._interruptible = False
            raise Interrupted


StepFunction = Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Any]]]
"""(state, frozen, batch) -> (state, metrics); the state is donated."""


def train(
    state: TrainState,
    step: StepFunction,
    batches: Callable[[int], Batch],
    steps: int,
    *,
    config: LoopConfig,
    directory: str | Path,
    frozen: Any = None,
    identity: Mapping[str, Any] | None = None,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    sample: Callable[[TrainState], Sequence[Mapping[str, Any]]] | None = None,
    names: Callable[[int], Sequence[str]] | None = None,
    schedule: Callable[[int], Any] | None = None,
    sinks: Sequence[Sink] = (),
    put: Callable[[Batch], Any] | None = None,
    flops_per_token: float | int | None = None,
) -> TrainState:
    """Train until `steps` steps are done, resuming from the newest sound checkpoint in `directory`.

    Args:
        state: The state at step 0. Its arrays are deleted.
        step: One training step.
        batches: Batch by step number from 0, on which alone it may depend.
        steps: Steps in total, including those of earlier runs.
        config: How often to log, evaluate, sample and save.
        directory: The run's folder.
        frozen: What `step` reads besides the state; never saved.
        identity: JSON values that a resumed run must share; see FREE and FILES in checkpoint.py.
        evaluate: Measures a state.
        sample: Rows sampled from a state.
        names: Names of a batch's rows by step number, for error messages.
        schedule: Learning rate by step number, for the log alone.
        sinks: Where rows of metrics are shown as well.
        put: Moves a batch to the devices.
        flops_per_token: FLOPs of one token, forward and backward, for `mfu`.

    Raises:
        Preempted: After SIGTERM or SIGINT, once the state is saved.
        Diverged: If the loss or the gradient's norm is not finite; nothing is saved after that.
        InputError, OSError: If no checkpoint is sound or of this run; if one cannot be written.
    """
    directory = Path(directory)
    with ExitStack() as stack:
        if is_first():
            stack.enter_context(locked(directory / METRICS))
        stop = Stop() if started() else stack.enter_context(Stop())
        checkpoints = Checkpoints(
            directory / CHECKPOINTS,
            keep_last=config.keep_last,
            keep_best=config.keep_best is not None,
        )
        stack.callback(_close_quietly, checkpoints)
        saved = checkpoints.restore(state, identity or {})
        state, values = saved or (state, {})
        if int(state.step) > steps:
            raise InputError(
                f"{directory}: step {int(state.step)} is saved, beyond the {steps} steps "
                "that are asked for; ask for more, or name another directory to start anew"
            )
        run = _Run(
            config=config, steps=steps, directory=directory, checkpoints=checkpoints, stop=stop,
            values=values, first=int(state.step), identity=dict(identity or {}), evaluate=evaluate,
            sample=sample, names=names, schedule=schedule, sinks=sinks,
            flops_per_token=flops_per_token,
        )  # fmt: skip
        stack.callback(run.close)
        state = run.go(state, step, batches, frozen, put or (lambda batch: batch))
        checkpoints.close()
    return state


@dataclass(kw_only=True)
class _Run:
    """One call of `train` after its restore: what it has reported, and what it has yet to save."""

    config: LoopConfig
    steps: int
    directory: Path
    checkpoints: Checkpoints
    stop: Stop
    values: Values
    first: int
    identity: Values
    evaluate: Callable[[TrainState], Mapping[str, float]] | None
    sample: Callable[[TrainState], Sequence[Mapping[str, Any]]] | None
    names: Callable[[int], Sequence[str]] | None
    schedule: Callable[[int], Any] | None
    sinks: Sequence[Sink]
    flops_per_token: float | int | None

    def __post_init__(self) -> None:
        self.due = bool(self.values.get("due"))
        self.where = self.directory / CHECKPOINTS
        peak = peak_flops(jax.devices()[0].device_kind)
        self.meter = Meter(
            self.values.get("meter"),
            flops_per_token=self.flops_per_token,
            peak=peak and peak * jax.device_count(),
        )
        self.saved_at = time.monotonic()
        self.pending: tuple[int, dict[str, Any]] | None = None
        self.files: dict[str, RowFile] = {}
        self.writers: list[Writer] = []
        if is_first():
            self._open()
        quiet = not is_first() or not sys.stderr.isatty()
        name = self.directory.name
        self.bar = tqdm(total=self.steps, initial=self.first, desc=name, disable=quiet)

    def _open(self) -> None:
        """Open the files of rows, truncated to the step from which the run resumes."""

        def keep(row: Values) -> bool:
            if row["step"] == self.first and self.due:
                return not any(name.startswith("eval/") for name in row)
            return row["step"] <= self.first

        kept: dict[str, Callable[[Values], bool]] = {METRICS: keep}
        if self.sample is not None:
            kept[SAMPLES] = lambda row: row["step"] < self.first + (not self.due)
        for name, test in kept.items():
            cut_back(self.directory / name, test)
            self.files[name] = RowFile(self.directory / name)
        self.writers = [sink(self.directory, self.first) for sink in self.sinks]

    def go(
        self,
        state: TrainState,
        step: StepFunction,
        batches: Callable[[int], Batch],
        frozen: Any,
        put: Callable[[Batch], Any],
    ) -> TrainState:
        """Run the remaining steps; metrics are read one step late, so that no device waits."""
        if self.due:
            score = self._look(self.first, state)
            if score is not None:
                self.checkpoints.set_score(self.first, score)
        for i in range(self.first, self.steps):
            state, metrics = step(state, frozen, put(batches(i)))
            self._settle()
            self.pending = (i, metrics)
            self.checkpoints.check()
            done = i + 1
            looking = self._evaluates(done) or self._samples(done)
            stopping, saving = self._asked(done), self._saves(done)
            if not (stopping or looking or saving):
                continue
            self._settle()
            if stopping:
                self._stop(done, state, due=looking)
            score = self._look(done, state) if looking else None
            best = self.checkpoints.best_score()
            if saving or (score is not None and (best is None or score > best)):
                self._save(done, state, score)
        return state

    def _settle(self) -> None:
        """Read and log the metrics of the step before; raises Diverged."""
        if self.pending is None:
            return
        (i, metrics), self.pending = self.pending, None
        metrics = jax.device_get(metrics)
        for name in ("loss", "grad_norm"):
            if name in metrics and not np.isfinite(metrics[name]).all():
                raise self._diverged(i, f"{name} is {float(metrics[name])}")
        self.meter.add(metrics)
        self.bar.update()
        done = i + 1
        if done % self.config.log_every == 0 or done == self.steps:
            values = self.meter.row()
            if self.schedule is not None:
                values["learning_rate"] = float(self.schedule(i))
            self._tell(done, values)
            shown = {k: values[k] for k in ("loss", "tokens_per_second") if k in values}
            self.bar.set_postfix(shown)

    def _tell(self, done: int, values: Values) -> None:
        """Write a row; the mean of nothing is NaN, which JSON lacks, and is written as null."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if METRICS in self.files:
            nulls = dict.fromkeys(values.keys() - finite.keys())
            self.files[METRICS].write({"step": done, **values, **nulls})
        for writer in self.writers:
            writer.write(done, finite)

    def _evaluates(self, done: int) -> bool:
        return self.evaluate is not None and self._falls(done, self.config.eval_every)

    def _samples(self, done: int) -> bool:
        every = self.config.sample_every
        return self.sample is not None and every > 0 and self._falls(done, every)

    def _saves(self, done: int) -> bool:
        if self._falls(done, self.config.save_every):
            return True
        if self.config.save_seconds is None:
            return False
        if started() and done % self.config.log_every:
            return False  # hosts must agree on this, and an exchange at every step takes time
        return gather_values(time.monotonic() - self.saved_at > self.config.save_seconds)[0]

    def _falls(self, done: int, every: int) -> bool:
        """Whether something is due that is done every so many steps, and after the last one."""
        return done == self.steps or (every > 0 and done % every == 0)

    def _look(self, done: int, state: TrainState) -> float | None:
        """Evaluate and sample as due after a step; returns the score for `keep_best`."""
        score = None
        self.due = True
        try:
            with self.meter.paused():
                if self.evaluate is not None and self._evaluates(done):
                    with self.stop.interruptible():
                        measured = self._measured(done, state)
                    values = {f"eval/{name}": float(value) for name, value in measured.items()}
                    self._tell(done, {"seconds": round(self.meter.seconds(), 2), **values})
                    score = self._score(values)
                if self.sample is not None and self._samples(done):
                    with self.stop.interruptible():
                        drawn = self._drawn(done, state)
                    for row in drawn if SAMPLES in self.files else ():
                        self.files[SAMPLES].write({"step": done, **row})
        except Interrupted:
            self._stop(done, state, due=True)
        self.due = False
        return score

    def _measured(self, done: int, state: TrainState) -> Mapping[str, float]:
        assert self.evaluate is not None
        try:
            return self.evaluate(state)
        except FloatingPointError as error:
            raise self._diverged(done - 1, str(error), by_batch=False) from None

    def _drawn(self, done: int, state: TrainState) -> Sequence[Mapping[str, Any]]:
        assert self.sample is not None
        try:
            return self.sample(state)
        except RowsFailed as failed:
            raise self._diverged(done - 1, f"samples: {failed}") from None

    def _score(self, values: Values) -> float | None:
        if self.config.keep_best is None:
            return None
        name = self.config.keep_best.removeprefix("-")
        if name not in values:
            raise InputError(
                f"keep_best {name!r} is no metric of the evaluation; there are {', '.join(values)}"
            )
        value = values[name]
        if not math.isfinite(value):
            return None
        lower = self.config.keep_best.startswith("-") or name.endswith("loss")
        return -value if lower else value

    def _stop(self, done: int, state: TrainState, *, due: bool) -> None:
        """Save and end the run. `due`: the run that resumes has yet to evaluate or sample."""
        self.due = due
        self._save(done, state, None)
        self.checkpoints.wait()
        raise Preempted(done)

    def _save(self, done: int, state: TrainState, score: float | None) -> None:
        if not bool(_is_finite(state)):
            raise self._diverged(done - 1, "a parameter is not finite after the update")
        for file in self.files.values():
            file.sync()
        values = {"identity": self.identity, "meter": self.meter.saved(), "due": self.due}
        self.checkpoints.save(state, values, score)
        self.saved_at = time.monotonic()

    def _diverged(self, i: int, what: str, *, by_batch: bool = True) -> Diverged:
        _close_quietly(self.checkpoints)  # lets a running save of a good state end
        rows = tuple(self.names(i)) if self.names is not None and by_batch else ()
        return Diverged(i + 1, what, rows, self.checkpoints.latest, str(self.where))

    def _asked(self, done: int) -> bool:
        if started():
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(done)
        return self.stop.asked

    def close(self) -> None:
        """Close files, progress bar and sinks."""
        self.bar.close()
        closing = [one.close for one in self.writers] + [one.close for one in self.files.values()]
        for close in closing:
            close()


@jax.jit
def _is_finite(state: TrainState) -> jax.Array:
    """Whether all parameters are finite and no optimizer state is NaN."""

    def floats(tree: Any) -> list[jax.Array]:
        return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]

    checks = [jnp.isfinite(x).all() for x in floats(state.params)]
    checks += [~jnp.isnan(x).any() for x in floats(state.optimizer)]
    return jnp.stack(checks).all() if checks else jnp.bool_(True)


def _close_quietly(checkpoints: Checkpoints) -> None:
    """End a running save, and drop its error: another error, or none, is being reported."""
    with suppress(OSError):
        checkpoints.close()
