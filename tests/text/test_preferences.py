import numpy as np

from w2s_jax.text.preferences import PairBatches, pair_arrays

PAIRS = pair_arrays(
    [[0, 5], [0, 6, 7]], [[10, 11, 12], [13]], [[14], [15, 16, 17, 18, 19, 20]], pad_id=1
)


def test_pairs_lie_side_by_side_and_only_responses_are_targets():
    assert PAIRS.tokens.shape == (2, 2, 16)
    assert PAIRS.tokens[0, 0, :6].tolist() == [0, 5, 10, 11, 12, 1]
    assert PAIRS.tokens[1, 1, :10].tolist() == [0, 6, 7, 15, 16, 17, 18, 19, 20, 1]
    assert PAIRS.mask.sum(-1).tolist() == [[5, 3], [4, 9]]
    assert PAIRS.targets.sum(-1).tolist() == [[3, 1], [1, 6]]
    assert PAIRS.tokens[PAIRS.targets].min() >= 10


def test_batches_keep_each_pair_with_its_reference():
    reference = np.array([[-1.0, -2.0], [-3.0, -4.0]], np.float32)
    batches = PairBatches(PAIRS, reference, rows=2)
    for step in range(4):
        batch = batches(step)
        for tokens, values in zip(batch["tokens"], batch["reference"], strict=True):
            index = int(tokens[0, 1]) - 5
            np.testing.assert_array_equal(values, reference[index])


def test_parts_split_the_pairs():
    assert len(PAIRS.part(0, 1)) == len(PAIRS.part(-1)) == 1
    np.testing.assert_array_equal(PAIRS.part(-1).tokens[0], PAIRS.tokens[1])
