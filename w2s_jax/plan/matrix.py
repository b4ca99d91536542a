"""The matrix of plans: every chip, model size and work, each on the smallest slice that fits.

Settings are fixed here, so that a committed table can be made again. Files are in `records.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from w2s_jax.errors import InputError
from w2s_jax.models.lora import LoraConfig
from w2s_jax.plan.candidates import Shapes
from w2s_jax.plan.measure import GIB, Plan
from w2s_jax.plan.programs import GuideShapes, SearchShapes
from w2s_jax.plan.shapes import shape_of
from w2s_jax.plan.training import TrainingShapes
from w2s_jax.plan.trials import Trials, Trying, smallest_slice
from w2s_jax.search.presets import cbs

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
"""Devices that share an example where it would not fit one."""
SETTINGS = (
    f"Search: W, K, L = {', '.join(map(str, BEAM))}, {PROMPTS} prompts of {PROMPT_TOKENS} tokens "
    f"side by side, responses of {NEW_TOKENS:,}, guides {GUIDE}. Training: examples (for dpo "
    f"pairs) of {LENGTH:,} tokens, {ROWS} a step or as many as there are devices, one for each "
    f"device at a time or, on slices too small for that, one for each {SHARING}; adamw, everything "
    f"computed again in the backward pass, LoRA of rank {RANK}."
)


@dataclass(frozen=True)
class Cell:
    """What is planned: a chip's family, a model size, and a work; tuning is none for a search."""

    family: str
    size: str
    work: str
    tuning: str = ""

    @property
    def name(self) -> str:
        """Its words, as the table and --only have them."""
        return " ".join(filter(None, (self.family, self.size, self.work, self.tuning)))

    def shapes(self, devices: int) -> tuple[Shapes, ...]:
        """What is planned on so many devices, and what is planned where that does not fit."""
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
class Row:
    """A cell with the plan of the smallest slice that fits; None where none of the listed does.

    refused: slices before it, each with why. rows: prompts side by side, or examples at a time.
    """

    cell: Cell
    plan: Plan | None
    refused: tuple[tuple[str, str], ...]
    rows: int

    def as_row(self) -> dict[str, Any]:
        """The row as JSON holds it."""
        plan = None if self.plan is None else self.plan.as_row()
        told = {"refused": self.refused, "rows": self.rows, "plan": plan}
        return {"cell": self.cell.name, **asdict(self.cell), **told}


def cells(only: str = "") -> list[Cell]:
    """The cells of the matrix, or those of some words, such as "v5e,70B,dpo,lora".

    Words of one kind add up, words of different kinds narrow. Raises InputError for other words,
    and for words that go with no cell.
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


def plan_cell(cell: Cell, trying: Trying) -> Row:
    """The smallest slice of the cell's family that fits, and its plan.

    Slices that are too small by what is guessed before compiling are passed over, and said so.
    """
    found = smallest_slice(cell.shapes, cell.family, replace(trying, first=True, guess=True))
    refused = [(one.topology, _why_not(one)) for one in found.slices if one.best is None]
    last = found.slices[-1]
    tried = cell.shapes(last.devices)[last.choice]
    rows = PROMPTS if isinstance(tried, SearchShapes) else tried.rows // tried.accumulate
    return Row(cell, found.best, tuple(refused), rows)


def plan_cells(
    asked: Sequence[Cell],
    trying: Trying,
    keep: Callable[[Row], None],
) -> list[str]:
    """Plan every cell, and hand each row to `keep` when it is done; names of those that failed.

    A fault of the compiler in one cell is told and does not keep the others from being planned.
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
    """Why the best mesh of a slice that was compiled, or else the smallest one, does not do."""
    if not trials.plans:
        judged = [one for one in trials.skipped if one.held is not None]
        least = min(judged, key=lambda one: one.needed, default=trials.skipped[0])
        return f"{least.mesh}: {least.why}, not compiled"
    plan = trials.plans[0]
    return f"{plan.mesh}: {plan.refusal or f'takes {plan.needed / GIB:.1f} GiB'}"


def _all() -> Iterator[Cell]:
    for family in FAMILIES:
        for size in MODELS:
            yield Cell(family, size, "search")
            for work in ("sft", "dpo"):
                for tuning in TUNINGS:
                    yield Cell(family, size, work, tuning)
