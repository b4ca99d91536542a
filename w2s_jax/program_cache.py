"""Compiled programs that commands keep on disk, so that the next run need not compile them.

jax's persistent compilation cache does the work: it holds its folder to a size and locks it, and
its keys are of the program, of jax, XLA and their flags, and of the kind of device. Which
instructions a CPU has is not in them, so every kind of machine has a folder of its own here. jax is
not imported: it reads its settings from the environment, which workers inherit.
"""

import hashlib
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "W2S_CACHE_DIR"
"""The folder of what may be made again; set to nothing, no programs are kept."""

FOLDER, LIMIT = "JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"
SETTINGS = {
    LIMIT: str(2 * 2**30),
    # A small program takes less time to compile than to find.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
"""jax's settings beside the folder; those that the environment gives stay."""

_ENTRIES = ("*-cache", "*-atime")


@dataclass(frozen=True)
class Usage:
    """What a cache holds.

    Attributes:
        folder: Of all machines' programs.
        programs: Their number.
        size: Their bytes.
        limit: The bytes that each kind of machine may keep; the least recently used go first.
    """

    folder: Path
    programs: int
    size: int
    limit: int


def root() -> Path | None:
    """The folder of all machines' programs; None where none are kept."""
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
    folder = root()
    if folder is None or FOLDER in os.environ:
        return None
    folder /= machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        stop()
        why = error.strerror or str(error)
        return f"compiled programs are not kept: {folder}: {why} ({VARIABLE} names another folder)"
    given = {name: os.environ.get(name, value) for name, value in SETTINGS.items()}
    given[FOLDER] = str(folder)
    os.environ.update(given)
    if "jax" in sys.modules:
        _configure(given)
    _tell_faults_once()
    return None


def _configure(given: Mapping[str, str]) -> None:
    """Settings for a jax that was imported before, and so has read the environment."""
    import jax

    kinds = {name: str if name == FOLDER else float if "SECS" in name else int for name in given}
    for name, value in given.items():
        jax.config.update(name.lower(), kinds[name](value))


def _tell_faults_once() -> None:
    """Have what jax warns of its cache be one line in all; it compiles then, as without one."""
    show, told = warnings.showwarning, []

    def showwarning(message: Any, *rest: Any, **named: Any) -> None:
        text = str(message).split("\n")[0]
        if "persistent compilation cache" not in text:
            show(message, *rest, **named)
        elif not told:
            told.append(text)
            sys.stderr.write(f"compiled anew, or not kept for later runs: {text}\n")

    warnings.showwarning = showwarning


def stop() -> None:
    """Keep no programs, here and in processes started from here."""
    os.environ[VARIABLE] = ""


def usage() -> Usage | None:
    """What is kept; None where nothing is to be."""
    folder = root()
    if folder is None:
        return None
    sizes = [path.stat().st_size for path in folder.glob(f"*/{_ENTRIES[0]}")]
    return Usage(folder, len(sizes), sum(sizes), int(os.environ.get(LIMIT, SETTINGS[LIMIT])))


def clear() -> Usage | None:
    """Delete all that is kept, of every machine; what it was. Other processes compile anew."""
    found = usage()
    if found is not None and found.folder.is_dir():
        shutil.rmtree(found.folder)
    return found
