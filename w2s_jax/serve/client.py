"""A policy behind an OpenAI-compatible completions API: texts out, continuations in.

Requests run concurrently, are retried if that may help, and are counted. There is no default
endpoint. The key comes from the environment, and is in no message, file or repr.
"""

import hashlib
import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

import httpx

from w2s_jax.errors import EndpointError, InputError
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.settings import SearchFileConfig
from w2s_jax.search.text_run import Continuation, Extension
from w2s_jax.text.prompts import INCOMPLETE, Conversation

Prompt = str | tuple[int, ...]

FINISHES = ("stop", "length", "content_filter")
MOST_CHOICES = 64
"""Maximum continuations of one prompt in a request; more take several requests."""
LONGEST_MESSAGE = 300
LARGEST_ANSWER = 64 * 2**20
RETRIED = (408, 409, 425, 429)
# Fields with the same name in the settings of a search and in an endpoint.
_SAME = (
    "api_key_env", "prompts_per_request", "share_draws", "price_prompt", "price_completion",
    "concurrency", "timeout",
)  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """Answered requests, failed attempts, tokens as the server counts them, and their cost.

    `unmetered` answers, which give no counts, are in neither. `cost` is None without prices.
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
    """Mutable counter: the `usage` so far, safe to add to from several threads."""

    def __init__(self) -> None:
        self.usage, self._lock = Usage(), threading.Lock()

    def add(self, **counts: int) -> None:
        """Add to counters by name."""
        with self._lock:
            sums = {name: getattr(self.usage, name) + count for name, count in counts.items()}
            self.usage = replace(self.usage, **sums)


@dataclass(frozen=True)
class Endpoint:
    """A completions API: its address, the name of its key, prices, and how it is called.

    Attributes:
        base_url: Address up to, without, /completions, such as "http://127.0.0.1:8000/v1".
        api_key_env: Environment variable with the key; a local server may need none.
        prompts_per_request: Maximum hypotheses of a prompt in a request; None for all W. Only 1
            gives independent draws on a server that uses one seed for each text alike.
        share_draws: The server is `w2s serve`; its policy alone answers, with the draws of a search
            in one process.
        token_ids: The server supports return_token_ids, as vLLM does, and gets hypotheses back as
            the token ids that it generated, so that it never re-encodes its own text differently.
        price_prompt, price_completion: Per million tokens.
        timeout: Seconds for each request.
        backoff, longest_pause: The pause after attempt i is backoff·2^i seconds, at most
            longest_pause, minus a random part of up to half of it.
        longest_retry_after: A longer pause that the server asks for (Retry-After) is honoured up to
            this many seconds; beyond, the endpoint counts as not answering.

    Raises:
        InputError: For an address that is not http(s) or holds a key, and numbers out of range.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    prompts_per_request: int | None = None
    share_draws: bool = False
    token_ids: bool = False
    price_prompt: float | int | None = None
    price_completion: float | int | None = None
    concurrency: int = 8
    timeout: float | int = 120.0
    max_attempts: int = 6
    backoff: float | int = 1.0
    longest_pause: float | int = 60.0
    longest_retry_after: float | int = 600.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if "@" in parts.netloc or parts.query or parts.fragment:
            # The address is not shown, since it may hold a key.
            raise InputError(
                "the endpoint's address holds more than scheme, host and path; keys come from the "
                "environment variable that --api-key-env names"
            )
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(
                f"endpoint {self.base_url!r} is no address such as http://127.0.0.1:8000/v1"
            )
        for name in ("prompts_per_request", "concurrency", "max_attempts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        for name in ("price_prompt", "price_completion"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"{name} is {value}; it must be 0 or above")
        for name in ("timeout", "backoff", "longest_pause", "longest_retry_after"):
            value = getattr(self, name)
            if not 0 <= value < math.inf or (name == "timeout" and not value):
                raise InputError(f"{name} is {value}; it must be a number of seconds above 0")

    def pause(self, attempt: int, asked: float | None) -> float:
        """Seconds to wait after attempt 0, 1, ...; `asked` is what the server asks for."""
        # Larger powers would exceed the bound anyway, or overflow.
        own = min(self.backoff * 2.0 ** min(attempt, 30), self.longest_pause)
        return max(asked or 0.0, own * random.SystemRandom().uniform(0.5, 1.0))


@dataclass(frozen=True)
class _Failure:
    """Why an attempt failed, whether to retry, and the pause that the server asks for.

    A value, since exceptions carry the request, and so the key.
    """

    message: str
    again: bool = True
    pause: float | None = None


@dataclass(frozen=True)
class CompletionsPolicy:
    """A `TextProposer` over POST /v1/completions; made by `open_policy`.

    A request asks for n continuations of one or more texts, prompt + hypothesis. Its seed depends
    only on (seed, row id, position, lane), so that draws do not depend on neighbours. finish_reason
    "stop" finishes a response, "length" continues it, and "content_filter" ends it without an EOS
    to score.

    Attributes:
        render: Renders a conversation as the text that the response follows.
        config: Its sampling, stop strings and seed are sent.
        http: Client with the base address, which sends the key.
        key: The key, which no message may show.
        meter: Counts requests and tokens.
    """

    endpoint: Endpoint
    render: Callable[[Conversation], str]
    config: SearchConfig
    http: httpx.Client = field(repr=False)
    key: str = field(repr=False)
    meter: Meter = field(default_factory=Meter, repr=False)

    @property
    def usage(self) -> Usage:
        """The usage so far, with its cost if prices are given."""
        found, endpoint = self.meter.usage, self.endpoint
        if endpoint.price_prompt is None and endpoint.price_completion is None:
            return found
        cost = found.prompt_tokens * (endpoint.price_prompt or 0)
        cost += found.completion_tokens * (endpoint.price_completion or 0)
        return replace(found, cost=cost / 1e6)

    def extend(self, extensions: Sequence[Extension]) -> list[list[Continuation]]:
        """Continuations of every extension, in order, by concurrent requests.

        429, 5xx, timeouts, lost connections and malformed answers are retried.

        Raises:
            EndpointError: At once for any other refusal, and after the last attempt.
        """
        prompts: list[Prompt] = []
        for extension in extensions:
            text = self.render(extension.conversation) + extension.response
            try:
                text.encode()
            except UnicodeEncodeError as error:
                told = f"row {extension.row_id}: the prompt is not text: {error.reason}"
                raise InputError(told) from None
            prompts.append(extension.trail or text)
        plans = list(_plan(extensions, prompts, self.endpoint))
        found: list[list[Continuation]] = [[] for _ in extensions]
        for plan, answer in zip(plans, self._ask_all(plans, extensions), strict=True):
            continuations = iter(answer)
            for index in plan.members:
                found[index] = list(islice(continuations, extensions[index].count))
        return found

    def _body(self, plan: "_Plan", asked: Sequence[Extension]) -> dict[str, Any]:
        config, first = self.config, asked[0]
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "prompt": plan.prompts,
            "n": plan.choices,
            "max_tokens": first.max_tokens,
            "temperature": config.sampling.temperature,
            "top_p": config.sampling.top_p,
            "seed": config.seed,
        }
        if config.stop:
            body["stop"] = list(config.stop)
        if self.endpoint.token_ids:
            body["return_token_ids"] = True
        if not self.endpoint.share_draws:
            seed = draw_seed(config.seed, first.row_id, first.position, first.lane)
            return body | {"seed": seed}
        for name in ("row_id", "position", "lane"):
            body[name] = [getattr(each, name) for each in asked]
        return body | {"method": "sample", "top_k": config.sampling.top_k}

    def _ask_all(
        self, plans: Sequence["_Plan"], extensions: Sequence[Extension]
    ) -> list[list[Continuation]]:
        halt = threading.Event()
        pool = ThreadPoolExecutor(max(1, min(self.endpoint.concurrency, len(plans))))
        futures = []
        for plan in plans:
            asked = [extensions[index] for index in plan.members]
            where = f"row {asked[0].row_id}: endpoint {self.endpoint.base_url}"
            futures.append(pool.submit(self._ask, self._body(plan, asked), where, halt))
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        finally:
            # After a failure nothing more is sent; pending requests are not waited for.
            halt.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, body: dict[str, Any], where: str, halt: threading.Event) -> list[Continuation]:
        endpoint, failed = self.endpoint, _Failure("")
        for attempt in range(endpoint.max_attempts):
            if attempt and halt.wait(endpoint.pause(attempt - 1, failed.pause)):
                break
            found = self._attempt(body)
            if not isinstance(found, _Failure):
                return found
            failed = found
            if not failed.again:
                raise EndpointError(f"{where} refused: {failed.message}")
            self.meter.add(retries=1)
            if (failed.pause or 0) > endpoint.longest_retry_after:
                asked = f"it asks to wait {failed.pause:.0f} s ({failed.message})"
                raise EndpointError(f"{where} stopped answering: {asked}")
        tried = f"{endpoint.max_attempts} attempts failed, the last one by: {failed.message}"
        raise EndpointError(f"{where} stopped answering: {tried}")

    def _attempt(self, body: dict[str, Any]) -> list[Continuation] | _Failure:
        where = "no connection"
        try:
            with self.http.stream("POST", "completions", json=body) as response:
                where = "the connection broke"
                content = _whole(response.iter_bytes(), time.monotonic() + self.endpoint.timeout)
        except (httpx.TimeoutException, TimeoutError):
            return _Failure("no answer in time")
        except httpx.HTTPError as error:
            return _Failure(self._one_line(f"{where} ({error})"))
        if not response.is_success:
            return self._refusal(response, content.decode(errors="replace").strip())
        try:
            data = json.loads(content)
            counts = _counts(data)
            self.meter.add(requests=1, unmetered=int(len(counts) < 2), **counts)
            return _read(data, counts, body)
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
        """A server's message in one line of limited length, without the key if it repeats that."""
        if self.key:
            message = message.replace(self.key, "***")
        line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
        return line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]} ..."


def open_policy(
    endpoint: Endpoint, config: SearchConfig, render: Callable[[Conversation], str]
) -> CompletionsPolicy:
    """A policy behind an endpoint, with the config's sampling (top_k only with share_draws).

    Raises:
        InputError: For a key that no header can carry; it is not shown.
    """
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(
            f"the key in the environment variable {endpoint.api_key_env} holds characters that no "
            "header can carry"
        )
    http = httpx.Client(
        base_url=endpoint.base_url,
        headers={"Authorization": f"Bearer {key or 'none'}", "Accept": "application/json"},
        timeout=float(endpoint.timeout),
        follow_redirects=True,
        # No limit beyond the threads: abandoned requests may still hold a connection.
        limits=httpx.Limits(max_connections=None),
    )
    return CompletionsPolicy(endpoint, render, config, http, key)


def draw_seed(seed: int, row_id: int, position: int, lane: int) -> int:
    """A seed in 0 .. 2**31 − 1 for a request, from what distinguishes its draws."""
    digest = hashlib.blake2b(repr((seed, row_id, position, lane)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def _whole(parts: Iterable[bytes], deadline: float) -> bytes:
    """A body that may arrive in small parts; TimeoutError past the deadline.

    The client's own timeout limits the time between two parts, not the total. A body that is too
    large is replaced by a malformed one.
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
    """Seconds that a server asks to wait, given in milliseconds, in seconds, or as a date."""
    told = headers.get("retry-after", "")
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        else:
            seconds = float(told)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(told).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


@dataclass(frozen=True)
class _Plan:
    """A request with `choices` for each prompt, dealt in order to the extensions `members`."""

    prompts: Sequence[Prompt]
    choices: int
    members: tuple[int, ...]


def _plan(
    extensions: Sequence[Extension], prompts: Sequence[Prompt], endpoint: Endpoint
) -> Iterator[_Plan]:
    """The requests that answer the extensions; no two rows share one.

    Equal prompts are sent once, with as many choices as all of them need: a server that applies the
    seed to each prompt would return the same continuations for them.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for index, (each, prompt) in enumerate(zip(extensions, prompts, strict=True)):
        # With share_draws the draws are given by position and lane, so equal prompts differ.
        own = index if endpoint.share_draws else None
        what = (each.row_id, each.position, each.max_tokens, own, each.count, prompt)
        alike.setdefault(what, []).append(index)
    requests: dict[tuple[Any, ...], list[tuple[Prompt, Sequence[int]]]] = {}
    for (*kind, _, count, prompt), indices in alike.items():
        for part, group in enumerate(_runs(indices, max(1, MOST_CHOICES // count))):
            requests.setdefault((*kind, part, count * len(group)), []).append((prompt, group))
    for (*_, choices), entries in requests.items():
        for run in _runs(entries, endpoint.prompts_per_request or len(entries)):
            members = tuple(index for _, group in run for index in group)
            yield _Plan([prompt for prompt, _ in run], choices, members)


def _runs(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive pieces of at most `size` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _counts(data: Any) -> dict[str, int]:
    """The counts of prompt and completion tokens that an answer reports."""
    usage = data.get("usage") or {}
    counts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    return {name: count for name, count in counts.items() if type(count) is int and count >= 0}


def _read(data: Any, counts: Mapping[str, int], body: Mapping[str, Any]) -> list[Continuation]:
    """The choices of an answer as continuations, those of the first prompt first.

    The server counts the tokens of all choices together: a choice cut by length has max_tokens, and
    the rest is divided evenly among the others. For a malformed answer raises ValueError,
    TypeError, KeyError or AttributeError.
    """
    expected, choices = len(body["prompt"]) * body["n"], data["choices"]
    if len(choices) != expected:
        raise ValueError(f"{len(choices)} choices where {expected} were asked for")
    if {choice["index"] for choice in choices} != set(range(expected)):
        raise ValueError(f"the choices' indices are not 0 .. {expected - 1}")
    cut = sum(choice["finish_reason"] == "length" for choice in choices)
    others = expected - cut
    left = max(0, counts.get("completion_tokens", 0) - cut * body["max_tokens"])
    found = []
    for choice in sorted(choices, key=lambda choice: choice["index"]):
        text, finish = _text(choice), choice["finish_reason"]
        ids = _ids(choice) if body.get("return_token_ids") else None
        if finish == "length":
            # A chunk may end inside a character; its bytes cannot be sent back, so the next chunk
            # generates it again.
            text = text.rstrip(INCOMPLETE)
            found.append(Continuation(text, False, body["max_tokens"], trail=ids))
            continue
        share = -(-left // others)
        left, others = left - share, others - 1
        # A stop_reason that is text, as from vLLM and `w2s serve`, is a stop string, not an EOS.
        stopped = isinstance(choice.get("stop_reason"), str) or finish == "content_filter"
        found.append(Continuation(text, True, share, stopped))
    return found


def _text(choice: Mapping[str, Any]) -> str:
    text, finish = choice["text"], choice["finish_reason"]
    if not isinstance(text, str):
        raise TypeError(f"a text is {type(text).__name__}")
    if finish not in FINISHES:
        raise ValueError(f'finish_reason is {json.dumps(finish)}, neither "stop" nor "length"')
    # JSON can contain half a surrogate pair, which no later request could carry.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _ids(choice: Mapping[str, Any]) -> tuple[int, ...]:
    """The token ids of prompt and text."""
    ids = (*choice["prompt_token_ids"], *choice["token_ids"])
    if not all(type(token) is int for token in ids):
        raise TypeError("a token id is not a whole number")
    return ids


def connect(
    settings: SearchFileConfig, config: SearchConfig, render: Callable[[Conversation], str]
) -> tuple[CompletionsPolicy, Callable[[], str]]:
    """The policy behind `settings.endpoint`, and a function that tells its usage.

    Raises:
        InputError: As `Endpoint` and `open_policy` do.
    """
    endpoint = Endpoint(
        str(settings.endpoint),
        str(settings.endpoint_model),
        # The drawn tokens may differ from those to which their text encodes.
        token_ids=settings.share_draws,
        max_attempts=settings.attempts,
        **{name: getattr(settings, name) for name in _SAME},
    )
    policy = open_policy(endpoint, config, render)
    return policy, lambda: str(policy.usage)
