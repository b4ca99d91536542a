"""Scorers of texts, which the host asks between steps: Python functions, guides, reward models.

A scorer is given whole responses as texts. Guides of other vocabularies and reward models read them
with `incremental_text.py`, no token twice. Scorers on tokens are in `methods.py`.
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

Readings = tuple[Reading, ...]
"""What a guide's tuned and untuned model remember."""

_NOT_FINITE = "gave a score that is not a finite number"


@dataclass(frozen=True)
class Candidate:
    """A response, whole so far, that may be kept.

    row (0 .. R − 1) of a slot continues hypothesis parent = row // K. finished: it ended by EOS,
    which is scored behind it.
    """

    slot: int
    row: int
    parent: int
    conversation: Conversation
    response: str
    finished: bool


@runtime_checkable
class TextScorer(Protocol):
    """Values whole responses as texts. A frozen value; what it remembers goes in and comes out.

    The score of a hypothesis gains weight · score. What was scored before and kept is told by
    `keep`, so that a scorer may read only what is new. Where a score is not finite, `blame` (which
    a scorer may lack) tells which of its models is at fault. What a subclass does not say is as of
    a scorer that remembers nothing.
    """

    @property
    def weight(self) -> float | int:
        """What scores are multiplied by."""

    def start(self, slots: int, hypotheses: int, successors: int, chunk_length: int) -> Any:
        """An empty memory for so many slots, hypotheses W, successors K and tokens L of a chunk."""
        return None

    def insert(self, memory: Any, slot: int, conversation: Conversation) -> Any:
        """The memory once a slot holds a new prompt."""
        return memory

    def score(self, memory: Any, candidates: Sequence[Candidate]) -> tuple[Any, np.ndarray]:
        """The memory with these read, and a float32 score, unweighted, of each."""

    def keep(self, memory: Any, parents: np.ndarray, rows: np.ndarray) -> Any:
        """The memory of the kept hypotheses, int [P, W]: of which old one, and of which row."""
        return memory


def at_fault(
    scorer: TextScorer, memory: Any, candidates: Sequence[Candidate], scores: np.ndarray
) -> dict[int, tuple[str, ...]]:
    """Slots with a score that is not finite as models failed, and their names.

    memory: what `score` gave with the scores. A scorer may say `blame(memory, (slot, row))`: the
    names of its models whose logits were NaN or infinite, none where a token's probability is 0.
    One that does not is itself at fault.
    """
    usual = (f"{SCORER}{type(scorer).__name__} {_NOT_FINITE}",)
    blame = getattr(scorer, "blame", lambda memory, place: usual)
    failed: dict[int, tuple[str, ...]] = {}
    for index in np.flatnonzero(~np.isfinite(scores)).tolist():
        one = candidates[index]
        names = blame(memory, (one.slot, one.row))
        failed |= {one.slot: names} if names else {}
    return failed


@dataclass(frozen=True)
class FunctionScorer(TextScorer):
    """Any function of (prompts, responses) to numbers, called once a chunk with all candidates.

    A prompt is its bare text, or the content of its only message, or its messages as lines. Where
    the function raises it is called for each prompt alone: prompts at which it raises again, and
    those with a number that is not finite, fail, and the others go on. Raises InputError where it
    raises for all of several prompts, and for what is not one number for each response.
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
        """The errors by slot, and the scores, NaN where there is one.

        Called on the first of several hosts alone, as it need not say the same twice.
        """
        like = np.zeros(len(candidates), np.float32)
        raised: dict[int, str] = {}
        scores = from_first(lambda: self._scores(candidates, raised), like)
        if not np.isfinite(scores).all():
            first, *_ = gather_values(list(raised.items()))
            raised = dict(first)
        return raised, scores

    def blame(self, memory: dict[int, str], place: tuple[int, int]) -> tuple[str, ...]:
        """The function, and what it did."""
        error = memory.get(place[0])
        did = _NOT_FINITE if error is None else f"raised {error}"
        return (f"{SCORER}{self._name} {did}",)

    @property
    def _name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def _scores(self, candidates: Sequence[Candidate], raised: dict[int, str]) -> np.ndarray:
        """The scores, those of each slot alone where all together raise; errors go to `raised`."""
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
    """An error's kind, and the beginning of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:80]}" if lines else type(error).__name__


@dataclass(frozen=True)
class TextModel:
    """A model, the template behind which it reads conversations, and its name in messages."""

    model: Model
    template: Template
    name: str = ""


@dataclass(frozen=True)
class TextLogRatio:
    """The implicit reward log p_tuned(y|x) − log p_untuned(y|x) of a response as text.

    For guides whose vocabulary, or template, is not the policy's: the response is encoded anew
    behind each model's own template; the token prefix in common with the prompt is not scored; EOS
    is, where the response ended by it. arXiv 2405.19262 eq. 5 and appendix B.
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

    def token_ratios(
        self, conversation: Conversation, response: str, *, finished: bool
    ) -> list[tuple[str, float]]:
        """Each token of a response as the guide reads it, and its weighted log-ratio.

        Nothing where tuned and untuned model do not encode alike, so that their tokens differ.
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
) -> list[tuple[str, float]]:
    """Each token of a response with what the first guide on texts adds, in its own tokens."""
    for scorer in scorers:
        if isinstance(scorer, TextLogRatio):
            return scorer.token_ratios(conversation, response, finished=finished)
    return []


@dataclass(frozen=True)
class RewardScorer:
    """A reward or value model's reward of prompt and response, whole or not.

    A decoder reads only what is new and its head the last token's state; an encoder reads whole
    texts (without a template, prompt and response as they stand). Of one label the logit is the
    reward; of two, the second minus the first; of more, the one chosen by `label`. Chunk-level
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
    """Token ids of each candidate's prompt and response, encoded together, EOS behind what ended.

    Raises:
        InputError: where an EOS is to be scored and the template's tokenizer has none.
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
