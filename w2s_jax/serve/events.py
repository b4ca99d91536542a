"""What an engine says of the jobs it was given, and the way it reaches the event loop."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from w2s_jax.search.likelihood import ScoredResponse
from w2s_jax.serve.errors import ApiError
from w2s_jax.serve.jobs import Job


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
