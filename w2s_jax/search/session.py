"""Slots under search: prompts go in as slots come free, results come out as they finish.

A session is a value, but what it holds on the device is donated from one to the next: only the
newest may be used. `run_slots` is the loop over many prompts; a server runs one of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from w2s_jax.distributed import to_host
from w2s_jax.errors import InputError, RowFailed, RowsFailed
from w2s_jax.ops.logits import Sampling
from w2s_jax.ops.sharding import DEFAULT_RULES, Rules
from w2s_jax.search import step
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.decode import draws_of, make_draws
from w2s_jax.search.methods import EFTProposer, LogRatio, NoScore, Selection
from w2s_jax.search.models import SearchModels, check_prompts_fit
from w2s_jax.search.results import (
    ChunkTrace,
    Decode,
    Hypothesis,
    Request,
    SearchResult,
    TextRow,
    ended,
    live_rows,
    trace,
)
from w2s_jax.search.scorers import TextScorer, score_candidates
from w2s_jax.search.step import SearchState, start_search
from w2s_jax.text.prompts import response_end
from w2s_jax.text.tokenizer import SMALLEST_BUCKET, buckets

DEFAULT_SLOTS = 8
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Slotted:
    """Slots under search as the host sees them, whatever proposes.

    Attributes:
        config: The search.
        slots: P, prompts side by side.
        scorers, memories: Of texts, and what each of them remembers.
        traced: Whether to fill `chunks`.
        requests: The request in each used slot.
        failed: Slots whose texts a scorer could not value, and the models at fault.
        chunks: The candidates of the last chunk and which of them were kept, by slot.
    """

    config: SearchConfig
    slots: int
    scorers: tuple[TextScorer, ...] = ()
    memories: tuple[Any, ...] = ()
    traced: bool = False
    requests: Mapping[int, Request] = field(default_factory=dict)
    failed: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    chunks: Mapping[int, ChunkTrace] = field(default_factory=dict)

    def with_scorers(self, scorers: Sequence[TextScorer]) -> Self:
        """The same slots with scorers that remember nothing yet."""
        config = self.config
        sizes = (self.slots, config.beam_width, config.successors, config.length)
        memories = tuple(scorer.start(*sizes) for scorer in scorers)
        return replace(self, scorers=tuple(scorers), memories=memories)

    def with_request(self, slot: int, request: Request) -> Self:
        """The same with a request in a slot; InputError where scorers need its conversation."""
        memories = tuple(
            scorer.insert(memory, slot, request.scored_conversation)
            for scorer, memory in zip(self.scorers, self.memories, strict=True)
        )
        requests, failed = {**self.requests, slot: request}, _without(self.failed, slot)
        return replace(self, memories=memories, requests=requests, failed=failed)

    def without(self, slot: int) -> Self:
        """The same with nothing in a slot."""
        requests, failed = _without(self.requests, slot), _without(self.failed, slot)
        return replace(self, requests=requests, failed=failed)

    def score(self, rows: Sequence[TextRow]) -> tuple[Self, np.ndarray]:
        """The slots with the rows read, and weighted scores float32 [P, R, scorers].

        Where every hypothesis is kept anyway, a row is scored only when it has ended.
        """
        candidates = [
            row.candidate(self.requests[row.slot], self.config)
            for row in rows
            if self.scorers and (self.config.selector.reorders or row.end)
        ]
        given = (self.scorers, self.memories, candidates, (self.slots, self.config.rows))
        memories, totals, failed = score_candidates(*given)
        return replace(self, memories=memories, failed={**failed, **self.failed}), totals

    def keep(self, rows: Sequence[TextRow], selection: Selection, finished: np.ndarray) -> Self:
        """The slots of the kept hypotheses; `finished` bool [P, W] is from before the chunk."""
        memories = self.memories
        if self.scorers:
            kept = to_host((selection.parents, selection.rows))
            pairs = zip(self.scorers, memories, strict=True)
            memories = tuple(scorer.keep(memory, *kept) for scorer, memory in pairs)
        chunks = trace(rows, selection, finished, self.requests) if self.traced else {}
        return replace(self, memories=memories, chunks=chunks)


def _without(slots: Mapping[int, Any], slot: int) -> dict[int, Any]:
    return {key: value for key, value in slots.items() if key != slot}


@dataclass(frozen=True, kw_only=True)
class Session(Slotted):
    """The models, the state on the device, and the content of its slots.

    Attributes:
        models: The policy and the guides on its tokens.
        state: Their caches and all hypotheses.
        prefix_capacity: S; a prompt may have one token more.
        decode: Turns token ids into text.
    """

    models: SearchModels
    state: SearchState
    prefix_capacity: int
    decode: Decode | None = None

    @property
    def free(self) -> list[int]:
        """Slots that hold nothing."""
        return [slot for slot in range(self.slots) if slot not in self.requests]

    def insert(self, slot: int, request: Request) -> Self:
        """The session with a request in a slot, in place of its content.

        Raises:
            InputError: For a slot that does not exist, a prompt without tokens or longer than the
                session has room for, numbers out of range, a limit beyond the config's, and stop
                strings without `decode`.
        """
        if not 0 <= slot < self.slots:
            raise InputError(f"slot {slot} is none of the {self.slots} slots, 0 and up")
        room, prompts = self.prefix_capacity + 1, request.prompts
        self._check(request, room)
        # Padded with a token of its own, so that no other's embedding is read beside it.
        padded = np.tile(np.array([[prompt[0]] for prompt in prompts], np.int32), room)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        told, own = self.with_request(slot, request), draws_of(self.config, request)
        # Last, since it donates the state: what is refused leaves the session as it was.
        given = (np.int32(slot), own, padded, lengths)
        return replace(told, state=insert_program(self.models, self.state, *given))

    def _check(self, request: Request, room: int) -> None:
        prompts, members = request.prompts, len(self.models.members)
        where, most = f"row {request.row_id}", self.config.max_new_tokens
        if len(prompts) not in (1, members):
            raise InputError(
                f"{where}: {len(prompts)} prompts for {members} models; give one for all or one "
                "each"
            )
        if not all(1 <= len(prompt) <= room for prompt in prompts):
            raise InputError(f"{where}: a prompt must have 1 to {room} tokens here")
        if request.limit is not None and not 1 <= request.limit <= most:
            raise InputError(
                f"{where}: the limit is {request.limit} new tokens; it must lie in 1 .. {most}"
            )
        numbers = (request.temperature, request.top_p, request.beta)
        temperature, top_p, beta = (1.0 if own is None else float(own) for own in numbers)
        try:
            Sampling(temperature, 0, top_p)
            EFTProposer(beta)
        except InputError as error:
            raise error.at(where) from None
        if request.stop and self.decode is None:
            raise InputError("stop strings need `decode`, which turns token ids into text")

    def advance(self) -> Self:
        """One chunk for all slots; through the host only where texts are needed."""
        if not self.needs_host(self.requests.values()):
            return replace(self, state=step.search_step(self.models, self.state))
        assert self.decode is not None
        state, proposal = propose_program(self.models, self.state)
        texts = bool(self.scorers) or self.traced
        rows = live_rows(state, proposal, self.requests, self.decode, texts=texts)
        told, totals = self.score(rows) if self.scorers else (self, None)
        before, proposal = to_host(state.finished), ended(proposal, rows, state.mesh)
        state, selection = conclude_program(self.models, state, proposal, totals)
        return replace(told.keep(rows, selection, before), state=state)

    def needs_host(self, requests: Iterable[Request]) -> bool:
        """Whether a chunk of these requests goes through the host, which texts need."""
        stops = bool(self.config.stop) or any(request.stop for request in requests)
        return stops or bool(self.scorers) or self.traced

    def done_slots(self) -> list[int]:
        """Slots whose search has ended or failed, and whose outcomes may be read."""
        return sorted({*np.flatnonzero(to_host(done_program(self.state))).tolist(), *self.failed})

    def outcomes(
        self, slots: Sequence[int]
    ) -> tuple[dict[int, SearchResult], dict[int, RowFailed]]:
        """The hypotheses of slots, best first; of a search that still runs, those so far.

        Returns:
            By slot, the results of those that have one, and why the others failed.
        """
        state = self.state
        arrays = (state.tokens, state.lengths, state.objectives, state.finished, state.token_scores)
        faults, *kept = to_host((state.faults, *arrays))
        found: dict[int, SearchResult] = {}
        failed: dict[int, RowFailed] = {}
        for slot in slots:
            row_id = self.requests[slot].row_id
            at_fault = self.models.at_fault(faults[slot]) or self.failed.get(slot, ())
            if at_fault or not np.isfinite(kept[2][slot]).all():
                failed[slot] = RowFailed(row_id, at_fault)
            else:
                own = [array[slot] for array in kept]
                found[slot] = SearchResult(row_id, self._hypotheses(self.requests[slot], own))
        return found, failed

    def release(self, slot: int) -> Self:
        """The session with a slot emptied, whether or not its search has ended."""
        return replace(self.without(slot), state=release_program(self.state, np.int32(slot)))

    def _hypotheses(self, request: Request, kept: Sequence[Any]) -> tuple[Hypothesis, ...]:
        """The hypotheses of a slot, best first, from its arrays of the state."""
        tokens, lengths, objectives, finished, token_scores = kept
        eos_ids = self.models.known_eos_ids(self.config.eos_ids)
        stops, scores = bool(self.config.stop or request.stop), objectives.sum(axis=-1)
        order = np.argsort(-scores, kind="stable")
        if self.config.selector.reorders:  # its best first may be another than the highest sum
            order = np.arange(len(scores))

        def hypothesis(w: int) -> Hypothesis:
            own, behind = tokens[w, : lengths[w]].tolist(), tokens[w, lengths[w] :].tolist()
            by_stop = stops and finished[w] and not (own and own[-1] in eos_ids)
            return Hypothesis(
                tuple(own),
                float(scores[w]),
                bool(finished[w]),
                tuple(objectives[w].tolist()),
                tuple(token_scores[w, : lengths[w]].sum(axis=-1).tolist()),
                tuple(behind) if by_stop else (),
            )

        return tuple(map(hypothesis, order.tolist()))


def start_session(
    models: SearchModels,
    config: SearchConfig,
    *,
    slots: int,
    prefix_capacity: int,
    decode: Decode | None = None,
    scorers: Sequence[TextScorer] = (),
    traced: bool = False,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
) -> Session:
    """A session of empty slots.

    Args:
        models: The policy and the guides on its tokens.
        config: The search.
        slots: P, prompts side by side.
        prefix_capacity: S; a prompt may have one token more.
        decode: Turns token ids into text; stop strings, scorers of texts and traces need it.
        scorers: Of texts.
        traced: Whether to fill `Session.chunks`.
        mesh: The models'.
        rules: How the slots are split over it.

    Raises:
        InputError: Where `decode` is missing, and as `start_search` and
            `SearchModels.known_eos_ids` do.
    """
    models.known_eos_ids(config.eos_ids)
    if decode is None and (scorers or config.stop or traced):
        raise InputError(
            "stop strings, scorers of texts and traces need `decode`, which turns token ids to text"
        )
    sizes: dict[str, Any] = {"slots": slots, "prefix_capacity": prefix_capacity}
    sizes |= {"text_objectives": len(scorers), "mesh": mesh, "rules": rules}
    state = start_search(models, config, **sizes)
    session = Session(
        config=state.config,
        slots=slots,
        traced=traced,
        models=models,
        state=state,
        prefix_capacity=prefix_capacity,
        decode=decode,
    )
    return session.with_scorers(scorers)


def _insert_prompt(
    models: SearchModels, state: SearchState, slot: Any, own: tuple, prompts: Any, lengths: Any
) -> SearchState:
    return step.insert_prompt(models, state, slot, own[0], prompts, lengths, make_draws(*own))


insert_program = partial(jax.jit, donate_argnums=1)(_insert_prompt)
release_program = partial(jax.jit, donate_argnums=0)(step.release)
propose_program = partial(jax.jit, donate_argnums=1)(step.propose)
conclude_program = partial(jax.jit, donate_argnums=1)(step.conclude)
done_program = jax.jit(lambda state: state.done)


def search_all(
    models: SearchModels,
    config: SearchConfig,
    requests: Sequence[Request],
    *,
    scorers: Sequence[TextScorer] = (),
    on_result: Callable[[SearchResult], None] | None = None,
    **options: Any,
) -> list[SearchResult]:
    """Search all requests.

    Args:
        models: The policy and the guides on its tokens.
        config: The search.
        requests: The prompts.
        scorers: Of texts.
        on_result: Called with each result as soon as its prompt is done.
        **options: Those of `search_requests`.

    Returns:
        The results in the order of the requests.

    Raises:
        RowsFailed: As `run.search` does.
        InputError: As `run.search` does.
    """
    if scorers and not models.guides and isinstance(config.scorer, LogRatio):
        config = replace(config, scorer=NoScore())
    for request in requests:
        limit = config.max_new_tokens if request.limit is None else request.limit
        check_prompts_fit(models, request.prompts, limit, f"row {request.row_id}")
    slots = slots_for(config, len(requests))
    found = search_requests(models, config, requests, slots=slots, scorers=scorers, **options)
    return collect(found, len(requests), on_result)


def search_requests(
    models: SearchModels,
    config: SearchConfig,
    requests: Sequence[Request],
    *,
    slots: int,
    on_chunk: Callable[[ChunkTrace], None] | None = None,
    alone: bool = False,
    beside: Callable[..., AbstractContextManager[Callable[[], object]]] | None = None,
    **options: Any,
) -> Iterator[tuple[int, SearchResult | RowFailed]]:
    """Search requests, those of about one length side by side.

    So little of a prompt is padding. Even without requests, settings that lack something are
    refused.

    Args:
        models: The policy and the guides on its tokens.
        config: The search.
        requests: The prompts.
        slots: P, prompts side by side.
        on_chunk: Called with the candidates of each chunk and which of them were kept.
        alone: False has requests that are too few to fill the slots join the next longer ones; with
            True a request's own length decides the program that it runs in.
        beside: Compiles for the next length while one is searched, as `compiled_beside` does.
        **options: Those of `start_session`.

    Yields:
        (index of the request, its result or RowFailed) as requests finish.

    Raises:
        InputError: As `start_session` and `Session.insert` do.
    """
    longest = [max(map(len, request.prompts)) for request in requests]
    found = buckets(longest) if alone else buckets(longest, slots=slots)
    planned = [*(found or {SMALLEST_BUCKET: []}).items()]
    options |= {"slots": slots, "traced": on_chunk is not None}
    for (capacity, members), later in zip(planned, [*planned[1:], None], strict=True):
        session = start_session(models, config, prefix_capacity=capacity, **options)
        waiting = ((index, requests[index]) for index in members)
        ahead: AbstractContextManager[Any] = nullcontext()
        if beside and later:
            ahead = beside(session, later[0], requests[later[1][0]])
        with ahead as start:
            yield from run_slots(session, waiting, on_chunk, start)
            del session  # before the next one's caches are made


def run_slots(
    session: Any,
    requests: Iterable[tuple[int, Request]],
    on_chunk: Callable[[ChunkTrace], None] | None = None,
    on_first: Callable[[], object] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Search indexed requests in the slots of a session.

    A slot is refilled as soon as it is free, so that a long response does not keep others waiting.

    Args:
        session: A `Session`, or one over texts with the same methods.
        requests: Pairs of an index and a request.
        on_chunk: Called with the candidates of each chunk and which of them were kept.
        on_first: Called behind the first results, which what it starts is not to delay.

    Yields:
        (index, result or RowFailed) as requests finish.
    """
    waiting = iter(requests)
    index_of: dict[int, int] = {}

    def refill(session: Any, slot: int) -> Any:
        for index, request in waiting:
            index_of[slot] = index
            return session.insert(slot, request)
        return session.release(slot) if slot in session.requests else session

    for slot in range(session.slots):
        session = refill(session, slot)
    while session.requests:
        session = session.advance()
        if on_chunk is not None:
            for chunk in session.chunks.values():
                on_chunk(chunk)
        done = session.done_slots()
        found, failed = session.outcomes(done) if done else ({}, {})
        for slot, outcome in (found | failed).items():
            yield index_of[slot], outcome
            session = refill(session, slot)
        if done and on_first is not None:
            on_first()
            on_first = None


def collect(
    outcomes: Iterable[tuple[int, R | RowFailed]],
    count: int,
    on_result: Callable[[R], None] | None = None,
) -> list[R]:
    """The results in the order of their requests; `on_result` is called with each as it comes.

    Raises:
        RowsFailed: After the last outcome, for requests that failed.
    """
    found: dict[int, R] = {}
    failures: list[RowFailed] = []
    for index, outcome in outcomes:
        if isinstance(outcome, RowFailed):
            failures.append(outcome)
            continue
        found[index] = outcome
        if on_result is not None:
            on_result(outcome)
    if failures:
        raise RowsFailed(failures, [found.get(index) for index in range(count)])
    return [found[index] for index in range(count)]


def slots_for(config: SearchConfig, prompts: int) -> int:
    """P: prompts that are searched side by side."""
    return config.slots or max(1, min(DEFAULT_SLOTS, prompts))


def hypothesis_text(
    tokenizer: Any, prompt: Sequence[int], hypothesis: Hypothesis, **ends: Sequence[Any]
) -> str:
    """The text of a hypothesis, without what ended it.

    Args:
        tokenizer: The policy's.
        prompt: Token ids before the response.
        hypothesis: The response.
        **ends: `stop` and `eos_ids`, what ends responses beside the tokenizer's own EOS.
    """
    given: dict[str, Any] = {"finished": hypothesis.finished, "behind": hypothesis.behind, **ends}
    return response_end(tokenizer, prompt, hypothesis.tokens, **given)[0]
