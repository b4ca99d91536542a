"""Saving and restoring a TrainState at a step, asynchronously and atomically, with orbax.

orbax is imported only here, and only when a directory is opened. A step is sound if its manifest
matches: checksums of its files, written beside the step once all of them are on disk.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from w2s_jax.distributed import gather_values, is_first
from w2s_jax.errors import InputError
from w2s_jax.text.rows import differences, sync_folder, write_whole
from w2s_jax.train.step import TrainState

log = logging.getLogger(__name__)

Values = dict[str, Any]
"""JSON values by name, which are saved beside the arrays."""

FREE, FILES = "may change", "files"
"""Keys of two special parts of an identity. FREE holds settings that may differ when a run resumes,
with a warning. FILES holds digests of data files under the data's name in the identity; they are
never compared by themselves, but name the changed files in the error message."""


class Checkpoints:
    """The checkpoints of one run in a folder, written by one run at a time.

    The last `keep_last` are kept and, with `keep_best`, the one with the highest score as well.
    """

    def __init__(self, folder: str | Path, *, keep_last: int = 2, keep_best: bool = False):
        self.folder = Path(folder).absolute()
        self.latest: int | None = None
        self._keep_last = max(keep_last, 1)
        self._keep_best = keep_best
        self._scores: dict[int, float | None] = {}
        self._manager: Any = None
        self._quiet = _Quiet()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: tuple[int, Future[None]] | None = None

    def restore(
        self, like: TrainState, identity: Mapping[str, Any] | None = None
    ) -> tuple[TrainState, Values] | None:
        """Restore the newest sound checkpoint.

        Steps that are not sound are named in a warning, and removed once an earlier one is
        restored.

        Args:
            like: A state with the shapes, dtypes and shardings to restore. Its arrays are deleted.
            identity: What the run depends on, as JSON values; None skips the comparison.

        Returns:
            The state and the values saved with it; None if the folder holds no checkpoint.

        Raises:
            InputError: If no step is sound, `identity` differs outside its part FREE, or the state
                is of another kind than `like`. Nothing is removed then.
        """
        step, faults = self._newest_sound()
        if step is None:
            if faults:
                told = "; ".join(f"step {at}: {fault}" for at, fault in faults.items())
                raise InputError(
                    f"{self.folder}: no checkpoint is sound ({told}); delete it to start anew"
                )
            self._clear({})
            return None
        restored = _restore(self.folder, step, like, identity)
        for at, fault in faults.items():
            log.warning("checkpoint of step %d is passed over: %s; using step %d", at, fault, step)
        self._clear(faults)
        self.latest = step
        for at in steps_on_disk(self.folder):
            kept = read_manifest(self.folder, at)
            self._scores[at] = kept.score if kept else None
        return restored

    def save(self, state: TrainState, values: Values, score: float | None = None) -> None:
        """Start to write a state under its step number, unless that step is saved already.

        Returns once the arrays are on the host and may be donated. On a CPU, where the host's view
        is the device's own buffer, it returns once they are written: the next step would otherwise
        need memory for a second state. An earlier save is waited for, and its failure raised.
        """
        import orbax.checkpoint as ocp

        self.wait()
        step = int(state.step)
        if step in self._scores:
            return
        if self._manager is None:
            self._quiet.__enter__()
            options = ocp.CheckpointManagerOptions(create=True, max_to_keep=None)
            # Compression takes less than a tenth off float32 weights and moments, for three times
            # the time and a second copy in memory.
            handler = ocp.PyTreeCheckpointHandler(use_compression=False)
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=options,
                item_names=("state", "values"),
                item_handlers={"state": handler, "values": ocp.JsonCheckpointHandler()},
            )
        try:
            _check_space(self.folder, state)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state._asdict()),
                    values=ocp.args.JsonSave({"json": json.dumps(values)}),
                ),
                force=True,
            )
            if jax.default_backend() == "cpu":
                self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(step, error) from error
        self._running = (step, self._worker.submit(self._finish, step, score))

    def set_score(self, step: int, score: float) -> None:
        """Set the score of a saved step, from an evaluation that came after the save."""
        self.wait()
        kept = read_manifest(self.folder, step)
        if kept is not None and is_first():
            write_manifest(self.folder, Manifest(step, kept.files, score))
        self._scores[step] = score

    def best_score(self) -> float | None:
        """The highest score among the steps that are kept and completely written."""
        best = _best(self._scores)
        return None if best is None else self._scores[best]

    def check(self) -> None:
        """Raise the error of a save that has ended, if there is one; returns at once."""
        if self._running is not None and self._running[1].done():
            self.wait()

    def wait(self) -> None:
        """Return when the running save, if any, is completely on disk.

        Raises:
            OSError: If it could not be written, in one line; earlier checkpoints stay.
        """
        if self._running is None:
            return
        (step, running), self._running = self._running, None
        try:
            running.result()
        except Exception as error:
            raise self._failure(step, error) from error

    def close(self) -> None:
        """Wait as `wait` does, then release the folder."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            if self._manager is not None:
                with contextlib.suppress(Exception):  # the save's failure, which wait() has raised
                    self._manager.close()
                self._manager = None
                self._quiet.__exit__()

    def _newest_sound(self) -> tuple[int | None, dict[int, str]]:
        """(newest step whose files match its manifest, faults of the later steps by number)."""
        found, faults = None, {}
        for step in reversed(steps_on_disk(self.folder)) if is_first() else ():
            fault = fault_of(self.folder, step)
            if fault is None:
                found = step
                break
            faults[step] = fault
        found, count = gather_values((found, len(faults)))[0]
        if not is_first() and count and found is None:
            faults = {-1: "see the first host's message"}
        return found, faults

    def _clear(self, faults: dict[int, str]) -> None:
        """Remove the steps with faults, and the remains of saves that were cut off."""
        if is_first():
            for step in faults:
                remove_step(self.folder, step)
            for path in unfinished(self.folder):
                log.warning("%s was cut off while being written; removed", path.name)
                shutil.rmtree(path, ignore_errors=True)
        gather_values(None)  # no host goes on before it is cleared

    def _finish(self, step: int, score: float | None) -> None:
        """In the background: when a step is committed, write its manifest, then prune."""
        self._manager.wait_until_finished()
        if is_first():
            write_manifest(self.folder, make_manifest(self.folder, step, score))
        self._scores[step] = score
        self.latest = step
        for old in self._surplus():
            del self._scores[old]
            if is_first():
                remove_step(self.folder, old)

    def _surplus(self) -> list[int]:
        steps = sorted(self._scores)
        kept = {*steps[-self._keep_last :], *([_best(self._scores)] if self._keep_best else [])}
        return [step for step in steps if step not in kept]

    def _failure(self, step: int, error: Exception) -> OSError:
        """The error of a failed save, in one line; removes its files to free the space."""
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()  # nothing may write while it is cleared away
        if is_first():
            if read_manifest(self.folder, step) is None:
                remove_step(self.folder, step)
            for path in unfinished(self.folder):
                shutil.rmtree(path, ignore_errors=True)
        text = " ".join(str(error).split())
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text
        why = "the disk is full" if full else f"{type(error).__name__}: {text[:200]}"
        kept = "none was saved before" if self.latest is None else f"step {self.latest} is intact"
        told = f"checkpoint of step {step} could not be saved: {why}; {kept}"
        return OSError(errno.ENOSPC if full else errno.EIO, told, str(self.folder))


def read_checkpoint(
    folder: str | Path, like: TrainState, step: int | None = None, *, best: bool = False
) -> TrainState:
    """Read a saved state: that of `step`, the best by score, or the newest one (the default).

    The arrays of `like` are deleted.

    Raises:
        InputError: If the step is missing or not sound.
    """
    folder = Path(folder).absolute()
    return _restore(folder, _sound_step(folder, step, best=best), like, None)[0]


def read_params(folder: str | Path, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """Read the parameters of a saved state, and nothing else, onto one device.

    Returns:
        (step, parameters): those of `step`, by default of the newest.

    Raises:
        InputError: If the step is missing or not sound.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).absolute()
    step = _sound_step(folder, step)
    place = folder / str(step) / "state"
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with _Quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        held = {"params": reader.metadata(place).item_metadata.tree["params"]}
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), held
        )
        how = ocp.checkpoint_utils.construct_restore_args(wanted)
        arguments = ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True)
        return step, reader.restore(place, args=arguments)["params"]


def best_step(folder: str | Path) -> int | None:
    """The kept step with the highest score; None if no evaluation gave one."""
    folder = Path(folder)
    kept = [read_manifest(folder, at) for at in steps_on_disk(folder)]
    return _best({each.step: each.score for each in kept if each})


def _best(scores: Mapping[int, float | None]) -> int | None:
    """The step with the highest score, the last one of a tie."""
    scored = {step: score for step, score in scores.items() if score is not None}
    return max(scored, key=lambda step: (scored[step], step), default=None)


def _sound_step(folder: Path, step: int | None, *, best: bool = False) -> int:
    """The step asked for, the best by score, or the newest; InputError if it is not sound."""
    steps = steps_on_disk(folder)
    if best:
        step = best_step(folder)
    elif step is None:
        step = max(steps, default=None)
    if step is None:
        raise InputError(f"{folder}: no checkpoint{' with a score' if best else ''} is there")
    fault = fault_of(folder, step) if step in steps else "there is no such step"
    if fault is not None:
        raise InputError(f"{folder}: step {step}: {fault}; there are {steps}")
    return step


def _restore(
    folder: Path, step: int, like: TrainState, identity: Mapping[str, Any] | None
) -> tuple[TrainState, Values]:
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(create=False)
    manager = ocp.CheckpointManager(folder, options=options, item_names=("state", "values"))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like._asdict()
    )
    try:
        held = manager.restore(step, args=ocp.args.Composite(values=ocp.args.JsonRestore()))
        values: Values = json.loads(held["values"]["json"])
        if identity is not None:
            _check_identity(folder, step, values.get("identity", {}), identity)
        for leaf in jax.tree.leaves(like):
            leaf.delete()  # so that two states are never in memory at once
        state = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        first = " ".join(str(error).split())[:300]
        raise InputError(
            f"{folder}: step {step} holds the state of another model or optimizer ({first}); "
            "name another directory to start anew"
        ) from None
    finally:
        manager.close()
    return TrainState(**state["state"]), values


def _check_identity(
    folder: Path, step: int, found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Raise InputError for a difference between identities; within FREE it is only a warning."""
    changed = differences(_flat(found), _flat(json.loads(json.dumps(wanted))))
    parts: dict[str, dict[str, Any]] = {"": {}, FREE: {}, FILES: {}}
    for name, both in changed.items():
        part = next((one for one in (FREE, FILES) if name.startswith(f"{one}.")), "")
        parts[part][name.removeprefix(f"{part}.")] = both
    told = []
    for name, (one, other) in parts[""].items():
        files = [at.removeprefix(f"{name}.") for at in parts[FILES] if at.startswith(f"{name}.")]
        there = f"{', '.join(files)} changed" if files else f"{one!r} there, {other!r} here"
        told.append(f"{name}: {there}")
    if told:
        raise InputError(
            f"{folder}: step {step} is of a run with other settings ({', '.join(told)}); "
            "go on with those, or name another directory to start anew"
        )
    for name, (one, other) in parts[FREE].items():
        schedule = "learning rates follow the schedule of these"
        what = schedule if name == "steps" else "not to the bit"
        log.warning("%s: %s until step %d, %s from there on; %s", name, one, step, other, what)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted names."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        nested = isinstance(item, Mapping)
        flat |= _flat(item, f"{prefix}{name}.") if nested else {f"{prefix}{name}": item}
    return flat


class _Quiet(logging.Filter):
    """Drops orbax's log records: long tracebacks for a failure that is reported here in a line."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for a record of orbax."""
        return "orbax" not in record.pathname

    def __enter__(self) -> None:
        logging.getLogger("absl").addFilter(self)

    def __exit__(self, *error: object) -> None:
        logging.getLogger("absl").removeFilter(self)


def _check_space(folder: Path, state: TrainState) -> None:
    """Raise OSError, before writing, if less is free than 90 % of the bytes this host writes."""
    needed = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves((state.params, state.optimizer))
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    )
    if shutil.disk_usage(folder).free < 0.9 * needed:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed")


VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """Checksums of a step's files: (bytes, SHA-256 in hex) by path inside the step's folder.

    `score` is that of the step's evaluation, higher is better; None without one.
    """

    step: int
    files: dict[str, tuple[int, str]]
    score: float | None = None


def manifest_path(folder: Path, step: int) -> Path:
    """Path of a step's manifest, which lies beside the step's folder."""
    return folder / f"{step}.manifest.json"


def make_manifest(folder: Path, step: int, score: float | None = None) -> Manifest:
    """Compute the manifest of a step; all its files are synced to disk when this returns."""
    root = folder / str(step)
    files = {
        path.relative_to(root).as_posix(): (path.stat().st_size, _checksum(path, sync=True))
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
    for part in (*(path for path in root.rglob("*") if path.is_dir()), root, folder):
        sync_folder(part)
    return Manifest(step, files, score)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest beside its step, atomically."""
    value = {"version": VERSION, "files": manifest.files, "score": manifest.score}
    write_whole(manifest_path(folder, manifest.step), [json.dumps(value).encode() + b"\n"])


def read_manifest(folder: Path, step: int) -> Manifest | None:
    """The manifest of a step; None if it is missing or damaged."""
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
    """Steps that have a folder, complete or not, in ascending order."""
    found = (path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir())
    return sorted(int(path.name) for path in found)


def fault_of(folder: Path, step: int) -> str | None:
    """What is wrong with a step's files, in a few words; None if all match its manifest.

    Reads every byte of the step.
    """
    manifest = read_manifest(folder, step)
    if manifest is None:
        damaged = manifest_path(folder, step).exists()
        return "its manifest is damaged" if damaged else "it was cut off while being written"
    for name, (size, checksum) in manifest.files.items():
        path = folder / str(step) / name
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
    """Folders under a temporary name, left by saves that were cut off."""
    return sorted(path for path in folder.glob("*orbax-checkpoint-tmp*") if path.is_dir())


def remove_step(folder: Path, step: int) -> None:
    """Delete a step, its manifest first, so that what a kill leaves does not look complete."""
    manifest_path(folder, step).unlink(missing_ok=True)
    shutil.rmtree(folder / str(step), ignore_errors=True)


def _checksum(path: Path, *, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
