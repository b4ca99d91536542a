"""How far a command is: a bar on a terminal, a line now and then where its output is kept."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from w2s_jax.distributed import is_first

SECONDS = 30.0
"""How often a line is written where there is no terminal."""


@contextmanager
def progress(
    total: int, unit: str, *, done: int = 0, name: str = ""
) -> Iterator[Callable[[int], None]]:
    """Show how much of some work is done, while the block runs.

    On a terminal tqdm's bar. Elsewhere the first host writes lines to standard error: one at the
    start, as minutes of loading and compiling may follow, then one every SECONDS, and the last.

    Args:
        total: how many there are; of none nothing is shown.
        unit: what they are, in the singular.
        done: how many are done at the start.
        name: what they are done for.

    Yields:
        A function that takes how many more are done.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, initial=done, desc=name or None, unit=unit) as bar:
            yield bar.update
        return
    start = told = time.monotonic()
    heading = f"{name}: " if name else ""

    def tell(more: str) -> None:
        if is_first():
            sys.stderr.write(f"{heading}{done} of {total} {unit}s{more}\n")
            sys.stderr.flush()

    def update(count: int) -> None:
        nonlocal done, told
        done += count
        now = time.monotonic()
        if done >= total or now - told >= SECONDS:
            told = now
            tell(f", {now - start:.0f} s")

    if total > done:
        tell("; the first wait for programs to be compiled")
    yield update
