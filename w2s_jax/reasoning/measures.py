"""Measures of answers: accuracy, pass@k, majority@k, gap recovered, and their intervals.

Pure functions of verdicts and counts.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import NormalDist, fmean, stdev

from w2s_jax.errors import InputError


@dataclass(frozen=True)
class Proportion:
    """A share of successes with an interval.

    Attributes:
        correct: Number of successes.
        total: Number of trials.
        value: The share, in [0, 1].
        low, high: Ends of its interval, in [0, 1].
    """

    correct: int
    total: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A mean over repetitions with an interval.

    Attributes:
        mean: The mean.
        low, high: Ends of its interval; NaN for a single repetition.
        count: Number of repetitions.
    """

    mean: float
    low: float
    high: float
    count: int

    def as_row(self) -> dict[str, int | float | None]:
        """The fields for JSON, where NaN is null."""
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(self).items()
        }


def proportion(correct: int, total: int, level: float = 0.95) -> Proportion:
    """A share with Wilson's score interval (Wilson 1927; without continuity correction).

    Raises:
        InputError: If the counts are no share.
    """
    if not 0 <= correct <= total or total == 0:
        raise InputError(f"{correct} right of {total} answers is no share")
    share, z = correct / total, NormalDist().inv_cdf((1 + level) / 2)
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + (z / total / 2) ** 2)
    low = 0.0 if correct == 0 else middle - half
    high = 1.0 if correct == total else middle + half
    return Proportion(correct, total, share, low, high)


def accuracy(results: Iterable[bool]) -> Proportion | None:
    """The share of right answers with its 95 % interval; None if none was judged."""
    results = list(results)
    return proportion(sum(results), len(results)) if results else None


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right: 1 − C(n−c, k) / C(n, k).

    Chen et al. 2021, arXiv 2107.03374, eq. 1; n is `samples`, c is `correct`.

    Raises:
        InputError: If k exceeds the samples.
    """
    _check_k(samples, k)
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_at_k(answers: Sequence[str], right: Callable[[str], bool], k: int) -> float:
    """Unbiased estimate of the chance that the most common answer of k samples is right.

    The expectation is over all subsets of size k drawn without replacement, exact for every n by
    generating functions; if j answers tie for the most votes, each counts 1/j. With k = n it is the
    plain majority vote, with k = 1 the share of right samples.

    Args:
        answers: Final answers of one question's samples in canonical form; an empty one votes too.
        right: Whether an answer is right.
        k: Number of samples.

    Raises:
        InputError: If k exceeds the samples.
    """
    _check_k(len(answers), k)
    counts = Counter(answers)
    chance = 0.0
    for answer in counts:
        if answer != "" and right(answer):
            others = tuple(sorted(counts[other] for other in counts if other != answer))
            chance += _wins(counts[answer], others, k)
    return chance


def gap_recovered(weak: float, result: float, ceiling: float) -> float | None:
    """Performance gap recovered, (result − weak) / (ceiling − weak); None if there is no gap.

    1 at the strong ceiling, 0 at the weak floor; not clipped. Burns et al. 2023, arXiv 2312.09390.
    """
    return (result - weak) / (ceiling - weak) if ceiling > weak else None


def gap_over_seeds(
    weak: Sequence[float], results: Sequence[float], ceilings: Sequence[float]
) -> Estimate | None:
    """The mean and interval of the gaps recovered by the seeds, each with its floor and ceiling.

    None if a seed has no gap.

    Raises:
        InputError: If there is no seed.
    """
    gaps = [gap_recovered(*of_seed) for of_seed in zip(weak, results, ceilings, strict=True)]
    known = [gap for gap in gaps if gap is not None]
    return over_seeds(known) if len(known) == len(gaps) else None


def over_seeds(values: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean over repetitions, with Student's t interval (len(values) − 1 degrees of freedom).

    Not clipped to [0, 1].

    Raises:
        InputError: If there is no value.
    """
    if not values:
        raise InputError("no value to take a mean over seeds of")
    mean, count = fmean(values), len(values)
    if count == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    half = student_t(count - 1, level) * stdev(values) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def student_t(freedom: int, level: float) -> float:
    """The quantile t of Student's distribution with P(|T| < t) = level."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + level) / 2))


def _check_k(samples: int, k: int) -> None:
    if not 1 <= k <= samples:
        raise InputError(f"k = {k} of {samples} samples; k must be from 1 to the samples drawn")


# Questions share few partitions of n samples into answers: there are 42 for n = 10.
@lru_cache(maxsize=1 << 14)
def _wins(own: int, others: tuple[int, ...], k: int) -> float:
    """The expected share of the win for an answer that `own` samples give, in a vote of k.

    For each number v of its votes, coefficients [votes, ties] count the ways in which the other
    answers take the remaining votes, with none above v and `ties` of them at v.
    """
    ways = 0.0
    total = math.comb(own + sum(others), k)
    for votes in range(1, min(own, k) + 1):
        counts = {(0, 0): 1}
        for other in others:
            after: dict[tuple[int, int], int] = {}
            for (taken, ties), so_far in counts.items():
                for more in range(min(other, votes, k - votes - taken) + 1):
                    state = (taken + more, ties + (more == votes))
                    after[state] = after.get(state, 0) + so_far * math.comb(other, more)
            counts = after
        for (taken, ties), so_far in counts.items():
            if taken == k - votes:
                ways += math.comb(own, votes) * so_far / total / (ties + 1)
    return ways
