"""The hop of a search through text: stop strings, scores of texts, traces.

Ends at token ids are found on the device; nothing here is needed where none of the three is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from w2s_jax.distributed import to_host
from w2s_jax.errors import InputError
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.results import ChunkTrace, Request
from w2s_jax.search.scorers import Candidate, TextScorer, at_fault
from w2s_jax.search.selectors import Selection
from w2s_jax.search.state import SearchState
from w2s_jax.search.step import Proposal
from w2s_jax.text.prompts import CONTEXT, INCOMPLETE, Conversation, cut, text_behind

Decode = Callable[[Sequence[int]], str]
V = TypeVar("V")


@dataclass(frozen=True)
class TextRow:
    """A live row of a proposal as text: all its response so far, up to its end.

    new: what this chunk adds to its hypothesis. length: its tokens; of a policy that gives only
    text, those of this chunk. by_eos, by_stop, at_limit: what ended it, if anything did. trail:
    what a proposer of texts wants back.
    """

    slot: int
    row: int
    parent: int
    text: str
    new: str
    length: int
    by_eos: bool
    by_stop: bool
    at_limit: bool
    trail: Any = None

    @property
    def ended(self) -> bool:
        """Whether nothing will be added to it."""
        return self.finished or self.at_limit

    @property
    def finished(self) -> bool:
        """Whether an EOS or a stop string ended it."""
        return self.by_eos or self.by_stop

    def scores_end(self, config: SearchConfig) -> bool:
        """Whether an EOS is scored behind it."""
        return self.by_eos or (config.reference_quirks and self.at_limit)


def kept_tokens(tokens: Sequence[int], decode: Decode, stop: Sequence[str]) -> int | None:
    """How many leading tokens hold the text before the first stop string; None where there is none.

    The fewest whose text begins with all that is kept: a token that holds the end of the kept text
    and the start of the stop string counts, one that holds only the stop string does not.
    """
    kept = cut(decode(tokens), stop)
    if kept is None:
        return None
    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high) // 2
        if decode(tokens[:middle]).startswith(kept):
            high = middle
        else:
            low = middle + 1
    return low


def read_rows(
    state: SearchState,
    proposal: Proposal,
    held: Mapping[int, Request],
    decode: Decode,
    *,
    texts: bool = True,
) -> list[TextRow]:
    """Every live row of the slots in use as text, stop strings heeded.

    Without `texts`, rows in which no stop string was found have none.
    """
    arrays = (state.tokens, state.base, state.active, state.finished, state.draws.limit)
    before, base, active, over, limits = to_host(arrays)
    ends_at = limits.tolist()
    new, lengths, finished = to_host((proposal.tokens, proposal.lengths, proposal.finished))
    found = []
    for slot in np.flatnonzero(active).tolist():
        request = held[slot]
        text_of = partial(text_behind, decode, request.prompts[0][-CONTEXT:])
        stop = (*state.config.stop, *request.stop)
        for row in range(lengths.shape[1]):
            parent = row // state.config.successors
            if over[slot, parent]:
                continue
            old = before[slot, parent, : base[slot]].tolist()
            response = [*old, *new[slot, row].tolist()][: lengths[slot, row]]
            kept = kept_tokens(response, text_of, stop) if stop else None
            by_eos = bool(finished[slot, row]) and kept is None
            length = len(response) if kept is None else kept
            at_limit = not by_eos and kept is None and length >= ends_at[slot]
            written = response[:-1] if by_eos else response
            text = text_of(written) if texts or kept is not None else ""
            if kept is not None:
                text = cut(text, stop) or ""
            elif not (by_eos or state.config.reference_quirks):
                text = text.rstrip(INCOMPLETE)
            earlier = text_of(old).rstrip(INCOMPLETE) if texts else ""
            added = _unlike(text, earlier)
            ends = (by_eos, kept is not None, at_limit)
            found.append(TextRow(slot, row, parent, text, added, length, *ends))
    return found


def _unlike(text: str, earlier: str) -> str:
    """What a text adds to an earlier one: nothing where a stop string took off some of that."""
    pairs = enumerate(zip(text, earlier, strict=False))
    shorter = min(len(text), len(earlier))
    return text[next((i for i, (one, other) in pairs if one != other), shorter) :]


def heed_stops(proposal: Proposal, rows: Sequence[TextRow]) -> tuple[np.ndarray, np.ndarray]:
    """The proposal's lengths and finished flags, [P, R] on the host, as the rows' texts ended."""
    lengths, finished = (part.copy() for part in to_host((proposal.lengths, proposal.finished)))
    for row in rows:
        lengths[row.slot, row.row] = row.length
        finished[row.slot, row.row] = row.finished
    return lengths, finished


def score_rows(
    scorers: Sequence[TextScorer],
    memories: Sequence[Any],
    rows: Sequence[TextRow],
    requests: Mapping[int, Request],
    config: SearchConfig,
    slots: int,
) -> tuple[tuple[Any, ...], np.ndarray, dict[int, tuple[str, ...]]]:
    """The scorers' memories, weighted scores float32 [P, R, scorers], and who failed in a slot.

    Where every hypothesis is kept anyway, a row is scored when it has ended and not before.
    """
    candidates = []
    for row in rows:
        if not (config.selector.reorders or row.ended):
            continue
        request = requests[row.slot]
        if request.conversation is None:
            raise InputError(f"row {request.row_id}: scorers of texts need its conversation")
        end = row.scores_end(config)
        candidates.append(
            Candidate(row.slot, row.row, row.parent, request.conversation, row.text, end)
        )
    totals = np.zeros((slots, config.rows, len(scorers)), np.float32)
    if not candidates:
        return tuple(memories), totals, {}
    at = np.array([(candidate.slot, candidate.row) for candidate in candidates]).T
    kept: list[Any] = []
    failed: dict[int, tuple[str, ...]] = {}
    for index, (scorer, memory) in enumerate(zip(scorers, memories, strict=True)):
        memory, told = scorer.score(memory, candidates)
        scores = np.asarray(told)
        totals[*at, index] = scorer.weight * scores
        failed |= at_fault(scorer, memory, candidates, scores)
        kept.append(memory)
    return tuple(kept), totals, failed


def insert_all(
    scorers: Sequence[TextScorer], memories: Sequence[Any], slot: int, conversation: Conversation
) -> tuple[Any, ...]:
    """The scorers' memories once a slot holds a new prompt."""
    pairs = zip(scorers, memories, strict=True)
    return tuple(scorer.insert(memory, slot, conversation) for scorer, memory in pairs)


def keep_all(
    scorers: Sequence[TextScorer], memories: Sequence[Any], parents: np.ndarray, rows: np.ndarray
) -> tuple[Any, ...]:
    """The scorers' memories of the kept hypotheses: of which old one, and of which row."""
    pairs = zip(scorers, memories, strict=True)
    return tuple(scorer.keep(memory, parents, rows) for scorer, memory in pairs)


def without(slots: Mapping[int, V], slot: int) -> dict[int, V]:
    """What is known of all slots but one."""
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
