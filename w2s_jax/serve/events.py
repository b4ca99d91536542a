"""What an engine says of its jobs, and the way it reaches the event loop.

Choices, the text of responses that still grow and of single tokens.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol, runtime_checkable

from w2s_jax.search.likelihood import ScoredResponse
from w2s_jax.search.results import Hypothesis, SearchResult
from w2s_jax.serve.jobs import Job
from w2s_jax.serve.schema import ApiError
from w2s_jax.text.prompts import INCOMPLETE, decode_tokens, response_end

_WINDOW = 8


def settled(text: str, stop: Sequence[str]) -> str:
    """The head of a growing text that further tokens cannot change.

    Left out are a character whose bytes are not all there, which decodes to U+FFFD until they are,
    and an end that may be the beginning of a stop string.
    """
    text = text.rstrip(INCOMPLETE)
    longest = max(map(len, stop), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(one.startswith(text[start:]) for one in stop):
            return text[:start]
    return text


def shared(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    shortest, longest = min(texts), max(texts)
    for index, character in enumerate(shortest):
        if longest[index] != character:
            return shortest[:index]
    return shortest


class TokenTexts:
    """Token ids one by one as text: their strings, and where each begins in the whole."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.of = lru_cache(maxsize=1 << 16)(self._of)
        self._alone: Callable[[Sequence[int]], str] = partial(
            tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        encoded = tokenizer("a", add_special_tokens=False).input_ids
        self._anchor = list(encoded[-1:])

    def _of(self, token: int) -> str:
        r"""A token's own text, its leading space included; "bytes:\xe2" for half a character."""
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
        """Where each token's text begins in the text of all, in characters."""
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
    """The bytes that the characters of byte-level BPE stand for; arXiv 1909 (GPT-2)'s alphabet."""
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


@dataclass(frozen=True)
class Choice:
    """A response. ended_by: "eos", "stop" (the string `stop`) or "length".

    score: what the search chose by, None where it did not choose. scored: likelihoods of `tokens`,
    behind those of the prompt's tokens but the first where the prompt is echoed.
    """

    text: str
    tokens: tuple[int, ...]
    ended_by: str
    score: float | None = None
    scored: ScoredResponse | None = None
    stop: str | None = None


@dataclass(frozen=True)
class Progress:
    """The settled text of each choice of a job so far; never retracted."""

    job: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Done:
    """All choices of a job, best first where the search chose."""

    job: int
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Failed:
    """A job that will not be answered."""

    job: int
    error: ApiError


Event = Progress | Done | Failed


class Ticket:
    """The jobs of one request under way: events out, cancellation in.

    Made on the event loop's thread; `put` may be called from any.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._cancelled = threading.Event()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for events any more."""
        return self._cancelled.is_set()

    async def next(self) -> Event:
        """The next event of any of the jobs."""
        return await self._events.get()

    def put(self, event: Event) -> None:
        """Hand an event to whoever waits; without effect once the event loop has closed."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:
            self._cancelled.set()

    def cancel(self) -> None:
        """Give up all of the jobs that are not done; slots are freed after the current chunk."""
        self._cancelled.set()


@runtime_checkable
class Answers(Protocol):
    """What the endpoints need of an engine."""

    @property
    def state(self) -> str:
        """One of "starting", "ready", "draining", "stopped" and "failed"."""

    def submit(self, jobs: Sequence[Job]) -> Ticket:
        """Take on all jobs or none; ApiError 429 where the queue is full, 503 when ending."""


def choices_of(tokenizer: Any, job: Job, result: SearchResult) -> tuple[Choice, ...]:
    """The choices of a job whose search has ended."""

    def choice(hypothesis: Hypothesis) -> Choice:
        ended_by = "length"
        if hypothesis.finished:
            is_eos = bool(hypothesis.tokens) and hypothesis.tokens[-1] in job.ends
            ended_by = "eos" if is_eos else "stop"
        text, stop = _text(tokenizer, job, hypothesis)
        score = hypothesis.score if job.chooses else None
        return Choice(text, hypothesis.tokens, ended_by, score, stop=stop)

    return tuple(choice(hypothesis) for hypothesis in result.hypotheses[: job.choices])


def settled_texts(tokenizer: Any, job: Job, result: SearchResult) -> tuple[str, ...]:
    """Of each choice of a job that runs, the text that will not change any more."""
    texts = []
    for hypothesis in result.hypotheses:
        text, _ = _text(tokenizer, job, hypothesis)
        texts.append(text if hypothesis.finished else settled(text, job.request.stop))
    return (shared(texts),) * job.choices if job.chooses else tuple(texts)


def _text(tokenizer: Any, job: Job, hypothesis: Hypothesis) -> tuple[str, str | None]:
    """A hypothesis' text and the stop string that ended it."""
    return response_end(
        tokenizer,
        job.prompt,
        hypothesis.tokens,
        finished=hypothesis.finished,
        stop=job.request.stop,
        behind=hypothesis.behind,
        eos_ids=job.ends,
    )
