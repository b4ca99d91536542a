"""The models of the embedded default: review corpus, gold classifier, training, and pairs.

Reviews are read, cleaned and tokenised once into flat arrays; the classifier is trained and tested
on the IMDb labels. Language models are trained by `w2s sft` and `w2s dpo`. The pairs that tune them
follow the controlled-sentiment experiment of arXiv 2405.19262 section 4.1: sampled from the untuned
model, labelled by a Bradley–Terry draw from the gold reward.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jaxtyping import Array, Bool, Float, Float32, Int, Int64, UInt16
from tokenizers import Tokenizer

from w2s_jax.errors import InputError
from w2s_jax.evaluate.rewards import gold_rewards, rewards
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.config_json import config_to_hf
from w2s_jax.models.load import load_model
from w2s_jax.models.model import Model
from w2s_jax.models.reward import Classifier, Encoder, EncoderConfig, init_classifier
from w2s_jax.ops.logits import Sampling
from w2s_jax.reasoning.workers import run_module
from w2s_jax.search.config import sample
from w2s_jax.search.run import search
from w2s_jax.text.batches import Crops
from w2s_jax.text.prompts import encode_prompt
from w2s_jax.text.rows import Journal, Row, journal_path, open_journal, read_jsonl, write_jsonl
from w2s_jax.text.tokenizer import END_ID, PAD_ID, load_tokenizer, pad_rows, save_bpe, train_bpe
from w2s_jax.train.config import LoopConfig, OptimizerConfig
from w2s_jax.train.logprobs import sequence_scores
from w2s_jax.train.loop import train
from w2s_jax.train.losses import classification
from w2s_jax.train.step import Metrics, init_state, make_optimizer, make_train_step
from w2s_jax.train.watch import read_metrics

UNLABELLED = -1
LANGUAGE_TEXTS = "language.jsonl"
SETS = ("language", "train", "test")
ARRAYS = ("tokens", "starts", "labels")
"""Fields of a Corpus, each a `.npy` file in its folder."""
_LINE_BREAKS = re.compile(r"(?:\s*<br\s*/?>\s*)+")
_SPACES = re.compile(r"[ \t\r\f\v]+")


Reviews = Sequence[tuple[str, int]]
"""(text, label) pairs; label 1 is positive, 0 negative, UNLABELLED neither."""


def clean(text: str) -> str:
    """Replace runs of `<br />` by one newline, and runs of blanks by one space."""
    return _SPACES.sub(" ", _LINE_BREAKS.sub("\n", text)).strip()


def read_reviews(path: str | Path) -> dict[str, int]:
    """Labels by text from a file of rows {"text", "label"?}; of equal texts the first counts."""
    reviews: dict[str, int] = {}
    for row in read_jsonl(path):
        reviews.setdefault(clean(row["text"]), row.get("label", UNLABELLED))
    return reviews


@dataclass(frozen=True)
class Corpus:
    """Token ids of reviews, concatenated: review i is `tokens[starts[i]:starts[i + 1]]`."""

    tokens: UInt16[np.ndarray, " T"]
    starts: Int64[np.ndarray, " n_plus_1"]
    labels: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def review(self, index: int) -> UInt16[np.ndarray, " X"]:
        """Token ids of one review."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    def subset(self, indices: Int64[np.ndarray, " m"]) -> "Corpus":
        """The reviews at `indices`, in that order."""
        return _join([self.review(int(i)) for i in indices], self.labels[indices])


def _join(parts: Sequence[np.ndarray], labels: Int64[np.ndarray, " n"]) -> Corpus:
    starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return Corpus(np.concatenate(parts), starts, labels)


def encode_reviews(tokenizer: Tokenizer, reviews: Reviews, *, batch: int = 2000) -> Corpus:
    """Tokenise reviews; the vocabulary may have at most 65,536 ids."""
    if tokenizer.get_vocab_size() > 1 << 16:
        raise InputError("the corpus cache holds 16-bit ids: the vocabulary must not exceed 65,536")
    texts, labels = [text for text, _ in reviews], [label for _, label in reviews]
    parts = [
        np.asarray(encoding.ids, dtype=np.uint16)
        for first in range(0, len(texts), batch)
        for encoding in tokenizer.encode_batch_fast(
            texts[first : first + batch], add_special_tokens=False
        )
    ]
    return _join(parts, np.asarray(labels, dtype=np.int64))


def load_corpus(directory: Path) -> Corpus:
    """Read a corpus that `build_corpus` wrote."""
    return Corpus(*(np.load(directory / f"{name}.npy") for name in ARRAYS))


def build_corpus(
    folder: Path,
    work: Path,
    vocab_size: int,
    *,
    max_length: int,
    reviews: int | None = None,
    sets: Sequence[str] = SETS,
) -> dict[str, Any]:
    """Write `work/tokenizer`, and of `work/corpus/{language,train,test}` those in `sets`.

    The tokenizer is trained on train and unsup. `language`, rows of text, has both without reviews
    that are also in test; `train` is the labelled set; `test` leaves out reviews that are also in
    train.

    Args:
        folder: The folder of the reviews.
        work: The folder to write in.
        vocab_size: Size of the vocabulary.
        max_length: Maximum length in the tokenizer's config.
        reviews: Number of reviews drawn from train and unsup together, and from test; None for all.
        sets: The sets to write.

    Returns:
        Counts by set.
    """
    train, unsup, test = (
        read_reviews(folder / f"{name}.jsonl.xz") for name in ("train", "unsup", "test")
    )
    seen = _drawn([*train.items(), *unsup.items()], reviews)
    tokenizer = train_bpe((text for text, _ in seen), vocab_size)
    save_bpe(tokenizer, work / "tokenizer", max_length=max_length)
    counts: dict[str, Any] = {}
    if "language" in sets:
        language = dict.fromkeys(text for text, _ in seen if text not in test)
        write_jsonl(work / "corpus" / LANGUAGE_TEXTS, [{"text": text} for text in language])
        counts["language"] = {"reviews": len(language)}
    unseen = [(text, label) for text, label in test.items() if text not in train]
    labelled = {"train": list(train.items()), "test": _drawn(unseen, reviews)}
    for name in (name for name in labelled if name in sets):
        corpus, written = encode_reviews(tokenizer, labelled[name]), work / "corpus" / name
        written.mkdir(parents=True, exist_ok=True)
        for array in ARRAYS:
            np.save(written / f"{array}.npy", getattr(corpus, array))
        counts[name] = {"reviews": len(corpus), "tokens": int(corpus.tokens.size)}
    return counts


def _drawn(reviews: Reviews, count: int | None) -> Reviews:
    if count is None or count >= len(reviews):
        return reviews
    order = np.random.default_rng(0).permutation(len(reviews))[:count]
    return [reviews[i] for i in order]


REVIEW_WINDOW, OPENING_WINDOW = 192, 64
SHAPE = ("width", "layers", "heads", "mlp_width", "max_positions", "dropout")
"""Fields of a GoldConfig that belong to the encoder."""


@dataclass(frozen=True)
class GoldConfig:
    """The classifier's shape and training; `held_out` reviews of train are for evaluation."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    mlp_width: int = 512
    max_positions: int = 256
    dropout: float = 0.15
    widths: tuple[int, ...] = (48, 64, 96, 160)
    rows: int = 64
    steps: int = 2000
    openings: float = 0.5
    token_dropout: float = 0.15
    held_out: int = 2000
    evaluate_every: int = 200
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=1e-3, schedule="cosine", warmup=0.05, weight_decay=0.05
        )
    )
    seed: int = 0


def train_gold(config: GoldConfig, corpus: Corpus, vocab_size: int, directory: Path) -> Classifier:
    """Train on random crops, without the held-out reviews."""
    shape = EncoderConfig(
        vocab_size=vocab_size,
        attention_dropout=0.0,
        pad_id=PAD_ID,
        label_names=("negative", "positive"),
        **{name: getattr(config, name) for name in SHAPE},
    )
    key, init_key = jax.random.split(jax.random.key(config.seed))
    order = np.random.default_rng(config.seed).permutation(len(corpus))
    held_out, seen = (corpus.subset(part) for part in np.split(order, [config.held_out]))
    batches = Crops(
        seen, seen.labels, config.rows, config.widths, END_ID, PAD_ID,
        config.openings, config.token_dropout, config.seed,
    )  # fmt: skip
    encoder = Encoder(shape)

    def loss(
        params: Any, frozen: None, batch: dict[str, Array], key: Array | None
    ) -> tuple[Array, Array, Metrics]:
        rngs = {"dropout": key}
        logits = encoder.apply(
            {"params": params}, batch["tokens"], batch["mask"], train=True, rngs=rngs
        )
        value, metrics = classification(logits, batch["labels"])
        return value, jnp.float32(len(batch["labels"])), metrics

    optimizer = make_optimizer(config.optimizer, config.steps)
    state = train(
        init_state(init_classifier(shape, init_key).params, optimizer, key),
        make_train_step(loss, optimizer),
        batches,
        config.steps,
        config=LoopConfig(eval_every=config.evaluate_every, save_every=0, save_seconds=60.0),
        directory=directory,
        evaluate=lambda state: {
            "openings": opening_accuracy(Classifier(shape, state.params), held_out)
        },
    )
    return Classifier(shape, state.params)


def opening_accuracy(classifier: Classifier, corpus: Corpus) -> float:
    """Accuracy on the first 63 tokens of every review."""
    openings = [corpus.review(i)[: OPENING_WINDOW - 1] for i in range(len(corpus))]
    return _accuracy(_rewards(classifier, openings), corpus)


def review_accuracy(classifier: Classifier, corpus: Corpus) -> float:
    """Accuracy on whole reviews, by the mean reward of windows of 191 tokens.

    The mean is weighted by the windows' lengths, so that a short last one counts little.
    """
    owners, windows = [], []
    for i in range(len(corpus)):
        review = corpus.review(i)
        for start in range(0, len(review), REVIEW_WINDOW - 1):
            owners.append(i)
            windows.append(review[start : start + REVIEW_WINDOW - 1])
    weights = np.array([len(window) for window in windows], np.float64)
    summed = np.bincount(owners, _rewards(classifier, windows) * weights, len(corpus))
    return _accuracy(summed / np.bincount(owners, weights, len(corpus)), corpus)


def _rewards(classifier: Classifier, windows: Sequence[np.ndarray]) -> Float32[np.ndarray, " n"]:
    """Logit of the positive minus that of the negative label, after the end token."""
    return rewards(classifier, [[END_ID, *map(int, row)] for row in windows], batch_size=128)


def _accuracy(rewards: Float[np.ndarray, " n"], corpus: Corpus) -> float:
    return float(((rewards > 0) == (corpus.labels == 1)).mean())


LOSS_TOKENS = 64
PAIRS, TRAINING_PAIRS = "pairs.jsonl", "training.jsonl"
ACCURACY = "eval/rewards/accuracies"


@dataclass(frozen=True)
class LanguageConfig:
    """A small decoder, and the flags of the `w2s sft` that trains it from random weights.

    `kv_heads` None is as many as `heads`; a sliding window applies to every layer.
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
    """The flags of the `w2s dpo` that makes the tuned model from the untuned one."""

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
    """Write what `w2s sft --from-scratch` starts from: a config.json and the tokenizer."""
    same = ("architecture", "width", "layers", "heads", "mlp_width", "max_positions")
    shape = ModelConfig(
        **{name: getattr(config, name) for name in same},
        vocab_size=vocab_size,
        kv_heads=config.kv_heads or config.heads,
        head_width=config.width // config.heads,
        tied_embeddings=True,
        sliding_windows=(config.sliding_window,) * config.layers,
        bos_id=END_ID,
        eos_ids=(END_ID,),
        pad_id=PAD_ID,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(shape), indent=2) + "\n")
    tokenizer.save_pretrained(str(folder))


def run_command(command: str, folder: Path, values: Mapping[str, Any], *words: str) -> None:
    """Run `w2s COMMAND` in a separate process, with `values` in a config file kept in `folder`.

    `values` are flags by name, as JSON values; `words` are further arguments.

    Raises:
        InputError: If the command fails.
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


def tune(work: Path, config: TuneConfig, start: str, name: str) -> dict[str, Any]:
    """Tune the model of the run `work/START` on `work/preferences` into `work/NAME`.

    Returns:
        The accuracy of the implicit reward on held-out pairs, if there are any.
    """
    folder, data = work / name, work / "preferences" / TRAINING_PAIRS
    files = {"model": str(work / start / "model"), "data": str(data), "output": str(folder)}
    run_command("dpo", folder, config.dpo | files)
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
    """The rows 0 to `count` − 1, made in blocks; resumes from its journal after a kill.

    Args:
        output: The file beside which the journal lies.
        fingerprint: What the rows depend on, as JSON values.
        count: Number of rows.
        block: Number of rows that are made together.
        answer: Makes the rows of these indices.

    Returns:
        The journal, which has yet to be merged into `output`, and all rows.
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
    """Write rows {prompt, chosen, rejected, rewards, tokens} to `output`; resumes after a kill.

    There is one pair per prompt, from reviews in shuffled order. `rewards`, and `tokens` after the
    prompt's, have the chosen side first. A pair (y1, y2) keeps its order with probability
    sigmoid(r(y1) - r(y2)), r the gold reward.
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
    """Write the pairs of `sample_pairs` in the form that `w2s dpo` reads.

    A finished side is followed by the text `end` of the end token; one that was cut off is not.
    Pairs with an empty side are left out.

    Returns:
        The number of pairs.
    """
    rows = []
    for row in read_jsonl(pairs):
        if all(row["tokens"]):
            sides = zip(("chosen", "rejected"), row["tokens"][1:], strict=True)
            texts = {name: row[name] + (end if ids[-1] == END_ID else "") for name, ids in sides}
            rows.append({"prompt": row["prompt"], **texts})
    write_jsonl(output, rows)
    return len(rows)
