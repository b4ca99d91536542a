"""Where training rows come from: JSON and Parquet files, and data sets of the hub.

JSON is read by text/rows.py, so that errors name lines and rows may differ in their types; the rest
by `datasets`, which runs no code of a data set.
"""

import glob
import hashlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from w2s_jax.errors import InputError, check_fetched
from w2s_jax.text.rows import read_rows

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
        """All rows, and the indices of those that count. Raises InputError where there is none."""
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
    part of the rows, of files too: train[:90%], train[500:]. Raises InputError for a name that is
    nothing of this, and for a split that is not there.
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
