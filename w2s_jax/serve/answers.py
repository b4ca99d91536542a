"""Answers: the choices that a search has found, and OpenAI's JSON of them, complete or streamed."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from os.path import commonprefix
from typing import Any

import numpy as np

from w2s_jax.search.likelihood import ScoredResponse
from w2s_jax.search.results import Hypothesis, SearchResult
from w2s_jax.serve.jobs import Job
from w2s_jax.text.prompts import INCOMPLETE, decode_tokens, response_end

Json = dict[str, Any]
LEAST_LOGPROB = -9999.0
"""Stands for −inf, which JSON does not have, as in OpenAI's API."""
_FINISH = {"eos": "stop", "stop": "stop", "length": "length"}
_WINDOW = 8


@dataclass(frozen=True)
class Choice:
    """A response.

    Attributes:
        text: Its text.
        tokens: Its token ids, including an EOS.
        ended_by: "eos", "stop" (the string `stop`) or "length".
        score: The score by which the search chose; None if it did not choose.
        scored: Likelihoods of `tokens`, after those of the prompt's tokens except the first if the
            prompt is echoed.
        stop: The stop string that ended it.
    """

    text: str
    tokens: tuple[int, ...]
    ended_by: str
    score: float | None = None
    scored: ScoredResponse | None = None
    stop: str | None = None


def choices_of(tokenizer: Any, job: Job, result: SearchResult) -> tuple[Choice, ...]:
    """The choices of a job whose search has ended."""

    def choice(hypothesis: Hypothesis) -> Choice:
        text, stop = _text(tokenizer, job, hypothesis)
        ended_by = "length"
        if hypothesis.finished:
            ended_by = "eos" if {*hypothesis.tokens[-1:]} & {*job.ends} else "stop"
        score = hypothesis.score if job.chooses else None
        return Choice(text, hypothesis.tokens, ended_by, score, stop=stop)

    return tuple(choice(hypothesis) for hypothesis in result.hypotheses[: job.choices])


def settled_texts(tokenizer: Any, job: Job, result: SearchResult) -> tuple[str, ...]:
    """The text of each choice of a running job that will not change any more."""
    texts = []
    for hypothesis in result.hypotheses:
        text, _ = _text(tokenizer, job, hypothesis)
        texts.append(text if hypothesis.finished else settled(text, job.request.stop))
    # Any of the samples may be chosen in the end.
    return (shared(texts),) * job.choices if job.chooses else tuple(texts)


def settled(text: str, stop: Sequence[str]) -> str:
    """The beginning of a growing text that further tokens cannot change.

    An incomplete character is left out, which decodes to U+FFFD until all its bytes are there, and
    so is an end that may be the beginning of a stop string.
    """
    text = text.rstrip(INCOMPLETE)
    longest = max(map(len, stop), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(one.startswith(text[start:]) for one in stop):
            return text[:start]
    return text


def shared(texts: Sequence[str]) -> str:
    """The common beginning of all texts."""
    return commonprefix(texts)  # noqa: RUF071


def _text(tokenizer: Any, job: Job, hypothesis: Hypothesis) -> tuple[str, str | None]:
    """A hypothesis' text, and the stop string that ended it."""
    return response_end(
        tokenizer,
        job.prompt,
        hypothesis.tokens,
        finished=hypothesis.finished,
        stop=job.request.stop,
        behind=hypothesis.behind,
        eos_ids=job.ends,
    )


class TokenTexts:
    """The text of single tokens, and where each begins in a whole text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.of = lru_cache(maxsize=1 << 16)(self._of)
        self._alone: Callable[[Sequence[int]], str] = partial(
            tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        encoded = tokenizer("a", add_special_tokens=False).input_ids
        self._anchor = list(encoded[-1:])

    def _of(self, token: int) -> str:
        r"""A token's own text with its leading space; "bytes:\xe2" for part of a character."""
        before, whole = self._alone(self._anchor), self._alone([*self._anchor, token])
        text = whole.removeprefix(before) if whole.startswith(before) else self._alone([token])
        if INCOMPLETE not in text:
            return text
        name = str(self.tokenizer.convert_ids_to_tokens(token))
        if name.startswith("<0x"):
            return f"bytes:\\x{name[3:5].lower()}"
        known = _byte_values()
        if all(character in known for character in name):
            return "bytes:" + "".join(f"\\x{known[character]:02x}" for character in name)
        return text

    def offsets(self, tokens: Sequence[int]) -> list[int]:
        """Position in characters of each token's text in the text of all."""
        decode = partial(decode_tokens, self.tokenizer)
        offsets, length, start = [], 0, 0
        for index in range(len(tokens)):
            offsets.append(length)
            before, now = decode(tokens[start:index]), decode(tokens[start : index + 1])
            if now.endswith(INCOMPLETE):
                continue
            length += max(0, len(now) - len(before.rstrip(INCOMPLETE)))
            start = max(start, index + 1 - _WINDOW)
        return offsets


@lru_cache(maxsize=1)
def _byte_values() -> dict[str, int]:
    """The bytes by the characters that stand for them in GPT-2's byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


def token_bytes(text: str) -> list[int]:
    """The bytes of a token's text as `TokenTexts.of` writes it."""
    if text.startswith("bytes:\\x"):
        return [int(byte, 16) for byte in text.removeprefix("bytes:").split("\\x")[1:]]
    return list(text.encode())


class Writer:
    """Writes the answers to one request.

    Args:
        chat: Whether it is a chat request.
        model: The model's name in requests.
        tokens: The texts of tokens, for log-probs.
    """

    def __init__(self, chat: bool, model: str, tokens: TokenTexts) -> None:
        self.chat, self.tokens = chat, tokens
        self._head: Json = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, jobs: Sequence[Job], answers: Sequence[Sequence[Choice]]) -> Json:
        """The answer to a request without streaming: a choice for every prompt and response."""
        choices: list[Json] = []
        for job, answer in zip(jobs, answers, strict=True):
            for choice in answer:
                text = (job.echo or "") + choice.text
                message = {"role": "assistant", "content": text, "refusal": None}
                body: Json = {"message": message} if self.chat else {"text": text}
                told = _choice(len(choices), body, _FINISH[choice.ended_by])
                choices.append(told | self._extra(job, choice))
        return self._head | {"choices": choices, "usage": usage(jobs, answers)}

    def opening(self, index: int, job: Job) -> list[Json]:
        """Events of a choice before its first text: its role, an echo, or none."""
        role = [{"delta": {"role": "assistant", "content": ""}}] if self.chat else []
        echo = [self._delta(job.echo)] if job.echo else []
        return [self._chunk(_choice(index, body)) for body in (*role, *echo)]

    def piece(self, index: int, text: str) -> Json:
        """An event with more text of a choice."""
        return self._chunk(_choice(index, self._delta(text)))

    def end(self, index: int, job: Job, choice: Choice, text: str) -> Json:
        """The last event of a choice: the rest of its text, why it ended, and its log-probs."""
        body = self._delta(text) if text or not self.chat else {"delta": {}}
        last = _choice(index, body, _FINISH[choice.ended_by])
        return self._chunk(last | self._extra(job, choice))

    def closing(self, jobs: Sequence[Job], answers: Sequence[Sequence[Choice]]) -> Json:
        """The event with the token counts, after all choices of a stream."""
        return self._chunk() | {"usage": usage(jobs, answers)}

    def _chunk(self, *choices: Json) -> Json:
        kind = {"object": "chat.completion.chunk"} if self.chat else {}
        return self._head | kind | {"choices": list(choices)}

    def _delta(self, text: str) -> Json:
        return {"delta": {"content": text}} if self.chat else {"text": text}

    def _extra(self, job: Job, choice: Choice) -> Json:
        """Log-probs, and fields that OpenAI's API does not have: score, stop_reason, token ids.

        As in vLLM, stop_reason is the stop string that ended the choice, and null for an EOS, which
        includes special tokens that were given as stop strings.
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
        rows = _rows(job, choice)
        if self.chat:
            content = [
                self._named(token, logprob or 0.0)
                | {"top_logprobs": [self._named(*other) for other in top]}
                for token, logprob, top in rows
            ]
            return {"content": content, "refusal": None}
        first = 0 if job.echo is not None else len(job.prompt)
        offsets = self.tokens.offsets((*job.prompt, *choice.tokens))[first:]
        return {
            "tokens": [self.tokens.of(token) for token, _, _ in rows],
            "token_logprobs": [logprob for _, logprob, _ in rows],
            "top_logprobs": [self._top(*row) for row in rows],
            "text_offset": [offset - offsets[0] for offset in offsets],
        }

    def _top(self, token: int, logprob: float | None, top: list[tuple[int, float]]) -> Json | None:
        """Log-probs by text; of two tokens with the same text, that of the likelier one."""
        if logprob is None:
            return None
        named: dict[str, float] = {}
        for other, value in (*top, (token, logprob)):
            text = self.tokens.of(other)
            named[text] = max(value, named.get(text, value))
        return named

    def _named(self, token: int, logprob: float) -> Json:
        text = self.tokens.of(token)
        return {"token": text, "logprob": logprob, "bytes": token_bytes(text)}


def usage(jobs: Sequence[Job], answers: Sequence[Sequence[Choice]]) -> Json:
    """Token counts: of the prompts, each once, and of the responses that are returned."""
    read = sum(len(job.prompt) for job in jobs)
    written = sum(len(choice.tokens) for answer in answers for choice in answer)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _choice(index: int, body: Json, finish: str | None = None) -> Json:
    return {"index": index, "logprobs": None, **body, "finish_reason": finish}


def _rows(job: Job, choice: Choice) -> list[tuple[int, float | None, list[tuple[int, float]]]]:
    """(token, log-prob, likeliest tokens) of each; None for the first token of an echoed prompt."""
    rows: list[tuple[int, float | None, list[tuple[int, float]]]] = []
    tokens, scored = choice.tokens, choice.scored
    if job.echo is not None:
        rows.append((job.prompt[0], None, []))
        tokens = (*job.prompt[1:], *tokens)
    if not tokens:
        return rows
    assert scored is not None
    logprobs, values = (
        np.maximum(part, LEAST_LOGPROB).tolist() for part in (scored.logprobs, scored.top_logprobs)
    )
    for token, logprob, *best in zip(
        tokens, logprobs, scored.top_ids.tolist(), values, strict=True
    ):
        rows.append((token, logprob, list(zip(*best, strict=True))[: job.logprobs]))
    return rows
