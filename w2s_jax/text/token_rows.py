"""Tokenised training rows as padded batches: sequences, packed ones, pairs, labelled responses.

Token ids and targets of all documents lie in one memory-mapped Arrow file, written once, in the
stream format that `datasets.Dataset.from_file` opens.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from w2s_jax.errors import InputError
from w2s_jax.text.batches import Batch, Packing
from w2s_jax.text.examples import Kind
from w2s_jax.text.rows import sync_folder
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


@dataclass(frozen=True)
class Data:
    """Tokenised rows; one of them is a document, several packed ones, or the two sides of a pair.

    Attributes:
        kind: sequences, pairs or labelled.
        store: the documents; the sides of a pair follow each other.
        places: how each source writes the place of a row, before its number.
        identity: equal for equal rows, tokenizer and options; names caches of what follows from it.
        weighted: whether batches say how much each pair counts.
        figures: rows read, examples kept, dropped and truncated, tokens, targets ...
    """

    kind: Kind
    store: TokenStore
    places: tuple[str, ...]
    identity: str
    figures: dict[str, int]
    pad_id: int
    max_length: int
    multiple: int
    packing: Packing | None = None
    weighted: bool = False

    def __len__(self) -> int:
        if self.packing is not None:
            return len(self.packing)
        return len(self.store) // self._sides

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row, without padding; of a pair, those of the longer side."""
        if self.packing is not None:
            return np.add.reduceat(
                self.store.lengths[self.packing.documents], self.packing.starts[:-1]
            )
        return self.store.lengths.reshape(-1, self._sides).max(axis=1)

    def fitting(self, vocabulary: int) -> "Data":
        """This data for a model of so many tokens: padding, which no token sees, is one of them.

        Raises InputError where a document holds a token that the model does not have.
        """
        largest = max(int(values.max(initial=0)) for values, _ in self.store.tokens)
        if largest >= vocabulary:
            raise InputError(
                f"the tokenizer gives token {largest}, and the model has {vocabulary}, from 0 on; "
                "it is the tokenizer of another model"
            )
        return self if self.pad_id < vocabulary else replace(self, pad_id=0)

    def names(self, index: int) -> list[str]:
        """Where the documents of a row stand, as "FILE line N"."""
        documents = [index * self._sides] if self.packing is None else self.packing.row(index)
        return [
            f"{self.places[self.store.sources[one]]} {self.store.rows[one]}" for one in documents
        ]

    def name(self, index: int) -> str:
        """`names` in one text."""
        return ", ".join(self.names(index))

    def at(self, indices: np.ndarray | Sequence[int], part: slice = slice(None)) -> Batch:
        """The rows at these indices, padded on the right; of them, those in `part`.

        `tokens` int32, `targets` bool and `segments` int32 [B, X], or [B, 2, X] for pairs and
        labelled rows, whose second side is the response of the row before in the batch (TRL's KTO
        estimates its KL from those) behind the row's own prompt; `labels` bool [B] for these, and
        `weights` float32 [B] for weighted pairs. X is of all rows at `indices`, also of those not
        in `part`.
        """
        rows = [self._row(int(index)) for index in indices]
        if self.kind == "labelled":
            before = [rows[-1], *rows[:-1]]
            rows = [
                [own, [self._mismatched(own[0], other[0])]]
                for (own,), (other,) in zip(rows, before, strict=True)
            ]
        longest = max(sum(map(len, segments)) for row in rows for segments in row)
        width = min(-(-longest // self.multiple) * self.multiple, self.max_length)
        batch = lay_out(rows[part], width, self.pad_id)
        if self.kind == "sequences":
            batch = {name: array[:, 0] for name, array in batch.items()}
        if self.kind == "labelled":
            batch["labels"] = self.store.labels[np.asarray(indices)][part] == 1
        if self.weighted:
            batch["weights"] = self.store.weights[:: self._sides][np.asarray(indices)][part]
        return batch

    def _row(self, index: int) -> list[list[Side]]:
        """The sides of a row, each with its segments."""
        if self.packing is not None:
            return [[self.store.side(int(one)) for one in self.packing.row(index)]]
        first = index * self._sides
        return [[self.store.side(first + side)] for side in range(self._sides)]

    def _mismatched(self, own: Side, other: Side) -> Side:
        tokens = np.concatenate([own.tokens[: own.prompt], other.tokens[other.prompt :]])
        targets = np.arange(len(tokens)) >= max(own.prompt, 1)
        return Side(tokens[: self.max_length], targets[: self.max_length], own.prompt)

    @property
    def _sides(self) -> int:
        return 2 if self.kind == "pairs" else 1


def lay_out(rows: Sequence[Sequence[Sequence[Side]]], width: int, pad_id: int) -> Batch:
    """Rows of sides of segments as `tokens`, `targets` and `segments` [B, sides, width]."""
    shape = (len(rows), len(rows[0]), width)
    tokens = np.full(shape, pad_id, np.int32)
    targets, segments = np.zeros(shape, bool), np.zeros(shape, np.int32)
    for i, row in enumerate(rows):
        for j, side in enumerate(row):
            start = 0
            for number, segment in enumerate(side, start=1):
                place = (i, j, slice(start, start + len(segment)))
                tokens[place], targets[place] = segment.tokens, segment.targets
                segments[place] = number
                start += len(segment)
    return {"tokens": tokens, "targets": targets, "segments": segments}
