"""Compiled programs on disk: kept, found again, bounded, shown, cleared, and never in the way."""

import os
import subprocess
import sys
import warnings

import pytest

from tests.conftest import ROOT
from w2s_jax.cli import cache
from w2s_jax.cli import main as cli
from w2s_jax.cli.main import main

SOURCE = """
from w2s_jax.cli.main import keep_programs
print(keep_programs())
import jax, jax.numpy as jnp
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4)))[0, 0]))
print("hits", sum("cache_hits" in name for name in events))
"""


@pytest.fixture
def compute(tmp_path):
    """Runs a small program in a process of its own that keeps it; its lines, and its errors'."""

    def run(limit=2**30):
        names = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")
        env = {name: value for name, value in os.environ.items() if not name.startswith(names)}
        env |= {"W2S_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), cli.LIMIT: str(limit)}
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
    found = cache.usage()
    entries = sorted(tmp_path.glob("programs/*/*-cache"))
    assert found.programs == len(entries) > 0
    assert found.size == sum(path.stat().st_size for path in entries)
    entries[0].write_bytes(b"damaged")
    for path in entries[1:]:
        path.unlink()
        path.with_name(path.name.replace("-cache", "-atime")).unlink()
    limit = found.size // 2
    spoilt, told = compute(limit)
    assert spoilt == [*first[:2], "hits 0"]
    assert 0 < cache.usage().size <= limit
    told = [line for line in told if "compil" in line]
    assert len(told) == 1
    assert told[0].startswith("compiled anew, or not kept for later runs: Error reading")


@pytest.fixture
def fresh(monkeypatch):
    """Has no setting of jax's cache in the environment, and none reach the jax of this process."""
    for name in (cli.FOLDER, cli.ENABLED, *cli.SETTINGS):
        monkeypatch.setenv(name, "")  # so that what is set by the test goes again
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


def test_jax_is_told_a_folder_and_a_limit(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("W2S_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "7")
    assert cli.keep_programs() is None
    folder = tmp_path / "programs" / cli.machine()
    assert folder.is_dir()
    assert not list(folder.iterdir())
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    assert os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] == str(2 * 2**30)
    assert os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] == "7"


def test_a_folder_that_cannot_be_written_is_one_line(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("W2S_CACHE_DIR", str(tmp_path / "file"))
    note = cli.keep_programs()
    assert note.startswith("compiled programs are not kept: ")
    assert "Not a directory (W2S_CACHE_DIR names another folder)" in note
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_jaxs_own_setting_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("W2S_CACHE_DIR", str(tmp_path / "ours"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "theirs"))
    assert cli.keep_programs() is None
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "theirs")
    assert not (tmp_path / "ours").exists()


def test_the_command_shows_and_clears(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("W2S_CACHE_DIR", str(tmp_path))
    for name in (cli.LIMIT, cli.FOLDER):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "programs" / cli.machine()
    folder.mkdir(parents=True)
    (folder / "one-cache").write_bytes(bytes(2**20))
    (folder / "one-atime").write_bytes(bytes(8))
    own = tmp_path / "programs" / "thesis" / "draft"
    own.parent.mkdir()
    own.write_text("of the user's")
    assert main(["cache"]) == 0
    shown = f"{tmp_path}/programs: 1 programs, 1.0 MiB"
    assert capsys.readouterr().out == f"{shown}, at most 2048 MiB for each kind of machine\n"
    assert main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == f"{shown} deleted\n"
    assert not folder.exists()
    assert own.read_text() == "of the user's"
    assert main(["cache"]) == 0
    assert "0 programs" in capsys.readouterr().out


def test_no_cache_stands_before_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setenv("W2S_CACHE_DIR", str(tmp_path))
    assert main(["--no-cache", "--no-cache", "cache", "--clear"]) == 0
    assert capsys.readouterr().out == "no programs are kept: W2S_CACHE_DIR is empty\n"
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"


def test_commands_that_search_or_train_keep_programs(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(cli, "keep_programs", lambda: started.append("programs are not kept"))
    for command, keeps in (("search", True), ("sft", True), ("bench search", False)):
        flags = {"search": ["--policy=/none", "--prompts=/none", "--output=/none"]}
        flags |= {"sft": ["--model=/none", "--data=/none", "--output=/none/here"]}
        flags |= {"bench search": ["--policy-layers=0"]}
        started.clear()
        assert main([*command.split(), *flags[command]]) == 2, capsys.readouterr()
        assert bool(started) == keeps, command


def test_an_unknown_home_is_one_line(monkeypatch, capsys):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("W2S_CACHE_DIR", "~nobody-of-this-name/programs")
    assert main(["cache"]) == 2
    assert "W2S_CACHE_DIR names a folder" in capsys.readouterr().err
    assert cli.keep_programs().startswith("compiled programs are not kept: ")
