"""`w2s serve` in a thread of this process, where what a process is by itself is not tested."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from w2s_jax.cli.main import main
from w2s_jax.serve import run as room

SECONDS = 120


@contextmanager
def served(*flags: str) -> Iterator[str]:
    """The address of a server that is ready; it has ended in good order behind this."""
    found, statuses, is_ready = [], [], threading.Event()
    run = room.run_server

    async def watched(server, engine, bound, grace, announce):
        def ready():
            announce()
            found.append((server, room.url_of(bound)))
            is_ready.set()

        return await run(server, engine, bound, grace, ready)

    def command():
        try:
            statuses.append(main(["serve", "--port=0", *flags]))
        finally:
            is_ready.set()

    # uvicorn's logging would close handlers that others hold, absl's with pytest's own streams.
    logging = mock.patch("logging.config.dictConfig")
    with mock.patch.object(room, "run_server", watched), logging:
        thread = threading.Thread(target=command, daemon=True)
        thread.start()
        assert is_ready.wait(SECONDS)
        assert found, "the server has ended before it was ready"
        ((server, address),) = found
        try:
            yield address
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join(SECONDS)
    assert statuses == [0]
