"""A reasoning run: what would end it after hours, looked at first; its stages; its report.

The looking reads files, configs and tokenizers, no weight, and starts no device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from w2s_jax.errors import InputError
from w2s_jax.models.huggingface import locate
from w2s_jax.reasoning.answers import gold_answer, make_checker
from w2s_jax.reasoning.config import ReasonConfig, StagesConfig
from w2s_jax.reasoning.generation import check_prompts
from w2s_jax.reasoning.pipeline import SAMPLES, Pipeline
from w2s_jax.reasoning.questions import read_demonstrations, read_questions, read_responses
from w2s_jax.reasoning.report import FIGURE, REPORT, TABLES, summarise, write_report
from w2s_jax.reasoning.stages import DONE, Planned, Stage, plan_stages, run_stages
from w2s_jax.text.prompts import escape_notes
from w2s_jax.text.rows import Row


def run(
    config: ReasonConfig, where: StagesConfig, *, tell: Callable[[str], None] = lambda _: None
) -> str:
    """Do a run of weak-to-strong reasoning (arXiv 2407.13647), going on from what is done of it.

    Models are trained and answer in processes of their own, one after the other; this one starts no
    device.

    Args:
        config: what decides the run.
        where: the folders of its data and of its stages, and which of these to do.
        tell: called with a line for what may not be meant, and as stages begin and end.

    Returns:
        The report's tables, as Markdown; report.json, report.md and report.png are beside the
        stages.

    Raises:
        InputError: for settings or data with which a stage fails, and as `run_stages` does.
    """
    pipeline = Pipeline(config, Path(where.data), Path(where.output))
    stages = [planned.stage for planned in _planned(pipeline, where, tell)]
    figures = run_stages(stages, pipeline.root, first=where.first, last=where.last, tell=tell)
    drawn = [name for name in figures if name.endswith(SAMPLES)]
    samples = {name: pipeline.judged_samples(name) for name in drawn}
    return write_report(summarise(figures, samples, config.pass_at), pipeline.root)


def plan(
    config: ReasonConfig, where: StagesConfig, *, tell: Callable[[str], None] = lambda _: None
) -> list[Planned]:
    """What `run` would do with each stage, and what it costs; raises what it raises before any."""
    return _planned(Pipeline(config, Path(where.data), Path(where.output)), where, tell)


def _planned(pipeline: Pipeline, where: StagesConfig, tell: Callable[[str], None]) -> list[Planned]:
    stages = pipeline.stages()
    found = plan_stages(stages, pipeline.root, first=where.first, last=where.last)
    for line in check_run(pipeline, stages):
        tell(line)
    return found


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
    if "weak responses" in files:
        read_responses(files["weak responses"], pipeline.questions)
    if "demonstrations" in files:
        path, count = files["demonstrations"], config.demonstrations.count
        found = len(read_demonstrations(path))
        if found < count:
            raise InputError(
                f"{path}: {found} demonstrations, of which the first {count} are asked for; add to "
                "them, or lower demonstrations.count"
            )
    if any(not (pipeline.root / stage.name / DONE).exists() for stage in stages):
        _check_prompts(pipeline)
    rows = {"questions": pipeline.questions, "weak train": pipeline.solved}
    if config.test is not None:
        rows["test"] = pipeline.test
    told = escape_notes(config.decoding.stop)
    for asked, other in (
        ("questions", "weak train"), ("test", "questions"), ("test", "weak train"),
    ):  # fmt: skip
        if asked in files and other in files:
            told += _shared(rows[asked], files[asked], rows[other], files[other])
    return told


def _check_places(pipeline: Pipeline, stages: Sequence[Stage]) -> None:
    names = [*(stage.name for stage in stages), REPORT, TABLES, FIGURE]
    written = [pipeline.root.resolve() / name for name in names]
    read = [*pipeline.files.values(), *(locate(pipeline.place(name)) for name in pipeline.weights)]
    for path in read:
        for place in written:
            if place in (path.resolve(), *path.resolve().parents):
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
                raise error.at(f"{path} row {number} (id {row['id']!r})") from None


def _check_prompts(pipeline: Pipeline) -> None:
    """The prompts of both models as they stand before training, which changes no tokenizer.

    Drawn demonstrations are not known yet and are left out.
    """
    config, files = pipeline.config, pipeline.files
    weak = None if config.weak.model is None else pipeline.place(config.weak.model)
    shown = str(files["demonstrations"]) if "demonstrations" in files else None
    for is_test in (False, True) if "test" in files else (False,):
        asked = pipeline.answering(
            "strong", config.generation(), demonstrations=shown, is_test=is_test
        )
        # What is tuned later has the vocabulary of what it is tuned from.
        guide = weak if config.guided else None
        check_prompts(replace(asked, tuned=guide, untuned=guide), config.demonstrations.count)
        if weak is not None and (is_test or config.weak.responses is None):
            check_prompts(replace(asked, model=weak, demonstrations=None))


def _shared(
    rows: Sequence[Row], path: Path, others: Sequence[Mapping[str, Any]], elsewhere: Path
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
