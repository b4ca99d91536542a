"""A reasoning run: what would end it after hours, looked at first; its stages; its report.

The looking reads files, configs and tokenizers, no weight, and starts no device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from w2s_jax.errors import InputError
from w2s_jax.reasoning.answers import gold_answer, make_checker
from w2s_jax.reasoning.pipeline import SAMPLES, Pipeline
from w2s_jax.reasoning.questions import read_demonstrations, read_questions, read_responses
from w2s_jax.reasoning.report import FIGURE, REPORT, TABLES, summarise, write_report
from w2s_jax.reasoning.stages import DONE, Stage, run_stages
from w2s_jax.text.prompts import escape_notes
from w2s_jax.text.rows import Row


def run_pipeline(
    pipeline: Pipeline,
    stages: Sequence[Stage],
    *,
    first: str | None = None,
    last: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> str:
    """Do the stages as `run_stages` does, and write the report; returns its tables.

    Raises what `run_stages` raises, and InputError for settings or data with which a stage fails.
    """
    for line in check_run(pipeline, stages):
        tell(line)
    figures = run_stages(stages, pipeline.root, first=first, last=last, tell=tell)
    drawn = [name for name in figures if name.endswith(SAMPLES)]
    samples = {name: pipeline.judged_samples(name) for name in drawn}
    return write_report(summarise(figures, samples, pipeline.config.pass_at), pipeline.root)


def check_run(pipeline: Pipeline, stages: Sequence[Stage]) -> list[str]:
    """A line for each thing in a run's files that is not wrong, but may not be meant.

    Raises InputError, naming file and row, for a checker that cannot be made, gold answers that
    are missing or unreadable where they are needed, responses that are not those to the questions,
    fewer demonstrations than asked, inputs in the folder of a stage, guides without the strong
    model's vocabulary, and prompts that do not fit a model.
    """
    config, files = pipeline.config, pipeline.files
    for checker in {config.votes, config.judge}:
        make_checker(checker, config.kind)
    _check_places(pipeline, stages)
    _check_golds(pipeline.questions, files["questions"], config.kind)
    if config.ceiling:
        read_questions(files["questions"], ids=config.ids, answers_needed=True)
    if config.test is not None:
        _check_golds(pipeline.test, files["test"], config.kind)
    solved = []
    if "weak train" in files:
        solved = read_questions(files["weak train"], answers_needed=True)
    if "weak responses" in files:
        read_responses(files["weak responses"], pipeline.questions)
    if "demonstrations" in files:
        _check_demonstrations(files["demonstrations"], config.demonstrations.count)
    if any(not (pipeline.root / stage.name / DONE).exists() for stage in stages):
        _check_prompts(pipeline)
    told = escape_notes(config.decoding.stop)
    told += _shared(pipeline.questions, files["questions"], solved, files.get("weak train"))
    if config.test is not None:
        for rows, name in ((pipeline.questions, "questions"), (solved, "weak train")):
            told += _shared(pipeline.test, files["test"], rows, files.get(name))
    return told


def _check_places(pipeline: Pipeline, stages: Sequence[Stage]) -> None:
    from w2s_jax.models.huggingface import locate

    root = pipeline.root.resolve()
    written = [root / stage.name for stage in stages]
    written += [root / name for name in (REPORT, TABLES, FIGURE)]
    read = [*pipeline.files.values(), *(locate(pipeline.place(name)) for name in pipeline.weights)]
    for path in read:
        for place in written:
            if place == path.resolve() or place in path.resolve().parents:
                raise InputError(
                    f"{path} is read, and lies in what the run writes ({place}); name another "
                    "--output, or move the file"
                )


def _check_golds(rows: Sequence[Row], path: Path, kind: str) -> None:
    for number, row in enumerate(rows, start=1):
        if "answer" in row:
            try:
                gold_answer(row["answer"], kind)
            except InputError as error:
                raise InputError(f"{path} row {number} (id {row['id']!r}): {error}") from None


def _check_demonstrations(path: Path, count: int) -> None:
    found = len(read_demonstrations(path))
    if found < count:
        raise InputError(
            f"{path}: {found} demonstrations, of which the first {count} are asked for; add to "
            "them, or lower demonstrations.count"
        )


def _check_prompts(pipeline: Pipeline) -> None:
    """The prompts of both models as they stand before training, which changes no tokenizer.

    Drawn demonstrations are not known yet and are left out.
    """
    from w2s_jax.reasoning.answering import Answering, check_prompts

    config, files = pipeline.config, pipeline.files
    weak, guided = config.weak.model, config.guided
    shown, count = files.get("demonstrations"), config.demonstrations.count
    for name in ("questions", "test"):
        if name not in files:
            continue
        asked = Answering(
            model=pipeline.place(config.strong),
            questions=str(files[name]),
            output="",
            generation=pipeline.generation(),
            ids=config.ids if name == "questions" else "own",
            demonstrations=None if shown is None else str(shown),
            overflow=config.demonstrations.overflow,
        )
        # What is tuned later has the vocabulary of what it is tuned from.
        guide = pipeline.place(weak) if weak is not None and guided else None
        check_prompts(replace(asked, tuned=guide, untuned=guide), count)
        if weak is not None and (name == "test" or config.weak.responses is None):
            check_prompts(replace(asked, model=pipeline.place(weak), demonstrations=None))


def _shared(
    rows: Sequence[Row], path: Path, others: Sequence[Mapping[str, Any]], elsewhere: Path | None
) -> list[str]:
    """A line where questions of one file are in another one too."""
    asked = {row["question"].strip(): n for n, row in enumerate(others, start=1)}
    both = [(n, row["question"].strip()) for n, row in enumerate(rows, start=1)]
    both = [(n, text) for n, text in both if text in asked]
    if not both:
        return []
    number, text = both[0]
    return [
        f"note: {len(both):,} of the {len(rows):,} questions of {path} are in {elsewhere} too, "
        f"first row {number}, there row {asked[text]}; figures on them flatter"
    ]
