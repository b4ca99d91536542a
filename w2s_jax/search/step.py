"""The state of a search, and one chunk of it – propose, score, select – as one program.

The state holds what every slot's hypotheses are and every reader's cache. What reaches the host is
in `session.py`, the loop over chunks in `run.py`.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from w2s_jax.models.cache import KVCache, LayersKV, cache_axes, commit_chunk
from w2s_jax.models.model import Model
from w2s_jax.ops.sharding import DEFAULT_RULES, Placement, Rules
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.decode import (
    Draws,
    draw_numbers,
    make_draws,
    prefill,
    read_chunk,
    sample_chunk,
    start_cache,
)
from w2s_jax.search.methods import Selection, select_among
from w2s_jax.search.models import SearchModels

TILE = 8
"""The committed part has room for a multiple of so many tokens, which is a TPU's tile.

Where it does not (2,070 tokens, one key/value head a device), a TPU keeps the cache in another
order of its axes, and each chunk begins with a copy of it in this one.
"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SearchState:
    """P slots under search, each with its own progress; donated from step to step.

    All shapes are fixed when a search begins. An empty slot is computed like the others and its
    numbers are dropped: were there as many slots as prompts left, each prompt that ends would
    compile a program anew, and other shapes give float32 sums that differ in the last digits, so
    that a response would depend on its neighbours.

    seed uint32 []: the run's, for prompts that are given no draws of their own. draws: [P] each.
    active bool [P]: the slot holds a prompt that is not done. base int32 [P]: tokens of the chunks
    behind it, whole chunks, for all its hypotheses alike. last int32 [P, M, W]: the token to be
    read next by each of the M members of the models. tokens int32 [P, W, T] and token_scores
    float32 [P, W, T, j], of which lengths int32 [P, W] count; beyond that they are arbitrary.
    objectives float32 [P, W, J]: j sums of the counted token scores, then what texts were given.
    finished bool [P, W]: ended by EOS or a stop string. faults bool [P, F]: which sources gave
    logits that are no distribution, so that the search is over. proposer, scorer: one cache for
    each member that the proposer, the scorer reads. With a mesh the slots are split over it as the
    rules say; caches lie where their models do.
    """

    seed: Array
    draws: Draws
    active: Array
    base: Array
    last: Array
    tokens: Array
    token_scores: Array
    lengths: Array
    objectives: Array
    finished: Array
    faults: Array
    proposer: tuple[KVCache, ...]
    scorer: tuple[KVCache, ...]
    config: SearchConfig = field(metadata={"static": True})
    mesh: Mesh | None = field(default=None, metadata={"static": True})
    rules: Rules = field(default=DEFAULT_RULES, metadata={"static": True})

    @property
    def scores(self) -> Array:
        """float32 [P, W]: the sums of the objectives."""
        return self.objectives.sum(axis=-1)

    @property
    def done(self) -> Array:
        """bool [P]: slots whose prompt needs no further chunk, or can have none."""
        full = self.base >= self.draws.limit
        over = jnp.all(self.finished, axis=1) | jnp.any(self.faults, axis=1)
        return self.active & (full | over)


def start_search(
    models: SearchModels,
    config: SearchConfig,
    *,
    slots: int,
    prefix_capacity: int,
    text_objectives: int = 0,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
) -> SearchState:
    """A state of empty slots with room for prompts of up to prefix_capacity + 1 tokens.

    text_objectives counts the scores that each hypothesis is given from outside the program.

    Raises:
        InputError: where the mesh does not divide the slots or the key/value heads.
    """
    placed = models if mesh is None else _placed(models, Placement(mesh, rules))
    # The program depends on neither; without them, another seed does not compile it again.
    usual = replace(config, seed=0, slots=None)
    sizes = (slots, prefix_capacity, text_objectives)
    return _empty(placed, np.uint32(config.seed), usual, sizes, mesh, rules)


def _placed(models: SearchModels, usual: Placement) -> SearchModels:
    """The same models, those that do not say where they lie as `usual`."""

    def place(part: Any) -> Any:
        placed = not isinstance(part, Model) or part.placement.mesh is not None
        return part if placed else replace(part, placement=usual)

    is_model = lambda part: isinstance(part, Model)  # noqa: E731
    return jax.tree.map(place, models, is_leaf=is_model)


# A program: of its many arrays each would be one, and on a mesh they are made in their shards,
# written as those of later steps will be.
@partial(jax.jit, static_argnums=range(2, 6))
def _empty(
    models: SearchModels,
    seed: Array,
    config: SearchConfig,
    sizes: tuple[int, int, int],
    mesh: Mesh | None,
    rules: Rules,
) -> SearchState:
    slots, prefix_capacity, text_objectives = sizes
    # Member 0 is the policy.
    kept = {0: jnp.int8} if config.policy_cache == "int8" else {}

    def caches(readers: tuple[int, ...]) -> tuple[KVCache, ...]:
        return tuple(
            start_cache(
                models.members[reader],
                slots=slots,
                hypotheses=config.beam_width,
                prefix_capacity=prefix_capacity,
                committed_capacity=-(-config.capacity // TILE) * TILE,
                dtype=kept.get(reader),
            )
            for reader in readers
        )

    each = (slots, config.beam_width)
    on_tokens, usual = config.scorer.objectives(models), make_draws(0, 0, *draw_numbers(config))
    state = SearchState(
        seed=seed,
        draws=jax.tree.map(lambda x: jnp.broadcast_to(x, slots), usual),
        active=jnp.zeros(slots, bool),
        base=jnp.zeros(slots, jnp.int32),
        last=jnp.zeros((slots, len(models.members), config.beam_width), jnp.int32),
        tokens=jnp.zeros((*each, config.capacity), jnp.int32),
        token_scores=jnp.zeros((*each, config.capacity, on_tokens), jnp.float32),
        lengths=jnp.zeros(each, jnp.int32),
        objectives=jnp.zeros((*each, on_tokens + text_objectives), jnp.float32),
        finished=jnp.zeros(each, bool),
        faults=jnp.zeros((slots, len(models.sources)), bool),
        proposer=caches(config.proposer.readers(models)),
        scorer=caches(config.scorer.readers(models)),
        config=config,
        mesh=mesh,
        rules=rules,
    )
    return constrain(state)


def state_axes(state: SearchState) -> SearchState:
    """The logical axes of every array of a state, in its own structure."""
    slot, each = ("slots",), ("slots", "hypotheses")
    axes: dict[str, Any] = {
        "seed": (),
        "draws": jax.tree.map(lambda _: slot, state.draws),
        "active": slot,
        "base": slot,
        "last": ("slots", "members", "hypotheses"),
        "tokens": (*each, "committed"),
        "token_scores": (*each, "committed", "objectives"),
        "lengths": each,
        "objectives": (*each, "objectives"),
        "finished": each,
        "faults": ("slots", "members"),
        "proposer": tuple(map(cache_axes, state.proposer)),
        "scorer": tuple(map(cache_axes, state.scorer)),
    }
    return replace(state, **axes)


def constrain(state: SearchState) -> SearchState:
    """Inside a program: the state with every array held to its sharding.

    Every program ends with this. Left to itself XLA may give back another sharding than it was
    given, and the next call, whose arguments then differ, would compile again and could not use the
    donated buffers.
    """
    if state.mesh is None:
        return state
    # Caches say themselves where they lie: a guide's rules may be others than the state's.
    own = Placement(state.mesh, state.rules)
    rest, axes = (replace(one, proposer=(), scorer=()) for one in (state, state_axes(state)))
    return replace(
        own.constrain(rest, axes),
        proposer=tuple(cache.constrain() for cache in state.proposer),
        scorer=tuple(cache.constrain() for cache in state.scorer),
    )


def insert_prompt(
    models: SearchModels,
    state: SearchState,
    slot: Array,
    row_id: Array,
    prompt: Array,
    length: Array,
    own: Draws | None = None,
) -> SearchState:
    """Put a prompt into a slot: int32 [prefix_capacity + 1], right-padded, of `length` ≥ 1 tokens.

    Where members read it in ways of their own, prompt is [M, prefix_capacity + 1] and length [M].
    The seed and the row id decide the draws, unless it brings its own. Every reader reads the
    prompt once, alone, so that its numbers do not depend on its neighbours.
    """
    config, count = state.config, len(models.members)
    prompts = jnp.broadcast_to(prompt, (count, prompt.shape[-1]))
    lengths = jnp.broadcast_to(length, (count,))
    if own is None:
        own = make_draws(row_id, state.seed, *draw_numbers(config))

    def fill(readers: tuple[int, ...], caches: tuple[KVCache, ...]) -> tuple[KVCache, ...]:
        return tuple(
            prefill(models.members[reader], cache, slot, prompts[reader, :-1], lengths[reader])
            for reader, cache in zip(readers, caches, strict=True)
        )

    # Read with the first chunk, for all hypotheses at once, as every chunk's last token is with the
    # next one; so the prefix holds one token less than the prompt.
    last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)
    return constrain(
        replace(
            state,
            draws=jax.tree.map(lambda all, one: all.at[slot].set(one), state.draws, own),
            active=state.active.at[slot].set(True),
            base=state.base.at[slot].set(0),
            last=state.last.at[slot].set(last),
            lengths=state.lengths.at[slot].set(0),
            objectives=state.objectives.at[slot].set(0.0),
            finished=state.finished.at[slot].set(False),
            faults=state.faults.at[slot].set(False),
            proposer=fill(config.proposer.readers(models), state.proposer),
            scorer=fill(config.scorer.readers(models), state.scorer),
        )
    )


def release(state: SearchState, slot: Array) -> SearchState:
    """Mark a slot as empty."""
    return constrain(replace(state, active=state.active.at[slot].set(False)))


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


def propose(models: SearchModels, state: SearchState) -> tuple[SearchState, Proposal]:
    """Sample a chunk for every row of every slot; the proposer's caches gain the last tokens."""
    readers = state.config.proposer.readers(models)
    # The token that each hypothesis ended with in the last chunk is read here, not when it was
    # drawn: its logits are those of this chunk's first draw, the same for all K successors. Read at
    # once, it would have been read in W·K rows, most of which were then dropped.
    last = tuple(state.last[:, reader] for reader in readers)
    chunk = sample_chunk(models, state.config, state.draws, state.proposer, last, state.base)
    eos_ids = models.known_eos_ids(state.config.eos_ids)
    ends = _ends(chunk.tokens, state.base, eos_ids, state.draws.limit)
    return (
        replace(state, proposer=chunk.caches),
        Proposal(chunk.tokens, chunk.values, *ends, chunk.faults, chunk.buffers),
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
    eos_ids, readers = models.known_eos_ids(config.eos_ids), config.scorer.readers(models)
    adds_end = config.reference_quirks and bool(eos_ids) and bool(readers)
    if adds_end:
        # Where in the chunk the length limit falls; L, behind it, where it does not.
        at = jnp.clip(state.draws.limit - state.base, 0, config.length)[:, None, None]
        padded = jnp.pad(tokens, ((0, 0), (0, 0), (0, 1)))
        tokens = jnp.where(jnp.arange(config.length + 1) == at, eos_ids[0], padded)
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
        ends = jnp.take_along_axis(scores, at[..., None], axis=2)[:, :, 0]
        cut = (state.base + config.length >= state.draws.limit)[:, None] & ~proposal.finished
        ends = jnp.where(cut[..., None], ends, 0.0)
        lengths = lengths + cut
    unsound = jnp.zeros((*tokens.shape, len(models.sources)), bool)
    for reader, found in zip(readers, logprobs, strict=True):
        unsound = unsound.at[..., reader].set(jnp.isnan(found))
    faults = _faults(state, unsound, lengths)
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
        return _take(values, parents) if config.selector.reorders else values

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
