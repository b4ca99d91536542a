"""Several processes as several hosts, each with virtual CPU devices, for tests."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import ROOT, with_devices

MAIN = "import sys; from w2s_jax.cli.main import main; sys.exit(main())"


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": with_devices(devices),
        "PYTHONPATH": str(ROOT),
    }


class Hosts:
    """Processes that run `w2s` with these arguments together, or `code` in place of it.

    What each says goes to a file of its own in `place`. A single one is told of no others.
    """

    def __init__(
        self,
        count: int,
        arguments: Sequence[str],
        place: Path,
        *,
        devices: int = 2,
        code: str = MAIN,
        folders: Sequence[Path] | None = None,
    ):
        address = f"127.0.0.1:{free_port()}"
        self.logs = [place / f"host{host}.log" for host in range(count)]
        self.processes = []
        for host, log in enumerate(self.logs):
            own = [f"--hosts={address},{count},{host}"] if count > 1 else []
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", code, *arguments, *own],
                        env=environment(devices),
                        cwd=place if folders is None else folders[host],
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for log in self.logs:
            print(log.name, log.read_text()[-3000:])

    def statuses(self, seconds: float = 240) -> list[int]:
        """Exit statuses of all."""
        return [process.wait(seconds) for process in self.processes]

    @property
    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def said(self, host: int) -> str:
        return self.logs[host].read_text()


def run_hosts(count: int, arguments: Sequence[str], place: Path, *, devices: int = 2) -> list[int]:
    """Run `w2s` on so many hosts to its end; the exit statuses."""
    with Hosts(count, arguments, place, devices=devices) as hosts:
        return hosts.statuses()
