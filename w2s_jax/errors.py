"""The exception for wrong input. Internal faults are not raised through it."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

POINTER = b"version https://git-lfs.github.com/spec/"
"""What Git LFS leaves in the place of a file that was not fetched begins so."""

SCORER = "scorer "
"""In the place of a model's name: a scorer without one, and what it did, begin so."""


class InputError(ValueError):
    """A wrong input, told in one line: what is wrong, where, and what would be right."""

    def at(self, place: str) -> "InputError":
        """The same error behind what it is about."""
        return InputError(f"{place}: {self}")


class Undivided(InputError):
    """A mesh that does not divide an array: what is wrong, meshes that do, what rules would help.

    without_rules: the same for those who cannot give rules.
    """

    def __init__(self, told: str, meshes: Sequence[str], rules: str):
        self.told, self._meshes, self._rules = told, tuple(meshes), rules
        use = [f"use {' | '.join(meshes)}"] if meshes else []
        self.without_rules = "; ".join([told, *use])
        super().__init__(f"{told}; {', or '.join([*use, rules])}")

    def at(self, place: str) -> "Undivided":
        """The same error behind what it is about."""
        return Undivided(f"{place}: {self.told}", self._meshes, self._rules)


class RowFailed(InputError):
    """A row that came to nothing: models gave it logits that are no distribution.

    That is where one is NaN or +inf, or all are −inf. models: the names of those at fault, or what
    a scorer without a model did, as SCORER begins it; none where a score is no finite number though
    all logits are sound.
    """

    def __init__(self, row_id: int, models: Sequence[str]) -> None:
        self.row_id, self.models = row_id, tuple(models)
        super().__init__(f"row {row_id}: {self.fault}")

    @property
    def fault(self) -> str:
        """What happened, without the row."""
        return _fault(self.models)


class RowsFailed(InputError):
    """Rows that failed, after all others were done.

    failures: in the order of the row ids. results: of all rows in the order asked for, None for one
    that failed. Told as "WHERE NUMBER, NUMBER ..", by the `number` of each row id.
    """

    SHOWN = 8

    def __init__(
        self,
        failures: Sequence[RowFailed],
        results: Sequence[Any] = (),
        *,
        where: str = "row",
        number: Callable[[int], Any] = lambda row_id: row_id,
    ) -> None:
        self.failures = tuple(sorted(failures, key=lambda failure: failure.row_id))
        self.results = tuple(results)
        rows: dict[tuple[str, ...], list[Any]] = defaultdict(list)
        for failure in self.failures:
            rows[failure.models].append(number(failure.row_id))
        told = [f"{where} {self._listed(own)}: {_fault(models)}" for models, own in rows.items()]
        if len(told) > self.SHOWN:
            rest = sum(map(len, list(rows.values())[self.SHOWN :]))
            told = [*told[: self.SHOWN], f"and {rest} rows more"]
        super().__init__("; ".join(told))

    def named(
        self, models: Mapping[str, str], *, where: str, number: Callable[[int], Any]
    ) -> "RowsFailed":
        """The same with models and rows called otherwise."""
        failures = [
            RowFailed(failure.row_id, [models.get(name, name) for name in failure.models])
            for failure in self.failures
        ]
        return RowsFailed(failures, self.results, where=where, number=number)

    def _listed(self, numbers: Sequence[Any]) -> str:
        shown = ", ".join(map(str, numbers[: self.SHOWN]))
        more = len(numbers) - self.SHOWN
        return f"{shown} and {more} more" if more > 0 else shown


def _fault(models: Sequence[str]) -> str:
    advice = "weights may be damaged, or overflow in this dtype"
    if not models:
        return f"a score is not a finite number; {advice}"
    scorers = [name for name in models if name.startswith(SCORER)]
    names = [name for name in models if not name.startswith(SCORER)]
    told = [f"the {name}" for name in scorers]
    if names:
        told.append(f"logits of the {' and the '.join(names)} are NaN or infinite; {advice}")
    return ", and ".join(told)


def check_fetched(path: Path) -> None:
    """Raise InputError where a file is a pointer of Git LFS, which stands for the file itself."""
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except OSError:
        return
    if start == POINTER:
        raise InputError(f"{path} is a Git LFS pointer, not the file; run git lfs pull there")
