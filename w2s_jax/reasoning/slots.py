"""Prompts through the slots of one search, and their responses as text, one slot after the other.

Imports the search, and so jax. What is asked for and where it is written is in `generation.py`.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax.sharding import Mesh

from w2s_jax.errors import RowFailed, RowsFailed
from w2s_jax.ops.sharding import DEFAULT_RULES, Rules
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.models import SearchModels
from w2s_jax.search.results import Request
from w2s_jax.search.session import (
    Session,
    advance,
    done_slots,
    insert,
    outcomes,
    release,
    start_session,
)
from w2s_jax.search.step import search_eos
from w2s_jax.text.batches import buckets
from w2s_jax.text.prompts import decode_tokens, response_text


@dataclass(frozen=True)
class Response:
    """A response without what ended it; finished: by EOS or a stop string, not by its length."""

    text: str
    finished: bool


def respond(
    models: SearchModels,
    config: SearchConfig,
    requests: Sequence[Request],
    tokenizer: Any,
    *,
    slots: int,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
) -> Iterator[tuple[int, list[Response]]]:
    """Yield (index of the request, its W responses, best first or by lane) as requests finish.

    Requests of about one length run side by side, so that little of a prompt's room is padding; a
    request's own length alone chooses the program that it runs in. Raises RowsFailed, once all
    others are done, for rows that a model fails, and InputError as `start_session` and `insert` do.
    """
    failures: list[RowFailed] = []
    longest = [max(map(len, request.prompts)) for request in requests]
    for capacity, members in buckets(longest).items():
        session = start_session(
            models,
            config,
            slots=slots,
            prefix_capacity=capacity,
            decode=partial(decode_tokens, tokenizer),
            mesh=mesh,
            rules=rules,
        )
        own = {index: requests[index] for index in members}
        for index, outcome in _run(session, own, tokenizer):
            if isinstance(outcome, RowFailed):
                failures.append(outcome)
            else:
                yield index, outcome
        del session  # before the next one's caches are made
    if failures:
        raise RowsFailed(failures)


def _run(
    session: Session, requests: dict[int, Request], tokenizer: Any
) -> Iterator[tuple[int, list[Response] | RowFailed]]:
    waiting = deque(requests)
    index_of: dict[int, int] = {}

    def refill(session: Session, slot: int) -> Session:
        if not waiting:
            return release(session, slot) if slot in session.requests else session
        index_of[slot] = waiting.popleft()
        return insert(session, slot, requests[index_of[slot]])

    for slot in range(session.slots):
        session = refill(session, slot)
    while session.requests:
        session = advance(session)
        done = done_slots(session)
        for slot, responses in read_slots(session, done, tokenizer).items():
            yield index_of[slot], responses
            session = refill(session, slot)


def read_slots(
    session: Session, slots: Sequence[int], tokenizer: Any
) -> dict[int, list[Response] | RowFailed]:
    """The responses of slots whose search has ended, in the order of `session.results`.

    For one that a model failed, the failure.
    """
    if not slots:
        return {}
    config = session.state.config
    eos_ids = search_eos(session.models, config)
    finished, failed = outcomes(session, slots)
    return failed | {
        slot: [
            Response(
                response_text(
                    tokenizer,
                    session.requests[slot].prompts[0],
                    one.tokens,
                    finished=one.finished,
                    stop=config.stop,
                    behind=one.behind,
                    eos_ids=eos_ids,
                ),
                one.finished,
            )
            for one in found.hypotheses
        ]
        for slot, found in finished.items()
    }
