"""Files of rows, JSON lines or an array, plain or compressed, read with errors that name the row.

One line is one row and blank lines are not allowed, so the row at index i stands on line i + 1. A
byte-order mark in front is left out. What a row must hold is for its reader to say. Files that are
written appear whole or not at all.
"""

import codecs
import gzip
import json
import lzma
import os
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from w2s_jax.errors import InputError, check_fetched


def write_whole(path: str | Path, parts: Iterable[bytes]) -> None:
    """Write parts, one after the other, to a file that a kill at any moment leaves old or new.

    Makes the file's folder. Raises InputError where it cannot be written; whatever else `parts`
    raises leaves the file as it was.
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

    Raises InputError where it cannot.
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


Row = dict[str, Any]


def read_jsonl(path: str | Path) -> list[Row]:
    """All rows of a .jsonl, .jsonl.gz or .jsonl.xz file, in order.

    Raises InputError for a missing, unreadable or empty file and, naming the line, for one that is
    not a JSON object in UTF-8.
    """
    path = Path(path)
    return _parse_lines(path, _read(path))


def read_rows(path: str | Path) -> tuple[list[Row], str]:
    """All rows of a file of JSON lines, or of one JSON array, and what its rows stand on.

    The latter is "PATH line" or "PATH row", before a number from 1. Raises InputError as
    `read_jsonl` does.
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

    Raises InputError where the file cannot be written.
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
    check_fetched(path)
    try:
        return _decompress(path, path.read_bytes()).removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{path}: not a sound {path.suffix} file ({error})") from None


def _parse_lines(path: Path, data: bytes) -> list[Row]:
    lines = data.rstrip().split(b"\n")
    if lines == [b""]:
        raise InputError(f"{path}: no rows; one JSON object a line is needed")
    return [_parse(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]


def _decompress(path: Path, data: bytes) -> bytes:
    if path.suffix == ".gz":
        return gzip.decompress(data)
    return lzma.decompress(data) if path.suffix == ".xz" else data


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
