"""The matrix of plans as files: a table in Markdown and all figures as JSON, row by row.

A file that is there is taken up again, so that a run that was stopped goes on.
"""

import importlib.metadata
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2s_jax.errors import InputError, check_fetched
from w2s_jax.plan.matrix import SETTINGS, Cell, Row
from w2s_jax.plan.measure import GIB
from w2s_jax.text.atomic import check_writable, write_whole

MIB = 2**20
_HEAD = (
    "plan", "slice", "devices", "mesh", "rows", "GiB held", "GiB beside", "GiB", "of", "MiB sent",
    "tokens/s, estimated", "compiled in", "smaller slices",
)  # fmt: skip
_ABOUT = """# What fits which slice

Made by `w2s plan matrix`: programs compiled for slices with the TPU compiler, without a slice.
Each row is the smallest slice of the chip's list that fits, with the mesh that fits it; figures
are of each device. *Rows* are prompts side by side, or examples that a step reads at a time.
*Held* stays between programs (weights, optimizer, caches), *beside* is what the neediest program
takes for a while, *of* what a program may take in all. *Sent* is what one call of every program
exchanges: a chunk and a prompt of a search, a step of a training. Tokens a second are an estimate
from published rates of the chip, with nothing measured: kept tokens of responses in a search,
tokens read in a training.

"""


@dataclass(frozen=True)
class Records:
    """The files of a matrix, either of which may be None, and the rows that they hold by name.

    compiler, settings: what the rows were made with, as the files say it.
    """

    table: Path | None
    figures: Path | None
    compiler: str
    settings: str
    lines: dict[str, str]
    rows: dict[str, Any]

    def lacks(self, cell: Cell) -> bool:
        """Whether a file lacks the row of a cell."""
        in_table = self.table is None or cell.name in self.lines
        return not in_table or (self.figures is not None and cell.name not in self.rows)

    def keep(self, row: Row, order: Sequence[Cell]) -> None:
        """Add a row to the files; rows stand in the order of the cells."""
        self.lines[row.cell.name] = line_of(row)
        self.rows[row.cell.name] = row.as_row()
        names = [cell.name for cell in order]
        if self.table is not None:
            write_whole(self.table, [self.text(names).encode()])
        if self.figures is not None:
            rows = [self.rows[name] for name in names if name in self.rows]
            found = {"compiler": self.compiler, "settings": self.settings, "rows": rows}
            write_whole(self.figures, [json.dumps(found, indent=1).encode(), b"\n"])

    def text(self, names: Sequence[str]) -> str:
        """The table in Markdown, of those rows that there are."""
        head = [f"| {' | '.join(_HEAD)} |", f"|{'---|' * len(_HEAD)}"]
        own = [self.lines[name] for name in names if name in self.lines]
        about = f"{_ABOUT}{textwrap.fill(self.settings, 100)}\n\n{self.compiler}\n\n"
        return about + "\n".join([*head, *own]) + "\n"


def open_records(table: Path | None, figures: Path | None, compiler: str, settings: str) -> Records:
    """The files of a matrix, with the rows that are there; rows that are cut are left out.

    Raises InputError for a file that holds something else, and for one of another compiler or of
    other settings.
    """
    for path in filter(None, (table, figures)):
        check_writable(path)
    lines = {} if table is None else _read_table(table, compiler, settings)
    rows = {} if figures is None else _read_figures(figures, compiler, settings)
    return Records(table, figures, compiler, settings, lines, rows)


def settings_of(tries: int) -> str:
    """What rows are planned with, as the files say it; `tries` meshes of a slice are compiled."""
    return f"{SETTINGS} Meshes of a slice that are compiled: {tries} at most."


def compiler_of() -> str:
    """The versions that rows are compiled with, as the files say it."""
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    return f"Compiled with {', '.join(versions)}."


def line_of(row: Row) -> str:
    """A row of the table."""
    # Of what was tried of a slice the last needs least.
    refused = "; ".join(f"{at.partition(':')[2]} {why}" for at, why in dict(row.refused).items())
    plan = row.plan
    if plan is None:
        cells = [row.cell.name, "none fits", *("",) * (len(_HEAD) - 3), refused]
    else:
        cells = [
            row.cell.name,
            plan.topology,
            str(plan.devices),
            plan.mesh,
            str(row.rows),
            f"{sum(plan.held.values()) / GIB:.2f}",
            f"{plan.temporaries / GIB:.2f}",
            f"{plan.needed / GIB:.2f}",
            f"{plan.memory / GIB:.2f}",
            f"{plan.moved / MIB:,.0f}",
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.compile_seconds:.0f} s",
            refused,
        ]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _read_table(path: Path, compiler: str, settings: str) -> dict[str, str]:
    if not path.exists():
        return {}
    check_fetched(path)
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError:
        text = ""
    lines = text.splitlines()
    told = next((one for one in lines if one.startswith("Compiled with ")), None)
    if f"| {' | '.join(_HEAD)} |" not in lines or told is None:
        raise InputError(f"{path}: not a table of `w2s plan matrix`; name another file")
    # Lines may be broken elsewhere, also at a hyphen.
    parts = ("".join(part.split()) for part in text.split("\n\n"))
    _check(path, told, compiler, "".join(settings.split()) in parts)
    rows = [line for line in lines if line.startswith("| ") and line.endswith(" |")]
    columns = {row: row.removeprefix("| ").removesuffix(" |").split(" | ") for row in rows}
    whole = {cells[0]: row for row, cells in columns.items() if len(cells) == len(_HEAD)}
    return {name: row for name, row in whole.items() if name != _HEAD[0]}


def _read_figures(path: Path, compiler: str, settings: str) -> dict[str, Any]:
    if not path.exists():
        return {}
    check_fetched(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows, told = {row["cell"]: row for row in found["rows"]}, found["compiler"]
        if not told.isprintable():
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path}: not figures of `w2s plan matrix`; name another file") from None
    _check(path, told, compiler, found.get("settings") == settings)
    return {name: row for name, row in rows.items() if _is_whole(row)}


def _is_whole(row: dict[str, Any]) -> bool:
    """Whether a row of the figures has its plan, which is None where none fits."""
    return {"refused", "rows", "plan"} <= set(row) and isinstance(row["plan"], dict | None)


def _check(path: Path, told: str, compiler: str, same_settings: bool) -> None:
    if told != compiler:
        raise InputError(
            f"{path}: its rows were {told[:1].lower()}{told[1:-1]}, and here is "
            f"{compiler.removeprefix('Compiled with ')[:-1]}; name another file, or delete it"
        )
    if not same_settings:
        raise InputError(
            f"{path}: its rows were planned with other settings, or with another --try; name "
            "another file, or delete it"
        )
