"""Prompts through the slots of one search, and their responses as text, one slot after the other.

Imports the search, and so jax. What is asked for and where it is written is in `generation.py`.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jax.sharding import Mesh

from w2s_jax.ops.sharding import DEFAULT_RULES, Rules
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.guides import SearchModels
from w2s_jax.search.results import Hypothesis, Request
from w2s_jax.search.session import (
    Session,
    advance,
    done_slots,
    insert,
    release,
    results,
    start_session,
)
from w2s_jax.search.sizes import buckets
from w2s_jax.search.step import search_eos
from w2s_jax.text.prompts import INCOMPLETE, cut, decode_tokens, text_behind

# Enough of a prompt for what follows to decode as it does behind all of it.
_TAIL = 64


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
    request's own length alone chooses the program that it runs in. Raises InputError as
    `start_session`, `insert` and `results` do.
    """
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
        yield from _run(session, {index: requests[index] for index in members}, tokenizer)
        del session  # before the next one's caches are made


def _run(
    session: Session, requests: dict[int, Request], tokenizer: Any
) -> Iterator[tuple[int, list[Response]]]:
    waiting = deque(requests)
    index_of: dict[int, int] = {}

    def refill(session: Session, slot: int) -> Session:
        if not waiting:
            return release(session, slot) if slot in session.held else session
        index_of[slot] = waiting.popleft()
        return insert(session, slot, requests[index_of[slot]])

    for slot in range(session.slots):
        session = refill(session, slot)
    while session.held:
        session = advance(session)
        done = done_slots(session)
        for slot, responses in read_slots(session, done, tokenizer).items():
            yield index_of[slot], responses
            session = refill(session, slot)


def read_slots(session: Session, slots: Sequence[int], tokenizer: Any) -> dict[int, list[Response]]:
    """The responses of slots whose search has ended, in the order of `session.results`."""
    if not slots:
        return {}
    found, written = results(session, slots), np.asarray(session.state.tokens)
    stop, eos_ids = session.state.config.stop, search_eos(session.models, session.state.config)

    def response(slot: int, place: int, hypothesis: Hypothesis) -> Response:
        behind = written[slot, place, len(hypothesis.tokens) :].tolist()
        prompt = session.held[slot].prompts[0]
        text = response_text(tokenizer, prompt, hypothesis, behind, stop, eos_ids)
        return Response(text, hypothesis.finished)

    return {
        slot: [response(slot, *each) for each in enumerate(found[slot].hypotheses)]
        for slot in slots
    }


def response_text(
    tokenizer: Any,
    prompt: Sequence[int],
    hypothesis: Hypothesis,
    behind: Sequence[int],
    stop: Sequence[str],
    eos_ids: Sequence[int],
) -> str:
    """The text of a response, ending before its EOS or its stop string.

    A hypothesis that a stop string ended may end in a token that holds the beginning of that
    string; `behind`, what was written after the hypothesis's own tokens, shows where it begins.
    Where the response's length cut a character short, that is left out.
    """
    text_of = partial(text_behind, partial(decode_tokens, tokenizer), prompt[-_TAIL:])
    tokens = list(hypothesis.tokens)
    if not hypothesis.finished:
        return text_of(tokens).rstrip(INCOMPLETE)
    if tokens and tokens[-1] in eos_ids:
        return text_of(tokens[:-1])
    for count in range(len(behind) + 1):
        kept = cut(text_of([*tokens, *behind[:count]]), stop)
        if kept is not None:
            return kept
    return text_of(tokens)
