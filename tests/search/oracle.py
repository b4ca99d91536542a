"""A brute-force search in NumPy: every token by a full forward pass, every choice written out.

It shares with the package only the models' plain forward pass and the random bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
import pytest

from w2s_jax.models.model import Model
from w2s_jax.search import FunctionScorer, Guide, SearchConfig, SearchResult
from w2s_jax.search.methods import EFTProposer, Maximin

PADDED = 48


@dataclass(frozen=True)
class Kept:
    tokens: tuple[int, ...] = ()
    objectives: tuple[float, ...] = ()
    finished: bool = False

    @property
    def score(self) -> float:
        return sum(self.objectives)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max()
    return shifted - np.log(np.exp(shifted).sum())


def next_logprobs(model: Model) -> Callable[[Sequence[int]], np.ndarray]:
    """Log-probabilities after a sequence, by a full forward pass; remembered, as draws repeat."""
    known: dict[tuple[int, ...], np.ndarray] = {}

    def look_up(sequence: Sequence[int]) -> np.ndarray:
        key = tuple(sequence)
        if key not in known:
            padded = np.zeros((1, PADDED), np.int32)
            padded[0, : len(key)] = key
            logits = np.asarray(model(padded))[0]
            for end in range(1, len(key) + 1):
                known.setdefault(key[:end], log_softmax(logits[end - 1]))
        return known[key]

    return look_up


@partial(jax.jit, static_argnums=4)
def gumbels(
    seed: np.uint32, row_id: np.uint32, position: np.int32, lane: np.int32, count: int
) -> jax.Array:
    """The noise of one draw; a program, as each of its operations would be one."""
    key = jax.random.key(seed)
    for number in (row_id, position, lane):
        key = jax.random.fold_in(key, number)
    return jax.random.gumbel(key, (count,))


def spread_over_simplex(count: int, steps: int) -> np.ndarray:
    """Points [n, count] of a regular grid on the simplex."""
    axes = np.meshgrid(*[np.linspace(0, 1, steps + 1)] * (count - 1), indexing="ij")
    free = np.stack([axis.ravel() for axis in axes], axis=1).reshape(-1, count - 1)
    free = free[free.sum(axis=1) <= 1 + 1e-9]
    return np.concatenate([free, 1 - free.sum(axis=1, keepdims=True)], axis=1)


def log_mean_exp(values: np.ndarray, weights: np.ndarray, scale: float) -> np.ndarray:
    """(1/scale) log mean_c exp(scale·Σ_j w_j·V_cj) for weights [n, J] and values [c, J]."""
    mixed = scale * weights.astype(np.float64) @ values.astype(np.float64).T
    most = mixed.max(axis=1)
    return (most + np.log(np.exp(mixed - most[:, None]).mean(axis=1))) / scale


def worst_weights(values: np.ndarray, scale: float) -> np.ndarray:
    """What minimises `log_mean_exp`, on ever finer grids about the best point; it is convex."""
    grid = spread_over_simplex(values.shape[1], 60)
    best, width = np.full(values.shape[1], 1 / values.shape[1]), 1.0
    for _ in range(12):
        points = np.maximum(best + width * (grid - grid.mean(axis=0)), 0)
        points = np.concatenate([best[None], points / points.sum(axis=1, keepdims=True)])
        best = points[np.argmin(log_mean_exp(values, points, scale))]
        width /= 3
    return best


class Oracle:
    """Chunk-level beam search and its presets, one prompt at a time.

    behind: a prompt, and what each guide model reads in its place. decode: for scorers of texts
    and stop strings.
    """

    def __init__(
        self,
        policy: Model,
        guides: Sequence[Guide],
        config: SearchConfig,
        eos: int,
        *,
        scorers: Sequence[FunctionScorer] = (),
        decode: Callable[[Sequence[int]], str] | None = None,
        behind: tuple[Sequence[int], Sequence[Sequence[int]]] | None = None,
    ):
        self.policy = next_logprobs(policy)
        prompt, others = behind or ((), [()] * 2 * len(guides))

        def reader(model: Model, other: Sequence[int]) -> Callable[[Sequence[int]], np.ndarray]:
            look_up = next_logprobs(model)
            return lambda sequence: look_up([*other, *sequence[len(prompt) :]])

        self.guides = [
            (guide.weight, reader(guide.tuned, up), reader(guide.untuned, down))
            for guide, up, down in zip(guides, others[0::2], others[1::2], strict=True)
        ]
        self.config, self.eos = config, eos
        self.scorers, self.decode = scorers, decode

    def proposal_logits(self, sequence: Sequence[int]) -> np.ndarray:
        logits = policy = self.policy(sequence)
        proposer = self.config.proposer
        if isinstance(proposer, EFTProposer):
            for weight, tuned, untuned in self.guides:
                ratio = tuned(sequence) - untuned(sequence)
                logits = logits + proposer.beta * weight * ratio
            if proposer.top_k:
                unlikely = np.argsort(-policy, kind="stable")[proposer.top_k :]
                logits[unlikely] = -np.inf
        return logits

    def draw(self, sequence: Sequence[int], row_id: int, position: int, lane: int) -> int:
        sampling, logits = self.config.sampling, self.proposal_logits(sequence)
        if sampling.temperature == 0:
            return int(np.argmax(logits))
        logits = logits / sampling.temperature
        order = np.arange(len(logits))
        if sampling.top_k or sampling.top_p < 1:
            order = np.argsort(-logits, kind="stable")[: sampling.top_k or None]
        kept = logits[order]
        if sampling.top_p < 1:
            p = np.exp(log_softmax(kept))
            kept = np.where(np.cumsum(p) - p < sampling.top_p, kept, -np.inf)
        where = (np.uint32(row_id), np.int32(position), np.int32(lane))
        noise = gumbels(np.uint32(self.config.seed), *where, len(order))
        return int(order[np.argmax(kept + np.asarray(noise))])

    def implicit_rewards(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
        totals = []
        for weight, tuned, untuned in self.guides:
            total = 0.0
            for i, token in enumerate(tokens):
                before = [*prompt, *tokens[:i]]
                total += weight * (tuned(before)[token] - untuned(before)[token])
            totals.append(total)
        return totals

    def implicit_reward(self, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        return sum(self.implicit_rewards(prompt, tokens))

    def text_scores(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
        scores = []
        for scorer in self.scorers:
            assert self.decode is not None
            said = scorer.function([self.decode(prompt)], [self.decode(tokens)])
            scores.append(scorer.weight * said[0])
        return scores

    def before_stop(self, tokens: Sequence[int]) -> list[int] | None:
        """The fewest first tokens whose text begins with all that precedes a stop string."""
        if not self.config.stop:
            return None
        assert self.decode is not None
        text = self.decode(tokens)
        places = [text.find(stop) for stop in self.config.stop if stop in text]
        if not places:
            return None
        kept, count = text[: min(places)], 0
        while not self.decode(tokens[:count]).startswith(kept):
            count += 1
        return list(tokens[:count])

    def extend(self, prompt: Sequence[int], parent: Kept, row_id: int, lane: int) -> Kept:
        tokens = list(parent.tokens)
        ended = False
        for _ in range(self.config.length):
            if len(tokens) == self.config.max_new_tokens or ended:
                break
            tokens.append(self.draw([*prompt, *tokens], row_id, len(tokens), lane))
            ended = tokens[-1] == self.eos
        kept = self.before_stop(tokens)
        tokens, ended = (tokens, ended) if kept is None else (kept, True)
        cut = not ended and len(tokens) == self.config.max_new_tokens
        adds_end = self.config.reference_quirks and cut
        rewards = self.implicit_rewards(prompt, [*tokens, self.eos] if adds_end else tokens)
        return Kept(tuple(tokens), (*rewards, *self.text_scores(prompt, tokens)), ended)

    def select(self, candidates: Sequence[Kept]) -> list[Kept]:
        weights = np.ones(len(candidates[0].objectives))
        if isinstance(self.config.selector, Maximin):
            values = np.array([kept.objectives for kept in candidates])
            weights = worst_weights(values, self.config.selector.scale)
        key = [-float(np.dot(weights, kept.objectives)) for kept in candidates]
        order = sorted(range(len(candidates)), key=key.__getitem__)
        return [candidates[index] for index in order[: self.config.beam_width]]

    def search(self, prompt: Sequence[int], row_id: int, chunks: int | None = None) -> list[Kept]:
        """The hypotheses best first, after so many chunks (None: at the end)."""
        width, count = self.config.beam_width, self.config.successors
        beam = [Kept()] * width
        for _ in range(self.config.chunks if chunks is None else chunks):
            rows = [(w, w * count + k) for w in range(width) for k in range(count)]
            candidates = [
                self.extend(prompt, beam[w], row_id, lane)
                for w, lane in rows
                if not beam[w].finished
            ]
            copies = count if self.config.reference_quirks else 1
            candidates += [kept for kept in beam if kept.finished for _ in range(copies)]
            if self.config.selector.reorders:
                beam = self.select(candidates)
            else:
                live = iter(candidates)
                beam = [kept if kept.finished else next(live) for kept in beam]
            if all(kept.finished for kept in beam):
                break
        if self.config.selector.reorders:
            return beam
        return sorted(beam, key=lambda kept: -kept.score)


def assert_found(
    oracle: Oracle, prompts: Sequence[Sequence[int]], results: Sequence[SearchResult]
) -> list[list[Kept]]:
    """That the results are what the oracle finds, and what it finds."""
    beams = [
        oracle.search(prompt, result.row_id)
        for prompt, result in zip(prompts, results, strict=True)
    ]
    for beam, result in zip(beams, results, strict=True):
        assert [h.tokens for h in result.hypotheses] == [k.tokens for k in beam]
        assert [h.finished for h in result.hypotheses] == [k.finished for k in beam]
        for hypothesis, kept in zip(result.hypotheses, beam, strict=True):
            np.testing.assert_allclose(hypothesis.objectives, kept.objectives, atol=2e-4, rtol=1e-4)
            assert hypothesis.score == pytest.approx(kept.score, abs=2e-4, rel=1e-4)
    return beams
