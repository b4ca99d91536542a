"""Processes that begin with the imports done: forks of one that has done them, and nothing else."""

import multiprocessing
import os
import tempfile
from pathlib import Path

IMPORTED = (
    "hypothesis.extra.numpy",
    "optax",
    "pytest",
    "tests.tiny",
    "w2s_jax.models.load",
    "w2s_jax.search",
    "w2s_jax.train.objectives",
)
"""What most sources ask for. None of it starts threads or looks for a device."""


def run_forked(code: str, environment: dict[str, str], folder: Path, timeout: float) -> str:
    """What a source printed, run as the main module in a folder, a second or so sooner.

    What is read from the environment while jax is imported is as it was for the first such process.
    Raises AssertionError with the end of its errors where it fails or takes longer.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with tempfile.TemporaryDirectory() as held:
        out, errors = Path(held, "out"), Path(held, "errors")
        process = context.Process(target=_run, args=(code, environment, folder, out, errors))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(f"still running after {timeout:g} s\n{errors.read_text()[-4000:]}")
        assert process.exitcode == 0, errors.read_text()[-4000:]
        return out.read_text()


def _run(code: str, environment: dict[str, str], folder: Path, out: Path, errors: Path) -> None:
    for stream, path in ((1, out), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    exec(compile(code, "<the test's source>", "exec"), {"__name__": "__main__"})
