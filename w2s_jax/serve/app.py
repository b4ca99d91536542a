"""The endpoints: request bodies in, JSON or a stream of events out. An engine answers."""

import asyncio
import hmac
import ipaddress
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from w2s_jax.serve.answers import Choice, TokenTexts, Writer
from w2s_jax.serve.engine import Engine
from w2s_jax.serve.jobs import Job, Reader
from w2s_jax.serve.schema import ApiError, Body, Chat, Completion, read_body, shutting_down
from w2s_jax.serve.tasks import Done, Event, Failed, Progress, Ticket

_POLL_SECONDS = 0.1
_BODY_SECONDS = 60.0
# A body that is too large is read up to here and discarded, so that its sender gets the reason.
_MOST_DISCARDED = 1 << 26
_CLIENT_GONE = 499
_JSON = "application/json"
_ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
_OPEN = ("/health",)
_TICKET = "w2s_jax.ticket"
"""Key in a request's scope of its jobs, which end with it."""


@dataclass(frozen=True)
class Service:
    """The endpoints, and what they work with.

    Attributes:
        name: The model's name in requests.
        engine: Answers jobs, and counts.
        reader: Makes jobs from bodies.
        tokens: The texts of tokens, for log-probs.
        key: Bearer token that clients must send, if any.
        created: Time of creation, in seconds since 1970.
        hosts: Host names under which the server may be called, beside loopback names such as
            localhost; None for any.
        most_body: Maximum bytes of a request's body.
    """

    name: str
    engine: Engine
    reader: Reader
    tokens: TokenTexts
    key: str | None = None
    created: int = 0
    hosts: tuple[str, ...] | None = None
    most_body: int = 1 << 22

    async def answer(
        self, form: type[Body], read: Callable[[Body], list[Job]], request: Request
    ) -> Response:
        """POST /v1/completions or /v1/chat/completions.

        Args:
            form: The body's type.
            read: Makes jobs from the body.
            request: The request.
        """
        body = read_body(await _raw_body(request, self.most_body), form)
        self._check_name(body.model)
        jobs = await asyncio.to_thread(read, body)
        ticket = request.scope[_TICKET] = self.engine.submit(jobs)
        write = Writer(form is Chat, self.name, self.tokens)
        if not body.stream:
            answers = await _gather(ticket, jobs, request)
            return JSONResponse(await asyncio.to_thread(write.whole, jobs, answers))
        first = await _next(ticket, request)
        if isinstance(first, Failed):
            raise first.error
        lines = _stream(ticket, jobs, write, first, usage=body.counts_usage)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(lines, media_type="text/event-stream", headers=headers)

    async def models(self, request: Request) -> Response:
        """GET /v1/models, all or one."""
        told = {"id": self.name, "object": "model", "created": self.created, "owned_by": "w2s_jax"}
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [told]})
        self._check_name(request.path_params["name"])
        return JSONResponse(told)

    async def health(self, request: Request) -> Response:
        """GET /health."""
        state = self.engine.state
        return JSONResponse({"status": state}, status_code=200 if state == "ready" else 503)

    async def numbers(self, request: Request) -> Response:
        """GET /metrics."""
        numbers = generate_latest(self.engine.metrics.registry)
        return Response(numbers, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    def _check_name(self, name: str) -> None:
        if name != self.name:
            told = f"model {name!r} is not served here; {self.name!r} is"
            raise ApiError(404, told, param="model", code="model_not_found")


def create_app(service: Service) -> ASGIApp:
    """The ASGI application."""
    complete = partial(service.answer, Completion, service.reader.completion)
    chat = partial(service.answer, Chat, service.reader.chat)
    routes = [
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", service.models, methods=["GET"]),
        Route("/v1/models/{name:path}", service.models, methods=["GET"]),
        Route("/health", service.health, methods=["GET"]),
        Route("/metrics", service.numbers, methods=["GET"]),
    ]
    handlers: Mapping[Any, Any] = {
        ApiError: lambda request, error: _error(error),
        HTTPException: _http_error,
        ClientDisconnect: lambda request, error: Response(status_code=_CLIENT_GONE),
        Exception: lambda request, error: _error(ApiError(500, "an internal fault; see the log")),
    }
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), service)


class _Guard:
    """Counts requests, and refuses those without the key or to another host.

    However a request ends, its jobs end with it.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, started, status = scope["path"], time.monotonic(), _CLIENT_GONE
        endpoint = next((e for e in _ENDPOINTS if path == e or path.startswith(f"{e}/")), "other")

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            app = self.app if refusal is None else _error(refusal)
            await app(scope, receive, counted)
        except asyncio.CancelledError:
            # The server is ending, and what this request waits for takes too long.
            if status == _CLIENT_GONE:
                await _error(shutting_down())(scope, receive, counted)
        finally:
            if _TICKET in scope:
                scope[_TICKET].cancel()
            metrics = self.service.engine.metrics
            metrics.requests.labels(endpoint, str(status)).inc()
            metrics.seconds.labels(endpoint).observe(time.monotonic() - started)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not _is_known(host, self.service.hosts):
            told = f"the host {host!r} is none of this server's; see --allowed-host"
            return ApiError(403, told, code="host_not_allowed")
        if scope["path"] in _OPEN or _has_key(headers, self.service.key):
            return None
        return ApiError(
            401,
            "no valid API key; send it as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _is_known(host: str, hosts: tuple[str, ...] | None) -> bool:
    """Whether a request's Host is one of `hosts` (None: any), a loopback name, or missing.

    Any web page can have a browser call this machine under the page's own host name (DNS
    rebinding), and read the answer; browsers always send a Host.
    """
    if hosts is None or not host:
        return True
    name = re.sub(r":\d*$", "", host.strip()).lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    if name in {own.lower() for own in hosts}:
        return True
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def _has_key(headers: Headers, key: str | None) -> bool:
    if key is None:
        return True
    scheme, _, token = headers.get("authorization", "").partition(" ")
    # As bytes, since compare_digest takes no text beyond ASCII.
    is_key = hmac.compare_digest(token.encode("latin-1").strip(), key.encode())
    return is_key and scheme.lower() == "bearer"


async def _raw_body(request: Request, most: int) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Browsers send other content types across origins without asking first (CORS preflight).
    if kind != _JSON:
        given = kind or "of no kind"
        raise ApiError(415, f"the body is {given}; send it with Content-Type: {_JSON}")
    told = f"the body is larger than {most} bytes, the most that this server reads"
    too_large = ApiError(413, told, code="too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > _MOST_DISCARDED:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > _MOST_DISCARDED:
                    raise too_large
                if size <= most:
                    parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_BODY_SECONDS:.0f} s") from None
    if size > most:
        raise too_large
    return b"".join(parts)


async def _next(ticket: Ticket, request: Request) -> Event:
    """The next event; ClientDisconnect if the client disconnects before it comes."""
    while True:
        try:
            async with asyncio.timeout(_POLL_SECONDS):
                return await ticket.next()
        except TimeoutError:
            if await request.is_disconnected():
                raise ClientDisconnect from None


async def _gather(
    ticket: Ticket, jobs: Sequence[Job], request: Request
) -> list[tuple[Choice, ...]]:
    """The choices of all jobs; ApiError as soon as one has failed."""
    found: dict[int, tuple[Choice, ...]] = {}
    while len(found) < len(jobs):
        event = await _next(ticket, request)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Done):
            found[event.job] = event.choices
    return [found[job] for job in range(len(jobs))]


async def _stream(
    ticket: Ticket, jobs: Sequence[Job], write: Writer, first: Event, *, usage: bool
) -> AsyncIterator[str]:
    """The lines of a stream: each choice's text as it settles, no character twice."""
    line = partial(_line, usage=usage)
    asked = [job for job in jobs for _ in range(job.choices)]
    sent = [""] * len(asked)
    for index, job in enumerate(asked):
        for opening in write.opening(index, job):
            yield line(opening)
    found: dict[int, tuple[Choice, ...]] = {}
    event = first
    while True:
        if isinstance(event, Failed):
            yield _line(event.error.body)
            return
        # All prompts of a request have the same number of choices.
        job, start = jobs[event.job], event.job * jobs[event.job].choices
        if isinstance(event, Progress):
            for index, text in enumerate(event.texts, start):
                if len(text) > len(sent[index]) and text.startswith(sent[index]):
                    yield line(write.piece(index, text[len(sent[index]) :]))
                    sent[index] = text
        else:
            found[event.job] = event.choices
            for index, choice in enumerate(event.choices, start):
                rest = choice.text[len(sent[index]) :]
                yield line(write.end(index, job, choice, rest))
        if len(found) == len(jobs):
            break
        event = await ticket.next()
    if usage:
        yield _line(write.closing(jobs, [found[job] for job in range(len(jobs))]))
    yield "data: [DONE]\n\n"


def _line(event: Mapping[str, Any], usage: bool = False) -> str:
    if usage and "usage" not in event:
        event = {**event, "usage": None}
    return f"data: {json.dumps(event, allow_nan=False)}\n\n"


def _error(error: ApiError) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


def _http_error(request: Request, error: HTTPException) -> Response:
    """Unknown paths and methods, as OpenAI's error body."""
    told = f"{request.method} {request.url.path}: {error.detail}"
    return _error(ApiError(error.status_code, told, headers=error.headers or {}))
