import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from w2s_jax.text.batches import best_fit


def by_hand(lengths, width):
    """Best fit as one says it: the longest first, into the fullest row that still has room."""
    rows = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rooms = [width - sum(lengths[i] for i in row) for row in rows]
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= lengths[index]]
        if fitting:
            rows[min(fitting)[1]].append(index)
        else:
            rows.append([index])
    return rows


def rows_of(packing):
    return [packing.row(index).tolist() for index in range(len(packing))]


documents = st.integers(1, 40).flatmap(
    lambda width: st.tuples(st.just(width), st.lists(st.integers(1, width), max_size=60))
)


@given(documents)
def test_every_document_is_in_one_row_whole_and_rows_are_those_of_the_plain_rule(drawn):
    width, lengths = drawn
    rows = rows_of(best_fit(np.array(lengths, np.int32), width))
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= width for row in rows)
    assert rows == by_hand(lengths, width)


def test_no_documents_make_no_rows():
    assert len(best_fit(np.array([], np.int32), 8)) == 0


@pytest.mark.parametrize("lengths", [[3, 9], [0, 3]])
def test_what_cannot_be_packed_is_a_fault_of_the_caller(lengths):
    with pytest.raises(ValueError, match="1 to 8 tokens"):
        best_fit(np.array(lengths), 8)


def test_many_documents_are_packed_in_little_time():
    lengths = np.random.default_rng(0).integers(1, 1025, 50_000)
    packing = best_fit(lengths, 1024)
    assert len(packing) * 1024 < 1.01 * lengths.sum()
