"""The exception for wrong input. Internal faults are not raised through it."""

from collections.abc import Sequence


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
