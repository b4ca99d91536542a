"""The server's process: its socket, its signals, its end."""

import asyncio
import ipaddress
import os
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from w2s_jax.errors import InputError
from w2s_jax.serve.engine import Engine

_TICK = 0.05
_LAST_WORDS = 5
_LAST_CHUNK = 1.0
_BACKLOG = 1024
_HEADER_SECONDS = 10.0


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises InputError where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"--host {host} --port {port}: {reason}; choose others (port 0: any)"
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Where a bound socket is reached."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches a bound socket."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


class Connection(H11Protocol):
    """HTTP/1.1 that is closed where a request's headers are not there within `_HEADER_SECONDS`.

    Counted from the connection, and from the answer to the request before.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As asyncio's protocols."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """As asyncio's protocols."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """As uvicorn's."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio's protocols."""
        self._rest()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Set a deadline unless a request has all its headers and is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._rest()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(_HEADER_SECONDS, self.transport.close)

    def _rest(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):
    """uvicorn whose first signal begins an orderly end, whose second one hastens it.

    The third one leaves open requests without an answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        settings = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=_LAST_WORDS,
            backlog=_BACKLOG,
        )
        super().__init__(settings)
        self.signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Heed a signal; it is not raised again when all is over, so the exit status is 0."""
        self.signals += 1
        if self.signals > 2:
            self.should_exit = self.force_exit = True


def serve(
    app: ASGIApp,
    engine: Engine,
    bound: socket.socket,
    *,
    grace: float,
    announce: Callable[[], None],
) -> bool:
    """Serve until SIGTERM or SIGINT; then refuse, let run for `grace` seconds, and answer 503.

    announce is called once the engine is ready. Returns False where the engine failed.
    """
    engine.start()
    is_sound = asyncio.run(run(Server(app), engine, bound, grace, announce))
    if is_sound and engine.is_running:
        _end_at_once()
    return is_sound


def _end_at_once() -> None:
    """End the process with status 0 beside a thread that compiles, which nothing interrupts.

    An ordinary end would take the compiler's objects away from under it, and abort.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


async def run(
    server: Server, engine: Engine, bound: socket.socket, grace: float, announce: Callable[[], None]
) -> bool:
    """Run a server and its engine, which has started, as `serve` does."""
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    is_announced = False
    while not (serving.done() or server.signals or engine.state == "failed"):
        if not is_announced and server.started and engine.state == "ready":
            is_announced = True
            announce()
        await asyncio.sleep(_TICK)
    engine.drain()
    clock = asyncio.get_running_loop().time
    deadline = clock() + grace
    while not engine.is_idle and clock() < deadline and server.signals < 2:
        await asyncio.sleep(_TICK)
    # All that is open is answered at once; the thread may have a chunk or a compilation to end.
    await asyncio.to_thread(engine.stop, _LAST_CHUNK)
    server.should_exit = True
    await serving
    if cut_off := set(server.server_state.tasks):
        await asyncio.wait(cut_off, timeout=_LAST_WORDS)
    return engine.state != "failed"
