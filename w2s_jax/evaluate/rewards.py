"""Gold rewards: how much a classifier prefers its positive label, on texts.

The classifier itself is in models/encoder.py; nothing here is trained.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from w2s_jax.models.encoder import Classifier
from w2s_jax.text.batches import pad_rows

NEGATIVE, POSITIVE = 0, 1
_NARROWEST = 32


def gold_rewards(
    classifier: Classifier, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 64
) -> Float[np.ndarray, " n"]:
    """Logit of the positive label minus that of the negative one, for each text.

    Texts are encoded with the tokenizer's special tokens and cut at the classifier's positions.
    Rows are padded to `batch_size` and to powers of two of tokens, so few programs are compiled,
    each once.
    """
    limit = classifier.config.max_positions
    encoded: list[list[int]] = []
    if len(texts):
        encoded = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    rewards = np.zeros(len(encoded), np.float32)
    widths = np.array([_width(len(row), limit) for row in encoded])
    for width in sorted(set(widths.tolist())):
        rows = np.flatnonzero(widths == width)
        for first in range(0, len(rows), batch_size):
            some = rows[first : first + batch_size]
            filler = [encoded[some[0]]] * (batch_size - len(some))
            batch = [encoded[i] for i in some] + filler
            tokens, mask = pad_rows(batch, width, classifier.config.pad_id)
            rewards[some] = np.asarray(_preference(classifier, tokens, mask))[: len(some)]
    return rewards


def _width(length: int, limit: int) -> int:
    return min(limit, max(_NARROWEST, 1 << (max(length, 1) - 1).bit_length()))


@jax.jit
def _preference(
    classifier: Classifier, tokens: Int[Array, "B X"], mask: Bool[Array, "B X"]
) -> Float[Array, " B"]:
    logits = classifier(tokens, mask)
    return logits[:, POSITIVE] - logits[:, NEGATIVE]
