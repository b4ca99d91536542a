"""Compiles the programs of a session ahead of time, while another thread runs other sessions."""

from dataclasses import replace

import jax
import numpy as np

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
from w2s_jax.search.step import search_step


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
    models, state, count = session.models, session.state, len(request.prompts)
    prompts = np.zeros((count, session.prefix_capacity + 1), np.int32)
    own = draws_of(session.config, request)
    insert_program.lower(
        models, state, np.int32(0), own, prompts, np.ones(count, np.int32)
    ).compile()
    done_program.lower(state).compile()
    release_program.lower(state, np.int32(0)).compile()
    if not session.needs_host([request]):
        search_step.lower(models, state).compile()
        return session
    proposing = propose_program.lower(models, state).compile()
    _, proposal = jax.eval_shape(propose_program, models, state)
    if state.mesh is not None:
        proposal = with_shardings(proposal, proposing.output_shardings[1])
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
    conclude_program.lower(models, state, proposal, totals).compile()
    return _rehearsed(session, request) if session.scorers and state.mesh is None else session


def _rehearsed(session: Session, request: Request) -> Session:
    """The session after a search of two chunks, emptied."""
    config = session.config
    limit = min(request.limit or config.max_new_tokens, 2 * config.length)
    session = session.insert(0, replace(request, limit=limit))
    while not session.done_slots():
        session = session.advance()
    return session.release(0)
