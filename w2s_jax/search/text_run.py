"""The same search over texts, for policies that only give text: chunks until all prompts are done.

Hypotheses are strings, a proposer extends them (an API, say), scorers on text value them, the
config's own selector keeps some. Knows no tokenizer and no network.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from w2s_jax.errors import InputError, RowFailed, RowsFailed
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.proposers import PolicyProposer
from w2s_jax.search.results import ChunkTrace
from w2s_jax.search.run import DEFAULT_SLOTS
from w2s_jax.search.scorers import LogRatio, NoScore
from w2s_jax.search.selectors import Candidates, Selector
from w2s_jax.search.texts import Candidate, TextScorer, at_fault
from w2s_jax.text.conversations import Conversation
from w2s_jax.text.prompts import cut


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
    scored behind it. tokens: how many the proposer says its continuations took.
    """

    response: str = ""
    score: float = 0.0
    finished: bool = False
    objectives: tuple[float, ...] = ()
    by_eos: bool = False
    trail: Any = field(default=None, repr=False, compare=False)
    tokens: int = field(default=0, repr=False, compare=False)


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
class _Held:
    """A prompt under search: its place in the input, its hypotheses, tokens asked and proposed."""

    index: int
    row_id: int
    conversation: Conversation
    hypotheses: tuple[TextHypothesis, ...]
    base: int = 0
    tokens: int = 0

    def is_done(self, config: SearchConfig) -> bool:
        over = all(hypothesis.finished for hypothesis in self.hypotheses)
        return over or self.base >= config.max_new_tokens


@dataclass(frozen=True)
class _Proposed:
    """A proposed successor: what it adds and what it makes.

    ended: nothing will be added to it. by_eos: an EOS is scored behind it. tokens: what it took.
    """

    text: str
    response: str
    finished: bool
    ended: bool
    by_eos: bool
    trail: Any = None
    tokens: int = 0


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
    ids = list(range(len(conversations))) if row_ids is None else list(row_ids)
    if len(ids) != len(conversations):
        raise InputError(f"{len(ids)} row ids for {len(conversations)} prompts; give one each")
    results: dict[int, TextResult] = {}
    failures: list[RowFailed] = []
    rows = zip(ids, conversations, strict=True)
    fresh = (TextHypothesis(),) * config.beam_width
    waiting = (_Held(index, *row, fresh) for index, row in enumerate(rows))
    slots = config.slots or max(1, min(DEFAULT_SLOTS, len(conversations)))
    for index, result in _run(proposer, scorers, waiting, config, slots, on_chunk):
        if isinstance(result, RowFailed):
            failures.append(result)
            continue
        results[index] = result
        if on_result is not None:
            on_result(result)
    if failures:
        raise RowsFailed(failures, [results.get(index) for index in range(len(conversations))])
    return [results[index] for index in range(len(conversations))]


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


def _run(
    proposer: TextProposer,
    scorers: Sequence[TextScorer],
    waiting: Iterator[_Held],
    config: SearchConfig,
    slots: int,
    on_chunk: Callable[[ChunkTrace], None] | None,
) -> Iterator[tuple[int, TextResult | RowFailed]]:
    """Yield (index, outcome) as prompts finish; a slot is refilled as soon as it is free."""
    width, count = config.beam_width, config.successors
    states = [scorer.start(slots, width, count, config.length) for scorer in scorers]
    held: dict[int, _Held] = {}

    def refill(slot: int) -> None:
        entry = next(waiting, None)
        if entry is None:
            held.pop(slot, None)
            return
        held[slot] = entry
        for j, scorer in enumerate(scorers):
            states[j] = scorer.insert(states[j], slot, entry.conversation)

    for slot in range(slots):
        refill(slot)
    while held:
        rows, spent = _propose(proposer, held, config)
        states, objectives, failed = _score(scorers, states, held, rows, slots, config)
        candidates = _candidates(held, rows, objectives, config)
        chosen, sums = map(np.asarray, _select(config.selector, candidates, width, count))
        states = _keep(scorers, states, chosen, list(held), config)
        for slot, entry in list(held.items()):
            picked = chosen[slot].tolist()
            if slot in failed:
                yield entry.index, RowFailed(entry.row_id, failed[slot])
                refill(slot)
                continue
            options = _options(entry, rows[slot], objectives[slot], sums[slot], config)
            if on_chunk is not None:
                on_chunk(_trace(entry, rows[slot], options, picked, config))
            kept = tuple(options[index] for index in picked)
            base, tokens = entry.base + config.length, entry.tokens + spent[slot]
            held[slot] = after = _Held(
                entry.index, entry.row_id, entry.conversation, kept, base, tokens
            )
            if after.is_done(config):
                yield entry.index, _outcome(after, config)
                refill(slot)


def _propose(
    proposer: TextProposer, held: dict[int, _Held], config: SearchConfig
) -> tuple[dict[int, dict[int, _Proposed]], dict[int, int]]:
    """Each slot's rows by number, none where the parent is finished; and the tokens they took."""
    count = config.successors
    places, extensions = [], []
    for slot, entry in held.items():
        limit = min(config.length, config.max_new_tokens - entry.base)
        for w, hypothesis in enumerate(entry.hypotheses):
            if hypothesis.finished:
                continue
            prompt = (entry.row_id, entry.conversation, hypothesis.response)
            place = (entry.base, w * count)
            places.append((slot, w))
            extensions.append(Extension(*prompt, count, limit, *place, hypothesis.trail))
    answers = proposer.extend(extensions)
    rows: dict[int, dict[int, _Proposed]] = {slot: {} for slot in held}
    spent = dict.fromkeys(held, 0)
    for (slot, w), extension, answer in zip(places, extensions, answers, strict=True):
        if len(answer) != count:
            raise ValueError(f"the proposer gave {len(answer)} continuations for {count}")
        full = extension.position + config.length >= config.max_new_tokens
        for k, continuation in enumerate(answer):
            rows[slot][w * count + k] = _row(extension.response, continuation, full, config)
            spent[slot] += continuation.tokens
    return rows, spent


def _row(before: str, continuation: Continuation, full: bool, config: SearchConfig) -> _Proposed:
    """A continued response, cut at a stop string, which may have begun in an earlier chunk."""
    response = before + continuation.text
    kept = cut(response, config.stop)
    if kept is not None:
        took = continuation.tokens
        return _Proposed(kept[len(before) :], kept, True, ended=True, by_eos=False, tokens=took)
    finished = continuation.finished
    by_eos = config.reference_quirks and full
    if finished:
        by_eos = not continuation.stopped
    more = (continuation.trail, continuation.tokens)
    return _Proposed(continuation.text, response, finished, finished or full, by_eos, *more)


def _score(
    scorers: Sequence[TextScorer],
    states: list[Any],
    held: dict[int, _Held],
    rows: dict[int, dict[int, _Proposed]],
    slots: int,
    config: SearchConfig,
) -> tuple[list[Any], np.ndarray, dict[int, tuple[str, ...]]]:
    """The scorers' new states, weighted objectives of the rows, float32 [P, R, J], and who failed.

    Where every hypothesis is kept anyway, a row is scored when it has ended and not before.
    """
    count = config.successors
    asked = [
        Candidate(slot, r, r // count, held[slot].conversation, row.response, row.by_eos)
        for slot, found in rows.items()
        for r, row in found.items()
        if row.ended or config.selector.reorders
    ]
    objectives = np.zeros((slots, config.rows, len(scorers)), np.float32)
    if not asked:
        return states, objectives, {}
    after: list[Any] = []
    failed: dict[int, tuple[str, ...]] = {}
    for j, (scorer, state) in enumerate(zip(scorers, states, strict=True)):
        state, values = scorer.score(state, asked)
        after.append(state)
        failed |= at_fault(scorer, state, asked, np.asarray(values))
        for candidate, value in zip(asked, np.asarray(values).tolist(), strict=True):
            objectives[candidate.slot, candidate.row, j] = scorer.weight * value
    return after, objectives, failed


def _candidates(
    held: dict[int, _Held],
    rows: dict[int, dict[int, _Proposed]],
    objectives: np.ndarray,
    config: SearchConfig,
) -> Candidates:
    """Rows, then finished hypotheses; with reference_quirks those K times, in place of rows."""
    width, count, each = config.beam_width, config.successors, config.rows
    objectives = objectives.copy()
    alive = np.zeros((len(objectives), each + width), bool)
    finished = np.zeros((len(objectives), width, objectives.shape[-1]), np.float32)
    for slot, entry in held.items():
        alive[slot, list(rows[slot])] = True
        for w, hypothesis in enumerate(entry.hypotheses):
            if not hypothesis.finished:
                continue
            finished[slot, w] = hypothesis.objectives
            places = slice(w * count, (w + 1) * count)
            if config.reference_quirks:
                objectives[slot, places] = hypothesis.objectives
                alive[slot, places] = True
            else:
                alive[slot, each + w] = True
    both = np.concatenate([objectives, finished], axis=1)
    return Candidates(*jax.device_put((both, alive)))


@partial(jax.jit, static_argnums=(0, 2, 3))
def _select(
    selector: Selector, candidates: Candidates, width: int, count: int
) -> tuple[Int[Array, "P W"], Float[Array, "P candidates"]]:
    """What the selector keeps, and the sums of the candidates' objectives."""
    return selector.select(candidates, width, count), candidates.objectives.sum(axis=-1)


def _keep(
    scorers: Sequence[TextScorer],
    states: list[Any],
    chosen: np.ndarray,
    live: list[int],
    config: SearchConfig,
) -> list[Any]:
    """The scorers' states after selection; slots that hold no prompt stay as they are."""
    width, count = config.beam_width, config.successors
    own = np.arange(width)
    is_row = chosen < config.rows
    parents = np.tile(own, (len(chosen), 1))
    rows = parents * count
    parents[live] = np.where(is_row, chosen // count, chosen - config.rows)[live]
    rows[live] = np.where(is_row, chosen, parents * count)[live]
    return [
        scorer.keep(state, parents.astype(np.int32), rows.astype(np.int32))
        for scorer, state in zip(scorers, states, strict=True)
    ]


def _options(
    entry: _Held,
    rows: dict[int, _Proposed],
    objectives: np.ndarray,
    sums: np.ndarray,
    config: SearchConfig,
) -> dict[int, TextHypothesis]:
    """What the candidates of a slot would be as hypotheses, by their index."""
    options = {}
    for r in range(config.rows):
        if r in rows:
            row, values = rows[r], tuple(objectives[r].tolist())
            tokens = entry.hypotheses[r // config.successors].tokens + row.tokens
            options[r] = TextHypothesis(
                row.response, float(sums[r]), row.finished, values, row.by_eos, row.trail, tokens
            )
        elif config.reference_quirks:
            options[r] = entry.hypotheses[r // config.successors]
    if not config.reference_quirks:
        over = {w: h for w, h in enumerate(entry.hypotheses) if h.finished}
        options |= {config.rows + w: hypothesis for w, hypothesis in over.items()}
    return options


def _trace(
    entry: _Held,
    rows: dict[int, _Proposed],
    options: dict[int, TextHypothesis],
    picked: list[int],
    config: SearchConfig,
) -> ChunkTrace:
    """What the chunk offered; a finished hypothesis is listed once, also with reference_quirks."""
    count = config.successors
    offered = [(r // count, row.text, options[r], (r,)) for r, row in rows.items()]
    for w, hypothesis in enumerate(entry.hypotheses):
        if hypothesis.finished:
            copies = (*range(w * count, (w + 1) * count), config.rows + w)
            offered.append((w, "", hypothesis, copies))
    kept = [[place for place, index in enumerate(picked) if index in at] for *_, at in offered]
    return ChunkTrace(
        row_id=entry.row_id,
        parents=tuple(parent for parent, *_ in offered),
        texts=tuple(text for _, text, *_ in offered),
        objectives=np.array([option.objectives for *_, option, _ in offered], np.float32),
        finished=tuple(option.finished for *_, option, _ in offered),
        kept=tuple(places[0] if places else -1 for places in kept),
    )


def _outcome(entry: _Held, config: SearchConfig) -> TextResult | RowFailed:
    hypotheses = entry.hypotheses
    if not all(np.isfinite(hypothesis.score) for hypothesis in hypotheses):
        return RowFailed(entry.row_id, ())
    if not config.selector.reorders:
        hypotheses = tuple(sorted(hypotheses, key=lambda hypothesis: -hypothesis.score))
    return TextResult(entry.row_id, hypotheses, entry.tokens)
