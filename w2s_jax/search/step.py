"""The state of a search, and one chunk of it – propose, score, select – as one program."""

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
    row_ends,
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
    """P slots under search, each with its own progress. Donated from step to step.

    All shapes are fixed when a search begins. An empty slot is computed like the others and its
    results are dropped: with only as many slots as prompts left, each prompt that ends would
    compile a new program, and change the responses of its neighbours, since float32 sums over other
    shapes differ in the last digits.

    With a mesh the slots are split over it by `rules`; caches are placed as their models are.

    Attributes:
        seed: uint32 [], the run's; for prompts that bring no draws of their own.
        draws: [P] each.
        active: bool [P], the slot holds a prompt that is not released.
        base: int32 [P], tokens of the whole chunks so far, the same for all hypotheses of a slot.
        last: int32 [P, M, W], the token that each of the M models reads next.
        tokens: int32 [P, W, T], the responses; arbitrary from `lengths` on.
        token_scores: float32 [P, W, T, j], of the scorer on tokens; arbitrary from `lengths` on.
        lengths: int32 [P, W], tokens of the responses that count.
        objectives: float32 [P, W, J], j sums over the counted token scores, then scores of texts.
        finished: bool [P, W], an EOS or a stop string ended the response.
        faults: bool [P, F], sources whose logits were no distribution, which ends the search.
        proposer, scorer: One cache for each model that the proposer, or the scorer, reads.
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
        """float32 [P, W]: sums of the objectives."""
        return self.objectives.sum(axis=-1)

    @property
    def done(self) -> Array:
        """bool [P]: slots whose prompt has ended, or cannot go on because of a fault."""
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
    abstract: bool = False,
) -> SearchState:
    """A state of empty slots with room for prompts of up to prefix_capacity + 1 tokens.

    Args:
        models: The policy and the guides.
        config: The search.
        slots: P, prompts side by side.
        prefix_capacity: S.
        text_objectives: Scores of each hypothesis that come from outside the program.
        mesh: The models'.
        rules: How the slots are split over it.
        abstract: Compile what makes the state, and return one of `jax.ShapeDtypeStruct`s.

    Raises:
        InputError: Where the mesh does not divide the slots or the key/value heads.
    """
    placed = models if mesh is None else _placed(models, Placement(mesh, rules))
    # The program depends on neither; without them, another seed does not compile it again.
    usual = replace(config, seed=0, slots=None)
    given = (np.uint32(config.seed), usual, (slots, prefix_capacity, text_objectives), mesh, rules)
    if abstract:
        _empty.lower(placed, *given).compile()
    return (_empty.eval_shape if abstract else _empty)(placed, *given)


def _placed(models: SearchModels, usual: Placement) -> SearchModels:
    """The models, with `usual` as the placement of those that have no mesh."""

    def place(part: Any) -> Any:
        placed = not isinstance(part, Model) or part.placement.mesh is not None
        return part if placed else replace(part, placement=usual)

    return jax.tree.map(place, models, is_leaf=lambda part: isinstance(part, Model))


# One program: each array would else be one, and on a mesh would not be made in its final shards.
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
    """The logical axes of every array of a state, as a state."""
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
    """Inside a program: the state with the sharding of every array fixed.

    Every program ends with this. Without it, XLA may return another sharding than it was given; the
    next call would then compile again, and could not use the donated buffers.
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
    """Put a prompt into a slot.

    Every model reads the prompt alone, so that its numbers do not depend on other slots.

    Args:
        models: The policy and the guides.
        state: The state to insert into.
        slot: int32 [], the slot's index.
        row_id: Int32 or uint32 []; with the seed it decides the draws, unless `own` does.
        prompt: int32 [S + 1], right-padded, or [M, S + 1] where each model reads its own.
        length: int32 [] or [M], tokens of the prompt, at least 1.
        own: The prompt's own draws.
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
    """The state with a slot marked as empty."""
    return constrain(replace(state, active=state.active.at[slot].set(False)))


Buffers = tuple[LayersKV | None, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Proposal:
    """R candidate rows of each slot; row r continues hypothesis r // K.

    Attributes:
        tokens: int32 [P, R, L].
        values: float32 [P, R, L, J], what the proposer says of the tokens, or None.
        lengths: int32 [P, R], tokens of the response that count; a stop string may lie before
            `base`.
        finished: bool [P, R], an EOS or a stop string ended the response.
        faults: bool [P, R, L, F], whether each source's logits were no distribution at the draw.
        buffers: Keys and values of the chunk, one for each model that the proposer reads.
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
    """The scorer's result for a proposal.

    Attributes:
        token_scores: float32 [P, R, L, j].
        end_scores: float32 [P, R, j] or None, of an EOS behind rows cut by length
            (reference_quirks).
        faults: bool [P, F], sources whose logits were no distribution at a token that counts.
        buffers: Keys and values of the chunk, one for each model that the scorer reads.
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
    ends = row_ends(chunk.tokens, state.base, eos_ids, state.draws.limit)
    return (
        replace(state, proposer=chunk.caches),
        Proposal(chunk.tokens, chunk.values, *ends, chunk.faults, chunk.buffers),
    )


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
    return state, Scored(scores[:, :, : config.length], ends, faults, tuple(r[2] for r in reads))


def _faults(
    state: SearchState, faults: Bool[Array, "P R n F"], lengths: Int[Array, "P R"]
) -> Bool[Array, "P F"]:
    """Faults at tokens that count, in rows of active slots whose hypothesis goes on."""
    over = jnp.repeat(state.finished, state.config.successors, axis=1) | ~state.active[:, None]
    positions = state.base[:, None, None] + jnp.arange(faults.shape[2])
    counts = (positions < lengths[..., None]) & ~over[..., None]
    return jnp.any(faults & counts[..., None], axis=(1, 2))


def select(
    state: SearchState, proposal: Proposal, scored: Scored, totals: Array | None = None
) -> tuple[SearchState, Selection]:
    """Keep W candidates of each slot, with their responses and cache entries.

    Args:
        state: The state before the chunk.
        proposal: The rows.
        scored: Their scores on tokens.
        totals: float32 [P, R, n], scores of whole responses from outside the program.
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

    # The keys of all R rows are still in chunk buffers. Only those of kept rows are appended and
    # reordered, once a chunk, and never the prompt. The buffers lack the last one (see `propose`).
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
    """Entries [P, W, ..] of `values` [P, c, ..] at each slot's places."""
    return jnp.take_along_axis(values, places.reshape(*places.shape, *(1,) * (values.ndim - 2)), 1)


def _row_objectives(
    state: SearchState, proposal: Proposal, scored: Scored, totals: Array | None
) -> Float[Array, "P R J"]:
    """Objectives of each row: sums over the counted tokens of all chunks, then `totals`."""
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
    """Write [P, W, L, ..] into [P, W, T, ..] from each slot's base on; what passes T is dropped."""
    slot = jnp.arange(old.shape[0])[:, None, None]
    hypothesis = jnp.arange(old.shape[1])[None, :, None]
    index = base[:, None, None] + jnp.arange(new.shape[2])
    return old.at[slot, hypothesis, index].set(new, mode="drop", unique_indices=True)


def conclude(
    models: SearchModels, state: SearchState, proposal: Proposal, totals: Array | None = None
) -> tuple[SearchState, Selection]:
    """Score a proposal and select; arguments as of `score` and `select`."""
    state, scored = score(models, state, proposal)
    return select(state, proposal, scored, totals)


# The state is donated so that caches are updated in place. They are most of the memory that a
# search takes beside weights; kept, the old ones would lie beside the new during every chunk. The
# caller's old state is gone with that, so a session is not used again once it was advanced.
@partial(jax.jit, donate_argnums=1)
def search_step(models: SearchModels, state: SearchState) -> SearchState:
    """One chunk for all slots in one program; the state is donated.

    Stop strings and scores of texts need the host, so this step ignores them; see `session.py`.
    """
    return conclude(models, *propose(models, state))[0]
