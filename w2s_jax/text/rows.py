"""Files of rows, and long jobs over them: a journal of finished rows, and progress messages.

In a file of rows each line is a JSON object and blank lines are not allowed, so the row at index i
is on line i + 1. A byte-order mark is skipped. The fields of a row are the reader's concern. Files
are written atomically.

The journal is a file of JSON lines: first the job's fingerprint (its inputs and settings), then one
row per line under its id. With several hosts each writes its share of the rows, and one the output;
they need no shared file system.
"""

import codecs
import contextlib
import fcntl
import gzip
import json
import lzma
import os
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from w2s_jax.distributed import gather_values, is_first, own_number
from w2s_jax.errors import InputError, check_fetched


def write_whole(path: str | Path, parts: Iterable[bytes]) -> None:
    """Write the parts, in order, to a file atomically: a kill leaves the old or the new content.

    Creates the file's folder.

    Raises:
        InputError: If it cannot be written. Whatever else `parts` raises leaves the file as it was.
    """
    path = Path(path)
    check_writable(path)
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def check_writable(path: str | Path) -> None:
    """Check, before long work, that a file can be written at `path`; creates its folder.

    Raises:
        InputError: If it cannot.
    """
    path = Path(path)
    fault = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "not a regular file"
            fault = f"(it is {kind}); name a file"
    except (FileExistsError, NotADirectoryError):
        fault = f"({path.parent} is not a folder)"
    except OSError as error:
        fault = f"({error.strerror or error})"
    if fault is not None:
        raise InputError(f"{path}: cannot be written {fault}")


def sync_folder(folder: Path) -> None:
    """Make new or renamed entries of a folder survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Lock the output at `path` against other runs inside the block.

    The lock ends with the process, however that ends.

    Raises:
        InputError: If another run holds it, or no file can be created there.
    """
    path = Path(path)
    check_writable(path)
    # The same file, reached through a link, has the same lock.
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


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        InputError: If it cannot be read, or is a Git LFS pointer.
    """
    check_fetched(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


Row = dict[str, Any]


def read_jsonl(path: str | Path) -> list[Row]:
    """All rows of a .jsonl, .jsonl.gz or .jsonl.xz file, in order.

    Raises:
        InputError: For a missing, unreadable or empty file and, naming the line, for one that is
            not a JSON object in UTF-8.
    """
    path = Path(path)
    return _parse_lines(path, _read(path))


def read_rows(path: str | Path) -> tuple[list[Row], str]:
    """All rows of a file of JSON lines or of one JSON array.

    Returns:
        The rows, and "PATH line" or "PATH row", which precedes a row's number from 1 in messages.

    Raises:
        InputError: As `read_jsonl` does.
    """
    path = Path(path)
    data = _read(path)
    if not data.lstrip().startswith(b"["):
        return _parse_lines(path, data), f"{path} line"
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON array ({error})") from None
    if not rows:
        raise InputError(f"{path}: no rows; the array is empty")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path} row {number}: not a JSON object but {type(row).__name__}")
    return rows, f"{path} row"


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one row per line, atomically, compressed according to the suffix.

    Raises:
        InputError: If the file cannot be written.
    """
    path = Path(path)
    compress: dict[str, Callable[[bytes], bytes]] = {
        ".gz": partial(gzip.compress, mtime=0), ".xz": lzma.compress
    }  # fmt: skip
    write_whole(path, [compress.get(path.suffix, bytes)(b"".join(map(json_line, rows)))])


def json_line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of UTF-8 JSON; text that UTF-8 cannot encode (lone surrogates) is escaped."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row).encode() + b"\n"


def _read(path: Path) -> bytes:
    """The content of a file, decompressed according to its suffix, without a byte-order mark."""
    data = read_bytes(path)
    decompress = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(path.suffix, bytes)
    try:
        data = decompress(data)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{path}: not a sound {path.suffix} file ({error})") from None
    return data.removeprefix(codecs.BOM_UTF8)


def _parse_lines(path: Path, data: bytes) -> list[Row]:
    lines = data.rstrip().split(b"\n")
    if lines == [b""]:
        raise InputError(f"{path}: no rows; one JSON object a line is needed")
    return [_parse(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]


def _parse(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        fault = (
            f"not JSON: {error.msg} at column {error.colno}" if line.strip() else "an empty line"
        )
        raise InputError(f"{where}: {fault}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error.reason} at byte {error.start + 1})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: JSON beyond what can be read ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object but {type(row).__name__}")
    return row


# The journal of a long job


HEADER = "w2s_journal"


@dataclass(frozen=True)
class Journal:
    """A sound journal; made by `open_journal` and `job_journal`.

    One process writes it at a time. Row i belongs to the host i modulo their number. With several
    hosts, all call each method together, except `append`.

    Attributes:
        path: The file of this host's rows.
        fingerprint: What distinguishes jobs, as JSON values by name.
        others: Journals left to this host by an earlier run with another number of hosts.
        host: Number of this host.
        count: Number of hosts.
    """

    path: Path
    fingerprint: dict[str, Any]
    others: tuple[Path, ...] = ()
    host: int = 0
    count: int = 1

    def append(self, row_id: int, row: Mapping[str, Any]) -> None:
        """Add a finished row; it is on disk when this returns. The first one creates the file."""
        with self.path.open("ab") as file:
            new = file.tell() == 0
            header = json_line({HEADER: 1, "fingerprint": self.fingerprint}) if new else b""
            file.write(header + json_line({"row_id": row_id, "row": row}))
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_folder(self.path.parent)

    def read(self) -> dict[int, Row]:
        """The finished rows of all hosts by id, without a torn last line.

        Raises:
            InputError: For a damaged line anywhere else.
        """
        rows: dict[int, Row] = {}
        for path in (*self.others, self.path):
            rows |= _read_journal(path)[1] if path.exists() else {}
        if self.count > 1:
            parts = gather_values(list(rows.items()))
            rows = {int(row_id): row for part in parts for row_id, row in part}
        return dict(sorted(rows.items()))

    def is_own(self, row_id: int) -> bool:
        """Whether a row is this host's to write; with one host, every row is."""
        return row_id % self.count == self.host

    def merge(
        self,
        output: str | Path,
        count: int,
        write: Callable[[str | Path, Iterable[Row]], None] = write_jsonl,
    ) -> None:
        """Write the rows 0 to count − 1 to `output`, in order, then remove the journal.

        The first host writes, then every host removes its journals. A kill in between leaves them,
        and merging again gives the same file.

        Args:
            output: The file.
            count: Number of rows.
            write: Writes the rows to the file.

        Raises:
            InputError: If rows are missing; nothing is written then.
        """
        rows = self.read()
        missing = [row_id for row_id in range(count) if row_id not in rows]
        if missing:
            raise InputError(
                f"{self.path}: {len(missing)} of {count} rows are missing, first {missing[0]}; run "
                "again, one process at a time"
            )
        if self.host == 0:
            write(output, (rows[row_id] for row_id in range(count)))
        if self.count > 1:
            gather_values(None)  # no journal is removed before the output exists
        for path in (*self.others, self.path):
            path.unlink(missing_ok=True)


def told_kept(path: Path) -> str:
    """Where the finished rows of a failed job are, to be added to the reason of the failure."""
    return f"; what was found for the others is kept in {path}" if path.exists() else ""


def journal_path(output: str | Path) -> Path:
    """Path of a job's journal: OUTPUT.journal, beside its output."""
    return Path(f"{output}.journal")


def open_journal(path: str | Path, fingerprint: Mapping[str, Any]) -> Journal:
    """The journal of a job, with the rows of an earlier run if there are any.

    A torn last line is cut off.

    Args:
        path: The file.
        fingerprint: What distinguishes jobs, as JSON values by name.

    Raises:
        InputError: If the journal has another fingerprint (the message names the differences), is
            damaged or cannot be written.
    """
    path = Path(path)
    check_writable(path)
    wanted = json.loads(json.dumps(fingerprint))
    if path.exists():
        found, rows, end = _read_journal(path)
        if rows and found != wanted:
            changed = differences(found or {}, wanted).items()
            told = ", ".join(f"{name}: {a!r} there, {b!r} here" for name, (a, b) in changed)
            raise InputError(
                f"{path}: holds {len(rows)} finished rows of a run with other settings "
                f"({told}); go on with those, or delete it to start anew"
            )
        if not rows:
            start = f'{{"{HEADER}"'.encode()
            if not start.startswith(read_bytes(path)[: len(start)]):
                # Neither empty nor cut off within its first line.
                raise InputError(f"{path}: not a journal; move the file away to start anew")
            path.unlink()
        elif end < path.stat().st_size:
            with path.open("r+b") as file:
                file.truncate(end)
                file.flush()
                os.fsync(file.fileno())
    return Journal(path, wanted)


def _read_journal(path: Path) -> tuple[dict[str, Any] | None, dict[int, Row], int]:
    """(fingerprint, None without a complete header; rows by id; bytes up to the last row's end)."""
    lines = read_bytes(path).splitlines(keepends=True)
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


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Names whose values differ in two mappings, with (found, wanted), None for a missing one."""
    names = [n for n in sorted({*found, *wanted}) if found.get(n) != wanted.get(n)]
    return {name: (found.get(name), wanted.get(name)) for name in names}


def host_journal_path(output: str | Path, host: int) -> Path:
    """Path of a host's journal: OUTPUT.journal for the first, then OUTPUT.host1.journal etc."""
    return journal_path(output) if host == 0 else journal_path(f"{output}.host{host}")


@contextlib.contextmanager
def job_journal(output: str | Path, fingerprint: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal beside `output` that this process is to write, locked inside the block.

    With several hosts each has its own, and also takes over those that an earlier run with another
    number of hosts left here.

    Raises:
        InputError: As `locked` and `open_journal` do.
    """
    host, count = own_number()
    left = [at for at in _left_behind(output) if at >= count and at % count == host]
    own, *others = (host_journal_path(output, at) for at in (host, *left))
    with contextlib.ExitStack() as stack:
        for path in (own, *others):
            stack.enter_context(locked(path))
            journal = open_journal(path, fingerprint)
        yield Journal(own, journal.fingerprint, tuple(others), host, count)


def _left_behind(output: str | Path) -> list[int]:
    """Numbers of the hosts, except the first, whose journals lie beside an output."""
    output = Path(output)
    named = re.compile(re.escape(f"{output.name}.host") + r"(\d+)\.journal", re.ASCII)
    found = (named.fullmatch(path.name) for path in output.parent.glob("*.journal"))
    return sorted(int(each[1]) for each in found if each)


_TELL_SECONDS = 30.0  # time between lines of progress without a terminal


@contextlib.contextmanager
def progress(
    total: int, unit: str, *, done: int = 0, name: str = ""
) -> Iterator[Callable[[int], None]]:
    """Show the progress of some work inside the block.

    On a terminal it is tqdm's bar. Otherwise the first host writes lines to standard error: one at
    the start, since minutes of loading and compiling may follow, then one every 30 s, and a last
    one.

    Args:
        total: Number of units; nothing is shown for 0.
        unit: Name of a unit, in the singular.
        done: Units done at the start.
        name: Name of the work.

    Yields:
        A function that takes the number of further units done.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, initial=done, desc=name or None, unit=unit) as bar:
            yield bar.update
        return
    start = told = time.monotonic()
    heading = f"{name}: " if name else ""

    def tell(more: str) -> None:
        if is_first():
            sys.stderr.write(f"{heading}{done} of {total} {unit}s{more}\n")
            sys.stderr.flush()

    def update(count: int) -> None:
        nonlocal done, told
        done += count
        now = time.monotonic()
        if done >= total or now - told >= _TELL_SECONDS:
            told = now
            tell(f", {now - start:.0f} s")

    if total > done:
        tell("; the first wait for programs to be compiled")
    yield update
