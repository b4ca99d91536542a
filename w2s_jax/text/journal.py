"""The journal of a long job: finished rows on disk at once, whatever happens next.

A file of JSON lines. The first holds the job's fingerprint (its inputs and settings), each other
one a row under its id. Of several hosts each writes its share of the rows, and one the output; no
file system need be shared.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2s_jax.distributed import gather_values, is_first, own_number
from w2s_jax.errors import InputError, check_fetched
from w2s_jax.text.rows import Row, check_writable, json_line, sync_folder, write_jsonl

HEADER = "w2s_journal"


@dataclass(frozen=True)
class Journal:
    """A journal in a sound state; made by `open_journal`. One process writes it at a time."""

    path: Path
    fingerprint: dict[str, Any]

    def append(self, row_id: int, row: Mapping[str, Any]) -> None:
        """Add a finished row; it is on the disk when this returns. The first one makes the file."""
        with self.path.open("ab") as file:
            new = file.tell() == 0
            header = json_line({HEADER: 1, "fingerprint": self.fingerprint}) if new else b""
            file.write(header + json_line({"row_id": row_id, "row": row}))
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_folder(self.path.parent)

    def read(self) -> dict[int, Row]:
        """The finished rows by id, without a half-written last line.

        Raises InputError for a line that is damaged anywhere else.
        """
        return _read(self.path)[1] if self.path.exists() else {}

    def is_own(self, row_id: int) -> bool:
        """Whether a row is this process's to write: every one, on one host."""
        return True

    def merge(
        self,
        output: str | Path,
        count: int,
        write: Callable[[str | Path, Iterable[Row]], None] = write_jsonl,
    ) -> None:
        """Write the rows 0 to count − 1 to `output`, in this order, then remove the journal.

        A kill in between leaves the journal, and merging it again gives the same file. Raises
        InputError, and writes nothing, where rows are missing.
        """
        rows = self.read()
        check_whole(self.path, rows, count)
        write(output, (rows[row_id] for row_id in range(count)))
        self.path.unlink(missing_ok=True)


def check_whole(path: Path, rows: Mapping[int, Row], count: int) -> None:
    """Raise InputError where one of the rows 0 to count − 1 is missing."""
    missing = [row_id for row_id in range(count) if row_id not in rows]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {count} rows are missing, first {missing[0]}; run again, "
            "one process at a time"
        )


def told_kept(path: Path) -> str:
    """Where the rows of a job are that could not be ended, to be put behind the reason."""
    return f"; what was found for the others is kept in {path}" if path.exists() else ""


def journal_path(output: str | Path) -> Path:
    """Where the journal of a job lies: beside its output, as OUTPUT.journal."""
    return Path(f"{output}.journal")


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Keep other runs off the journal at `path` while the block runs.

    The lock ends with the process, however it ends. Raises InputError where another run holds it,
    and where no file can be made there.
    """
    path = Path(path)
    check_writable(path)
    # A file that is reached by a link is the same.
    real = path.resolve()
    lock = real.with_name(f".{real.name}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{path}: another run is writing this output; wait for it, or name another"
            ) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def open_journal(path: str | Path, fingerprint: Mapping[str, Any]) -> Journal:
    """The journal of a job, with the rows of an earlier run if there are any.

    A half-written last line is cut away. `fingerprint` tells jobs apart: JSON values by name.
    Raises InputError where the journal holds rows of a job with another fingerprint (saying what
    differs), is damaged or cannot be written.
    """
    path = Path(path)
    check_writable(path)
    wanted = json.loads(json.dumps(fingerprint))
    if path.exists():
        found, rows, end = _read(path)
        if rows and found != wanted:
            raise InputError(
                f"{path}: holds {len(rows)} finished rows of a run with other settings "
                f"({_differences(found, wanted)}); go on with those, or delete it to start anew"
            )
        if not rows:
            if not _begins_as_journal(path):
                raise InputError(f"{path}: not a journal; move the file away to start anew")
            path.unlink()
        elif end < path.stat().st_size:
            _truncate(path, end)
    return Journal(path, wanted)


def _read(path: Path) -> tuple[dict[str, Any] | None, dict[int, Row], int]:
    """(fingerprint, None without a whole header; rows by id; bytes to the end of the last row)."""
    check_fetched(path)
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    fingerprint: dict[str, Any] | None = None
    rows: dict[int, Row] = {}
    end = 0
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("cut short")
            entry = json.loads(line)
            if number == 1:
                if entry[HEADER] != 1:
                    raise ValueError(f"version {entry[HEADER]}")
                fingerprint = dict(entry["fingerprint"])
            else:
                rows[int(entry["row_id"])] = dict(entry["row"])
        except (ValueError, TypeError, KeyError):
            last = number == len(lines)
            if last and (number > 1 or not line.endswith(b"\n")):
                break
            raise InputError(
                f"{path} line {number}: not a line of a journal; move the file away to start anew"
            ) from None
        end += len(line)
    return fingerprint, rows, end


def _begins_as_journal(path: Path) -> bool:
    """Whether a file is empty or holds the beginning, at least, of a journal's first line."""
    start = f'{{"{HEADER}"'.encode()
    with path.open("rb") as file:
        held = file.read(len(start))
    return start.startswith(held)


def _truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)
        file.flush()
        os.fsync(file.fileno())


def _differences(found: dict[str, Any] | None, wanted: dict[str, Any]) -> str:
    found = found or {}
    names = sorted({*found, *wanted})
    return ", ".join(
        f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} here"
        for name in names
        if found.get(name) != wanted.get(name)
    )


@dataclass(frozen=True)
class HostJournal:
    """What `Journal` is on one host. `own` is this host's, `others` are those of earlier runs.

    Row i is the share of host i modulo their number. But for `append`, all hosts call each method.
    """

    own: Journal
    others: tuple[Journal, ...]
    host: int
    count: int

    @property
    def path(self) -> Path:
        """Where this host's rows go."""
        return self.own.path

    def is_own(self, row_id: int) -> bool:
        """Whether a row is this host's to write."""
        return row_id % self.count == self.host

    def append(self, row_id: int, row: Mapping[str, Any]) -> None:
        """Add a finished row of this host's; it is on the disk when this returns."""
        self.own.append(row_id, row)

    def read(self) -> dict[int, Row]:
        """The finished rows of all hosts by id."""
        rows: dict[int, Row] = {}
        for journal in (*self.others, self.own):
            rows |= journal.read()
        found: dict[int, Row] = {}
        for part in gather_values(list(rows.items())):
            found |= {int(row_id): row for row_id, row in part}
        return dict(sorted(found.items()))

    def merge(
        self,
        output: str | Path,
        count: int,
        write: Callable[[str | Path, Iterable[Row]], None] = write_jsonl,
    ) -> None:
        """As `Journal.merge`: the first host writes, then every host removes its journals."""
        rows = self.read()
        check_whole(self.path, rows, count)
        if is_first():
            write(output, (rows[row_id] for row_id in range(count)))
        gather_values(None)  # the output is there before a journal goes
        for journal in (*self.others, self.own):
            journal.path.unlink(missing_ok=True)


def host_journal_path(output: str | Path, host: int) -> Path:
    """Where a host's journal lies: OUTPUT.journal for the first, OUTPUT.host1.journal and so on."""
    return journal_path(output) if host == 0 else journal_path(f"{output}.host{host}")


@contextlib.contextmanager
def job_journal(
    output: str | Path, fingerprint: Mapping[str, Any]
) -> Iterator[Journal | HostJournal]:
    """The journal beside `output` that this process is to write, held while the block runs.

    On several hosts each has one of its own. Those that an earlier run left here with another
    number of hosts are taken up too. Raises InputError as `held` and `open_journal` do.
    """
    host, count = own_number()
    with contextlib.ExitStack() as stack:
        path = host_journal_path(output, host)
        stack.enter_context(locked(path))
        own = open_journal(path, fingerprint)
        left = [at for at in _left_behind(output) if at >= count and at % count == host]
        if count == 1 and not left:
            yield own
            return
        others = []
        for at in left:
            stack.enter_context(locked(host_journal_path(output, at)))
            others.append(open_journal(host_journal_path(output, at), fingerprint))
        yield HostJournal(own, tuple(others), host, count)


def _left_behind(output: str | Path) -> list[int]:
    """Numbers of the hosts, but the first, whose journals lie beside an output."""
    output = Path(output)
    start, end = f"{output.name}.host", ".journal"
    names = (path.name for path in output.parent.glob("*.journal"))
    numbers = [name[len(start) : -len(end)] for name in names if name.startswith(start)]
    return sorted(int(number) for number in numbers if number.isdecimal())
