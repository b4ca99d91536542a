"""A benchmark's points: one of its sizes takes several values, and each is measured in turn."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from w2s_jax.bench.config import DecodingConfig
from w2s_jax.bench.setup import told_machine, write_figures
from w2s_jax.errors import InputError

Options = TypeVar("Options", bound=DecodingConfig)
Figures = TypeVar("Figures")

SIZES = (
    "batch_size", "beam_width", "successors", "chunk_length", "samples", "prompt_tokens",
    "max_new_tokens",
)  # fmt: skip
TOGETHER = {"wk": ("beam_width", "successors")}
"""Sizes that change together, whose values are joined by an x."""


def points(options: Options) -> dict[str, Options]:
    """The options of each point by its name, such as `batch_size=4`; without a curve one of "".

    Raises:
        InputError: For a size that has no curve, and for values that are no whole numbers.
    """
    own = {field.name for field in fields(options)}
    sizes_of = {name: (name,) for name in SIZES} | TOGETHER
    known = [name for name, sizes in sizes_of.items() if own.issuperset(sizes)]
    found: dict[str, Options] = {}
    for curve in options.curve:
        name, _, values = curve.partition("=")
        name = name.replace("-", "_").lower()
        if name not in known:
            raise InputError(f"--curve {curve}: the sizes of a curve are {', '.join(known)}")
        sizes = sizes_of[name]
        for value in values.split(","):
            try:
                numbers: dict[str, Any] = dict(zip(sizes, map(int, value.split("x")), strict=True))
            except ValueError:
                form = "x".join("V" for _ in sizes)
                raise InputError(f"--curve {curve}: write {name}={form},{form},..") from None
            found[f"{name}={value}"] = replace(options, curve=(), **numbers)
    return found or {"": options}


def run_points(
    options: Options,
    measure: Callable[[Options], Figures],
    report: Callable[[Console, Options, Figures], None],
    cells: Callable[[Figures], Mapping[str, str]],
) -> list[Figures]:
    """Measure every point and report it; print a table of a curve, and write all figures.

    Args:
        options: The settings.
        measure: What measures one point.
        report: Prints the figures of one.
        cells: The columns of the table, and a point's entries.
    """
    console = Console()
    console.print(told_machine())
    found: dict[str, Figures] = {}
    for name, point in points(options).items():
        found[name] = measure(point)
        report(console, point, found[name])
    rows: dict[str, Any] = {name: asdict(one) for name, one in found.items()}  # type: ignore[call-overload]
    if options.curve:
        # With lines between its columns it would not fit into 80 letters.
        table = Table("", *cells(next(iter(found.values()))), box=None)
        for name, figures in found.items():
            table.add_row(name, *cells(figures).values())
        console.print(table)
        write_figures(options, {"curve": rows})
    else:
        write_figures(options, rows[""])
    return list(found.values())
