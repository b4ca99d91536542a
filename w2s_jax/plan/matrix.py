"""The matrix of plans: every chip, model size and work, each on the smallest slice that fits.

Settings are constants here, so that a committed table can be reproduced. It is written row by row
as a Markdown table and as JSON; an existing file is continued, so that a run that was stopped
resumes.
"""

import importlib.metadata
import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from w2s_jax.errors import InputError, check_fetched
from w2s_jax.models.lora import LoraConfig
from w2s_jax.plan.config import PlanMatrixConfig
from w2s_jax.plan.planning import GIB, Plan, Tell, Trials, Trying, gib, try_slices
from w2s_jax.plan.programs import GuideShapes, SearchShapes, Shapes, shape_of
from w2s_jax.plan.topology import check_compiler, topologies
from w2s_jax.search.config import cbs
from w2s_jax.text.rows import check_writable, locked, write_whole
from w2s_jax.train.estimate import TrainingShapes

FAMILIES = ("v5e", "v5p", "v6e")
MODELS = {
    "8B": "meta-llama/Meta-Llama-3-8B-Instruct",
    "70B": "meta-llama/Meta-Llama-3-70B-Instruct",
}
GUIDE = "HuggingFaceH4/zephyr-7b-beta"
WORKS = ("search", "sft", "dpo")
TUNINGS = ("lora", "full")
BEAM, PROMPTS, PROMPT_TOKENS, NEW_TOKENS = (2, 2, 30), 16, 512, 2048
ROWS, LENGTH, RANK = 16, 2048, 16
SHARING = 4
"""Devices that share an example if it does not fit one."""
SETTINGS = (
    f"Search: W, K, L = {', '.join(map(str, BEAM))}, {PROMPTS} prompts of {PROMPT_TOKENS} tokens "
    f"side by side, responses of {NEW_TOKENS:,}, guides {GUIDE}. Training: examples (for dpo "
    f"pairs) of {LENGTH:,} tokens, {ROWS} a step or as many as there are devices, one for each "
    f"device at a time or, on slices too small for that, one for each {SHARING}; adamw, everything "
    f"computed again in the backward pass, LoRA of rank {RANK}."
)


@dataclass(frozen=True)
class Cell:
    """What is planned.

    Attributes:
        family: The chip.
        size: The model size.
        work: search, sft or dpo.
        tuning: lora or full; empty for a search.
    """

    family: str
    size: str
    work: str
    tuning: str = ""

    @property
    def name(self) -> str:
        """Its words, as in the table and in --only."""
        return " ".join(filter(None, (self.family, self.size, self.work, self.tuning)))

    def shapes(self, devices: int) -> tuple[Shapes, ...]:
        """What to plan on so many devices, and what to plan instead if that does not fit."""
        model = shape_of(MODELS[self.size])
        if self.work == "search":
            guide = shape_of(GUIDE)
            config = cbs(*BEAM, max_new_tokens=NEW_TOKENS)
            guides = (GuideShapes(guide, guide),)
            return (SearchShapes(model, guides, config, PROMPT_TOKENS, PROMPTS),)
        rows = max(ROWS, devices)
        objective: Literal["sft", "dpo"] = "dpo" if self.work == "dpo" else "sft"
        lora = LoraConfig(rank=RANK) if self.tuning == "lora" else None
        return tuple(
            TrainingShapes(model, objective, rows, LENGTH, sharing * rows // devices, lora)
            for sharing in (1, SHARING)
            if sharing <= devices
        )


@dataclass(frozen=True)
class MatrixRow:
    """A cell with its plan.

    Attributes:
        cell: The cell.
        plan: The plan on the smallest slice that fits; None if none of the list does.
        refused: Smaller slices, each with the reason.
        rows: Prompts side by side, or examples at a time.
    """

    cell: Cell
    plan: Plan | None
    refused: tuple[tuple[str, str], ...]
    rows: int

    def as_row(self) -> dict[str, Any]:
        """The row as JSON."""
        plan = None if self.plan is None else self.plan.as_row()
        told = {"refused": self.refused, "rows": self.rows, "plan": plan}
        return {"cell": self.cell.name, **asdict(self.cell), **told}


def cells(only: str = "") -> list[Cell]:
    """The cells of the matrix, or those that some words select, such as "v5e,70B,dpo,lora".

    Several words of one kind select any of them; words of different kinds must all match.

    Raises:
        InputError: For an unknown word, and for words that match no cell.
    """
    words = {word.strip() for word in only.split(",")} - {""}
    kinds: tuple[Sequence[str], ...] = (FAMILIES, tuple(MODELS), WORKS, TUNINGS)
    unknown = sorted(words.difference(*kinds))
    if unknown:
        known = ", ".join(word for kind in kinds for word in kind)
        raise InputError(f"--only {only!r}: no word {unknown[0]!r}; the words are {known}")
    wanted = [set(kind) & words or {*kind, ""} for kind in kinds]

    def asked(cell: Cell) -> bool:
        told = (cell.family, cell.size, cell.work, cell.tuning)
        return all(word in kind for word, kind in zip(told, wanted, strict=True))

    found = [cell for cell in _all() if asked(cell)]
    if not found:
        raise InputError(f"--only {only!r}: no cell; {' and '.join(TUNINGS)} are of trainings")
    return found


def plan_as_set(config: PlanMatrixConfig, tell: Tell) -> tuple[str, list[str]]:
    """The table in Markdown, and the cells that failed; see `w2s_jax.plan.plan_matrix`."""
    if config.tries < 1:
        raise InputError(f"--try is {config.tries}; it must be at least 1")
    asked, order = cells(config.only), cells()
    table, figures = (Path(name) if name else None for name in (config.out, config.json))
    if table and figures and table.resolve() == figures.resolve():
        raise InputError(f"--out and --json are both {config.json}; name two files")
    check_compiler(FAMILIES[0])
    with ExitStack() as locks:
        for path in filter(None, (table, figures)):
            locks.enter_context(locked(path))
        records = open_records(table, figures, compiler_of(), settings_of(config.tries))
        lacking = [cell for cell in asked if records.lacks(cell)]
        tell(f"{len(asked) - len(lacking)} of {len(asked)} cells are there")
        trying = Trying(config.tries, tell=tell)
        failed = plan_cells(lacking, trying, lambda row: records.keep(row, order))
    return records.text([cell.name for cell in asked]), failed


def plan_cell(cell: Cell, trying: Trying) -> MatrixRow:
    """The smallest slice of the cell's family that fits, and its plan.

    Slices that are estimated to be too small are skipped, with the reason.
    """
    trying = replace(trying, first=True, guess=True)
    found = try_slices(cell.shapes, topologies(cell.family), trying)
    refused = [(one.topology, _why_not(one)) for one in found.slices if one.best is None]
    last = found.slices[-1]
    tried = cell.shapes(last.devices)[last.choice]
    rows = PROMPTS if isinstance(tried, SearchShapes) else tried.rows // tried.accumulate
    return MatrixRow(cell, found.best, tuple(refused), rows)


def plan_cells(
    asked: Sequence[Cell], trying: Trying, keep: Callable[[MatrixRow], None]
) -> list[str]:
    """Plan every cell, and pass each finished row to `keep`; returns the names of failed cells.

    An error of the compiler in one cell is reported, and the others are still planned.
    """
    failed = []
    for count, cell in enumerate(asked, 1):
        trying.tell(f"cell {count} of {len(asked)}: {cell.name}")
        try:
            row = plan_cell(cell, trying)
        except (RuntimeError, InputError) as error:
            trying.tell(f"{cell.name} failed: {' '.join(str(error).split())[:300]}")
            failed.append(cell.name)
            continue
        keep(row)
    return failed


def _why_not(trials: Trials) -> str:
    """Why a slice does not fit, by its best compiled mesh or else the one that needs least."""
    if not trials.plans:
        judged = [one for one in trials.skipped if one.resident_bytes is not None]
        least = min(judged, key=lambda one: one.needed, default=trials.skipped[0])
        return f"{least.mesh}: {least.why}, not compiled"
    plan = trials.plans[0]
    return f"{plan.mesh}: {plan.refusal or f'takes {plan.needed / GIB:.1f} GiB'}"


def _all() -> Iterator[Cell]:
    for family, size in product(FAMILIES, MODELS):
        yield Cell(family, size, "search")
        yield from (Cell(family, size, *rest) for rest in product(("sft", "dpo"), TUNINGS))


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
    """The files of a matrix, and their rows by name.

    Attributes:
        table: The Markdown table; None for none.
        figures: The JSON file; None for none.
        compiler, settings: What the rows were made with, as the files say it.
        lines: Rows of the table, by cell name.
        rows: Rows of the JSON file, by cell name.
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

    def keep(self, row: MatrixRow, order: Sequence[Cell]) -> None:
        """Add a row to the files, in the order of the cells."""
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
        """The table in Markdown, with those of the named rows that exist."""
        head = [_row(_HEAD), f"|{'---|' * len(_HEAD)}"]
        own = [self.lines[name] for name in names if name in self.lines]
        about = f"{_ABOUT}{textwrap.fill(self.settings, 100)}\n\n{self.compiler}\n\n"
        return about + "\n".join([*head, *own]) + "\n"


def open_records(table: Path | None, figures: Path | None, compiler: str, settings: str) -> Records:
    """The files of a matrix, with their rows; torn rows are left out.

    Raises:
        InputError: For a file with other content, another compiler or other settings.
    """
    for path in filter(None, (table, figures)):
        check_writable(path)
    made = (compiler, settings)
    lines = _read(table, "a table", _parse_table, *made)
    rows = _read(figures, "figures", _parse_figures, *made)
    return Records(table, figures, *made, lines, rows)


def settings_of(tries: int) -> str:
    """The settings of rows as the files say it; `tries` meshes of a slice are compiled."""
    return f"{SETTINGS} Meshes of a slice that are compiled: {tries} at most."


def compiler_of() -> str:
    """The versions of the compiler as the files say it."""
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    return f"Compiled with {', '.join(versions)}."


def line_of(row: MatrixRow) -> str:
    """A row of the table."""
    # Of several shapes tried on a slice, the last one needs the least memory.
    refused = "; ".join(f"{at.partition(':')[2]} {why}" for at, why in dict(row.refused).items())
    plan = row.plan
    if plan is None:
        return _row([row.cell.name, "none fits", *("",) * (len(_HEAD) - 3), refused])
    return _row([
        row.cell.name,
        plan.topology,
        str(plan.devices),
        plan.mesh,
        str(row.rows),
        *map(gib, (plan.held, plan.temporaries, plan.needed, plan.memory)),
        f"{plan.moved / MIB:,.0f}",
        f"{plan.tokens_per_second:,.0f}",
        f"{plan.compile_seconds:.0f} s",
        refused,
    ])  # fmt: skip


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


_Parsed = tuple[str, Sequence[Any], dict[str, Any]]
"""(compiler of a file, texts that may be its settings, its complete rows by name)."""


def _read(
    path: Path | None, kind: str, parse: Callable[[str], _Parsed], compiler: str, settings: str
) -> dict[str, Any]:
    """The complete rows of a file; none if there is no file."""
    if path is None or not path.exists():
        return {}
    check_fetched(path)
    try:
        told, texts, rows = parse(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path}: not {kind} of `w2s plan matrix`; name another file") from None
    if told != compiler:
        raise InputError(
            f"{path}: its rows were {told[:1].lower()}{told[1:-1]}, and here is "
            f"{compiler.removeprefix('Compiled with ')[:-1]}; name another file, or delete it"
        )
    if settings not in texts and "".join(settings.split()) not in texts:
        raise InputError(
            f"{path}: its rows were planned with other settings, or with another --try; name "
            "another file, or delete it"
        )
    return rows


def _parse_table(text: str) -> _Parsed:
    lines = text.splitlines()
    told = next((line for line in lines if line.startswith("Compiled with ")), None)
    if told is None or _row(_HEAD) not in lines:
        raise ValueError("another table")
    # Compared without spaces: settings may be wrapped differently, also at a hyphen.
    texts = ["".join(part.split()) for part in text.split("\n\n")]
    rows = [line for line in lines if line.startswith("| ") and line.endswith(" |")]
    columns = {row: row.removeprefix("| ").removesuffix(" |").split(" | ") for row in rows}
    whole = {cells[0]: row for row, cells in columns.items() if len(cells) == len(_HEAD)}
    return told, texts, {name: row for name, row in whole.items() if name != _HEAD[0]}


def _parse_figures(text: str) -> _Parsed:
    found = json.loads(text)
    told, rows = found["compiler"], {row["cell"]: row for row in found["rows"]}
    if not told.isprintable():
        raise ValueError("no compiler")
    whole = {
        name: row
        for name, row in rows.items()
        if {"refused", "rows", "plan"} <= set(row) and isinstance(row["plan"], dict | None)
    }
    return told, [found.get("settings")], whole
