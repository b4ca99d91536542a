"""Tokenised training rows as padded batches: sequences, packed ones, pairs, labelled responses.

Files and options are the matter of text/training_data.py, the order of batches of text/order.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from w2s_jax.errors import InputError
from w2s_jax.text.batches import Batch
from w2s_jax.text.examples import Kind
from w2s_jax.text.packing import Packing
from w2s_jax.text.supervised import Side
from w2s_jax.text.token_store import TokenStore


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
