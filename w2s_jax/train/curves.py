"""Curves of one or several training runs, drawn to a PNG from their metrics files."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w2s_jax.errors import InputError
from w2s_jax.text.rows import check_writable, write_whole
from w2s_jax.train.config import PlotConfig
from w2s_jax.train.watch import METRICS, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[list[int], list[float]]
Run = dict[str, Curve]
"""(steps, values) by metric name."""

PANELS: dict[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "rewards": ("rewards/chosen", "rewards/rejected", "rewards/margins"),
    "accuracy": ("rewards/accuracies", "mean_token_accuracy"),
    "log-probs": ("logps/chosen", "logps/rejected"),
    "learning rate": ("learning_rate",),
    "gradient norm": ("grad_norm",),
    "tokens per second": ("tokens_per_second",),
}
"""Metrics that share a panel by default; an evaluation is drawn in the panel of its metric."""

EVAL = "eval/"
STYLES = ("-", "--", ":", "-.")
LARGEST = 1e300
# Okabe and Ito's palette, which colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plot(config: PlotConfig) -> Path:
    """Draw the curves of training runs to a PNG file.

    Returns:
        The path of the file.

    Raises:
        InputError: If no run is named, a folder is not that of a run, a metric is in none of them,
            matplotlib is missing, or the file cannot be written.
    """
    if not config.runs:
        raise InputError("RUN_DIR is missing: the folder of a training run")
    runs = [read_run(folder) for folder in config.runs]
    output = Path(config.output or Path(config.runs[0]) / "curves.png")
    check_writable(output)
    draw(runs, run_names(config.runs), output, config.metrics)
    return output


def read_run(folder: str | Path) -> Run:
    """The curves of a run; those of evaluations have names that begin with "eval/".

    Texts are left out, and so are numbers that are not finite or beyond 1e300.

    Raises:
        InputError: If the folder has no metrics, or rows of another kind of file.
    """
    rows = read_metrics(folder)
    if not rows:
        raise InputError(f"{Path(folder) / METRICS}: no rows; name the folder of a training run")
    curves: Run = {}
    for number, row in enumerate(rows, start=1):
        if not (_is_number(row["step"]) and row["step"] == int(row["step"])):
            raise InputError(
                f"{Path(folder) / METRICS} line {number}: step is {row['step']!r}, no whole "
                "number; name the folder of a training run"
            )
        for name, value in row.items():
            if name != "step" and _is_number(value):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(int(row["step"]))
                values.append(float(value))
    return curves


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST


def run_names(folders: Sequence[str | Path]) -> list[str]:
    """Names of the runs in the legend: each folder's name, or its path if two names are equal."""
    names = [Path(folder).resolve().name for folder in folders]
    same = len(set(names)) < len(names)
    return [str(folder) for folder in folders] if same else names


def choose_panels(runs: Sequence[Run], metrics: Sequence[str] = ()) -> dict[str, list[str]]:
    """The metrics of each panel, by title; only metrics that some run has.

    Args:
        runs: The runs' curves.
        metrics: Metrics to draw, each in a panel of its own; empty for the usual panels.

    Raises:
        InputError: If no run has one of `metrics`, or there is nothing to draw.
    """
    known = list(dict.fromkeys(name for run in runs for name in run))
    if not known:
        raise InputError("nothing to draw: the rows of these runs hold no numbers beside steps")
    for name in metrics:
        if name not in known:
            raise InputError(f"--metrics {name}: not in these runs; they have {', '.join(known)}")
    if metrics:
        return {name: [name] for name in metrics}
    panels = {
        title: [each for name in names for each in (name, EVAL + name) if each in known]
        for title, names in PANELS.items()
    }
    used = {name for names in panels.values() for name in names}
    panels |= {name: [name] for name in known if name.startswith(EVAL) and name not in used}
    if not any(panels.values()):
        raise InputError(f"nothing usual to draw; give --metrics, of {', '.join(known)}")
    return {title: names for title, names in panels.items() if names}


def draw(
    runs: Sequence[Run], names: Sequence[str], output: Path, metrics: Sequence[str] = ()
) -> None:
    """Draw runs over one another, one panel per group of metrics, to a PNG file.

    A run keeps its colour and a metric its line style; evaluations have dots. With a single run the
    colours distinguish its metrics.

    Args:
        runs: Each run's curves.
        names: The runs' names in the legend.
        output: The file.
        metrics: Metrics to draw, each in a panel of its own; empty for the usual panels.

    Raises:
        InputError: If matplotlib is missing, or the file cannot be written.
    """
    panels = choose_panels(runs, metrics)
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = new_figure(4.6 * columns, 3.2 * lines)
    axes: Any = figure.subplots(lines, columns, squeeze=False)
    for axis, (title, panel) in zip(axes.flat, panels.items(), strict=False):
        _draw_panel(axis, title, panel, runs, names)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    write_whole(output, [as_png(figure)])


def _draw_panel(
    axis: "Axes", title: str, metrics: Sequence[str], runs: Sequence[Run], names: Sequence[str]
) -> None:
    plain = list(dict.fromkeys(name.removeprefix(EVAL) for name in metrics))
    for place, (run, label) in enumerate(zip(runs, names, strict=True)):
        for name in metrics:
            if name not in run:
                continue
            index = plain.index(name.removeprefix(EVAL))
            evaluated = name.startswith(EVAL)
            axis.plot(
                *run[name],
                color=COLOURS[(place if len(runs) > 1 else index) % len(COLOURS)],
                linestyle=STYLES[index % len(STYLES)] if len(runs) > 1 else "-",
                linewidth=0.8 if evaluated else 1.3,
                marker="o" if evaluated or len(run[name][0]) == 1 else None,
                markersize=3.5,
                label=" ".join(filter(None, [label * (len(runs) > 1), name])),
            )
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False)


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure that can be drawn without a display.

    Args:
        width: In inches.
        height: In inches.

    Raises:
        InputError: If matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("drawing needs matplotlib; pip install 'w2s-jax[plot]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_png(figure: "Figure") -> bytes:
    """A matplotlib figure as the bytes of a PNG file."""
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=130)
    return written.getvalue()
