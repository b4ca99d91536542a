"""Checkers that misbehave on one answer, for workers to survive. Loaded by name in workers."""

import ctypes
import os
import signal
import time


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
    elif command == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
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
