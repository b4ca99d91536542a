"""What a reasoning run found: one table of the models on the test, one of the data at each stage.

Reads the figures that stages leave; runs nothing.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from w2s_jax.errors import InputError
from w2s_jax.reasoning.measures import gap_recovered, majority_at_k, pass_at_k
from w2s_jax.text.rows import write_whole

FLOOR, CEILING = "weak", "ceiling"
REPORT, TABLES, FIGURE = "report.json", "report.md", "report.png"
_PREFIX = "test-"
# Two of Okabe and Ito's palette: told apart by colour-blind readers too.
_BAR, _LINE = "#0072B2", "#D55E00"


def summarise(
    figures: Mapping[str, Mapping[str, Any]],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    pass_at: Sequence[int],
) -> dict[str, Any]:
    """The run in one JSON value: "models", "data", "samples".

    figures: of the stages, by name. samples: graded rows with `answer`, the pred in canonical form,
    of each stage that drew several responses a question; those without gold are left out.
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
    """pass@k and majority@k, means over the questions, for each k that the samples allow.

    rows: graded, with "answer". Empty where no row has a verdict.
    """
    grouped: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        if isinstance(row.get("result"), bool):
            grouped.setdefault(row["id"], []).append(row)
    asked = list(grouped.values())
    return {
        str(k): {
            "pass": fmean(
                pass_at_k(len(each), sum(row["result"] for row in each), k) for each in asked
            ),
            "majority": fmean(_majority(each, k) for each in asked),
        }
        for k in pass_at
        if k <= min(map(len, asked), default=0)
    }


def _majority(rows: Sequence[Mapping[str, Any]], k: int) -> float:
    right = {row["answer"] for row in rows if row["result"]}
    return majority_at_k([row["answer"] for row in rows], right.__contains__, k)


def tables(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    models = [
        [name, _percent(found), _interval(found), _gap(found["gap_recovered"])]
        for name, found in summary["models"].items()
    ]
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
    """A PNG of the models' accuracies with their intervals; lines at the floor and the ceiling.

    Raises InputError without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "the report's figure needs matplotlib: pip install 'w2s-jax[plot]'"
        ) from None
    models = summary["models"]
    figure = Figure(figsize=(7, 0.9 + 0.36 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
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

    Returns the tables.
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


def _interval(found: Mapping[str, Any]) -> str:
    return f"{100 * found['low']:.1f} – {100 * found['high']:.1f}"


def _gap(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _percent(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f"{100 * found['value']:.1f} %"
