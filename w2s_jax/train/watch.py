"""What a run reports while it trains: running means, speed, and where they are sent.

Metrics and samples are files of JSON lines, truncated to the step from which a run resumes.
"""

import contextlib
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from w2s_jax.errors import InputError, check_fetched
from w2s_jax.text.rows import Row, json_line, write_whole
from w2s_jax.train.losses import Mean

Values = dict[str, Any]


@dataclass(frozen=True)
class Writer:
    """Where metrics by step are shown.

    Attributes:
        write: Takes a step and its values.
        close: Called after the last write.
    """

    write: Callable[[int, Values], None]
    close: Callable[[], None]


Sink = Callable[[Path, int], Writer]
"""(run's directory, step from which it resumes) -> a writer; values of later steps are void."""


class Meter:
    """Means since the last row, tokens and seconds over all runs, and the speed of this run.

    Args:
        saved: Values of `Meter.saved` to resume from.
        flops_per_token: FLOPs of one token, forward and backward; with `peak` gives MFU.
        peak: FLOP/s of all devices together.
    """

    def __init__(
        self,
        saved: Mapping[str, Any] | None = None,
        *,
        flops_per_token: float | int | None = None,
        peak: float | int | None = None,
    ):
        saved = saved or {}
        self._sums: dict[str, list[float]] = dict(saved.get("sums", {}))
        self._counts: dict[str, list[float]] = dict(saved.get("counts", {}))
        self._tokens = int(saved.get("num_tokens", 0))
        self._earlier = float(saved.get("seconds", 0.0))
        self._rate = (flops_per_token / peak) if flops_per_token and peak else None
        self._started = time.monotonic()
        self._since: float | None = None  # None until the first step, which compiles, is over
        self._fresh = 0
        self._counted = "num_tokens" in saved

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Add the metrics of one step; a value that is not finite is left out.

        Steps have equal weight, except in a `losses.Mean`, which has its own counts.
        """
        tokens = 0
        for name, value in metrics.items():
            if name == "num_tokens":
                tokens, self._counted = int(value), True
                continue
            mean = value if isinstance(value, Mean) else Mean(value, 1.0)
            parts = [np.ravel(part).astype(float) for part in mean]
            if not all(np.isfinite(part).all() for part in parts):
                continue
            for kept, part in zip((self._sums, self._counts), parts, strict=True):
                kept[name] = (part + kept.get(name, 0.0)).tolist()
        self._tokens += tokens
        if self._since is None:
            self._since = time.monotonic()
        else:
            self._fresh += tokens

    def row(self) -> Values:
        """Means since the last row, `seconds` and `num_tokens` so far, and the speed."""
        values: Values = {"seconds": round(self.seconds(), 2)}
        if self._counted:
            values["num_tokens"] = self._tokens
        for name, totals in self._sums.items():
            if all(self._counts[name]):
                pairs = zip(totals, self._counts[name], strict=True)
                values[name] = sum(total / count for total, count in pairs)
        now = time.monotonic()
        if self._fresh and self._since is not None and now > self._since:
            speed = self._fresh / (now - self._since)
            values["tokens_per_second"] = round(speed, 1)
            if self._rate is not None:
                values["mfu"] = round(speed * self._rate, 4)
        self._sums, self._counts = {}, {}
        if self._since is not None:
            self._since, self._fresh = now, 0
        return values

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A block (evaluation, samples) whose time does not count in the speed."""
        began = time.monotonic()
        try:
            yield
        finally:
            if self._since is not None:
                self._since += time.monotonic() - began

    def seconds(self) -> float:
        """Seconds over all runs."""
        return self._earlier + time.monotonic() - self._started

    def saved(self) -> Values:
        """JSON values from which a Meter resumes to the same bits."""
        kept: Values = {"sums": self._sums, "counts": self._counts, "seconds": self.seconds()}
        return {**kept, "num_tokens": self._tokens} if self._counted else kept


PEAKS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5p": 459e12,
    "TPU v5": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12, "TPU7x": 2307e12,
    "A100": 312e12, "A10G": 70e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12,
    "GH200": 989e12, "B200": 2250e12, "GB200": 2450e12, "L4": 121e12, "L40S": 362e12,
    "RTX 4090": 165e12, "V100": 125e12,
}  # fmt: skip
"""Dense bfloat16 FLOP/s of one device, from the makers' data sheets (V100: float16). The keys are
searched for in jax's `device_kind`, the longest first."""


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a kind of device; None if it is unknown (CPUs).

    Source: the data sheets of Google Cloud TPU and of NVIDIA, without sparsity.
    """
    for name in sorted(PEAKS, key=len, reverse=True):
        place = device_kind.find(name)
        after = device_kind[place + len(name) :][:1]
        if place >= 0 and not after.isalnum():
            return PEAKS[name]
    return None


_EXTRAS = {"tensorboardX": ("TensorBoard", "tensorboard"), "wandb": ("W&B", "wandb")}


def check_installed(module: str) -> None:
    """Raise InputError if `module`, tensorboardX or wandb, is not installed."""
    try:
        importlib.import_module(module)
    except ImportError:
        what, extra = _EXTRAS[module]
        raise InputError(f"{what} needs {module}; pip install 'w2s-jax[{extra}]'") from None


def tensorboard(directory: Path, step: int) -> Writer:
    """A Sink: event files in `directory`/tensorboard (extra `tensorboard`).

    Raises:
        InputError: If tensorboardX is not installed.
    """
    check_installed("tensorboardX")
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1 if step else None)

    def write(step: int, values: Values) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Writer(write, writer.close)


def wandb(
    project: str = "w2s_jax", *, name: str | None = None, config: Mapping[str, Any] | None = None
) -> Sink:
    """A Sink to Weights & Biases (extra `wandb`); WANDB_MODE=offline needs no network.

    The W&B run's id is kept in the directory, so that a resumed run is one run there too. Values
    are plotted over `step`; steps that were done twice appear twice.

    Raises:
        InputError: When it is opened, if wandb is not installed.
    """

    def sink(directory: Path, step: int) -> Writer:
        check_installed("wandb")
        import wandb as library

        kept = directory / "wandb_id.txt"
        known = kept.read_text().strip() if step and kept.is_file() else None
        run = library.init(
            project=project, name=name or directory.name, id=known, config=dict(config or {}),
            dir=str(directory), resume="allow" if known else None,
        )  # fmt: skip
        kept.write_text(run.id)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

        return Writer(lambda step, values: run.log({"step": step, **values}), run.finish)

    return sink


METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
MESH = "mesh.txt"
"""File in a run's folder with the mesh of its last run, in words."""


class RowFile:
    """A file of rows that grows; a row has been handed to the system when `write` returns."""

    def __init__(self, path: Path):
        self.path = path
        self._file: IO[bytes] = path.open("ab")

    def write(self, row: Row) -> None:
        """Add one row."""
        self._file.write(json_line(row))
        self._file.flush()

    def sync(self) -> None:
        """Return when every row is on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cut_back(path: Path, keep: Callable[[Row], bool]) -> list[Row]:
    """Truncate a file of rows before the first row that is torn or that `keep` refuses.

    The file is rewritten atomically; a missing one becomes an empty one.

    Returns:
        The rows that are kept.
    """
    kept = []
    for row in read_records(path):
        if not keep(row):
            break
        kept.append(row)
    write_whole(path, [json_line(row) for row in kept])
    return kept


def read_records(path: Path) -> list[Row]:
    """The rows of a file before the first torn one; none if there is no file."""
    check_fetched(path)
    rows: list[Row] = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, TypeError, KeyError):
            break
        rows.append(row)
    return rows


def read_metrics(directory: str | Path) -> list[Row]:
    """The rows of a run's metrics.jsonl; none if it has not started."""
    return read_records(Path(directory) / METRICS)


def mesh_before(directory: Path) -> str | None:
    """The mesh of the last run in a training run's folder, in words; None if unknown."""
    try:
        return (directory / MESH).read_text(errors="replace").strip()
    except OSError:
        return None
