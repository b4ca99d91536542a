"""What an engine says: of its jobs, by a way that reaches the event loop, and of itself in numbers.

Choices, and the text of responses that still grow; numbers are Prometheus'.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from os.path import commonprefix
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from w2s_jax.search.likelihood import ScoredResponse
from w2s_jax.search.results import Hypothesis, SearchResult
from w2s_jax.serve.jobs import Job
from w2s_jax.serve.schema import ApiError
from w2s_jax.text.prompts import INCOMPLETE, response_end

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True)
class Choice:
    """A response.

    Attributes:
        text: What it says.
        tokens: Its token ids, an EOS included.
        ended_by: "eos", "stop" (the string `stop`) or "length".
        score: What the search chose by, None where it did not choose.
        scored: Likelihoods of `tokens`, behind those of the prompt's tokens but the first where the
            prompt is echoed.
        stop: The stop string that ended it.
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

    Made on the event loop's thread; `put` and `cancel` may be called from any.

    Attributes:
        is_cancelled: Whether nobody waits for events any more.
    """

    def __init__(self) -> None:
        self.is_cancelled = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    async def next(self) -> Event:
        """The next event of any of the jobs."""
        return await self._events.get()

    def put(self, event: Event) -> None:
        """Hand an event to whoever waits; without effect once the event loop has closed."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:
            self.cancel()

    def cancel(self) -> None:
        """Give up all of the jobs that are not done; slots are freed after the current chunk."""
        self.is_cancelled = True


class Metrics:
    """Counters and histograms of one server, in a registry of their own; for any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        seconds = partial(Histogram, buckets=_SECONDS, registry=self.registry)
        self.requests = counter(
            "w2s_requests", "Requests by endpoint and HTTP status", ("endpoint", "status")
        )
        self.seconds = seconds(
            "w2s_request_seconds", "Seconds from request to the end of its answer", ("endpoint",)
        )
        self.first_seconds = seconds(
            "w2s_first_chunk_seconds", "Seconds from a prompt's arrival to its first chunk"
        )
        self.waiting_seconds = seconds(
            "w2s_queue_seconds", "Seconds that a prompt waited for a slot"
        )
        self.chunk_seconds = seconds(
            "w2s_chunk_seconds", "Seconds of one chunk for all slots of a program", ("method",)
        )
        self.queue = gauge("w2s_queue_depth", "Prompts that wait for a slot")
        self.slots = gauge("w2s_slots_in_use", "Prompts in slots")
        self.programs = gauge("w2s_programs", "Compiled searches with memory on the device")
        self.prompt_tokens = counter("w2s_prompt_tokens", "Prompt tokens read")
        self.tokens = counter("w2s_tokens_generated", "Tokens of the responses that were returned")
        self.cancelled = counter(
            "w2s_cancelled", "Prompts whose client went away, or that shutting down cut off"
        )


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
    """Of each choice of a job that runs, the text that will not change any more."""
    texts = []
    for hypothesis in result.hypotheses:
        text, _ = _text(tokenizer, job, hypothesis)
        texts.append(text if hypothesis.finished else settled(text, job.request.stop))
    # Of several samples any may be chosen in the end.
    return (shared(texts),) * job.choices if job.chooses else tuple(texts)


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
    return commonprefix(texts)  # noqa: RUF071


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
