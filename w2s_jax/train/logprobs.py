"""Log-probs of the tokens of a batch under a decoder, with [B X V] logits never whole in memory.

Those of a reference model are computed once for all of a data set, and kept on disk under a name
made of what they depend on: the reference's weights and the data. Holds no loss: what is made of
the log-probs is in objectives.py.
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
from w2s_jax.ops.logits import Head, Spread, head_logprobs, weighted_head_logprobs
from w2s_jax.ops.meshes import check_batch
from w2s_jax.ops.sharding import Placement
from w2s_jax.text.batches import Data
from w2s_jax.text.rows import check_writable, write_whole
from w2s_jax.train.step import Batch, host_rows, place

log = logging.getLogger(__name__)

BLOCK_BYTES = 128 * 2**20
"""Float32 logits alive at a time, unless a caller says otherwise."""
STATES_BYTES = 512 * 2**20
"""Hidden states of a block that a device gathers, with their gradients."""

Tokens = Int[Array | np.ndarray, "B X"]
Marks = Bool[Array | np.ndarray, "B X"]


READ = ("tokens", "segments", "targets")
"""What of a batch a model reads."""
REFERENCE = "reference"
"""The role of a reference model, and the name of its log-probs in a batch."""


class TokenScores(NamedTuple):
    """Of every token of a batch, [B X]: its log-prob, and whether it was the likeliest one."""

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
    """Float32 log p(token | the tokens before it in its segment), and whether it was the likeliest.

    0.0 and False at padding, at a segment's first token and, where `targets` are given, at every
    other token; what is not scored costs no time in the head. At most `block_bytes` of logits are
    alive on a device, forward and backward. Rows lie on the mesh of the model's placement, if any.
    `remat`, `key`: as in `hidden_states`.
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
    """The sum of weights · log-probs, and the scores of the tokens whose weight is not zero.

    As `sequence_scores`, for objectives whose weights do not depend on the log-probs (SFT): a
    gradient then costs three head matmuls, not four. The scores have no gradient.
    """
    hidden = hidden_states(model, tokens, segments=segments, remat=remat, key=key)
    weights = jnp.where(scored_tokens(segments), weights, 0.0)
    total, *found = weighted_head_logprobs(*_read_by(model, hidden, tokens, weights, block_bytes))
    return total, TokenScores(*(_after(x.reshape(tokens.shape)) for x in found))


def _read_by(
    model: Model, hidden: Array, tokens: Tokens, counted: Array, block_bytes: int
) -> tuple[Any, ...]:
    """What the head's log-probs are made of: every state beside the token that comes next."""
    kernel = model.params["head"]["kernel"] if not model.config.tied_embeddings else None
    rows = (row_groups(model.placement, len(tokens)), -1)
    return (
        head_of(model.config, model.placement, block_bytes),
        model.params["embed"]["embedding"] if kernel is None else kernel,
        hidden.reshape(*rows, hidden.shape[-1]),
        *(_next(x).reshape(rows) for x in (tokens, counted)),
    )


def response_logprobs(model: Model, batch: Batch) -> Float[Array, "*B"]:
    """Summed log-probs, in nats, of the targets of each row [*B, X] of a batch."""
    flat, shape = flat_rows(batch)
    scores = sequence_scores(model, **flat)
    return jnp.where(flat["targets"], scores.logprobs, 0.0).sum(-1).reshape(shape)


def flat_rows(batch: Batch) -> tuple[Batch, tuple[int, ...]]:
    """The tokens, segments and targets of rows [*B, X] as [B', X], on the device, and *B."""
    shape = batch["tokens"].shape
    flat = {name: jnp.asarray(batch[name]).reshape(-1, shape[-1]) for name in READ}
    return flat, shape[:-1]


def scored_tokens(segments: Tokens, targets: Marks | None = None) -> Bool[Array, "B X"]:
    """True at the tokens that have a log-prob: in a segment, not its first, among the targets."""
    segments = jnp.asarray(segments)
    follows = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
    scored = follows & (segments > 0)
    return scored if targets is None else scored & jnp.asarray(targets)


def row_groups(placement: Placement, rows: int) -> int:
    """Into how many groups, each on devices of its own, rows of a batch are split."""
    parts = placement.parts("batch", rows)
    return 1 if rows % parts else parts


def head_of(config: ModelConfig, placement: Placement, block_bytes: int = BLOCK_BYTES) -> Head:
    """How a model's logits are made, `block_bytes` of them alive on a device at a time.

    Where the vocabulary can be divided by all parts of the weights, it is. Then hidden states of
    all rows of a block lie on each device, `STATES_BYTES` of them.
    """
    rows = max(1, block_bytes // (4 * config.vocab_size))
    vocab_axis = 0 if config.tied_embeddings else 1
    spread = _spread(config.vocab_size, placement)
    # In half precision, and their gradients in float32.
    states = None if spread.mesh is None else max(1, STATES_BYTES // (6 * config.width))
    return Head(vocab_axis, rows, config.final_softcap, spread, states)


def _spread(vocab_size: int, placement: Placement) -> Spread:
    mesh, rules = placement.mesh, placement.rules
    if mesh is None:
        return Spread()
    batch, vocab = (rules.mesh_axes(axis) for axis in ("batch", "vocab"))
    # In this order one exchange within the parts of the width cuts the kernel.
    wide = tuple(dict.fromkeys((*vocab, *rules.mesh_axes("embed"))))
    if vocab_size % math.prod(mesh.shape[axis] for axis in wide) == 0:
        vocab = wide
    return Spread(mesh, batch, tuple(axis for axis in batch if axis not in vocab), vocab)


def _next(x: Array | np.ndarray) -> Array:
    """At every place what stands in the next one; zero at the end."""
    return jnp.pad(jnp.asarray(x)[:, 1:], ((0, 0), (0, 1)))


def _after(x: Array) -> Array:
    """At every place what stood in the one before; zero at the start."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))


def reference_logprobs(
    model: Model, data: Data, *, rows: int, mesh: Mesh | None = None
) -> Float32[np.ndarray, "n 2"]:
    """Summed log-probs of both responses of every example, in nats; `rows` examples at a time.

    Examples of like length are read together, so that little is padded. On a mesh over several
    hosts each reads its share of the rows, and all get all the numbers; `rows` must be divisible
    by the parts of the mesh.
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
    """The data with the `reference_logprobs` of its rows, float32 [B, 2] of a batch.

    They are read from the folder `cache` where a run has put them there. `identity` says which
    weights the model has, and in what dtype; a file that is damaged or of another length is
    computed anew.
    """
    digest = hashlib.sha256(f"{identity}\n{data.identity}".encode()).hexdigest()[:24]
    path = cache / f"reference-{digest}.npy"
    found = _read_kept(path, len(data))
    # What all hosts must do together, all do or none does.
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
