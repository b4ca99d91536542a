"""A server on a socket, in this process: its end, and clients that dawdle."""

import asyncio
import logging
import signal
import threading
import time
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.serve.tiny_server import served_at
from w2s_jax.serve import engine as room
from w2s_jax.serve import run as process
from w2s_jax.serve.answers import TokenTexts
from w2s_jax.serve.app import Service, create_app
from w2s_jax.serve.config import ServeConfig
from w2s_jax.serve.engine import Engine
from w2s_jax.serve.jobs import Reader

CONFIG = ServeConfig(method="cbs")
BODY = {"model": "tiny", "prompt": "The sea", "method": "sample"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return served_at(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine(served):
    return Engine(served, CONFIG)


@asynccontextmanager
async def running(served, engine, *, grace=0.2):
    """(server, its address, what it ends with) while it runs; it has ended behind that."""
    tokens = TokenTexts(served.tokenizer)
    service = Service("tiny", engine, Reader(served, CONFIG), tokens)
    engine.start()
    with process.listen("127.0.0.1", 0) as bound:
        server = process.Server(create_app(service))
        is_ready = asyncio.Event()
        end = asyncio.ensure_future(process.run_server(server, engine, bound, grace, is_ready.set))
        await asyncio.wait_for(is_ready.wait(), 30)
        yield server, process.url_of(bound), end
        server.handle_exit(signal.SIGTERM, None)
        await asyncio.wait_for(end, 30)


@pytest.fixture
def over():
    """When what compiles is to end, at the latest with the test."""
    over = threading.Event()
    yield over
    over.set()


@pytest.fixture
def compiling(monkeypatch, over):
    """Set once the engine compiles; that fails when it is over."""
    begun = threading.Event()

    def start_session(*args, **settings):
        begun.set()
        assert over.wait(60)
        raise RuntimeError("too late to matter")

    monkeypatch.setattr(room.sessions, "start_session", start_session)
    monkeypatch.setattr(process, "_LAST_CHUNK", 0.1)
    return begun


@pytest.mark.parametrize("streams", [False, True])
def test_what_waits_for_a_compilation_hears_503_when_the_server_ends(
    served, engine, compiling, streams, caplog
):
    async def end():
        async with running(served, engine) as (server, address, over), httpx.AsyncClient() as one:
            body = BODY | {"stream": streams}
            asked = asyncio.ensure_future(one.post(f"{address}/v1/completions", json=body))
            assert await asyncio.to_thread(compiling.wait, 30)
            server.handle_exit(signal.SIGTERM, None)
            signalled = time.monotonic()
            answer = await asyncio.wait_for(asked, 30)
            return answer, time.monotonic() - signalled, await over

    answer, seconds, is_sound = asyncio.run(end())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
    assert seconds < process._LAST_WORDS, "the grace of 0.2 s was over"
    assert is_sound
    assert engine.is_running, "it still compiles"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_runs_is_let_run_and_what_comes_late_is_refused(served, engine, compiling, over):
    async def end():
        async with (
            running(served, engine, grace=60) as (server, address, ended),
            httpx.AsyncClient(base_url=address) as one,
        ):
            asked = asyncio.ensure_future(one.post("/v1/completions", json=BODY))
            assert await asyncio.to_thread(compiling.wait, 30)
            server.handle_exit(signal.SIGTERM, None)
            while (await one.get("/health")).status_code == 200:
                await asyncio.sleep(0.01)
            late = await one.post("/v1/completions", json=BODY)
            assert not asked.done()
            over.set()
            return await asked, late, await ended

    answer, late, is_sound = asyncio.run(end())
    assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
    # Its own end, not the server's.
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "search_failed")
    assert is_sound


def test_a_request_that_is_cut_off_before_it_is_read_hears_503(served, engine, monkeypatch):
    """One whose body does not come, say."""
    monkeypatch.setattr(process, "_LAST_WORDS", 0.1)

    async def end():
        async with running(served, engine, grace=0) as (server, address, over):
            reader, writer = await asyncio.open_connection(
                *address.removeprefix("http://").split(":")
            )
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
            writer.write(head + b"Content-Type: application/json\r\n\r\n{")
            while not server.server_state.tasks:
                await asyncio.sleep(0.01)
            server.handle_exit(signal.SIGTERM, None)
            answer = await asyncio.wait_for(reader.read(), 30)
            writer.close()
            return answer, await over

    answer, is_sound = asyncio.run(end())
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b'"shutting_down"' in answer
    assert is_sound


@pytest.mark.parametrize("is_running", [False, True])
def test_the_process_does_not_wait_for_a_compiler(engine, monkeypatch, is_running):
    async def app(scope, receive, send):
        pass

    async def run(*args):
        return True

    ends = []
    monkeypatch.setattr(Engine, "start", lambda engine: None)
    monkeypatch.setattr(Engine, "is_running", is_running)
    monkeypatch.setattr(process, "run_server", run)
    monkeypatch.setattr(process.os, "_exit", ends.append)
    with process.listen("127.0.0.1", 0) as bound:
        assert process.serve_app(app, engine, bound, grace=0.0, announce=lambda: None)
    assert ends == ([0] if is_running else [])


DAWDLERS = {
    "nothing": b"",
    "half": b"GET /health HTTP/1.1\r\nHost: loc",
    "a second half": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea",
    "a body": (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 9\r\n\r\n{"
    ),
}


def test_headers_that_do_not_come_are_not_waited_for(served, engine, monkeypatch):
    """A body is."""
    monkeypatch.setattr(process, "_HEADER_SECONDS", 0.2)
    monkeypatch.setattr(process, "_LAST_WORDS", 0.1)

    async def dawdle(address, said):
        reader, writer = await asyncio.open_connection(*address.removeprefix("http://").split(":"))
        for byte in said:
            # One by one: what comes does not put the end off.
            writer.write(bytes([byte]))
        try:
            await reader.read()
        finally:
            writer.close()

    async def dawdle_all():
        async with running(served, engine) as (_, address, _):
            tasks = {
                name: asyncio.ensure_future(dawdle(address, said))
                for name, said in DAWDLERS.items()
            }
            body = tasks.pop("a body")
            await asyncio.wait_for(asyncio.gather(*tasks.values()), 30)
            # As long again, by the clock of the loop that closes.
            await asyncio.sleep(process._HEADER_SECONDS)
            waited = not body.done()
            body.cancel()
            return waited

    assert asyncio.run(dawdle_all())
