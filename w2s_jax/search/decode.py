"""One model reading and writing: a prompt into a slot, a token step, chunks of tokens.

A reader reads tokens once and returns the cache that remembers them. The token loop makes K
successors of L tokens for every hypothesis, with one or several models reading; what mixes their
logits is passed in, and nothing is selected or scored here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from w2s_jax.models.cache import (
    KV,
    KVCache,
    LayersKV,
    empty_cache,
    empty_part,
    part_dtype,
    quantize_part,
)
from w2s_jax.models.decoder import logits, read_sequences
from w2s_jax.models.forward import Layout, forward
from w2s_jax.models.model import Model
from w2s_jax.ops.logits import blocked_token_logprobs, choose

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
        ).constrain()

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
    place = model.placement
    _, read = read_sequences(model.config, model.params, prompt[None], placement=place)
    if part_dtype(cache.prefix) == jnp.int8:
        read = jax.tree.map(quantize_part, read, is_leaf=lambda part: isinstance(part, KV))
    stacked = model.scan_layers

    def put(prefix: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(prefix, new, slot, axis=int(stacked))

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


Logits = tuple[Array, ...]
"""Float32 logits of the same rows, one array for each model that reads."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunk:
    """A sampled chunk.

    tokens int32 [P, R, L]; values float32 [P, R, L, n] or None, what `value` said of each token;
    faults bool [P, R, L, m], what `fault` said; for every model a cache with the hypotheses' last
    tokens committed, and a buffer [P, R, L − 1, G, C] a layer with the keys and values of all but
    the chunk's last token.
    """

    tokens: Array
    values: Array | None
    faults: Array
    caches: tuple[KVCache, ...]
    buffers: tuple[LayersKV, ...]


def draw_keys(
    keys: Key[Array, " P"], positions: Int[Array, " P"], lanes: Int[Array, "P R"]
) -> Key[Array, "P R"]:
    """The key of each draw, from its slot's key, position in the response and lane (w·K + k).

    It does not depend on the other slots, so neither do a response's draws.
    """

    def slot(key: Array, position: Array, lanes: Array) -> Array:
        at = jax.random.fold_in(key, position)
        return jax.vmap(lambda lane: jax.random.fold_in(at, lane))(lanes)

    return jax.vmap(slot)(keys, positions, lanes)


def sample_chunk(
    models: tuple[Model, ...],
    caches: tuple[KVCache, ...],
    last: tuple[Int[Array, "P W"], ...],
    *,
    mix: Callable[[Logits], Array],
    value: Callable[[Logits, Array], Array] | None,
    fault: Callable[[Logits, Array], Array],
    keys: Callable[[Int[Array, ""]], Key[Array, "P R"]],
    shortlist: Callable[[Array], tuple[Array, Array | None]],
    successors: int,
    length: int,
) -> Chunk:
    """Sample `length` tokens for each of `successors` rows of every hypothesis.

    `mix` turns the models' logits [P .. V] into those sampled from and `shortlist` into what may
    be drawn; `value` (optional) gives a float32 number [P .. n], n of them for each drawn token
    [P ..], from the models' logits; `fault` bools [P .. m] from these and the mixed logit of each
    drawn token, which is not finite where a logit is NaN or +inf or all are −inf; `keys(t)` are the
    draws' keys for the t-th token. `last` holds the hypotheses' last tokens as each model reads
    them: once, not once per successor. The chunk's
    last token is not read at all.
    """
    slots, hypotheses = last[0].shape
    rows = hypotheses * successors
    stems = [read_stems(*reader) for reader in zip(models, caches, last, strict=True)]
    caches = tuple(cache for _, cache in stems)
    first = tuple(jnp.expand_dims(logits, 2) for logits, _ in stems)
    mixed = mix(first)
    grouped = keys(jnp.int32(0)).reshape(slots, hypotheses, successors)
    tokens = choose(*shortlist(mixed), grouped)
    said = None if value is None else value(first, tokens).reshape(slots, rows, 1, -1)
    faults = fault(first, _at(mixed, tokens)).reshape(slots, rows, 1, -1)
    tokens = tokens.reshape(slots, rows)
    buffers = tuple(
        start_chunk(m, slots, rows, length - 1, part_dtype(cache.committed))
        for m, cache in zip(models, caches, strict=True)
    )
    if length == 1:
        return Chunk(tokens[..., None], said, faults, caches, buffers)

    def step(carry: tuple, t: Array) -> tuple[tuple, tuple]:
        buffers, tokens = carry
        reads = [
            read_step(m, cache, buffer, tokens, t - 1)
            for m, cache, buffer in zip(models, caches, buffers, strict=True)
        ]
        logits = tuple(logits for logits, _ in reads)
        mixed = mix(logits)
        drawn = choose(*shortlist(mixed), keys(t))
        out = None if value is None else value(logits, drawn)
        told = fault(logits, _at(mixed, drawn))
        return (tuple(buffer for _, buffer in reads), drawn), (drawn, out, told)

    (buffers, _), (later, later_said, later_faults) = jax.lax.scan(
        step, (buffers, tokens), jnp.arange(1, length, dtype=jnp.int32)
    )
    tokens = jnp.concatenate([tokens[..., None], jnp.moveaxis(later, 0, -1)], axis=-1)
    if said is not None:
        said = jnp.concatenate([said, jnp.moveaxis(later_said, 0, 2)], axis=2)
    faults = jnp.concatenate([faults, jnp.moveaxis(later_faults, 0, 2)], axis=2)
    return Chunk(tokens, said, faults, caches, buffers)


def _at(logits: Array, tokens: Array) -> Array:
    """The logits of tokens, one each, from rows that broadcast against them."""
    return jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
