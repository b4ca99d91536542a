"""Stages of a long run, each in a folder of its own, redone where what it reads has changed.

Nothing here knows what a stage does.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from w2s_jax.errors import InputError, check_fetched
from w2s_jax.text.rows import locked, write_whole

DONE, BEGUN = "done.json", "begun.json"
"""Records of a stage: `done.json` when all of it is there, `begun.json` before any of it is."""
BEGUN_FIELDS, DONE_FIELDS = ("inputs",), ("inputs", "result", "outputs", "contents", "figures")

Figures = Mapping[str, Any]
State = Literal["done", "to do", "goes on", "changed", "left out"]


@dataclass(frozen=True)
class Stage:
    """A step of a run.

    name: also its folder's. work: fills the folder, going on from what an earlier, killed call left
    there, and returns figures (JSON). outputs: the files and folders that later stages read.
    settings: whatever else decides what comes out (JSON). after: the stages that it reads. reads:
    files and folders from elsewhere. cost: what a plan says of it.
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
    """What a call of `run_stages` would do with a stage, and why."""

    stage: Stage
    state: State
    why: str = ""


def run_stages(
    stages: Sequence[Stage],
    root: Path,
    *,
    first: str | None = None,
    last: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Figures]:
    """Do what is not done of the stages, in order; figures by stage name.

    A stage is done again where its settings or what it reads have changed, or its outputs are gone
    or were changed; work of other inputs in its folder is removed before. Stages before `first`
    are taken as they are, and those after `last` are left alone. Raises InputError for a name that
    is no stage, for a stage before `first` that is not done, for a file that a stage reads and is
    not there, for a folder that holds something else, and while another run writes in `root`.
    """
    chosen = _chosen(stages, first, last)
    with locked(root / "stages"):
        return _run(stages, root, chosen, tell)


def _run(
    stages: Sequence[Stage], root: Path, chosen: set[str], tell: Callable[[str], None]
) -> dict[str, Figures]:
    figures: dict[str, Figures] = {}
    told: dict[str, str] = {}
    content = _remembering()
    for stage in stages:
        folder = root / stage.name
        done = _read(folder / DONE, DONE_FIELDS)
        if stage.name not in chosen:
            if done is not None:
                figures[stage.name], told[stage.name] = done["figures"], done["result"]
            continue
        digest = _inputs(stage, told, content)
        if done is None or done["inputs"] != digest or not _kept(folder, done):
            anew = done is not None and done["inputs"] != digest
            why = " anew, as its settings or what it reads have changed" if anew else ""
            tell(f"{stage.name}: started{why}")
            _prepare(stage, folder, digest)
            done = _do(stage, folder, digest)
            tell(f"{stage.name}: {json.dumps(done['figures'])}")
        else:
            tell(f"{stage.name}: done before")
        figures[stage.name], told[stage.name] = done["figures"], done["result"]
    return figures


def plan_stages(
    stages: Sequence[Stage], root: Path, *, first: str | None = None, last: str | None = None
) -> list[Planned]:
    """What `run_stages` would do, without doing it; raises what it raises before any work."""
    chosen = _chosen(stages, first, last)
    told: dict[str, str] = {}
    content = _remembering()
    plan: list[Planned] = []
    for stage in stages:
        folder = root / stage.name
        done = _read(folder / DONE, DONE_FIELDS)
        planned = Planned(stage, "left out")
        if stage.name in chosen:
            _check_written(stage, {*told, *chosen})
            planned = _planned(stage, folder, done, told, content)
        if done is not None and planned.state in ("done", "left out"):
            told[stage.name] = done["result"]
        plan.append(planned)
    return plan


def content_digest(path: Path) -> str:
    """A hash of a file's bytes, or of the names and bytes of all files in a folder."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{file.relative_to(path)} {found}\n".encode())
    return digest.hexdigest()


def _remembering() -> Callable[[Path], str]:
    """`content_digest`, which reads again only what has another size or time than before."""
    known: dict[str, str] = {}

    def digest(path: Path) -> str:
        key = json.dumps([str(path), _stamps(path)])
        if key not in known:
            known[key] = content_digest(path)
        return known[key]

    return digest


def _planned(
    stage: Stage,
    folder: Path,
    done: Any,
    told: Mapping[str, str],
    content: Callable[[Path], str],
) -> Planned:
    awaited = [name for name in stage.after if name not in told]
    if awaited:
        why = f"reads what {', '.join(awaited)} will write"
        return Planned(stage, "to do" if done is None else "changed", why)
    digest = _inputs(stage, told, content)
    if done is None:
        begun = _read(folder / BEGUN, BEGUN_FIELDS)
        return Planned(stage, "goes on" if begun and begun["inputs"] == digest else "to do")
    if done["inputs"] != digest:
        return Planned(stage, "changed", "its settings or what it reads have changed")
    if not _kept(folder, done):
        return Planned(stage, "changed", "its outputs are gone or were changed")
    return Planned(stage, "done")


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


def _inputs(stage: Stage, told: Mapping[str, str], content: Callable[[Path], str]) -> str:
    """A hash of all that decides what a stage writes."""
    _check_written(stage, told)
    for path in stage.reads:
        if not path.exists():
            raise InputError(f"{path}: not found; stage {stage.name} reads it")
    values = {
        "settings": stage.settings,
        "after": {name: told[name] for name in stage.after},
        "reads": [content(path) for path in stage.reads],
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _check_written(stage: Stage, written: Collection[str]) -> None:
    missing = [name for name in stage.after if name not in written]
    if missing:
        raise InputError(
            f"stage {stage.name} reads what {missing[0]} writes, which is not done; begin with it"
        )


def _prepare(stage: Stage, folder: Path, digest: str) -> None:
    """An empty folder, or one whose work was begun on the same inputs."""
    begun = _read(folder / BEGUN, BEGUN_FIELDS)
    if begun is not None and begun["inputs"] == digest:
        if (folder / DONE).exists():  # outputs that were changed since are not gone on from
            (folder / DONE).unlink()
            for name in stage.outputs:
                _remove(folder / name)
        return
    held_there = sorted(folder.iterdir()) if folder.is_dir() else []
    own = [path for path in held_there if path.name in (BEGUN, f"{BEGUN}.part")]
    if len(held_there) > len(own) and begun is None:
        raise InputError(f"{folder} holds files of something else; name another --output")
    # The record goes last: what a kill leaves is known to be this run's.
    for path in [*(path for path in held_there if path not in own), *own]:
        _remove(path)
    _write(folder / BEGUN, {"inputs": digest})


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _do(stage: Stage, folder: Path, digest: str) -> dict[str, Any]:
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
        "inputs": digest,
        "result": hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest(),
        "seconds": round(time.monotonic() - started, 1),
        "outputs": {name: _stamps(folder / name) for name in stage.outputs},
        "contents": contents,
        "figures": figures,
    }
    _write(folder / DONE, done)
    return done


def _kept(folder: Path, done: Mapping[str, Any]) -> bool:
    """Whether a stage's outputs are as they were: by size and time, or else by content."""
    for name, stamps in done["outputs"].items():
        path = folder / name
        if not path.exists():
            return False
        if _stamps(path) != stamps and content_digest(path) != done["contents"][name]:
            return False
    return True


def _stamps(path: Path) -> list[list[Any]]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [
        [str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns]
        for file in files
    ]


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
