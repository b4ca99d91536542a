"""Compiles the programs of a session ahead of time, while another thread runs other sessions."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Event, Thread
from typing import Any

import jax
import numpy as np
from jax.stages import Lowered

from w2s_jax.distributed import everywhere
from w2s_jax.ops.sharding import with_shardings
from w2s_jax.search.decode import draws_of
from w2s_jax.search.results import Request
from w2s_jax.search.session import (
    Session,
    conclude_program,
    done_program,
    insert_program,
    propose_program,
    release_program,
)
from w2s_jax.search.step import search_step, start_search

log = logging.getLogger(__name__)


def compile_session(session: Session, request: Request) -> Session:
    """Compile, on the calling thread, what an empty session runs for requests like this one.

    No model is run, so that another thread may run other sessions meanwhile. Scorers of texts are
    the exception: the shapes of their programs follow from the texts, so two chunks of the request
    are searched. On a mesh they are not, as the collectives of two threads would wait for each
    other.

    Args:
        session: An empty session.
        request: An example.

    Returns:
        The session, empty again; the given one must not be used any more.
    """
    for program in _programs(session, request):
        program.compile()
    rehearses = session.scorers and session.state.mesh is None
    return _rehearsed(session, request) if rehearses else session


@contextmanager
def compiled_beside(
    session: Session, prefix_capacity: int, request: Request
) -> Iterator[Callable[[], None]]:
    """A context in which a thread compiles what a session of another capacity will run.

    No model is run and no cache is made, and what scorers of texts run is not compiled. At its end
    the context waits for the thread; after an exception it does not, and the thread ends with the
    program that it compiles, as does the process. (A daemon that XLA keeps busy would abort it.)
    What cannot be compiled here is compiled, and its error told, where it is to run.

    Nothing is compiled on a mesh or several hosts, nor for models that were put on a device by
    name: the first insertion binds the state to that device, so that there are two kinds of it.

    Args:
        session: An empty session that is alike but for its capacity.
        prefix_capacity: S of the later one.
        request: An example of the later one's.

    Yields:
        What starts the thread.
    """
    models = session.models
    bound = any(getattr(leaf, "committed", False) for leaf in jax.tree.leaves(models))
    if session.state.mesh is not None or jax.process_count() > 1 or bound:
        yield lambda: None
        return
    later, stopped = replace(session, prefix_capacity=prefix_capacity), Event()
    sizes: dict[str, Any] = {"slots": session.slots, "prefix_capacity": prefix_capacity}
    sizes |= {"text_objectives": len(session.scorers), "rules": session.state.rules}

    def work() -> None:
        try:
            state = start_search(models, later.config, **sizes, abstract=True)
            for program in _programs(replace(later, state=state), request):
                if stopped.is_set():
                    return
                program.compile()
        except Exception:
            log.info("a program could not be compiled ahead of its use", exc_info=True)

    thread = Thread(target=work, name="w2s-compiler")
    try:
        yield thread.start
        thread.join()
    finally:
        stopped.set()


def _programs(session: Session, request: Request) -> Iterator[Lowered]:
    """The programs of an empty session, each to be compiled before the next is asked for."""
    models, state, count = session.models, session.state, len(request.prompts)
    prompts = np.zeros((count, session.prefix_capacity + 1), np.int32)
    own = draws_of(session.config, request)
    lengths = np.ones(count, np.int32)
    yield insert_program.lower(models, state, np.int32(0), own, prompts, lengths)
    yield done_program.lower(state)
    yield release_program.lower(state, np.int32(0))
    if not session.needs_host([request]):
        yield search_step.lower(models, state)
        return
    proposing = propose_program.lower(models, state)
    yield proposing
    _, proposal = jax.eval_shape(propose_program, models, state)
    if state.mesh is not None:
        proposal = with_shardings(proposal, proposing.compile().output_shardings[1])
        # As `results.ended` leaves it: what the host has found is on every device.
        ends = {
            id(end): everywhere(np.zeros(end.shape, end.dtype), state.mesh)
            for end in (proposal.lengths, proposal.finished)
        }
        proposal = jax.tree.map(lambda leaf: ends.get(id(leaf), leaf), proposal)
    totals = None
    if session.scorers:
        shape = (session.slots, session.config.rows, len(session.scorers))
        totals = np.zeros(shape, np.float32)
    yield conclude_program.lower(models, state, proposal, totals)


def _rehearsed(session: Session, request: Request) -> Session:
    """The session after a search of two chunks, emptied."""
    config = session.config
    limit = min(request.limit or config.max_new_tokens, 2 * config.length)
    session = session.insert(0, replace(request, limit=limit))
    while not session.done_slots():
        session = session.advance()
    return session.release(0)
