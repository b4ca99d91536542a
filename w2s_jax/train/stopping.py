"""How a run ends before its last step: signals that ask it to stop, and a loss that went NaN.

Light to import: a command line tells these ends apart without loading the trainer.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(Exception):
    """A signal asked the run to stop; `step` steps are done and saved, and a rerun goes on."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}, which is saved; run again to go on")
        self.step = step


class Diverged(Exception):
    """The loss or a gradient is not finite; nothing was saved after it.

    `step` is the number of the failing step (the first is 1), `rows` the names of the rows of its
    batch, `good` the step of the last sound checkpoint (None without one).
    """

    def __init__(self, step: int, what: str, rows: tuple[str, ...], good: int | None, where: str):
        named = f"; its batch: {', '.join(rows)}" if rows else ""
        kept = "there is no checkpoint yet" if good is None else f"the last good one is step {good}"
        super().__init__(f"{what} at step {step}{named}; of the checkpoints in {where} {kept}")
        self.step = step
        self.rows = rows
        self.good = good


class Interrupted(BaseException):
    """Raised by a signal inside `Stop.interruptible`, past any `except Exception` of the block."""


class Stop:
    """While it is entered, SIGTERM and SIGINT set `asked`; a second SIGINT interrupts at once.

    Outside the main thread, where no handler can be set, it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._interruptible = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that changes nothing: a signal, before or in it, ends it with Interrupted."""
        self._interruptible = True
        try:
            if self.asked:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.asked
        self.asked = True
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._interruptible:
            self._interruptible = False
            raise Interrupted
