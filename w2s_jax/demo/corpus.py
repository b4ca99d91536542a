"""The review corpus of the embedded default: reading, cleaning, tokenising once into flat arrays.

Holds no training; the arrays are what the stages of build.py draw their batches from.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt16
from tokenizers import Tokenizer

from w2s_jax.errors import InputError
from w2s_jax.text.rows import read_jsonl, write_jsonl
from w2s_jax.text.tokenizer import save_bpe, train_bpe

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
