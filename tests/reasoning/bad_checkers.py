"""Checkers that misbehave on one answer, for workers to survive. Loaded by name in workers."""

import ctypes
import os
import resource
import signal
import time
from pathlib import Path


class Bad:
    """Its answers are the last words of responses; some of them are commands."""

    name = "bad"

    def __init__(self, kind: str):
        self.kind = kind

    def extract(self, response: str) -> str:
        if response == "extract hangs":
            time.sleep(1000)
        return response.split()[-1]

    def equal(self, prediction: str, gold: str) -> bool:
        _act(prediction)
        return prediction == gold

    def canonical(self, answer: str) -> str:
        _act(answer)
        return answer.upper()


def _act(command: str) -> None:
    if command == "sleep":
        time.sleep(1000)
    elif command == "spin":
        while True:
            pass
    elif command == "memory":
        held = [b"x" * (1 << 24) for _ in range(1 << 12)]
        raise AssertionError(f"{len(held)} blocks fitted")
    elif command == "exit":
        os._exit(3)
    elif command == "segfault":
        ctypes.string_at(0)
    elif command == "deep":
        _act(_nested(10**6))
    elif command == "raise":
        raise ValueError("no such answer")


def _nested(depth: int) -> str:
    return _nested(depth - 1) + "" if depth else ""


def seen_modules(kind: str) -> object:
    """A checker that tells which of the heavy modules its worker has loaded."""

    class Modules(Bad):
        def extract(self, response: str) -> str:
            import sys

            return " ".join(name for name in ("jax", "numpy", "flax") if name in sys.modules)

    return Modules(kind)


def broken(kind: str) -> object:
    raise OSError("no such file")


def ending_the_parent(name: str) -> object:
    """A checker whose workers compute on and on once the first has sent their parent a signal.

    A response is a folder, where each worker leaves its process's number, the response's own
    number, and how many workers there are.
    """

    class Ending(Bad):
        def extract(self, response: str) -> str:
            folder, number, workers = response.split()
            (Path(folder) / str(os.getpid())).touch()
            if number == "0":
                while len(os.listdir(folder)) < int(workers):
                    time.sleep(0.01)
                os.kill(os.getppid(), signal.Signals[name])
            _compute_without_a_parent()
            return "nobody asks any more"

    return Ending(name)


def _compute_without_a_parent() -> None:
    until = time.monotonic() + 60
    limit, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if limit != resource.RLIM_INFINITY:
        # Its end is awaited: three of the seconds that are left need not be computed away.
        resource.setrlimit(resource.RLIMIT_CPU, (limit - 3, hard))
    while time.monotonic() < until:
        pass


def crashing() -> object:
    """A function that ends its worker at some tasks."""

    def act(task: str) -> str:
        if task.startswith("exit"):
            os._exit(1)
        if task.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    return act


def computing() -> object:
    """A function that computes for so many seconds of the clock."""

    def compute(seconds: float) -> float:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass
        return seconds

    return compute
