"""From request bodies to jobs: prompts as token ids, settings as those of a compiled program.

A program is what must be compiled; all other settings of a request are passed to it as numbers.
"""

import hashlib
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from w2s_jax.errors import InputError
from w2s_jax.ops.logits import Sampling
from w2s_jax.search.checkpoints import ending_ids
from w2s_jax.search.config import SearchConfig, preset
from w2s_jax.search.methods import NoScore
from w2s_jax.search.models import SearchModels
from w2s_jax.search.results import Request
from w2s_jax.search.scorers import TextScorer
from w2s_jax.serve.config import ServeConfig
from w2s_jax.serve.schema import (
    ApiError,
    Chat,
    Completion,
    Generation,
    malformed,
    too_large,
    unsupported,
)
from w2s_jax.text.chat import Template
from w2s_jax.text.prompts import Conversation, Message, decode_tokens, role_of, special_stops
from w2s_jax.text.tokenizer import power_of_two

CHOOSING = {
    "cbs": "chunk-level beam search",
    "ivg": "integrated value guidance",
    "bon": "best-of-N",
}
"""Names of the methods that choose among samples, and so have no likelihood."""
_BEAMS = ("cbs", "ivg")
_MIXING = ("eft", "ivg")
_SMALLEST_PREFIX = 64
_SMALLEST_CAPACITY = 16
_SEED_BITS = 32
_STREAM_CHUNK = 4
"""Tokens between two pieces of a stream, for methods without chunks of their own."""
# Stand for any temperature and nucleus in a program; the values come with each request.
_SOME_TEMPERATURE, _SOME_NUCLEUS = 1.0, 0.5


@dataclass(frozen=True)
class Program:
    """A compiled search, whose slots are shared by all requests that need it.

    Attributes:
        method: Its name in requests.
        config: The search. Its temperature and top-p stand for any; each request brings its own.
        prefix: Capacity for all but a prompt's last token.
        stops: Whether it looks for stop strings, which involves the host.
    """

    method: str
    config: SearchConfig
    prefix: int
    stops: bool


@dataclass(frozen=True)
class Job:
    """One prompt to be answered by a method.

    Attributes:
        program: The program that answers it.
        request: The prompt and its numbers, in the form of a search.
        choices: Number of responses to return.
        logprobs: Number of likeliest tokens to return at each token; None for no log-probs.
        echo: Text before every response; if not None, log-probs include the prompt.
        streams: Whether the client wants text as it comes.
        tells_ids: Whether the client wants token ids.
        generates: False if only the prompt is scored.
    """

    program: Program
    request: Request
    choices: int = 1
    logprobs: int | None = None
    echo: str | None = None
    streams: bool = False
    tells_ids: bool = False
    generates: bool = True

    @property
    def method(self) -> str:
        """Its method's name in requests."""
        return self.program.method

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt as the policy reads it."""
        return self.request.prompts[0]

    @property
    def ends(self) -> tuple[int, ...]:
        """The token ids that end a response."""
        return self.program.config.eos_ids or ()

    @property
    def chooses(self) -> bool:
        """Whether its choices are the best of several samples."""
        return self.method in CHOOSING


@dataclass(frozen=True)
class Served:
    """What a server answers with.

    Attributes:
        models: The policy, and the guides that read its tokens.
        tokenizer: The policy's tokenizer.
        template: How the policy reads chats; it reads texts as they are.
        guide_templates: The same for each other member of the models; None for one that reads the
            policy's tokens.
        scorers: Scorers of texts, added to the guides' log-ratio in cbs and bon.
        policy_cache: As in SearchConfig.
    """

    models: SearchModels
    tokenizer: Any
    template: Template
    guide_templates: tuple[Template | None, ...] = ()
    scorers: tuple[TextScorer, ...] = ()
    policy_cache: str = "auto"

    @property
    def is_guided(self) -> bool:
        """Whether anything scores responses."""
        return bool(self.models.guides) or bool(self.scorers)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the policy's, and the end of a turn in its template."""
        return ending_ids(self.models.policy.config, self.template)


Prompt = tuple[tuple[tuple[int, ...], ...], Conversation]
"""(token ids for each member, once if all read the policy's tokens; the prompt as text)."""


class Reader:
    """Makes jobs from bodies; safe to use from several threads."""

    def __init__(self, served: Served, config: ServeConfig) -> None:
        self.served, self.config = served, config
        self._plain = replace(served.template, name="auto")
        # A transformers tokenizer cannot encode in two threads concurrently.
        self._lock = threading.Lock()

    def completion(self, body: Completion) -> list[Job]:
        """A job for every prompt.

        Raises:
            ApiError: For anything wrong, too large or unsupported.
        """
        if body.best_of not in (None, body.n):
            raise unsupported(
                f"best_of is {body.best_of}; it must equal n ({body.n}); "
                'for best-of-N send "method": "bon" and k = N',
                "best_of",
            )
        read = [
            self._ids(prompt)
            if isinstance(prompt, list)
            else self._encoded(self._plain, Conversation(text=prompt), "prompt")
            for prompt in _prompts(body.prompt, self.config.prompts_at_once)
        ]
        return self._jobs(body, body.max_tokens, read, "prompt", body.logprobs, echo=body.echo)

    def chat(self, body: Chat) -> list[Job]:
        """The job of a chat, as a list.

        Raises:
            ApiError: For anything wrong, too large or unsupported.
        """
        if body.top_logprobs and not body.logprobs:
            raise malformed('top_logprobs needs "logprobs": true', "top_logprobs")
        asked = (body.max_tokens, body.max_completion_tokens)
        if None not in asked and asked[0] != asked[1]:
            raise malformed("max_tokens and max_completion_tokens differ; send one", "max_tokens")
        limit = next((tokens for tokens in asked if tokens is not None), None)
        turns = tuple(Message(role_of(m.role), m.text) for m in body.messages)
        if turns[-1].role != "user":
            told = f"the last message is the {turns[-1].role}'s; it must be the user's"
            raise malformed(told, "messages")
        conversation = Conversation(messages=turns, template_args=body.chat_template_kwargs)
        read = self._encoded(self.served.template, conversation, "messages")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self._jobs(body, limit, [read], "messages", logprobs)

    def _encoded(self, template: Template, conversation: Conversation, param: str) -> Prompt:
        with self._lock:
            try:
                return self._members(template.encode(conversation), conversation)
            except InputError as error:
                raise ApiError(400, str(error), param) from None

    def _ids(self, ids: list[int]) -> Prompt:
        vocabulary = self.served.models.vocabulary
        for token in ids:
            if not 0 <= token < vocabulary:
                raise malformed(f"token id {token} lies outside 0 .. {vocabulary - 1}", "prompt")
        with self._lock:
            return self._members(ids, Conversation(text=decode_tokens(self.served.tokenizer, ids)))

    def _members(self, ids: Sequence[int], conversation: Conversation) -> Prompt:
        others = self.served.guide_templates if any(self.served.guide_templates) else ()
        read = (ids, *(ids if one is None else one.encode(conversation) for one in others))
        return tuple(map(tuple, read)), conversation

    def _jobs(
        self,
        body: Generation,
        asked: int | None,
        read: Sequence[Prompt],
        kind: str,
        logprobs: int | None,
        *,
        echo: bool = False,
    ) -> list[Job]:
        """A job for each prompt.

        Args:
            body: The request's body.
            asked: Maximum new tokens, None for the default.
            read: The prompts.
            kind: The field of the prompts.
            logprobs: As in `Job`.
            echo: Whether the prompt precedes every response.
        """
        if body.stream_options is not None and not body.stream:
            raise malformed('stream_options needs "stream": true', "stream_options")
        method, width, successors, length = self._sizes(body)
        self._check_method(body, method, width, logprobs, echo)
        with self._lock:
            stops, ends = special_stops(self.served.tokenizer, body.stops)
        eos_ids = (*self.served.eos_ids, *sorted({*ends} - {*self.served.eos_ids}))
        places = {name: _each(body, name, len(read)) for name in ("row_id", "position", "lane")}
        numbers: dict[str, Any] = {
            "stop": stops,
            "seed": secrets.randbits(_SEED_BITS) if body.seed is None else folded(body.seed),
            **{name: self._given(body, name) for name in ("temperature", "top_p", "beta")},
        }
        sampling = Sampling(
            _SOME_TEMPERATURE,
            min(self._given(body, "top_k"), self.served.models.vocabulary),
            _SOME_NUCLEUS if numbers["top_p"] < 1 else 1.0,
        )
        jobs = []
        for index, (tokens, asks) in enumerate(read):
            longest = max(map(len, tokens))
            limit = self._limit(asked, longest, kind)
            if limit == 0 and (not echo or method in CHOOSING):
                raise malformed("max_tokens is 0, which only echo can do without", "max_tokens")
            own: Any = {name: each[index] for name, each in places.items()}
            most = max(limit, 1)
            request = Request(prompts=tokens, conversation=asks, limit=most, **numbers, **own)
            config = self._search(
                method,
                (width, successors, length),
                max_new_tokens=capacity_for(most, self.config.longest_response),
                sampling=sampling,
                eos_ids=eos_ids,
                policy_cache=self.served.policy_cache,
            )
            job = Job(
                Program(method, config, prefix_for(longest), bool(stops)),
                request,
                choices=body.n,
                logprobs=logprobs,
                echo=asks.text if echo else None,
                streams=body.stream,
                tells_ids=body.return_token_ids,
                generates=limit > 0,
            )
            jobs.append(job)
        return jobs

    def _given(self, body: Generation, name: str) -> Any:
        """A number of the request, or the server's default."""
        own = getattr(body, name)
        return getattr(self.config, name) if own is None else own

    def _sizes(self, body: Generation) -> tuple[str, int, int, int]:
        """Method, W, K and L of a request; ApiError if they are too large or inconsistent.

        If the method keeps all samples, W is their number.
        """
        config, method = self.config, body.method or self.config.usual_method
        w, k = body.w or config.beam_width, body.k or config.successors
        width, successors, length = body.n, 1, 1
        told = f"n is {width}"
        if method in _BEAMS:
            length = min(body.l or config.chunk_length, config.longest_response)
            width, successors, told = w, k, f"w·k is {w}·{k}"
        elif method == "bon":
            if body.w not in (None, 1):
                raise malformed("w must be 1 in bon; k is its N", "w")
            if config.usual_method != "bon":
                k = body.k or config.beam_width * config.successors
            width, told = k, f"k is {k}"
        if width * successors > config.most_rows:
            raise too_large(
                f"{told}; this server searches at most {config.most_rows} side by side",
                "k" if method in CHOOSING else "n",
            )
        return method, width, successors, length

    def _check_method(
        self, body: Generation, method: str, width: int, logprobs: int | None, echo: bool
    ) -> None:
        served = self.served
        if method != "sample" and not served.is_guided:
            raise unsupported(
                f'{method} needs a guide, which this server has not; send "method": "sample"',
                "method",
            )
        if method in _MIXING and not served.models.guides:
            raise unsupported(
                f"{method} mixes logits and so needs a guide of the policy's vocabulary; "
                "this server's has another, which cbs and bon can use",
                "method",
            )
        if method in CHOOSING:
            for field, is_asked in (("logprobs", logprobs is not None), ("echo", echo)):
                if is_asked:
                    raise unsupported(
                        f"{CHOOSING[method]} has no likelihood, so there is no {field}; "
                        'send "method": "sample" (the policy) or "eft" for it',
                        field,
                    )
            if body.n > width:
                best = "w" if method in _BEAMS else "k"
                raise malformed(f"n is {body.n}; {method} keeps only {width} ({best})", "n")
        if method == "eft" and echo and logprobs is not None and any(served.guide_templates):
            raise unsupported("eft over several templates cannot echo log-probs", "echo")

    def _search(self, method: str, sizes: tuple[int, int, int], **settings: Any) -> SearchConfig:
        """The search of a method with (W, K, L)."""
        width, successors, length = sizes
        if method not in CHOOSING:
            settings["chunk_length"] = min(_STREAM_CHUNK, settings["max_new_tokens"])
        found = preset(method, w=width, k=successors, l=length, n=width, **settings)
        if method == "ivg" or (method in CHOOSING and self.served.models.guides):
            return found
        # Samples keep their places, so that a stream can tell them apart.
        return replace(found, beam_width=width, scorer=NoScore())

    def _limit(self, asked: int | None, prompt: int, kind: str) -> int:
        """Maximum new tokens; ApiError if prompt and response do not fit the models."""
        most = self.config.longest_response
        if asked is not None and asked > most:
            told = f"max_tokens is {asked}; this server gives at most {most}"
            raise too_large(told, "max_tokens")
        limit = self.config.max_new_tokens if asked is None else asked
        positions = min(model.config.max_positions for model in self.served.models.members)
        least = 1 if asked is None else asked
        if prompt + least > positions:
            # OpenAI's clients search for this wording.
            raise ApiError(
                400,
                f"This model's maximum context length is {positions} tokens. However, you "
                f"requested {prompt + least} tokens ({prompt} in the {kind}, {least} in the "
                f"completion). Please reduce the length of the {kind} or completion.",
                kind,
                "context_length_exceeded",
            )
        return min(limit, positions - prompt)


def folded(seed: int) -> int:
    """A 64-bit seed as one of the 32 bits that draws use; unchanged if it fits."""
    if 0 <= seed < 1 << _SEED_BITS:
        return seed
    digest = hashlib.blake2b(str(seed).encode(), digest_size=_SEED_BITS // 8).digest()
    return int.from_bytes(digest, "big")


def capacity_for(tokens: int, most: int) -> int:
    """The capacity for new tokens of a program: 1, or powers of two from 16."""
    if tokens == 1:
        return 1
    return max(min(power_of_two(tokens, _SMALLEST_CAPACITY), most), tokens)


def prefix_for(tokens: int) -> int:
    """The capacity for all but a prompt's last token: powers of two from 64."""
    return power_of_two(tokens - 1, _SMALLEST_PREFIX)


def _each(body: Generation, name: str, count: int) -> list[int]:
    """row_id, position or lane of every prompt; lanes given as one number do not overlap."""
    given = getattr(body, name)
    if isinstance(given, list):
        if len(given) != count:
            raise malformed(f"{name} has {len(given)} entries for {count} prompts", name)
        return given
    return [given + index * body.n if name == "lane" else given for index in range(count)]


def _prompts(value: Any, most: int) -> list[str | list[int]]:
    """The prompts of a body: texts or token ids; ApiError for anything else."""
    wrong = malformed("prompt takes a text, a list of token ids, or a list of either", "prompt")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise wrong
    if not value:
        raise malformed("prompt is an empty list; give at least one", "prompt")
    prompts = [value] if _are_ids(value) else value
    if len(prompts) > most:
        raise too_large(
            f"{len(prompts)} prompts; this server takes at most {most} in a request", "prompt"
        )
    for prompt in prompts:
        if prompt == []:
            raise malformed("a prompt has no tokens; give at least one", "prompt")
        if not isinstance(prompt, str) and not _are_ids(prompt):
            raise wrong
    return prompts


def _are_ids(value: Any) -> bool:
    # Compared by type, since True and False are ints too.
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
