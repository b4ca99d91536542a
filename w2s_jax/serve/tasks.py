"""What an engine's thread keeps of the jobs it has taken on, and the log-probs of their choices.

Which tokens are scored, and which jobs together; what is not compiled yet is compiled on a thread
of its own, one program after another, beside what the engine runs.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from w2s_jax.errors import RowsFailed
from w2s_jax.search.likelihood import (
    Response,
    ScoredResponse,
    Shape,
    compile_scores,
    padded_shape,
    score_responses,
)
from w2s_jax.search.models import SearchModels
from w2s_jax.search.proposers import EFTProposer, PolicyProposer, Proposer
from w2s_jax.search.session import Session
from w2s_jax.serve.events import Choice, Done, Event, Failed, Ticket
from w2s_jax.serve.jobs import Job, Program
from w2s_jax.serve.schema import MOST_TOP_LOGPROBS, ApiError, not_finite


class Compiler:
    """Does on threads of its own what compiles; `on_end` is called, on any thread, after each.

    What was compiled before takes no time to speak of, and never waits for what is new.
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
        """Whether anything is asked for that has not ended."""
        return bool(self._under_way)

    def ask(self, work: Callable[..., Any], *args: Any, known: bool = False) -> Future[Any]:
        """What `work` returns or raises, once it has its turn; known: it was compiled before."""
        future = self._pools[known].submit(work, *args)
        self._under_way.add(future)
        future.add_done_callback(self._end)
        return future

    def close(self) -> None:
        """Take nothing more on, and forget what has not begun."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def _end(self, future: Future[Any]) -> None:
        self._under_way.discard(future)
        self._on_end()


Kind = tuple[type, Shape]
"""A proposer and the shape of what is scored."""


def proposer_of(job: Job) -> Proposer:
    """What a job's responses were sampled from; its beta comes with each response."""
    return EFTProposer() if job.method == "eft" else PolicyProposer()


def responses_of(job: Job, choices: Sequence[Choice]) -> list[Response | None]:
    """What is to be scored of each choice, an echoed prompt included; None for no tokens."""
    request = job.request
    beta = None if request.beta is None else float(request.beta)
    rows: list[Response | None] = []
    for choice in choices:
        prompts, tokens = request.prompts, choice.tokens
        if job.echo is not None:
            tokens = (*prompts[0][1:], *tokens)
            prompts = (prompts[0][:1],)
        rows.append(Response(prompts, tokens, beta) if tokens else None)
    return rows


def kind_of(job: Job, choices: Sequence[Choice]) -> Kind:
    """Jobs of one kind are scored by one program; some choice must have tokens."""
    rows = [row for row in responses_of(job, choices) if row]
    return type(proposer_of(job)), padded_shape(rows)


@dataclass(eq=False)
class Task:
    """A job on its way: what the engine's thread remembers of it.

    is_suspect: it ran in a session that failed, and is tried alone. found: its choices, which wait
    for likelihoods.
    """

    job: Job
    ticket: Ticket
    index: int
    arrived: float = field(default_factory=time.monotonic)
    has_slot: bool = False
    has_text: bool = False
    is_suspect: bool = False
    found: tuple[Choice, ...] = ()

    @property
    def rows(self) -> list[Response | None]:
        """What is to be scored of each choice."""
        return responses_of(self.job, self.found)

    def tell(self, event: Event) -> None:
        """Say something to the client, if it is still there."""
        if not self.ticket.is_cancelled:
            self.ticket.put(event)


@dataclass(eq=False)
class Group:
    """The jobs of one program.

    session: None while the group has no memory on the device. future: the session that is being
    compiled, until it is taken.
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
    def is_compiling(self) -> bool:
        """Whether its session is on the way."""
        return self.future is not None and not self.future.done()

    @property
    def has_seat(self) -> bool:
        """Whether it has memory on the device, or is about to."""
        return self.session is not None or self.future is not None

    @property
    def is_lost(self) -> bool:
        """Whether the device's memory was given away to a call that then failed."""
        return self.open_session.state.base.is_deleted()

    @property
    def may_add(self) -> bool:
        """Whether the first that waits may run beside what runs: suspects run alone."""
        together = [*self.running.values(), self.waiting[0]]
        return len(together) == 1 or not any(task.is_suspect for task in together)


class Nobody(Ticket):
    """Whom the job of a warm-up is for; keeps what it failed with."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()
        self.error: ApiError | None = None
        self.is_over = False

    def put(self, event: Event) -> None:
        self.is_over |= isinstance(event, Done | Failed)
        if isinstance(event, Failed):
            self.error = event.error


Score = Callable[..., list[ScoredResponse]]


class Likelihoods:
    """Scores tasks in batches of one kind, each of which has a program of its own.

    rows: choices that are scored together. score: as `search.likelihood.score_responses`.
    """

    def __init__(
        self, models: SearchModels, rows: int, compiler: Compiler, score: Score = score_responses
    ) -> None:
        self._models, self._rows, self._compiler, self._score = models, rows, compiler, score
        self._top = min(MOST_TOP_LOGPROBS, models.vocabulary)
        self._programs: dict[Kind, Future[None]] = {}

    def ready(self, waiting: Iterable[Task]) -> list[Task]:
        """Tasks to be scored together, the longest-waiting that can be among them.

        The programs of others are asked for; none where all wait for theirs.
        """
        by_kind: dict[Kind, list[Task]] = {}
        for task in waiting:
            by_kind.setdefault(kind_of(task.job, task.found), []).append(task)
        for kind, tasks in by_kind.items():
            if kind not in self._programs:
                self._programs[kind] = self._compiler.ask(self._compile, tasks[0])
            elif self._programs[kind].done():
                return self._first(tasks)
        return []

    def score(self, tasks: Sequence[Task]) -> list[tuple[Choice, ...] | ApiError]:
        """The choices of tasks of one kind with log-probs; 500 for those that a model fails."""
        responses = [response for task in tasks for response in task.rows if response]
        found: Sequence[ScoredResponse | None]
        try:
            found = self._score(
                self._models,
                proposer_of(tasks[0].job),
                responses,
                top=self._top,
                batch_size=self._rows,
                shape=padded_shape(responses),
            )
        except RowsFailed as error:
            found = error.results
        scored = iter(found)
        choices = [
            tuple(
                replace(choice, scored=next(scored) if row else None)
                for choice, row in zip(task.found, task.rows, strict=True)
            )
            for task in tasks
        ]
        return [
            each if _is_whole(task, each) else not_finite()
            for task, each in zip(tasks, choices, strict=True)
        ]

    def forget(self) -> None:
        """Programs are compiled anew."""
        self._programs.clear()

    def _first(self, tasks: Sequence[Task]) -> list[Task]:
        batch: list[Task] = []
        rows = 0
        for task in tasks:
            rows += sum(map(bool, task.rows))
            if batch and rows > self._rows:
                break
            batch.append(task)
        return batch

    def _compile(self, task: Task) -> None:
        responses = [response for response in task.rows if response]
        settings = {"top": self._top, "batch_size": self._rows}
        compile_scores(self._models, proposer_of(task.job), responses, **settings)


def _is_whole(task: Task, choices: Sequence[Choice]) -> bool:
    """Whether all that was to be scored has log-probs."""
    return all(
        choice.scored is not None
        for choice, row in zip(choices, task.rows, strict=True)
        if row is not None
    )
