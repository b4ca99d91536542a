"""Compilations on threads of their own, beside what the engine runs: what is new one by one."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Compiler:
    """Does on threads of its own what compiles; `on_end` is called, on any thread, after each.

    What was compiled before takes no time to speak of, and never waits for what is new.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end = on_end
        self._pools = {
            known: ThreadPoolExecutor(1, thread_name_prefix="w2s-compiler")
            for known in (False, True)
        }
        self._under_way: set[Future[Any]] = set()

    @property
    def is_busy(self) -> bool:
        """Whether anything is asked for that has not ended."""
        return bool(self._under_way)

    def ask(self, work: Callable[..., Any], *args: Any, known: bool = False) -> Future[Any]:
        """What `work` returns or raises, once it has its turn; known: it was compiled before."""
        future = self._pools[known].submit(work, *args)
        self._under_way.add(future)
        future.add_done_callback(self._end)
        return future

    def close(self) -> None:
        """Take nothing more on, and forget what has not begun."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def _end(self, future: Future[Any]) -> None:
        self._under_way.discard(future)
        self._on_end()
