"""Log-probs of jobs' choices: which are computed together, and whether their program is ready."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from w2s_jax.errors import RowsFailed
from w2s_jax.search.guides import SearchModels
from w2s_jax.search.likelihood import (
    ScoredResponse,
    compile_scores,
    padded_shape,
    score_responses,
)
from w2s_jax.serve.compiling import Compiler
from w2s_jax.serve.errors import ApiError, not_finite
from w2s_jax.serve.events import Choice
from w2s_jax.serve.schema import MOST_TOP_LOGPROBS
from w2s_jax.serve.scoring import Kind, kind_of, proposer_of
from w2s_jax.serve.tasks import Task

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
