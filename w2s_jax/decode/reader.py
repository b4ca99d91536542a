"""One model reading: a prompt into a slot, the hypotheses' last tokens, a token step, a chunk.

Each function reads tokens once and returns the cache that remembers them. Nothing is chosen here.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from w2s_jax.models.cache import (
    KV,
    KVCache,
    LayersKV,
    empty_cache,
    empty_part,
    part_dtype,
    quantize_part,
)
from w2s_jax.models.decoder import Layout
from w2s_jax.models.forward import forward, logits
from w2s_jax.models.model import Model
from w2s_jax.ops.logprobs import blocked_token_logprobs

LOGIT_BYTES = 256 * 2**20
"""Scoring keeps at most about this many bytes of float32 logits alive at a time."""


def start_cache(
    model: Model,
    *,
    slots: int,
    hypotheses: int,
    prefix_capacity: int,
    committed_capacity: int,
    dtype: DTypeLike | None = None,
) -> KVCache:
    """An empty cache for `slots` prompts of up to prefix_capacity + 1 tokens.

    It lies where the model does. dtype: what keys and values are kept as, the model's by default;
    int8 quantises them. Raises InputError where the mesh does not divide the slots or the key/value
    heads.
    """

    def build() -> KVCache:
        return empty_cache(
            model.config,
            slots=slots,
            hypotheses=hypotheses,
            prefix_capacity=prefix_capacity,
            committed_capacity=committed_capacity,
            dtype=model.dtype if dtype is None else dtype,
            stacked=model.scan_layers,
            placement=model.placement,
        ).held()

    # Made in its shards: no device has room for all of it.
    return build() if model.placement.mesh is None else jax.jit(build)()


def prefill(
    model: Model,
    cache: KVCache,
    slot: Int[Array, ""],
    prompt: Int[Array, " S"],
    length: Int[Array, ""],
) -> KVCache:
    """Read a right-padded prompt of `length` tokens, all but its last, into one slot's prefix.

    The last token is left for `read_stems`, which needs its logits anyway. S is the capacity of
    the prefix part; the slot's committed part is emptied, as a masked NaN would still be one in a
    sum over values.
    """
    layout = Layout(False, 1, prompt.shape[0])
    tokens, place = prompt[None, None], model.placement
    read = forward(model.config, model.params, tokens, layout, placement=place).chunk
    if part_dtype(cache.prefix) == jnp.int8:
        read = jax.tree.map(quantize_part, read, is_leaf=lambda part: isinstance(part, KV))
    stacked = model.scan_layers

    def put(prefix: Array, new: Array) -> Array:
        row = new[:, 0] if stacked else new[0]
        return jax.lax.dynamic_update_index_in_dim(prefix, row, slot, axis=int(stacked))

    def empty(committed: Array) -> Array:
        zeros = jnp.zeros_like(committed[:, 0] if stacked else committed[0])
        return jax.lax.dynamic_update_index_in_dim(committed, zeros, slot, axis=int(stacked))

    return replace(
        cache,
        prefix=jax.tree.map(put, cache.prefix, read),
        committed=jax.tree.map(empty, cache.committed),
        prefix_length=cache.prefix_length.at[slot].set(length - 1),
        committed_length=cache.committed_length.at[slot].set(0),
    )


def read_stems(
    model: Model, cache: KVCache, last: Int[Array, "P W"]
) -> tuple[Float[Array, "P W V"], KVCache]:
    """Read every hypothesis's last token: float32 logits of what follows, and the cache with it."""
    read = forward(model.config, model.params, last[:, :, None], Layout(True, 0, 0), cache=cache)
    assert read.cache is not None
    return logits(model.config, model.params, read.hidden[:, :, 0]), read.cache


def start_chunk(
    model: Model, slots: int, rows: int, length: int, dtype: DTypeLike | None = None
) -> LayersKV:
    """An empty chunk buffer for token steps, [P, R, length, G, C] a layer; dtype as of a cache."""
    kept = model.dtype if dtype is None else dtype
    return empty_part(model.config, (slots, rows, length), kept, model.scan_layers)


def read_step(
    model: Model,
    cache: KVCache,
    chunk: LayersKV,
    tokens: Int[Array, "P R"],
    start: Int[Array, ""],
) -> tuple[Float[Array, "P R V"], LayersKV]:
    """Read one token of every row, the `start`-th of the chunk, behind its hypothesis.

    Returns float32 logits of what follows and the chunk buffer with the token's keys and values.
    """
    slots, rows = tokens.shape
    hypotheses = cache.committed_length.shape[1]
    layout = Layout(False, rows // hypotheses, 1)
    grouped = tokens.reshape(slots, hypotheses, layout.successors)
    read = forward(
        model.config, model.params, grouped, layout, cache=cache, chunk=chunk, chunk_start=start
    )
    hidden = read.hidden.reshape(slots, rows, -1)
    assert read.chunk is not None
    return logits(model.config, model.params, hidden), read.chunk


def read_chunk(
    model: Model, cache: KVCache, last: Int[Array, "P W"], tokens: Int[Array, "P R n"]
) -> tuple[Float[Array, "P R n"], KVCache, LayersKV | None]:
    """Score n tokens of every row in one teacher-forced call.

    Reads each hypothesis's last token once and its successors' first n − 1 tokens; the n-th needs
    no reading. Returns float32 log-probabilities, the cache with the last tokens committed, and
    the keys and values of what was read of the chunk ([P, R, n − 1, G, C] a layer).
    """
    slots, rows, count = tokens.shape
    hypotheses = last.shape[1]
    layout = Layout(True, rows // hypotheses, count - 1)
    branches = tokens[:, :, :-1].reshape(slots, hypotheses, -1)
    new = jnp.concatenate([last[:, :, None], branches], axis=2)
    read = forward(model.config, model.params, new, layout, cache=cache)
    assert read.cache is not None
    # Slots lie on the devices of their group, and their logits should.
    groups = (model.placement.parts("slots", slots), -1)
    targets = _targets(tokens, hypotheses)
    scores = blocked_token_logprobs(
        read.hidden.reshape(*groups, read.hidden.shape[-1]),
        targets.reshape(*groups, targets.shape[-1]),
        lambda hidden: logits(model.config, model.params, hidden),
        block=max(1, LOGIT_BYTES // (4 * model.config.vocab_size)),
    ).reshape(slots, hypotheses, layout.tokens, layout.successors)
    first = scores[:, :, 0].reshape(slots, rows, 1)
    rest = scores[:, :, 1:, 0].reshape(slots, rows, count - 1)
    return jnp.concatenate([first, rest], axis=2), read.cache, read.chunk


def _targets(tokens: Int[Array, "P R n"], hypotheses: int) -> Int[Array, "P W M K"]:
    """What follows each token that is read: K first tokens after a stem, one token elsewhere."""
    slots, rows, count = tokens.shape
    successors = rows // hypotheses
    grouped = tokens.reshape(slots, hypotheses, successors, count)
    first = grouped[:, :, None, :, 0]
    rest = grouped[..., 1:].reshape(slots, hypotheses, successors * (count - 1), 1)
    return jnp.concatenate([first, jnp.repeat(rest, successors, axis=3)], axis=2)
