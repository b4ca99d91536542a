"""Batches of token ids at fixed shapes, each a pure function of its step: data resumes exactly.

Holds no tokenizer and no model: documents are integer arrays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32

Batch = dict[str, np.ndarray]


@runtime_checkable
class Documents(Protocol):
    """Token ids without special tokens, by index."""

    def __len__(self) -> int: ...
    def review(self, index: int) -> np.ndarray: ...


def shuffled(size: int, seed: int) -> Callable[[int], int]:
    """An endless order of `range(size)`: position → index, shuffled anew for every epoch."""

    @lru_cache(maxsize=2)
    def epoch(number: int) -> np.ndarray:
        return np.random.default_rng((seed, number)).permutation(size)

    return lambda position: int(epoch(position // size)[position % size])


def power_of_two(count: int, least: int) -> int:
    """The smallest power of two that is not below `count` nor `least`, itself a power of two.

    What is padded to such sizes takes few shapes, and so few programs.
    """
    return max(least, 1 << (max(count, 1) - 1).bit_length())


def pad_rows(
    rows: Sequence[Sequence[int] | np.ndarray], width: int, pad_id: int
) -> tuple[Int32[np.ndarray, "B X"], Bool[np.ndarray, "B X"]]:
    """Right-pad rows to `width` (longer ones are cut); the mask is True on real tokens."""
    tokens = np.full((len(rows), width), pad_id, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        row = row[:width]
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = True
    return tokens, mask


@dataclass(frozen=True)
class Crops:
    """Classification batches: one random crop of every document, opened by `first_id`.

    All rows of a step share one width, drawn from `widths` (first token included). A share
    `openings` starts at the document's first token. Each token is replaced by `pad_id` with
    probability `token_dropout`. `batch(step)` holds `tokens`, `mask` [rows, width] and `labels`
    [rows].
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
