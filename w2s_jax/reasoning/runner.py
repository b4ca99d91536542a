"""A reasoning run: checks for what would fail after hours, then its stages, then its report.

The checks read files, configs and tokenizers, but no weights, and use no device. The report has a
table of the models on the test and one of the data at each stage, from the stages' figures.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from w2s_jax.errors import InputError
from w2s_jax.models.huggingface import locate
from w2s_jax.reasoning.answers import gold_answer, make_checker
from w2s_jax.reasoning.config import ReasonConfig, StagesConfig
from w2s_jax.reasoning.generation import check_prompts
from w2s_jax.reasoning.measures import gap_recovered, majority_at_k, pass_at_k
from w2s_jax.reasoning.pipeline import SAMPLES, Pipeline
from w2s_jax.reasoning.questions import read_demonstrations, read_questions, read_responses
from w2s_jax.reasoning.stages import DONE, Planned, Stage, plan_stages, run_stages
from w2s_jax.text.prompts import escape_notes
from w2s_jax.text.rows import Row, write_whole
from w2s_jax.train.curves import new_figure

FLOOR, CEILING = "weak", "ceiling"
REPORT, TABLES, FIGURE = "report.json", "report.md", "report.png"
_PREFIX = "test-"
# Two colours of Okabe and Ito's palette, which colour-blind readers can distinguish.
_BAR, _LINE = "#0072B2", "#D55E00"


def run(
    config: ReasonConfig, where: StagesConfig, *, tell: Callable[[str], None] = lambda _: None
) -> str:
    """Run weak-to-strong reasoning (arXiv 2407.13647), resuming from the stages that are done.

    Models are trained and answer in separate processes, one after the other; this one uses no
    device.

    Args:
        config: The run's settings.
        where: The folders of its data and of its stages, and which stages to run.
        tell: Called with a line for anything suspicious, and as stages begin and end.

    Returns:
        The report's tables, as Markdown; report.json, report.md and report.png lie beside the
        stages.

    Raises:
        InputError: For settings or data with which a stage would fail, and as `run_stages` does.
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
    """What `run` would do with each stage, and its cost; raises as `run` does before any stage."""
    return _planned(Pipeline(config, Path(where.data), Path(where.output)), where, tell)


def _planned(pipeline: Pipeline, where: StagesConfig, tell: Callable[[str], None]) -> list[Planned]:
    stages = pipeline.stages()
    found = plan_stages(stages, pipeline.root, first=where.first, last=where.last)
    for line in check_run(pipeline, stages):
        tell(line)
    return found


def check_run(pipeline: Pipeline, stages: Sequence[Stage]) -> list[str]:
    """Check a run's files before its stages.

    Returns:
        A line for each thing that is valid but may be unintended.

    Raises:
        InputError: Naming file and row, for a checker that cannot be made, needed gold answers that
            are missing or unreadable, responses to other questions, fewer demonstrations than asked
            for, inputs in the folder of a stage, guides without the strong model's vocabulary, and
            prompts that do not fit a model.
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
        within = {path.resolve(), *path.resolve().parents}.intersection(written)
        if within:
            raise InputError(
                f"{path} is read, and lies in what the run writes ({min(within)}); name another "
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
    """Check the prompts of both models before training, which changes no tokenizer.

    Demonstrations that are drawn are not known yet, and are left out.
    """
    config, files = pipeline.config, pipeline.files
    weak = None if config.weak.model is None else pipeline.place(config.weak.model)
    shown = str(files["demonstrations"]) if "demonstrations" in files else None
    for is_test in (False, True) if "test" in files else (False,):
        asked = pipeline.answering(
            "strong", config.generation(), demonstrations=shown, is_test=is_test
        )
        # A tuned model has the vocabulary of the model it is tuned from.
        guide = weak if config.guided else None
        check_prompts(replace(asked, tuned=guide, untuned=guide), config.demonstrations.count)
        if weak is not None and (is_test or config.weak.responses is None):
            check_prompts(replace(asked, model=weak, demonstrations=None))


def _shared(
    rows: Sequence[Row], path: Path, others: Sequence[Mapping[str, Any]], elsewhere: Path
) -> list[str]:
    """A line if questions of one file are in another one too."""
    asked = {row["question"].strip(): n for n, row in enumerate(others, start=1)}
    texts = enumerate((row["question"].strip() for row in rows), start=1)
    both = [(number, text) for number, text in texts if text in asked]
    if not both:
        return []
    number, text = both[0]
    return [
        f"note: {len(both):,} of the {len(rows):,} questions of {path} are in {elsewhere} too, "
        f"first row {number}, there row {asked[text]}; figures on them flatter"
    ]


# --- The report -----------------------------------------------------------------------------------


def summarise(
    figures: Mapping[str, Mapping[str, Any]],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    pass_at: Sequence[int],
) -> dict[str, Any]:
    """The run as one JSON value: "models", "data", "samples".

    Args:
        figures: The stages' figures, by stage.
        samples: Graded rows of each stage with several responses per question, with `answer`, the
            pred in canonical form; rows without gold are left out.
        pass_at: The k of pass@k and majority@k.
    """
    tested = {
        name.removeprefix(_PREFIX): found["accuracy"]
        for name, found in figures.items()
        if name.startswith(_PREFIX) and found.get("accuracy")
    }
    floor, ceiling = (tested.get(name, {}).get("value") for name in (FLOOR, CEILING))
    models = {}
    for name, found in tested.items():
        gap = None
        if floor is not None and ceiling is not None and name not in (FLOOR, CEILING):
            gap = gap_recovered(floor, found["value"], ceiling)
        models[name] = {**found, "gap_recovered": gap}
    data = {name: found for name, found in figures.items() if not name.startswith(_PREFIX)}
    drawn = {name: sample_measures(rows, pass_at) for name, rows in samples.items()}
    return {"models": models, "data": data, "samples": {k: v for k, v in drawn.items() if v}}


def sample_measures(
    rows: Sequence[Mapping[str, Any]], pass_at: Sequence[int]
) -> dict[str, dict[str, float]]:
    """pass@k and majority@k, means over the questions, for each k up to the number of samples.

    `rows` are graded and have "answer". Empty if no row has a verdict.
    """
    grouped: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        if isinstance(row.get("result"), bool):
            grouped.setdefault(row["id"], []).append(row)
    asked = list(grouped.values())
    rights = [{row["answer"] for row in each if row["result"]} for each in asked]
    return {
        str(k): {
            "pass": fmean(
                pass_at_k(len(each), sum(row["result"] for row in each), k) for each in asked
            ),
            "majority": fmean(
                majority_at_k([row["answer"] for row in each], right.__contains__, k)
                for each, right in zip(asked, rights, strict=True)
            ),
        }
        for k in pass_at
        if k <= min(map(len, asked), default=0)
    }


def tables(summary: Mapping[str, Any]) -> str:
    """The summary's tables as Markdown."""
    models = []
    for name, found in summary["models"].items():
        gap, ends = found["gap_recovered"], (100 * found["low"], 100 * found["high"])
        interval, told = f"{ends[0]:.1f} – {ends[1]:.1f}", "" if gap is None else f"{gap:.2f}"
        models.append([name, _percent(found), interval, told])
    sets = [
        [stage, str(part["name"]), f"{part['size']:,}", _percent(part["accuracy"])]
        for stage, found in summary["data"].items()
        for part in found.get("sets", ())
    ]
    answered = [
        [stage, f"{found['rows']:,}", f"{found['answered']:,}", _percent(found.get("accuracy"))]
        for stage, found in summary["data"].items()
        if "answered" in found
    ]
    sections = [
        ("", ["model", "accuracy", "95 % interval", "gap recovered"], models),
        ("## Sets\n\n", ["stage", "set", "rows", "accuracy"], sets),
        ("## Responses\n\n", ["stage", "rows", "with an answer", "accuracy"], answered),
    ]
    for stage, found in summary["samples"].items():
        shares = [
            [k, *(f"{100 * share[name]:.1f} %" for name in ("pass", "majority"))]
            for k, share in found.items()
        ]
        sections.append((f"## {stage}\n\n", ["k", "pass@k", "majority@k"], shares))
    parts = [title + _table(headings, rows) for title, headings, rows in sections if rows]
    return "\n".join(["# Weak-to-strong reasoning\n", *parts])


def draw(summary: Mapping[str, Any]) -> bytes:
    """A PNG of the models' accuracies with intervals, and lines at the floor and the ceiling.

    Raises:
        InputError: If matplotlib is missing.
    """
    models = summary["models"]
    try:
        figure = new_figure(7, 0.9 + 0.36 * len(models))
    except InputError:
        told = "the report's figure needs matplotlib: pip install 'w2s-jax[plot]'"
        raise InputError(told) from None
    axes = figure.add_subplot()
    names = list(models)[::-1]
    value, low, high = (
        np.array([100 * models[name][end] for name in names]) for end in ("value", "low", "high")
    )
    errors = [value - low, high - value]
    axes.barh(names, value, xerr=errors, color=_BAR, ecolor="black", capsize=2)
    for name in (FLOOR, CEILING):
        if name in models:
            axes.axvline(100 * models[name]["value"], color=_LINE, linewidth=1, linestyle="--")
    axes.set_xlabel("accuracy on the test (%), 95 % intervals; dashed: weak floor, strong ceiling")
    axes.set_xlim(left=0)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def write_report(summary: Mapping[str, Any], root: Path) -> str:
    """Write report.json, report.md and, with matplotlib and tested models, report.png.

    Returns:
        The tables.
    """
    text = tables(summary)
    write_whole(root / REPORT, [json.dumps(summary, indent=2).encode(), b"\n"])
    write_whole(root / TABLES, [text.encode()])
    if summary["models"]:
        try:
            write_whole(root / FIGURE, [draw(summary)])
        except InputError as error:
            text += f"\n{error}\n"
    return text


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _percent(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f"{100 * found['value']:.1f} %"
