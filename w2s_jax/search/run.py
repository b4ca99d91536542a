"""The host's side of a search: prompts into slots, chunks until all are done, results out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from w2s_jax.errors import InputError
from w2s_jax.models.model import Model
from w2s_jax.ops.sharding import DEFAULT_RULES, Rules
from w2s_jax.search import step
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.guides import Guide, SearchModels, search_models
from w2s_jax.search.state import SearchState, insert_prompt, release, start_search
from w2s_jax.search.stops import apply_stops

SMALLEST_BUCKET = 16
DEFAULT_SLOTS = 8


@dataclass(frozen=True)
class Hypothesis:
    """A response: its token ids, an EOS included, and its score.

    finished: EOS or a stop string ended it; otherwise max_new_tokens did.
    """

    tokens: tuple[int, ...]
    score: float
    finished: bool


@dataclass(frozen=True)
class SearchResult:
    """What a prompt's search kept, best first."""

    row_id: int
    hypotheses: tuple[Hypothesis, ...]

    @property
    def best(self) -> Hypothesis:
        """The hypothesis of highest score."""
        return self.hypotheses[0]


def search(
    policy: Model,
    guides: Guide | Sequence[Guide] | None,
    prompts: Sequence[Sequence[int]],
    config: SearchConfig,
    *,
    row_ids: Sequence[int] | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
    on_result: Callable[[SearchResult], None] | None = None,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
) -> list[SearchResult]:
    """Search a response for every prompt (token ids); results in the order of the prompts.

    row_ids (by default 0, 1, ...) with config.seed decide a prompt's draws, whatever is searched
    beside it. decode turns token ids into text and is needed for stop strings. on_result is called
    with each result as soon as its prompt is done, in the order of finishing. mesh (the models')
    splits the slots over its devices as the rules say.

    Raises InputError for an empty prompt, token ids outside the vocabulary, a prompt that leaves
    no room for max_new_tokens in a model's positions, stop strings without decode, and a mesh that
    does not divide the slots or the heads.
    """
    models = search_models(policy, guides)
    ids = list(range(len(prompts))) if row_ids is None else list(row_ids)
    if len(ids) != len(prompts):
        raise InputError(f"{len(ids)} row ids for {len(prompts)} prompts; give one each")
    if config.stop and decode is None:
        raise InputError("stop strings need `decode`, which turns token ids into text")
    step.search_eos(models, config)
    for row_id, prompt in zip(ids, prompts, strict=True):
        check_prompt(models, config, prompt, f"row {row_id}")
    slots = config.slots or max(1, min(DEFAULT_SLOTS, len(prompts)))
    results: dict[int, SearchResult] = {}
    for capacity, members in buckets([len(prompt) for prompt in prompts]).items():
        state = start_search(
            models, config, slots=slots, prefix_capacity=capacity, mesh=mesh, rules=rules
        )
        rows = [(index, ids[index], prompts[index]) for index in members]
        for index, result in _run_bucket(models, state, capacity, rows, decode):
            results[index] = result
            if on_result is not None:
                on_result(result)
    return [results[index] for index in range(len(prompts))]


def check_prompt(
    models: SearchModels, config: SearchConfig, prompt: Sequence[int], where: str
) -> None:
    """Raise InputError, naming `where`, for a prompt that the models cannot be searched behind."""
    if not len(prompt):
        raise InputError(f"{where}: the prompt has no tokens; give at least one (BOS, say)")
    vocabulary = models.vocabulary
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        raise InputError(f"{where}: a token id lies outside the vocabulary of {vocabulary}")
    pairs = [(f"tuned model {i}", g.tuned) for i, g in enumerate(models.guides)]
    pairs += [(f"untuned model {i}", g.untuned) for i, g in enumerate(models.guides)]
    for name, model in [("policy", models.policy), *pairs]:
        positions = model.config.max_positions
        if len(prompt) + config.max_new_tokens > positions:
            raise InputError(
                f"{where}: a prompt of {len(prompt)} tokens and {config.max_new_tokens} new ones "
                f"do not fit the {name}'s {positions} positions; shorten it or lower max_new_tokens"
            )


def buckets(lengths: Sequence[int]) -> dict[int, list[int]]:
    """Indices of the prompts by the prefix capacity they need; a program is compiled for each.

    Capacities are powers of two, from 16, that hold all of a prompt but its last token.
    """
    grouped: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        capacity = SMALLEST_BUCKET
        while capacity < length - 1:
            capacity *= 2
        grouped.setdefault(capacity, []).append(index)
    return dict(sorted(grouped.items()))


def _run_bucket(
    models: SearchModels,
    state: SearchState,
    capacity: int,
    rows: list[tuple[int, int, Sequence[int]]],
    decode: Callable[[Sequence[int]], str] | None,
) -> Iterator[tuple[int, SearchResult]]:
    """Yield (index, result) as prompts finish; a slot is refilled as soon as it is free."""
    waiting = iter(rows)
    held: dict[int, tuple[int, int, Sequence[int]]] = {}

    def refill(state: SearchState, slot: int) -> SearchState:
        row = next(waiting, None)
        if row is None:
            held.pop(slot, None)
            return _release(state, slot)
        _, row_id, prompt = row
        held[slot] = row
        padded = np.zeros(capacity + 1, np.int32)
        padded[: len(prompt)] = prompt
        # A row id may be any int; the key folds in 32 bits of it.
        fold = np.uint32(row_id & 0xFFFFFFFF).astype(np.int32)
        return _insert(models, state, np.int32(slot), fold, padded, np.int32(len(prompt)))

    for slot in range(state.active.shape[0]):
        state = refill(state, slot)
    while held:
        state = _step(models, state, decode, {slot: row[2] for slot, row in held.items()})
        done = np.asarray(_done(state))
        if not done.any():
            continue
        kept = jax.device_get((state.tokens, state.lengths, state.scores, state.finished))
        for slot in np.flatnonzero(done).tolist():
            index, row_id, _ = held[slot]
            yield index, _result(row_id, *(array[slot] for array in kept))
            state = refill(state, slot)


def _step(
    models: SearchModels,
    state: SearchState,
    decode: Callable[[Sequence[int]], str] | None,
    prompts: Mapping[int, Sequence[int]],
) -> SearchState:
    if not state.config.stop:
        return step.search_step(models, state)
    assert decode is not None
    state, proposal = _propose(models, state)
    lengths, finished = apply_stops(state, proposal, prompts, decode)
    proposal = replace(proposal, lengths=jnp.asarray(lengths), finished=jnp.asarray(finished))
    return _conclude(models, state, proposal)


def _result(row_id: int, tokens: Any, lengths: Any, scores: Any, finished: Any) -> SearchResult:
    if not np.isfinite(scores).all():
        raise InputError(
            f"row {row_id}: a score is not a finite number; a model's weights may be damaged, or "
            "overflow in this dtype"
        )
    order = np.argsort(-scores, kind="stable")
    hypotheses = tuple(
        Hypothesis(
            tuple(int(token) for token in tokens[w, : lengths[w]]),
            float(scores[w]),
            bool(finished[w]),
        )
        for w in order
    )
    return SearchResult(row_id, hypotheses)


_insert = partial(jax.jit, donate_argnums=1)(insert_prompt)
_release = partial(jax.jit, donate_argnums=0)(release)
_propose = partial(jax.jit, donate_argnums=1)(step.propose)
_conclude = partial(jax.jit, donate_argnums=1)(step.conclude)
_done = jax.jit(lambda state: state.done)
