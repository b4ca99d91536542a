"""The endpoints: bodies in, JSON or a stream of events out. What answers is behind `Answers`."""

import asyncio
import hmac
import ipaddress
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from w2s_jax.serve.answers import Writer, writer
from w2s_jax.serve.events import Answers, Choice, Done, Event, Failed, Progress, Ticket, TokenTexts
from w2s_jax.serve.jobs import Job, Reader
from w2s_jax.serve.metrics import CONTENT_TYPE, Metrics
from w2s_jax.serve.schema import (
    ApiError,
    Body,
    Chat,
    Completion,
    body_too_large,
    read_body,
    shutting_down,
)

_POLL_SECONDS = 0.1
_BODY_SECONDS = 60.0
# Read and thrown away of a body that is too large, so that its sender hears why.
_MOST_DISCARDED = 1 << 26
_CLIENT_GONE = 499
_JSON = "application/json"
_ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
_OPEN = ("/health",)


@dataclass(frozen=True)
class Service:
    """What the endpoints work with.

    key: the bearer token that clients must send, if any. hosts: the names by which the server may
    be called beside those of this machine for itself, such as localhost; None for any.
    """

    name: str
    engine: Answers
    reader: Reader
    tokens: TokenTexts
    metrics: Metrics
    key: str | None = None
    created: int = 0
    hosts: tuple[str, ...] | None = None


def create_app(service: Service) -> ASGIApp:
    """The ASGI application."""
    routes = [
        Route("/v1/completions", _handler(service, Completion), methods=["POST"]),
        Route("/v1/chat/completions", _handler(service, Chat), methods=["POST"]),
        Route("/v1/models", _models(service), methods=["GET"]),
        Route("/v1/models/{name:path}", _models(service), methods=["GET"]),
        Route("/health", _health(service), methods=["GET"]),
        Route("/metrics", _metrics(service), methods=["GET"]),
    ]
    handlers: Mapping[Any, Any] = {
        ApiError: lambda request, error: _error(error),
        HTTPException: _http_error,
        ClientDisconnect: lambda request, error: Response(status_code=_CLIENT_GONE),
        Exception: lambda request, error: _error(ApiError(500, "an internal fault; see the log")),
    }
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), service)


class _Guard:
    """Counts requests and lets none pass without the key, or to a host that is not this one."""

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
            if refusal is None:
                await self.app(scope, receive, counted)
            else:
                await _error(refusal)(scope, receive, counted)
        except asyncio.CancelledError:
            # The server ends, and whatever this request waited for takes too long.
            if status == _CLIENT_GONE:
                await _error(shutting_down())(scope, receive, counted)
        finally:
            metrics = self.service.metrics
            metrics.requests.labels(endpoint, str(status)).inc()
            metrics.seconds.labels(endpoint).observe(time.monotonic() - started)

    def _refusal(self, scope: Scope) -> ApiError | None:
        host = _header(scope, b"host").decode("latin-1")
        if not _is_known(host, self.service.hosts):
            told = f"the host {host!r} is none of this server's; see --allowed-host"
            return ApiError(403, told, code="host_not_allowed")
        if scope["path"] in _OPEN or _has_key(scope, self.service.key):
            return None
        return ApiError(
            401,
            "no valid API key; send it as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for own, value in scope["headers"] if own == name), b"")


def _is_known(host: str, hosts: tuple[str, ...] | None) -> bool:
    """Whether a request's Host is one of these names or a loopback's; without one no browser asks.

    A page of anyone's can have a browser ask this machine under the page's own name (DNS
    rebinding), and read the answer.
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


def _has_key(scope: Scope, key: str | None) -> bool:
    if key is None:
        return True
    sent = _header(scope, b"authorization")
    scheme, _, token = sent.partition(b" ")
    return hmac.compare_digest(token.strip(), key.encode()) and scheme.lower() == b"bearer"


Handler = Callable[[Request], Awaitable[Response]]


def _handler(service: Service, form: type[Body]) -> Handler:
    async def handle(request: Request) -> Response:
        body = read_body(await _raw_body(request, service.reader.limits.body), form)
        if body.model != service.name:
            raise ApiError(
                404,
                f"model {body.model!r} is not served here; {service.name!r} is",
                param="model",
                code="model_not_found",
            )
        read: Callable[[Any], list[Job]] = (
            service.reader.completion if form is Completion else service.reader.chat
        )
        jobs = await asyncio.to_thread(read, body)
        ticket = service.engine.submit(jobs)
        write = writer(form is Chat, service.name, service.tokens)
        try:
            if body.stream:
                first = await _next(ticket, request)
                if isinstance(first, Failed):
                    raise first.error
                lines = _stream(ticket, jobs, write, first, usage=body.counts_usage)
                return _CancellingStream(lines, ticket)
            answers = await _gather(ticket, jobs, request)
        except BaseException:
            ticket.cancel()
            raise
        return JSONResponse(await asyncio.to_thread(write.whole, jobs, answers))

    return handle


async def _raw_body(request: Request, most: int) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A browser sends other kinds, or none, to a strange server without asking it first.
    if kind != _JSON:
        given = kind or "of no kind"
        raise ApiError(415, f"the body is {given}; send it with Content-Type: {_JSON}")
    told = body_too_large(most)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > _MOST_DISCARDED:
        raise told
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > _MOST_DISCARDED:
                    raise told
                if size <= most:
                    parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_BODY_SECONDS:.0f} s") from None
    if size > most:
        raise told
    return b"".join(parts)


async def _next(ticket: Ticket, request: Request) -> Event:
    """The next event; ClientDisconnect when the client goes away before it comes."""
    waiting = asyncio.ensure_future(ticket.next())
    try:
        while True:
            done, _ = await asyncio.wait({waiting}, timeout=_POLL_SECONDS)
            if done:
                return waiting.result()
            if await request.is_disconnected():
                raise ClientDisconnect
    finally:
        waiting.cancel()


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


class _CancellingStream(StreamingResponse):
    """Server-sent events; however the stream ends, its jobs end with it."""

    def __init__(self, lines: AsyncIterator[str], ticket: Ticket) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.cancel()


async def _stream(
    ticket: Ticket, jobs: Sequence[Job], write: Writer, first: Event, *, usage: bool
) -> AsyncIterator[str]:
    """The lines of a stream: each choice's text as it settles, and no character twice."""
    starts = [sum(job.choices for job in jobs[:index]) for index in range(len(jobs))]
    sent = [""] * sum(job.choices for job in jobs)
    found: dict[int, tuple[Choice, ...]] = {}
    for start, job in zip(starts, jobs, strict=True):
        for index in range(start, start + job.choices):
            opening = write.opening(index)
            if opening is not None:
                yield _line(opening, usage)
            if job.echo:
                yield _line(write.piece(index, job.echo), usage)
    event = first
    while True:
        if isinstance(event, Failed):
            yield _line(event.error.body)
            return
        start, job = starts[event.job], jobs[event.job]
        if isinstance(event, Progress):
            for index, text in enumerate(event.texts, start):
                if len(text) > len(sent[index]) and text.startswith(sent[index]):
                    yield _line(write.piece(index, text[len(sent[index]) :]), usage)
                    sent[index] = text
        else:
            found[event.job] = event.choices
            for index, choice in enumerate(event.choices, start):
                rest = choice.text[len(sent[index]) :]
                yield _line(write.end(index, job, choice, rest), usage)
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


def _models(service: Service) -> Handler:
    async def models(request: Request) -> Response:
        card = {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "w2s_jax",
        }
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [card]})
        if name != service.name:
            raise ApiError(
                404, f"model {name!r} is not served here; {service.name!r} is",
                param="model", code="model_not_found",
            )  # fmt: skip
        return JSONResponse(card)

    return models


def _health(service: Service) -> Handler:
    async def health(request: Request) -> Response:
        state = service.engine.state
        return JSONResponse({"status": state}, status_code=200 if state == "ready" else 503)

    return health


def _metrics(service: Service) -> Handler:
    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    return metrics


def _error(error: ApiError) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


def _http_error(request: Request, error: HTTPException) -> Response:
    """Unknown paths and methods, in the same form."""
    told = f"{request.method} {request.url.path}: {error.detail}"
    return _error(ApiError(error.status_code, told, headers=error.headers))
