"""Batches of token ids at fixed shapes: which rows go together, held-out rows, packing, padding.

The batch of a step is a pure function of its number, equal on every host, so that data resumes
exactly. Documents are integer arrays; no tokenizer and no model is used here. The token ids and
targets of all documents lie in one memory-mapped Arrow file, in the stream format that
`datasets.Dataset.from_file` opens.
"""

import contextlib
import hashlib
import heapq
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from w2s_jax.errors import InputError
from w2s_jax.text.rows import sync_folder
from w2s_jax.text.tokenizer import pad_rows

Kind = Literal["sequences", "pairs", "labelled"]
Batch = dict[str, np.ndarray]


@runtime_checkable
class Documents(Protocol):
    """Token ids without special tokens, by index."""

    def __len__(self) -> int: ...
    def review(self, index: int) -> np.ndarray: ...


def shuffled(size: int, seed: int) -> Callable[[int], int]:
    """An endless order of `range(size)`, from position to index, reshuffled for every epoch."""

    @lru_cache(maxsize=2)
    def epoch(number: int) -> np.ndarray:
        return np.random.default_rng((seed, number)).permutation(size)

    return lambda position: int(epoch(position // size)[position % size])


@dataclass(frozen=True)
class Crops:
    """Classification batches: one random crop of each document, after the token `first_id`.

    All rows of a step have one width, drawn from `widths` (`first_id` included). A share `openings`
    of the crops starts at the document's first token. Each token is replaced by `pad_id` with
    probability `token_dropout`. A batch holds `tokens`, `mask` [rows, width] and `labels` [rows].
    """

    documents: Documents
    labels: np.ndarray
    rows: int
    widths: tuple[int, ...]
    first_id: int
    pad_id: int
    openings: float = 0.5
    token_dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "_order", shuffled(len(self.documents), self.seed))

    def __call__(self, step: int) -> Batch:
        rng = np.random.default_rng((self.seed, 1, step))
        width = int(rng.choice(self.widths))
        indices = [self._order(step * self.rows + i) for i in range(self.rows)]  # type: ignore[attr-defined]
        rows = [self._row(index, width, rng) for index in indices]
        tokens, mask = pad_rows(rows, width, self.pad_id)
        return {"tokens": tokens, "mask": mask, "labels": self.labels[indices].astype(np.int32)}

    def _row(self, index: int, width: int, rng: np.random.Generator) -> np.ndarray:
        document = self.documents.review(index).astype(np.int32)
        room = len(document) - (width - 1)
        start = 0 if room <= 0 or rng.random() < self.openings else int(rng.integers(room + 1))
        crop = document[start : start + width - 1].copy()
        crop[rng.random(len(crop)) < self.token_dropout] = self.pad_id
        return np.concatenate([[self.first_id], crop]).astype(np.int32)


@dataclass(frozen=True)
class Side:
    """A prompt followed by one response.

    `targets` is True on tokens whose log-probs count, never on the first; the prompt is the first
    `prompt` tokens.
    """

    tokens: Int32[np.ndarray, " X"]
    targets: Bool[np.ndarray, " X"]
    prompt: int

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class TokenStore:
    """Documents by index; the arrays are views of a mapped file.

    Attributes:
        tokens, targets: (values, offsets) of the documents of each part of the file.
        prompts, sources, rows, labels, weights: One number per document.
        notes: What the writer recorded, such as counts.
    """

    tokens: list[tuple[np.ndarray, np.ndarray]]
    targets: list[tuple[np.ndarray, np.ndarray]]
    prompts: np.ndarray
    sources: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    notes: dict[str, Any]

    @cached_property
    def starts(self) -> np.ndarray:
        """The first document of each part, and at the end the number of documents."""
        return np.cumsum([0, *(len(offsets) - 1 for _, offsets in self.tokens)])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        parts = (np.diff(offsets) for _, offsets in self.tokens)
        return np.concatenate([np.zeros(0, np.int32), *parts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def side(self, index: int) -> Side:
        """The tokens and targets of one document."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        place = index - int(self.starts[part])
        tokens, targets = (
            values[offsets[place] : offsets[place + 1]]
            for values, offsets in (self.tokens[part], self.targets[part])
        )
        return Side(tokens, targets.view(bool), int(self.prompts[index]))


NO_LABEL = -1
FIGURES = (
    "rows", "kept", "dropped", "undesirable", "truncated", "equal", "merged_borders", "tokens",
    "targets",
)  # fmt: skip
"""Names of the counts of rows, examples and documents."""
_NUMBERS = ("prompt", "source", "row", "label", "weight")


@dataclass(frozen=True)
class Document:
    """One side of an example, from row `row` of source `source`; `label` is −1 (none), 0 or 1.

    `weight` is the example's weight in the loss.
    """

    side: Side
    source: int
    row: int
    label: int = NO_LABEL
    weight: float = 1.0


def write_store(path: Path, blocks: Iterable[list[Document]], notes: Mapping[str, Any]) -> None:
    """Write blocks of documents atomically, with `notes` as they are after the last block.

    Raises:
        InputError: If it cannot be written. If `blocks` raises, no file is left.
    """
    import pyarrow as pa

    numbers = dict.fromkeys(_NUMBERS, pa.int64()) | {"weight": pa.float32()}
    lists = {"tokens": pa.list_(pa.int32()), "targets": pa.list_(pa.int8())}
    schema = pa.schema(lists | numbers)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _appearing(path) as file, pa.ipc.new_stream(file, schema) as writer:
            for block in blocks:
                rows = [
                    vars(one.side) | vars(one) | {"targets": one.side.targets.astype(np.int8)}
                    for one in block
                ]
                columns = {name: [row[name] for row in rows] for name in schema.names}
                writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))
            with _appearing(path.with_suffix(".json")) as told:
                told.write(json.dumps(notes).encode())
        sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears once it is complete; several processes may write the same one."""
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
    """The documents of a file; None if it is missing or damaged.

    A stream cut between two blocks reads as a shorter one, so the number of tokens is checked
    against the notes.
    """
    import pyarrow as pa

    with contextlib.suppress(OSError, ValueError, pa.ArrowException):
        notes = json.loads(path.with_suffix(".json").read_text())
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        tokens, targets = (
            [(part.values.to_numpy(), part.offsets.to_numpy()) for part in table[name].chunks]
            for name in ("tokens", "targets")
        )
        columns: Any = [*(table[name].to_numpy() for name in _NUMBERS), notes]
        store = TokenStore(tokens, targets, *columns)
        whole = isinstance(notes, dict) and notes.keys() >= {*FIGURES}
        return store if whole and notes["tokens"] == int(store.lengths.sum()) else None
    return None


@dataclass(frozen=True)
class Packing:
    """Rows of whole documents: row i holds `documents[starts[i] : starts[i + 1]]`."""

    documents: Int64[np.ndarray, " n"]
    starts: Int64[np.ndarray, " m"]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> Int64[np.ndarray, " k"]:
        """Indices of the documents in one row."""
        return self.documents[self.starts[index] : self.starts[index + 1]]


def best_fit(lengths: Int[np.ndarray, " n"], width: int) -> Packing:
    """Pack documents into rows of `width` tokens by best-fit decreasing (arXiv 2404.10830).

    Documents are not split. As in TRL's "bfd", ties are deterministic: equal lengths keep their
    order, and of rows with equal room the oldest is filled.

    Raises:
        ValueError: For a document that is empty or longer than a row.
    """
    if len(lengths) and not 0 < lengths.min() <= lengths.max() <= width:
        raise ValueError(f"documents must have 1 to {width} tokens")
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    rows: list[list[int]] = []
    # A heap of rows for each amount of room left. The amounts that occur are a bit set, in which
    # the smallest sufficient one is the lowest bit from `length` up.
    by_room: dict[int, list[int]] = {}
    rooms = 0
    for index in order.tolist():
        length = int(lengths[index])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = heapq.heappop(by_room[room])
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = width, len(rows)
            rows.append([])
        rows[row].append(index)
        left = room - length
        if left:
            heapq.heappush(by_room.setdefault(left, []), row)
            rooms |= 1 << left
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Packing(np.array([i for row in rows for i in row], np.int64), starts)


@dataclass(frozen=True)
class Data:
    """Tokenised rows, each of which is a document, several packed ones, or the sides of a pair.

    Attributes:
        kind: sequences, pairs or labelled.
        store: The documents; the two sides of a pair are adjacent.
        places: How each source writes the place of a row, before its number.
        identity: Equal for equal rows, tokenizer and options; caches of derived data use it.
        weighted: Whether batches hold a weight for each pair.
        figures: Counts of rows, examples kept, dropped and truncated, tokens, targets ...
        rows: Numbers of these rows in the store; None for all of them.
        columns: Further arrays of a batch by name, one value per row.
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
    rows: Int64[np.ndarray, " n"] | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._numbers)

    @cached_property
    def _numbers(self) -> np.ndarray:
        if self.rows is not None:
            return self.rows
        documents = len(self.store) // self._sides
        return np.arange(documents if self.packing is None else len(self.packing))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each row, without padding; in a pair, those of the longer side."""
        lengths = self.store.lengths
        if self.packing is not None:
            lengths = np.add.reduceat(lengths[self.packing.documents], self.packing.starts[:-1])
        else:
            lengths = lengths.reshape(-1, self._sides).max(axis=1)
        return lengths[self._numbers]

    def chosen(self, rows: np.ndarray) -> "Data":
        """A selection of the rows, in the order of `rows`."""
        digest = hashlib.sha256(rows.astype(np.int64).tobytes()).hexdigest()[:16]
        found = replace(self, rows=self._numbers[rows], identity=f"{self.identity}:{digest}")
        return replace(found, columns={name: one[rows] for name, one in self.columns.items()})

    def beside(self, name: str, column: np.ndarray) -> "Data":
        """The same rows, with a further named array in their batches, one value per row."""
        digest = hashlib.sha256(column.tobytes()).hexdigest()[:16]
        columns = {**self.columns, name: column}
        return replace(self, columns=columns, identity=f"{self.identity}+{digest}")

    def fitting(self, vocabulary: int) -> "Data":
        """This data for a model with `vocabulary` tokens, one of which `pad_id` then is.

        Raises:
            InputError: If a document holds a token that the model does not have.
        """
        largest = max(int(values.max(initial=0)) for values, _ in self.store.tokens)
        if largest >= vocabulary:
            raise InputError(
                f"the tokenizer gives token {largest}, and the model has {vocabulary}, from 0 on; "
                "it is the tokenizer of another model"
            )
        return self if self.pad_id < vocabulary else replace(self, pad_id=0)

    def names(self, index: int) -> list[str]:
        """Places of a row's documents, as "FILE line N"."""
        row = int(self._numbers[index])
        documents = [row * self._sides] if self.packing is None else self.packing.row(row)
        return [
            f"{self.places[self.store.sources[one]]} {self.store.rows[one]}" for one in documents
        ]

    def at(self, indices: np.ndarray | Sequence[int], part: slice = slice(None)) -> Batch:
        """The rows at these indices, padded on the right; of them, those in `part`.

        `tokens` int32, `targets` bool and `segments` int32 [B, X], or [B, 2, X] for pairs and
        labelled rows. The second side of a labelled row is the row's own prompt with the response
        of the previous row of the batch, from which TRL's KTO estimates its KL; such rows have
        `labels` bool [B]. Weighted pairs have `weights` float32 [B]. X fits all rows at `indices`,
        in `part` or not.
        """
        numbers = self._numbers[np.asarray(indices)]
        rows = [self._row(int(number)) for number in numbers]
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
            batch["labels"] = self.store.labels[numbers][part] == 1
        if self.weighted:
            batch["weights"] = self.store.weights[:: self._sides][numbers][part]
        more = {name: column[np.asarray(indices)] for name, column in self.columns.items()}
        return batch | {name: array[part] for name, array in more.items()}

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
    """Rows of sides of segments as arrays `tokens`, `targets` and `segments` [B, sides, width]."""
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


@runtime_checkable
class Rows(Protocol):
    """The rows that batches are made of."""

    def __len__(self) -> int: ...
    def at(self, indices: np.ndarray, part: slice = ...) -> Batch: ...
    def names(self, index: int) -> list[str]: ...


@dataclass(frozen=True)
class Batches:
    """Batches of `rows` rows of the data, by step number from 0.

    Each epoch has an order of its own, by (seed, epoch), or the data's if `shuffle` is off. An
    epoch's last batch is filled up from the next epoch. `part` = (first, end) is the range of a
    batch's rows that this host takes, padded like the whole batch.

    Raises:
        ValueError: If `part` or the data has no rows.
    """

    data: Rows
    rows: int
    seed: int = 0
    shuffle: bool = True
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not range(self.rows)[self._slice]:
            raise ValueError(f"no rows of {self.rows} lie in {self.part}")
        if not len(self.data):
            raise ValueError(f"no batch of {self.rows} rows in 0")
        object.__setattr__(self, "_order", shuffled(len(self.data), self.seed))

    def __call__(self, step: int) -> Batch:
        """This host's rows of a step's batch."""
        return self.data.at(self.indices(step), self._slice)

    @property
    def _slice(self) -> slice:
        return slice(*(self.part or (0, self.rows)))

    def indices(self, step: int) -> np.ndarray:
        """Indices in the data of a step's whole batch, over all hosts."""
        positions = np.arange(step * self.rows, (step + 1) * self.rows)
        if not self.shuffle:
            return positions % len(self.data)
        return np.array([self._order(int(position)) for position in positions])  # type: ignore[attr-defined]

    def names(self, step: int) -> list[str]:
        """Places in their files of the rows of a step's whole batch, over all hosts."""
        return [name for index in self.indices(step) for name in self.data.names(int(index))]


def hold_out(data: Data, count: int, *, seed: int = 0) -> tuple[Data, Data]:
    """Split the data into (rest, `count` rows drawn by the seed), both in the data's order.

    Raises:
        InputError: If no row would be left.
    """
    if not 0 < count < len(data):
        raise InputError(
            f"--held-out {count}: the data has {len(data)} rows; keep some to train on"
        )
    drawn = np.random.default_rng((seed, 2)).permutation(len(data))
    return data.chosen(np.sort(drawn[count:])), data.chosen(np.sort(drawn[:count]))
