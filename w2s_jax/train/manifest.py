"""Which checkpoints on disk are whole: a manifest of checksums beside each committed step.

Knows files and folders only; what a checkpoint holds is for train/checkpoint.py.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from w2s_jax.text.rows import sync_folder, write_whole

VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """Checksums of a step's files, and the score of its evaluation (higher is better), if any.

    `files` maps a path inside the step's folder to (bytes, SHA-256 in hex).
    """

    step: int
    files: dict[str, tuple[int, str]]
    score: float | None = None


def step_folder(folder: Path, step: int) -> Path:
    """Where the files of a step lie."""
    return folder / str(step)


def manifest_path(folder: Path, step: int) -> Path:
    """Where the manifest of a step lies: beside its folder."""
    return folder / f"{step}.manifest.json"


def make_manifest(folder: Path, step: int, score: float | None = None) -> Manifest:
    """Read every file of a step; each is on the disk, not only in its cache, when this returns."""
    root = step_folder(folder, step)
    files = {
        path.relative_to(root).as_posix(): (path.stat().st_size, _checksum(path, sync=True))
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
    for part in (*(path for path in root.rglob("*") if path.is_dir()), root, folder):
        sync_folder(part)
    return Manifest(step, files, score)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest beside its step, whole or not at all."""
    value = {"version": VERSION, "files": manifest.files, "score": manifest.score}
    write_whole(manifest_path(folder, manifest.step), [json.dumps(value).encode() + b"\n"])


def read_manifest(folder: Path, step: int) -> Manifest | None:
    """The manifest of a step; None where there is none or it is damaged itself."""
    try:
        value = json.loads(manifest_path(folder, step).read_bytes())
        if value["version"] != VERSION:
            return None
        files = {str(name): (int(size), str(sum_)) for name, (size, sum_) in value["files"].items()}
        score = value["score"]
        return Manifest(step, files, None if score is None else float(score))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def steps_on_disk(folder: Path) -> list[int]:
    """Steps that have a folder, whole or not, from first to last."""
    if not folder.is_dir():
        return []
    return sorted(
        int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()
    )


def fault(folder: Path, step: int) -> str | None:
    """What is wrong with a step's files, in a few words; None where all are as its manifest says.

    Reads every byte of the step.
    """
    manifest = read_manifest(folder, step)
    if manifest is None:
        damaged = manifest_path(folder, step).exists()
        return "its manifest is damaged" if damaged else "it was cut off while being written"
    root = step_folder(folder, step)
    for name, (size, checksum) in manifest.files.items():
        path = root / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
        try:
            if _checksum(path) != checksum:
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return None


def unfinished(folder: Path) -> list[Path]:
    """What saves that were cut off left behind: folders under a temporary name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _is_temporary(path.name))


def remove_step(folder: Path, step: int) -> None:
    """Delete a step, its manifest first, so that a kill in between leaves nothing that looks whole.

    A step that is not there is no error.
    """
    manifest_path(folder, step).unlink(missing_ok=True)
    shutil.rmtree(step_folder(folder, step), ignore_errors=True)


def _is_temporary(name: str) -> bool:
    return "orbax-checkpoint-tmp" in name


def _checksum(path: Path, *, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
