"""How near a search came to another choice, told by the brute-force search on the CPU."""

import math
from collections.abc import Sequence
from itertools import pairwise

import jax
import numpy as np

from tests.search.oracle import Kept, Oracle
from w2s_jax.search.results import SearchResult


class Margins(Oracle):
    """A brute-force search that remembers the least margin by which it chose anything.

    `narrowest`: of draws in nats of a logit, of selections in the score.
    """

    narrowest = math.inf

    def draw(self, sequence: Sequence[int], row_id: int, position: int, lane: int) -> int:
        sampling = self.config.sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 0, 1.0)
        key = jax.random.key(self.config.seed)
        for number in (row_id, position, lane):
            key = jax.random.fold_in(key, number)
        logits = self.proposal_logits(sequence)
        noisy = logits + np.asarray(jax.random.gumbel(key, (len(logits),)))
        second, first = np.sort(noisy)[-2:]
        self.narrowest = min(self.narrowest, first - second)
        return int(np.argmax(noisy))

    def select(self, candidates: Sequence[Kept]) -> list[Kept]:
        ranked = sorted(candidates, key=lambda kept: -kept.score)[: self.config.beam_width + 1]
        for better, worse in pairwise(ranked):
            # Of two that say the same, either will do.
            if better.tokens != worse.tokens:
                self.narrowest = min(self.narrowest, better.score - worse.score)
        return super().select(candidates)


def margin(oracle: Margins, prompt: Sequence[int], row_id: int) -> float:
    """The least margin of a prompt's search."""
    oracle.narrowest = math.inf
    oracle.search(prompt, row_id)
    return oracle.narrowest


def assert_alike(
    found: Sequence[SearchResult],
    expected: Sequence[SearchResult],
    prompts: Sequence[Sequence[int]],
    oracle: Margins,
    *,
    near: float,
) -> None:
    """Equal choices with scores within `near`, or other ones where something was within it."""
    for ours, right, prompt in zip(found, expected, prompts, strict=True):
        if [h.tokens for h in ours.hypotheses] == [h.tokens for h in right.hypotheses]:
            scores = [[h.score for h in one.hypotheses] for one in (ours, right)]
            np.testing.assert_allclose(*scores, atol=near, rtol=near)
        else:
            least = margin(oracle, prompt, right.row_id)
            assert least < near, f"row {right.row_id} differs, with nothing within {least:.2g}"
