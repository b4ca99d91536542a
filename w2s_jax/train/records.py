"""Files of JSON lines that a run writes row by row, each row with the step it belongs to.

Cut back, when a run goes on, to the step it goes on from. What the rows say is the loop's matter.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from w2s_jax.errors import check_fetched
from w2s_jax.text.rows import Row, json_line, write_whole

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
MESH = "mesh.txt"
"""Where a run's folder says, in words, on which mesh it last ran."""


class RowFile:
    """A file of rows that grows; every row is with the system when `write` returns."""

    def __init__(self, path: Path):
        self.path = path
        self._file: IO[bytes] = path.open("ab")

    def write(self, row: Row) -> None:
        """Add one row."""
        self._file.write(json_line(row))
        self._file.flush()

    def sync(self) -> None:
        """Return when every row is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def cut_back(path: Path, keep: Callable[[Row], bool]) -> list[Row]:
    """Keep the rows up to the first that is torn or that `keep` refuses; returns them.

    The file is written anew, whole or not at all; without one it begins empty.
    """
    kept = []
    for row in read_records(path):
        if not keep(row):
            break
        kept.append(row)
    write_whole(path, [json_line(row) for row in kept])
    return kept


def read_records(path: Path) -> list[Row]:
    """The rows of a file up to the first that is torn; none where there is no file."""
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
    """The rows of a run's metrics.jsonl; none where it has not begun."""
    return read_records(Path(directory) / METRICS)


def mesh_before(directory: Path) -> str | None:
    """The mesh that a training run's folder had last, in words; None where it does not say."""
    try:
        return (directory / MESH).read_text(errors="replace").strip()
    except OSError:
        return None
