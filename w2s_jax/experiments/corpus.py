"""The review corpus of the embedded default, and its gold classifier.

Reviews are read, cleaned and tokenised once into flat arrays; the classifier is trained and tested
on the IMDb labels.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int64, UInt16
from tokenizers import Tokenizer

from w2s_jax.errors import InputError
from w2s_jax.evaluate.rewards import rewards
from w2s_jax.models.reward import Classifier, Encoder, EncoderConfig, init_classifier
from w2s_jax.text.batches import Crops
from w2s_jax.text.rows import read_jsonl, write_jsonl
from w2s_jax.text.tokenizer import END_ID, PAD_ID, save_bpe, train_bpe
from w2s_jax.train.config import LoopConfig, OptimizerConfig
from w2s_jax.train.loop import train
from w2s_jax.train.losses import classification
from w2s_jax.train.step import Metrics, init_state, make_optimizer, make_train_step

UNLABELLED = -1
LANGUAGE_TEXTS = "language.jsonl"
SETS = ("language", "train", "test")
_LINE_BREAKS = re.compile(r"(?:\s*<br\s*/?>\s*)+")
_SPACES = re.compile(r"[ \t\r\f\v]+")


Reviews = Sequence[tuple[str, int]]
"""(text, label) each; label 1 is positive, 0 negative, UNLABELLED neither."""


def clean(text: str) -> str:
    """Turn `<br />` runs into one newline and runs of blanks into one space."""
    return _SPACES.sub(" ", _LINE_BREAKS.sub("\n", text)).strip()


def read_reviews(path: str | Path) -> dict[str, int]:
    """Labels by text of a file of rows {"text", "label"?}; the first of equal texts counts."""
    reviews: dict[str, int] = {}
    for row in read_jsonl(path):
        reviews.setdefault(clean(row["text"]), row.get("label", UNLABELLED))
    return reviews


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
        return _join([self.review(int(i)) for i in indices], self.labels[indices])


def _join(parts: Sequence[np.ndarray], labels: Int64[np.ndarray, " n"]) -> Corpus:
    starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return Corpus(np.concatenate(parts), starts, labels)


def encode_reviews(tokenizer: Tokenizer, reviews: Reviews, *, batch: int = 2000) -> Corpus:
    """Tokenise every review; needs a vocabulary of at most 65,536 ids."""
    if tokenizer.get_vocab_size() > 1 << 16:
        raise InputError("the corpus cache holds 16-bit ids: the vocabulary must not exceed 65,536")
    parts: list[np.ndarray] = []
    for first in range(0, len(reviews), batch):
        texts = [text for text, _ in reviews[first : first + batch]]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        parts.extend(np.asarray(e.ids, dtype=np.uint16) for e in encodings)
    return _join(parts, np.asarray([label for _, label in reviews], dtype=np.int64))


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
        corpus = encode_reviews(tokenizer, labelled[name])
        save_corpus(corpus, work / "corpus" / name)
        counts[name] = {"reviews": len(corpus), "tokens": int(corpus.tokens.size)}
    return counts


def _drawn(reviews: Reviews, count: int | None) -> Reviews:
    if count is None or count >= len(reviews):
        return reviews
    order = np.random.default_rng(0).permutation(len(reviews))[:count]
    return [reviews[i] for i in order]


REVIEW_WINDOW, OPENING_WINDOW = 192, 64
SHAPE = ("width", "layers", "heads", "mlp_width", "max_positions", "dropout")
"""Fields of a GoldConfig that are the encoder's."""


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

    Windows are weighted by their tokens, so a short last one counts little.
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
    """Logit of the positive label minus that of the negative one, behind the end token."""
    return rewards(classifier, [[END_ID, *map(int, row)] for row in windows], batch_size=128)


def _accuracy(rewards: Float[np.ndarray, " n"], corpus: Corpus) -> float:
    return float(((rewards > 0) == (corpus.labels == 1)).mean())
