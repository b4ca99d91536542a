"""Log-probs of the tokens of a batch, without [B X V] logits in memory at once.

The reference model's log-probs are computed once for a data set, and cached on disk under a hash of
what they depend on: the reference's weights and the data. The losses are in losses.py;
objectives.py applies them to these log-probs.
"""

import hashlib
import io
import logging
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int
from tqdm import tqdm

from w2s_jax.distributed import gather_values, is_first
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.decoder import Remat
from w2s_jax.models.model import Model, hidden_states
from w2s_jax.models.parameters import input_major_leaf
from w2s_jax.ops.logits import Head, Spread, head_logprobs, weighted_head_logprobs
from w2s_jax.ops.meshes import check_batch
from w2s_jax.ops.sharding import Placement
from w2s_jax.text.batches import Data
from w2s_jax.text.rows import check_writable, write_whole
from w2s_jax.train.step import Batch, host_rows, place

log = logging.getLogger(__name__)

BLOCK_BYTES = 128 * 2**20
"""Float32 logits alive at a time on a device, by default."""
STATES_BYTES = 512 * 2**20
"""Hidden states of a block that a device gathers, with their gradients."""

Tokens = Int[Array | np.ndarray, "B X"]
Marks = Bool[Array | np.ndarray, "B X"]


READ = ("tokens", "segments", "targets")
"""Arrays of a batch that a model reads."""
REFERENCE = "reference"
"""The role of a reference model, and the name of its log-probs in a batch."""


class TokenScores(NamedTuple):
    """Scores of the tokens of a batch.

    Attributes:
        logprobs: Log-prob of each token, in nats, [B, X].
        correct: Whether each token was the likeliest one, [B, X].
    """

    logprobs: Array
    correct: Array


def sequence_scores(
    model: Model,
    tokens: Tokens,
    segments: Tokens,
    *,
    targets: Marks | None = None,
    remat: Remat = "none",
    key: Array | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> TokenScores:
    """Score each token given the tokens before it in its segment.

    Unscored tokens take no time in the head. Rows lie on the mesh of the model's placement, if any.

    Args:
        model: The model.
        tokens: Token ids.
        segments: Numbers of the documents packed in a row, from 1; 0 is padding.
        targets: True on the tokens to score, by default all.
        remat: What a backward pass recomputes, as in `hidden_states`.
        key: Key for dropout; None disables it.
        block_bytes: Bytes of float32 logits alive at a time on a device, forward and backward.

    Returns:
        Float32 log-probs, and whether each token was the likeliest. Tokens that are not scored have
        0.0 and False: padding, the first token of a segment, and all but the targets.
    """
    hidden = hidden_states(model, tokens, segments=segments, remat=remat, key=key)
    counted = scored_tokens(segments, targets)
    found = head_logprobs(*_read_by(model, hidden, tokens, counted, block_bytes))
    return TokenScores(*(_after(x.reshape(tokens.shape)) for x in found))


def weighted_logprob(
    model: Model,
    tokens: Tokens,
    segments: Tokens,
    weights: Float[Array, "B X"],
    *,
    remat: Remat = "none",
    key: Array | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Float[Array, ""], TokenScores]:
    """The sum of weights · log-probs, and the scores of the tokens with a weight other than zero.

    For objectives whose weights do not depend on the log-probs (SFT): a gradient then takes three
    head matmuls instead of four. The scores carry no gradient. Otherwise as `sequence_scores`.
    """
    hidden = hidden_states(model, tokens, segments=segments, remat=remat, key=key)
    weights = jnp.where(scored_tokens(segments), weights, 0.0)
    total, *found = weighted_head_logprobs(*_read_by(model, hidden, tokens, weights, block_bytes))
    return total, TokenScores(*(_after(x.reshape(tokens.shape)) for x in found))


def _read_by(
    model: Model, hidden: Array, tokens: Tokens, counted: Array, block_bytes: int
) -> tuple[Any, ...]:
    """The arguments of the head's log-probs: each hidden state with the token that follows it."""
    module, leaf = ("embed", "embedding") if model.config.tied_embeddings else ("head", "kernel")
    head = input_major_leaf(f"{module}/{leaf}", model.params[module][leaf])
    rows = (row_groups(model.placement, len(tokens)), -1)
    return (
        head_of(model.config, model.placement, block_bytes),
        head,
        hidden.reshape(*rows, hidden.shape[-1]),
        *(_next(x).reshape(rows) for x in (tokens, counted)),
    )


def response_logprobs(model: Model, batch: Batch) -> Float[Array, "*B"]:
    """Log-probs summed over the targets of each row [*B, X] of a batch, in nats."""
    flat, shape = flat_rows(batch)
    scores = sequence_scores(model, **flat)
    return jnp.where(flat["targets"], scores.logprobs, 0.0).sum(-1).reshape(shape)


def flat_rows(batch: Batch) -> tuple[Batch, tuple[int, ...]]:
    """Reshape the arrays of a batch from [*B, X] to [B', X], on the device; returns *B as well."""
    shape = batch["tokens"].shape
    flat = {name: jnp.asarray(batch[name]).reshape(-1, shape[-1]) for name in READ}
    return flat, shape[:-1]


def scored_tokens(segments: Tokens, targets: Marks | None = None) -> Bool[Array, "B X"]:
    """True at tokens with a log-prob: targets in a segment, except for its first token."""
    segments = jnp.asarray(segments)
    follows = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
    scored = follows & (segments > 0)
    return scored if targets is None else scored & jnp.asarray(targets)


def row_groups(placement: Placement, rows: int) -> int:
    """Groups of devices over which the rows of a batch are split; 1 if that is not even."""
    parts = placement.parts("batch", rows)
    return 1 if rows % parts else parts


def head_of(config: ModelConfig, placement: Placement, block_bytes: int = BLOCK_BYTES) -> Head:
    """How a model's logits are computed, in blocks of at most `block_bytes` on a device.

    The vocabulary is split over all devices that share the weights, if it divides. Then each device
    gathers the hidden states of all rows of a block, `STATES_BYTES` at a time.
    """
    rows = max(1, block_bytes // (4 * config.vocab_size))
    vocab_axis = 0 if config.tied_embeddings else 1
    spread = _spread(config.vocab_size, placement)
    # Six bytes: two of the state in half precision, four of its gradient in float32.
    states = None if spread.mesh is None else max(1, STATES_BYTES // (6 * config.width))
    return Head(vocab_axis, rows, config.final_softcap, spread, states, config.logit_divisor)


def _spread(vocab_size: int, placement: Placement) -> Spread:
    mesh, rules = placement.mesh, placement.rules
    if mesh is None:
        return Spread()
    batch, vocab = (rules.mesh_axes(axis) for axis in ("batch", "vocab"))
    # In this order one exchange among the shards of the width re-shards the kernel.
    wide = tuple(dict.fromkeys((*vocab, *rules.mesh_axes("embed"))))
    if vocab_size % math.prod(mesh.shape[axis] for axis in wide) == 0:
        vocab = wide
    return Spread(mesh, batch, tuple(axis for axis in batch if axis not in vocab), vocab)


def _next(x: Array | np.ndarray) -> Array:
    """Shifted left by one; zero at the end."""
    return jnp.pad(jnp.asarray(x)[:, 1:], ((0, 0), (0, 1)))


def _after(x: Array) -> Array:
    """Shifted right by one; zero at the start."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))


def reference_logprobs(
    model: Model, data: Data, *, rows: int, mesh: Mesh | None = None
) -> Float32[np.ndarray, "n 2"]:
    """Summed log-probs, in nats, of both responses of every example.

    Examples of similar length are read together to save padding.

    Args:
        model: The reference model.
        data: The examples.
        rows: Examples in a batch; the mesh must divide them.
        mesh: The mesh. If it spans several hosts, each reads its share of the rows, and all get all
            the results.

    Returns:
        Float32, one row per example: the chosen, then the rejected response.
    """
    check_batch(rows, 1, mesh, flag="--eval-batch-size")
    share = host_rows(mesh, rows)
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    read = jax.jit(response_logprobs, out_shardings=whole)
    found = np.zeros((len(data), 2), np.float32)
    order = np.argsort(-data.lengths, kind="stable")
    quiet = not sys.stderr.isatty()
    with tqdm(total=len(data), desc="reference", unit="example", disable=quiet) as bar:
        for first in range(0, len(order), rows):
            indices = order[first : first + rows]
            batch = data.at(np.resize(indices, rows), share)
            batch = place({name: batch[name] for name in READ}, mesh, rows)
            found[indices] = np.asarray(read(model, batch))[: len(indices)]
            bar.update(len(indices))
    return found


def with_reference(
    model: Model, data: Data, *, rows: int, cache: Path, identity: str, mesh: Mesh | None = None
) -> Data:
    """The data with a column of `reference_logprobs`, float32 [B, 2] in a batch.

    Args:
        model: The reference model.
        data: The examples.
        rows: Examples in a batch.
        cache: Folder from which log-probs of an earlier run are read; a damaged file, or one of
            another length, is computed anew.
        identity: What identifies the weights and the dtype of the model.
        mesh: The mesh.
    """
    digest = hashlib.sha256(f"{identity}\n{data.identity}".encode()).hexdigest()[:24]
    path = cache / f"reference-{digest}.npy"
    found = _read_kept(path, len(data))
    # Computing is collective: all hosts must do it, or none.
    if all(gather_values(found is not None)) and found is not None:
        log.info("reference log-probs of %d examples read from %s", len(data), path)
    else:
        if is_first():
            check_writable(path)
        found = reference_logprobs(model, data, rows=rows, mesh=mesh)
        if is_first():
            written = io.BytesIO()
            np.save(written, found, allow_pickle=False)
            write_whole(path, [written.getvalue()])
    return data.beside(REFERENCE, found)


def _read_kept(path: Path, count: int) -> np.ndarray | None:
    try:
        kept = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    sound = kept.shape == (count, 2) and kept.dtype == np.float32 and np.isfinite(kept).all()
    return kept if sound else None
