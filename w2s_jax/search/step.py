"""One chunk for all slots – propose, score, select – as pure functions and as one program.

What reaches the host is in `session.py`, the loop over chunks in `run.py`.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from w2s_jax.errors import InputError
from w2s_jax.models.cache import KVCache, LayersKV, commit_chunk
from w2s_jax.ops.logits import Sampling, shortlist
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.decode import draw_keys, read_chunk, sample_chunk
from w2s_jax.search.models import SearchModels
from w2s_jax.search.selectors import Selection, select_among
from w2s_jax.search.state import Draws, SearchState, constrain

Buffers = tuple[LayersKV | None, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Proposal:
    """R rows of a slot that may continue its hypotheses; row r continues hypothesis r // K.

    tokens int32 [P, R, L]; values float32 [P, R, L, J] or None, what the proposer says of them;
    lengths int32 [P, R]: tokens of the response that count, those of earlier chunks included (it
    may end before this chunk where a stop string began earlier); finished bool [P, R]; faults bool
    [P, R, L, F]: whose logits were no distribution where a token was drawn; buffers: the chunk's
    keys and values for each model that the proposer reads.
    """

    tokens: Array
    values: Array | None
    lengths: Array
    finished: Array
    faults: Array
    buffers: Buffers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scored:
    """What the scorer says of a proposal.

    token_scores float32 [P, R, L, j]; end_scores float32 [P, R, j] or None, to be added where a row
    is cut by length (reference_quirks); faults bool [P, F]: whose logits were no distribution
    where a token that counts was scored; buffers: the chunk's keys and values for each of its
    models.
    """

    token_scores: Array
    end_scores: Array | None
    faults: Array
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
    config, proposer, own = state.config, state.config.proposer, state.draws
    readers = proposer.readers(models)
    # The token that each hypothesis ended with in the last chunk is read here, not when it was
    # drawn: its logits are those of this chunk's first draw, the same for all K successors. Read at
    # once, it would have been read in W·K rows, most of which were then dropped.
    lanes = own.lane[:, None] + jnp.arange(config.rows)
    value = partial(proposer.value, models) if config.scorer.needs_values else None
    chunk = sample_chunk(
        tuple(models.members[reader] for reader in readers),
        state.proposer,
        tuple(state.last[:, reader] for reader in readers),
        mix=partial(proposer.mix, models, beta=own.beta),
        value=value,
        fault=partial(proposer.faults, models),
        keys=lambda t: draw_keys(own.key, own.position + state.base + t, lanes),
        shortlist=partial(_shortlist, config.sampling, own),
        successors=config.successors,
        length=config.length,
    )
    ends = _ends(chunk.tokens, state.base, search_eos(models, config), own.limit)
    return (
        replace(state, proposer=chunk.caches),
        Proposal(chunk.tokens, chunk.values, *ends, chunk.faults, chunk.buffers),
    )


def _shortlist(sampling: Sampling, own: Draws, logits: Array) -> tuple[Array, Array | None]:
    """What each slot may draw, by its own temperature and nucleus; logits [P, .., V]."""
    axes = (-1, *(1,) * (logits.ndim - 2))
    return shortlist(
        logits, sampling, temperature=own.temperature.reshape(axes), top_p=own.top_p.reshape(axes)
    )


def _ends(
    tokens: Int[Array, "P R L"],
    base: Int[Array, " P"],
    eos_ids: tuple[int, ...],
    limit: Int[Array, " P"],
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
        tokens = _with_end(tokens, state.base, eos_ids[0], state.draws.limit)
    # One teacher-forced call a chunk instead of one a token: the weights of a guide, which is what
    # a small batch spends its time on, are read once for L tokens.
    reads = [
        read_chunk(models.members[reader], cache, state.last[:, reader], tokens)
        for reader, cache in zip(readers, state.scorer, strict=True)
    ]
    logprobs = tuple(read[0] for read in reads)
    like = jnp.zeros(tokens.shape, jnp.float32)
    scores = config.scorer.token_scores(models, logprobs, proposal.values, like)
    ends, lengths = None, proposal.lengths
    if adds_end:
        at = _end_index(state.base, state.draws.limit, config.length)[:, None, None, None]
        ends = jnp.take_along_axis(scores, at, axis=2)[:, :, 0]
        cut = (state.base + config.length >= state.draws.limit)[:, None] & ~proposal.finished
        ends = jnp.where(cut[..., None], ends, 0.0)
        lengths = lengths + cut
    read_by = jnp.zeros((*tokens.shape, len(models.sources)), bool)
    for reader, found in zip(readers, logprobs, strict=True):
        read_by = read_by.at[..., reader].set(jnp.isnan(found))
    faults = _faults(state, read_by, lengths)
    state = replace(state, scorer=tuple(read[1] for read in reads))
    kept = tuple(read[2] for read in reads)
    return state, Scored(scores[:, :, : config.length], ends, faults, kept)


def _faults(
    state: SearchState, faults: Bool[Array, "P R n F"], lengths: Int[Array, "P R"]
) -> Bool[Array, "P F"]:
    """Those of tokens that count, in rows of hypotheses that go on."""
    over = jnp.repeat(state.finished, state.config.successors, axis=1) | ~state.active[:, None]
    positions = state.base[:, None, None] + jnp.arange(faults.shape[2])
    counts = (positions < lengths[..., None]) & ~over[..., None]
    return jnp.any(faults & counts[..., None], axis=(1, 2))


def _end_index(base: Array, limit: Array, length: int) -> Array:
    """Where in a chunk the length limit falls, [P]; L where it does not."""
    return jnp.clip(limit - base, 0, length)


def _with_end(tokens: Array, base: Array, eos: int, limit: Array) -> Array:
    """Tokens [P, R, L + 1] with an EOS where the length limit cuts, or behind the chunk."""
    length = tokens.shape[-1]
    padded = jnp.pad(tokens, ((0, 0), (0, 0), (0, 1)))
    at = _end_index(base, limit, length)[:, None, None]
    return jnp.where(jnp.arange(length + 1) == at, eos, padded)


def select(
    state: SearchState, proposal: Proposal, scored: Scored, totals: Array | None = None
) -> tuple[SearchState, Selection]:
    """Keep W candidates of each slot; responses and caches of the kept ones take their places.

    totals float32 [P, R, n]: scores of whole responses, given from outside the program.
    """
    config, length = state.config, state.config.length
    selection = select_among(
        config.selector,
        _row_objectives(state, proposal, scored, totals),
        state.objectives,
        state.finished,
        reference_quirks=config.reference_quirks,
    )
    parents, rows = selection.parents, selection.rows

    def of_parent(values: Array) -> Array:
        if not config.selector.reorders:
            return values
        return _take(values, parents)

    # Until here the keys of all R rows lie in chunk buffers beside the W hypotheses that they
    # continue. Only what was kept is appended, and reordered: once a chunk, and never the prompt,
    # which the hypotheses share. The buffers lack the chunk's last token (see `propose`).
    def commit(caches: tuple[KVCache, ...], buffers: Buffers) -> tuple[KVCache, ...]:
        # To move a cache onto itself would copy it all the same.
        moved = parents if config.selector.reorders else None
        return tuple(
            commit_chunk(cache, buffer, parents=moved, rows=rows, count=length - 1)
            for cache, buffer in zip(caches, buffers, strict=True)
        )

    tokens = _take(proposal.tokens, rows)
    extends = (selection.chosen < config.rows) & ~of_parent(state.finished)
    token_scores = _take(scored.token_scores, rows)
    # Members agree on it from the first chunk on; only the ends of their prompts differ.
    last = jnp.broadcast_to(tokens[:, None, :, -1], state.last.shape)
    kept = replace(
        state,
        # By L for hypotheses that ended inside the chunk too, so that a slot writes at one place.
        # What lies beyond their `lengths` is never counted, as they are not continued.
        base=state.base + jnp.where(state.active, length, 0),
        last=last,
        tokens=_write(of_parent(state.tokens), tokens, state.base),
        token_scores=_write(of_parent(state.token_scores), token_scores, state.base),
        lengths=jnp.where(extends, _take(proposal.lengths, rows), of_parent(state.lengths)),
        objectives=_take(selection.candidates.objectives, selection.chosen),
        finished=jnp.where(extends, _take(proposal.finished, rows), of_parent(state.finished)),
        faults=state.faults | scored.faults | _faults(state, proposal.faults, proposal.lengths),
        proposer=commit(state.proposer, proposal.buffers),
        scorer=commit(state.scorer, scored.buffers),
    )
    return constrain(kept), selection


def _take(values: Array, places: Int[Array, "P W"]) -> Array:
    """The entries of axis 1 at the places of each slot."""
    return jnp.take_along_axis(values, places.reshape(*places.shape, *(1,) * (values.ndim - 2)), 1)


def _row_objectives(
    state: SearchState, proposal: Proposal, scored: Scored, totals: Array | None
) -> Float[Array, "P R J"]:
    """What each row sums to: the counted tokens of earlier chunks and of this one, then totals."""
    config, count = state.config, state.config.successors
    earlier = jnp.arange(config.capacity)
    counted = (earlier < state.base[:, None, None]) & (earlier < proposal.lengths[..., None])
    scores_before = jnp.repeat(state.token_scores, count, axis=1)
    before = jnp.where(counted[..., None], scores_before, 0.0).sum(axis=2)
    positions = state.base[:, None, None] + jnp.arange(config.length)
    counts = (positions < proposal.lengths[..., None])[..., None]
    rows = before + jnp.where(counts, scored.token_scores, 0.0).sum(axis=2)
    if scored.end_scores is not None:
        rows = rows + scored.end_scores
    if totals is not None:
        rows = jnp.concatenate([rows, totals], axis=-1)
    return rows


def _write(old: Array, new: Array, base: Array) -> Array:
    """Write [P, W, L, ..] into [P, W, T, ..] from each slot's base, dropping what passes T."""
    slot = jnp.arange(old.shape[0])[:, None, None]
    hypothesis = jnp.arange(old.shape[1])[None, :, None]
    index = base[:, None, None] + jnp.arange(new.shape[2])
    return old.at[slot, hypothesis, index].set(new, mode="drop", unique_indices=True)


def conclude(
    models: SearchModels, state: SearchState, proposal: Proposal, totals: Array | None = None
) -> tuple[SearchState, Selection]:
    """Score a proposal and select."""
    state, scored = score(models, state, proposal)
    return select(state, proposal, scored, totals)


# The state is donated so that caches are updated in place. They are most of the memory that a
# search takes beside weights; kept, the old ones would lie beside the new during every chunk. The
# caller's old state is gone with that, so a session is not used again once it was advanced.
@partial(jax.jit, donate_argnums=1)
def search_step(models: SearchModels, state: SearchState) -> SearchState:
    """One chunk for all slots in one program; the state is donated.

    Stop strings and scores of texts need the host and so are not looked for here; see `session.py`.
    """
    return conclude(models, *propose(models, state))[0]
