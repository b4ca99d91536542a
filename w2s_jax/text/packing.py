"""Which documents share a row: best-fit-decreasing packing. Lengths in, indices out; no tokens."""

import heapq
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int64


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
    """Pack documents into rows of `width` tokens, the longest first, each where it leaves least.

    Every document is in exactly one row, whole. The result depends on the arguments alone: equal
    lengths keep their order, and of rows with equal room the oldest is filled, as in TRL's "bfd"
    (arXiv 2404.10830). Raises ValueError for a document that is empty or longer than a row.
    """
    if len(lengths) and not 0 < lengths.min() <= lengths.max() <= width:
        raise ValueError(f"documents must have 1 to {width} tokens")
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    rows: list[list[int]] = []
    # The rows with so much room, the oldest first. Which rooms occur is a set of bits, so that the
    # least one that suffices is found at once.
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
