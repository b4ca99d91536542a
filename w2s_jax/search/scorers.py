"""Scorers of texts, which the host calls between steps: Python functions, guides, reward models.

A scorer is given whole responses as texts. Guides of other vocabularies and reward models read them
through `incremental_text.py`, no token twice. Scorers on tokens are in `methods.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from w2s_jax.distributed import from_first, gather_values, to_host
from w2s_jax.errors import SCORER, InputError, check_fields, shown
from w2s_jax.models.model import Model
from w2s_jax.models.reward import Classifier, RewardModel, contrast, label_names
from w2s_jax.search.incremental_text import (
    Place,
    Reading,
    common,
    insert_text,
    keep_rows,
    logprobs_alone,
    read_logprobs,
    read_rewards,
    start_reading,
)
from w2s_jax.search.models import in_one_dtype
from w2s_jax.text.chat import Template
from w2s_jax.text.prompts import Conversation, decode_tokens, plain, token_texts
from w2s_jax.text.tokenizer import pad_rows, power_of_two

Shaded = list[tuple[str, float]]
"""The tokens of a text, and what a guide adds for each."""

Readings = tuple[Reading, ...]
"""What a guide's tuned and untuned model remember."""

_NOT_FINITE = "gave a score that is not a finite number"


@dataclass(frozen=True)
class Candidate:
    """A response, whole so far, that may be kept.

    Attributes:
        slot: Where its prompt is.
        row: 0 .. R − 1, its row in the slot.
        parent: Row // K, the hypothesis that it continues.
        conversation: Its prompt.
        response: Its text.
        finished: Whether an EOS ended it, which is then scored behind it.
    """

    slot: int
    row: int
    parent: int
    conversation: Conversation
    response: str
    finished: bool


@runtime_checkable
class TextScorer(Protocol):
    """Values whole responses as texts. A frozen value; its memory is an argument and a result.

    The score of a hypothesis gains weight · score. `keep` says which of the scored candidates were
    kept, so that a scorer may read only what is new. The optional method `blame` names the models
    at fault for a score that is not finite (`at_fault`). The methods' defaults are those of a
    scorer without memory.
    """

    @property
    def weight(self) -> float | int:
        """The factor of the scores."""

    def start(self, slots: int, hypotheses: int, successors: int, chunk_length: int) -> Any:
        """An empty memory for P slots, W hypotheses, K successors and L tokens of a chunk."""
        return None

    def insert(self, memory: Any, slot: int, conversation: Conversation) -> Any:
        """The memory after a slot has received a new prompt."""
        return memory

    def score(self, memory: Any, candidates: Sequence[Candidate]) -> tuple[Any, np.ndarray]:
        """The memory with the candidates read, and their float32 scores before weighting."""

    def keep(self, memory: Any, parents: np.ndarray, rows: np.ndarray) -> Any:
        """The memory of the kept hypotheses.

        Args:
            memory: The memory after `score`.
            parents: int [P, W], the old hypothesis of each new one.
            rows: int [P, W], the row that continues it.
        """
        return memory


def at_fault(
    scorer: TextScorer, memory: Any, candidates: Sequence[Candidate], scores: np.ndarray
) -> dict[int, tuple[str, ...]]:
    """Slots in which a model failed, so that a score is not finite, and the models' names.

    A scorer may have a method `blame(memory, (slot, row))` that names those of its models whose
    logits were NaN or infinite: none where the only reason is a token of probability 0. A scorer
    without it is itself at fault.

    Args:
        scorer: What scored.
        memory: The memory that `score` returned.
        candidates: What was scored.
        scores: float32, one of each candidate.
    """
    usual = (f"{SCORER}{type(scorer).__name__} {_NOT_FINITE}",)
    blame = getattr(scorer, "blame", lambda memory, place: usual)
    failed: dict[int, tuple[str, ...]] = {}
    for index in np.flatnonzero(~np.isfinite(scores)).tolist():
        one = candidates[index]
        names = blame(memory, (one.slot, one.row))
        failed |= {one.slot: names} if names else {}
    return failed


def score_candidates(
    scorers: Sequence[TextScorer],
    memories: tuple[Any, ...],
    candidates: Sequence[Candidate],
    shape: tuple[int, int],
) -> tuple[tuple[Any, ...], np.ndarray, dict[int, tuple[str, ...]]]:
    """Score candidates by several scorers.

    Args:
        scorers: N of them.
        memories: What each remembers.
        candidates: The rows to score.
        shape: P and R.

    Returns:
        The new memories, weighted scores float32 [P, R, n], 0 for rows that are no candidates, and
        the slots that failed, as of `at_fault`.
    """
    totals = np.zeros((*shape, len(scorers)), np.float32)
    if not candidates:
        return memories, totals, {}
    places = np.array([(candidate.slot, candidate.row) for candidate in candidates]).T
    kept: list[Any] = []
    failed: dict[int, tuple[str, ...]] = {}
    for index, (scorer, memory) in enumerate(zip(scorers, memories, strict=True)):
        after, told = scorer.score(memory, candidates)
        scores = np.asarray(told)
        totals[*places, index] = scorer.weight * scores
        failed |= at_fault(scorer, after, candidates, scores)
        kept.append(after)
    return tuple(kept), totals, failed


@dataclass(frozen=True)
class FunctionScorer(TextScorer):
    """Any function of (prompts, responses) to numbers, called once a chunk with all candidates.

    A prompt is its bare text, or the content of its only message, or its messages as lines. Where
    the function raises, it is called again for each prompt alone: prompts for which it raises again
    fail, as do those with a number that is not finite, and the others go on.

    Raises:
        InputError: Where it raises for each of several prompts, and for a result that is not one
            number for each response.
    """

    function: Callable[[list[str], list[str]], Sequence[Any]]
    weight: float | int = 1.0

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InputError(f"a FunctionScorer takes a function, not {shown(self.function)}")
        check_fields(self)

    def score(
        self, memory: Any, candidates: Sequence[Candidate]
    ) -> tuple[dict[int, str], np.ndarray]:
        """The errors by slot, and the scores, NaN where there is an error.

        Of several hosts only the first calls the function, as its results may differ between calls.
        """
        like = np.zeros(len(candidates), np.float32)
        raised: dict[int, str] = {}
        scores = from_first(lambda: self._scores(candidates, raised), like)
        if not np.isfinite(scores).all():
            first, *_ = gather_values(list(raised.items()))
            raised = dict(first)
        return raised, scores

    def blame(self, memory: dict[int, str], place: tuple[int, int]) -> tuple[str, ...]:
        """The function's name, and what it did."""
        error = memory.get(place[0])
        did = _NOT_FINITE if error is None else f"raised {error}"
        return (f"{SCORER}{self._name} {did}",)

    @property
    def _name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def _scores(self, candidates: Sequence[Candidate], raised: dict[int, str]) -> np.ndarray:
        """The scores of all prompts together or, where that raises, of each alone.

        Errors by slot are added to `raised`.
        """
        prompts = [plain(candidate.conversation) for candidate in candidates]
        try:
            said = self.function(prompts, [candidate.response for candidate in candidates])
        except (Exception, SystemExit) as error:  # it is the user's own code
            return self._apart(candidates, raised, error)
        return self._numbers(said, len(candidates))

    def _apart(
        self, candidates: Sequence[Candidate], raised: dict[int, str], error: BaseException
    ) -> np.ndarray:
        slots = sorted({candidate.slot for candidate in candidates})
        scores = np.full(len(candidates), np.nan, np.float32)
        if len(slots) == 1:
            raised[slots[0]] = _told(error)
            return scores
        for slot in slots:
            own = [i for i, candidate in enumerate(candidates) if candidate.slot == slot]
            scores[own] = self._scores([candidates[i] for i in own], raised)
        if len(raised) == len(slots):  # the function's own fault rather than a prompt's
            raise InputError(f"the scorer {self._name} raised {_told(error)}") from error
        return scores

    def _numbers(self, said: Any, count: int) -> np.ndarray:
        try:
            scores = np.asarray(said, np.float32)
        except (TypeError, ValueError):
            raise InputError(
                f"the scorer {self._name} returned what is not a list of numbers"
            ) from None
        if scores.shape != (count,):
            raise InputError(
                f"the scorer {self._name} returned an array of shape {scores.shape} for "
                f"{count} responses; it must return one number each"
            )
        return scores


def _told(error: BaseException) -> str:
    """An error's type, and the beginning of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:80]}" if lines else type(error).__name__


@dataclass(frozen=True)
class TextModel:
    """A model, the template that it reads conversations with, and its name in messages."""

    model: Model
    template: Template
    name: str = ""


@dataclass(frozen=True)
class TextLogRatio:
    """The implicit reward log p_tuned(y|x) − log p_untuned(y|x) of a response as text, in nats.

    For guides whose vocabulary, or template, is not the policy's. The response is encoded anew
    behind each model's own template; the token prefix in common with the prompt is not scored; EOS
    is, where it ended the response. Both models compute in the wider of their dtypes. arXiv
    2405.19262 eq. 5 and appendix B.
    """

    tuned: TextModel
    untuned: TextModel
    weight: float | int = 1.0

    def __post_init__(self) -> None:
        pair = in_one_dtype(self.tuned.model, self.untuned.model)
        for name, model in zip(("tuned", "untuned"), pair, strict=True):
            object.__setattr__(self, name, replace(getattr(self, name), model=model))

    @property
    def members(self) -> tuple[TextModel, TextModel]:
        return (self.tuned, self.untuned)

    def start(self, slots: int, hypotheses: int, successors: int, chunk_length: int) -> Readings:
        return (start_reading(slots, hypotheses, successors, chunk_length),) * 2

    def insert(self, memory: Readings, slot: int, conversation: Conversation) -> Readings:
        return tuple(
            insert_text(reading, slot, member.template.encode(conversation))
            for reading, member in zip(memory, self.members, strict=True)
        )

    def score(
        self, memory: Readings, candidates: Sequence[Candidate]
    ) -> tuple[Readings, np.ndarray]:
        texts = encode_candidates(self.tuned.template, candidates)
        others = texts
        if self.untuned.template != self.tuned.template:
            others = encode_candidates(self.untuned.template, candidates)
        tuned, ups = read_logprobs(self.tuned.model, memory[0], texts)
        untuned, downs = read_logprobs(self.untuned.model, memory[1], others)
        ratios = [ups[place] - downs[place] for place in texts]
        return (tuned, untuned), np.asarray(ratios, np.float32)

    def blame(self, memory: Readings, place: Place) -> tuple[str, ...]:
        """The models whose logits were no distribution for a row of the last `score`."""
        pairs = zip(self.members, memory, ("tuned model", "untuned model"), strict=True)
        return tuple(m.name or usual for m, read, usual in pairs if place in read.unsound)

    def keep(self, memory: Readings, parents: np.ndarray, rows: np.ndarray) -> Readings:
        return tuple(keep_rows(reading, parents, rows) for reading in memory)

    def token_ratios(self, conversation: Conversation, response: str, *, finished: bool) -> Shaded:
        """Each token of a response as the guide reads it, and its weighted log-ratio in nats.

        Empty where tuned and untuned model have different templates, so that their tokens may
        differ.
        """
        template = self.tuned.template
        if self.untuned.template != template:
            return []
        candidate = Candidate(0, 0, 0, conversation, response, finished)
        (tokens,) = encode_candidates(template, [candidate]).values()
        start = max(1, common(np.asarray(tokens), np.asarray(template.encode(conversation))))
        ups, downs = (logprobs_alone(member.model, tokens) for member in self.members)
        ratios = (self.weight * (ups - downs))[start - 1 :].tolist()
        decode = partial(decode_tokens, template.tokenizer)
        return list(zip(token_texts(decode, tokens[:start], tokens[start:]), ratios, strict=True))


def guide_tokens(
    scorers: Sequence[TextScorer], conversation: Conversation, response: str, *, finished: bool
) -> Shaded:
    """Each token of a response as the first guide on texts reads it, and its weighted log-ratio."""
    for scorer in scorers:
        if isinstance(scorer, TextLogRatio):
            return scorer.token_ratios(conversation, response, finished=finished)
    return []


@dataclass(frozen=True)
class RewardScorer:
    """A reward or value model's reward of prompt and response, whole or not.

    A decoder reads only new tokens, and its head the state of the last one; an encoder reads whole
    texts (without a template, prompt and response as they stand). With one label its logit is the
    reward; with two, the second minus the first; with more, the one chosen by `label`. Chunk-level
    guidance by a value function: arXiv 2409.17819 (explicit values), arXiv 2310.17022.
    """

    model: RewardModel | Classifier
    template: Template
    weight: float | int = 1.0
    label: str | int | None = None
    name: str = "reward model"

    def start(self, slots: int, hypotheses: int, successors: int, chunk_length: int) -> Any:
        if isinstance(self.model, Classifier):
            return None
        return start_reading(slots, hypotheses, successors, chunk_length)

    def insert(self, memory: Any, slot: int, conversation: Conversation) -> Any:
        if memory is None:
            return None
        return insert_text(memory, slot, self.template.encode(conversation))

    def score(self, memory: Any, candidates: Sequence[Candidate]) -> tuple[Any, np.ndarray]:
        if isinstance(self.model, Classifier):
            return None, self._classify(self.model, candidates)
        texts = encode_candidates(self.template, candidates, scores_end=False)
        memory, logits = read_rewards(self.model, memory, texts)
        rows = np.stack([logits[place] for place in texts])
        return memory, rows @ self._contrast

    def blame(self, memory: Any, place: Place) -> tuple[str, ...]:
        """The model: a reward that is not finite is its fault."""
        return (self.name,)

    def keep(self, memory: Any, parents: np.ndarray, rows: np.ndarray) -> Any:
        return None if memory is None else keep_rows(memory, parents, rows)

    @property
    def _contrast(self) -> np.ndarray:
        return contrast(label_names(self.model), self.label)

    def _classify(self, model: Classifier, candidates: Sequence[Candidate]) -> np.ndarray:
        limit = model.config.max_positions
        # Without a template of its own, an encoder reads plain text.
        is_plain = self.template.name in ("auto", "none")
        render = plain if is_plain else self.template.render
        texts = [render(c.conversation) + c.response for c in candidates]
        rows = self.template.tokenizer(texts, verbose=False)["input_ids"]
        # The response decides, so what does not fit is left out at the prompt's start.
        rows = [row if len(row) <= limit else [row[0], *row[1 - limit :]] for row in rows]
        width = min(limit, power_of_two(max(map(len, rows)), 32))
        filled = [*rows, *[rows[0]] * (power_of_two(len(rows), 8) - len(rows))]
        tokens, mask = pad_rows(filled, width, model.config.pad_id)
        logits = to_host(_classify(model, tokens, mask))[: len(rows)]
        return logits @ self._contrast


def encode_candidates(
    template: Template, candidates: Sequence[Candidate], *, scores_end: bool = True
) -> dict[Place, list[int]]:
    """Encode each candidate's prompt and response together, with an EOS behind finished ones.

    Returns:
        Token ids by slot and row.

    Raises:
        InputError: Where an EOS is to be scored and the template's tokenizer has none.
    """
    if scores_end and template.eos_id is None:
        raise InputError(
            f"{template.where}: the tokenizer has no EOS token, which is scored where a response "
            "ends; name one in its tokenizer_config.json"
        )
    end = [] if template.eos_id is None else [template.eos_id]
    grouped: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        grouped.setdefault(candidate.slot, []).append(candidate)
    encoded: dict[Place, list[int]] = {}
    for some in grouped.values():
        responses = [candidate.response for candidate in some]
        rows = template.encode_responses(some[0].conversation, responses)
        for candidate, tokens in zip(some, rows, strict=True):
            encoded[candidate.slot, candidate.row] = tokens + end * candidate.finished
    return {(c.slot, c.row): encoded[c.slot, c.row] for c in candidates}


_classify = jax.jit(lambda model, tokens, mask: model(tokens, mask))
