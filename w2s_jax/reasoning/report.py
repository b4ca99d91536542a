"""What a reasoning run found: one table of the models on the test, one of the data at each stage.

Reads the figures that stages leave; runs nothing.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from w2s_jax.errors import InputError
from w2s_jax.reasoning.measures import gap_recovered, majority_at_k, mean_over, pass_at_k
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
    if not grouped:
        return {}
    fewest = min(map(len, grouped.values()))
    found: dict[str, dict[str, float]] = {}
    for k in (k for k in pass_at if k <= fewest):
        passed = mean_over(
            pass_at_k(len(each), sum(row["result"] for row in each), k) for each in grouped.values()
        )
        voted = mean_over(_majority(each, k) for each in grouped.values())
        found[str(k)] = {"pass": passed or 0.0, "majority": voted or 0.0}
    return found


def _majority(rows: Sequence[Mapping[str, Any]], k: int) -> float:
    right = {row["answer"] for row in rows if row["result"]}
    return majority_at_k([row["answer"] for row in rows], right.__contains__, k)


def tables(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    parts = ["# Weak-to-strong reasoning\n"]
    if summary["models"]:
        rows = [
            [name, _percent(found["value"]), _interval(found), _gap(found["gap_recovered"])]
            for name, found in summary["models"].items()
        ]
        parts.append(_table(["model", "accuracy", "95 % interval", "gap recovered"], rows))
    sets = [
        [stage, str(part["name"]), f"{part['size']:,}", _accuracy(part["accuracy"])]
        for stage, found in summary["data"].items()
        for part in found.get("sets", ())
    ]
    if sets:
        parts.append("## Sets\n")
        parts.append(_table(["stage", "set", "rows", "accuracy"], sets))
    answered = [
        [stage, f"{found['rows']:,}", f"{found['answered']:,}", _accuracy(found.get("accuracy"))]
        for stage, found in summary["data"].items()
        if "answered" in found
    ]
    if answered:
        parts.append("## Responses\n")
        parts.append(_table(["stage", "rows", "with an answer", "accuracy"], answered))
    for stage, found in summary["samples"].items():
        parts.append(f"## {stage}\n")
        rows = [[k, _percent(v["pass"]), _percent(v["majority"])] for k, v in found.items()]
        parts.append(_table(["k", "pass@k", "majority@k"], rows))
    return "\n".join(parts)


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
    shares = [100 * models[name]["value"] for name in names]
    errors = [
        [100 * (models[name]["value"] - models[name]["low"]) for name in names],
        [100 * (models[name]["high"] - models[name]["value"]) for name in names],
    ]
    axes.barh(names, shares, xerr=errors, color=_BAR, ecolor="black", capsize=2)
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


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(found: Mapping[str, Any]) -> str:
    return f"{100 * found['low']:.1f} – {100 * found['high']:.1f}"


def _accuracy(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else _percent(found["value"])


def _gap(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
