import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from w2s_jax.errors import InputError
from w2s_jax.text.batches import Data, TokenStore, hold_out


def numbers(count):
    """Row i holds i tokens i and one more, and stands on line i; the identity is their number."""
    sizes = np.arange(count) + 1
    values = np.repeat(np.arange(count, dtype=np.int32), sizes)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    targets = np.ones(len(values), np.int8)
    zeros = np.zeros(count, np.int64)
    store = TokenStore(
        [(values, offsets)], [(targets, offsets)], zeros, zeros, np.arange(count), zeros, zeros, {}
    )
    return Data("sequences", store, ("row",), str(count), {}, 0, 64, 1)


@given(st.integers(2, 30), st.data())
def test_every_row_is_in_one_part_and_the_seed_decides(count, data):
    kept = data.draw(st.integers(1, count - 1))
    train, held = hold_out(numbers(count), kept, seed=3)
    assert len(held) == kept
    assert sorted([*train.rows, *held.rows]) == list(range(count))
    again, _ = hold_out(numbers(count), kept, seed=3)
    assert again.identity == train.identity != held.identity
    np.testing.assert_array_equal(train.lengths, train.rows + 1)


def test_rows_are_those_of_the_data():
    train, _ = hold_out(numbers(9), 4)
    batch = train.at([2, 0], slice(1, 2))
    assert set(batch["tokens"][0, : train.rows[0] + 1]) == {train.rows[0]}
    assert train.names(2) == [f"row {train.rows[2]}"]


def test_what_stands_beside_rows_stays_beside_them():
    train, _ = hold_out(numbers(9).beside("own", np.arange(9)), 4)
    np.testing.assert_array_equal(train.at([2, 0])["own"], train.rows[[2, 0]])


@pytest.mark.parametrize("count", [9, 10, -1])
def test_something_must_be_left(count):
    with pytest.raises(InputError, match="--held-out"):
        hold_out(numbers(9), count)
