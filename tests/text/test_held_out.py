from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from w2s_jax.errors import InputError
from w2s_jax.text.batches import hold_out


@dataclass(frozen=True)
class Numbers:
    """Row i holds i; the identity is the number of rows."""

    count: int

    def __len__(self):
        return self.count

    @property
    def lengths(self):
        return np.arange(self.count)

    @property
    def identity(self):
        return str(self.count)

    def at(self, indices, part=slice(None)):
        return {"tokens": np.asarray(indices)[part]}

    def names(self, index):
        return [f"row {index}"]


@given(st.integers(2, 30), st.data())
def test_every_row_is_in_one_part_and_the_seed_decides(count, data):
    kept = data.draw(st.integers(1, count - 1))
    train, held = hold_out(Numbers(count), kept, seed=3)
    assert len(held) == kept
    assert sorted([*train.rows, *held.rows]) == list(range(count))
    again, _ = hold_out(Numbers(count), kept, seed=3)
    assert again.identity == train.identity != held.identity
    np.testing.assert_array_equal(train.lengths, train.rows)


def test_rows_are_those_of_the_data():
    train, _ = hold_out(Numbers(9), 4)
    batch = train.at([2, 0], slice(1, 2))
    assert batch["tokens"].tolist() == [train.rows[0]]
    assert train.names(2) == [f"row {train.rows[2]}"]


@pytest.mark.parametrize("count", [9, 10, -1])
def test_something_must_be_left(count):
    with pytest.raises(InputError, match="--held-out"):
        hold_out(Numbers(9), count)
