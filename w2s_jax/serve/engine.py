"""The engine: one thread that owns the device and answers jobs side by side.

Jobs of one program share the slots of one session; sessions take turns, a chunk each. Knows
nothing of HTTP.
"""

import copy
import sys
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from jax.sharding import Mesh

from w2s_jax.errors import InputError
from w2s_jax.search import session as sessions
from w2s_jax.search.likelihood import ScoredResponse, score_responses
from w2s_jax.search.results import Hypothesis, SearchResult
from w2s_jax.serve.errors import ApiError, queue_full, shutting_down
from w2s_jax.serve.events import Choice, Done, Failed, Progress, Ticket
from w2s_jax.serve.jobs import CHOOSING, Job, Program, Served
from w2s_jax.serve.metrics import Metrics
from w2s_jax.serve.pieces import settled, shared
from w2s_jax.serve.schema import MOST_TOP_LOGPROBS
from w2s_jax.serve.scoring import kind_of, proposer_of
from w2s_jax.serve.settings import Limits
from w2s_jax.serve.tasks import Group, Nobody, Task
from w2s_jax.text.prompts import decode_tokens, response_end

Score = Callable[..., list[ScoredResponse]]
_PROGRAMS_BEFORE_CLEARING = 64
_COMPILING_SHARE = 4
"""After a compilation what is compiled runs for at least so many times as long."""


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
        self._mesh, self._warm_up, self._score = mesh, tuple(warm_up), score
        # The thread decodes while others encode, which one tokenizer cannot do at once.
        self._tokenizer = copy.deepcopy(served.tokenizer)
        self._groups: OrderedDict[Program, Group] = OrderedDict()
        self._to_score: deque[Task] = deque()
        self._compiled: set[Program] = set()
        self._has_run: set[Program] = set()
        self._next_compilation = 0.0
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
        """Whether the thread has not ended."""
        return self._thread.is_alive()

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
            while self._take_arrivals():
                self._turn()
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

    def _answer_warm_up(self) -> None:
        for job in self._warm_up:
            nobody = Nobody()
            self._sort_in(Task(job, nobody, 0, has_slot=True))
            while any(self._units()):
                if self._state == "stopped":
                    return
                self._turn()
            if nobody.error is not None:
                raise nobody.error

    def _take_arrivals(self) -> bool:
        """Sort in what has arrived, waiting for it where there is nothing else; False to end."""
        with self._wake:
            while not self._arrived and not any(self._units()) and self._state != "stopped":
                self._wake.wait()
            arrived, self._arrived = self._arrived, deque()
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

    def _turn(self) -> None:
        """A chunk for every group with work, a batch of likelihoods between them."""
        for program in list(self._groups):
            group = self._groups.get(program)
            if group is None:
                continue
            self._drop_cancelled(group)
            if group.waiting or group.running:
                if not self._is_due(group):
                    continue
                started = time.monotonic()
                try:
                    self._serve(group)
                except Exception as error:  # one group's fault is not the others'
                    self._give_up(group, error)
                self._note_compilation(group, started)
            elif group.session is None:
                del self._groups[program]
            if self._to_score:
                self._score_some()
        if self._to_score:
            self._score_some()

    def _is_due(self, group: Group) -> bool:
        """Whether a group may go on now; one that must compile leaves the others most of the time.

        All wait while a program compiles, and clients choose the settings that decide it.
        """
        if group.program in self._has_run:
            return True
        others = [other for other in self._groups.values() if other.program in self._has_run]
        is_alone = not any(other.waiting or other.running for other in others)
        return is_alone or time.monotonic() >= self._next_compilation

    def _note_compilation(self, group: Group, started: float) -> None:
        if group.session is not None and group.program not in self._has_run:
            now = time.monotonic()
            self._has_run.add(group.program)
            self._next_compilation = now + _COMPILING_SHARE * (now - started)

    def _drop_cancelled(self, group: Group) -> None:
        for task in [task for task in group.waiting if task.ticket.is_cancelled]:
            group.waiting.remove(task)
            self._leave(task)
        for slot, task in list(group.running.items()):
            if task.ticket.is_cancelled:
                self._free(group, slot)
                self._leave(task)

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

    def _serve(self, group: Group) -> None:
        """Fill free slots, advance by a chunk, hand out what came of it."""
        if not self._seat(group):
            return
        self._fill(group)
        if group.session is None or not group.running:
            return
        started = time.monotonic()
        session = group.session = sessions.advance(group.held)
        done = [slot for slot in sessions.done_slots(session) if slot in group.running]
        self.metrics.chunk_seconds.labels(group.program.method).observe(time.monotonic() - started)
        shown = [slot for slot, task in group.running.items() if task.job.streams]
        for slot, result in self._results(group, sorted({*done, *shown})).items():
            task = group.running[slot]
            if slot not in done:
                self._show(task, result)
                continue
            self._free(group, slot)
            task.found = self._choices(task.job, result)
            self._score_or_finish(task)

    def _seat(self, group: Group) -> bool:
        """Give a group memory on the device; False where it must wait for another to leave."""
        if group.session is not None:
            others = (other for other in self._groups.values() if other is not group)
            group.is_leaving &= any(other.waiting and other.session is None for other in others)
            return True
        seated = [other for other in self._groups.values() if other.session is not None]
        if len(seated) >= self.limits.programs:
            idle = [other for other in seated if not other.running]
            leaving = [other for other in idle if other.is_leaving or not other.waiting]
            if not leaving:
                if not any(other.is_leaving for other in seated):
                    min(seated, key=lambda other: other.seated).is_leaving = True
                return False
            self._unseat(min(leaving, key=lambda other: other.seated))
        if len(self._compiled) >= _PROGRAMS_BEFORE_CLEARING:
            self._forget_programs()
        self._compiled.add(group.program)
        served, program = self.served, group.program
        group.session = sessions.start_session(
            served.models,
            program.config(served.models),
            slots=self.limits.slots,
            prefix_capacity=program.prefix,
            decode=partial(decode_tokens, self._tokenizer),
            scorers=served.scorers if program.method in CHOOSING else (),
            mesh=self._mesh,
        )
        group.seated = time.monotonic()
        self._count_programs()
        return True

    def _unseat(self, group: Group) -> None:
        group.session, group.is_leaving = None, False
        # Behind the others, so that whoever waited longer is seated first.
        self._groups.move_to_end(group.program)
        self._count_programs()

    def _forget_programs(self) -> None:
        """Clients choose settings, each set of which is compiled: do not keep them without end."""
        import jax

        jax.clear_caches()
        self._compiled.clear()
        self._has_run.clear()

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
                group.session = sessions.insert(group.held, free[0], task.job.request)
            except InputError as error:
                self._fail(task, ApiError(400, str(error)))
                if group.is_lost:
                    self._set_back(group)
                    return
                continue
            group.running[free.pop(0)] = task
        self._count_slots()

    def _free(self, group: Group, slot: int) -> None:
        group.session = sessions.release(group.held, slot)
        del group.running[slot]
        self._count_slots()

    def _count_slots(self) -> None:
        self.metrics.slots.set(sum(len(group.running) for group in self._groups.values()))

    def _results(self, group: Group, slots: list[int]) -> dict[int, SearchResult]:
        """Results by slot; a slot whose scores are no numbers fails alone."""
        if not slots:
            return {}
        try:
            return sessions.results(group.held, slots)
        except InputError:
            found: dict[int, SearchResult] = {}
            for slot in slots:
                try:
                    found |= sessions.results(group.held, [slot])
                except InputError as error:
                    task = group.running[slot]
                    self._free(group, slot)
                    self._fail(task, ApiError(500, str(error)))
            return found

    def _text(self, job: Job, hypothesis: Hypothesis) -> tuple[str, str | None]:
        """A hypothesis' text and the stop string that ended it."""
        return response_end(
            self._tokenizer,
            job.prompt,
            hypothesis.tokens,
            finished=hypothesis.finished,
            stop=job.request.stop,
            behind=hypothesis.behind,
            eos_ids=job.ends,
        )

    def _show(self, task: Task, result: SearchResult) -> None:
        """Say what of a running job's text will not change any more."""
        stop = task.job.request.stop
        texts = []
        for hypothesis in result.hypotheses:
            text, _ = self._text(task.job, hypothesis)
            texts.append(text if hypothesis.finished else settled(text, stop))
        if task.job.chooses:
            texts = [shared(texts)] * task.job.choices
        if any(texts) and not task.has_text:
            task.has_text = True
            self.metrics.first_seconds.observe(time.monotonic() - task.arrived)
        task.tell(Progress(task.index, tuple(texts)))

    def _choices(self, job: Job, result: SearchResult) -> tuple[Choice, ...]:
        def choice(hypothesis: Hypothesis) -> Choice:
            ended_by = "length"
            if hypothesis.finished:
                is_eos = bool(hypothesis.tokens) and hypothesis.tokens[-1] in job.ends
                ended_by = "eos" if is_eos else "stop"
            text, stop = self._text(job, hypothesis)
            score = hypothesis.score if job.chooses else None
            return Choice(text, hypothesis.tokens, ended_by, score, stop=stop)

        return tuple(choice(hypothesis) for hypothesis in result.hypotheses[: job.choices])

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

    def _score_some(self) -> None:
        """Likelihoods for a batch of tasks of about one length, the longest-waiting among them."""
        first = self._to_score[0]
        kind = kind_of(first.job, first.found)
        alike = [task for task in self._to_score if kind_of(task.job, task.found) == kind]
        batch: list[Task] = []
        rows = 0
        for task in alike:
            needed = sum(map(bool, task.rows))
            if batch and rows + needed > self.limits.slots:
                break
            batch.append(task)
            rows += needed
        for task in batch:
            self._to_score.remove(task)
            self._take_from_queue(task)
        alive = [task for task in batch if not task.ticket.is_cancelled]
        for task in batch:
            if task.ticket.is_cancelled:
                self._leave(task)
        try:
            self._score_batch(alive)
        except Exception as error:
            if not isinstance(error, InputError):
                traceback.print_exception(error, file=sys.stderr)
            told = str(error) if isinstance(error, InputError) else "scoring failed"
            for task in alive:
                self._fail(task, ApiError(400 if isinstance(error, InputError) else 500, told))

    def _score_batch(self, tasks: list[Task]) -> None:
        if not tasks:
            return
        responses = [response for task in tasks for response in task.rows if response]
        scored = iter(
            self._score(
                self.served.models,
                proposer_of(tasks[0].job),
                responses,
                top=min(MOST_TOP_LOGPROBS, self.served.models.vocabulary),
                batch_size=self.limits.slots,
            )
        )
        for task in tasks:
            task.found = tuple(
                replace(one, scored=next(scored) if row else None)
                for one, row in zip(task.found, task.rows, strict=True)
            )
            self._finish(task)

    def _forget_tasks(self) -> None:
        with self._wake:
            self._arrived.clear()
            self._waiting = 0
            self.metrics.queue.set(0)
        self._groups.clear()
        self._to_score.clear()
        self._count_slots()
