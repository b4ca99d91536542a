"""A command on several hosts: started, watched and ended together, with one line for each end.

The command runs in a child process: where a host dies, jax ends the others by SIGABRT, which only
a parent can turn into a line and a status. What the command does is not here.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Annotated

from tyro.conf import arg

from w2s_jax import hosts
from w2s_jax.errors import InputError
from w2s_jax.hosts import Failure, HostConfig, HostsParted

WRONG_INPUT, FAILED, AGAIN = 2, 1, 75
PARTED = "another host has died or cannot be reached"
GO_ON = "run the same command again on all hosts to go on"


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


Attempt = Callable[[], End]
"""Does the work. Raises what is a fault of the program."""

_MARKS = ("Gloo", "oordination service", "CoordinationService", "Socket closed", "heartbeat",
          "closed by peer", "reset by peer")  # fmt: skip


def run_together(
    config: HostConfig,
    attempt: Attempt,
    *,
    heeds_stop: bool = False,
    heartbeat_seconds: int = hosts.HEARTBEAT_SECONDS,
) -> int:
    """Start jax over the hosts in a child process, attempt the command there, return its status.

    75 means that a host has died or did not come: a rerun on all hosts goes on. heeds_stop: on
    SIGTERM the command saves and ends; others are ended by it.
    """

    def work(on_start: Callable[[], None]) -> int:
        return _start_and_run(config, attempt, heeds_stop, heartbeat_seconds, on_start)

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
            status = work(lambda: _tell_names(write_end))
        except BaseException:
            traceback.print_exc()
        finally:
            _leave(status)
    os.close(write_end)
    return _await_child(child, read_end, config)


def _tell_names(write_end: int) -> None:
    os.write(write_end, b"host %d of %d" % hosts.own_number())


def _die_with(parent: int) -> None:
    """Let the system kill this process when its parent ends, however that ends."""
    set_death_signal, linux = 1, sys.platform == "linux"
    if linux:
        ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(FAILED)


def _await_child(child: int, read_end: int, config: HostConfig) -> int:
    """The status of the child; what ended it without a word is told in a line."""

    def forward(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    start = time.monotonic()
    held = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGHUP)}
    # The terminal sends it to the child too.
    held[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
    with os.fdopen(read_end, "rb") as pipe:
        named = pipe.read().decode()
    if code >= 0:
        return code
    name = named.partition(" of ")[0] or f"host {config.index}"
    if code != -signal.SIGABRT:
        why = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        print(f"{name}: ended by {signal.Signals(-code).name}{why}; {GO_ON}", file=sys.stderr)
        return 128 - code
    what = f"not all {config.count} hosts came within {hosts.START_SECONDS} s"
    if time.monotonic() - start < hosts.START_SECONDS - 1:
        what = f"refused by the other hosts; perhaps two have the number {config.index}"
    print(f"{name}: {PARTED if named else what}; {GO_ON}", file=sys.stderr)
    return AGAIN


def _start_and_run(
    config: HostConfig,
    attempt: Attempt,
    heeds_stop: bool,
    heartbeat_seconds: int,
    on_start: Callable[[], None],
) -> int:
    try:
        hosts.start_hosts(config, heartbeat_seconds=heartbeat_seconds)
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
    index, _ = hosts.own_number()
    errors = sys.stderr

    def say(text: str) -> None:
        for line in text.splitlines():
            print(f"host {index}: {line}", file=errors, flush=True)

    def follow(failure: Failure) -> None:
        say(f"stopped, as host {failure.host} says: {failure.line}")
        hosts.leave_together()
        _leave(failure.status)

    watch = hosts.Watch(follow)
    with _quiet(index):
        end = _attempt(attempt, say)
        if end.status == 0 or end.together:
            try:
                hosts.finish_together()
            except HostsParted as error:
                end = _parted(error)
            else:
                watch.close()
                if end.line and index == 0:
                    print(end.line, file=errors)
                return end.status
    parted = end.line.startswith(PARTED)
    if parted:
        _await_reason(follow)
    watch.close()
    told = hosts.tell_failure(Failure(index, end.status, end.line))
    if index == 0 or told.host == index or told.line != end.line:
        say(end.line)  # else it is an error that all hosts found
    hosts.leave_together(1 if parted else hosts.LEAVE_SECONDS)
    _leave(end.status)
    return end.status


def _attempt(attempt: Attempt, say: Callable[[str], None]) -> End:
    try:
        end = attempt()
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


def _await_reason(follow: Callable[[Failure], None], seconds: float | int = 3) -> None:
    """Where a host told why it ends before its connections broke, follow that."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        failure = hosts.read_failure()
        if failure is not None:
            follow(failure)
        time.sleep(0.2)


@contextlib.contextmanager
def _quiet(index: int) -> Iterator[None]:
    """On hosts but the first, what the command prints goes nowhere."""
    if index == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, _streams(nowhere):
        yield


@contextlib.contextmanager
def _streams(stream: IO[str]) -> Iterator[None]:
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield


def _leave(status: int) -> None:
    """End the process now: threads and collectives that wait for other hosts are left behind."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(status)
