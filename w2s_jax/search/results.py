"""The host's side of a search as values: requests, results, and the hop through text.

Ends at token ids are found on the device; stop strings, scores of texts and traces need the hop. A
trace is what a search looked at, chunk by chunk.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from operator import eq
from typing import Any, Literal, Self

import numpy as np

from w2s_jax.distributed import to_host
from w2s_jax.errors import InputError
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.methods import Selection
from w2s_jax.search.scorers import Candidate, TextScorer, at_fault
from w2s_jax.search.step import Proposal, SearchState
from w2s_jax.text.prompts import CONTEXT, INCOMPLETE, Conversation, cut, response_end, text_behind
from w2s_jax.text.rows import Row

Number = float | int
Decode = Callable[[Sequence[int]], str]
TRACE = "trace"
"""The field of a journal's row that holds its trace."""
End = Literal["", "eos", "stop", "limit"]
"""What ended a response, "" for nothing."""


@dataclass(frozen=True)
class Request:
    """A prompt for a slot.

    seed and row_id decide the draws. limit, temperature, top_p and beta take the places of the
    config's numbers (a limit is at most max_new_tokens).

    Attributes:
        prompts: its token ids, one sequence for all members of the models or one each (policy,
            tuned 0, untuned 0, ...).
        conversation: the same for scorers of texts.
        stop: strings that end a response.
        position: what is added to the position in the response of each draw.
        lane: what is added to the lane of each draw.
    """

    row_id: int
    prompts: tuple[tuple[int, ...], ...]
    conversation: Conversation | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    limit: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    beta: Number | None = None
    position: int = 0
    lane: int = 0


@dataclass(frozen=True)
class Hypothesis:
    """A response: its token ids, an EOS included, and its score, the sum of its objectives.

    Attributes:
        finished: EOS or a stop string ended it; otherwise max_new_tokens did.
        token_scores: what each token added, where the scorer is one on tokens.
        behind: where a stop string ended it, what was written after it: the last token that counts
            may hold the beginning of that string.
    """

    tokens: tuple[int, ...]
    score: float
    finished: bool
    objectives: tuple[float, ...] = ()
    token_scores: tuple[float, ...] = ()
    behind: tuple[int, ...] = ()

    @property
    def token_count(self) -> int:
        """How many tokens it has."""
        return len(self.tokens)


def hypothesis_text(
    tokenizer: Any, prompt: Sequence[int], hypothesis: Hypothesis, **ends: Sequence[Any]
) -> str:
    """The text of a hypothesis behind its prompt's token ids, without what ended it.

    ends: as `stop` and `eos_ids`, what ends responses beside the EOS that the tokenizer knows.
    """
    given: dict[str, Any] = {"finished": hypothesis.finished, "behind": hypothesis.behind, **ends}
    return response_end(tokenizer, prompt, hypothesis.tokens, **given)[0]


@dataclass(frozen=True)
class SearchResult:
    """What a prompt's search kept, best first."""

    row_id: int
    hypotheses: tuple[Hypothesis, ...]

    @property
    def best(self) -> Hypothesis:
        """The first: of highest score, unless the selector weighs objectives otherwise."""
        return self.hypotheses[0]


@dataclass(frozen=True)
class ChunkTrace:
    """What one chunk of one prompt offered, and what was kept of it.

    For each of c candidates: parents, the place of the hypothesis it continues; texts, what it
    adds to it (nothing where a finished hypothesis is carried over); objectives float32 [c, J];
    finished; kept, its place among the new hypotheses or −1.
    """

    row_id: int
    parents: tuple[int, ...]
    texts: tuple[str, ...]
    objectives: np.ndarray
    finished: tuple[bool, ...]
    kept: tuple[int, ...]


def chunk_row(chunk: ChunkTrace) -> dict[str, Any]:
    """One chunk: {"candidates": [{parent, text, score, objectives, kept, finished}]}.

    kept is the place among the new hypotheses, None for what was dropped.
    """
    columns = (chunk.parents, chunk.texts, chunk.objectives.tolist(), chunk.kept, chunk.finished)
    candidates = [
        {
            "parent": parent,
            "text": text,
            "score": sum(objectives),
            "objectives": objectives,
            "kept": None if kept < 0 else kept,
            "finished": finished,
        }
        for parent, text, objectives, kept, finished in zip(*columns, strict=True)
    ]
    return {"candidates": candidates}


def answer_row(
    row: Row, responses: Sequence[str], hypotheses: Sequence[Any], names: Sequence[str]
) -> Row:
    """The output row of hypotheses and their texts, best first.

    Where there are several objectives, a hypothesis holds them by name. An input field called
    response, score, hypotheses or trace is overwritten.
    """
    kept: list[Row] = []
    for response, one in zip(responses, hypotheses, strict=True):
        kept.append({"response": response, "score": one.score})
        if len(one.objectives) > 1 and len(names) == len(one.objectives):
            kept[-1]["objectives"] = dict(zip(names, one.objectives, strict=True))
    prompt = {"prompt": row["prompt"]} if "prompt" in row else {}
    best = {name: kept[0][name] for name in ("response", "score")}
    found = {**prompt, **best, "hypotheses": kept}
    return found | {name: row[name] for name in row if name not in found and name != TRACE}


@dataclass(frozen=True)
class TextRow:
    """A live row of a proposal as text: all its response so far, up to its end.

    Attributes:
        new: what this chunk adds to its hypothesis.
        length: its tokens; of a policy that gives only text, those of this chunk.
        end: what ended it, if anything did.
        trail: what a proposer of texts wants back.
    """

    slot: int
    row: int
    parent: int
    text: str
    new: str
    length: int
    end: End
    trail: Any = None

    @property
    def finished(self) -> bool:
        """Whether an EOS or a stop string ended it."""
        return self.end in ("eos", "stop")

    def scores_end(self, config: SearchConfig) -> bool:
        """Whether an EOS is scored behind it."""
        return self.end == "eos" or (config.reference_quirks and self.end == "limit")


def kept_tokens(tokens: Sequence[int], decode: Decode, stop: Sequence[str]) -> int | None:
    """How many leading tokens hold the text before the first stop string; None where there is none.

    The fewest whose text begins with all that is kept: a token that holds the end of the kept text
    and the start of the stop string counts, one that holds only the stop string does not.
    """
    kept = cut(decode(tokens), stop)
    if kept is None:
        return None

    def holds(count: int) -> bool:
        return decode(tokens[:count]).startswith(kept)

    return bisect_left(range(len(tokens)), True, key=holds)


def live_rows(
    state: SearchState,
    proposal: Proposal,
    requests: Mapping[int, Request],
    decode: Decode,
    *,
    texts: bool = True,
) -> list[TextRow]:
    """Every live row of the slots in use as text, stop strings heeded.

    Without `texts`, rows in which no stop string was found have none.
    """
    arrays = (state.tokens, state.base, state.active, state.finished, state.draws.limit)
    before, base, active, over, limits = to_host(arrays)
    new, lengths, finished = to_host((proposal.tokens, proposal.lengths, proposal.finished))
    found = []
    for slot in np.flatnonzero(active).tolist():
        request = requests[slot]
        text_of = partial(text_behind, decode, request.prompts[0][-CONTEXT:])
        stop = (*state.config.stop, *request.stop)
        for row in range(lengths.shape[1]):
            parent = row // state.config.successors
            if over[slot, parent]:
                continue
            old = before[slot, parent, : base[slot]].tolist()
            response = [*old, *new[slot, row].tolist()][: lengths[slot, row]]
            kept = kept_tokens(response, text_of, stop) if stop else None
            length = len(response) if kept is None else kept
            end: End = "limit" if length >= limits[slot] else ""
            if finished[slot, row]:
                end = "eos"
            if kept is not None:
                end = "stop"
            text = ""
            if texts or end == "stop":
                text = text_of(response[:-1] if end == "eos" else response)
            if end == "stop":
                text = cut(text, stop) or ""
            elif end != "eos" and not state.config.reference_quirks:
                text = text.rstrip(INCOMPLETE)
            # Nothing where a stop string took off some of what was there before.
            earlier = text_of(old).rstrip(INCOMPLETE) if texts else ""
            alike = sum(takewhile(bool, map(eq, text, earlier)))
            found.append(TextRow(slot, row, parent, text, text[alike:], length, end))
    return found


@dataclass(frozen=True, kw_only=True)
class Slotted:
    """Slots under search as the host sees them, whatever proposes.

    Attributes:
        config: the search.
        slots: P, prompts side by side.
        scorers, memories: of texts, and what each of them remembers.
        traced: whether `chunks` are to be told.
        requests: the request in each used slot.
        failed: slots whose texts a scorer could not value, and the models at fault.
        chunks: what the last chunk offered and kept, by slot.
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
        """The same with a request in a slot, whatever was there; InputError without a text."""
        memories = tuple(
            scorer.insert(memory, slot, _conversation(request))
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

        Where every hypothesis is kept anyway, a row is scored when it has ended and not before.
        """
        candidates = [
            Candidate(
                slot=row.slot,
                row=row.row,
                parent=row.parent,
                conversation=_conversation(self.requests[row.slot]),
                response=row.text,
                finished=row.scores_end(self.config),
            )
            for row in rows
            if self.scorers and (self.config.selector.reorders or row.end)
        ]
        totals = np.zeros((self.slots, self.config.rows, len(self.scorers)), np.float32)
        if not candidates:
            return self, totals
        places = np.array([(candidate.slot, candidate.row) for candidate in candidates]).T
        memories: list[Any] = []
        failed: dict[int, tuple[str, ...]] = {}
        for index, scorer in enumerate(self.scorers):
            memory, told = scorer.score(self.memories[index], candidates)
            scores = np.asarray(told)
            totals[*places, index] = scorer.weight * scores
            failed |= at_fault(scorer, memory, candidates, scores)
            memories.append(memory)
        return replace(self, memories=tuple(memories), failed={**failed, **self.failed}), totals

    def keep(self, rows: Sequence[TextRow], selection: Selection, finished: np.ndarray) -> Self:
        """The slots of the kept hypotheses; `finished` [P, W] is from before the chunk."""
        memories = self.memories
        if self.scorers:
            kept = to_host((selection.parents, selection.rows))
            pairs = zip(self.scorers, memories, strict=True)
            memories = tuple(scorer.keep(memory, *kept) for scorer, memory in pairs)
        chunks = trace(rows, selection, finished, self.requests) if self.traced else {}
        return replace(self, memories=memories, chunks=chunks)


def _conversation(request: Request) -> Conversation:
    if request.conversation is None:
        raise InputError(f"row {request.row_id}: scorers of texts need its conversation")
    return request.conversation


def _without(slots: Mapping[int, Any], slot: int) -> dict[int, Any]:
    return {key: value for key, value in slots.items() if key != slot}


def trace(
    rows: Sequence[TextRow],
    selection: Selection,
    finished: np.ndarray,
    requests: Mapping[int, Request],
) -> dict[int, ChunkTrace]:
    """What each slot's chunk offered and what was kept; `finished` [P, W] is from before it.

    A finished hypothesis is listed once, also with reference_quirks.
    """
    arrays = (selection.candidates.objectives, selection.chosen, selection.parents)
    objectives, chosen, parents = to_host(arrays)
    width = finished.shape[1]
    count = objectives.shape[1] - width
    by_slot: dict[int, list[TextRow]] = {}
    for row in rows:
        by_slot.setdefault(row.slot, []).append(row)
    traces = {}
    for slot, request in requests.items():
        offered = [(row.row, row.parent, row.new, row.finished) for row in by_slot.get(slot, ())]
        offered += [(count + w, w, "", True) for w in range(width) if finished[slot, w]]
        if not offered:
            continue
        # With reference_quirks a finished hypothesis is chosen by one of its rows.
        entries = np.where(finished[slot, parents[slot]], count + parents[slot], chosen[slot])
        places = {int(entry): place for place, entry in reversed(list(enumerate(entries)))}
        index, of, texts, ends = zip(*offered, strict=True)
        traces[slot] = ChunkTrace(
            row_id=request.row_id,
            parents=of,
            texts=texts,
            objectives=objectives[slot, list(index)],
            finished=ends,
            kept=tuple(places.get(entry, -1) for entry in index),
        )
    return traces
