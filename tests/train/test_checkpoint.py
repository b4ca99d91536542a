"""Checkpoints that were damaged on disk, and disks that are full."""

import json
import logging
import shutil
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from w2s_jax.errors import InputError
from w2s_jax.train import checkpoint as checkpoints_module
from w2s_jax.train.checkpoint import (
    Checkpoints,
    fault_of,
    manifest_path,
    read_checkpoint,
    remove_step,
    steps_on_disk,
)
from w2s_jax.train.config import LoopConfig
from w2s_jax.train.loop import train
from w2s_jax.train.step import init_state, make_train_step

OPTIMIZER = optax.adamw(1e-3)


def state_at(step, width=64):
    state = init_state({"w": jnp.full((width, 8), float(step))}, OPTIMIZER, jax.random.key(step))
    return state._replace(step=jnp.int32(step))


def save(folder, *steps, **options):
    checkpoints = Checkpoints(folder, **{"keep_last": 10} | options)
    checkpoints.restore(state_at(0))
    for step in steps:
        checkpoints.save(state_at(step), {"identity": {}, "at": step})
    checkpoints.close()


def restore(folder):
    checkpoints = Checkpoints(folder)
    restored = checkpoints.restore(state_at(0))
    checkpoints.close()
    return restored


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "checkpoints"
    save(folder, 10, 20, 30)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "checkpoints")


def largest(folder, step):
    return max((folder / str(step)).rglob("d/*"), key=lambda path: path.stat().st_size)


def flip(folder, step):
    path = largest(folder, step)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(folder, step):
    path = largest(folder, step)
    path.write_bytes(path.read_bytes()[:-7])


def lose_a_file(folder, step):
    largest(folder, step).unlink()


def cut_off(folder, step):
    manifest_path(folder, step).unlink()


def damage_manifest(folder, step):
    manifest_path(folder, step).write_text('{"version": 1, "fil')


DAMAGES = {
    flip: "has changed since it was written",
    truncate: "bytes",
    lose_a_file: "is missing",
    cut_off: "cut off while being written",
    damage_manifest: "manifest is damaged",
}


def assert_state(restored, step):
    state, values = restored
    jax.tree.map(np.testing.assert_array_equal, state[:3], state_at(step)[:3])
    assert jax.random.key_data(state.key).tolist() == [0, step]
    assert values["at"] == step


def test_a_saved_state_comes_back_bit_for_bit(folder):
    assert_state(restore(folder), 30)
    assert all(fault_of(folder, step) is None for step in (10, 20, 30))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_is_told_and_the_one_before_is_used(folder, caplog, damage):
    damage(folder, 30)
    with caplog.at_level(logging.WARNING):
        assert_state(restore(folder), 20)
    (told,) = [r.getMessage() for r in caplog.records if r.name.startswith("w2s_jax")]
    assert "step 30 is passed over" in told
    assert DAMAGES[damage] in told
    assert "using step 20" in told
    assert steps_on_disk(folder) == [10, 20]


def test_every_byte_of_a_step_is_covered(folder):
    """A byte changed in any file, those of orbax's own records included, is found."""
    files = [path for path in (folder / "30").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 5
    for path in files:
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 255]) + data[1:])
        assert "has changed" in str(fault_of(folder, 30)), path
        path.write_bytes(data)
    assert fault_of(folder, 30) is None


def test_two_damaged_steps_fall_back_further(folder):
    truncate(folder, 30)
    flip(folder, 20)
    assert_state(restore(folder), 10)


def test_where_no_step_is_sound_nothing_is_removed(folder):
    for step in (10, 20, 30):
        flip(folder, step)
    with pytest.raises(InputError, match=r"no checkpoint is sound \(step 30: .*; step 10: "):
        restore(folder)
    assert steps_on_disk(folder) == [10, 20, 30]


def test_what_a_cut_off_save_left_is_cleared(folder, caplog):
    left = folder / "40.orbax-checkpoint-tmp"
    shutil.copytree(folder / "30", left)
    with caplog.at_level(logging.WARNING):
        assert_state(restore(folder), 30)
    assert "40.orbax-checkpoint-tmp was cut off" in caplog.text
    assert not left.exists()


def test_the_step_passed_over_is_saved_anew(folder):
    flip(folder, 30)
    save(folder, 30)
    assert_state(restore(folder), 30)


def test_the_last_are_kept_and_the_others_removed_with_their_manifests(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep_last=2)
    assert steps_on_disk(tmp_path) == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "3", "3.manifest.json", "4", "4.manifest.json",
    ]  # fmt: skip


def test_removing_a_step_that_is_not_there_is_no_error(tmp_path):
    remove_step(tmp_path, 5)


def test_a_chosen_step_is_read(folder):
    assert int(read_checkpoint(folder, state_at(0), 20).step) == 20
    assert int(read_checkpoint(folder, state_at(0)).step) == 30
    with pytest.raises(InputError, match="step 25: there is no such step"):
        read_checkpoint(folder, state_at(0), 25)
    with pytest.raises(InputError, match="no checkpoint with a score"):
        read_checkpoint(folder, state_at(0), best=True)


def test_a_state_of_other_shapes_is_refused(folder):
    with pytest.raises(InputError, match="step 30 holds the state of another model"):
        Checkpoints(folder).restore(state_at(0, width=32))


def test_a_save_goes_on_while_the_buffers_are_donated(tmp_path, monkeypatch):
    """The bytes written are those of the step saved, though later steps reuse its memory."""
    hold, real = threading.Event(), Checkpoints._finish

    def held_back(*arguments):
        assert hold.wait(30)
        real(*arguments)

    monkeypatch.setattr(Checkpoints, "_finish", held_back)
    add = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.restore(state_at(0))
    parts = state_at(5, width=200_000)[:3]
    checkpoints.save(state_at(5)._replace(params=parts[1], optimizer=parts[2]), {"at": 5})
    for _ in range(5):
        parts = add(parts)
    jax.block_until_ready(parts)
    assert checkpoints.latest is None  # the save was not waited for
    hold.set()
    checkpoints.close()
    like = state_at(0, width=200_000)
    saved = read_checkpoint(tmp_path, like)
    np.testing.assert_array_equal(saved.params["w"], np.full((200_000, 8), 5.0, np.float32))


FULL_DISK = "checkpoint of step 40 could not be saved: the disk is full; step 30 is intact"


def fail(error):
    def raising(*arguments, **options):
        raise error

    return raising


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("make_manifest", ValueError("tensorstore: [No space left on device]")),
        ("write_manifest", OSError(28, "No space left on device")),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_the_earlier_steps(folder, monkeypatch, place, error):
    checkpoints = Checkpoints(folder)
    checkpoints.restore(state_at(0))
    monkeypatch.setattr(checkpoints_module, place, fail(error))
    checkpoints.save(state_at(40), {})
    with pytest.raises(OSError, match=FULL_DISK) as raised:
        checkpoints.close()
    assert (raised.value.errno, raised.value.strerror) == (28, FULL_DISK)
    monkeypatch.undo()
    assert steps_on_disk(folder) == [10, 20, 30]
    assert_state(restore(folder), 30)


@pytest.mark.parametrize(("width", "fits"), [(64, True), (65, False)])
def test_a_state_for_which_there_is_no_room_is_not_begun(folder, monkeypatch, width, fits):
    room = 3 * 64 * 8 * 4 * 0.9 + 10  # parameters and two moments, and two counts
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=room))
    checkpoints = Checkpoints(folder, keep_last=9)
    checkpoints.restore(state_at(0))
    if fits:
        checkpoints.save(state_at(40, width), {})
    else:
        with pytest.raises(OSError, match=FULL_DISK):
            checkpoints.save(state_at(40, width), {})
    checkpoints.close()
    assert steps_on_disk(folder) == [10, 20, 30, *([40] if fits else [])]


def square(params, frozen, batch, key):
    value = ((params["w"] - batch) ** 2).mean()
    return value, jnp.float32(1), {"loss": value}


def go_on(folder, batches=jnp.float32):
    """A run of 12 steps that saves every third, begun or taken up again."""
    weights = np.random.default_rng(1).normal(size=(64, 1024)).astype(np.float32)
    state = init_state({"w": weights}, OPTIMIZER, jax.random.key(0))
    step, config = make_train_step(square, OPTIMIZER), LoopConfig(save_every=3)
    train(state, step, batches, 12, config=config, directory=folder)


FULL = """
import json, resource, signal, time
from pathlib import Path
import jax.numpy as jnp
from tests.train.test_checkpoint import go_on

def batches(i):
    if i == 4:
        while not (folder / "checkpoints" / "3.manifest.json").exists():
            time.sleep(0.01)
        # A file may not grow beyond this any more: writes fail as on a full disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return jnp.float32(i)

folder = Path("FOLDER")
try:
    go_on(folder, batches)
except OSError as error:
    print(json.dumps([error.strerror, error.filename]))
"""


def test_a_run_whose_writes_fail_ends_in_one_line_and_goes_on_later(run_python, tmp_path):
    told, where = json.loads(run_python(FULL.replace("FOLDER", str(tmp_path))))
    assert "checkpoint of step 6 could not be saved" in told
    assert "step 3 is intact" in told
    assert "\n" not in told
    assert where == str(tmp_path / "checkpoints")
    assert steps_on_disk(tmp_path / "checkpoints") == [3]
    assert fault_of(tmp_path / "checkpoints", 3) is None
    go_on(tmp_path)
    assert steps_on_disk(tmp_path / "checkpoints") == [9, 12]
