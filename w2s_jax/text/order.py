"""Which rows are in which batch: a pure function of the step, the same on every host."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from w2s_jax.text.batches import Batch, shuffled


@runtime_checkable
class Rows(Protocol):
    """What batches are made of."""

    def __len__(self) -> int: ...
    def at(self, indices: np.ndarray, part: slice = ...) -> Batch: ...
    def names(self, index: int) -> list[str]: ...


@dataclass(frozen=True)
class Batches:
    """Batches of `rows` rows of the data, by step number from 0.

    Every epoch has an order of its own, by (seed, its number), or the data's where `shuffle` is
    off. The rows that an epoch's last batch lacks come from the next epoch's order ("fill"), or
    that batch is left out ("drop"). `part` = (first, end) are the rows of a batch that a host
    takes: as wide as the whole batch and made from all of it.

    Raises ValueError where `part` has no rows, or "drop" leaves no batch.
    """

    data: Rows
    rows: int
    seed: int = 0
    shuffle: bool = True
    part: tuple[int, int] | None = None
    last: Literal["fill", "drop"] = "fill"

    def __post_init__(self) -> None:
        if not range(self.rows)[self._slice]:
            raise ValueError(f"no rows of {self.rows} lie in {self.part}")
        if not len(self.data) or (self.last == "drop" and len(self.data) < self.rows):
            raise ValueError(f"no batch of {self.rows} rows in {len(self.data)}")
        object.__setattr__(self, "_order", shuffled(len(self.data), self.seed))

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every row is read once; the last may reach into the next epoch."""
        whole, more = divmod(len(self.data), self.rows)
        return whole + (1 if more and self.last == "fill" else 0)

    def __call__(self, step: int) -> Batch:
        """This host's rows of a step's batch."""
        return self.data.at(self.indices(step), self._slice)

    @property
    def _slice(self) -> slice:
        return slice(*(self.part or (0, self.rows)))

    def indices(self, step: int) -> np.ndarray:
        """Rows of the data in the whole batch of a step, of all hosts."""
        first = step * self.rows
        if self.last == "drop":
            epoch, place = divmod(step, self.steps_per_epoch)
            first = epoch * len(self.data) + place * self.rows
        positions = range(first, first + self.rows)
        if not self.shuffle:
            return np.array([position % len(self.data) for position in positions])
        order = self._order  # type: ignore[attr-defined]
        return np.array([order(position) for position in positions])

    def names(self, step: int) -> list[str]:
        """Where the rows of a step's batch, of all hosts, stand in their files."""
        return [name for index in self.indices(step) for name in self.data.names(int(index))]


def in_order(data: Rows, rows: int) -> Iterator[Batch]:
    """Every row of the data once, in its order, `rows` at a time; the last batch may be smaller."""
    for start in range(0, len(data), rows):
        indices = np.arange(start, min(start + rows, len(data)))
        yield data.at(indices, slice(0, len(indices)))
