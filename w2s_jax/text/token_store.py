"""Token ids and targets of many documents in one memory-mapped Arrow file, written once.

The file is in the stream format that `datasets.Dataset.from_file` opens. Knows no tokenizer.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from w2s_jax.errors import InputError
from w2s_jax.text.atomic import sync_folder
from w2s_jax.text.supervised import Side

NO_LABEL = -1


@dataclass(frozen=True)
class Document:
    """One side of an example: from row `row` of source `source`; `label` is −1, 0 or 1.

    `weight` says how much the example counts beside others.
    """

    side: Side
    source: int
    row: int
    label: int = NO_LABEL
    weight: float = 1.0


@dataclass(frozen=True)
class TokenStore:
    """Documents by index; arrays are views of the mapped file.

    Attributes:
        tokens, targets: a part each, values and offsets of so many documents.
        starts: the first document of each part, and their number at the end.
        prompts, sources, rows, labels, weights, lengths: a number a document.
        notes: what the writer had to say, such as counts.
    """

    tokens: list[tuple[np.ndarray, np.ndarray]]
    targets: list[tuple[np.ndarray, np.ndarray]]
    starts: np.ndarray
    prompts: np.ndarray
    sources: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    lengths: np.ndarray
    notes: dict[str, Any]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def side(self, index: int) -> Side:
        """The tokens and targets of one document."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        place = index - int(self.starts[part])
        cuts = []
        for values, offsets in (self.tokens[part], self.targets[part]):
            cuts.append(values[offsets[place] : offsets[place + 1]])
        return Side(cuts[0], cuts[1].view(bool), int(self.prompts[index]))


def write_store(
    path: Path, blocks: Iterable[list[Document]], notes: Mapping[str, Any]
) -> None:  # fmt: skip
    """Write blocks of documents; the file appears whole, with `notes` as they are at the end.

    Raises InputError where it cannot be written; whatever `blocks` raises leaves no file.
    """
    import pyarrow as pa

    schema = _schema()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _appearing(path) as file, pa.ipc.new_stream(file, schema) as writer:
            for block in blocks:
                writer.write_batch(_batch(block, schema))
            with _appearing(_notes_of(path)) as told:
                told.write(json.dumps(notes).encode())
        sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A file that is there when all is written; several processes may write the same one."""
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def read_store(path: Path) -> TokenStore | None:
    """The documents of a file; None where it is not there or damaged."""
    import pyarrow as pa

    with contextlib.suppress(OSError, ValueError, pa.ArrowException):
        notes = json.loads(_notes_of(path).read_text())
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        return _store(table, notes)
    return None


def _notes_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _schema() -> Any:
    import pyarrow as pa

    lists = {"tokens": pa.list_(pa.int32()), "targets": pa.list_(pa.int8())}
    numbers = dict.fromkeys(("prompt", "source", "row", "label"), pa.int64())
    return pa.schema(lists | numbers | {"weight": pa.float32()})


def _batch(block: list[Document], schema: Any) -> Any:
    import pyarrow as pa

    lengths = [len(document.side) for document in block]
    offsets = pa.array(np.cumsum([0, *lengths]), pa.int32())
    tokens = np.concatenate([document.side.tokens for document in block])
    targets = np.concatenate([document.side.targets for document in block]).astype(np.int8)
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(tokens, pa.int32())),
        pa.ListArray.from_arrays(offsets, pa.array(targets, pa.int8())),
        pa.array([document.side.prompt for document in block], pa.int64()),
        pa.array([document.source for document in block], pa.int64()),
        pa.array([document.row for document in block], pa.int64()),
        pa.array([document.label for document in block], pa.int64()),
        pa.array([document.weight for document in block], pa.float32()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _store(table: Any, notes: dict[str, Any]) -> TokenStore:
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"tokens": [], "targets": []}
    for name, found in parts.items():
        for chunk in table.column(name).chunks:
            values = chunk.values.to_numpy(zero_copy_only=True)
            found.append((values, chunk.offsets.to_numpy(zero_copy_only=True)))
    offsets = [cuts for _, cuts in parts["tokens"]]
    starts = np.cumsum([0, *(len(cuts) - 1 for cuts in offsets)])
    lengths = [np.diff(cuts) for cuts in offsets]
    names = ("prompt", "source", "row", "label", "weight")
    numbers = {name: table.column(name).to_numpy() for name in names}
    return TokenStore(
        parts["tokens"],
        parts["targets"],
        starts,
        numbers["prompt"],
        numbers["source"],
        numbers["row"],
        numbers["label"],
        numbers["weight"],
        np.concatenate([np.zeros(0, np.int32), *lengths]),
        notes,
    )
