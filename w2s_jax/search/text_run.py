"""The same search over texts, for policies that only give text: chunks until all prompts are done.

Hypotheses are strings, a proposer extends them (an API, say), scorers on text value them, the
config's own selector keeps some. Slots are filled and emptied by `run.run_slots`, as those on the
device are. Knows no tokenizer and no network.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from w2s_jax.errors import InputError, RowFailed
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.host_scoring import (
    TextRow,
    insert_all,
    keep_all,
    score_rows,
    trace,
    without,
)
from w2s_jax.search.proposers import PolicyProposer
from w2s_jax.search.results import ChunkTrace, Request
from w2s_jax.search.run import Slots, collect, run_slots, slots_for
from w2s_jax.search.scorers import LogRatio, NoScore, TextScorer
from w2s_jax.search.selectors import select_among
from w2s_jax.text.prompts import Conversation, cut


@dataclass(frozen=True)
class Extension:
    """A hypothesis to be continued `count` times by at most max_tokens tokens each.

    position: tokens asked for it so far, those of all chunks before. lane: the row (0 .. W·K − 1)
    of its first continuation; with the seed, row_id and position it tells every draw apart. trail:
    what the proposer gave with the continuation that the response ends with (None at first).
    """

    row_id: int
    conversation: Conversation
    response: str
    count: int
    max_tokens: int
    position: int
    lane: int
    trail: Any = None


@dataclass(frozen=True)
class Continuation:
    """Text that continues a response, and how many tokens it took.

    finished: the response ends here, by an EOS unless `stopped` says that it was a stop string (or
    anything else without an EOS to score). Not finished: it was cut by max_tokens. trail: anything
    that the proposer wants back with the next extension.
    """

    text: str
    finished: bool
    tokens: int
    stopped: bool = False
    trail: Any = None


@runtime_checkable
class TextProposer(Protocol):
    """Continues texts."""

    def extend(self, extensions: Sequence[Extension]) -> list[list[Continuation]]:
        """For each extension its `count` continuations, in order."""


@dataclass(frozen=True)
class TextHypothesis:
    """A response and its score, the sum of its weighted objectives (one a scorer).

    finished: an EOS or a stop string ended it; otherwise max_new_tokens did. by_eos: an EOS is
    scored behind it. token_count: how many the proposer says its continuations took.
    """

    response: str = ""
    score: float = 0.0
    finished: bool = False
    objectives: tuple[float, ...] = ()
    by_eos: bool = False
    trail: Any = field(default=None, repr=False, compare=False)
    token_count: int = field(default=0, repr=False, compare=False)


@dataclass(frozen=True)
class TextResult:
    """What a prompt's search kept, best first; tokens: how many were proposed for it in all."""

    row_id: int
    hypotheses: tuple[TextHypothesis, ...]
    tokens: int

    @property
    def best(self) -> TextHypothesis:
        """The first: of highest score, unless the selector weighs objectives otherwise."""
        return self.hypotheses[0]


@dataclass(frozen=True)
class Beam:
    """What a slot holds: its hypotheses, tokens asked for each, and tokens proposed for all."""

    hypotheses: tuple[TextHypothesis, ...]
    base: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class TextSession:
    """Slots of a search over texts; `session.Session` is that of one on the device.

    Attributes:
        requests: the request in each used slot.
        beams: what is under search there.
        memories: what each scorer remembers.
        failed: slots whose texts a scorer could not value, and the models at fault.
        chunks: what the last `advance` offered and kept, by slot.
    """

    proposer: TextProposer
    scorers: tuple[TextScorer, ...]
    config: SearchConfig
    slots: int
    memories: tuple[Any, ...]
    requests: Mapping[int, Request] = field(default_factory=dict)
    beams: Mapping[int, Beam] = field(default_factory=dict)
    failed: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    chunks: Mapping[int, ChunkTrace] = field(default_factory=dict)


def search_texts(
    proposer: TextProposer,
    scorers: Sequence[TextScorer],
    conversations: Sequence[Conversation],
    config: SearchConfig,
    *,
    row_ids: Sequence[int] | None = None,
    on_result: Callable[[TextResult], None] | None = None,
    on_chunk: Callable[[ChunkTrace], None] | None = None,
) -> list[TextResult]:
    """Search a response for every conversation; results in the order of the conversations.

    Chunk-level beam search (arXiv 2405.19262, algorithm 1; section 5.2 for black boxes) as
    `search.search` does it, over texts: a score is Σ_j weight_j·score_j over the scorers, and
    max_new_tokens counts the tokens asked for, max_tokens of each chunk, whatever came. config's
    sampling and eos_ids are the proposer's part and not read here; its scorer must be the default
    or NoScore, as the scores are those of `scorers`. A response that the proposer finished is
    scored with an EOS behind it, one ended by a stop string is not; with reference_quirks one cut
    by length is.

    row_ids (by default 0, 1, ...) tell the proposer the draws apart. on_result is called with each
    result as soon as its prompt is done, on_chunk with what each chunk offered and kept.

    Raises RowsFailed, once all others are done, for rows with a score that is not finite. Raises
    InputError for a config that needs the policy's logits, for no scorer where the method scores,
    and what the proposer and the scorers raise.
    """
    _check(config, scorers)
    count = len(conversations)
    ids = list(range(count)) if row_ids is None else list(row_ids)
    if len(ids) != count:
        raise InputError(f"{len(ids)} row ids for {count} prompts; give one each")
    slots = slots_for(config, count)
    sizes = (slots, config.beam_width, config.successors, config.length)
    memories = tuple(scorer.start(*sizes) for scorer in scorers)
    session = TextSession(proposer, tuple(scorers), config, slots, memories)
    requests = [
        Request(row_id, (), conversation=conversation)
        for row_id, conversation in zip(ids, conversations, strict=True)
    ]
    slotted = Slots(insert, advance, done_slots, outcomes, release)
    found = run_slots(slotted, session, enumerate(requests), on_chunk)
    return collect(found, count, on_result)


def _check(config: SearchConfig, scorers: Sequence[TextScorer]) -> None:
    if not isinstance(config.proposer, PolicyProposer):
        raise InputError(
            f"{type(config.proposer).__name__} mixes logits, and a policy that gives only text has "
            "none; use cbs, bon or sample"
        )
    if config.scorer not in (LogRatio(), NoScore()):
        raise InputError(
            f"the config's scorer is {type(config.scorer).__name__}, which reads token ids; "
            "a policy that gives only text takes scorers on text"
        )
    if not scorers and config.scorer != NoScore():
        raise InputError("no scorer is given; give one, or set the config's scorer to NoScore")


def insert(session: TextSession, slot: int, request: Request) -> TextSession:
    """Put a request into a slot, whatever it held."""
    assert request.conversation is not None
    memories = insert_all(session.scorers, session.memories, slot, request.conversation)
    beam = Beam((TextHypothesis(),) * session.config.beam_width)
    return replace(
        session,
        memories=memories,
        requests={**session.requests, slot: request},
        beams={**session.beams, slot: beam},
        failed=without(session.failed, slot),
    )


def release(session: TextSession, slot: int) -> TextSession:
    """Empty a slot."""
    requests, beams = without(session.requests, slot), without(session.beams, slot)
    failed = without(session.failed, slot)
    return replace(session, requests=requests, beams=beams, failed=failed)


def advance(session: TextSession) -> TextSession:
    """One chunk for all slots."""
    config, scorers, beams = session.config, session.scorers, session.beams
    rows = _propose(session)
    memories, totals, failed = score_rows(
        scorers, session.memories, rows, session.requests, config, session.slots
    )
    shape = (session.slots, config.beam_width)
    objectives, finished = np.zeros((*shape, len(scorers)), np.float32), np.zeros(shape, bool)
    for slot, beam in beams.items():
        finished[slot] = [one.finished for one in beam.hypotheses]
        for w in np.flatnonzero(finished[slot]).tolist():
            objectives[slot, w] = beam.hypotheses[w].objectives
    quirks = config.reference_quirks
    given = (config.selector, totals, objectives, finished)
    selection = jax.device_get(_select(*given, reference_quirks=quirks))
    memories = keep_all(scorers, memories, selection.parents, selection.rows)
    by_place = {(row.slot, row.row): row for row in rows}

    def extended(slot: int, chosen: int, parent: int) -> TextHypothesis:
        old = beams[slot].hypotheses[parent]
        if old.finished:
            return old
        row, values = by_place[slot, chosen], selection.candidates.objectives[slot, chosen]
        return TextHypothesis(
            response=row.text,
            score=float(values.sum()),
            finished=row.finished,
            objectives=tuple(values.tolist()),
            by_eos=row.scores_end(config),
            trail=row.trail,
            token_count=old.token_count + row.length,
        )

    after = {}
    for slot, beam in beams.items():
        places = zip(selection.chosen[slot].tolist(), selection.parents[slot].tolist(), strict=True)
        kept = tuple(extended(slot, chosen, parent) for chosen, parent in places)
        spent = sum(row.length for row in rows if row.slot == slot)
        after[slot] = Beam(kept, beam.base + config.length, beam.tokens + spent)
    chunks = trace(rows, selection, finished, session.requests)
    return replace(session, memories=memories, beams=after, failed=failed, chunks=chunks)


def _propose(session: TextSession) -> list[TextRow]:
    """Every row of the hypotheses that go on."""
    config, count = session.config, session.config.successors
    places, extensions = [], []
    for slot, beam in session.beams.items():
        request = session.requests[slot]
        assert request.conversation is not None
        limit = min(config.length, config.max_new_tokens - beam.base)
        for w, hypothesis in enumerate(beam.hypotheses):
            if hypothesis.finished:
                continue
            prompt = (request.row_id, request.conversation, hypothesis.response)
            place = (beam.base, w * count)
            places.append((slot, w))
            extensions.append(Extension(*prompt, count, limit, *place, hypothesis.trail))
    rows = []
    answers = session.proposer.extend(extensions)
    for (slot, w), extension, answer in zip(places, extensions, answers, strict=True):
        if len(answer) != count:
            raise ValueError(f"the proposer gave {len(answer)} continuations for {count}")
        at = extension.lane
        rows += [_row(slot, at + k, w, extension, one, config) for k, one in enumerate(answer)]
    return rows


def _row(
    slot: int,
    row: int,
    parent: int,
    extension: Extension,
    continuation: Continuation,
    config: SearchConfig,
) -> TextRow:
    """A continued response, cut at a stop string, which may have begun in an earlier chunk."""
    written = extension.response + continuation.text
    kept = cut(written, config.stop)
    by_stop = kept is not None or (continuation.finished and continuation.stopped)
    by_eos = continuation.finished and not by_stop
    is_last = extension.position + config.length >= config.max_new_tokens
    text = written if kept is None else kept
    return TextRow(
        slot=slot,
        row=row,
        parent=parent,
        text=text,
        new=text[len(extension.response) :],
        length=continuation.tokens,
        by_eos=by_eos,
        by_stop=by_stop,
        at_limit=is_last and not (by_eos or by_stop),
        trail=continuation.trail,
    )


_select = jax.jit(select_among, static_argnames=("selector", "reference_quirks"))


def done_slots(session: TextSession) -> list[int]:
    """Slots whose search has ended, well or not."""
    limit = session.config.max_new_tokens
    return [
        slot
        for slot, beam in session.beams.items()
        if slot in session.failed
        or beam.base >= limit
        or all(hypothesis.finished for hypothesis in beam.hypotheses)
    ]


def outcomes(
    session: TextSession, slots: Iterable[int]
) -> tuple[dict[int, TextResult], dict[int, RowFailed]]:
    """The results of those slots that have one, best first, and why others failed."""
    found, failed = {}, {}
    for slot in slots:
        row_id, beam = session.requests[slot].row_id, session.beams[slot]
        hypotheses = beam.hypotheses
        if slot in session.failed or not all(np.isfinite(one.score) for one in hypotheses):
            failed[slot] = RowFailed(row_id, session.failed.get(slot, ()))
            continue
        if not session.config.selector.reorders:
            hypotheses = tuple(sorted(hypotheses, key=lambda hypothesis: -hypothesis.score))
        found[slot] = TextResult(row_id, hypotheses, beam.tokens)
    return found, failed
