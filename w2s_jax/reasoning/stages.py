"""Stages of a long run, each in a folder of its own, run again if their inputs have changed.

What a stage does is not known here.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from w2s_jax.errors import InputError, check_fetched
from w2s_jax.text.rows import locked, write_whole

DONE, BEGUN = "done.json", "begun.json"
"""Records of a stage: `done.json` after all of its outputs, `begun.json` before any of them."""
BEGUN_FIELDS, DONE_FIELDS = ("inputs",), ("inputs", "result", "outputs", "contents", "figures")
CHANGED = "its settings or what it reads have changed"

Figures = Mapping[str, Any]
State = Literal["done", "to do", "goes on", "changed", "left out"]


@dataclass(frozen=True)
class Stage:
    """A step of a run.

    Attributes:
        name: Its name, also of its folder.
        work: Fills the folder, resuming from what an earlier, killed call left there, and returns
            figures (JSON).
        outputs: The files and folders that later stages read.
        settings: Everything else that determines the outputs (JSON).
        after: The stages whose outputs it reads.
        reads: Files and folders that it reads from elsewhere.
        cost: What a plan says of it.
    """

    name: str
    work: Callable[[Path], Figures]
    outputs: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()
    cost: str = ""


@dataclass(frozen=True)
class Planned:
    """What `run_stages` would do with a stage, and why.

    Attributes:
        stage: The stage.
        state: Whether it is done, or how it would start.
        why: The reason, for a state that needs one.
        inputs: A hash of everything that determines its outputs; empty if not known yet.
        record: Its `done.json`, if there is one.
    """

    stage: Stage
    state: State
    why: str = ""
    inputs: str = ""
    record: Mapping[str, Any] | None = None


def run_stages(
    stages: Sequence[Stage],
    root: Path,
    *,
    first: str | None = None,
    last: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Figures]:
    """Run the stages that are not done, in order.

    A stage is run again if its settings or inputs have changed, or its outputs are missing or
    changed; its folder is then emptied first.

    Args:
        stages: The stages; each comes after those that it reads.
        root: Folder of their folders.
        first: First stage to run; those before it are taken as they are.
        last: Last stage to run.
        tell: Called with a line on each stage as it begins and ends.

    Returns:
        Figures by stage name.

    Raises:
        InputError: For an unknown name, a stage before `first` that is not done, a missing file
            that a stage reads, a folder with other content, and while another run writes in `root`.
    """
    chosen = _chosen(stages, first, last)
    figures: dict[str, Figures] = {}
    results: dict[str, str | None] = {}
    content = _remembering()
    with locked(root / "stages"):
        for stage in stages:
            planned = _planned(stage, root, stage.name in chosen, results, content)
            record = planned.record
            if planned.state == "done":
                tell(f"{stage.name}: done before")
            elif planned.state != "left out":
                anew = f" anew, as {CHANGED}" if planned.why == CHANGED else ""
                tell(f"{stage.name}: started{anew}")
                record = _do(stage, root / stage.name, planned.inputs)
                tell(f"{stage.name}: {json.dumps(record['figures'])}")
            if record is not None:
                figures[stage.name], results[stage.name] = record["figures"], record["result"]
    return figures


def plan_stages(
    stages: Sequence[Stage], root: Path, *, first: str | None = None, last: str | None = None
) -> list[Planned]:
    """What `run_stages` would do, without doing it; raises as it does before any work."""
    chosen = _chosen(stages, first, last)
    results: dict[str, str | None] = {}
    content = _remembering()
    plan = []
    for stage in stages:
        plan.append(planned := _planned(stage, root, stage.name in chosen, results, content))
        if planned.state not in ("done", "left out"):
            results[stage.name] = None
        elif planned.record is not None:
            results[stage.name] = planned.record["result"]
    return plan


def content_digest(path: Path) -> str:
    """A hash of a file's bytes, or of the names and bytes of all files in a folder."""
    digest = hashlib.sha256()
    for file in _files(path):
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{file.relative_to(path)} {found}\n".encode())
    return digest.hexdigest()


def _remembering() -> Callable[[Path], str]:
    """A `content_digest` that rereads only files whose size or time has changed."""

    @cache
    def known(path: Path, stamps: str) -> str:
        return content_digest(path)

    return lambda path: known(path, json.dumps(_stamps(path)))


def _planned(
    stage: Stage,
    root: Path,
    is_chosen: bool,
    results: Mapping[str, str | None],
    content: Callable[[Path], str],
) -> Planned:
    """What to do with a stage.

    `results` holds a hash of the outputs of each earlier stage, None if it is still to be run.
    """
    record = _read(root / stage.name / DONE, DONE_FIELDS)
    if not is_chosen:
        return Planned(stage, "left out", record=record)
    for name in stage.after:
        if name not in results:
            raise InputError(
                f"stage {stage.name} reads what {name} writes, which is not done; begin with it"
            )
    awaited = ", ".join(name for name in stage.after if results[name] is None)
    if awaited:
        state: State = "to do" if record is None else "changed"
        return Planned(stage, state, f"reads what {awaited} will write", record=record)
    inputs = _inputs(stage, results, content)
    if record is None:
        begun = _read(root / stage.name / BEGUN, BEGUN_FIELDS)
        goes_on = begun is not None and begun["inputs"] == inputs
        return Planned(stage, "goes on" if goes_on else "to do", inputs=inputs)
    if record["inputs"] != inputs:
        return Planned(stage, "changed", CHANGED, inputs, record)
    if not _kept(root / stage.name, record):
        return Planned(stage, "changed", "its outputs are gone or were changed", inputs, record)
    return Planned(stage, "done", inputs=inputs, record=record)


def _chosen(stages: Sequence[Stage], first: str | None, last: str | None) -> set[str]:
    names = [stage.name for stage in stages]
    for name in (first, last):
        if name is not None and name not in names:
            raise InputError(f"no stage {name!r}; there are {', '.join(names)}")
    start = 0 if first is None else names.index(first)
    end = len(names) if last is None else names.index(last) + 1
    if start >= end:
        raise InputError(f"stage {first} comes after {last}; nothing is left to do")
    return set(names[start:end])


def _inputs(stage: Stage, results: Mapping[str, str | None], content: Callable[[Path], str]) -> str:
    """A hash of everything that determines a stage's outputs."""
    for path in stage.reads:
        if not path.exists():
            raise InputError(f"{path}: not found; stage {stage.name} reads it")
    after = {name: results[name] for name in stage.after}
    reads = [content(path) for path in stage.reads]
    return _hash({"settings": stage.settings, "after": after, "reads": reads})


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _do(stage: Stage, folder: Path, inputs: str) -> dict[str, Any]:
    """Run a stage, and write its record once all else is written."""
    _prepare(stage, folder, inputs)
    started = time.monotonic()
    try:
        figures = dict(stage.work(folder))
    except InputError as error:
        raise InputError(f"stage {stage.name}: {error}") from None
    missing = [name for name in stage.outputs if not (folder / name).exists()]
    if missing:
        raise RuntimeError(f"stage {stage.name} has not written {', '.join(missing)}")
    contents = {name: content_digest(folder / name) for name in stage.outputs}
    done = {
        "inputs": inputs,
        "result": _hash(contents),
        "seconds": round(time.monotonic() - started, 1),
        "outputs": {name: _stamps(folder / name) for name in stage.outputs},
        "contents": contents,
        "figures": figures,
    }
    _write(folder / DONE, done)
    return done


def _prepare(stage: Stage, folder: Path, inputs: str) -> None:
    """Empty the folder, unless its work was begun with the same inputs."""
    begun = _read(folder / BEGUN, BEGUN_FIELDS)
    if begun is not None and begun["inputs"] == inputs:
        if (folder / DONE).exists():  # changed outputs cannot be resumed
            for name in (DONE, *stage.outputs):
                _remove(folder / name)
        return
    own = (BEGUN, f"{BEGUN}.part")
    # The record is removed last, so that what a kill leaves is known to be this run's.
    there = sorted(folder.iterdir(), key=lambda path: path.name in own) if folder.is_dir() else []
    if begun is None and any(path.name not in own for path in there):
        raise InputError(f"{folder} holds files of something else; name another --output")
    for path in there:
        _remove(path)
    _write(folder / BEGUN, {"inputs": inputs})


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _kept(folder: Path, done: Mapping[str, Any]) -> bool:
    """Whether a stage's outputs are unchanged, by size and time or else by content."""
    paths = {name: folder / name for name in done["outputs"]}
    return all(path.exists() for path in paths.values()) and all(
        _stamps(path) == done["outputs"][name] or content_digest(path) == done["contents"][name]
        for name, path in paths.items()
    )


def _stamps(path: Path) -> list[list[Any]]:
    """Name, size and time of a file, or of all files in a folder."""
    return [
        [str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns]
        for file in _files(path)
    ]


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def _read(path: Path, fields: tuple[str, ...]) -> dict[str, Any] | None:
    check_fetched(path)
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete the folder to redo") from None
    if not isinstance(found, dict) or any(name not in found for name in fields):
        raise InputError(f"{path}: not the record of a stage; delete the folder to redo")
    return found


def _write(path: Path, values: Mapping[str, Any]) -> None:
    write_whole(path, [json.dumps(values, indent=2).encode(), b"\n"])
