"""The same search over texts, for policies that only give text: chunks until all prompts are done.

Hypotheses are strings. A proposer (such as the client of an API) extends them, scorers of texts
value them, and the config's own selector keeps some. `run.run_slots` fills and empties the slots,
as it does those on the device. No tokenizer and no network is used here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, runtime_checkable

import jax
import numpy as np

from w2s_jax.errors import InputError, RowFailed
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.methods import LogRatio, NoScore, PolicyProposer, select_among
from w2s_jax.search.results import ChunkTrace, End, Questions, Request, TextRow
from w2s_jax.search.scorers import Shaded, TextScorer, guide_tokens
from w2s_jax.search.session import Slotted, collect, run_slots, slots_for
from w2s_jax.text.prompts import Conversation, cut, plain


@dataclass(frozen=True)
class Extension:
    """A hypothesis to be continued.

    seed, row_id, position and lane tell every draw from the others.

    Attributes:
        row_id: Of its prompt.
        conversation: Its prompt.
        response: Its text so far.
        count: Continuations that are asked for.
        max_tokens: Of each continuation.
        position: Tokens asked for it so far, those of all earlier chunks.
        lane: Row (0 .. W·K − 1) of its first continuation.
        trail: What the proposer returned with the response's last continuation; None at first.
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
    """Text that continues a response.

    Attributes:
        text: What was written.
        finished: Whether the response ends here; if not, it was cut by max_tokens.
        tokens: How many it took.
        stopped: It was ended by a stop string, or anything else without an EOS to score; not by an
            EOS.
        trail: What the proposer wants back with the next extension.
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
    """A response and its score.

    Attributes:
        response: Its text, without what ended it.
        score: The sum of the objectives.
        finished: An EOS or a stop string ended it, not max_new_tokens.
        objectives: Weighted scores, one of each scorer.
        by_eos: An EOS is scored behind it.
        trail: What the proposer wants back.
        token_count: Tokens that its continuations took, as the proposer counts them.
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
    """The hypotheses that a prompt's search kept.

    Attributes:
        row_id: Of the prompt.
        hypotheses: Best first.
        tokens: How many were proposed for it in all.
    """

    row_id: int
    hypotheses: tuple[TextHypothesis, ...]
    tokens: int

    @property
    def best(self) -> TextHypothesis:
        """The first: of highest score, unless the selector weighs objectives otherwise."""
        return self.hypotheses[0]


@dataclass(frozen=True)
class Beam:
    """The content of a slot.

    Attributes:
        hypotheses: W of them.
        base: Tokens asked for each.
        tokens: Proposed for all, dropped ones included.
    """

    hypotheses: tuple[TextHypothesis, ...]
    base: int = 0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class TextSession(Slotted):
    """Slots of a search over texts; `session.Session` is that of one on the device.

    Attributes:
        proposer: What continues the texts.
        beams: The hypotheses in each used slot.
    """

    proposer: TextProposer
    beams: Mapping[int, Beam] = field(default_factory=dict)

    def insert(self, slot: int, request: Request) -> Self:
        """The session with a request in a slot, in place of its content."""
        beam = Beam((TextHypothesis(),) * self.config.beam_width)
        return replace(self.with_request(slot, request), beams={**self.beams, slot: beam})

    def release(self, slot: int) -> Self:
        """The session with a slot emptied."""
        beams = {other: beam for other, beam in self.beams.items() if other != slot}
        return replace(self.without(slot), beams=beams)

    def advance(self) -> Self:
        """One chunk for all slots."""
        config, rows = self.config, self._propose()
        told, totals = self.score(rows)
        shape = (self.slots, config.beam_width)
        objectives = np.zeros((*shape, len(self.scorers)), np.float32)
        finished = np.zeros(shape, bool)
        for slot, beam in self.beams.items():
            finished[slot] = [one.finished for one in beam.hypotheses]
            for w in np.flatnonzero(finished[slot]).tolist():
                objectives[slot, w] = beam.hypotheses[w].objectives
        given = (config.selector, totals, objectives, finished)
        selection = jax.device_get(_select(*given, reference_quirks=config.reference_quirks))
        by_place = {(row.slot, row.row): row for row in rows}

        def extended(slot: int, chosen: int, parent: int) -> TextHypothesis:
            old = self.beams[slot].hypotheses[parent]
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

        beams = {}
        for slot, beam in self.beams.items():
            places = (selection.chosen[slot].tolist(), selection.parents[slot].tolist())
            kept = tuple(extended(slot, *place) for place in zip(*places, strict=True))
            spent = sum(row.length for row in rows if row.slot == slot)
            beams[slot] = Beam(kept, beam.base + config.length, beam.tokens + spent)
        return replace(told.keep(rows, selection, finished), beams=beams)

    def _propose(self) -> list[TextRow]:
        """Every row of the hypotheses that continue."""
        config, count = self.config, self.config.successors
        asked: list[tuple[int, Extension]] = []
        for slot, beam in self.beams.items():
            request = self.requests[slot]
            assert request.conversation is not None
            limit = min(config.length, config.max_new_tokens - beam.base)
            for w, one in enumerate(beam.hypotheses):
                prompt = (request.row_id, request.conversation, one.response)
                place = (beam.base, w * count)
                if not one.finished:
                    asked.append((slot, Extension(*prompt, count, limit, *place, one.trail)))
        rows = []
        answers = self.proposer.extend([extension for _, extension in asked])
        for (slot, extension), answer in zip(asked, answers, strict=True):
            if len(answer) != count:
                raise ValueError(f"the proposer gave {len(answer)} continuations for {count}")
            rows += [self._row(slot, extension, k, one) for k, one in enumerate(answer)]
        return rows

    def _row(self, slot: int, extension: Extension, k: int, continuation: Continuation) -> TextRow:
        """A successor, cut at a stop string, which may have begun in an earlier chunk."""
        written, config = extension.response + continuation.text, self.config
        kept = cut(written, config.stop)
        end: End = ""
        if kept is not None or (continuation.finished and continuation.stopped):
            end = "stop"
        elif continuation.finished:
            end = "eos"
        elif extension.position + config.length >= config.max_new_tokens:
            end = "limit"
        text = written if kept is None else kept
        return TextRow(
            slot=slot,
            row=extension.lane + k,
            parent=extension.lane // config.successors,
            text=text,
            new=text[len(extension.response) :],
            length=continuation.tokens,
            end=end,
            trail=continuation.trail,
        )

    def done_slots(self) -> list[int]:
        """Slots whose search has ended or failed."""
        return [
            slot
            for slot, beam in self.beams.items()
            if slot in self.failed
            or beam.base >= self.config.max_new_tokens
            or all(hypothesis.finished for hypothesis in beam.hypotheses)
        ]

    def outcomes(self, slots: Iterable[int]) -> tuple[dict[int, TextResult], dict[int, RowFailed]]:
        """The outcomes of slots.

        Returns:
            By slot, the results of those that have one, best first, and why the others failed.
        """
        found, failed = {}, {}
        for slot in slots:
            row_id, beam = self.requests[slot].row_id, self.beams[slot]
            hypotheses = beam.hypotheses
            if slot in self.failed or not all(np.isfinite(one.score) for one in hypotheses):
                failed[slot] = RowFailed(row_id, self.failed.get(slot, ()))
                continue
            if not self.config.selector.reorders:
                hypotheses = tuple(sorted(hypotheses, key=lambda hypothesis: -hypothesis.score))
            found[slot] = TextResult(row_id, hypotheses, beam.tokens)
        return found, failed


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
    """Search a response for every conversation.

    Chunk-level beam search (arXiv 2405.19262, algorithm 1; section 5.2 for black boxes) as
    `search.search` does it, over texts. A response that an EOS ended is scored with an EOS behind
    it, one that a stop string ended is not; with reference_quirks one cut by length is.

    Args:
        proposer: Continues the texts.
        scorers: A score is Σ_j weight_j·score_j over them.
        conversations: The prompts.
        config: The search. max_new_tokens counts the tokens asked for, max_tokens of each chunk,
            whatever came. Sampling and eos_ids are left to the proposer; the scorer must be the
            default or NoScore.
        row_ids: By which the proposer tells the draws apart; by default 0, 1, ...
        on_result: Called with each result as soon as its prompt is done.
        on_chunk: Called with the candidates of each chunk and which of them were kept.

    Returns:
        The results in the order of the conversations.

    Raises:
        RowsFailed: Once all others are done, for rows with a score that is not finite.
        InputError: For a config that needs the policy's logits, for no scorer where the method
            scores, and as the proposer and the scorers do.
    """
    _check(config, scorers)
    count = len(conversations)
    ids = list(range(count)) if row_ids is None else list(row_ids)
    if len(ids) != count:
        raise InputError(f"{len(ids)} row ids for {count} prompts; give one each")
    requests = [
        Request(row_id, (), conversation=conversation)
        for row_id, conversation in zip(ids, conversations, strict=True)
    ]
    slots, traced = slots_for(config, count), on_chunk is not None
    session = TextSession(config=config, slots=slots, traced=traced, proposer=proposer)
    found = run_slots(session.with_scorers(scorers), enumerate(requests), on_chunk)
    return collect(found, count, on_result)


@dataclass(frozen=True)
class TextPolicy:
    """A policy that only gives text, for `file.search_rows`.

    Attributes:
        proposer: Continues texts.
        scorers: Of texts.
        config: The search.
        names: Of a hypothesis's objectives.
        render: A conversation as the text that a response follows.
        called: Names of the models in messages.
    """

    proposer: TextProposer
    scorers: Sequence[TextScorer]
    config: SearchConfig
    names: Sequence[str] = ()
    render: Callable[[Conversation], str] = plain
    called: Mapping[str, str] = field(default_factory=dict)

    def search(self, questions: Questions, waiting: Sequence[int], **heard: Any) -> object:
        """Search the rows of these indices, which are their ids, as `search_texts` does."""
        talks = [questions.conversations[index] for index in waiting]
        given = (self.proposer, self.scorers, talks, self.config)
        return search_texts(*given, row_ids=waiting, **heard)

    def responses(self, questions: Questions, result: TextResult) -> list[str]:
        """The text of every hypothesis, best first."""
        return [found.response for found in result.hypotheses]

    def best_tokens(self, questions: Questions, result: TextResult, response: str) -> Shaded:
        """Each token of the best response, and the weighted log-ratio that the guide gives it."""
        conversation = questions.conversations[result.row_id]
        return guide_tokens(self.scorers, conversation, response, finished=result.best.by_eos)


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


_select = jax.jit(select_among, static_argnames=("selector", "reference_quirks"))
