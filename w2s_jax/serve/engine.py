"""The engine: one thread that owns the device and answers jobs concurrently.

Jobs of one program share the slots of one session; sessions take turns, a chunk each. A new program
is compiled on another thread while the others run. Independent of HTTP.
"""

import copy
import sys
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Sequence
from functools import partial
from queue import SimpleQueue

import jax
from jax.sharding import Mesh

from w2s_jax.errors import InputError
from w2s_jax.search import compile as compiling
from w2s_jax.search import session as sessions
from w2s_jax.search.results import SearchResult
from w2s_jax.search.session import Session
from w2s_jax.serve.answers import Choice, choices_of, settled_texts
from w2s_jax.serve.config import ServeConfig
from w2s_jax.serve.jobs import CHOOSING, Job, Program, Served
from w2s_jax.serve.schema import ApiError, queue_full, shutting_down
from w2s_jax.serve.tasks import (
    Compiler,
    Done,
    Failed,
    Group,
    Likelihoods,
    Metrics,
    Progress,
    Task,
    Ticket,
)
from w2s_jax.text.prompts import decode_tokens

SEATS = 4
"""Compiled searches that keep their memory on the device at the same time."""
_PROGRAMS_BEFORE_CLEARING = 64


class Engine:
    """Answers jobs on a thread of its own; `submit` is called from the event loop's thread.

    Attributes:
        state: One of "starting", "ready", "draining", "stopped" and "failed".
        metrics: Counters and histograms.

    Args:
        served: What answers.
        config: Its slots and queue are used here.
        mesh: The models' mesh.
        warm_up: Jobs to answer before the engine is ready, so that their programs are compiled.
    """

    def __init__(
        self,
        served: Served,
        config: ServeConfig,
        *,
        mesh: Mesh | None = None,
        warm_up: Sequence[Job] = (),
    ) -> None:
        self.served, self.config, self.metrics = served, config, Metrics()
        self._mesh = mesh
        self._warm_up = [Task(job, None, has_slot=True) for job in warm_up]
        # The thread decodes while others encode, which a single tokenizer cannot do concurrently.
        self._tokenizer = copy.deepcopy(served.tokenizer)
        self._groups: OrderedDict[Program, Group] = OrderedDict()
        self._shown: tuple[Group, ...] = ()
        self._to_score: deque[Task] = deque()
        self._programs: set[Program] = set()
        self._compiler = Compiler(self._wake_up)
        self._likelihoods = Likelihoods(served.models, config.slots, self._compiler)
        # The lock guards `state` and `_open`. The thread waits for news: tasks, or None for others.
        self._lock = threading.RLock()
        self._news: SimpleQueue[Task | None] = SimpleQueue()
        self._open: set[Task] = set()
        self.state = "starting"
        self._thread = threading.Thread(target=self._run, name="w2s-engine", daemon=True)
        self.metrics.queue.set_function(self._count_waiting)
        self.metrics.slots.set_function(lambda: sum(len(one.running) for one in self._shown))
        self.metrics.programs.set_function(
            lambda: sum(one.session is not None for one in self._shown)
        )

    @property
    def is_idle(self) -> bool:
        """Whether no job is in progress."""
        return not self._open

    @property
    def is_running(self) -> bool:
        """Whether a thread works or compiles."""
        return self._thread.is_alive() or self._compiler.is_busy

    def start(self) -> None:
        """Start to warm up, then to answer."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> Ticket:
        """Accept all jobs or none; ApiError 429 if the queue is full, 503 if the server ends."""
        with self._lock:
            if self.state == "failed":
                raise ApiError(503, "the engine has failed; see the server's log", code="failed")
            if self.state in ("draining", "stopped"):
                raise shutting_down()
            waiting, queue = self._count_waiting(), self.config.queue
            if waiting + len(jobs) > queue:
                raise queue_full(f"{waiting} of {queue} places in the queue are taken; try again")
            ticket = Ticket()
            for index, job in enumerate(jobs):
                task = Task(job, ticket, index)
                self._open.add(task)
                self._news.put(task)
        return ticket

    def drain(self) -> None:
        """Refuse new jobs from now on; those in progress continue."""
        with self._lock:
            if self.state in ("starting", "ready"):
                self.state = "draining"

    def stop(self, timeout: float = 5.0) -> None:
        """Fail all unfinished jobs with 503, then wait for the thread to end its chunk.

        The thread may be compiling, which cannot be interrupted: see `is_running`.
        """
        with self._lock:
            if self.state != "failed":
                self.state = "stopped"
            self._wake_up()
        self._dismiss(shutting_down())
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _dismiss(self, error: ApiError) -> None:
        """Fail all open jobs, from any thread; results that still come are dropped."""
        with self._lock:
            tasks, self._open = self._open, set()
        for task in tasks:
            self.metrics.cancelled.inc()
            task.tell(Failed(task.index, error))
            if task.ticket is not None:
                task.ticket.cancel()

    def _wake_up(self) -> None:
        """Have the thread look for compiled programs or the end; from any thread."""
        self._news.put(None)

    def _count_waiting(self) -> int:
        with self._lock:
            return sum(not task.has_slot for task in self._open)

    # The thread.

    def _run(self) -> None:
        try:
            for task in self._warm_up:
                self._sort_in(task)
            progress = True
            while self._take_arrivals(progress):
                progress = self._turn()
        except BaseException as error:  # this thread must not end silently
            if isinstance(error, ApiError):
                sys.stderr.write(f"error: while warming up: {error.message}\n")
            else:
                traceback.print_exc(file=sys.stderr)
            with self._lock:
                self.state = "failed"
            self._dismiss(ApiError(500, "the engine has failed; see the server's log"))
        finally:
            self._groups.clear()
            self._to_score.clear()
            self._shown = ()
            self._compiler.close()

    def _take_arrivals(self, progress: bool) -> bool:
        """Queue the tasks that have arrived; False to end.

        Waits for a task or a compilation if there is no work, or if the last turn made no progress
        because everything waits for compilations.
        """
        self._note_warm_up()
        has_work = bool(self._to_score) or any(group.has_work for group in self._groups.values())
        news = [] if progress and has_work else [self._news.get()]
        while not self._news.empty():
            news.append(self._news.get())
        if self.state == "stopped":
            return False
        for task in news:
            if task is not None:
                self._sort_in(task)
        return True

    def _note_warm_up(self) -> None:
        """Become ready once its jobs are done; raises the first one's failure."""
        ends = [task.end for task in self._warm_up]
        for end in ends:
            if isinstance(end, Failed):
                raise end.error
        with self._lock:
            if self.state == "starting" and None not in ends:
                self.state = "ready"

    def _sort_in(self, task: Task) -> None:
        self.metrics.prompt_tokens.inc(len(task.job.prompt))
        program = task.job.program
        if task.job.generates:
            self._groups.setdefault(program, Group(program)).waiting.append(task)
        else:
            task.found = (Choice("", (), "length"),) * task.job.choices
            self._score_or_finish(task)

    def _turn(self) -> bool:
        """Run a chunk of every group with work, and a batch of likelihoods after each.

        False if nothing can be done before something is compiled.
        """
        progress = False
        # Also for the gauges, whose threads must not iterate over a changing dict.
        self._shown = tuple(self._groups.values())
        for group in self._shown:
            progress |= self._drop_cancelled(group)
            if group.has_work:
                try:
                    progress |= self._serve(group)
                except Exception as error:  # one group's error must not affect the others
                    self._give_up(group, error)
                    progress = True
            elif group.session is None and not group.is_compiling:
                del self._groups[group.program]
            progress |= self._score_some()
        return self._score_some() or progress or not self._compiler.is_busy

    def _drop_cancelled(self, group: Group) -> bool:
        """Drop the tasks for which nobody waits; False if there are none."""
        gone = [task for task in group.waiting if task.is_cancelled]
        for task in gone:
            group.waiting.remove(task)
        left = [slot for slot, task in group.running.items() if task.is_cancelled]
        gone += [self._free(group, slot) for slot in left]
        for task in gone:
            self._end(task, None)
        return bool(gone)

    def _serve(self, group: Group) -> bool:
        """Fill free slots, run a chunk, and hand out the results; False if the group must wait."""
        if not self._seat(group):
            return False
        self._fill(group)
        if not group.running:
            return not group.is_leaving
        started = time.monotonic()
        session = group.session = group.open_session.advance()
        done = {slot for slot in session.done_slots() if slot in group.running}
        self.metrics.chunk_seconds.labels(group.program.method).observe(time.monotonic() - started)
        slots = done | {slot for slot, task in group.running.items() if task.job.streams}
        found, failed = session.outcomes(sorted(slots)) if slots else ({}, {})
        for slot, failure in failed.items():
            task = self._free(group, slot)
            self._fail(task, ApiError(500, failure.fault, code="search_failed"))
        for slot, result in found.items():
            if slot not in done:
                self._show(group.running[slot], result)
                continue
            task = self._free(group, slot)
            task.found = choices_of(self._tokenizer, task.job, result)
            self._score_or_finish(task)
        return True

    def _seat(self, group: Group) -> bool:
        """Give a group memory on the device; False if it waits for a compilation or for room."""
        others = [other for other in self._groups.values() if other is not group]
        if group.session is not None:
            group.is_leaving &= any(other.waiting and not other.has_seat for other in others)
            return True
        if group.is_compiling:
            return False
        if group.future is not None:
            future, group.future = group.future, None
            group.session = future.result()
            return True
        if not self._make_room([other for other in others if other.has_seat]):
            return False
        if len(self._programs) >= _PROGRAMS_BEFORE_CLEARING and not self._compiler.is_busy:
            # Each combination of settings that clients choose is compiled; do not keep all of them.
            jax.clear_caches()
            self._programs.clear()
            self._likelihoods.forget()
        known, job = group.program in self._programs, group.waiting[0].job
        group.future = self._compiler.ask(self._session_of, group.program, job, known=known)
        self._programs.add(group.program)
        group.seated = time.monotonic()
        return False

    def _make_room(self, seated: Sequence[Group]) -> bool:
        """Make a seat free, if necessary that of a group that can leave; False to wait for one."""
        if len(seated) < SEATS:
            return True
        idle = [other for other in seated if not (other.running or other.is_compiling)]
        leaving = [other for other in idle if other.is_leaving or not other.waiting]
        if leaving:
            self._unseat(min(leaving, key=lambda other: other.seated))
            return True
        # Have the group that was seated first leave, so that others get their turn.
        here = [other for other in seated if other.session is not None]
        if here and not any(other.is_leaving for other in here):
            min(here, key=lambda other: other.seated).is_leaving = True
        return False

    def _session_of(self, program: Program, job: Job) -> Session:
        """A session with all its programs compiled; runs on the compiler's thread."""
        served = self.served
        session = sessions.start_session(
            served.models,
            program.config,
            slots=self.config.slots,
            prefix_capacity=program.prefix,
            decode=partial(decode_tokens, self._tokenizer),
            scorers=served.scorers if program.method in CHOOSING else (),
            mesh=self._mesh,
        )
        return compiling.compile_session(session, job.request)

    def _unseat(self, group: Group) -> None:
        group.session = group.future = None
        group.is_leaving = False
        # To the end, so that groups that have waited longer are seated first.
        self._groups.move_to_end(group.program)

    def _fill(self, group: Group) -> None:
        free = group.open_session.free
        while free and group.waiting and group.may_add and not group.is_leaving:
            task, slot = group.waiting.popleft(), free[0]
            self._take_from_queue(task)
            # Before the call, so that the task is not lost if that fails.
            group.running[slot] = task
            try:
                group.session = group.open_session.insert(slot, task.job.request)
            except InputError as error:
                self._fail(group.running.pop(slot), ApiError(400, str(error)))
                continue
            free.pop(0)

    def _free(self, group: Group, slot: int) -> Task:
        group.session = group.open_session.release(slot)
        return group.running.pop(slot)

    def _show(self, task: Task, result: SearchResult) -> None:
        """Report the text of a running job that will not change any more."""
        texts = settled_texts(self._tokenizer, task.job, result)
        if any(texts) and not task.has_text:
            task.has_text = True
            self.metrics.first_seconds.observe(time.monotonic() - task.arrived)
        task.tell(Progress(task.index, texts))

    def _score_or_finish(self, task: Task) -> None:
        if task.job.logprobs is not None and task.responses:
            self._to_score.append(task)
        else:
            self._finish(task)

    def _finish(self, task: Task) -> None:
        self.metrics.tokens.inc(sum(len(choice.tokens) for choice in task.found))
        self._end(task, Done(task.index, task.found))

    def _fail(self, task: Task, error: ApiError) -> None:
        self._end(task, Failed(task.index, error))

    def _end(self, task: Task, event: Done | Failed | None) -> None:
        """End a task; `event` is reported, None if nobody waits for it."""
        self._take_from_queue(task)
        with self._lock:
            self._open.discard(task)
        if event is None:
            self.metrics.cancelled.inc()
        else:
            task.tell(event)

    def _take_from_queue(self, task: Task) -> None:
        if not task.has_slot:
            task.has_slot = True
            self.metrics.waiting_seconds.observe(time.monotonic() - task.arrived)

    def _give_up(self, group: Group, error: Exception) -> None:
        """End a group's broken session; jobs that ran together are retried one by one.

        The one at fault then fails alone; the others get the same draws again.
        """
        told = _fault(error, "the search failed; see the server's log", "search_failed")
        running = list(group.running.values())
        failed = running or list(group.waiting)
        # The running tasks wait again, before the others.
        group.waiting.extendleft(reversed(running))
        group.running.clear()
        self._unseat(group)
        if len(running) > 1:
            for task in running:
                task.is_suspect = True
            return
        for task in failed:
            group.waiting.remove(task)
            self._fail(task, told)

    def _score_some(self) -> bool:
        """Score log-probs of a batch of tasks; False if there are none, or all must wait."""
        batch, alive = self._likelihoods.ready(self._to_score), []
        for task in batch:
            self._to_score.remove(task)
            self._take_from_queue(task)
            if task.is_cancelled:
                self._end(task, None)
            else:
                alive.append(task)
        try:
            found = self._likelihoods.score(alive) if alive else []
        except Exception as error:
            found = [_fault(error, "scoring failed")] * len(alive)
        for task, outcome in zip(alive, found, strict=True):
            if isinstance(outcome, ApiError):
                self._fail(task, outcome)
                continue
            task.found = outcome
            self._finish(task)
        return bool(batch)


def _fault(error: Exception, told: str, code: str | None = None) -> ApiError:
    """The error that clients get for an exception; the program's own errors only go to the log."""
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    traceback.print_exception(error, file=sys.stderr)
    return ApiError(500, told, code=code)
