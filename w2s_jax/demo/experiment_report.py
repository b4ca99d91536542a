"""Figures, table and picture of the controlled-sentiment experiment, from the rows of its methods.

Runs no model; the rows are made in experiment.py.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from w2s_jax.demo.experiment import BASE, BEST_OF_N, DIRECT
from w2s_jax.errors import InputError
from w2s_jax.evaluate.compare import compare, mean_and_stderr
from w2s_jax.text.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADINGS = (
    "method", "gold reward", "over base", "over best-of-{n}", "log-prob per token",
    "log-prob per response", "KL estimate",
)  # fmt: skip
GAIN_COLUMNS = (BASE, BEST_OF_N)
# Two of Okabe and Ito's palette: told apart by colour-blind readers too.
BAR, LINE = "#0072B2", "#D55E00"


def best_of_n_bound(samples: int) -> float:
    """log N − (N − 1)/N: the most that best-of-N moves away from what it samples; in nats of KL.

    Source: arXiv 2401.01879, which proves that this well-known formula is an upper bound.
    """
    return math.log(samples) - (samples - 1) / samples


def summarise_experiment(
    rows: Mapping[str, Sequence[Row]], headings: Mapping[str, str], *, samples: int
) -> dict[str, Any]:
    """Means with standard errors over prompts of each method; paired comparisons with two of them.

    `rows` holds, by method, those of `experiment.answer` over the same prompts. A figure is {mean,
    stderr}; kl is None where a method has no likelihood, and kl_bound is best-of-N's alone. Paired
    figures are those of `evaluate.compare.compare`, a METHOD-base or METHOD-bon each.
    """
    methods = {name: {"heading": headings[name]} | _figures(found) for name, found in rows.items()}
    methods[BEST_OF_N]["kl_bound"] = best_of_n_bound(samples)
    gold = {name: _column(found, "gold_reward") for name, found in rows.items()}
    paired = {
        f"{name}-{other}": asdict(compare(gold[name], gold[other]))
        for other in GAIN_COLUMNS
        for name in rows
        if name not in GAIN_COLUMNS[: GAIN_COLUMNS.index(other) + 1]
    }
    return {"prompts": len(gold[BASE]), "samples": samples, "methods": methods, "paired": paired}


def _figures(rows: Sequence[Row]) -> dict[str, Any]:
    lengths = np.array([len(row["tokens"]) for row in rows], np.float64)
    logprobs = _column(rows, "logprob")
    has_ratio = rows[0]["log_ratio"] is not None
    return {
        "gold_reward": _figure(_column(rows, "gold_reward")),
        "logprob_per_token": _figure(logprobs / lengths),
        "logprob": _figure(logprobs),
        "tokens": _figure(lengths),
        "kl": _figure(_column(rows, "log_ratio")) if has_ratio else None,
    }


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], np.float64)


def _figure(values: np.ndarray) -> dict[str, float | None]:
    mean, stderr = mean_and_stderr(values)
    return {"mean": mean, "stderr": stderr}


def result_table(summary: Mapping[str, Any]) -> str:
    """A Markdown table of a summary, each figure with its standard error; a line a method."""
    headings = [text.format(n=summary["samples"]) for text in HEADINGS]
    lines = [_line(headings), _line(["---"] * len(headings))]
    for name, figures in summary["methods"].items():
        gains = (summary["paired"].get(f"{name}-{other}") for other in GAIN_COLUMNS)
        cells = [
            figures["heading"],
            _shown(figures["gold_reward"]),
            *("" if gain is None else _difference(gain) for gain in gains),
            _shown(figures["logprob_per_token"], sign=""),
            _shown(figures["logprob"], sign="", digits=1),
            _kl(figures),
        ]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _shown(figure: Mapping[str, float | int], *, sign: str = "+", digits: int = 2) -> str:
    return f"{figure['mean']:{sign}.{digits}f} ± {figure['stderr']:.{digits}f}"


def _difference(comparison: Mapping[str, float | int]) -> str:
    return f"{comparison['difference']:+.2f} ± {comparison['difference_stderr']:.2f}"


def _kl(figures: Mapping[str, Any]) -> str:
    if figures["kl"] is not None:
        return "0" if not figures["kl"]["mean"] else _shown(figures["kl"], sign="", digits=1)
    return f"≤ {figures['kl_bound']:.1f}" if "kl_bound" in figures else "–"


def need_matplotlib() -> None:
    """Raise InputError where the picture could not be drawn, before hours are spent on it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError(
            "the evaluation draws a figure with matplotlib; pip install 'w2s-jax[plot]'"
        ) from None


def draw_experiment(summary: Mapping[str, Any]) -> bytes:
    """A PNG: gold reward by method, and beside it the log-prob per token under the policy.

    Bars have standard errors over prompts. The directly tuned policy is also a line, which the
    methods that leave the policy as it is are measured by.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 0.55 * len(summary["methods"]) + 1.3), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_bars(left, summary["methods"], "gold_reward", "gold reward (log-odds of “positive”)")
    _draw_bars(
        right, summary["methods"], "logprob_per_token", "log-prob per token under the policy (nats)"
    )
    figure.suptitle(f"{summary['prompts']} openings of IMDb test reviews", fontsize=10)
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=130)
    return held.getvalue()


def _draw_bars(axis: "Axes", methods: Mapping[str, Any], name: str, title: str) -> None:
    figures = [method[name] for method in methods.values()]
    axis.barh(
        [method["heading"] for method in methods.values()],
        [figure["mean"] for figure in figures],
        xerr=[figure["stderr"] for figure in figures],
        color=BAR,
        height=0.6,
        capsize=3,
    )
    if DIRECT in methods:
        axis.axvline(methods[DIRECT][name]["mean"], color=LINE, linestyle="--", linewidth=1)
    axis.axvline(0.0, color="black", linewidth=0.6)
    if not axis.yaxis_inverted():
        axis.invert_yaxis()
    axis.set_xlabel(title, fontsize=9)
    axis.tick_params(labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)
