from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from w2s_jax.text.batches import Batches


@dataclass(frozen=True)
class Numbers:
    """Row i holds i."""

    size: int

    def __len__(self):
        return self.size

    def at(self, indices, part=slice(None)):
        return {"tokens": np.asarray(indices)[part]}

    def names(self, index):
        return [f"row {index}"]


def read(batches, steps):
    return [batches(step)["tokens"].tolist() for step in range(steps)]


@given(size=st.integers(1, 20), rows=st.integers(1, 8), seed=st.integers(0, 3))
def test_filled_batches_read_every_row_once_an_epoch(size, rows, seed):
    batches = Batches(Numbers(size), rows, seed)
    flat = [row for batch in read(batches, 3 * -(-size // rows)) for row in batch]
    for epoch in range(3):
        assert sorted(flat[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_a_batch_depends_on_its_step_alone():
    batches = Batches(Numbers(23), 4, seed=7)
    forward = read(batches, 30)
    again = Batches(Numbers(23), 4, seed=7)
    assert [again(step)["tokens"].tolist() for step in reversed(range(30))] == forward[::-1]
    assert read(Batches(Numbers(23), 4, seed=8), 30) != forward


@pytest.mark.parametrize("hosts", [1, 2, 3, 6])
def test_hosts_read_their_parts_of_the_same_batch(hosts):
    whole = Batches(Numbers(23), 6)
    own = 6 // hosts
    parts = [(host * own, (host + 1) * own) for host in range(hosts)]
    shares = [Batches(Numbers(23), 6, part=part) for part in parts]
    for step in range(9):
        parts = [share(step)["tokens"] for share in shares]
        assert {len(part) for part in parts} == {6 // hosts}
        np.testing.assert_array_equal(np.concatenate(parts), whole(step)["tokens"])
        assert all(share.names(step) == whole.names(step) for share in shares)


def test_without_shuffling_rows_come_as_they_stand():
    assert read(Batches(Numbers(5), 2, shuffle=False), 4) == [[0, 1], [2, 3], [4, 0], [1, 2]]


def test_names_are_those_of_the_batch():
    batches = Batches(Numbers(5), 2)
    assert batches.names(3) == [f"row {index}" for index in batches(3)["tokens"]]


def test_a_part_has_rows():
    with pytest.raises(ValueError, match="rows"):
        Batches(Numbers(23), rows=4, part=(4, 8))


def test_no_rows_make_no_batches():
    with pytest.raises(ValueError, match="no batch"):
        Batches(Numbers(0), 4)
