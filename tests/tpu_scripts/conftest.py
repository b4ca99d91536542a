"""A stub cloud for tpu_scripts/: a gcloud and pythons on PATH, in a folder of the test."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

SCRIPTS = ROOT / "tpu_scripts"
STUB = Path(__file__).with_name("stub_gcloud.sh")
SLICE = ["--name", "probe", "--project", "mine", "--zone", "us-east5-b"]
WHERE = ["--project=mine", "--zone=us-east5-b"]

# Stands for the interpreters of a worker: makes a venv of itself, records what pip is told, and as
# JAX's probe says what the test has it say.
PYTHON = """#!/bin/bash
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *jax.distributed*) echo "process of 2"; exit "$(cat "$W2S_STUB/probe")" ;;
    "-m pip"*) echo "$STUB_WORKER: ${*:3}" >>"$W2S_STUB/pip"
        if [[ -e "$W2S_STUB/pip_fails" && $* == *" @ "* ]]; then echo "no wheel"; exit 1; fi ;;
esac
"""


class Cloud:
    """What the stub plays, what it recorded, and the scripts run against it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "cloud"
        self.work = folder / "work"
        bin_folder = folder / "bin"
        for made in (self.folder, self.work, bin_folder):
            made.mkdir()
        shutil.copy(STUB, bin_folder / "gcloud")
        for name in ("python", "python3.11", "python3.12", "python3.13"):
            (bin_folder / name).write_text(PYTHON)
        for made in bin_folder.iterdir():
            made.chmod(0o755)
        self.env = {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "HOME": str(folder),
            "W2S_STUB": str(self.folder),
            "W2S_TPU_POLL": "0.02",
            "W2S_TPU_TRIES": "3",
        }
        self.play(node=["MISSING"], queue=["MISSING"], create=["created"])
        for name, text in {"workers": "2", "type": "v6e-8", "others": "", "probe": "0"}.items():
            (self.folder / name).write_text(text)

    def play(self, **answers: list[str]) -> None:
        for name, states in answers.items():
            (self.folder / name).write_text("\n".join(states))

    def ready(self, *, set_up: bool = True) -> None:
        """A slice of two workers, with worker.sh where setup.sh puts it."""
        self.play(node=["READY"])
        for worker in range(2 if set_up else 0):
            home = self.folder / f"worker-{worker}" / "w2s"
            home.mkdir(parents=True)
            shutil.copy(SCRIPTS / "worker.sh", home)

    def home(self, worker: int) -> Path:
        return self.folder / f"worker-{worker}" / "w2s"

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        calls = path.read_bytes().decode().split("\x1e")[:-1] if path.exists() else []
        return [call.split("\x1f") for call in calls]

    def verbs(self) -> list[str]:
        """The calls, by the words that say what they do: `tpu-vm create`."""
        return [
            " ".join([w for w in call if w not in ("alpha", "compute", "tpus")][:2])
            for call in self.calls
        ]

    def run(self, script: str, *arguments: str, slice_flags: bool = True, **env: str) -> Any:
        return subprocess.run(
            ["bash", str(SCRIPTS / script), *(SLICE if slice_flags else []), *arguments],
            cwd=self.work,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            stdin=subprocess.DEVNULL,
        )


def wait_for(check: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)
