"""Gold rewards of encoded texts, by a reward model or a classifier, and figures of them.

Figures are of one set of rewards, or of two over the same prompts: pure functions of arrays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int

from w2s_jax.distributed import to_host
from w2s_jax.errors import InputError
from w2s_jax.models.reward import Classifier, RewardModel, contrast, label_names
from w2s_jax.ops.meshes import batch_parts
from w2s_jax.text.tokenizer import pad_rows, power_of_two
from w2s_jax.train.step import place, place_whole

BLOCK = 2**22
"""The bootstrap holds at most about this many drawn values at a time."""


@dataclass(frozen=True)
class Summary:
    """One file: mean reward, standard error of that mean, mean lengths of the responses.

    stderr is None for a single row, words and characters count the response alone, and so do
    tokens, by the reward model's tokenizer.
    """

    rows: int
    reward: float
    stderr: float | None
    characters: float
    words: float
    tokens: float


@dataclass(frozen=True)
class Comparison:
    """One file against another over the same prompts.

    win_rate: the share of prompts with the higher reward, a tie counting one half; `low` and
    `high` bound it (bootstrap over prompts, percentiles, at `level`). difference: mean of the
    paired differences of rewards, with its standard error (None for a single row).
    """

    rows: int
    win_rate: float
    low: float
    high: float
    level: float
    wins: int
    ties: int
    losses: int
    difference: float
    difference_stderr: float | None


def summarise(
    rewards: Float[np.ndarray, " n"], responses: Sequence[str], token_counts: Int[np.ndarray, " n"]
) -> Summary:
    """Mean reward and mean lengths of one or more responses."""
    mean, stderr = mean_and_stderr(rewards)
    return Summary(
        len(rewards),
        mean,
        stderr,
        float(np.mean([len(text) for text in responses])),
        float(np.mean([len(text.split()) for text in responses])),
        float(token_counts.mean()),
    )


def compare(
    ours: Float[np.ndarray, " n"],
    theirs: Float[np.ndarray, " n"],
    *,
    samples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare the rewards of two responses to each prompt, `ours[i]` and `theirs[i]`."""
    outcome = points(ours, theirs)
    low, high = bootstrap_interval(outcome, samples=samples, level=level, seed=seed)
    difference, stderr = mean_and_stderr(ours.astype(np.float64) - theirs)
    wins, ties = int((outcome == 1.0).sum()), int((outcome == 0.5).sum())
    return Comparison(
        rows=len(outcome),
        win_rate=float(outcome.mean()),
        low=low,
        high=high,
        level=level,
        wins=wins,
        ties=ties,
        losses=len(outcome) - wins - ties,
        difference=difference,
        difference_stderr=stderr,
    )


def points(
    ours: Float[np.ndarray, " n"], theirs: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """1 where ours is higher, 0 where theirs is, one half where they tie."""
    return (np.sign(ours.astype(np.float64) - theirs) + 1.0) / 2.0


def mean_and_stderr(values: Float[np.ndarray, " n"]) -> tuple[float, float | None]:
    """The mean and the standard error s / √n of that mean; None for a single value."""
    values = values.astype(np.float64)
    stderr = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), stderr


def bootstrap_interval(
    values: Float[np.ndarray, " n"],
    *,
    samples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile interval of the mean under resampling with replacement (Efron 1979).

    Args:
        values: What the mean is of.
        samples: How many means are drawn.
        level: The share of them that lie in the interval.
        seed: The same one gives the same interval.
    """
    rng, count = np.random.default_rng(seed), len(values)
    block = max(1, BLOCK // count)
    drawn = [
        values[rng.integers(count, size=(min(block, samples - start), count))].mean(axis=-1)
        for start in range(0, samples, block)
    ]
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(np.concatenate(drawn), (tail, 1.0 - tail))
    return float(low), float(high)


def check_same_prompts(
    ours: Sequence[object], theirs: Sequence[object], names: tuple[str, str], unit: str = "line"
) -> None:
    """Raise InputError, naming the line, where two files do not hold the same prompts in order."""
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False), start=1):
        if one != other:
            raise InputError(
                f"{names[1]} {unit} {number}: another prompt than in {names[0]}; both files must "
                "answer the same prompts in the same order"
            )
    if len(ours) != len(theirs):
        short = min(len(ours), len(theirs))
        raise InputError(
            f"{names[0]} has {len(ours)} rows and {names[1]} {len(theirs)}; they agree up to "
            f"{unit} {short}, and both files must answer the same prompts"
        )


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
    """One number for each row of token ids: of which logits, `models.reward.contrast` says.

    Rows are taken shortest first and padded to `batch_size` and to powers of two of tokens, so few
    programs are compiled, each once. Equal rows are read once, and so tie exactly.

    Args:
        model: What rewards.
        encoded: Token ids of each row.
        batch_size: Rows that are read side by side.
        label: The label whose logit is the reward, by name or number.
        on_batch: Called with the indices and the rewards of every batch when it is done.
        mesh: The model's; a batch is split over its devices, where they divide it.

    Raises:
        InputError: For a row that is empty or exceeds the model's positions, and as `contrast`.
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
    widths = np.array([min(limit, power_of_two(len(row), _NARROWEST)) for row in distinct])
    spread = place_whole if batch_size % batch_parts(mesh) else place
    for width in sorted(set(widths.tolist())):
        rows = [distinct[i] for i in np.flatnonzero(widths == width)]
        for first in range(0, len(rows), batch_size):
            some = rows[first : first + batch_size]
            batch = some + [some[0]] * (batch_size - len(some))
            tokens, mask = pad_rows(batch, width, pad_id)
            read = spread({"tokens": tokens, "mask": mask}, mesh)
            found = to_host(_rewards(model, read["tokens"], read["mask"], weights))
            indices = [index for row in some for index in equal[row]]
            values[indices] = np.repeat(found[: len(some)], [len(equal[row]) for row in some])
            on_batch(np.array(indices), values[indices])
    return values


@jax.jit
def _rewards(
    model: RewardModel | Classifier,
    tokens: Int[Array, "B X"],
    mask: Bool[Array, "B X"],
    weights: Float[Array, " labels"],
) -> Float[Array, " B"]:
    # A product and a sum, not a matmul, which accelerators may round to less than float32.
    return jnp.sum(model(tokens, mask) * weights, axis=-1)
