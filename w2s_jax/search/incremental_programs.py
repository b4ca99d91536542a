"""The compiled programs by which a model reads candidates as texts, and keeps what was chosen.

Arrays and caches in and out. What is read and remembered is for `incremental_text.py`.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from w2s_jax.models.cache import KV, KVCache, LayersKV, commit_chunk
from w2s_jax.models.decoder import logits
from w2s_jax.models.forward import Layout, forward
from w2s_jax.models.model import Model
from w2s_jax.models.reward import RewardModel
from w2s_jax.ops.logits import blocked_token_logprobs
from w2s_jax.search.decode import LOGIT_BYTES, prefill, read_chunk


@partial(jax.jit, donate_argnums=1)
def prefill_slot(model: Model, cache: KVCache, slot: Any, prompt: Any, length: Any) -> KVCache:
    """The cache, which is donated, with a slot's prompt read: `decode.reader.prefill`."""
    return prefill(model, cache, slot, prompt, length).constrain()


@partial(jax.jit, donate_argnums=1, static_argnames="first")
def read_rows(
    model: Model, cache: KVCache, committed: Any, last: Any, tokens: Any, longer: Any, *, first: int
) -> tuple[Array, KVCache, LayersKV | None]:
    """Score the tokens [P, R, n] of every row: the first `first`, of `longer` rows the others too.

    committed [P, W]: the stems' places; last [P, W]: the stems; longer: int32 slots and places
    [2, m] of the rows that have more tokens, with places from R on for none. Returns float32
    log-probabilities [P, R, n], the cache (donated) with the stems, and the keys and values of all
    but the last token of every row.
    """
    cache = replace(cache, committed_length=committed)
    logprobs, cache, chunk = read_chunk(model, cache, last, tokens[:, :, :first])
    if longer.shape[1]:
        logprobs, chunk = _read_on(model, cache, chunk, logprobs, tokens, longer)
    return logprobs, cache.constrain(), chunk


@partial(jax.jit, donate_argnums=1)
def read_last(
    model: RewardModel, cache: KVCache, committed: Any, last: Any, tokens: Any, counts: Any
) -> tuple[Array, KVCache, LayersKV | None]:
    """The label logits [P, R, labels] at the last of each row's counted tokens [P, R, n].

    The rest as with `read_rows`, but that every token is read.
    """
    cache = replace(cache, committed_length=committed)
    states, cache, chunk = _last_states(model.decoder, cache, last, tokens, counts)
    return model.head_of(states), cache.constrain(), chunk


@partial(jax.jit, donate_argnums=0)
def keep(cache: KVCache, buffer: LayersKV, parents: Any, rows: Any) -> KVCache:
    """The cache (donated) of the kept hypotheses: their parents' entries, then their rows'."""
    first = buffer if isinstance(buffer, KV) else buffer[0]
    count = first.keys.shape[-3]
    return commit_chunk(cache, buffer, parents=parents, rows=rows, count=count).constrain()


def _read_on(
    model: Model,
    cache: KVCache,
    chunk: LayersKV | None,
    logprobs: Float[Array, "P R f"],
    tokens: Int[Array, "P R n"],
    longer: Int[Array, "2 m"],
) -> tuple[Float[Array, "P R n"], LayersKV]:
    """Score what `longer` rows have behind their first f tokens, each as a slot of its own.

    Returns the log-probabilities and the chunk's keys and values, [P, R, n − 1, G, C] a layer, with
    zeros where nothing was read.
    """
    slots, places = longer
    rows, first = logprobs.shape[1:]
    more = tokens.shape[2] - first
    behind = ((0, 0), (0, 0), (0, more))
    real = jnp.minimum(places, rows - 1)
    parents = real // (rows // cache.committed_length.shape[1])
    over = jax.vmap if isinstance(cache.prefix, KV) else lambda f: f
    wide = jax.tree.map(over(lambda x: jnp.pad(x, (*behind, (0, 0), (0, 0)))), chunk)
    alone = KVCache(
        jax.tree.map(over(lambda x: x[slots]), cache.prefix),
        jax.tree.map(over(lambda x: x[slots, parents][:, None]), cache.committed),
        cache.prefix_length[slots],
        cache.committed_length[slots, parents][:, None],
        # They are few, so that no axis of a mesh need divide them.
        replace(cache.placement, rules=cache.placement.rules.replace(slots=None)),
    )
    found = forward(
        model.config,
        model.params,
        tokens[slots, real][:, None, first - 1 : -1],
        Layout(False, 1, more),
        cache=alone,
        chunk=jax.tree.map(over(lambda x: x[slots, real][:, None]), wide),
        chunk_start=jnp.int32(first - 1),
    )
    scores = blocked_token_logprobs(
        found.hidden.reshape(1, len(slots) * more, -1),
        tokens[slots, real, first:].reshape(1, -1, 1),
        lambda hidden: logits(model.config, model.params, hidden),
        block=max(1, LOGIT_BYTES // (4 * model.config.vocab_size)),
    ).reshape(-1, more)
    put = over(lambda x, new: x.at[slots, places].set(new[:, 0], mode="drop"))
    logprobs = jnp.pad(logprobs, behind).at[slots, places, first:].set(scores, mode="drop")
    return logprobs, jax.tree.map(put, wide, found.chunk)


def _last_states(
    model: Model,
    cache: KVCache,
    last: Int[Array, "P W"],
    tokens: Int[Array, "P R n"],
    counts: Int[Array, "P R"],
) -> tuple[Float[Array, "P R D"], KVCache, LayersKV | None]:
    """The state at the last of each row's counted tokens, or at its stem where there is none."""
    slots, rows, length = tokens.shape
    hypotheses = last.shape[1]
    layout = Layout(True, rows // hypotheses, length)
    new = jnp.concatenate([last[:, :, None], tokens.reshape(slots, hypotheses, -1)], axis=2)
    read = forward(model.config, model.params, new, layout, cache=cache)
    stems = jnp.repeat(read.hidden[:, :, 0], layout.successors, axis=1)
    behind = read.hidden[:, :, 1:].reshape(slots, rows, length, -1)
    at = jnp.maximum(counts - 1, 0)[..., None, None]
    ends = jnp.take_along_axis(behind, at, axis=2)[:, :, 0]
    return jnp.where((counts > 0)[..., None], ends, stems), read.cache, read.chunk
