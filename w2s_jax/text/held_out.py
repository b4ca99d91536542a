"""A part of the rows of training data kept from training, to evaluate on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from w2s_jax.errors import InputError
from w2s_jax.text.batches import Batch


@dataclass(frozen=True)
class Part:
    """Some rows of data, in the order of `rows`; itself data for batches."""

    data: Any
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row."""
        return self.data.lengths[self.rows]

    @property
    def identity(self) -> str:
        """Equal for equal rows of equal data."""
        digest = hashlib.sha256(self.rows.astype(np.int64).tobytes())
        return f"{self.data.identity}:{digest.hexdigest()[:16]}"

    def at(self, indices: np.ndarray | Sequence[int], part: slice = slice(None)) -> Batch:
        """The batch of these rows, or the `part` of it that a host takes."""
        return self.data.at(self.rows[np.asarray(indices)], part)

    def names(self, index: int) -> list[str]:
        """Where a row stands in its file."""
        return self.data.names(int(self.rows[index]))


def hold_out(data: Any, count: int, *, seed: int = 0) -> tuple[Part, Part]:
    """(what is left to train on, `count` rows drawn by the seed), each in the order of the data.

    Raises InputError where no row would be left.
    """
    if not 0 < count < len(data):
        raise InputError(
            f"--held-out {count}: the data has {len(data)} rows; keep some to train on"
        )
    drawn = np.random.default_rng((seed, 2)).permutation(len(data))
    return Part(data, np.sort(drawn[count:])), Part(data, np.sort(drawn[:count]))
