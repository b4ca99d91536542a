"""The token loop: K successors of L tokens for every hypothesis, one or several models reading.

What mixes the models' logits is passed in; selection and scoring are not here.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from w2s_jax.decode.reader import read_stems, read_step, start_chunk
from w2s_jax.models.cache import KVCache, LayersKV, part_dtype
from w2s_jax.models.model import Model
from w2s_jax.ops.sampling import choose
from w2s_jax.pytrees import pytree

Logits = tuple[Array, ...]
"""Float32 logits of the same rows, one array for each model that reads."""


@pytree()
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
