"""One chunk for all slots – propose, score, select – as pure functions and as one program.

The loop over chunks and what reaches the host are in `run.py`.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from w2s_jax.decode.chunk import draw_keys, sample_chunk
from w2s_jax.decode.reader import read_chunk
from w2s_jax.errors import InputError
from w2s_jax.models.cache import KVCache, LayersKV, commit_chunk
from w2s_jax.pytrees import pytree
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.guides import SearchModels
from w2s_jax.search.selectors import Candidates
from w2s_jax.search.state import SearchState, hold

Buffers = tuple[LayersKV | None, ...]


@pytree()
class Proposal:
    """R rows of a slot that may continue its hypotheses; row r continues hypothesis r // K.

    tokens int32 [P, R, L]; values float32 [P, R, L] or None, what the proposer says of them;
    lengths int32 [P, R]: tokens of the response that count, those of earlier chunks included (it
    may end before this chunk where a stop string began earlier); finished bool [P, R]; buffers: the
    chunk's keys and values for each model that the proposer reads.
    """

    tokens: Array
    values: Array | None
    lengths: Array
    finished: Array
    buffers: Buffers


@pytree()
class Scored:
    """What the scorer says of a proposal.

    token_scores float32 [P, R, L]; end_scores float32 [P, R] or None, to be added where a row is
    cut by length (reference_quirks); buffers: the chunk's keys and values for each of its models.
    """

    token_scores: Array
    end_scores: Array | None
    buffers: Buffers


def search_eos(models: SearchModels, config: SearchConfig) -> tuple[int, ...]:
    """The token ids that end a response: the config's, or else the policy's, that all models know.

    Raises InputError where there are such ids and none of them can be proposed.
    """
    ids = models.policy.config.eos_ids if config.eos_ids is None else config.eos_ids
    known = tuple(eos for eos in ids if 0 <= eos < models.vocabulary)
    if ids and not known:
        raise InputError(
            f"no EOS id of {ids} is among the {models.vocabulary} token ids that all models share; "
            "give others as eos_ids (() for none)"
        )
    return known


def propose(models: SearchModels, state: SearchState) -> tuple[SearchState, Proposal]:
    """Sample a chunk for every row of every slot; the proposer's caches gain the last tokens."""
    config, proposer = state.config, state.config.proposer
    value = None
    if config.scorer.needs_values:
        value = partial(proposer.value, models)
    chunk = sample_chunk(
        proposer.readers(models),
        state.proposer,
        state.last,
        mix=partial(proposer.mix, models),
        value=value,
        keys=lambda t: draw_keys(state.key, state.row_ids, state.base + t, config.rows),
        sampling=config.sampling,
        successors=config.successors,
        length=config.length,
    )
    ends = _ends(chunk.tokens, state.base, search_eos(models, config), config.max_new_tokens)
    return (
        replace(state, proposer=chunk.caches),
        Proposal(chunk.tokens, chunk.values, *ends, chunk.buffers),
    )


def _ends(
    tokens: Int[Array, "P R L"], base: Int[Array, " P"], eos_ids: tuple[int, ...], limit: int
) -> tuple[Array, Array]:
    """Response lengths [P, R], an EOS included, and whether an EOS ended the row in time."""
    length = tokens.shape[-1]
    room = jnp.minimum(limit - base, length)[:, None]
    is_end = jnp.zeros(tokens.shape, bool)
    for eos in eos_ids:
        is_end = is_end | (tokens == eos)
    first = jnp.where(jnp.any(is_end, axis=-1), jnp.argmax(is_end, axis=-1), length)
    return (base[:, None] + jnp.minimum(first + 1, room)).astype(jnp.int32), first < room


def score(
    models: SearchModels, state: SearchState, proposal: Proposal
) -> tuple[SearchState, Scored]:
    """Score the proposed tokens; every model of the scorer reads each of them once."""
    config, tokens = state.config, proposal.tokens
    eos_ids, readers = search_eos(models, config), config.scorer.readers(models)
    adds_end = config.reference_quirks and bool(eos_ids) and bool(readers)
    if adds_end:
        tokens = _with_end(tokens, state.base, eos_ids[0], config.max_new_tokens)
    reads = [
        read_chunk(model, cache, state.last, tokens)
        for model, cache in zip(readers, state.scorer, strict=True)
    ]
    logprobs = tuple(read[0] for read in reads)
    like = jnp.zeros(tokens.shape, jnp.float32)
    scores = config.scorer.token_scores(models, logprobs, proposal.values, like)
    ends = None
    if adds_end:
        at = _end_index(state.base, config)[:, None, None]
        ends = jnp.take_along_axis(scores, jnp.broadcast_to(at, (*scores.shape[:2], 1)), -1)[..., 0]
        cut = (state.base + config.length >= config.max_new_tokens)[:, None]
        ends = jnp.where(cut & ~proposal.finished, ends, 0.0)
    state = replace(state, scorer=tuple(read[1] for read in reads))
    return state, Scored(scores[..., : config.length], ends, tuple(read[2] for read in reads))


def _end_index(base: Array, config: SearchConfig) -> Array:
    """Where in a chunk the length limit falls, [P]; L where it does not."""
    return jnp.clip(config.max_new_tokens - base, 0, config.length)


def _with_end(tokens: Array, base: Array, eos: int, limit: int) -> Array:
    """Tokens [P, R, L + 1] with an EOS where the length limit cuts, or behind the chunk."""
    length = tokens.shape[-1]
    padded = jnp.pad(tokens, ((0, 0), (0, 0), (0, 1)))
    at = jnp.clip(limit - base, 0, length)[:, None, None]
    return jnp.where(jnp.arange(length + 1) == at, eos, padded)


def select(state: SearchState, proposal: Proposal, scored: Scored) -> SearchState:
    """Keep W candidates of each slot; responses and caches of the kept ones take their places."""
    config = state.config
    width, count, length = config.beam_width, config.successors, config.length
    candidates = Candidates(_candidate_scores(state, proposal, scored))
    chosen = config.selector.select(candidates, width, count)
    is_row = chosen < config.rows
    parents = jnp.where(is_row, chosen // count, chosen - config.rows)
    rows = jnp.where(is_row, chosen, parents * count)

    def of_parent(values: Array) -> Array:
        if not config.selector.reorders:
            return values
        index = parents.reshape(*parents.shape, *(1,) * (values.ndim - 2))
        return jnp.take_along_axis(values, index, axis=1)

    def of_row(values: Array) -> Array:
        return jnp.take_along_axis(values, rows.reshape(*rows.shape, *(1,) * (values.ndim - 2)), 1)

    def commit(caches: tuple[KVCache, ...], buffers: Buffers) -> tuple[KVCache, ...]:
        moved = parents if config.selector.reorders else None
        return tuple(
            commit_chunk(cache, buffer, parents=moved, rows=rows, count=length - 1)
            for cache, buffer in zip(caches, buffers, strict=True)
        )

    tokens = of_row(proposal.tokens)
    extends = is_row & ~of_parent(state.finished)
    kept = replace(
        state,
        base=state.base + jnp.where(state.active, length, 0),
        last=tokens[..., -1],
        tokens=_write(of_parent(state.tokens), tokens, state.base),
        token_scores=_write(of_parent(state.token_scores), of_row(scored.token_scores), state.base),
        lengths=jnp.where(extends, of_row(proposal.lengths), of_parent(state.lengths)),
        scores=jnp.take_along_axis(candidates.scores, chosen, axis=1),
        finished=jnp.where(extends, of_row(proposal.finished), of_parent(state.finished)),
        proposer=commit(state.proposer, proposal.buffers),
        scorer=commit(state.scorer, scored.buffers),
    )
    return hold(kept)


def _candidate_scores(state: SearchState, proposal: Proposal, scored: Scored) -> Array:
    """[P, R + W]: the rows' scores, then those of finished hypotheses; −inf where none may be kept.

    A finished hypothesis is a candidate once, as itself; with reference_quirks it is one K times,
    in the places of its rows.
    """
    config, count = state.config, state.config.successors
    earlier = jnp.arange(config.capacity)
    counted = (earlier < state.base[:, None, None]) & (earlier < proposal.lengths[..., None])
    before = jnp.where(counted, jnp.repeat(state.token_scores, count, axis=1), 0.0).sum(-1)
    positions = state.base[:, None, None] + jnp.arange(config.length)
    now = jnp.where(positions < proposal.lengths[..., None], scored.token_scores, 0.0).sum(-1)
    rows = before + now
    if scored.end_scores is not None:
        rows = rows + scored.end_scores
    over = jnp.repeat(state.finished, count, axis=1)
    if config.reference_quirks:
        rows = jnp.where(over, jnp.repeat(state.scores, count, axis=1), rows)
        return jnp.concatenate([rows, jnp.full_like(state.scores, -jnp.inf)], axis=1)
    rows = jnp.where(over, -jnp.inf, rows)
    return jnp.concatenate([rows, jnp.where(state.finished, state.scores, -jnp.inf)], axis=1)


def _write(old: Array, new: Array, base: Array) -> Array:
    """Write [P, W, L] into [P, W, T] from each slot's base; what would pass T is dropped."""
    slot = jnp.arange(old.shape[0])[:, None, None]
    hypothesis = jnp.arange(old.shape[1])[None, :, None]
    index = base[:, None, None] + jnp.arange(new.shape[-1])
    return old.at[slot, hypothesis, index].set(new, mode="drop", unique_indices=True)


def conclude(models: SearchModels, state: SearchState, proposal: Proposal) -> SearchState:
    """Score a proposal and select."""
    state, scored = score(models, state, proposal)
    return select(state, proposal, scored)


@partial(jax.jit, donate_argnums=1)
def search_step(models: SearchModels, state: SearchState) -> SearchState:
    """One chunk for all slots in one program; the state is donated.

    Stop strings need text and so are not looked for here; see `run.search`.
    """
    return conclude(models, *propose(models, state))
