"""The host's side of one compiled search: prompts into slots, a chunk for all, results out.

A session is a value, but what it holds on the device is donated from one to the next: only the
newest may be used. The loop over many prompts is in `run.py`; a server runs one of its own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from w2s_jax.distributed import everywhere, to_host
from w2s_jax.errors import InputError, RowFailed
from w2s_jax.ops.logits import Sampling
from w2s_jax.ops.sharding import DEFAULT_RULES, Rules, with_shardings
from w2s_jax.search import step
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.decode import draw_numbers, make_draws
from w2s_jax.search.methods import EFTProposer
from w2s_jax.search.models import SearchModels
from w2s_jax.search.results import (
    Decode,
    Hypothesis,
    Number,
    Request,
    SearchResult,
    Slotted,
    TextRow,
    live_rows,
)
from w2s_jax.search.scorers import TextScorer
from w2s_jax.search.step import Proposal, SearchState, start_search


@dataclass(frozen=True, kw_only=True)
class Session(Slotted):
    """The models, the state on the device, and what is in its slots.

    Attributes:
        models: the policy and the guides on its tokens.
        state: their caches and all hypotheses.
        prefix_capacity: tokens of a prompt, less one, that there is room for.
        decode: turns token ids into text.
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
        """The session with a request in a slot, whatever that held.

        Raises:
            InputError: for a slot that is not there, a prompt without tokens or longer than the
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

        def given(own: Number | None) -> float:
            return 1.0 if own is None else float(own)

        try:
            Sampling(given(request.temperature), 0, given(request.top_p))
            EFTProposer(given(request.beta))
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
        before, proposal = to_host(state.finished), _ended(proposal, rows, state.mesh)
        state, selection = conclude_program(self.models, state, proposal, totals)
        return replace(told.keep(rows, selection, before), state=state)

    def needs_host(self, requests: Iterable[Request]) -> bool:
        """Whether a chunk of these requests goes through the host, which texts need."""
        stops = bool(self.config.stop) or any(request.stop for request in requests)
        return stops or bool(self.scorers) or self.traced

    def done_slots(self) -> list[int]:
        """Slots whose search has ended, well or not, and whose outcomes may be read."""
        return sorted({*np.flatnonzero(to_host(_done(self.state))).tolist(), *self.failed})

    def outcomes(
        self, slots: Sequence[int]
    ) -> tuple[dict[int, SearchResult], dict[int, RowFailed]]:
        """The hypotheses of those slots that have some, and why others failed.

        They are best first; of a search that still runs, those so far.
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
                own = (array[slot] for array in kept)
                found[slot] = SearchResult(row_id, self._hypotheses(self.requests[slot], *own))
        return found, failed

    def release(self, slot: int) -> Self:
        """The session with a slot emptied, whether or not its search has ended."""
        return replace(self.without(slot), state=_release(self.state, np.int32(slot)))

    def _hypotheses(
        self,
        request: Request,
        tokens: Any,
        lengths: Any,
        objectives: Any,
        finished: Any,
        token_scores: Any,
    ) -> tuple[Hypothesis, ...]:
        """The hypotheses of a slot, best first."""
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
    """A session of empty slots for prompts of up to prefix_capacity + 1 tokens.

    decode turns token ids into text; stop strings, scorers of texts and traces need it. Raises
    InputError where it is missing, and as `start_search` and `SearchModels.known_eos_ids` do.
    """
    models.known_eos_ids(config.eos_ids)
    if decode is None and (scorers or config.stop or traced):
        raise InputError(
            "stop strings, scorers of texts and traces need `decode`, which turns token ids to text"
        )
    sizes = {"slots": slots, "prefix_capacity": prefix_capacity, "text_objectives": len(scorers)}
    state = start_search(models, config, **sizes, mesh=mesh, rules=rules)
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


def draws_of(config: SearchConfig, request: Request) -> tuple:
    """What `make_draws` takes of a request, as arrays, so that no number is compiled in."""
    # A row id may be any int; the key folds in 32 bits of it.
    ids = (np.uint32(number & 0xFFFFFFFF) for number in (request.row_id, request.seed))
    return (*ids, *draw_numbers(config, request))


def compile_session(session: Session, request: Request) -> Session:
    """Compile, on the calling thread, what requests like this one run in an empty session.

    Runs no model, so that another thread may run other sessions meanwhile, but where texts are
    scored: what scorers read by has the shapes of the texts, and two chunks of the request are
    searched to find them. On a mesh they are not, since two threads' collectives would meet there.
    Returns the session, empty again.
    """
    models, state, count = session.models, session.state, len(request.prompts)
    prompts = np.zeros((count, session.prefix_capacity + 1), np.int32)
    own = draws_of(session.config, request)
    insert_program.lower(
        models, state, np.int32(0), own, prompts, np.ones(count, np.int32)
    ).compile()
    _done.lower(state).compile()
    _release.lower(state, np.int32(0)).compile()
    if not session.needs_host([request]):
        step.search_step.lower(models, state).compile()
        return session
    proposing = propose_program.lower(models, state).compile()
    _, proposal = jax.eval_shape(propose_program, models, state)
    if state.mesh is not None:
        proposal = with_shardings(proposal, proposing.output_shardings[1])
        # As `_ended` leaves it: what the host has found is on every device.
        ends = {
            id(end): everywhere(np.zeros(end.shape, end.dtype), state.mesh)
            for end in (proposal.lengths, proposal.finished)
        }
        proposal = jax.tree.map(lambda leaf: ends.get(id(leaf), leaf), proposal)
    totals = None
    if session.scorers:
        shape = (session.slots, session.config.rows, len(session.scorers))
        totals = np.zeros(shape, np.float32)
    conclude_program.lower(models, state, proposal, totals).compile()
    return _rehearsed(session, request) if session.scorers and state.mesh is None else session


def _rehearsed(session: Session, request: Request) -> Session:
    config = session.config
    limit = min(request.limit or config.max_new_tokens, 2 * config.length)
    session = session.insert(0, replace(request, limit=limit))
    while not session.done_slots():
        session = session.advance()
    return session.release(0)


def _ended(proposal: Proposal, rows: Sequence[TextRow], mesh: Mesh | None) -> Proposal:
    """A proposal whose rows end as their texts did."""
    lengths, finished = (part.copy() for part in to_host((proposal.lengths, proposal.finished)))
    for row in rows:
        lengths[row.slot, row.row] = row.length
        finished[row.slot, row.row] = row.finished
    return replace(proposal, lengths=everywhere(lengths, mesh), finished=everywhere(finished, mesh))


def _insert_prompt(
    models: SearchModels, state: SearchState, slot: Any, own: tuple, prompts: Any, lengths: Any
) -> SearchState:
    return step.insert_prompt(models, state, slot, own[0], prompts, lengths, make_draws(*own))


insert_program = partial(jax.jit, donate_argnums=1)(_insert_prompt)
_release = partial(jax.jit, donate_argnums=0)(step.release)
propose_program = partial(jax.jit, donate_argnums=1)(step.propose)
conclude_program = partial(jax.jit, donate_argnums=1)(step.conclude)
_done = jax.jit(lambda state: state.done)
