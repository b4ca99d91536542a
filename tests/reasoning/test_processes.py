"""Processes of a run: how they fail, stop when asked to, and die with the one that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from w2s_jax.errors import InputError
from w2s_jax.reasoning.workers import run_module

ROOT = Path(__file__).parents[2]
CHILD = """
import os, pathlib, signal, sys, time
if sys.argv[1] == "save":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pathlib.Path(sys.argv[2]).write_text(str(os.getpid()))
time.sleep(60)
"""
PARENT = """
import sys
from w2s_jax.reasoning.workers import run_module
try:
    run_module("child", *sys.argv[1:])
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    return tmp_path


def wait_for(found, seconds=60.0):
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def start(folder, how):
    words = [sys.executable, "-c", PARENT, how, str(folder / "pid")]
    parent = subprocess.Popen(words, cwd=folder, start_new_session=True)
    pid = folder / "pid"
    return parent, int(wait_for(lambda: pid.exists() and pid.read_text()))


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell no child of this")
def test_a_killed_run_leaves_no_process(folder):
    parent, child = start(folder, "save")
    parent.kill()
    parent.wait()
    wait_for(lambda: gone(child))


@pytest.mark.parametrize("how", ["save", "end"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on_and_waited_for(folder, how, number):
    parent, child = start(folder, how)
    parent.send_signal(number)
    assert parent.wait(60) == 130
    assert gone(child)


def test_a_failure_is_one_line(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    (folder / "fails.py").write_text("import sys\nprint('said')\nsys.exit(3)\n")
    with pytest.raises(InputError, match=r"^`python -m fails a b` ended with status 3; so it is$"):
        run_module("fails", "a", "b", hint="so it is")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "said\n")
    (folder / "stopped.py").write_text("import sys\nsys.exit(75)\n")
    with pytest.raises(KeyboardInterrupt):
        run_module("stopped")
