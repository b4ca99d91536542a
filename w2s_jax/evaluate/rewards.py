"""Gold rewards: what a reward model, or an encoder classifier, makes of encoded texts.

The models are in models/reward.py and models/encoder.py; nothing here is trained.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int

from w2s_jax.errors import InputError
from w2s_jax.exchange import to_host
from w2s_jax.models.encoder import Classifier
from w2s_jax.models.reward import RewardModel, contrast, label_names
from w2s_jax.ops.sharding import DEFAULT_RULES
from w2s_jax.text.batches import pad_rows, power_of_two

_NARROWEST = 32


def gold_rewards(
    classifier: Classifier, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 64
) -> Float[np.ndarray, " n"]:
    """Logit of the positive label minus that of the negative one, for each text.

    Texts are encoded with the tokenizer's special tokens and cut at the classifier's positions.
    """
    encoded = encode_texts(tokenizer, texts, classifier.config.max_positions)
    return rewards(classifier, encoded, batch_size=batch_size)


def encode_texts(tokenizer: Any, texts: Sequence[str], limit: int) -> list[list[int]]:
    """Token ids of plain texts with the tokenizer's special tokens, the end cut off at `limit`."""
    if not len(texts):
        return []
    return tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]


def rewards(
    model: RewardModel | Classifier,
    encoded: Sequence[Sequence[int]],
    *,
    batch_size: int = 64,
    label: str | int | None = None,
    on_batch: Callable[[np.ndarray, np.ndarray], None] = lambda rows, values: None,
    mesh: Mesh | None = None,
) -> Float32[np.ndarray, " n"]:
    """One number for each row of token ids: of which logits, `models.labels.contrast` says.

    Rows are taken shortest first and padded to `batch_size` and to powers of two of tokens, so few
    programs are compiled, each once. Equal rows are read once, and so tie exactly. `on_batch(rows,
    values)` is called with the indices and the rewards of every batch when it is done. On a mesh
    (the model's) a batch is split over its devices, where they divide it.

    Raises InputError for a row that is empty or exceeds the model's positions, and as `contrast`.
    """
    weights, limit = contrast(label_names(model), label), model.config.max_positions
    for number, row in enumerate(encoded, start=1):
        if not 0 < len(row) <= limit:
            raise InputError(
                f"row {number}: {len(row)} tokens for a reward model of {limit} positions"
            )
    pad_id = model.config.pad_id or 0
    values = np.zeros(len(encoded), np.float32)
    equal: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(encoded):
        equal.setdefault(tuple(row), []).append(index)
    distinct = sorted(equal, key=len)
    widths = np.array([_width(len(row), limit) for row in distinct])
    for width in sorted(set(widths.tolist())):
        rows = [distinct[i] for i in np.flatnonzero(widths == width)]
        for first in range(0, len(rows), batch_size):
            some = rows[first : first + batch_size]
            batch = some + [some[0]] * (batch_size - len(some))
            tokens, mask = pad_rows(batch, width, pad_id)
            read = _spread((tokens, mask), mesh)
            found = to_host(_rewards(model, *read, weights))
            indices = [index for row in some for index in equal[row]]
            values[indices] = np.repeat(found[: len(some)], [len(equal[row]) for row in some])
            on_batch(np.array(indices), values[indices])
    return values


def _spread(arrays: tuple[np.ndarray, ...], mesh: Mesh | None) -> tuple[Any, ...]:
    """The arrays with their rows over the mesh's data axes, where these divide them."""
    if mesh is None:
        return arrays
    axes = DEFAULT_RULES.mesh_axes("batch")
    parts = math.prod(mesh.shape[axis] for axis in axes)
    rows = PartitionSpec(axes) if len(arrays[0]) % parts == 0 else PartitionSpec()
    sharding = NamedSharding(mesh, rows)
    return tuple(
        jax.make_array_from_callback(array.shape, sharding, array.__getitem__) for array in arrays
    )


def _width(length: int, limit: int) -> int:
    return min(limit, power_of_two(length, _NARROWEST))


@jax.jit
def _rewards(
    model: RewardModel | Classifier,
    tokens: Int[Array, "B X"],
    mask: Bool[Array, "B X"],
    weights: Float[Array, " labels"],
) -> Float[Array, " B"]:
    # A product and a sum, not a matmul, which accelerators may round to less than float32.
    return jnp.sum(model(tokens, mask) * weights, axis=-1)
