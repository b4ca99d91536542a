"""Scorers of texts that read with models: a guide of any vocabulary, a reward model.

How a model reads no token twice is in `incremental_text.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from w2s_jax.distributed import to_host
from w2s_jax.errors import InputError
from w2s_jax.models.encoder import Classifier
from w2s_jax.models.model import Model
from w2s_jax.models.reward import RewardModel, contrast, label_names
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
from w2s_jax.search.scorers import Candidate
from w2s_jax.text.chat import Template
from w2s_jax.text.prompts import Conversation, decode_tokens, plain, token_texts
from w2s_jax.text.tokenizer import pad_rows, power_of_two


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
            if getattr(self, name).model is not model:
                object.__setattr__(self, name, replace(getattr(self, name), model=model))

    @property
    def members(self) -> tuple[TextModel, TextModel]:
        return (self.tuned, self.untuned)

    def start(
        self, slots: int, hypotheses: int, successors: int, chunk_length: int
    ) -> tuple[Reading, ...]:
        return (start_reading(slots, hypotheses, successors, chunk_length),) * 2

    def insert(
        self, memory: tuple[Reading, ...], slot: int, conversation: Conversation
    ) -> tuple[Reading, ...]:
        return tuple(
            insert_text(reading, slot, member.template.encode(conversation))
            for reading, member in zip(memory, self.members, strict=True)
        )

    def score(
        self, memory: tuple[Reading, ...], candidates: Sequence[Candidate]
    ) -> tuple[tuple[Reading, ...], np.ndarray]:
        texts = encode_candidates(self.tuned.template, candidates)
        others = texts
        if self.untuned.template != self.tuned.template:
            others = encode_candidates(self.untuned.template, candidates)
        tuned, ups = read_logprobs(self.tuned.model, memory[0], texts)
        untuned, downs = read_logprobs(self.untuned.model, memory[1], others)
        ratios = [ups[place] - downs[place] for place in texts]
        return (tuned, untuned), np.asarray(ratios, np.float32)

    def blame(self, memory: tuple[Reading, ...], place: Place) -> tuple[str, ...]:
        """The models whose logits were no distribution for a row of the last `score`."""
        pairs = zip(self.members, memory, ("tuned model", "untuned model"), strict=True)
        return tuple(m.name or usual for m, read, usual in pairs if place in read.unsound)

    def keep(
        self, memory: tuple[Reading, ...], parents: np.ndarray, rows: np.ndarray
    ) -> tuple[Reading, ...]:
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

    Raises InputError where an EOS is to be scored and the template's tokenizer has none.
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
