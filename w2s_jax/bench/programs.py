"""Other programs that a measurement runs: each a process of its own that prints a JSON line."""

import json
import subprocess
from typing import Any


def call(command: list[str], *, seconds: float | None = None) -> dict[str, Any]:
    """The JSON line that a program prints; RuntimeError with its last words where it fails.

    Raises subprocess.TimeoutExpired for one that takes longer than so many seconds, and ends it.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def missing(python: str, modules: str, advice: str) -> str | None:
    """Why modules ("torch, trl") cannot be imported by this interpreter, or None."""
    try:
        done = subprocess.run(
            [python, "-c", f"import {modules}"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        return f"{python}: {error.strerror}"
    if done.returncode == 0:
        return None
    last = (done.stderr.strip().splitlines() or ["it failed"])[-1]
    return f"{python}: {last}; {advice}"
