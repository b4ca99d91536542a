from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from w2s_jax.text.batches import Crops, shuffled
from w2s_jax.text.tokenizer import pad_rows

END, PAD = 0, 1


@dataclass(frozen=True)
class Reviews:
    """Review i holds the numbers 1000 i + 100, 1000 i + 101 ..., so a token tells its place."""

    lengths: tuple[int, ...]

    def __len__(self):
        return len(self.lengths)

    def review(self, index):
        start = 1000 * index + 100
        return np.arange(start, start + self.lengths[index], dtype=np.uint16)


REVIEWS = Reviews((30, 3, 50, 7, 22))


@given(size=st.integers(1, 9), seed=st.integers(0, 5))
def test_every_epoch_holds_every_index_once(size, seed):
    order = shuffled(size, seed)
    for epoch in range(3):
        assert sorted(order(epoch * size + i) for i in range(size)) == list(range(size))


def test_epochs_are_in_different_orders():
    order = shuffled(50, 0)
    assert [order(i) for i in range(50)] != [order(50 + i) for i in range(50)]


def test_rows_are_padded_and_cut():
    tokens, mask = pad_rows([[5, 6, 7, 8], [9], []], 3, PAD)
    assert tokens.tolist() == [[5, 6, 7], [9, PAD, PAD], [PAD, PAD, PAD]]
    assert mask.tolist() == [[True] * 3, [True, False, False], [False] * 3]


def crops(**options):
    fixed = {
        "documents": REVIEWS, "labels": np.array([0, 1, 0, 1, 1]), "rows": 5, "widths": (6, 10),
        "first_id": END, "pad_id": PAD,
    }  # fmt: skip
    return Crops(**(fixed | options))


def test_a_batch_depends_on_its_step_alone():
    one, other = crops(), crops()
    later = one(4)
    for step in range(5):
        batch = other(step)
    for name in batch:
        np.testing.assert_array_equal(batch[name], later[name])
    assert (one(3)["tokens"].shape != later["tokens"].shape) or np.any(
        one(3)["tokens"] != later["tokens"]
    )


def test_crops_come_with_their_labels_and_one_width_a_step():
    seen = set()
    for step in range(8):
        batch = crops()(step)
        seen.add(batch["tokens"].shape[1])
        for row, mask, label in zip(*(batch[n] for n in ("tokens", "mask", "labels")), strict=True):
            kept = row[mask]
            assert kept[0] == END
            index = kept[1] // 1000
            assert label == crops().labels[index]
            assert np.all(np.diff(kept[1:]) == 1)
            assert len(kept) == min(batch["tokens"].shape[1], REVIEWS.lengths[index] + 1)
    assert seen == {6, 10}


def test_dropped_tokens_become_padding_that_is_seen():
    batch = crops(token_dropout=1.0)(0)
    assert np.all(batch["tokens"][:, 1:] == PAD)
    assert batch["mask"][:, :3].all()
