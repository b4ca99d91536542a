"""Requests to an HTTP API, side by side, asked again where that may help, and counted.

Knows nothing of search. Every failure is one line without the key.
"""

import json
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from w2s_jax.errors import InputError

LONGEST_MESSAGE = 300
LARGEST_ANSWER = 64 * 2**20
RETRIED = (408, 409, 425, 429)

Body = Mapping[str, Any]
Answer = TypeVar("Answer")
Read = Callable[[Any, Body], Answer]
"""From an answer's JSON and the body that was sent; raises ValueError, TypeError, KeyError or
AttributeError where that is malformed."""


class EndpointError(InputError):
    """An endpoint that refuses, stops answering or answers nonsense; told in one line."""


@dataclass(frozen=True)
class Patience:
    """How an endpoint is asked: requests at a time, seconds for each, attempts and pauses.

    The pause after attempt i is backoff·2^i seconds, at most longest_pause, less a random part of
    up to half of it; a longer one that the server asks for (Retry-After) is honoured up to
    longest_retry_after, beyond which the endpoint counts as not answering. Raises InputError for
    values out of range.
    """

    concurrency: int = 8
    timeout: float | int = 120.0
    max_attempts: int = 6
    backoff: float | int = 1.0
    longest_pause: float | int = 60.0
    longest_retry_after: float | int = 600.0

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_attempts"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("timeout", "backoff", "longest_pause", "longest_retry_after"):
            value = getattr(self, name)
            if not 0 <= value < math.inf or (name == "timeout" and not value):
                raise InputError(f"{name} is {value}; it must be a number of seconds above 0")

    def pause(self, attempt: int, asked: float | None) -> float:
        """Seconds to wait after attempt 0, 1, ...; `asked`: what the server asks for."""
        # Above 2**30 the power would only meet the bound, or overflow.
        own = min(self.backoff * 2.0 ** min(attempt, 30), self.longest_pause)
        return max(asked or 0.0, own * random.SystemRandom().uniform(0.5, 1.0))


@dataclass(frozen=True)
class Usage:
    """Requests answered, attempts that failed, tokens as the server counts them, and their cost.

    unmetered: answers without counts, which tokens and cost leave out. cost: None without prices.
    """

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unmetered: int = 0
    cost: float | None = None

    def __str__(self) -> str:
        told = f"{self.requests:,} requests ({self.retries:,} failed attempts), "
        told += f"{self.prompt_tokens:,} prompt tokens and {self.completion_tokens:,} new ones"
        if self.unmetered:
            told += f", {self.unmetered:,} answers without counts"
        return told if self.cost is None else f"{told}, cost {self.cost:,.4f}"


class Meter:
    """The one mutable thing: counts of requests and tokens, safe to add to from several threads."""

    def __init__(self) -> None:
        self._usage, self._lock = Usage(), threading.Lock()

    def add(self, **counts: int) -> None:
        """Add to counters by name."""
        with self._lock:
            sums = {name: getattr(self._usage, name) + count for name, count in counts.items()}
            self._usage = replace(self._usage, **sums)

    def usage(
        self, price_prompt: float | int | None = None, price_completion: float | int | None = None
    ) -> Usage:
        """The counts at this moment; prices are per million tokens."""
        found = self._usage
        if price_prompt is None and price_completion is None:
            return found
        prompt, completion = price_prompt or 0, price_completion or 0
        cost = (found.prompt_tokens * prompt + found.completion_tokens * completion) / 1e6
        return replace(found, cost=cost)


@dataclass(frozen=True)
class _Failure:
    """Why an attempt gave no answer, whether another may, and the pause the server asks for."""

    message: str
    again: bool = True
    pause: float | None = None


@dataclass(frozen=True)
class Api:
    """An API and how it is asked.

    Attributes:
        http: A client that has its base address, and sends the key.
        path: What is asked, behind that address.
        key: What no message may show.
        name: What messages call it.
        patience: How it is asked again.
        meter: What counts requests and tokens.
    """

    http: httpx.Client = field(repr=False)
    path: str
    key: str | None = field(repr=False)
    name: str
    patience: Patience
    meter: Meter = field(repr=False)

    def ask_all(
        self, bodies: Sequence[Body], wheres: Sequence[str], read: Read[Answer]
    ) -> list[Answer]:
        """Answers to all requests in order, at most `patience.concurrency` at a time.

        429, 5xx, time-outs, lost connections and malformed answers are tried again.

        Args:
            bodies: What is sent.
            wheres: What each is for, in messages.
            read: What makes an answer of the JSON that comes.

        Raises:
            EndpointError: At once for every other refusal, and after the last attempt.
        """
        if not bodies:
            return []
        halt = threading.Event()
        pool = ThreadPoolExecutor(max_workers=min(self.patience.concurrency, len(bodies)))
        futures = [
            pool.submit(self._ask, body, f"{where}: endpoint {self.name}", read, halt)
            for body, where in zip(bodies, wheres, strict=True)
        ]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        finally:
            # After a failure nothing more is asked; what is on its way is not waited for.
            halt.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, body: Body, where: str, read: Read[Answer], halt: threading.Event) -> Answer:
        patience, message = self.patience, ""
        for attempt in range(patience.max_attempts):
            if attempt and halt.is_set():
                break
            found = self._attempt(body, read)
            if not isinstance(found, _Failure):
                return found
            message = found.message
            if not found.again:
                raise EndpointError(f"{where} refused: {message}")
            self.meter.add(retries=1)
            if (found.pause or 0) > patience.longest_retry_after:
                asked = f"it asks to wait {found.pause:.0f} s ({message})"
                raise EndpointError(f"{where} stopped answering: {asked}")
            if attempt + 1 < patience.max_attempts:
                halt.wait(patience.pause(attempt, found.pause))
        tried = f"{patience.max_attempts} attempts failed, the last one by: {message}"
        raise EndpointError(f"{where} stopped answering: {tried}")

    def _attempt(self, body: Body, read: Read[Answer]) -> Answer | _Failure:
        """One request; failures are values, since exceptions carry the request, and so the key."""
        where = "no connection"
        try:
            with self.http.stream("POST", self.path, json=body) as response:
                where = "the connection broke"
                content = _whole(response.iter_bytes(), time.monotonic() + self.patience.timeout)
        except (httpx.TimeoutException, TimeoutError):
            return _Failure("no answer in time")
        except httpx.HTTPError as error:
            return _Failure(self._one_line(f"{where} ({error})"))
        if not response.is_success:
            return self._refusal(response, content.decode(errors="replace").strip())
        try:
            data = json.loads(content)
            counts = counts_of(data)
            self.meter.add(requests=1, unmetered=int(len(counts) < 2), **counts)
            return read(data, body)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            fault = self._one_line(f"{type(error).__name__}: {error}")
            return _Failure(f"a malformed answer ({fault})")

    def _refusal(self, response: httpx.Response, text: str) -> _Failure:
        status, code = response.status_code, None
        told: Any = text or f"Error code: {status}"
        with suppress(ValueError, RecursionError):
            told = json.loads(text)
            told = told.get("error", told) if isinstance(told, dict) else told
        if isinstance(told, dict):
            code = told.get("code")
            told = told.get("message") or told.get("detail") or told
        again = (status in RETRIED or status >= 500) and code != "insufficient_quota"
        return _Failure(self._one_line(f"{status} {told}"), again, _retry_after(response.headers))

    def _one_line(self, message: str) -> str:
        """A server's message in one line of bounded length, without the key should it repeat it."""
        if self.key:
            message = message.replace(self.key, "***")
        line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
        return line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]} ..."


def counts_of(data: Any) -> dict[str, int]:
    """The numbers of tokens that an answer tells, of prompt_tokens and completion_tokens."""
    usage = data.get("usage") or {}
    counts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    return {name: count for name, count in counts.items() if type(count) is int and count >= 0}


def _whole(parts: Iterable[bytes], deadline: float) -> bytes:
    """A body that may come drop by drop; TimeoutError past the deadline.

    The client's own timeout bounds the time between two drops, not the whole. A body beyond bounds
    becomes one that is malformed.
    """
    body = bytearray()
    for part in parts:
        body += part
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(body) > LARGEST_ANSWER:
            return b"larger than any answer"
    return bytes(body)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, told in milliseconds, in seconds, or as a date."""
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        else:
            seconds = float(headers["retry-after"])
    except KeyError:
        return None
    except ValueError:
        try:
            seconds = parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time()
        except (KeyError, ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
