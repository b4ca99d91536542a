"""Files of rows, JSON lines, an array or Parquet, and data sets of the hub; errors name the row.

One line is one row and blank lines are not allowed, so the row at index i stands on line i + 1. A
byte-order mark in front is left out. What a row must hold is for its reader to say. Files that are
written appear whole or not at all.
"""

import codecs
import contextlib
import fcntl
import glob
import gzip
import hashlib
import json
import lzma
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from w2s_jax.errors import InputError, check_fetched


def write_whole(path: str | Path, parts: Iterable[bytes]) -> None:
    """Write parts, one after the other, to a file that a kill at any moment leaves old or new.

    Makes the file's folder.

    Raises:
        InputError: where it cannot be written; whatever else `parts` raises leaves the file as
            it was.
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
    """Make sure, before long work, that a file can be written at `path`; makes its folder.

    Raises:
        InputError: where it cannot.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        taken = path.exists() and not path.is_file()
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{path}: cannot be written ({path.parent} is not a folder)") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    if taken:
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise InputError(f"{path}: cannot be written (it is {kind}); name a file")


def sync_folder(folder: Path) -> None:
    """Make a new or renamed entry of a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Keep other runs off the output at `path` while the block runs.

    The lock ends with the process, however it ends.

    Raises:
        InputError: where another run holds it, and where no file can be made there.
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


def read_bytes(path: Path) -> bytes:
    """What a file holds.

    Raises:
        InputError: where it cannot be read, or is a pointer of Git LFS.
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
        InputError: for a missing, unreadable or empty file and, naming the line, for one that
            is not a JSON object in UTF-8.
    """
    path = Path(path)
    return _parse_lines(path, _read(path))


def read_rows(path: str | Path) -> tuple[list[Row], str]:
    """All rows of a file of JSON lines, or of one JSON array, and what its rows stand on.

    The latter is "PATH line" or "PATH row", before a number from 1.

    Raises:
        InputError: as `read_jsonl` does.
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
    """Write rows one a line, compressed as the suffix says; the file appears whole or not at all.

    Raises:
        InputError: where the file cannot be written.
    """
    path = Path(path)
    data = b"".join(json_line(row) for row in rows)
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    elif path.suffix == ".xz":
        data = lzma.compress(data)
    write_whole(path, [data])


def json_line(row: Mapping[str, Any]) -> bytes:
    """A row as one line of UTF-8 JSON; text that has no UTF-8 form (lone surrogates) is escaped."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row).encode() + b"\n"


def _read(path: Path) -> bytes:
    """What a file holds, without compression, as its suffix tells it, and a byte-order mark."""
    data = read_bytes(path)
    try:
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        elif path.suffix == ".xz":
            data = lzma.decompress(data)
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


_JSON = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.xz", ".json.xz")
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_TAKES = ".jsonl, .json (also .gz and .xz) or .parquet"
_SPLIT = re.compile(r"(\w+)(?:\[(\d+%?)?:(\d+%?)?\])?")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")


@runtime_checkable
class Table(Protocol):
    """Rows by index: a list of them, or a data set of `datasets`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Source:
    """One file or data set.

    Attributes:
        name: as the user wrote it.
        unit: what a number behind the name counts: "FILE line", "ID row".
        digest: changes with the content.
        read: reads all rows, in order; raises InputError.
        first, last: where the rows that count begin and end, as numbers or in percent.
    """

    name: str
    unit: str
    digest: str
    read: Callable[[], Table]
    first: str = "0"
    last: str = "100%"

    def rows(self) -> tuple[Table, range]:
        """All rows, and the indices of those that count.

        Raises:
            InputError: where there is none.
        """
        rows = self.read()
        first, last = (_index(bound, len(rows)) for bound in (self.first, self.last))
        if first >= last:
            part = f" from {self.first} to {self.last}" if len(rows) else ""
            raise InputError(f"{self.name}: no rows{part}")
        return rows, range(first, last)

    def place(self, number: int) -> str:
        """Where a row stands; numbers are from 1."""
        return f"{self.unit} {number}"


def open_source(name: str, *, split: str = "train") -> Source:
    """The file, folder or data set of this name.

    A data set of the hub is ID or ID:CONFIG. `split` is its split, or a folder's, and may take a
    part of the rows, of files too: train[:90%], train[500:].

    Raises:
        InputError: for a name that is nothing of this, and for a split that is not there.
    """
    path = Path(name).expanduser()
    asked = _SPLIT.fullmatch(split)
    if asked is None:
        raise InputError(f"--split {split}: it takes a name such as train, or train[:90%]")
    part = {"first": asked[2] or "0", "last": asked[3] or "100%"}
    unit, read = f"{name} row", partial(_load, name, asked[1])
    if path.is_file():
        return _file(name, path, part)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            if file.name.endswith((*_JSON, *_BUILDERS)):
                check_fetched(file)
        digest = f"{asked[1]} {_digest(files)}"
        return Source(name, unit, digest, partial(read, **_folder(path, files)), **part)
    if path.name.endswith((*_JSON, ".parquet")) or not _HUB.fullmatch(name):
        raise InputError(f"{name}: no such file; it takes {_TAKES}, or an id on the hub")
    identity, _, config = name.partition(":")
    found = read(identity, name=config or None)
    return Source(name, unit, f"{asked[1]} {found._fingerprint}", lambda: found, **part)


def _folder(path: Path, files: Sequence[Path]) -> dict[str, str]:
    """What `datasets` takes for a folder.

    It reads names as patterns; where one holds [, * or ?, the kind of the files must be said.
    """
    if glob.escape(str(path)) == str(path):
        return {"kind": str(path)}
    endings = [ending for file in files for ending in file.suffixes]
    found = next((_BUILDERS[ending] for ending in endings if ending in _BUILDERS), "json")
    return {"kind": found, "data_dir": glob.escape(str(path))}


def _file(name: str, path: Path, part: dict[str, str]) -> Source:
    check_fetched(path)
    digest = _digest([path])
    if path.name.endswith(_JSON):
        unit = "row" if path.name.endswith((".json", ".json.gz", ".json.xz")) else "line"
        return Source(name, f"{name} {unit}", digest, lambda: read_rows(path)[0], **part)
    if path.suffix == ".parquet":
        read = partial(_load, name, "train", "parquet", data_files=glob.escape(str(path)))
        return Source(name, f"{name} row", digest, read, **part)
    raise InputError(f"{name}: not one of the files that can be read: {_TAKES}")


def _index(bound: str, rows: int) -> int:
    """Rounded as `datasets` rounds percents."""
    share = bound.endswith("%")
    return min(round(int(bound[:-1]) * rows / 100) if share else int(bound), rows)


def _load(shown: str, split: str, kind: str, **options: Any) -> Any:
    """A split that `datasets` reads; messages of errors show it as `shown`."""
    import datasets

    quiet = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    try:
        if quiet:
            datasets.disable_progress_bars()
        return datasets.load_dataset(kind, split=split, **options)
    except Exception as error:  # whatever its many readers raise
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).split("\n")[0]
        raise InputError(f"{shown}: cannot be read ({type(cause).__name__}: {reason})") from None
    finally:
        if quiet:
            datasets.enable_progress_bars()


def _digest(paths: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    return total.hexdigest()
