"""Trains and tests the gold classifier of the embedded default on the IMDb labels.

Holds the stage only; scoring texts with the classifier is in evaluate/rewards.py.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from w2s_jax.demo.corpus import Corpus
from w2s_jax.models.encoder import Classifier, Encoder, EncoderConfig, init_classifier
from w2s_jax.text.batches import Crops, pad_rows
from w2s_jax.text.tokenizer import END_ID, PAD_ID
from w2s_jax.train.loop import LoopConfig, train
from w2s_jax.train.losses import classification
from w2s_jax.train.optimizers import OptimizerConfig, make_optimizer
from w2s_jax.train.step import Metrics, init_state, make_train_step

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
        default_factory=lambda: OptimizerConfig(learning_rate=1e-3, weight_decay=0.05)
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
        config=LoopConfig(
            config.steps, eval_every=config.evaluate_every, save_every=0, save_seconds=60.0
        ),
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
