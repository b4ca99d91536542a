"""What a run of training says: of its data, and in the table that ends it, of its last metrics."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from w2s_jax.text.token_rows import Data

SHOWN = (
    "loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected",
    "mean_token_accuracy", "kl",
)  # fmt: skip
EVAL = "eval/"


def tell_data(what: str, data: "Data") -> None:
    """A line about data that was read: how many rows and tokens, and what became of others."""
    figures = data.figures
    told = [f"{what}: {len(data):,} rows", f"{figures['tokens']:,} tokens"]
    told.append(f"{figures['targets']:,} of them count in the loss")
    others = {name: name for name in ("truncated", "dropped", "equal")}
    others["undesirable"] = "undesirable rows left out"
    told += [f"{figures[name]:,} {words}" for name, words in others.items() if figures.get(name)]
    print(", ".join(told), file=sys.stderr)


def print_run(folder: Path, step: int) -> None:
    """Print the last training row and the last evaluation of a run, side by side, to stdout."""
    from rich.console import Console
    from rich.table import Table

    from w2s_jax.train.records import read_metrics

    rows = [row for row in read_metrics(folder) if row["step"] <= step]
    training = _last(rows, "loss")
    held_out = _last(rows, f"{EVAL}loss")
    # A last batch without a desirable response has no margin, where held-out rows have one.
    names = [name for name in SHOWN if name in training or EVAL + name in held_out]
    if not names:
        return
    table = Table("after step", str(training["step"]), *(["held out"] if held_out else []))
    for name in names:
        cells = [_written(training.get(name))]
        if held_out:
            cells.append(_written(held_out.get(EVAL + name)))
        table.add_row(name, *cells)
    Console().print(table)
    told = [f"{training['num_tokens']:,} tokens"] if "num_tokens" in training else []
    print(", ".join([*told, f"{training['seconds']:.0f} s"]))


def print_rounding(before: Mapping[str, float], after: Mapping[str, float], dtype: str) -> None:
    """Print what an evaluation says of float32 weights, and of the same in another dtype."""
    from rich.console import Console
    from rich.table import Table

    table = Table("held out", "float32", dtype)
    for name in (name for name in SHOWN if name in before):
        table.add_row(name, f"{before[name]:.5f}", f"{after[name]:.5f}")
    Console().print(table)


def _last(rows: list[dict[str, Any]], name: str) -> Mapping[str, Any]:
    return next((row for row in reversed(rows) if name in row), {})


def _written(value: float | int | None) -> str:
    return "" if value is None else f"{value:.4f}"
