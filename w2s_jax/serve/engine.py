"""The engine: one thread that owns the device and answers jobs side by side.

Jobs of one program share the slots of one session; sessions take turns, a chunk each. A program
that is new is compiled on another thread, while the others run. Knows nothing of HTTP.
"""

import copy
import sys
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial

from jax.sharding import Mesh

from w2s_jax.errors import InputError
from w2s_jax.search import session as sessions
from w2s_jax.search.likelihood import score_responses
from w2s_jax.search.results import SearchResult
from w2s_jax.search.session import Session
from w2s_jax.serve.events import Choice, Done, Failed, Progress, Ticket, choices_of, settled_texts
from w2s_jax.serve.jobs import CHOOSING, Job, Program, Served
from w2s_jax.serve.metrics import Metrics
from w2s_jax.serve.schema import ApiError, Limits, queue_full, shutting_down
from w2s_jax.serve.tasks import Compiler, Group, Likelihoods, Nobody, Score, Task
from w2s_jax.text.prompts import decode_tokens

_PROGRAMS_BEFORE_CLEARING = 64


class Engine:
    """Answers jobs on a thread of its own; `submit` is called from the event loop's.

    warm_up: jobs to be answered before the engine is ready, so that their programs are compiled.
    score: as `search.likelihood.score_responses`.
    """

    def __init__(
        self,
        served: Served,
        limits: Limits,
        metrics: Metrics,
        *,
        mesh: Mesh | None = None,
        warm_up: Sequence[Job] = (),
        score: Score = score_responses,
    ) -> None:
        self.served, self.limits, self.metrics = served, limits, metrics
        self._mesh, self._warm_up = mesh, tuple(warm_up)
        # The thread decodes while others encode, which one tokenizer cannot do at once.
        self._tokenizer = copy.deepcopy(served.tokenizer)
        self._groups: OrderedDict[Program, Group] = OrderedDict()
        self._to_score: deque[Task] = deque()
        self._programs: set[Program] = set()
        self._compiler = Compiler(self._note_compilation)
        self._likelihoods = Likelihoods(served.models, limits.slots, self._compiler, score)
        self._has_compiled = False
        self._wake = threading.Condition()
        self._arrived: deque[Task] = deque()
        self._open: set[Task] = set()
        self._waiting = 0
        self._state = "starting"
        self._thread = threading.Thread(target=self._run, name="w2s-engine", daemon=True)

    @property
    def state(self) -> str:
        """One of "starting", "ready", "draining", "stopped" and "failed"."""
        return self._state

    @property
    def is_idle(self) -> bool:
        """Whether no job is under way."""
        return not self._open

    @property
    def is_running(self) -> bool:
        """Whether a thread works or compiles."""
        return self._thread.is_alive() or self._compiler.is_busy

    def start(self) -> None:
        """Begin to warm up, then to answer."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> Ticket:
        """Take on all jobs or none; ApiError 429 where the queue is full, 503 when ending."""
        with self._wake:
            if self._state == "failed":
                raise ApiError(503, "the engine has failed; see the server's log", code="failed")
            if self._state in ("draining", "stopped"):
                raise shutting_down()
            if self._waiting + len(jobs) > self.limits.queue:
                raise queue_full(self._waiting, self.limits.queue)
            ticket = Ticket()
            tasks = [Task(job, ticket, index) for index, job in enumerate(jobs)]
            self._arrived.extend(tasks)
            self._open.update(tasks)
            self._waiting += len(jobs)
            self.metrics.queue.set(self._waiting)
            self._wake.notify()
        return ticket

    def drain(self) -> None:
        """Refuse new jobs from now on; those under way go on."""
        with self._wake:
            if self._state in ("starting", "ready"):
                self._state = "draining"

    def stop(self, timeout: float = 5.0) -> None:
        """Fail all jobs that are not done with 503, then wait for the thread to end its chunk.

        The thread may be compiling, which nothing interrupts: see `is_running`.
        """
        with self._wake:
            if self._state != "failed":
                self._state = "stopped"
            self._wake.notify()
        self._dismiss(shutting_down())
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _dismiss(self, error: ApiError) -> None:
        """Fail all open jobs, from any thread; what is still found for them goes to nobody."""
        with self._wake:
            tasks, self._open = self._open, set()
        for task in tasks:
            self.metrics.cancelled.inc()
            task.tell(Failed(task.index, error))
        for task in tasks:
            task.ticket.cancel()

    # The thread.

    def _run(self) -> None:
        try:
            self._answer_warm_up()
            with self._wake:
                if self._state == "starting":
                    self._state = "ready"
            self._go_on_while(lambda: True)
            self._forget_tasks()
        except BaseException as error:  # nothing may end this thread unseen
            if isinstance(error, ApiError):
                print(f"error: while warming up: {error.message}", file=sys.stderr)  # noqa: T201
            else:
                traceback.print_exc(file=sys.stderr)
            with self._wake:
                self._state = "failed"
            self._dismiss(ApiError(500, "the engine has failed; see the server's log"))
            self._forget_tasks()
        finally:
            self._compiler.close()

    def _go_on_while(self, is_wanted: Callable[[], bool]) -> None:
        """Take turns as long as that holds and the engine is not stopped."""
        progress = True
        while is_wanted() and self._take_arrivals(progress):
            progress = self._turn()

    def _answer_warm_up(self) -> None:
        for job in self._warm_up:
            nobody = Nobody()
            self._sort_in(Task(job, nobody, 0, has_slot=True))
            self._go_on_while(lambda nobody=nobody: not nobody.is_over)  # type: ignore[misc]
            if nobody.error is not None:
                raise nobody.error

    def _take_arrivals(self, progress: bool) -> bool:
        """Sort in what has arrived; False to end.

        Where there is nothing to do, or the last turn got nothing done since all waits for
        compilations, wait for what arrives or is compiled.
        """
        with self._wake:
            while not (self._arrived or self._has_compiled or self._state == "stopped"):
                if progress and any(self._units()):
                    break
                self._wake.wait()
            arrived, self._arrived = self._arrived, deque()
            self._has_compiled = False
            if self._state == "stopped":
                self._arrived = arrived
                return False
        for task in arrived:
            self._sort_in(task)
        return True

    def _sort_in(self, task: Task) -> None:
        self.metrics.prompt_tokens.inc(len(task.job.prompt))
        program = task.job.program
        if program is not None:
            self._groups.setdefault(program, Group(program)).waiting.append(task)
        else:
            task.found = (Choice("", (), "length"),) * task.job.choices
            self._score_or_finish(task)

    def _units(self) -> list[Group | deque[Task]]:
        """What has work to do: groups, and the tasks to be scored."""
        busy = [group for group in self._groups.values() if group.waiting or group.running]
        return [*busy, *([self._to_score] if self._to_score else [])]

    def _turn(self) -> bool:
        """A chunk for every group with work, a batch of likelihoods between them.

        False where nothing can be done before something is compiled.
        """
        progress = False
        for program in list(self._groups):
            group = self._groups.get(program)
            if group is None:
                continue
            progress |= self._drop_cancelled(group)
            if group.waiting or group.running:
                try:
                    progress |= self._serve(group)
                except Exception as error:  # one group's fault is not the others'
                    self._give_up(group, error)
                    progress = True
            elif group.session is None and not group.is_compiling:
                del self._groups[program]
            progress |= self._score_some()
        return self._score_some() or progress or not self._compiler.is_busy

    def _note_compilation(self) -> None:
        with self._wake:
            self._has_compiled = True
            self._wake.notify()

    def _drop_cancelled(self, group: Group) -> bool:
        """Let go of what nobody waits for; False where there is no such thing."""
        before = len(group.waiting) + len(group.running)
        for task in [task for task in group.waiting if task.ticket.is_cancelled]:
            group.waiting.remove(task)
            self._leave(task)
        for slot, task in list(group.running.items()):
            if task.ticket.is_cancelled:
                self._free(group, slot)
                self._leave(task)
        return len(group.waiting) + len(group.running) < before

    def _leave(self, task: Task, *, was_answered: bool = False) -> None:
        """A task is over."""
        if not was_answered:
            self.metrics.cancelled.inc()
        self._take_from_queue(task)
        with self._wake:
            self._open.discard(task)

    def _take_from_queue(self, task: Task) -> None:
        if task.has_slot:
            return
        task.has_slot = True
        self.metrics.waiting_seconds.observe(time.monotonic() - task.arrived)
        with self._wake:
            self._waiting -= 1
            self.metrics.queue.set(self._waiting)

    def _serve(self, group: Group) -> bool:
        """Fill free slots, advance by a chunk, hand out what came of it; False where it waits."""
        if not self._seat(group):
            return False
        self._fill(group)
        if group.session is None or not group.running:
            return not group.is_leaving
        started = time.monotonic()
        session = group.session = sessions.advance(group.open_session)
        done = [slot for slot in sessions.done_slots(session) if slot in group.running]
        self.metrics.chunk_seconds.labels(group.program.method).observe(time.monotonic() - started)
        shown = [slot for slot, task in group.running.items() if task.job.streams]
        for slot, result in self._results(group, sorted({*done, *shown})).items():
            task = group.running[slot]
            if slot not in done:
                self._show(task, result)
                continue
            self._free(group, slot)
            task.found = choices_of(self._tokenizer, task.job, result)
            self._score_or_finish(task)
        return True

    def _seat(self, group: Group) -> bool:
        """Give a group memory on the device; False where it waits for a compilation or for room."""
        others = [other for other in self._groups.values() if other is not group]
        if group.session is not None:
            group.is_leaving &= any(other.waiting and not other.has_seat for other in others)
            return True
        if group.future is not None:
            if group.is_compiling:
                return False
            future, group.future = group.future, None
            group.session = future.result()
            self._count_programs()
            return True
        seated = [other for other in others if other.has_seat]
        if len(seated) >= self.limits.programs:
            idle = [other for other in seated if not (other.running or other.is_compiling)]
            leaving = [other for other in idle if other.is_leaving or not other.waiting]
            if not leaving:
                # Whoever is still to come must have had its turn.
                here = [other for other in seated if other.session is not None]
                if here and not any(other.is_leaving for other in here):
                    min(here, key=lambda other: other.seated).is_leaving = True
                return False
            self._unseat(min(leaving, key=lambda other: other.seated))
        if len(self._programs) >= _PROGRAMS_BEFORE_CLEARING and not self._compiler.is_busy:
            self._forget_programs()
        known, job = group.program in self._programs, group.waiting[0].job
        group.future = self._compiler.ask(self._session_of, group.program, job, known=known)
        self._programs.add(group.program)
        group.seated = time.monotonic()
        return False

    def _session_of(self, program: Program, job: Job) -> Session:
        """A session of a program with all compiled that it runs; for the compiler's thread."""
        served = self.served
        session = sessions.start_session(
            served.models,
            program.config(served.models),
            slots=self.limits.slots,
            prefix_capacity=program.prefix,
            decode=partial(decode_tokens, self._tokenizer),
            scorers=served.scorers if program.method in CHOOSING else (),
            mesh=self._mesh,
        )
        return sessions.compile_session(session, job.request)

    def _unseat(self, group: Group) -> None:
        group.session = group.future = None
        group.is_leaving = False
        # Behind the others, so that whoever waited longer is seated first.
        self._groups.move_to_end(group.program)
        self._count_programs()

    def _forget_programs(self) -> None:
        """Clients choose settings, each set of which is compiled: do not keep them without end."""
        import jax

        jax.clear_caches()
        self._programs.clear()
        self._likelihoods.forget()

    def _count_programs(self) -> None:
        seated = sum(group.session is not None for group in self._groups.values())
        self.metrics.programs.set(seated)

    def _fill(self, group: Group) -> None:
        if group.is_leaving:
            return
        free = [slot for slot in range(self.limits.slots) if slot not in group.running]
        while free and group.waiting and group.may_add:
            task = group.waiting.popleft()
            self._take_from_queue(task)
            try:
                group.session = sessions.insert(group.open_session, free[0], task.job.request)
            except InputError as error:
                self._fail(task, ApiError(400, str(error)))
                if group.is_lost:
                    self._set_back(group)
                    return
                continue
            group.running[free.pop(0)] = task
        self._count_slots()

    def _free(self, group: Group, slot: int) -> None:
        group.session = sessions.release(group.open_session, slot)
        del group.running[slot]
        self._count_slots()

    def _count_slots(self) -> None:
        self.metrics.slots.set(sum(len(group.running) for group in self._groups.values()))

    def _results(self, group: Group, slots: list[int]) -> dict[int, SearchResult]:
        """Results by slot; a slot whose scores are no numbers fails alone."""
        if not slots:
            return {}
        found, failed = sessions.outcomes(group.open_session, slots)
        for slot, failure in failed.items():
            task = group.running[slot]
            self._free(group, slot)
            self._fail(task, ApiError(500, failure.fault, code="search_failed"))
        return found

    def _show(self, task: Task, result: SearchResult) -> None:
        """Say what of a running job's text will not change any more."""
        texts = settled_texts(self._tokenizer, task.job, result)
        if any(texts) and not task.has_text:
            task.has_text = True
            self.metrics.first_seconds.observe(time.monotonic() - task.arrived)
        task.tell(Progress(task.index, texts))

    def _score_or_finish(self, task: Task) -> None:
        if task.job.logprobs is not None and any(task.rows):
            self._to_score.append(task)
        else:
            self._finish(task)

    def _finish(self, task: Task) -> None:
        self.metrics.tokens.inc(sum(len(choice.tokens) for choice in task.found))
        self._leave(task, was_answered=True)
        task.tell(Done(task.index, task.found))

    def _fail(self, task: Task, error: ApiError) -> None:
        self._leave(task, was_answered=True)
        task.tell(Failed(task.index, error))

    def _give_up(self, group: Group, error: Exception) -> None:
        """A group's session cannot go on; jobs that ran side by side are tried one by one.

        Whichever is at fault fails alone; the draws of the others are the same again.
        """
        if not isinstance(error, InputError):
            traceback.print_exception(error, file=sys.stderr)
        running = list(group.running.values())
        failed = running if running else list(group.waiting)
        self._set_back(group)
        if len(running) > 1:
            for task in running:
                task.is_suspect = True
            return
        told = ApiError(500, "the search failed; see the server's log", code="search_failed")
        if isinstance(error, InputError):
            told = ApiError(400, str(error))
        for task in failed:
            group.waiting.remove(task)
            self._fail(task, told)

    def _set_back(self, group: Group) -> None:
        """Take a group's session away; what ran waits again, before the others."""
        group.waiting.extendleft(reversed(group.running.values()))
        group.running.clear()
        self._unseat(group)
        self._count_slots()

    def _score_some(self) -> bool:
        """Log-probs for a batch of tasks; False where there are none, or all must wait."""
        batch, alive = self._likelihoods.ready(self._to_score), []
        for task in batch:
            self._to_score.remove(task)
            self._take_from_queue(task)
            if task.ticket.is_cancelled:
                self._leave(task)
            else:
                alive.append(task)
        try:
            found = self._likelihoods.score(alive) if alive else []
        except Exception as error:
            if not isinstance(error, InputError):
                traceback.print_exception(error, file=sys.stderr)
            told = str(error) if isinstance(error, InputError) else "scoring failed"
            for task in alive:
                self._fail(task, ApiError(400 if isinstance(error, InputError) else 500, told))
            return True
        for task, choices in zip(alive, found, strict=True):
            if isinstance(choices, ApiError):
                self._fail(task, choices)
                continue
            task.found = choices
            self._finish(task)
        return bool(batch)

    def _forget_tasks(self) -> None:
        with self._wake:
            self._arrived.clear()
            self._waiting = 0
            self.metrics.queue.set(0)
        self._groups.clear()
        self._to_score.clear()
        self._count_slots()
