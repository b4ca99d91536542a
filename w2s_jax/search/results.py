"""The host's side of a search as values: requests, results, and the hop through text.

EOS ids are found on the device; stop strings, scores of texts and traces need the hop. A trace is
what a search offered and kept, chunk by chunk.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from operator import eq
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from w2s_jax.distributed import everywhere, to_host
from w2s_jax.errors import InputError
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.methods import Selection
from w2s_jax.search.scorers import Candidate
from w2s_jax.search.step import Proposal, SearchState
from w2s_jax.text.prompts import CONTEXT, INCOMPLETE, Conversation, cut, text_behind
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

    temperature, top_p and beta are the config's where they are None, limit is its max_new_tokens.

    Attributes:
        row_id: With the seed it decides the draws.
        prompts: Token ids, one sequence for all models or one each (policy, tuned 0, untuned 0,
            ...).
        conversation: The prompt for scorers of texts.
        stop: Strings that end a response.
        seed: With row_id it decides the draws.
        limit: New tokens at most, up to the config's max_new_tokens.
        temperature: Of the sampling; 0 is greedy.
        top_p: Of the sampling.
        beta: β of an EFT proposer.
        position: Added to the response position of each draw.
        lane: Added to the lane of each draw.
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

    @property
    def scored_conversation(self) -> Conversation:
        """The conversation; InputError where there is none."""
        if self.conversation is None:
            raise InputError(f"row {self.row_id}: scorers of texts need its conversation")
        return self.conversation


@dataclass(frozen=True)
class Hypothesis:
    """A response and its score.

    Attributes:
        tokens: Token ids, an EOS included.
        score: The sum of its objectives.
        finished: An EOS or a stop string ended it; otherwise max_new_tokens did.
        objectives: Sums of token scores, then scores of texts.
        token_scores: What each token added; empty where no scorer is on tokens.
        behind: Where a stop string ended it, the tokens sampled after the last one that counts,
            which may hold the beginning of that string.
    """

    tokens: tuple[int, ...]
    score: float
    finished: bool
    objectives: tuple[float, ...] = ()
    token_scores: tuple[float, ...] = ()
    behind: tuple[int, ...] = ()

    @property
    def token_count(self) -> int:
        """The number of its tokens."""
        return len(self.tokens)


@dataclass(frozen=True)
class SearchResult:
    """The hypotheses that a prompt's search kept, best first."""

    row_id: int
    hypotheses: tuple[Hypothesis, ...]

    @property
    def best(self) -> Hypothesis:
        """The first: of highest score, unless the selector weighs objectives otherwise."""
        return self.hypotheses[0]


@dataclass(frozen=True)
class ChunkTrace:
    """The candidates of one chunk of one prompt, c of them, and which of them were kept.

    Attributes:
        row_id: Of the prompt.
        parents: C indices of the hypotheses that they continue.
        texts: What they add; "" where a finished hypothesis is carried over.
        objectives: float32 [c, J].
        finished: Whether an EOS or a stop string ended them.
        kept: C indices among the new hypotheses, −1 for those that were dropped.
    """

    row_id: int
    parents: tuple[int, ...]
    texts: tuple[str, ...]
    objectives: np.ndarray
    finished: tuple[bool, ...]
    kept: tuple[int, ...]


def chunk_row(chunk: ChunkTrace) -> dict[str, Any]:
    """One chunk: {"candidates": [{parent, text, score, objectives, kept, finished}]}.

    kept is the index among the new hypotheses, None for what was dropped.
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


@dataclass(frozen=True)
class Questions:
    """The rows of a file with their conversations, and their prompts as the models read them.

    Attributes:
        rows: As they were read.
        conversations: One for each row.
        prompts: For each row the token ids of one sequence for all models, or of one each; empty
            for a policy that only gives text.
        source: What rows are called in messages, before their number.
    """

    rows: Sequence[Row]
    conversations: Sequence[Conversation]
    prompts: Sequence[tuple[tuple[int, ...], ...]] = ()
    source: str = "row"


@dataclass(frozen=True)
class TextRow:
    """A live row of a proposal as text.

    Attributes:
        slot: Where its prompt is.
        row: 0 .. R − 1, its row in the slot.
        parent: The hypothesis that it continues.
        text: All of its response so far, up to its end.
        new: What this chunk adds.
        length: Tokens of its response; of a policy that only gives text, those of this chunk.
        end: What ended it.
        trail: What a proposer of texts wants back.
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

    def candidate(self, request: Request, config: SearchConfig) -> Candidate:
        """The row for scorers of texts, with its request's conversation."""
        return Candidate(
            slot=self.slot,
            row=self.row,
            parent=self.parent,
            conversation=request.scored_conversation,
            response=self.text,
            finished=self.scores_end(config),
        )

    def scores_end(self, config: SearchConfig) -> bool:
        """Whether an EOS is scored behind it."""
        return self.end == "eos" or (config.reference_quirks and self.end == "limit")


def kept_tokens(tokens: Sequence[int], decode: Decode, stop: Sequence[str]) -> int | None:
    """How many leading tokens hold the text before the first stop string; None where there is none.

    They are the fewest whose text begins with all of that text: a token counts that holds its end
    and the start of the stop string; one that holds only the stop string does not.
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
    """Every live row of the used slots as text, cut at stop strings.

    Args:
        state: The state after proposing.
        proposal: The rows.
        requests: The request in each used slot.
        decode: Turns token ids into text.
        texts: False leaves out the texts of rows without a stop string.
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


def ended(proposal: Proposal, rows: Sequence[TextRow], mesh: Mesh | None) -> Proposal:
    """A proposal with the ends that its rows have as texts."""
    lengths, finished = (part.copy() for part in to_host((proposal.lengths, proposal.finished)))
    for row in rows:
        lengths[row.slot, row.row] = row.length
        finished[row.slot, row.row] = row.finished
    return replace(proposal, lengths=everywhere(lengths, mesh), finished=everywhere(finished, mesh))


def trace(
    rows: Sequence[TextRow],
    selection: Selection,
    finished: np.ndarray,
    requests: Mapping[int, Request],
) -> dict[int, ChunkTrace]:
    """The candidates of each slot's chunk, and which of them were kept.

    A finished hypothesis is listed once, also with reference_quirks.

    Args:
        rows: The live rows.
        selection: What was chosen.
        finished: bool [P, W], which hypotheses had finished before the chunk.
        requests: The request in each used slot.

    Returns:
        A trace for each slot with candidates.
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
