"""The language models of the embedded default: shapes, training, and the pairs that tune them.

Models are trained by `w2s sft` and `w2s dpo`. The pairs are those of the controlled-sentiment
experiment of arXiv 2405.19262 section 4.1: sampled from the untuned model, labelled by a
Bradley–Terry draw from the gold reward.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import yaml
from jaxtyping import Array, Bool, Float, Int

from w2s_jax.evaluate.rewards import gold_rewards
from w2s_jax.experiments.corpus import LANGUAGE_TEXTS, Corpus, load_corpus
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.config_json import config_to_hf
from w2s_jax.models.load import load_model
from w2s_jax.models.model import Model
from w2s_jax.models.reward import Classifier
from w2s_jax.ops.logits import Sampling
from w2s_jax.reasoning.workers import run_module
from w2s_jax.search.config import sample
from w2s_jax.search.run import search
from w2s_jax.text.batches import pad_rows
from w2s_jax.text.journal import Journal, journal_path, open_journal
from w2s_jax.text.prompts import encode_prompt
from w2s_jax.text.rows import Row, read_jsonl, write_jsonl
from w2s_jax.text.tokenizer import END_ID, PAD_ID, load_tokenizer
from w2s_jax.train.logprobs import sequence_scores
from w2s_jax.train.watch import read_metrics

LOSS_TOKENS = 64
PAIRS, TRAINING_PAIRS = "pairs.jsonl", "training.jsonl"
ACCURACY = "eval/rewards/accuracies"


@dataclass(frozen=True)
class LanguageConfig:
    """A small decoder, and the flags of the `w2s sft` that trains it from random weights.

    kv_heads None means as many as `heads`; a sliding window holds in every layer.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    architecture: Literal["llama", "mistral"] = "llama"
    kv_heads: int | None = None
    sliding_window: int | None = None
    max_positions: int = 256
    sft: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TuneConfig:
    """The flags of the `w2s dpo` that makes the tuned model of the untuned one."""

    dpo: dict[str, Any] = field(default_factory=dict)


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


def write_start(config: LanguageConfig, vocab_size: int, tokenizer: Any, folder: Path) -> None:
    """What `w2s sft --from-scratch` starts from: a config.json and the tokenizer, no weights."""
    shape = ModelConfig(
        architecture=config.architecture,
        vocab_size=vocab_size,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads or config.heads,
        head_width=config.width // config.heads,
        mlp_width=config.mlp_width,
        max_positions=config.max_positions,
        tied_embeddings=True,
        sliding_windows=(config.sliding_window,) * config.layers,
        bos_id=END_ID,
        eos_ids=(END_ID,),
        pad_id=PAD_ID,
    )
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config_to_hf(shape), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    tokenizer.save_pretrained(str(folder))


def run_command(command: str, folder: Path, values: Mapping[str, Any], *words: str) -> None:
    """Run `w2s COMMAND` in a process of its own, by a config file that is kept in `folder`.

    Args:
        command: the command's word.
        folder: where COMMAND.yaml is written.
        values: flags by name, as JSON values.
        words: flags that are given on the command line.

    Raises:
        InputError: where the command fails.
    """
    source = folder / f"{command}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    source.write_text(yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False))
    run_module("w2s_jax", command, "--config", str(source), *words)


def pretrain(config: LanguageConfig, vocab_size: int, work: Path, name: str) -> dict[str, Any]:
    """Train a decoder on the language texts of `work` into `work/NAME`; returns its test loss."""
    folder, start = work / name, work / name / "start"
    write_start(config, vocab_size, load_tokenizer(work / "tokenizer"), start)
    files = {"model": str(start), "data": str(work / "corpus" / LANGUAGE_TEXTS)}
    own = files | {"from_scratch": True, "output": str(folder)}
    run_command("sft", folder, config.sft | own)
    test = load_corpus(work / "corpus" / "test")
    return {"test_loss": held_out_loss(load_model(folder / "model"), test)}


def tune(config: TuneConfig, start: Path, preferences: Path, folder: Path) -> dict[str, Any]:
    """Tune the model of a run's folder on the pairs in `preferences` into another folder.

    Returns the accuracy of the implicit reward on held-out pairs, where some are held out.
    """
    files = {"model": start / "model", "data": preferences / TRAINING_PAIRS, "output": folder}
    run_command("dpo", folder, config.dpo | {name: str(path) for name, path in files.items()})
    accuracies = [row[ACCURACY] for row in read_metrics(folder) if ACCURACY in row]
    return {"held_out_accuracy": accuracies[-1]} if accuracies else {}


def held_out_loss(model: Model, corpus: Corpus, *, reviews: int = 2048) -> float:
    """Mean next-token loss, in nats, over the first 63 tokens of the first reviews."""
    total = count = 0.0
    for first in range(0, min(reviews, len(corpus)), LOSS_TOKENS):
        indices = range(first, min(first + LOSS_TOKENS, len(corpus)))
        rows = [np.concatenate([[END_ID], corpus.review(i)]) for i in indices]
        tokens, mask = pad_rows(rows, LOSS_TOKENS, PAD_ID)
        total -= float(_summed_logprobs(model, tokens, mask))
        count += int(mask[:, 1:].sum())
    return total / count


@jax.jit
def _summed_logprobs(
    model: Model, tokens: Int[Array, "B X"], mask: Bool[Array, "B X"]
) -> Float[Array, ""]:
    return sequence_scores(model, tokens, mask.astype(np.int32)).logprobs.sum()


def journalled(
    output: Path,
    fingerprint: Mapping[str, Any],
    count: int,
    block: int,
    answer: Callable[[list[int]], Sequence[Row]],
) -> tuple[Journal, list[Row]]:
    """The rows 0 to `count` − 1, made block by block; goes on from its journal after a kill.

    Args:
        output: the file that the journal lies beside.
        fingerprint: what the rows depend on, as JSON values.
        count: the number of rows.
        block: how many rows are made together.
        answer: makes the rows of these indices.

    Returns:
        The journal, which still has to be merged into `output`, and all rows.
    """
    journal = open_journal(journal_path(output), dict(fingerprint))
    done = journal.read()
    for first in range(0, count, block):
        indices = [i for i in range(first, min(first + block, count)) if i not in done]
        for i, row in zip(indices, answer(indices) if indices else [], strict=True):
            journal.append(i, row)
            done[i] = row
    return journal, [done[i] for i in range(count)]


def opening_words(text: str, words: int) -> str:
    """The first `words` words of a text, as written."""
    return " ".join(text.split(" ")[:words])


def sample_pairs(
    config: PreferenceConfig,
    untuned: Model,
    gold: Classifier,
    tokenizer: Any,
    texts: Sequence[str],
    output: Path,
) -> None:
    """Write rows {prompt, chosen, rejected, rewards, tokens} to `output`; goes on after a kill.

    There is one pair for each prompt, from reviews in a shuffled order. `rewards` and `tokens` (ids
    of prompt, chosen and rejected) have the chosen side first. A pair (y1, y2) keeps its order with
    probability sigmoid(r(y1) - r(y2)), r the gold reward.
    """
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(len(texts))[: config.pairs]
    lengths = rng.integers(config.shortest, config.longest + 1, len(order))
    prompts = [opening_words(texts[i], int(n)) for i, n in zip(order, lengths, strict=True)]
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    settings = sample(
        2, sampling=Sampling(config.temperature), max_new_tokens=config.new_tokens,
        seed=config.seed, slots=config.slots,
    )  # fmt: skip

    def answer(block: list[int]) -> list[Row]:
        results = search(untuned, None, [encoded[i] for i in block], settings, row_ids=block)
        drawn = [[list(h.tokens) for h in result.hypotheses] for result in results]
        said = [tokenizer.batch_decode(pair, skip_special_tokens=True) for pair in drawn]
        sides = [prompts[i] + text for i, pair in zip(block, said, strict=True) for text in pair]
        rewards = gold_rewards(gold, tokenizer, sides).reshape(-1, 2)
        rows = []
        for i, ids, responses, pair in zip(block, drawn, said, rewards, strict=True):
            order = preference(pair, np.random.default_rng((config.seed, i)))
            rows.append({
                "prompt": prompts[i],
                "chosen": responses[order[0]],
                "rejected": responses[order[1]],
                "rewards": [round(float(pair[side]), 4) for side in order],
                "tokens": [encoded[i], *(ids[side] for side in order)],
            })  # fmt: skip
        return rows

    fingerprint = {"config": repr(config)}
    journal, _ = journalled(output, fingerprint, len(prompts), config.block, answer)
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
            texts = {name: row[name] + (end if is_whole else "") for name, is_whole in sides}
            rows.append({"prompt": row["prompt"], **texts})
    write_jsonl(output, rows)
    return len(rows)
