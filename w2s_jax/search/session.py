"""The host's side of one compiled search: prompts into slots, a chunk for all, results out.

A session is a value, but what it holds on the device is donated from one to the next: only the
newest may be used. The loop over many prompts is in `run.py`; a server runs one of its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from w2s_jax.distributed import everywhere, to_host
from w2s_jax.errors import InputError, RowFailed
from w2s_jax.ops.logits import Sampling
from w2s_jax.ops.sharding import DEFAULT_RULES, Rules, with_shardings
from w2s_jax.search import state as states
from w2s_jax.search import step
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.host_scoring import (
    Decode,
    heed_stops,
    insert_all,
    keep_all,
    read_rows,
    score_rows,
    trace,
    without,
)
from w2s_jax.search.models import SearchModels
from w2s_jax.search.proposers import EFTProposer
from w2s_jax.search.results import ChunkTrace, Hypothesis, Number, Request, SearchResult
from w2s_jax.search.scorers import TextScorer
from w2s_jax.search.state import SearchState, start_search


@dataclass(frozen=True)
class Session:
    """The models, the state on the device, and what is in its slots.

    requests: the request in each used slot. scorers, memories: of texts, and what each remembers.
    failed: slots whose texts a scorer could not value, and the models at fault. chunks: what the
    last `advance` offered and kept, where the session is traced.
    """

    models: SearchModels
    state: SearchState
    prefix_capacity: int
    decode: Decode | None = None
    scorers: tuple[TextScorer, ...] = ()
    memories: tuple[Any, ...] = ()
    traced: bool = False
    requests: Mapping[int, Request] = field(default_factory=dict)
    failed: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    chunks: Mapping[int, ChunkTrace] = field(default_factory=dict)

    @property
    def slots(self) -> int:
        """P, prompts side by side."""
        return self.state.active.shape[0]

    @property
    def free(self) -> list[int]:
        """Slots that hold nothing."""
        return [slot for slot in range(self.slots) if slot not in self.requests]


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
    InputError where it is missing, and as `start_search` and `search_eos` do.
    """
    step.search_eos(models, config)
    if decode is None and (scorers or config.stop or traced):
        raise InputError(
            "stop strings, scorers of texts and traces need `decode`, which turns token ids to text"
        )
    state = start_search(
        models,
        config,
        slots=slots,
        prefix_capacity=prefix_capacity,
        text_objectives=len(scorers),
        mesh=mesh,
        rules=rules,
    )
    sizes = (slots, config.beam_width, config.successors, config.length)
    memories = tuple(scorer.start(*sizes) for scorer in scorers)
    return Session(models, state, prefix_capacity, decode, tuple(scorers), memories, traced)


def insert(session: Session, slot: int, request: Request) -> Session:
    """Put a request into a slot, whatever it held.

    Raises InputError for a slot that is not there, a prompt without tokens or longer than the
    session has room for, numbers out of range, a limit beyond the config's, and stop strings
    without `decode`.
    """
    if not 0 <= slot < session.slots:
        raise InputError(f"slot {slot} is none of the {session.slots} slots, 0 and up")
    models, config, room = session.models, session.state.config, session.prefix_capacity + 1
    prompts = request.prompts
    if len(prompts) not in (1, len(models.members)):
        raise InputError(
            f"row {request.row_id}: {len(prompts)} prompts for {len(models.members)} models; give "
            "one for all or one each"
        )
    if not all(1 <= len(prompt) <= room for prompt in prompts):
        raise InputError(f"row {request.row_id}: a prompt must have 1 to {room} tokens here")
    if request.limit is not None and not 1 <= request.limit <= config.max_new_tokens:
        raise InputError(
            f"row {request.row_id}: the limit is {request.limit} new tokens; it must lie in 1 .. "
            f"{config.max_new_tokens}"
        )
    _check_numbers(request)
    if request.stop and session.decode is None:
        raise InputError("stop strings need `decode`, which turns token ids into text")
    # Padded with a token of its own, so that no other's embedding is read beside it.
    padded = np.tile(np.array([[prompt[0]] for prompt in prompts], np.int32), room)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    own = draws_of(config, request)
    memories = session.memories
    if session.scorers:
        if request.conversation is None:
            raise InputError(f"row {request.row_id}: scorers of texts need its conversation")
        memories = insert_all(session.scorers, memories, slot, request.conversation)
    # Last, since it donates the state: what is refused leaves the session as it was.
    state = insert_program(models, session.state, np.int32(slot), own, padded, lengths)
    held, failed = {**session.requests, slot: request}, without(session.failed, slot)
    return replace(session, state=state, memories=memories, requests=held, failed=failed)


def _check_numbers(request: Request) -> None:
    try:
        Sampling(
            1.0 if request.temperature is None else float(request.temperature),
            0,
            1.0 if request.top_p is None else float(request.top_p),
        )
        EFTProposer(0.0 if request.beta is None else float(request.beta))
    except InputError as error:
        raise InputError(f"row {request.row_id}: {error}") from None


def draws_of(config: SearchConfig, request: Request) -> tuple:
    """What `state.make_draws` takes of a request, as arrays, so that no number is compiled in."""
    sampling = config.sampling

    def given(own: Number | None, usual: Number) -> Number:
        return usual if own is None else own

    # A row id may be any int; the key folds in 32 bits of it.
    return (
        np.uint32(request.row_id & 0xFFFFFFFF),
        np.uint32(request.seed & 0xFFFFFFFF),
        np.int32(request.position),
        np.int32(request.lane),
        np.int32(given(request.limit, config.max_new_tokens)),
        np.float32(given(request.temperature, sampling.temperature)),
        np.float32(given(request.top_p, sampling.top_p)),
        np.float32(given(request.beta, getattr(config.proposer, "beta", 0.0))),
    )


def advance(session: Session) -> Session:
    """One chunk for all slots; through the host only where texts are needed."""
    models, state, held = session.models, session.state, session.requests
    if not _needs_host(session, held.values()):
        return replace(session, state=step.search_step(models, state))
    assert session.decode is not None
    state, proposal = propose_program(models, state)
    texts = bool(session.scorers) or session.traced
    rows = read_rows(state, proposal, held, session.decode, texts=texts)
    lengths, finished = heed_stops(proposal, rows)
    proposal = _ended(proposal, lengths, finished, state.mesh)
    memories, totals, failed = session.memories, None, session.failed
    if session.scorers:
        memories, totals, at_fault = score_rows(
            session.scorers, memories, rows, held, state.config, session.slots
        )
        failed = {**at_fault, **failed}
    before = to_host(state.finished)
    state, selection = conclude_program(models, state, proposal, totals)
    if session.scorers:
        kept = to_host((selection.parents, selection.rows))
        memories = keep_all(session.scorers, memories, *kept)
    chunks = trace(rows, selection, before, held) if session.traced else {}
    return replace(session, state=state, memories=memories, failed=failed, chunks=chunks)


def compile_session(session: Session, request: Request) -> Session:
    """Compile, on the calling thread, what requests like this one run in an empty session.

    Runs no model, so that another thread may run other sessions meanwhile, but where texts are
    scored: what scorers read by has the shapes of the texts, and two chunks of the request are
    searched to find them. On a mesh they are not, since two threads' collectives would meet there.
    Returns the session, empty again.
    """
    models, state, count = session.models, session.state, len(request.prompts)
    prompts = np.zeros((count, session.prefix_capacity + 1), np.int32)
    own = draws_of(state.config, request)
    insert_program.lower(
        models, state, np.int32(0), own, prompts, np.ones(count, np.int32)
    ).compile()
    _done.lower(state).compile()
    _release.lower(state, np.int32(0)).compile()
    if not _needs_host(session, [request]):
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
        shape = (session.slots, state.config.rows, len(session.scorers))
        totals = np.zeros(shape, np.float32)
    conclude_program.lower(models, state, proposal, totals).compile()
    return _rehearsed(session, request) if session.scorers and state.mesh is None else session


def _rehearsed(session: Session, request: Request) -> Session:
    config = session.state.config
    limit = min(request.limit or config.max_new_tokens, 2 * config.length)
    session = insert(session, 0, replace(request, limit=limit))
    while not done_slots(session):
        session = advance(session)
    return release(session, 0)


def _ended(
    proposal: step.Proposal, lengths: np.ndarray, finished: np.ndarray, mesh: Mesh | None
) -> step.Proposal:
    """A proposal whose rows end as the host has found."""
    return replace(proposal, lengths=everywhere(lengths, mesh), finished=everywhere(finished, mesh))


def _needs_host(session: Session, requests: Iterable[Request]) -> bool:
    """Whether a chunk goes through the host, which texts need."""
    stops = bool(session.state.config.stop) or any(request.stop for request in requests)
    return stops or bool(session.scorers) or session.traced


def done_slots(session: Session) -> list[int]:
    """Slots whose search has ended, well or not, and whose outcomes may be read."""
    return sorted({*np.flatnonzero(to_host(_done(session.state))).tolist(), *session.failed})


def results(session: Session, slots: Sequence[int]) -> dict[int, SearchResult]:
    """The hypotheses of these slots, best first; of a search that still runs, those so far.

    Raises RowFailed for a row that came to nothing; `outcomes` gives those of the others too.
    """
    found, failed = outcomes(session, slots)
    for failure in failed.values():
        raise failure
    return found


def outcomes(
    session: Session, slots: Sequence[int]
) -> tuple[dict[int, SearchResult], dict[int, RowFailed]]:
    """The results of those slots that have one, as `results` gives them, and why others failed."""
    state = session.state
    arrays = (state.tokens, state.lengths, state.objectives, state.finished, state.token_scores)
    faults, *kept = to_host((state.faults, *arrays))
    eos_ids = step.search_eos(session.models, state.config)
    found: dict[int, SearchResult] = {}
    failed: dict[int, RowFailed] = {}
    for slot in slots:
        row_id, objectives = session.requests[slot].row_id, kept[2][slot]
        at_fault = session.models.at_fault(faults[slot]) or session.failed.get(slot, ())
        if at_fault or not np.isfinite(objectives).all():
            failed[slot] = RowFailed(row_id, at_fault)
            continue
        own = (array[slot] for array in kept)
        found[slot] = _result(state.config, session.requests[slot], eos_ids, *own)
    return found, failed


def release(session: Session, slot: int) -> Session:
    """Empty a slot, whether or not its search has ended."""
    held, failed = without(session.requests, slot), without(session.failed, slot)
    state = _release(session.state, np.int32(slot))
    return replace(session, state=state, requests=held, failed=failed)


def _result(
    config: SearchConfig,
    request: Request,
    eos_ids: Sequence[int],
    tokens: Any,
    lengths: Any,
    objectives: Any,
    finished: Any,
    token_scores: Any,
) -> SearchResult:
    scores = objectives.sum(axis=-1)
    # A selector's best first may be another than the highest sum first.
    ranked = config.selector.reorders
    order = range(len(scores)) if ranked else np.argsort(-scores, kind="stable").tolist()
    stops = bool(config.stop or request.stop)

    def behind(w: int) -> tuple[int, ...]:
        length = lengths[w]
        by_eos = length > 0 and tokens[w, length - 1] in eos_ids
        return tuple(tokens[w, length:].tolist()) if stops and finished[w] and not by_eos else ()

    hypotheses = tuple(
        Hypothesis(
            tuple(tokens[w, : lengths[w]].tolist()),
            float(scores[w]),
            bool(finished[w]),
            tuple(objectives[w].tolist()),
            tuple(token_scores[w, : lengths[w]].sum(axis=-1).tolist()),
            behind(w),
        )
        for w in order
    )
    return SearchResult(request.row_id, hypotheses)


def _insert_prompt(
    models: SearchModels, state: SearchState, slot: Any, own: tuple, prompts: Any, lengths: Any
) -> SearchState:
    made = states.make_draws(*own)
    return states.insert_prompt(models, state, slot, own[0], prompts, lengths, made)


insert_program = partial(jax.jit, donate_argnums=1)(_insert_prompt)
_release = partial(jax.jit, donate_argnums=0)(states.release)
propose_program = partial(jax.jit, donate_argnums=1)(step.propose)
conclude_program = partial(jax.jit, donate_argnums=1)(step.conclude)
_done = jax.jit(lambda state: state.done)
