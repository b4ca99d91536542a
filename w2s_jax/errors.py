"""The one exception for wrong input. Internal faults are not raised through it."""


class InputError(ValueError):
    """A wrong input, told in one line: what is wrong, where, and what would be right."""
