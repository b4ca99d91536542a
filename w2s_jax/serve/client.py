"""A policy behind an OpenAI-compatible completions API: texts out, continuations in.

No endpoint is a default. The key comes from the environment and is in no field, message or file.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

import httpx

from w2s_jax.errors import InputError
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.settings import SearchFileConfig
from w2s_jax.search.text_run import Continuation, Extension
from w2s_jax.serve.retry import Api, Meter, Patience, Usage, counts_of
from w2s_jax.text.prompts import INCOMPLETE, Conversation

Prompt = str | tuple[int, ...]

FINISHES = ("stop", "length", "content_filter")
MOST_CHOICES = 64
"""At most this many continuations of one prompt in a request; more of them take several."""


@dataclass(frozen=True)
class Endpoint:
    """Where a completions API is and what it costs. Holds the name of the key, never the key.

    base_url: up to and without /completions, as "http://127.0.0.1:8000/v1". api_key_env: the
    environment variable that holds the key; a local server may need none. prompts_per_request: the
    most hypotheses of one prompt that share a request (None: all W); a server that applies a seed
    to each text alike draws independently for them only with 1. share_draws: the server is
    `w2s serve`; its policy alone shall answer, with the draws of a search in one process.
    token_ids: the server knows return_token_ids (vLLM does) and is sent hypotheses as the token ids
    that it wrote, so that it never encodes its own text in another way. prices: per million tokens.

    Raises InputError for a base_url that is no http(s) address or holds a key, and for prices or
    sizes out of range.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    prompts_per_request: int | None = None
    share_draws: bool = False
    token_ids: bool = False
    price_prompt: float | int | None = None
    price_completion: float | int | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if "@" in parts.netloc or parts.query or parts.fragment:
            # Not shown: what stands there may be a key.
            raise InputError(
                "the endpoint's address holds more than scheme, host and path; keys come from the "
                "environment variable that --api-key-env names"
            )
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(
                f"endpoint {self.base_url!r} is no address such as http://127.0.0.1:8000/v1"
            )
        if self.prompts_per_request is not None and self.prompts_per_request < 1:
            raise InputError(
                f"prompts_per_request is {self.prompts_per_request}; it must be at least 1"
            )
        for name in ("price_prompt", "price_completion"):
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 0 or above")

    def usage(self, meter: Meter) -> Usage:
        """What was asked and answered so far, with its cost where prices are given."""
        return meter.usage(self.price_prompt, self.price_completion)


@dataclass(frozen=True)
class CompletionsPolicy:
    """A `TextProposer` over POST /v1/completions; made by `open_policy`.

    Every request asks for n continuations of one or more texts, prefix + hypothesis. Its seed
    depends on (seed, row id, position, lane) alone, so draws do not depend on neighbours.
    finish_reason "stop" finishes a response and "length" continues it; "content_filter" ends it
    without an EOS to score.

    Attributes:
        endpoint: Where it is.
        render: From a conversation to the text that the response follows.
        config: Its sampling, stop strings and seed are sent.
        api: What asks, and counts requests and tokens.
    """

    endpoint: Endpoint
    render: Callable[[Conversation], str]
    config: SearchConfig
    api: Api

    def extend(self, extensions: Sequence[Extension]) -> list[list[Continuation]]:
        """Continuations of every extension, in order; requests go out side by side.

        Raises EndpointError where the endpoint refuses a request or stops answering.
        """
        wheres = [f"row {extension.row_id}" for extension in extensions]
        prompts: list[Prompt] = []
        for extension, where in zip(extensions, wheres, strict=True):
            text = self.render(extension.conversation) + extension.response
            _check_text(text, where)
            prompts.append(extension.trail or text)
        plans = list(_plan(extensions, prompts, self.endpoint))
        bodies = [self._body(plan, extensions) for plan in plans]
        answers = self.api.ask_all(bodies, [wheres[plan.members[0]] for plan in plans], _read)
        found: list[list[Continuation]] = [[] for _ in extensions]
        for plan, answer in zip(plans, answers, strict=True):
            continuations = iter(answer)
            for index in plan.members:
                found[index] = list(islice(continuations, extensions[index].count))
        return found

    def _body(self, plan: "_Plan", extensions: Sequence[Extension]) -> dict[str, Any]:
        config, asked = self.config, [extensions[index] for index in plan.members]
        first = asked[0]
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "prompt": list(plan.prompts),
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


def open_policy(
    endpoint: Endpoint,
    config: SearchConfig,
    render: Callable[[Conversation], str],
    *,
    patience: Patience | None = None,
    meter: Meter | None = None,
) -> CompletionsPolicy:
    """A policy behind an endpoint that samples as the config says (top_k only with share_draws).

    render writes a conversation as the text that the response follows. Raises InputError for a key
    that no header can carry, without showing it.
    """
    patience = patience or Patience()
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(
            f"the key in the environment variable {endpoint.api_key_env} holds characters that no "
            "header can carry"
        )
    http = httpx.Client(
        base_url=endpoint.base_url,
        headers={"Authorization": f"Bearer {key or 'none'}", "Accept": "application/json"},
        timeout=float(patience.timeout),
        follow_redirects=True,
        # As many as there are threads; what was given up may still have one.
        limits=httpx.Limits(max_connections=None),
    )
    api = Api(http, "completions", key, endpoint.base_url, patience, meter or Meter())
    return CompletionsPolicy(endpoint, render, config, api)


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: the prompt is not text: {error.reason}") from None


def draw_seed(seed: int, row_id: int, position: int, lane: int) -> int:
    """A seed in 0 .. 2**31 − 1 for one request, from what tells its draws apart."""
    digest = hashlib.blake2b(repr((seed, row_id, position, lane)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class _Plan:
    """A request: `choices` of each prompt, shared out in order to the extensions at `members`."""

    prompts: tuple[Prompt, ...]
    choices: int
    members: tuple[int, ...]


def _plan(
    extensions: Sequence[Extension], prompts: Sequence[Prompt], endpoint: Endpoint
) -> Iterator[_Plan]:
    """The requests that answer the extensions; no two rows share one.

    Equal prompts go out once, with as many choices as they need together: a server that applies the
    seed to each prompt alike would give each of them the same continuations.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for index, (each, prompt) in enumerate(zip(extensions, prompts, strict=True)):
        # Where draws are told by their places, equal prompts differ.
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
            yield _Plan(tuple(prompt for prompt, _ in run), choices, members)


def _runs(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive pieces of at most `size` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _read(data: Any, body: Mapping[str, Any]) -> list[Continuation]:
    """The choices of an answer as continuations, those of the first prompt first.

    The server counts the tokens of all choices together: one cut by length has max_tokens of them,
    what is left is shared evenly among the others. Raises as `retry.Read`.
    """
    expected, choices = len(body["prompt"]) * body["n"], data["choices"]
    if len(choices) != expected:
        raise ValueError(f"{len(choices)} choices where {expected} were asked for")
    if {choice["index"] for choice in choices} != set(range(expected)):
        raise ValueError(f"the choices' indices are not 0 .. {expected - 1}")
    cut = sum(choice["finish_reason"] == "length" for choice in choices)
    others = expected - cut
    left = max(0, counts_of(data).get("completion_tokens", 0) - cut * body["max_tokens"])
    found = []
    for choice in sorted(choices, key=lambda choice: choice["index"]):
        text, finish = _text(choice), choice["finish_reason"]
        ids = _ids(choice) if body.get("return_token_ids") else None
        if finish == "length":
            # A chunk may end inside a character; its bytes cannot be sent back, so it is written
            # anew by the next chunk.
            text = text.rstrip(INCOMPLETE)
            found.append(Continuation(text, False, body["max_tokens"], trail=ids))
            continue
        share = -(-left // others)
        left, others = left - share, others - 1
        # A stop_reason that is text, as vLLM and `w2s serve` give it, is a stop string; no EOS.
        stopped = isinstance(choice.get("stop_reason"), str) or finish == "content_filter"
        found.append(Continuation(text, True, share, stopped))
    return found


def _text(choice: Mapping[str, Any]) -> str:
    text, finish = choice["text"], choice["finish_reason"]
    if not isinstance(text, str):
        raise TypeError(f"a text is {type(text).__name__}")
    if finish not in FINISHES:
        raise ValueError(f'finish_reason is {json.dumps(finish)}, neither "stop" nor "length"')
    # JSON can spell half a surrogate pair, which no later request could carry.
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
    """The policy behind `settings.endpoint`, and what says how much it was asked.

    Args:
        settings: the endpoint's address, model, limits and prices.
        config: the search that asks it.
        render: from a conversation to the text that the response follows.

    Raises:
        InputError: as `Endpoint` and `open_policy` do.
    """
    endpoint = Endpoint(
        str(settings.endpoint),
        str(settings.endpoint_model),
        api_key_env=settings.api_key_env,
        prompts_per_request=settings.prompts_per_request,
        share_draws=settings.share_draws,
        # Tokens that were drawn need not be those that their text encodes to.
        token_ids=settings.share_draws,
        price_prompt=settings.price_prompt,
        price_completion=settings.price_completion,
    )
    patience = Patience(settings.concurrency, settings.timeout, settings.attempts)
    meter = Meter()
    policy = open_policy(endpoint, config, render, patience=patience, meter=meter)
    return policy, lambda: str(endpoint.usage(meter))
