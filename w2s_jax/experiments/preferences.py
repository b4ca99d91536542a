"""Preferences of the embedded default: sampled pairs under gold labels.

The controlled-sentiment experiment of arXiv 2405.19262 section 4.1: pairs sampled from the untuned
model, labelled by a Bradley–Terry draw from the gold reward.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from w2s_jax.evaluate.rewards import gold_rewards
from w2s_jax.models.encoder import Classifier
from w2s_jax.models.model import Model
from w2s_jax.ops.sampling import Sampling
from w2s_jax.search.config import sample
from w2s_jax.search.run import search
from w2s_jax.text.journal import journal_path, open_journal
from w2s_jax.text.prompts import encode_prompt
from w2s_jax.text.rows import read_jsonl, write_jsonl
from w2s_jax.text.tokenizer import END_ID


@dataclass(frozen=True)
class PreferenceConfig:
    """How pairs are sampled; a prompt is the first `shortest`..`longest` words of a review."""

    pairs: int = 8000
    shortest: int = 3
    longest: int = 10
    new_tokens: int = 50
    temperature: float = 1.0
    slots: int = 64
    block: int = 512
    seed: int = 0


@dataclass(frozen=True)
class TuneConfig:
    """The flags of the `w2s dpo` that makes the tuned model of the untuned one."""

    dpo: dict[str, Any] = field(default_factory=dict)


def opening_words(text: str, words: int) -> str:
    """The first `words` words of a text, as written."""
    return " ".join(text.split(" ")[:words])


def make_prompts(config: PreferenceConfig, texts: list[str]) -> list[str]:
    """One prompt for each pair, from reviews in a shuffled order."""
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(len(texts))[: config.pairs]
    lengths = rng.integers(config.shortest, config.longest + 1, len(order))
    return [opening_words(texts[i], int(n)) for i, n in zip(order, lengths, strict=True)]


def sample_pairs(
    config: PreferenceConfig,
    untuned: Model,
    gold: Classifier,
    tokenizer: Any,
    texts: list[str],
    output: Path,
) -> None:
    """Write rows {prompt, chosen, rejected, rewards, tokens} to `output`; goes on after a kill.

    `rewards` and `tokens` (ids of prompt, chosen and rejected) have the chosen side first. A pair
    (y1, y2) keeps its order with probability sigmoid(r(y1) - r(y2)), r the gold reward.
    """
    prompts = make_prompts(config, texts)
    journal = open_journal(journal_path(output), {"config": repr(config)})
    done = journal.read()
    settings = sample(
        2, sampling=Sampling(config.temperature), max_new_tokens=config.new_tokens,
        seed=config.seed, slots=config.slots,
    )  # fmt: skip
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    for first in range(0, len(prompts), config.block):
        block = [i for i in range(first, min(first + config.block, len(prompts))) if i not in done]
        if not block:
            continue
        results = search(untuned, None, [encoded[i] for i in block], settings, row_ids=block)
        drawn = [[list(h.tokens) for h in result.hypotheses] for result in results]
        texts_of = [tokenizer.batch_decode(pair, skip_special_tokens=True) for pair in drawn]
        sides = [
            prompts[i] + text for i, pair in zip(block, texts_of, strict=True) for text in pair
        ]
        rewards = gold_rewards(gold, tokenizer, sides).reshape(-1, 2)
        for i, ids, responses, pair in zip(block, drawn, texts_of, rewards, strict=True):
            order = preference(pair, np.random.default_rng((config.seed, i)))
            row = {
                "prompt": prompts[i],
                "chosen": responses[order[0]],
                "rejected": responses[order[1]],
                "rewards": [round(float(pair[side]), 4) for side in order],
                "tokens": [encoded[i], *(ids[side] for side in order)],
            }
            journal.append(i, row)
    journal.merge(output, len(prompts))


def preference(rewards: Float[np.ndarray, "2"], rng: np.random.Generator) -> tuple[int, int]:
    """(chosen, rejected) by a Bradley–Terry draw: the first is chosen with sigmoid(r0 - r1)."""
    gap = float(rewards[0]) - float(rewards[1])
    return (0, 1) if rng.random() < 1 / (1 + np.exp(-gap)) else (1, 0)


def write_training_pairs(pairs: Path, end: str, output: Path) -> int:
    """Write the pairs of `sample_pairs` as `w2s dpo` reads them; returns their number.

    A side that ended has the text of the end token, `end`, behind it, and the others have none:
    they were cut off. Pairs with an empty side are left out.
    """
    rows = []
    for row in read_jsonl(pairs):
        if all(map(len, row["tokens"])):
            ended = [ids[-1] == END_ID for ids in row["tokens"][1:]]
            sides = zip(("chosen", "rejected"), ended, strict=True)
            texts = {name: row[name] + (end if whole else "") for name, whole in sides}
            rows.append({"prompt": row["prompt"], **texts})
    write_jsonl(output, rows)
    return len(rows)
