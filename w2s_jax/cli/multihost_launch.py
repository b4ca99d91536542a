"""A command on several hosts: started, watched and ended together, with one line for each end.

The command runs in a child process: where a host dies, jax ends the others by SIGABRT, which only
a parent can turn into a line and a status. What the command does is not here.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import partial
from typing import Annotated

from tyro.conf import arg

from w2s_jax import distributed
from w2s_jax.distributed import HostConfig, HostsParted, key_values, own_number
from w2s_jax.errors import InputError

WRONG_INPUT, FAILED, AGAIN = 2, 1, 75
PARTED = "another host has died or cannot be reached"
GO_ON = "run the same command again on all hosts to go on"
LEAVE_SECONDS = 10
"""How long the first host waits, where one failed, for the others to hear of it."""
REASON_SECONDS = 3
"""How long a host that lost another waits for the reason, told before connections broke."""
_FAILURE, _SEEN, _END = "w2s/failure", "w2s/seen", "w2s/end"
_DAY_MS = 86_400_000
# Of messages of jax's coordination service and of Gloo where another host is gone.
_MARKS = ("Gloo", "oordination service", "CoordinationService", "Socket closed", "heartbeat",
          "closed by peer", "reset by peer")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """The hosts that run a command together."""

    hosts: Annotated[str, arg(metavar="HOST:PORT,N,I|auto|off|jax")] = "auto"
    """Hosts that run this together: the first one's address, how many, which this is from 0. auto
    finds those of SLURM, Open MPI and TPU slices, jax whatever jax finds."""


@dataclass(frozen=True)
class End:
    """How a command ended: its exit status, and the line to be told where that is not 0.

    together: every host comes to it at the same step (a stop that was asked for).
    """

    status: int = 0
    line: str = ""
    together: bool = False


@dataclass(frozen=True)
class Failure:
    """What ended a run: the host, its exit status and its one line."""

    host: int
    status: int
    line: str


Attempt = Callable[[], End]
"""Does the work. Raises what is a fault of the program."""


# The parent


def run_together(
    config: HostConfig,
    attempt: Attempt,
    *,
    heeds_stop: bool = False,
    heartbeat_seconds: int = distributed.HEARTBEAT_SECONDS,
) -> int:
    """Start jax over the hosts in a child process, attempt the command there, return its status.

    Args:
        config: The hosts, and which of them this is.
        attempt: Does the command's work.
        heeds_stop: Whether the command saves and ends on SIGTERM; others are ended by it.
        heartbeat_seconds: A host that was not heard of for so long is dead.

    Returns:
        The exit status. 75 means that a host has died or did not come; a rerun on all hosts goes
        on.
    """
    work = partial(_start_and_run, config, attempt, heeds_stop, heartbeat_seconds)
    if threading.active_count() > 1:  # a process with threads is not to be forked
        return work(lambda: None)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    read_end, write_end = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _die_with(parent)
        status = FAILED
        try:
            status = work(lambda: os.write(write_end, b"host %d" % own_number()[0]))
        except BaseException:
            traceback.print_exc()
        finally:
            _leave(status)
    os.close(write_end)
    return _await_child(child, read_end, config)


def _die_with(parent: int) -> None:
    """Let the system kill this process when its parent ends, however that ends."""
    set_death_signal, linux = 1, sys.platform == "linux"
    if linux:
        ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(FAILED)


def _await_child(child: int, read_end: int, config: HostConfig) -> int:
    """The status of the child; what ended it without a word is told in a line.

    Through `read_end` comes the child's name, once jax has started.
    """

    def forward(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    start = time.monotonic()
    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGHUP)}
    # The terminal sends it to the child too.
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with os.fdopen(read_end, "rb") as pipe:
        named = pipe.read().decode()
    if code >= 0:
        return code
    status = AGAIN
    if code != -signal.SIGABRT:
        why = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        what, status = f"ended by {signal.Signals(-code).name}{why}", 128 - code
    elif named:
        what = PARTED
    elif time.monotonic() - start < distributed.START_SECONDS - 1:
        what = f"refused by the other hosts; perhaps two have the number {config.index}"
    else:
        what = f"not all {config.count} hosts came within {distributed.START_SECONDS} s"
    print(f"{named or f'host {config.index}'}: {what}; {GO_ON}", file=sys.stderr)
    return status


# The child


def _start_and_run(
    config: HostConfig,
    attempt: Attempt,
    heeds_stop: bool,
    heartbeat_seconds: int,
    on_start: Callable[[], object],
) -> int:
    try:
        distributed.start_hosts(config, heartbeat_seconds=heartbeat_seconds)
    except (InputError, HostsParted) as error:
        print(f"host {config.index}: {error}", file=sys.stderr)
        return WRONG_INPUT if isinstance(error, InputError) else AGAIN
    on_start()
    if not heeds_stop:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # jax only notes it
    status = run_started(attempt)
    import jax

    with contextlib.suppress(RuntimeError):
        jax.distributed.shutdown()
    return status


def run_started(attempt: Attempt) -> int:
    """Attempt a command where jax runs over several hosts; ends the process where a host fails.

    The first host alone prints what is not an error; every host names itself before an error.
    """
    index, _ = own_number()
    errors = sys.stderr

    def say(text: str) -> None:
        for line in text.splitlines():
            print(f"host {index}: {line}", file=errors, flush=True)

    def follow(failure: Failure) -> None:
        say(f"stopped, as host {failure.host} says: {failure.line}")
        _leave_last(LEAVE_SECONDS)
        _leave(failure.status)

    with _watching(follow), _quiet(index):
        end = _attempt(attempt, say)
        parted = end.line.startswith(PARTED)
        if parted:
            time.sleep(REASON_SECONDS)
    if end.status == 0 or end.together:
        if end.line and index == 0:
            print(end.line, file=errors)
        return end.status
    told = _tell_failure(Failure(index, end.status, end.line))
    if index == 0 or told.host == index or told.line != end.line:
        say(end.line)  # else it is an error that all hosts found
    _leave_last(1 if parted else LEAVE_SECONDS)
    _leave(end.status)
    return end.status


def _attempt(attempt: Attempt, say: Callable[[str], None]) -> End:
    """How the command ends here, and, where it ends well or as all do, how all hosts end."""
    try:
        end = attempt()
        if end.status == 0 or end.together:
            _finish_together()
    except HostsParted as error:
        return _parted(error)
    except BaseException as error:
        if any(mark in str(error) for mark in _MARKS):
            return _parted(error)
        say(traceback.format_exc())
        return End(FAILED, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    by_peer = end.status == FAILED and any(mark in end.line for mark in _MARKS)
    return _parted(end.line) if by_peer else end


def _parted(why: object) -> End:
    return End(AGAIN, f"{PARTED} ({' '.join(str(why).split())[:200]}); {GO_ON}")


# The store of keys that hosts share raises a RuntimeError for one that is taken or not there, and
# where the first host, which keeps it, is gone.


def _finish_together() -> None:
    """Return when all hosts have come to their ends; how long one takes is not bounded.

    Raises HostsParted where one has died.
    """
    try:
        key_values().wait_at_barrier(_END, _DAY_MS)
    except RuntimeError as error:
        raise HostsParted(" ".join(str(error).split())[:200]) from None


def _tell_failure(failure: Failure) -> Failure:
    """Make a failure known to all hosts; returns the first that was told, this or another's."""
    try:
        key_values().key_value_set(_FAILURE, json.dumps(astuple(failure)))
        return failure
    except RuntimeError:
        return _read_failure() or failure


def _read_failure() -> Failure | None:
    """The failure that a host has told, if any."""
    try:
        return Failure(*json.loads(key_values().key_value_try_get(_FAILURE)))
    except RuntimeError:
        return None


@contextlib.contextmanager
def _watching(follow: Callable[[Failure], None]) -> Iterator[None]:
    """While the block runs, a thread looks twice a second whether a host has told a failure.

    `follow` is called in that thread, once, and not after the block.
    """
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.5):
            failure = _read_failure()
            if failure is not None:
                follow(failure)
                return

    thread = threading.Thread(target=look, daemon=True, name="hosts")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def _quiet(index: int) -> Iterator[None]:
    """On hosts but the first, what the command prints goes nowhere."""
    with contextlib.ExitStack() as stack:
        if index:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def _leave_last(seconds: float | int) -> None:
    """Before a process ends early: let the first host go last, as the others' answers lie there."""
    index, count = own_number()
    with contextlib.suppress(RuntimeError):
        if index:
            key_values().key_value_set(f"{_SEEN}/{index}", "", allow_overwrite=True)
            return
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if len(key_values().key_value_dir_get(_SEEN)) >= count - 1:
                break
            time.sleep(0.1)


def _leave(status: int) -> None:
    """End the process now: threads and collectives that wait for other hosts are left behind."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(status)
