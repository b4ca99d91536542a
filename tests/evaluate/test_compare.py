import numpy as np
import pytest

from w2s_jax.errors import InputError
from w2s_jax.evaluate.rewards import (
    BLOCK,
    bootstrap_interval,
    check_same_prompts,
    compare,
    mean_and_stderr,
    points,
    summarise,
)


def test_a_summary_is_worked_out_by_hand():
    rewards = np.array([1.0, 2.0, 6.0], np.float32)
    texts = ["one two", "", "äö\n three four "]
    summary = summarise(rewards, texts, np.array([2, 0, 7]))
    assert summary.rows == 3
    assert summary.reward == pytest.approx(3.0)
    # s² = (4 + 1 + 9) / 2 = 7
    assert summary.stderr == pytest.approx((7 / 3) ** 0.5)
    assert summary.characters == pytest.approx((7 + 0 + 15) / 3)
    assert summary.words == pytest.approx((2 + 0 + 3) / 3)
    assert summary.tokens == pytest.approx(3.0)


def test_mean_and_standard_error():
    mean, stderr = mean_and_stderr(np.array([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3.0
    assert stderr == pytest.approx(np.sqrt(14 / 3) / 2)


def test_a_single_row_has_no_standard_error():
    assert mean_and_stderr(np.array([2.5], np.float32)) == (2.5, None)
    found = compare(np.array([1.0]), np.array([0.0]))
    assert (found.win_rate, found.low, found.high, found.difference_stderr) == (1, 1, 1, None)


def test_wins_ties_and_losses():
    ours, theirs = np.array([3.0, 1.0, 0.0, -1.0, 5.0]), np.array([1.0, 1.0, 2.0, -2.0, 5.0])
    np.testing.assert_array_equal(points(ours, theirs), [1, 0.5, 0, 1, 0.5])
    found = compare(ours, theirs)
    assert (found.rows, found.wins, found.ties, found.losses) == (5, 2, 2, 1)
    assert found.win_rate == pytest.approx(0.6)
    assert found.difference == pytest.approx(0.2)
    turned = compare(theirs, ours)
    assert turned.win_rate == pytest.approx(0.4)
    assert (turned.wins, turned.losses) == (1, 2)


def test_float32_rewards_that_differ_do_not_tie():
    one = np.array([1e4], np.float32)
    assert points(one, np.nextafter(one, np.float32(np.inf))) == 0.0


def test_the_interval_is_that_of_the_binomial():
    """Resampling a share p of n ones draws Binomial(n, p) / n; its quantiles are known."""
    values = np.repeat([0.0, 1.0], [60, 40])
    low, high = bootstrap_interval(values, samples=40_000, seed=1)
    # scipy.stats.binom.ppf([0.025, 0.975], 100, 0.4) = 31, 50
    assert low == pytest.approx(0.31, abs=0.011)
    assert high == pytest.approx(0.50, abs=0.011)


def test_the_interval_is_a_function_of_its_seed_and_covers_the_mean():
    values = np.random.default_rng(0).normal(size=200)
    one, same, other = (bootstrap_interval(values, seed=seed) for seed in (3, 3, 4))
    assert one == same != other
    assert one[0] < values.mean() < one[1]
    narrow = bootstrap_interval(values, seed=3, level=0.5)
    assert one[0] < narrow[0] < narrow[1] < one[1]


def test_many_rows_are_drawn_block_by_block():
    values = np.arange(BLOCK // 3, dtype=np.float64)
    low, high = bootstrap_interval(values, samples=7)
    spread = values.std() / np.sqrt(len(values))
    assert abs(low - values.mean()) < 5 * spread
    assert abs(high - values.mean()) < 5 * spread


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(7)
    covered = 0
    for trial in range(300):
        sample = (rng.random(120) < 0.7).astype(float)
        low, high = bootstrap_interval(sample, samples=400, seed=trial)
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 300 <= 0.985


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (["a", "x", "y"], "b.jsonl line 2: another prompt than in a.jsonl"),
        (["a", "b"], "a.jsonl has 3 rows and b.jsonl 2; they agree up to line 2"),
        (["a", "b", "c", "d"], "a.jsonl has 3 rows and b.jsonl 4"),
    ],
)
def test_other_prompts_are_named_by_their_line(theirs, message):
    with pytest.raises(InputError, match=message):
        check_same_prompts(["a", "b", "c"], theirs, ("a.jsonl", "b.jsonl"))


def test_the_same_prompts_pass():
    check_same_prompts(["a", "b"], ["a", "b"], ("a", "b"))
