"""An engine's records of its jobs, the events it sends, and log-probs of the jobs' choices.

Events reach the event loop through tickets; metrics are Prometheus'. New programs are compiled on a
thread of their own, one after another, while the engine runs.
"""

import asyncio
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from w2s_jax.errors import RowsFailed
from w2s_jax.search.likelihood import (
    Response,
    ScoredResponse,
    Shape,
    compile_scores,
    padded_shape,
    score_responses,
)
from w2s_jax.search.methods import Proposer
from w2s_jax.search.models import SearchModels
from w2s_jax.search.session import Session
from w2s_jax.serve.answers import Choice
from w2s_jax.serve.jobs import Job, Program
from w2s_jax.serve.schema import MOST_TOP_LOGPROBS, ApiError

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True)
class Progress:
    """The settled text of each choice of a job so far; it is never retracted."""

    job: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Done:
    """All choices of a job, the best first if the search chose."""

    job: int
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Failed:
    """A job that will not be answered."""

    job: int
    error: ApiError


Event = Progress | Done | Failed


class Ticket:
    """The jobs of one request in progress: events out, cancellation in.

    Created on the event loop's thread; `put` and `cancel` may be called from any thread.

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
        """Deliver an event; has no effect once the event loop has closed."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:
            self.cancel()

    def cancel(self) -> None:
        """Give up all unfinished jobs; slots are freed after the current chunk."""
        self.is_cancelled = True


class Metrics:
    """Counters and histograms of one server, in a registry of their own; thread-safe."""

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


class Compiler:
    """Runs work that compiles on threads of its own.

    Programs that were compiled before are ready in almost no time, and never wait for new ones.

    Args:
        on_end: Called on any thread after each piece of work.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end = on_end
        self._pools = {
            known: ThreadPoolExecutor(1, thread_name_prefix="w2s-compiler")
            for known in (False, True)
        }
        self._under_way: set[Future[Any]] = set()

    @property
    def is_busy(self) -> bool:
        """Whether any work has not ended."""
        return bool(self._under_way)

    def ask(self, work: Callable[..., Any], *args: Any, known: bool = False) -> Future[Any]:
        """A future of `work`; `known` says that its program was compiled before."""
        future = self._pools[known].submit(work, *args)
        self._under_way.add(future)
        future.add_done_callback(self._end)
        return future

    def close(self) -> None:
        """Accept no more work, and drop what has not started."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def _end(self, future: Future[Any]) -> None:
        self._under_way.discard(future)
        self._on_end()


Kind = tuple[Proposer, Shape]
"""(proposer, shape of what is scored); tasks of one kind are scored by one program."""


@dataclass(eq=False)
class Task:
    """A job in progress, as the engine's thread records it.

    Attributes:
        job: The job.
        ticket: Who waits for it; None for a job of the warm-up.
        index: Its index in the request.
        arrived: Time of arrival, by the monotonic clock.
        has_slot: Whether it has left the queue.
        has_text: Whether any of its text was sent.
        is_suspect: Whether it ran in a session that failed, and must run alone.
        found: Its choices, which wait for likelihoods.
        end: Its last event, once it is over.
    """

    job: Job
    ticket: Ticket | None
    index: int = 0
    arrived: float = field(default_factory=time.monotonic)
    has_slot: bool = False
    has_text: bool = False
    is_suspect: bool = False
    found: tuple[Choice, ...] = ()
    end: Done | Failed | None = None

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.ticket is not None and self.ticket.is_cancelled

    @property
    def rows(self) -> list[Response | None]:
        """What to score of each choice, including an echoed prompt; None for no tokens."""
        request, prompts = self.job.request, self.job.request.prompts
        echoed: tuple[int, ...] = ()
        beta = None if request.beta is None else float(request.beta)
        if self.job.echo is not None:
            prompts, echoed = (prompts[0][:1],), prompts[0][1:]
        tokens = [(*echoed, *choice.tokens) for choice in self.found]
        return [Response(prompts, own, beta) if own else None for own in tokens]

    @property
    def responses(self) -> list[Response]:
        """The rows that have tokens."""
        return [row for row in self.rows if row]

    @property
    def kind(self) -> Kind:
        """The proposer of the responses, and their shape; a beta comes with each response."""
        return self.job.program.config.proposer, padded_shape(self.responses)

    def tell(self, event: Event) -> None:
        """Send an event to the client, if it is still there."""
        if isinstance(event, Done | Failed):
            self.end = event
        if self.ticket is not None and not self.is_cancelled:
            self.ticket.put(event)


@dataclass(eq=False)
class Group:
    """The jobs of one program.

    Attributes:
        program: The program.
        waiting: Tasks without a slot.
        running: Tasks by slot of the session.
        session: None while the group has no memory on the device.
        future: The session that is being compiled, until it is taken.
        seated: When the session was asked for, by the monotonic clock.
        is_leaving: Whether it accepts no more tasks, so that another group may have its memory.
    """

    program: Program
    waiting: deque[Task] = field(default_factory=deque)
    running: dict[int, Task] = field(default_factory=dict)
    session: Session | None = None
    future: Future[Session] | None = None
    seated: float = 0.0
    is_leaving: bool = False

    @property
    def open_session(self) -> Session:
        """The session of a group that has one."""
        assert self.session is not None
        return self.session

    @property
    def has_work(self) -> bool:
        """Whether any of its jobs is not over."""
        return bool(self.waiting or self.running)

    @property
    def is_compiling(self) -> bool:
        """Whether its session is being compiled."""
        return self.future is not None and not self.future.done()

    @property
    def has_seat(self) -> bool:
        """Whether it has memory on the device, or is about to."""
        return self.session is not None or self.future is not None

    @property
    def may_add(self) -> bool:
        """Whether the first waiting task may run beside those that run: suspects run alone."""
        together = [*self.running.values(), *list(self.waiting)[:1]]
        return len(together) == 1 or not any(task.is_suspect for task in together)


class Likelihoods:
    """Scores tasks in batches of one kind, with one program per kind.

    Args:
        models: The models that the proposers read.
        rows: Number of choices that are scored together.
        compiler: Compiles the programs.
    """

    def __init__(self, models: SearchModels, rows: int, compiler: Compiler) -> None:
        self._models, self._rows, self._compiler = models, rows, compiler
        self._top = min(MOST_TOP_LOGPROBS, models.vocabulary)
        self._programs: dict[Kind, Future[None]] = {}

    def ready(self, waiting: Iterable[Task]) -> list[Task]:
        """Tasks to score together: those of a kind that waited longest and whose program is ready.

        Programs of other kinds are requested. Empty if all wait for their programs.
        """
        by_kind: dict[Kind, list[Task]] = {}
        for task in waiting:
            by_kind.setdefault(task.kind, []).append(task)
        for kind, tasks in by_kind.items():
            if kind not in self._programs:
                given = (self._models, kind[0], tasks[0].responses)
                work = partial(compile_scores, *given, top=self._top, batch_size=self._rows)
                self._programs[kind] = self._compiler.ask(work)
            elif self._programs[kind].done():
                # The first tasks that fit in one batch, at least one.
                rows = list(accumulate(len(task.responses) for task in tasks))
                return tasks[: max(1, bisect_right(rows, self._rows))]
        return []

    def score(self, tasks: Sequence[Task]) -> list[tuple[Choice, ...] | ApiError]:
        """The choices of tasks of one kind, with log-probs; ApiError 500 where a model fails."""
        proposer, shape = tasks[0].kind
        given = (self._models, proposer, [one for task in tasks for one in task.responses])
        settings: dict[str, Any] = {"top": self._top, "batch_size": self._rows, "shape": shape}
        found: Sequence[ScoredResponse | None]
        try:
            found = score_responses(*given, **settings)
        except RowsFailed as error:
            found = error.results
        scores = iter(found)
        outcomes: list[tuple[Choice, ...] | ApiError] = []
        for task in tasks:
            rows = task.rows
            scored = [next(scores) if row else None for row in rows]
            if scored.count(None) > rows.count(None):
                told = "a log-prob is not a number; a model's weights may be damaged, or overflow"
                outcomes.append(ApiError(500, f"{told} in this dtype", code="not_finite"))
                continue
            pairs = zip(task.found, scored, strict=True)
            outcomes.append(tuple(replace(choice, scored=own) for choice, own in pairs))
        return outcomes

    def forget(self) -> None:
        """Drop the programs, to be compiled anew."""
        self._programs.clear()
