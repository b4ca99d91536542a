"""What an engine's thread keeps of the jobs it has taken on."""

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from w2s_jax.search.likelihood import Response
from w2s_jax.search.session import Session
from w2s_jax.serve.errors import ApiError
from w2s_jax.serve.events import Choice, Done, Event, Failed, Ticket
from w2s_jax.serve.jobs import Job, Program
from w2s_jax.serve.scoring import responses_of


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
    def held(self) -> Session:
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
        return self.held.state.base.is_deleted()

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
