"""Compiled programs on disk: kept, found again, bounded, shown, cleared, and never in the way."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from w2s_jax import program_cache
from w2s_jax.cli.main import main

SOURCE = """
from w2s_jax import program_cache
print(program_cache.start())
import jax, jax.numpy as jnp
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4)))[0, 0]))
print("hits", sum("cache_hits" in name for name in events))
"""


@pytest.fixture
def compute(tmp_path):
    """Runs a small program in a process of its own that keeps it; its lines, and its errors'."""

    def run(folder=tmp_path, **more):
        names = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")
        env = {name: value for name, value in os.environ.items() if not name.startswith(names)}
        env |= {"W2S_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)} | more
        env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, "-c", SOURCE]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return done.stdout.splitlines(), done.stderr.splitlines()

    return run


def test_programs_are_found_again_and_damaged_ones_compiled_anew(compute, tmp_path, monkeypatch):
    first, _ = compute()
    again, _ = compute()
    assert first[:2] == again[:2]
    assert (first[0], first[2]) == ("None", "hits 0")
    assert int(again[2].split()[1]) > 0
    monkeypatch.setenv("W2S_CACHE_DIR", str(tmp_path))
    found = program_cache.usage()
    entries = sorted(tmp_path.glob("programs/*/*-cache"))
    assert found.programs == len(entries) > 0
    assert found.size == sum(path.stat().st_size for path in entries)
    for path in entries:
        path.write_bytes(b"damaged")
    spoilt, told = compute()
    assert spoilt == [*first[:2], "hits 0"]
    told = [line for line in told if "compil" in line]
    assert len(told) == 1
    assert told[0].startswith("compiled anew, or not kept for later runs: Error reading")


def test_a_small_limit_is_held(compute, tmp_path):
    compute(JAX_COMPILATION_CACHE_MAX_SIZE="3000")
    kept = [path.stat().st_size for path in tmp_path.glob("programs/*/*-cache")]
    assert sum(kept) <= 3000


def test_a_folder_that_cannot_be_written_is_one_line(compute, tmp_path):
    (tmp_path / "file").write_text("")
    (note, value, hits), told = compute(tmp_path / "file")
    assert note.startswith("compiled programs are not kept: ")
    assert "Not a directory (W2S_CACHE_DIR names another folder)" in note
    assert float(value) > 0
    assert hits == "hits 0"
    assert not [line for line in told if "cache" in line]


def test_jaxs_own_setting_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("W2S_CACHE_DIR", str(tmp_path / "ours"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "theirs"))
    assert program_cache.start() is None
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "theirs")
    assert not (tmp_path / "ours").exists()


def test_the_command_shows_and_clears(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("W2S_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE", raising=False)
    folder = tmp_path / "programs" / program_cache.machine()
    folder.mkdir(parents=True)
    (folder / "one-cache").write_bytes(bytes(2**20))
    (folder / "one-atime").write_bytes(bytes(8))
    assert main(["cache"]) == 0
    shown = f"{tmp_path}/programs: 1 programs, 1.0 MiB"
    assert capsys.readouterr().out == f"{shown}, at most 2048 MiB for each kind of machine\n"
    assert main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == f"{shown} deleted\n"
    assert not list(tmp_path.iterdir())
    assert main(["cache"]) == 0
    assert "0 programs" in capsys.readouterr().out


def test_no_cache_stands_before_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("W2S_CACHE_DIR", str(tmp_path))
    assert main(["--no-cache", "cache", "--clear"]) == 0
    assert capsys.readouterr().out == "no programs are kept: W2S_CACHE_DIR is empty\n"
