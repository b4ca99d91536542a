"""Compilations on a thread of their own, one after another, beside what the engine runs."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Compiler:
    """Does on a thread of its own what compiles; `on_end` is called, on any thread, after each."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end = on_end
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="w2s-compiler")
        self._under_way: set[Future[Any]] = set()

    @property
    def is_busy(self) -> bool:
        """Whether anything is asked for that has not ended."""
        return bool(self._under_way)

    def ask(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """What `work` returns or raises, once it has its turn."""
        future = self._pool.submit(work, *args)
        self._under_way.add(future)
        future.add_done_callback(self._end)
        return future

    def close(self) -> None:
        """Take nothing more on, and forget what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _end(self, future: Future[Any]) -> None:
        self._under_way.discard(future)
        self._on_end()
