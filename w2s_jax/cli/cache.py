"""`w2s cache`: the compiled programs that commands keep on disk (`main.keep_programs`)."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from w2s_jax.cli.main import CACHE, FOLDER, LIMIT, SETTINGS, programs_folder
from w2s_jax.errors import InputError

_PROGRAMS = "*-cache"
_OURS = (_PROGRAMS, "*-atime", ".lockfile", ".probe-*")
"""What jax and a command write; nothing else is ever deleted."""


@dataclass(frozen=True)
class Cache:
    """Show the compiled programs that are kept for later runs, or delete them.

    They are in the user's cache directory, or in W2S_CACHE_DIR; set to nothing, or with
    `w2s --no-cache COMMAND`, none are kept.
    """

    clear: bool = False
    """Delete them all."""

    def run(self) -> None:
        """Show or delete."""
        found = clear() if self.clear else usage()
        if found is None:
            print(f"no programs are kept: {CACHE} is empty")
            return
        told = f"{found.folder}: {found.programs} programs, {found.size / 2**20:.1f} MiB"
        limit = f"at most {found.limit / 2**20:.0f} MiB" if found.limit >= 0 else "without a limit"
        print(f"{told} deleted" if self.clear else f"{told}, {limit} for each kind of machine")
        if FOLDER in os.environ:
            print(f"jax keeps programs in {os.environ[FOLDER]}, as {FOLDER} says")


@dataclass(frozen=True)
class Usage:
    """What a cache holds.

    Attributes:
        folder: Of all machines' programs.
        programs: Their number.
        size: Their bytes.
        limit: The bytes that each kind of machine may keep, −1 for any number; the least recently
            used programs go first.
    """

    folder: Path
    programs: int
    size: int
    limit: int


def usage() -> Usage | None:
    """What is kept; None where nothing is to be.

    Raises:
        InputError: Where the user's home is unknown, or jax's limit is no number.
    """
    folder = _folder()
    if folder is None:
        return None
    told = os.environ.get(LIMIT, SETTINGS[LIMIT])
    try:
        limit = int(told)
    except ValueError:
        raise InputError(f"{LIMIT}={told}: it must be a number of bytes") from None
    sizes = [size for path in folder.glob(f"*/{_PROGRAMS}") if (size := _size(path)) is not None]
    return Usage(folder, len(sizes), sum(sizes), limit)


def _folder() -> Path | None:
    try:
        return programs_folder()
    except RuntimeError as error:
        raise InputError(f"{error} ({CACHE} names a folder)") from None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another process made room
        return None


def clear() -> Usage | None:
    """Delete all that is kept, of every machine; what it was. Other processes compile anew.

    Files that are not a cache's stay, and so do their folders.

    Raises:
        InputError: As `usage` does.
    """
    found = usage()
    for machines in found.folder.glob("*/") if found is not None else ():
        for pattern in _OURS:
            for path in machines.glob(pattern):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is in it
            machines.rmdir()
    return found
