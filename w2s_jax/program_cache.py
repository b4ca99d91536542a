"""Compiled programs that commands keep on disk, so that the next run need not compile them.

jax's persistent compilation cache does the work: it holds its folder to a size and locks it, and
its keys are of the program, of jax, XLA and their flags, and of the kind of device. Which
instructions a CPU has is not in them, so every kind of machine has a folder of its own here. jax is
not imported: it reads its settings from the environment, which workers inherit.
"""

import contextlib
import hashlib
import os
import platform
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2s_jax.errors import InputError

VARIABLE = "W2S_CACHE_DIR"
"""The folder of what may be made again; set to nothing, no programs are kept."""

FOLDER, LIMIT = "JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"
ENABLED = "JAX_ENABLE_COMPILATION_CACHE"
SETTINGS = {
    LIMIT: str(2 * 2**30),
    # A small program takes less time to compile than to find.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
"""jax's settings beside the folder; those that the environment gives stay."""

_PROGRAM, _USED = "-cache", "-atime"
_OURS = (f"*{_PROGRAM}", f"*{_USED}", ".lockfile", ".probe-*")
"""What jax and this module write; nothing else is ever deleted."""


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


def root() -> Path | None:
    """The folder of all machines' programs; None where none are kept.

    Raises:
        RuntimeError: Where nothing tells which folder is the user's home.
    """
    import platformdirs

    given = os.environ.get(VARIABLE)
    if given == "":
        return None
    found = platformdirs.user_cache_path("w2s_jax") if given is None else Path(given).expanduser()
    return found.absolute() / "programs"


def machine() -> str:
    """A name that machines share whose CPUs have the same instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    told = [line for line in lines if line.partition(":")[0].strip() in ("flags", "Features")]
    kind = platform.machine()
    instructions = " ".join([kind, platform.processor(), *sorted(set(told))])
    return f"{kind}-{hashlib.sha256(instructions.encode()).hexdigest()[:12]}"


def start() -> str | None:
    """Have jax keep the programs of this process, and of those that it starts.

    Where the environment names a folder for jax itself, that is left alone.

    Returns:
        One line where none can be kept, for the user; None where all is well or not asked for.
    """
    folder: Path | None = None
    try:
        folder = root()
        if folder is None:
            return None
        folder /= machine()
        if os.environ.get(FOLDER, str(folder)) != str(folder):
            return None
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"0")
        probe.unlink(missing_ok=True)
        if os.environ.get(LIMIT, SETTINGS[LIMIT]) != "-1":
            _drop_halves(folder)
    except (OSError, RuntimeError) as error:
        os.environ[VARIABLE] = ""
        why = getattr(error, "strerror", None) or str(error)
        place = f"{folder}: " if folder else ""
        return f"compiled programs are not kept: {place}{why} ({VARIABLE} names another folder)"
    given = {name: os.environ.get(name, value) for name, value in SETTINGS.items()}
    given[FOLDER] = str(folder)
    os.environ.update(given)
    if "jax" in sys.modules:
        _configure(given)
    _tell_faults_once()
    return None


def _drop_halves(folder: Path) -> None:
    """Delete programs without a time of use, beside which jax writes no others."""
    for path in folder.glob(f"*{_PROGRAM}"):
        if not path.with_name(path.name.removesuffix(_PROGRAM) + _USED).exists():
            path.unlink(missing_ok=True)


def _configure(given: Mapping[str, str]) -> None:
    """Settings for a jax that was imported before, and so has read the environment."""
    import jax

    kinds: dict[str, Any] = {FOLDER: str, ENABLED: lambda told: told == "true"}
    for name, value in given.items():
        kind = kinds.get(name, float if "SECS" in name else int)
        jax.config.update(name.lower(), kind(value))


def _tell_faults_once() -> None:
    """Have what jax warns of its cache be one line in all; it compiles then, as without one."""
    show = warnings.showwarning
    told: list[str] = []

    def showwarning(message: Any, *rest: Any, **named: Any) -> None:
        text = str(message).split("\n")[0]
        if "persistent compilation cache" not in text and not text.startswith("Cache value for"):
            show(message, *rest, **named)
        elif not told:
            told.append(text)
            line = f"compiled anew, or not kept for later runs: {text} (`w2s cache --clear` helps)"
            sys.stderr.write(f"{line}\n")

    warnings.showwarning = showwarning


def stop() -> None:
    """Keep no programs and use none, here and in processes started from here."""
    given = {ENABLED: "false"}
    os.environ.update(given | {VARIABLE: ""})
    if "jax" in sys.modules:
        _configure(given)


def usage() -> Usage | None:
    """What is kept; None where nothing is to be.

    Raises:
        InputError: Where the user's home is unknown, or jax's limit is no number.
    """
    folder = _known_root()
    if folder is None:
        return None
    told = os.environ.get(LIMIT, SETTINGS[LIMIT])
    try:
        limit = int(told)
    except ValueError:
        raise InputError(f"{LIMIT}={told}: it must be a number of bytes") from None
    sizes = [size for path in folder.glob(f"*/*{_PROGRAM}") if (size := _size(path)) is not None]
    return Usage(folder, len(sizes), sum(sizes), limit)


def _known_root() -> Path | None:
    try:
        return root()
    except RuntimeError as error:
        raise InputError(f"{error} ({VARIABLE} names a folder)") from None


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
