"""Work in separate processes, which may hang, crash or exhaust memory, and die with this one.

A small task that fails loses only its own result. A module is run by `python -m
w2s_jax.reasoning.workers PARENT MODULE [ARGUMENT ..]`. Imports no NumPy.
"""

import contextlib
import importlib
import json
import logging
import math
import os
import resource
import runpy
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from threading import Lock
from typing import Any

from w2s_jax.errors import InputError

STOPPED = (75, 130, -signal.SIGINT, -signal.SIGTERM)
"""Exit statuses of a process that was asked to stop; with 75 its work is saved."""
_PR_SET_PDEATHSIG = 1


def run_module(module: str, *arguments: str, hint: str = "see its message") -> None:
    """Run `python -m MODULE ARGUMENTS` to its end; its output goes to this process's stderr.

    SIGINT and SIGTERM are passed on, and the process is waited for; a second SIGINT kills it. On
    Linux it is killed when this process dies in any way.

    Raises:
        KeyboardInterrupt: If it was stopped.
        InputError: If it fails; the message ends with `hint`.
    """
    # Imported here: every worker of grading imports this file, and should start quickly.
    from w2s_jax.train.loop import Stop

    words = [sys.executable, "-m", "w2s_jax.reasoning.workers", str(os.getpid()), module]
    with Stop() as stop, subprocess.Popen([*words, *arguments], stdout=2) as child:
        told = False
        try:
            while child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=0.5)
                if stop.asked and not told:
                    told = True
                    child.terminate()
        except BaseException:
            child.kill()
            raise
    if stop.asked or child.returncode in STOPPED:
        raise KeyboardInterrupt
    if child.returncode:
        call = " ".join(("python -m", module, *arguments)).replace("python -m w2s_jax ", "w2s ")
        raise InputError(f"`{call}` ended with status {child.returncode}; {hint}")


def die_with(parent: int) -> None:
    """Have this process killed when its parent process `parent` ends (Linux only)."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)


def main(arguments: list[str]) -> None:
    """Run a module, in the process that `run_module` starts."""
    parent, module, *rest = arguments
    die_with(int(parent))
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])


# Not a pool of the standard library or of pebble (5.2.3): both can lose all waiting tasks when a
# worker dies, and both run the caller's main module again in every worker.


START_SECONDS = 120.0
BATCH = 64
PATIENCE = 20
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from w2s_jax.reasoning.workers import serve; serve(int(sys.argv[1]))"
)


@dataclass(frozen=True)
class Failure:
    """Why a task has no result, such as "timed out after 5 s" or "out of memory (1024 MB)"."""

    reason: str


class _Lost(Exception):
    """A worker has stopped answering; the message says why."""


class _Worker:
    """A process that answers tasks in order, and the pipe to it."""

    def __init__(self, setup: tuple[Any, ...]):
        self.connection, theirs = Pipe()
        with theirs:
            self.process = _spawn(theirs.fileno())
        with contextlib.suppress(OSError):  # if it is dead, `await_start` reports that
            self.connection.send(setup)
        self.is_ready = False

    def await_start(self) -> None:
        """Wait until the worker is ready.

        Raises:
            Exception: What the factory raised.
            RuntimeError: If the process does not start.
        """
        if self.is_ready:
            return
        if not self.connection.poll(START_SECONDS):
            raise RuntimeError(f"a worker did not start within {START_SECONDS:g} s")
        try:
            error = self.connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"a worker did not start: {self.ending()}") from None
        if error is not None:
            raise error
        self.is_ready = True

    def answer(self, seconds: float) -> Any:
        """The result of the next task that was sent.

        A worker that is computing, but got less than `seconds` of processor time, is given more
        time.

        Raises:
            _Lost: If the worker died or took too long.
        """
        _, before = _processor_time(self.process.pid)
        for _ in range(PATIENCE):
            if self.connection.poll(seconds):
                try:
                    return self.connection.recv()
                except (EOFError, OSError):
                    raise _Lost(f"the worker died: {self.ending()}") from None
            computes, now = _processor_time(self.process.pid)
            if not computes or now - before >= seconds:
                break
        raise _Lost(f"timed out after {seconds:g} s")

    def ending(self) -> str:
        """How a process ended that has closed its end of the pipe."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        if (code := self.end()) >= 0:
            return f"exit code {code}"
        known = -code in set(signal.Signals)
        return signal.Signals(-code).name if known else f"signal {-code}"

    def end(self) -> int:
        """Kill the process at once, whatever it does; returns its exit code."""
        self.process.kill()
        self.connection.close()
        return self.process.wait()


class Workers:
    """Processes that apply one function to tasks, for use in a `with` block.

    Workers start at the first `run`, hash with seed 0, print nowhere, and die with the block or
    with their parent. Tasks, arguments and results must pickle.

    Args:
        factory: "module:attribute"; called with `arguments` in every worker, it returns the
            function.
        arguments: Arguments of the factory.
        workers: Maximum number; None for as many as this process may use cores.
        seconds: Limit for each task, in wall-clock time; a worker that is computing but got less
            processor time on a busy machine may take PATIENCE times as long.
        memory_mb: Limit on a worker's address space, where the system supports it (Linux).

    Raises:
        InputError: For limits out of range.
    """

    def __init__(
        self,
        factory: str,
        arguments: tuple[Any, ...] = (),
        *,
        workers: int | None = None,
        seconds: float | int = 5.0,
        memory_mb: int = 1024,
    ):
        if not (seconds > 0 and math.isfinite(seconds)):
            raise InputError(f"a time limit of {seconds} s for an answer; more than 0 is needed")
        if memory_mb < 128:
            raise InputError(f"a memory limit of {memory_mb} MB for a worker; 128 is the least")
        if workers is not None and workers < 1:
            raise InputError(f"{workers} workers; at least 1 is needed")
        self._setup = (factory, arguments, float(seconds), memory_mb)
        self._seconds = float(seconds)
        self._most = workers or _cores()
        # Each worker has a thread of this process that waits for it.
        self._threads = ThreadPoolExecutor(self._most)
        self._workers: dict[int, _Worker] = {}
        self._lock = Lock()
        self._has_ended = False

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._has_ended = True
            for worker in list(self._workers.values()):
                worker.process.kill()
        self._threads.shutdown()
        for worker in self._workers.values():
            worker.end()

    def run(self, tasks: Sequence[Any]) -> list[Any]:
        """The result of every task, or its Failure, in the order of the tasks.

        Raises:
            InputError: What `factory` raised.
            RuntimeError: If no worker can start.
        """
        results: list[Any] = [None] * len(tasks)
        # In batches, since a round trip takes longer than a short task, but enough for all workers.
        size = max(1, min(BATCH, len(tasks) // (4 * self._most)))
        indices = range(len(tasks))
        batches = iter([indices[start : start + size] for start in indices[::size]])

        def work(slot: int) -> None:
            for batch in batches:
                self._answer(slot, tasks, deque(batch), results)

        slots = range(min(self._most, len(indices[::size])))
        futures = [self._threads.submit(work, slot) for slot in slots]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
        return results

    def _answer(
        self, slot: int, tasks: Sequence[Any], left: deque[int], results: list[Any]
    ) -> None:
        """Have a slot's worker, or its successors, answer the rest of a batch."""
        while left and (worker := self._worker(slot)):
            worker.await_start()
            try:
                worker.connection.send([tasks[index] for index in left])
                while left:
                    results[left[0]] = worker.answer(self._seconds)
                    left.popleft()
            except _Lost as lost:
                results[left.popleft()] = Failure(str(lost))
                self._workers.pop(slot).end()
            except OSError:  # it died before these tasks, none of which is at fault
                self._workers.pop(slot).end()

    def _worker(self, slot: int) -> _Worker | None:
        """A slot's worker, a new one if there is none; None once the block has ended."""
        with self._lock:
            if not self._has_ended and slot not in self._workers:
                self._workers[slot] = _Worker(self._setup)
            return None if self._has_ended else self._workers[slot]


def _spawn(descriptor: int) -> subprocess.Popen[bytes]:
    paths = [os.path.abspath(path) for path in sys.path]
    # In a session of its own, so that Ctrl-C reaches only the parent, which ends its workers.
    return subprocess.Popen(
        [sys.executable, "-c", _BOOT, str(descriptor), json.dumps(paths)],
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"PYTHONHASHSEED": "0"},
    )


def _processor_time(pid: int) -> tuple[bool, float]:
    """(whether a process runs or waits for a disk, its processor time in s); needs /proc."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return False, 0.0
    return fields[0] in "RD", (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve(descriptor: int) -> None:
    """The main function of a worker: answers batches of tasks until the pipe closes."""
    logging.disable(logging.CRITICAL)
    connection = Connection(descriptor)
    try:
        factory, arguments, seconds, memory_mb = connection.recv()
        _limit_memory(memory_mb)
        module, _, attribute = factory.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)(*arguments)
        except InputError as error:
            connection.send(error)
            return
        except Exception as error:
            connection.send(RuntimeError(f"a worker did not start: {error!r}"))
            return
        connection.send(None)
        while True:
            for task in connection.recv():
                _limit_time(seconds)
                connection.send(_answer(function, task, memory_mb))
    except (EOFError, OSError):
        pass  # The parent is gone.


def _answer(function: Callable[[Any], Any], task: Any, memory_mb: int) -> Any:
    try:
        return function(task)
    except MemoryError:
        return Failure(f"out of memory ({memory_mb} MB)")
    except RecursionError:
        return Failure("nested too deeply")
    except Exception as error:
        return Failure(f"{type(error).__name__}: {error}"[:200])


def _limit_memory(memory_mb: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # systems other than Linux refuse it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))


def _limit_time(seconds: float) -> None:
    # The parent watches the time; this limit ends a busy worker whose parent was killed.
    usage = resource.getrusage(resource.RUSAGE_SELF)
    until = math.ceil(usage.ru_utime + usage.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))
