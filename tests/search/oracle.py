"""A brute-force search in NumPy: every token by a full forward pass, every choice written out.

It shares with the package only the models' plain forward pass and the random bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from w2s_jax.models.model import Model
from w2s_jax.search import Guide, SearchConfig
from w2s_jax.search.proposers import EFTProposer

PADDED = 48


@dataclass(frozen=True)
class Kept:
    tokens: tuple[int, ...] = ()
    score: float = 0.0
    finished: bool = False


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


class Oracle:
    """Chunk-level beam search and its presets, one prompt at a time."""

    def __init__(self, policy: Model, guides: Sequence[Guide], config: SearchConfig, eos: int):
        self.policy = next_logprobs(policy)
        self.guides = [
            (guide.weight, next_logprobs(guide.tuned), next_logprobs(guide.untuned))
            for guide in guides
        ]
        self.config, self.eos = config, eos

    def proposal_logits(self, sequence: Sequence[int]) -> np.ndarray:
        logits = self.policy(sequence)
        if isinstance(self.config.proposer, EFTProposer):
            for weight, tuned, untuned in self.guides:
                ratio = tuned(sequence) - untuned(sequence)
                logits = logits + self.config.proposer.beta * weight * ratio
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
        key = jax.random.key(self.config.seed)
        for number in (row_id, position, lane):
            key = jax.random.fold_in(key, number)
        noise = np.asarray(jax.random.gumbel(key, (len(order),)))
        return int(order[np.argmax(kept + noise)])

    def implicit_reward(self, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        total = 0.0
        for weight, tuned, untuned in self.guides:
            for i, token in enumerate(tokens):
                before = [*prompt, *tokens[:i]]
                total += weight * (tuned(before)[token] - untuned(before)[token])
        return total

    def extend(self, prompt: Sequence[int], parent: Kept, row_id: int, lane: int) -> Kept:
        tokens = list(parent.tokens)
        for _ in range(self.config.length):
            if len(tokens) == self.config.max_new_tokens:
                break
            tokens.append(self.draw([*prompt, *tokens], row_id, len(tokens), lane))
            if tokens[-1] == self.eos:
                return Kept(tuple(tokens), self.implicit_reward(prompt, tokens), True)
        score = self.implicit_reward(prompt, tokens)
        if self.config.reference_quirks and len(tokens) == self.config.max_new_tokens:
            score = self.implicit_reward(prompt, [*tokens, self.eos])
        return Kept(tuple(tokens), score, False)

    def search(self, prompt: Sequence[int], row_id: int) -> list[Kept]:
        width, count = self.config.beam_width, self.config.successors
        beam = [Kept()] * width
        for _ in range(self.config.chunks):
            rows = [(w, w * count + k) for w in range(width) for k in range(count)]
            candidates = [
                self.extend(prompt, beam[w], row_id, lane)
                for w, lane in rows
                if not beam[w].finished
            ]
            copies = count if self.config.reference_quirks else 1
            candidates += [kept for kept in beam if kept.finished for _ in range(copies)]
            if self.config.selector.reorders:
                beam = sorted(candidates, key=lambda kept: -kept.score)[:width]
            else:
                live = iter(candidates)
                beam = [kept if kept.finished else next(live) for kept in beam]
            if all(kept.finished for kept in beam):
                break
        return sorted(beam, key=lambda kept: -kept.score)
