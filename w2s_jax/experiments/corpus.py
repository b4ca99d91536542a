"""The review corpus of the embedded default, its language models and its gold classifier.

Reviews are read, cleaned and tokenised once into flat arrays; the models' shapes and their loss on
held-out reviews; the classifier is trained and tested on the IMDb labels. Language models are
trained by `w2s sft` and `w2s dpo`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int64, UInt16
from tokenizers import Tokenizer

from w2s_jax.errors import InputError
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.config_json import config_to_hf
from w2s_jax.models.encoder import Classifier, Encoder, EncoderConfig, init_classifier
from w2s_jax.models.model import Model
from w2s_jax.text.batches import Crops, pad_rows
from w2s_jax.text.rows import read_jsonl, write_jsonl
from w2s_jax.text.tokenizer import END_ID, PAD_ID, save_bpe, train_bpe
from w2s_jax.train.config import LoopConfig, OptimizerConfig
from w2s_jax.train.logprobs import sequence_scores
from w2s_jax.train.loop import train
from w2s_jax.train.losses import classification
from w2s_jax.train.step import Metrics, init_state, make_optimizer, make_train_step

UNLABELLED = -1
LANGUAGE_TEXTS = "language.jsonl"
SETS = ("language", "train", "test")
_LINE_BREAKS = re.compile(r"(?:\s*<br\s*/?>\s*)+")
_SPACES = re.compile(r"[ \t\r\f\v]+")


@dataclass(frozen=True)
class Review:
    """One cleaned review; label 1 is positive, 0 negative, UNLABELLED neither."""

    text: str
    label: int


def clean(text: str) -> str:
    """Turn `<br />` runs into one newline and runs of blanks into one space."""
    return _SPACES.sub(" ", _LINE_BREAKS.sub("\n", text)).strip()


def read_reviews(path: str | Path) -> list[Review]:
    """Read a file of rows {"text", "label"?}; exact duplicates after cleaning are dropped."""
    reviews: dict[str, int] = {}
    for row in read_jsonl(path):
        reviews.setdefault(clean(row["text"]), row.get("label", UNLABELLED))
    return [Review(text, label) for text, label in reviews.items()]


@dataclass(frozen=True)
class Corpus:
    """Reviews as token ids, back to back: review i is `tokens[starts[i]:starts[i + 1]]`."""

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
        parts = [self.review(int(i)) for i in indices]
        starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return Corpus(np.concatenate(parts), starts, self.labels[indices])


def encode_reviews(tokenizer: Tokenizer, reviews: list[Review], *, batch: int = 2000) -> Corpus:
    """Tokenise every review; needs a vocabulary of at most 65,536 ids."""
    if tokenizer.get_vocab_size() > 1 << 16:
        raise InputError("the corpus cache holds 16-bit ids: the vocabulary must not exceed 65,536")
    parts: list[np.ndarray] = []
    for first in range(0, len(reviews), batch):
        texts = [review.text for review in reviews[first : first + batch]]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        parts.extend(np.asarray(e.ids, dtype=np.uint16) for e in encodings)
    starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    labels = np.asarray([review.label for review in reviews], dtype=np.int64)
    return Corpus(np.concatenate(parts), starts, labels)


def save_corpus(corpus: Corpus, directory: str | Path) -> None:
    """Write the three arrays as `.npy` files."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokens", "starts", "labels"):
        np.save(directory / f"{name}.npy", getattr(corpus, name))


def load_corpus(directory: str | Path) -> Corpus:
    """Read what `save_corpus` wrote."""
    directory = Path(directory)
    arrays = (np.load(directory / f"{name}.npy") for name in ("tokens", "starts", "labels"))
    return Corpus(*arrays)


def build_corpus(
    folder: Path,
    work: Path,
    vocab_size: int,
    *,
    max_length: int,
    reviews: int | None = None,
    sets: Sequence[str] = SETS,
) -> dict[str, Any]:
    """Write `work/tokenizer` and the named of `work/corpus/{language,train,test}`; returns counts.

    The tokenizer learns from train and unsup. `language`, rows of text, holds both without what is
    also in test; `train` is the labelled set; `test` leaves out what is also in train. `reviews`
    limits what is read of train and unsup together, and of test, to that many drawn from each.
    """
    train, unsup, test = (
        read_reviews(folder / f"{name}.jsonl.xz") for name in ("train", "unsup", "test")
    )
    seen = _drawn(train + unsup, reviews)
    tokenizer = train_bpe((review.text for review in seen), vocab_size)
    save_bpe(tokenizer, work / "tokenizer", max_length=max_length)
    tested = {review.text for review in test}
    trained = {review.text for review in train}
    language = {review.text: review for review in seen if review.text not in tested}
    found = {
        "language": list(language.values()),
        "train": train,
        "test": _drawn([review for review in test if review.text not in trained], reviews),
    }
    counts: dict[str, Any] = {}
    for name in sets:
        if name == "language":
            texts = [{"text": review.text} for review in found[name]]
            (work / "corpus").mkdir(parents=True, exist_ok=True)
            write_jsonl(work / "corpus" / LANGUAGE_TEXTS, texts)
            counts[name] = {"reviews": len(texts)}
            continue
        corpus = encode_reviews(tokenizer, found[name])
        save_corpus(corpus, work / "corpus" / name)
        counts[name] = {"reviews": len(corpus), "tokens": int(corpus.tokens.size)}
    return counts


def _drawn(reviews: list[Review], count: int | None) -> list[Review]:
    if count is None or count >= len(reviews):
        return reviews
    order = np.random.default_rng(0).permutation(len(reviews))[:count]
    return [reviews[i] for i in order]


LOSS_TOKENS = 64


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


def model_config(config: LanguageConfig, vocab_size: int) -> ModelConfig:
    """The decoder that a LanguageConfig describes."""
    return ModelConfig(
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


def write_start(config: LanguageConfig, vocab_size: int, tokenizer: Any, folder: Path) -> None:
    """What `w2s sft --from-scratch` starts from: a config.json and the tokenizer, no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = config_to_hf(model_config(config, vocab_size))
    (folder / "config.json").write_text(json.dumps(shape, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(str(folder))


def held_out_loss(model: Model, corpus: Corpus, *, reviews: int = 2048) -> float:
    """Mean next-token loss, in nats, over the first 63 tokens of the first reviews."""
    total = count = 0.0
    for first in range(0, min(reviews, len(corpus)), LOSS_TOKENS):
        indices = range(first, min(first + LOSS_TOKENS, len(corpus)))
        rows = [np.concatenate([[END_ID], corpus.review(i)]) for i in indices]
        tokens, mask = pad_rows(rows, LOSS_TOKENS, PAD_ID)
        total -= float(_sum(model, tokens, mask))
        count += int(mask[:, 1:].sum())
    return total / count


@jax.jit
def _sum(model: Model, tokens: Int[Array, "B X"], mask: Bool[Array, "B X"]) -> Float[Array, ""]:
    return sequence_scores(model, tokens, mask.astype(np.int32)).logprobs.sum()


REVIEW_WINDOW, OPENING_WINDOW = 192, 64


@dataclass(frozen=True)
class GoldConfig:
    """The classifier's shape and training; `held_out` train reviews are kept for evaluation."""

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
    """Train on random crops; the held-out slice is never trained on."""
    shape = EncoderConfig(
        vocab_size=vocab_size,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        mlp_width=config.mlp_width,
        max_positions=config.max_positions,
        dropout=config.dropout,
        attention_dropout=0.0,
        pad_id=PAD_ID,
        label_names=("negative", "positive"),
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
    return accuracy(opening_logits(classifier, corpus, OPENING_WINDOW), corpus.labels)


def review_accuracy(classifier: Classifier, corpus: Corpus) -> float:
    """Accuracy on whole reviews, as `review_logits` reads them."""
    return accuracy(review_logits(classifier, corpus, REVIEW_WINDOW), corpus.labels)


def accuracy(logits: Float[np.ndarray, "n labels"], labels: np.ndarray) -> float:
    """Share of rows whose largest logit is the label's."""
    return float((logits.argmax(-1) == labels).mean())


def opening_logits(
    classifier: Classifier, corpus: Corpus, width: int
) -> Float[np.ndarray, "n labels"]:
    """Logits of the first `width` - 1 tokens of every review."""
    return _logits(classifier, [corpus.review(i)[: width - 1] for i in range(len(corpus))], width)


def review_logits(
    classifier: Classifier, corpus: Corpus, width: int
) -> Float[np.ndarray, "n labels"]:
    """Mean logits over a whole review cut into consecutive windows of `width` - 1 tokens.

    Windows are weighted by their tokens, so a short last one counts little.
    """
    owners, windows = [], []
    for i in range(len(corpus)):
        review = corpus.review(i)
        for start in range(0, len(review), width - 1):
            owners.append(i)
            windows.append(review[start : start + width - 1])
    weights = np.array([len(window) for window in windows], np.float64)
    logits = _logits(classifier, windows, width)
    total = np.zeros((len(corpus), logits.shape[1]))
    np.add.at(total, owners, logits * weights[:, None])
    return total / np.bincount(owners, weights, len(corpus))[:, None]


def _logits(
    classifier: Classifier, windows: list[np.ndarray], width: int, rows: int = 128
) -> Float[np.ndarray, "n labels"]:
    parts = []
    for first in range(0, len(windows), rows):
        batch = [np.concatenate([[END_ID], window]) for window in windows[first : first + rows]]
        filler = [np.array([END_ID])] * (rows - len(batch))
        tokens, mask = pad_rows(batch + filler, width, PAD_ID)
        parts.append(np.asarray(_apply(classifier, tokens, mask))[: len(batch)])
    return np.concatenate(parts)


@jax.jit
def _apply(classifier: Classifier, tokens: Array, mask: Array) -> Array:
    return classifier(tokens, mask)
