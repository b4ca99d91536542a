"""The state of a search: what every slot's hypotheses are, and every reader's cache."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from w2s_jax.decode.reader import prefill, start_cache
from w2s_jax.models.cache import KVCache, cache_axes
from w2s_jax.ops.sharding import DEFAULT_RULES, Rules, constrain
from w2s_jax.pytrees import pytree
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.guides import SearchModels


@pytree(static=("config", "mesh", "rules"))
class SearchState:
    """P slots under search, each with its own progress; donated from step to step.

    key: the run's typed PRNG key. row_ids int32 [P]: the prompts' ids, which with the key decide
    their draws. active bool [P]: the slot holds a prompt that is not done. base int32 [P]: tokens
    of the chunks behind it, whole chunks, for all its hypotheses alike. last int32 [P, W]: the
    token to be read next. tokens int32 and token_scores float32 [P, W, T], of which lengths int32
    [P, W] count; beyond that they are arbitrary. scores float32 [P, W]: sums of the counted token
    scores. finished bool [P, W]: ended by EOS or a stop string. proposer, scorer: one cache for
    each model that the proposer, the scorer reads. With a mesh the slots, and the caches' heads,
    are split over it as the rules say.
    """

    key: Array
    row_ids: Array
    active: Array
    base: Array
    last: Array
    tokens: Array
    token_scores: Array
    lengths: Array
    scores: Array
    finished: Array
    proposer: tuple[KVCache, ...]
    scorer: tuple[KVCache, ...]
    config: SearchConfig
    mesh: Mesh | None = None
    rules: Rules = DEFAULT_RULES

    @property
    def done(self) -> Array:
        """bool [P]: slots whose prompt needs no further chunk."""
        full = self.base >= self.config.max_new_tokens
        return self.active & (full | jnp.all(self.finished, axis=1))


def start_search(
    models: SearchModels,
    config: SearchConfig,
    *,
    slots: int,
    prefix_capacity: int,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
) -> SearchState:
    """A state of empty slots with room for prompts of up to prefix_capacity + 1 tokens.

    Raises InputError where the mesh does not divide the slots or the key/value heads.
    """

    def caches(readers: tuple) -> tuple[KVCache, ...]:
        return tuple(
            start_cache(
                model,
                slots=slots,
                hypotheses=config.beam_width,
                prefix_capacity=prefix_capacity,
                committed_capacity=config.capacity,
            )
            for model in readers
        )

    each = (slots, config.beam_width)
    state = SearchState(
        key=jax.random.key(config.seed),
        row_ids=jnp.zeros(slots, jnp.int32),
        active=jnp.zeros(slots, bool),
        base=jnp.zeros(slots, jnp.int32),
        last=jnp.zeros(each, jnp.int32),
        tokens=jnp.zeros((*each, config.capacity), jnp.int32),
        token_scores=jnp.zeros((*each, config.capacity), jnp.float32),
        lengths=jnp.zeros(each, jnp.int32),
        scores=jnp.zeros(each, jnp.float32),
        finished=jnp.zeros(each, bool),
        proposer=caches(config.proposer.readers(models)),
        scorer=caches(config.scorer.readers(models)),
        # The program depends on neither; without them, another seed does not compile it again.
        config=replace(config, seed=0, slots=None),
        mesh=mesh,
        rules=rules,
    )
    # Placed by a program, so that the shardings are written as those of later steps will be.
    return state if mesh is None else jax.jit(hold, donate_argnums=0)(state)


def state_axes(state: SearchState) -> SearchState:
    """The logical axes of every array of a state, in its own structure."""
    slot, each = ("slots",), ("slots", "hypotheses")
    axes: dict[str, Any] = {"key": ()}
    axes |= dict.fromkeys(("row_ids", "active", "base"), slot)
    axes |= dict.fromkeys(("last", "lengths", "scores", "finished"), each)
    axes |= dict.fromkeys(("tokens", "token_scores"), (*each, "committed"))
    for readers in ("proposer", "scorer"):
        axes[readers] = tuple(cache_axes(cache) for cache in getattr(state, readers))
    return replace(state, **axes)


def hold(state: SearchState) -> SearchState:
    """Inside a program: the state with every array held to its sharding."""
    if state.mesh is None:
        return state
    return jax.tree.map(
        lambda array, axes: constrain(array, axes, state.rules, state.mesh),
        state,
        state_axes(state),
    )


def insert_prompt(
    models: SearchModels,
    state: SearchState,
    slot: Array,
    row_id: Array,
    prompt: Array,
    length: Array,
) -> SearchState:
    """Put a prompt into a slot: int32 [prefix_capacity + 1], right-padded, of `length` ≥ 1 tokens.

    Every reader reads it once, alone, so that its numbers do not depend on its neighbours.
    """
    config = state.config

    def fill(readers: tuple, caches: tuple[KVCache, ...]) -> tuple[KVCache, ...]:
        return tuple(
            prefill(model, cache, slot, prompt[:-1], length)
            for model, cache in zip(readers, caches, strict=True)
        )

    return hold(
        replace(
            state,
            row_ids=state.row_ids.at[slot].set(row_id),
            active=state.active.at[slot].set(True),
            base=state.base.at[slot].set(0),
            last=state.last.at[slot].set(prompt[length - 1]),
            lengths=state.lengths.at[slot].set(0),
            scores=state.scores.at[slot].set(0.0),
            finished=state.finished.at[slot].set(False),
            proposer=fill(config.proposer.readers(models), state.proposer),
            scorer=fill(config.scorer.readers(models), state.scorer),
        )
    )


def release(state: SearchState, slot: Array) -> SearchState:
    """Mark a slot as empty."""
    return hold(replace(state, active=state.active.at[slot].set(False)))
