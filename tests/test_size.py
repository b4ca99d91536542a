"""Files and functions stay short enough to be read at once: `python -m tests.size --longest 10`."""

import pytest

from tests.size import sizes

SIZES = sizes()


@pytest.mark.parametrize(("what", "limit"), [("file", 500), ("function", 70)])
def test_nothing_is_longer_than_its_limit(what, limit):
    found = {
        "file": [(size.lines, name) for name, size in SIZES.items()],
        "function": [
            (lines, f"{name}: {function}")
            for name, size in SIZES.items()
            for lines, function in size.functions
        ],
    }[what]
    assert not sorted(each for each in found if each[0] > limit)


def test_the_package_is_told():
    """Comments and docstrings: at least one line to four of code."""
    code, told = (sum(getattr(size, name) for size in SIZES.values()) for name in ("code", "told"))
    assert told > code / 4
