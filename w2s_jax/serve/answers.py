"""Choices as the JSON objects of OpenAI's API, whole and in the pieces of a stream."""

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from w2s_jax.search.likelihood import ScoredResponse
from w2s_jax.serve.events import Choice, TokenTexts, token_bytes
from w2s_jax.serve.jobs import Job

Json = dict[str, Any]
LEAST_LOGPROB = -9999.0
"""What stands for −inf, which JSON does not know, as in OpenAI's API."""
_FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Writer:
    """Writes the answers to one request.

    chat: which of the two endpoints. model: the served name.
    """

    chat: bool
    model: str
    id: str
    created: int
    tokens: TokenTexts

    def whole(self, jobs: Sequence[Job], answers: Sequence[Sequence[Choice]]) -> Json:
        """The answer to a request that does not stream: a choice for every prompt and response."""
        choices = [
            self._choice(place + index, job, choice)
            for place, job, answer in _placed(jobs, answers)
            for index, choice in enumerate(answer)
        ]
        return self._head(stream=False) | {"choices": choices, "usage": usage(jobs, answers)}

    def opening(self, index: int) -> Json | None:
        """What a stream says of a choice before its first text."""
        if not self.chat:
            return None
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, index: int, text: str) -> Json:
        """More text of a choice."""
        return self._chunk(index, self._text(text, "delta"), None)

    def end(self, index: int, job: Job, choice: Choice, text: str) -> Json:
        """The last of a choice: the rest of its text, why it ended, and its log-probs."""
        body = self._text(text, "delta") if text or not self.chat else {"delta": {}}
        return self._chunk(index, body | self._extra(job, choice), _FINISH[choice.ended_by])

    def closing(self, jobs: Sequence[Job], answers: Sequence[Sequence[Choice]]) -> Json:
        """The numbers of tokens, after all choices of a stream."""
        return self._head(stream=True) | {"choices": [], "usage": usage(jobs, answers)}

    def _head(self, *, stream: bool) -> Json:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if stream else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, index: int, body: Json, finish: str | None) -> Json:
        choice = {"index": index, "logprobs": None, **body, "finish_reason": finish}
        return self._head(stream=True) | {"choices": [choice]}

    def _text(self, text: str, field: str) -> Json:
        if not self.chat:
            return {"text": text}
        if field == "delta":
            return {"delta": {"content": text}}
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _choice(self, index: int, job: Job, choice: Choice) -> Json:
        body = self._text((job.echo or "") + choice.text, "message")
        ends = {"finish_reason": _FINISH[choice.ended_by]}
        return {"index": index, "logprobs": None, **body, **ends, **self._extra(job, choice)}

    def _extra(self, job: Job, choice: Choice) -> Json:
        """Log-probs, and what OpenAI's API does not have: score, stop_reason, token ids.

        As in vLLM stop_reason is the stop string that ended the choice, and null where an EOS did,
        which a special token given as a stop string is.
        """
        extra: Json = {"stop_reason": choice.stop}
        if choice.score is not None:
            extra["score"] = choice.score
        if job.tells_ids:
            extra |= {"prompt_token_ids": job.prompt, "token_ids": choice.tokens}
        if job.logprobs is not None:
            extra["logprobs"] = self._logprobs(job, choice)
        return extra

    def _logprobs(self, job: Job, choice: Choice) -> Json:
        ids, scored = choice.tokens, choice.scored
        if job.echo is not None:
            ids = (*job.prompt, *ids)
        rows = list(_rows(ids, scored, first=job.echo is not None, top=job.logprobs or 0))
        if self.chat:
            return {"content": [self._chat_token(*row) for row in rows], "refusal": None}
        start = 0 if job.echo is not None else None
        texts = [self.tokens.of(token) for token in ids]
        return {
            "tokens": texts,
            "token_logprobs": [logprob for _, logprob, _ in rows],
            "top_logprobs": [self._top(*row) for row in rows],
            "text_offset": self._offsets(job, ids, start),
        }

    def _offsets(self, job: Job, ids: Sequence[int], start: int | None) -> list[int]:
        if start is not None:
            return self.tokens.offsets(ids)
        whole = self.tokens.offsets((*job.prompt, *ids))[len(job.prompt) :]
        return [offset - whole[0] for offset in whole] if whole else []

    def _top(self, token: int, logprob: float | None, top: list[tuple[int, float]]) -> Json | None:
        """Log-probs by text; of two tokens with one text, the likelier one's."""
        if logprob is None:
            return None
        named: dict[str, float] = {}
        for other, value in (*top, (token, logprob)):
            text = self.tokens.of(other)
            named[text] = max(value, named.get(text, value))
        return named

    def _chat_token(self, token: int, logprob: float | None, top: list[tuple[int, float]]) -> Json:
        return self._named(token, logprob or 0.0) | {
            "top_logprobs": [self._named(other, value) for other, value in top]
        }

    def _named(self, token: int, logprob: float) -> Json:
        text = self.tokens.of(token)
        return {"token": text, "logprob": logprob, "bytes": token_bytes(text)}


def writer(chat: bool, model: str, tokens: TokenTexts) -> Writer:
    """A writer for a new request."""
    kind = "chatcmpl" if chat else "cmpl"
    return Writer(chat, model, f"{kind}-{uuid.uuid4().hex}", int(time.time()), tokens)


def usage(jobs: Sequence[Job], answers: Sequence[Sequence[Choice]]) -> Json:
    """Tokens of the prompts, each once, and of the responses that are returned."""
    read = sum(len(job.prompt) for job in jobs)
    written = sum(len(choice.tokens) for answer in answers for choice in answer)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _placed(
    jobs: Sequence[Job], answers: Sequence[Sequence[Choice]]
) -> Iterable[tuple[int, Job, Sequence[Choice]]]:
    """Jobs and answers with the index of their first choice: a prompt's choices are together."""
    place = 0
    for job, answer in zip(jobs, answers, strict=True):
        yield place, job, answer
        place += job.choices


def _rows(
    ids: Sequence[int], scored: ScoredResponse | None, *, first: bool, top: int
) -> Iterable[tuple[int, float | None, list[tuple[int, float]]]]:
    """(token, log-prob, likeliest tokens) of each; None for the first of an echoed prompt."""
    ids = list(ids)
    if first and ids:
        yield ids.pop(0), None, []
    for place, token in enumerate(ids):
        assert scored is not None
        ids_and_values = zip(
            scored.top_ids[place, :top].tolist(),
            scored.top_logprobs[place, :top].tolist(),
            strict=True,
        )
        best = [(other, max(value, LEAST_LOGPROB)) for other, value in ids_and_values]
        yield token, max(float(scored.logprobs[place]), LEAST_LOGPROB), best
