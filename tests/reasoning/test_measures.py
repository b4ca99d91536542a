import itertools
import math
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from w2s_jax.errors import InputError
from w2s_jax.reasoning.measures import (
    accuracy,
    gap_over_seeds,
    gap_recovered,
    majority_at_k,
    over_seeds,
    pass_at_k,
    proportion,
    student_t,
)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson_intervals_as_tabled(correct, total, low, high):
    found = proportion(correct, total)
    assert found.value == correct / total
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 300), st.data())
def test_the_ends_of_an_interval_are_1_96_standard_errors_off(total, data):
    correct = data.draw(st.integers(0, total))
    found = proportion(correct, total)
    assert 0 <= found.low <= found.value <= found.high <= 1
    for end in {found.low, found.high} - {0.0, 1.0}:
        off = abs(found.value - end) / math.sqrt(end * (1 - end) / total)
        assert off == pytest.approx(1.959964, abs=1e-5)


def test_accuracy_of_nothing_is_not_known():
    assert accuracy([]) is None
    assert accuracy([True, False, True, True]).value == 0.75


def test_a_share_of_nothing_is_refused():
    with pytest.raises(InputError, match="3 right of 2 answers"):
        proportion(3, 2)


answers = st.lists(st.sampled_from(["1", "2", "3", ""]), min_size=1, max_size=8)


@given(answers, st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples, data):
    k = data.draw(st.integers(1, len(samples)))
    subsets = list(itertools.combinations(samples, k))
    expected = fmean("1" in subset for subset in subsets)
    assert pass_at_k(len(samples), samples.count("1"), k) == pytest.approx(expected, abs=1e-12)


@given(answers, st.sets(st.sampled_from(["1", "2"])), st.data())
def test_majority_at_k_is_the_mean_over_subsets(samples, right, data):
    k = data.draw(st.integers(1, len(samples)))

    def vote(subset):
        most = max(map(subset.count, subset))
        tied = {answer for answer in subset if subset.count(answer) == most}
        return len(tied & right) / len(tied)

    expected = fmean(vote(subset) for subset in itertools.combinations(samples, k))
    found = majority_at_k(samples, lambda answer: answer in right, k)
    assert found == pytest.approx(expected, abs=1e-12)


def test_majority_of_many_samples_agrees_with_drawing():
    rng = np.random.default_rng(0)
    samples = np.repeat([0, 1, 2, 3], [14, 12, 9, 5])
    won = []
    for _ in range(20_000):
        counts = np.bincount(rng.permutation(samples)[:15], minlength=4)
        won.append((counts[0] == counts.max()) / (counts == counts.max()).sum())
    found = majority_at_k([str(one) for one in samples], lambda answer: answer == "0", 15)
    assert found == pytest.approx(np.mean(won), abs=4 * np.std(won) / math.sqrt(len(won)))


def test_the_empty_answer_is_never_right_but_it_votes():
    assert majority_at_k(["", "", "7"], lambda answer: True, 3) == 0.0
    assert majority_at_k(["", "7"], lambda answer: True, 2) == 0.5


@pytest.mark.parametrize("k", [0, 4])
def test_k_beyond_the_samples_is_refused(k):
    with pytest.raises(InputError, match=f"k = {k} of 3 samples"):
        pass_at_k(3, 1, k)
    with pytest.raises(InputError, match=f"k = {k} of 3 samples"):
        majority_at_k(["1", "2", "3"], lambda answer: True, k)


def test_the_gap_recovered():
    assert gap_recovered(0.4, 0.5, 0.6) == pytest.approx(0.5)
    assert gap_recovered(0.4, 0.3, 0.6) == pytest.approx(-0.5)
    assert gap_recovered(0.6, 0.7, 0.6) is None
    found = gap_over_seeds([0.4, 0.4], [0.5, 0.6], [0.6, 0.6])
    assert found.mean == pytest.approx(0.75)
    assert gap_over_seeds([0.4, 0.6], [0.5, 0.6], [0.6, 0.6]) is None


# Two-sided 95 % (and one 99 %) quantiles as printed in tables of Student's distribution.
@pytest.mark.parametrize(
    ("freedom", "level", "expected"),
    [(1, 0.95, 12.7062), (2, 0.95, 4.30265), (3, 0.95, 3.18245), (4, 0.95, 2.77645),
     (9, 0.95, 2.26216), (30, 0.95, 2.04227), (7, 0.99, 3.49948)],
)  # fmt: skip
def test_quantiles_of_student(freedom, level, expected):
    assert student_t(freedom, level) == pytest.approx(expected, rel=3e-6)


def test_quantiles_of_student_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom, level in itertools.product((1, 2, 3, 5, 12, 101), (0.5, 0.9, 0.95, 0.999)):
        expected = stats.t.ppf((1 + level) / 2, freedom)
        assert student_t(freedom, level) == pytest.approx(expected, rel=1e-9)


def test_mean_and_interval_over_seeds():
    found = over_seeds([0.40, 0.44, 0.48])
    half = 4.302653 * 0.04 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((0.44, 0.44 - half, 0.44 + half))
    assert over_seeds([0.4]).as_row() == {"mean": 0.4, "low": None, "high": None, "count": 1}
    with pytest.raises(InputError, match="no value"):
        over_seeds([])
