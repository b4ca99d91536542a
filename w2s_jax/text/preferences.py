"""Preference pairs as padded arrays: every pair side by side, chosen first.

Holds no tokenizer and no model; a side is a prompt's and a response's token ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32

from w2s_jax.text.batches import Batch, pad_rows, shuffled

Ids = Sequence[int]


@dataclass(frozen=True)
class PairArrays:
    """Pairs at one width; `targets` is True on response tokens, `mask` on prompt and response."""

    tokens: Int32[np.ndarray, "n 2 X"]
    mask: Bool[np.ndarray, "n 2 X"]
    targets: Bool[np.ndarray, "n 2 X"]

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int | None, stop: int | None = None) -> "PairArrays":
        """The pairs from `start` up to `stop`, as a slice takes them."""
        rows = slice(start, stop)
        return PairArrays(self.tokens[rows], self.mask[rows], self.targets[rows])

    def at(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The batch of these pairs."""
        arrays = {"tokens": self.tokens, "mask": self.mask, "targets": self.targets}
        return {name: array[np.asarray(indices)] for name, array in arrays.items()}


def pair_arrays(
    prompts: Sequence[Ids], chosen: Sequence[Ids], rejected: Sequence[Ids], *, pad_id: int
) -> PairArrays:
    """Lay pairs out at the width of the longest, rounded up to a multiple of 8."""
    sides = [
        [*prompt, *response]
        for prompt, pair in zip(prompts, zip(chosen, rejected, strict=True), strict=True)
        for response in pair
    ]
    width = -(-max(map(len, sides)) // 8) * 8
    tokens, mask = pad_rows(sides, width, pad_id)
    starts = np.repeat([len(prompt) for prompt in prompts], 2)
    targets = mask & (np.arange(width) >= starts[:, None])
    shape = (len(prompts), 2, width)
    return PairArrays(tokens.reshape(shape), mask.reshape(shape), targets.reshape(shape))


@dataclass(frozen=True)
class PairBatches:
    """Shuffled batches of pairs with their reference log-probs, by step number."""

    pairs: PairArrays
    reference: np.ndarray
    rows: int
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "_order", shuffled(len(self.pairs), self.seed))

    def __call__(self, step: int) -> Batch:
        order = self._order  # type: ignore[attr-defined]
        indices = [order(step * self.rows + i) for i in range(self.rows)]
        return self.pairs.at(indices) | {"reference": self.reference[indices]}
