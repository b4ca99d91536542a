"""The state of a search: what every slot's hypotheses are, and every reader's cache."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from w2s_jax.models.cache import KVCache, cache_axes
from w2s_jax.models.model import Model
from w2s_jax.ops.sharding import DEFAULT_RULES, Placement, Rules
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.decode import prefill, start_cache
from w2s_jax.search.models import SearchModels

TILE = 8
"""The committed part has room for a multiple of so many tokens, which is a TPU's tile.

Where it does not (2,070 tokens, one key/value head a device), a TPU keeps the cache in another
order of its axes, and each chunk begins with a copy of it in this one.
"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draws:
    """What decides a prompt's draws and its length beside the program itself.

    Scalars, or [P] for all slots. key: its typed PRNG key. position, lane int32: added to the
    position in the response and to the lane (w·K + k) of each draw. limit int32: new tokens at
    most. temperature float32 (0 is greedy), top_p float32 (heeded where the config cuts a nucleus),
    beta float32 (of an EFT proposer).
    """

    key: Array
    position: Array
    lane: Array
    limit: Array
    temperature: Array
    top_p: Array
    beta: Array


def make_draws(
    row_id: int | Array,
    seed: int | Array,
    position: int | Array,
    lane: int | Array,
    limit: int | Array,
    temperature: float | Array,
    top_p: float | Array,
    beta: float | Array,
) -> Draws:
    """The draws of one prompt; the seed and the row id make its key."""
    key = jax.random.fold_in(jax.random.key(seed), row_id)
    numbers = (jnp.asarray(number, jnp.float32) for number in (temperature, top_p, beta))
    return Draws(key, *(jnp.asarray(x, jnp.int32) for x in (position, lane, limit)), *numbers)


def usual_draws(
    config: SearchConfig, row_id: int | Array, seed: int | Array | None = None
) -> Draws:
    """The draws of one prompt that has no numbers of its own."""
    seed = config.seed if seed is None else seed
    sampling, beta = config.sampling, getattr(config.proposer, "beta", 0.0)
    limits = (config.max_new_tokens, sampling.temperature, sampling.top_p, beta)
    return make_draws(row_id, seed, 0, 0, *limits)


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
    Raises InputError where the mesh does not divide the slots or the key/value heads.
    """
    placed = models if mesh is None else _placed(models, Placement(mesh, rules))
    # The program depends on neither; without them, another seed does not compile it again.
    usual = replace(config, seed=0, slots=None)
    seed = np.uint32(config.seed)
    return _empty(placed, seed, usual, slots, prefix_capacity, text_objectives, mesh, rules)


def _placed(models: SearchModels, usual: Placement) -> SearchModels:
    """The same models, those that do not say where they lie as `usual`."""

    def place(model: Model) -> Model:
        return model if model.placement.mesh is not None else replace(model, placement=usual)

    guides = (
        replace(guide, tuned=place(guide.tuned), untuned=place(guide.untuned))
        for guide in models.guides
    )
    return SearchModels(place(models.policy), tuple(guides))


# A program: of its many arrays each would be one, and on a mesh they are made in their shards,
# written as those of later steps will be.
@partial(jax.jit, static_argnums=range(2, 8))
def _empty(
    models: SearchModels,
    seed: Array,
    config: SearchConfig,
    slots: int,
    prefix_capacity: int,
    text_objectives: int,
    mesh: Mesh | None,
    rules: Rules,
) -> SearchState:
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
    on_tokens = config.scorer.objectives(models)
    state = SearchState(
        seed=seed,
        draws=jax.tree.map(lambda x: jnp.broadcast_to(x, slots), usual_draws(config, 0)),
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
    axes: dict[str, Any] = {"seed": ()}
    axes["draws"] = jax.tree.map(lambda _: slot, state.draws)
    axes |= dict.fromkeys(("active", "base"), slot)
    axes |= dict.fromkeys(("lengths", "finished"), each)
    axes |= {"last": ("slots", "members", "hypotheses"), "objectives": (*each, "objectives")}
    axes |= {"faults": ("slots", "members")}
    axes |= {
        "tokens": (*each, "committed"),
        "token_scores": (*each, "committed", "objectives"),
    }
    for readers in ("proposer", "scorer"):
        axes[readers] = tuple(cache_axes(cache) for cache in getattr(state, readers))
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
    own = usual_draws(config, row_id, state.seed) if own is None else own

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
