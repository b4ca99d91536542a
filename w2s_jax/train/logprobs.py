"""Log-probs of the tokens of a batch under a decoder, with [B X V] logits never whole in memory.

Holds no loss: what is made of the log-probs is in objectives.py.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from w2s_jax.models.config import ModelConfig
from w2s_jax.models.decoder import Remat
from w2s_jax.models.model import Model, hidden_states
from w2s_jax.ops.logits import Head, Spread, head_logprobs, weighted_head_logprobs
from w2s_jax.ops.sharding import Placement

BLOCK_BYTES = 128 * 2**20
"""Float32 logits alive at a time, unless a caller says otherwise."""
STATES_BYTES = 512 * 2**20
"""Hidden states of a block that a device gathers, with their gradients."""

Tokens = Int[Array | np.ndarray, "B X"]
Marks = Bool[Array | np.ndarray, "B X"]


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
    rows = (row_groups(model.placement, len(tokens)), -1)
    found = head_logprobs(
        head_of(model.config, model.placement, block_bytes),
        _kernel(model),
        hidden.reshape(*rows, hidden.shape[-1]),
        _next(tokens).reshape(rows),
        _next(counted).reshape(rows),
    )
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
    rows = (row_groups(model.placement, len(tokens)), -1)
    total, *found = weighted_head_logprobs(
        head_of(model.config, model.placement, block_bytes),
        _kernel(model),
        hidden.reshape(*rows, hidden.shape[-1]),
        _next(tokens).reshape(rows),
        _next(weights).reshape(rows),
    )
    return total, TokenScores(*(_after(x.reshape(tokens.shape)) for x in found))


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


def _kernel(model: Model) -> Array:
    if model.config.tied_embeddings:
        return model.params["embed"]["embedding"]
    return model.params["head"]["kernel"]


def _next(x: Array | np.ndarray) -> Array:
    """At every place what stands in the next one; zero at the end."""
    return jnp.pad(jnp.asarray(x)[:, 1:], ((0, 0), (0, 1)))


def _after(x: Array) -> Array:
    """At every place what stood in the one before; zero at the start."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))
