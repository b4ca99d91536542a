"""From the bodies of requests to jobs: prompts as token ids, settings as a compiled program's.

A program is what must be compiled; everything else a request asks for rides along as numbers.
"""

import hashlib
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from w2s_jax.errors import InputError
from w2s_jax.ops.sampling import Sampling
from w2s_jax.search.checkpoints import ending_ids
from w2s_jax.search.config import SearchConfig, best_of_n, cbs, eft, ivg, sample
from w2s_jax.search.models import SearchModels
from w2s_jax.search.results import Request
from w2s_jax.search.scorers import LogRatio, NoScore, TextScorer
from w2s_jax.serve.schema import (
    ApiError,
    Chat,
    Completion,
    Defaults,
    Generation,
    Limits,
    malformed,
    too_large,
    too_long,
    unsupported,
)
from w2s_jax.text.batches import power_of_two
from w2s_jax.text.chat import Template
from w2s_jax.text.conversations import Conversation, Message, role_of
from w2s_jax.text.prompts import decode_tokens, special_stops

CHOOSING = {
    "cbs": "chunk-level beam search",
    "ivg": "integrated value guidance",
    "bon": "best-of-N",
}
"""Methods that choose among samples, and so have no likelihood, with their names."""
_BEAMS = ("cbs", "ivg")
_MIXING = ("eft", "ivg")
_SMALLEST_PREFIX = 64
_SMALLEST_CAPACITY = 16
_SEED_BITS = 32
_STREAM_CHUNK = 4
"""Tokens between two pieces of a stream, for methods that have no chunks of their own."""
# A temperature and a nucleus that are drawn with; the numbers themselves come with each request.
_SOME_TEMPERATURE, _SOME_NUCLEUS = 1.0, 0.5


@dataclass(frozen=True)
class Program:
    """The settings of one compiled search.

    width, successors, length: W, K, L, with N or n as W where the method keeps every sample.
    nucleus: whether top-p is heeded. stops: whether stop strings are looked for. capacity: new
    tokens, prefix: prompt tokens at most. eos_ids: what ends a response.
    policy_cache: as in SearchConfig.
    """

    method: str
    width: int
    successors: int
    length: int
    top_k: int
    nucleus: bool
    stops: bool
    capacity: int
    prefix: int
    eos_ids: tuple[int, ...]
    policy_cache: str = "auto"

    def config(self, models: SearchModels) -> SearchConfig:
        """The search that it is."""
        settings: dict[str, Any] = {
            "max_new_tokens": self.capacity,
            "sampling": Sampling(
                _SOME_TEMPERATURE, self.top_k, _SOME_NUCLEUS if self.nucleus else 1.0
            ),
            "eos_ids": self.eos_ids,
            "policy_cache": self.policy_cache,
        }
        streamed = {"chunk_length": min(_STREAM_CHUNK, self.capacity)}
        if self.method == "sample":
            return sample(self.width, **settings, **streamed)
        if self.method == "eft":
            # Samples stay in their places, so that a stream knows which is which.
            found = eft(beam_width=self.width, **settings, **streamed)
            return replace(found, scorer=NoScore())
        beam = (self.width, self.successors, self.length)
        if self.method == "ivg":
            return ivg(*beam, **settings)
        settings["scorer"] = LogRatio() if models.guides else NoScore()
        if self.method == "bon":
            return best_of_n(self.width, **settings)
        return cbs(*beam, **settings)


@dataclass(frozen=True)
class Job:
    """One prompt to be answered by a method.

    program: None where nothing is generated and only the prompt is scored. choices: responses to
    return. logprobs: likeliest tokens to name at each token, None for no log-probs at all. echo:
    the text that goes before every response; where it is not None, log-probs are given of the
    prompt too. streams: the client wants text as it comes. tells_ids: and token ids.
    """

    method: str
    program: Program | None
    request: Request
    choices: int = 1
    logprobs: int | None = None
    echo: str | None = None
    streams: bool = False
    tells_ids: bool = False

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt as the policy reads it."""
        return self.request.prompts[0]

    @property
    def ends(self) -> tuple[int, ...]:
        """The token ids that end a response."""
        return () if self.program is None else self.program.eos_ids

    @property
    def chooses(self) -> bool:
        """Whether its choices are the best of several samples."""
        return self.method in CHOOSING


@dataclass(frozen=True)
class Served:
    """What a server answers with.

    template: how the policy reads chats; texts it reads as they stand. guide_templates: the same
    for each other member of the models, None for one that reads the policy's tokens. scorers: of
    texts, with the log-ratio of the guides in cbs and bon.
    """

    models: SearchModels
    tokenizer: Any
    template: Template
    guide_templates: tuple[Template | None, ...] = ()
    scorers: tuple[TextScorer, ...] = ()

    @property
    def is_guided(self) -> bool:
        """Whether anything says which responses are good."""
        return bool(self.models.guides) or bool(self.scorers)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """What ends a response: the policy's ids and the end of a turn in its template."""
        return ending_ids(self.models.policy.config, self.template)


class Reader:
    """Turns bodies into jobs; safe to use from several threads."""

    def __init__(self, served: Served, defaults: Defaults, limits: Limits) -> None:
        self.served, self.defaults, self.limits = served, defaults, limits
        self._plain = replace(served.template, name="auto")
        # A tokenizer of transformers may not encode in two threads at once.
        self._lock = threading.Lock()

    def completion(self, body: Completion) -> list[Job]:
        """A job for every prompt. ApiError for what is wrong, too large or not supported."""
        if body.best_of not in (None, body.n):
            raise unsupported(
                f"best_of is {body.best_of}; it must equal n ({body.n}); "
                'for best-of-N send "method": "bon" and k = N',
                "best_of",
            )
        prompts = _prompts(body.prompt, self.limits.prompts)
        read = [self._ids(p) if isinstance(p, list) else self._text(p) for p in prompts]
        logprobs = body.logprobs
        echoes = [prompt if body.echo else None for prompt in self._echoes(prompts)]
        return self._jobs(body, body.max_tokens, read, logprobs, echoes)

    def chat(self, body: Chat) -> list[Job]:
        """The job of a chat. ApiError for what is wrong, too large or not supported."""
        if body.top_logprobs and not body.logprobs:
            raise malformed('top_logprobs needs "logprobs": true', "top_logprobs")
        asked = (body.max_tokens, body.max_completion_tokens)
        if None not in asked and asked[0] != asked[1]:
            raise malformed("max_tokens and max_completion_tokens differ; send one", "max_tokens")
        limit = next((tokens for tokens in asked if tokens is not None), None)
        turns = tuple(Message(role_of(m.role), m.text) for m in body.messages)
        if turns[-1].role != "user":
            raise malformed(f"the last message is the {turns[-1].role}'s; it must be the user's",
                            "messages")  # fmt: skip
        conversation = Conversation(messages=turns, template_args=body.chat_template_kwargs)
        with self._lock:
            try:
                tokens = self._members(self.served.template.encode(conversation), conversation)
            except InputError as error:
                raise ApiError(400, str(error), param="messages") from None
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self._jobs(body, limit, [(tokens, conversation)], logprobs, [None])

    def _text(self, text: str) -> tuple[tuple[tuple[int, ...], ...], Conversation]:
        conversation = Conversation(text=text)
        with self._lock:
            try:
                return self._members(self._plain.encode(conversation), conversation), conversation
            except InputError as error:
                raise ApiError(400, str(error), param="prompt") from None

    def _ids(self, ids: list[int]) -> tuple[tuple[tuple[int, ...], ...], Conversation]:
        vocabulary = self.served.models.vocabulary
        for token in ids:
            if not 0 <= token < vocabulary:
                raise malformed(f"token id {token} lies outside 0 .. {vocabulary - 1}", "prompt")
        with self._lock:
            conversation = Conversation(text=decode_tokens(self.served.tokenizer, ids))
            return self._members(ids, conversation), conversation

    def _members(
        self, ids: Sequence[int], conversation: Conversation
    ) -> tuple[tuple[int, ...], ...]:
        """The prompt as each member reads it; once, where all read the policy's tokens."""
        others = self.served.guide_templates
        if not any(others):
            return (tuple(ids),)
        return (
            tuple(ids),
            *(tuple(ids if one is None else one.encode(conversation)) for one in others),
        )

    def _echoes(self, prompts: Sequence[str | list[int]]) -> list[str]:
        with self._lock:
            tokenizer = self.served.tokenizer
            return [p if isinstance(p, str) else decode_tokens(tokenizer, p) for p in prompts]

    def _jobs(
        self,
        body: Generation,
        asked: int | None,
        read: Sequence[tuple[tuple[tuple[int, ...], ...], Conversation]],
        logprobs: int | None,
        echoes: Sequence[str | None],
    ) -> list[Job]:
        if body.stream_options is not None and not body.stream:
            raise malformed('stream_options needs "stream": true', "stream_options")
        method, width, successors, length = self._search(body)
        self._check_method(body, method, width, logprobs, echoes)
        stops, ends = self._stops(body)
        places = {name: _each(body, name, len(read)) for name in ("row_id", "position", "lane")}
        seed = secrets.randbits(_SEED_BITS) if body.seed is None else folded(body.seed)
        defaults = self.defaults
        top_p = defaults.top_p if body.top_p is None else body.top_p
        top_k = defaults.top_k if body.top_k is None else body.top_k
        jobs = []
        for index, (tokens, conversation) in enumerate(read):
            kind = "messages" if isinstance(body, Chat) else "prompt"
            limit = self._limit(asked, max(map(len, tokens)), kind)
            if limit == 0 and (echoes[index] is None or method in CHOOSING):
                raise malformed("max_tokens is 0, which only echo can do without", "max_tokens")
            program = Program(
                method=method,
                width=width,
                successors=successors,
                length=length,
                top_k=min(top_k, self.served.models.vocabulary),
                nucleus=top_p < 1,
                stops=bool(stops),
                capacity=capacity_for(max(limit, 1), self.limits.tokens),
                prefix=prefix_for(max(map(len, tokens))),
                eos_ids=(*self.served.eos_ids, *ends),
                policy_cache=defaults.policy_cache,
            )
            request = Request(
                row_id=places["row_id"][index],
                prompts=tokens,
                conversation=conversation,
                stop=stops,
                seed=seed,
                limit=max(limit, 1),
                temperature=defaults.temperature if body.temperature is None else body.temperature,
                top_p=top_p,
                beta=defaults.beta if body.beta is None else body.beta,
                position=places["position"][index],
                lane=places["lane"][index],
            )
            jobs.append(
                Job(
                    method,
                    program if limit else None,
                    request,
                    body.n,
                    logprobs,
                    echoes[index],
                    body.stream,
                    body.return_token_ids,
                )
            )
        return jobs

    def _search(self, body: Generation) -> tuple[str, int, int, int]:
        """Method, W, K and L of a request; ApiError where they are too many or do not fit."""
        defaults, method = self.defaults, body.method or self.defaults.method
        w, k, l = body.w or defaults.w, body.k or defaults.k, body.l or defaults.l  # noqa: E741
        if method == "bon":
            if body.w not in (None, 1):
                raise malformed("w must be 1 in bon; k is its N", "w")
            usual = defaults.k if defaults.method == "bon" else defaults.w * defaults.k
            width, successors, length = body.k or usual, 1, 1
        elif method in _BEAMS:
            width, successors, length = w, k, min(l, self.limits.tokens)
        else:
            width, successors, length = body.n, 1, 1
        if width * successors > self.limits.rows:
            words = dict.fromkeys(_BEAMS, f"w·k is {w}·{k}") | {"bon": f"k is {width}"}
            raise too_large(
                f"{words.get(method, f'n is {width}')}; this server searches at most "
                f"{self.limits.rows} side by side",
                "k" if method in CHOOSING else "n",
            )
        return method, width, successors, length

    def _check_method(
        self,
        body: Generation,
        method: str,
        width: int,
        logprobs: int | None,
        echoes: Sequence[str | None],
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
            asked = {"logprobs": logprobs is not None, "echo": echoes[0] is not None}
            for field in (field for field in asked if asked[field]):
                raise unsupported(
                    f"{CHOOSING[method]} has no likelihood, so there is no {field}; "
                    'send "method": "sample" (the policy) or "eft" for it',
                    field,
                )
            if body.n > width:
                best = "w" if method in _BEAMS else "k"
                raise malformed(f"n is {body.n}; {method} keeps only {width} ({best})", "n")
        scores_echo = logprobs is not None and echoes[0] is not None
        if method == "eft" and scores_echo and any(served.guide_templates):
            raise unsupported("eft over several templates cannot echo log-probs", "echo")

    def _stops(self, body: Generation) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Stop strings to look for in texts, and the ids of special tokens given as such."""
        with self._lock:
            texts, ids = special_stops(self.served.tokenizer, body.stops)
        return texts, tuple(sorted(set(ids) - set(self.served.eos_ids)))

    def _limit(self, asked: int | None, prompt: int, kind: str) -> int:
        """New tokens at most; ApiError where prompt and response do not fit the models."""
        if asked is not None and asked > self.limits.tokens:
            raise too_large(
                f"max_tokens is {asked}; this server gives at most {self.limits.tokens}",
                "max_tokens",
            )
        limit = min(self.defaults.max_tokens, self.limits.tokens) if asked is None else asked
        positions = min(model.config.max_positions for model in self.served.models.members)
        least = limit if asked is not None else 1
        if prompt + least > positions:
            raise too_long(prompt, least, positions, kind)
        return min(limit, positions - prompt)


def folded(seed: int) -> int:
    """A seed of 64 bits as one of the 32 that draws are made of; those that fit are themselves."""
    if 0 <= seed < 1 << _SEED_BITS:
        return seed
    digest = hashlib.blake2b(str(seed).encode(), digest_size=_SEED_BITS // 8).digest()
    return int.from_bytes(digest, "big")


def capacity_for(tokens: int, most: int) -> int:
    """The room for new tokens that a program is compiled with: 1, or powers of two from 16."""
    if tokens == 1:
        return 1
    return max(min(power_of_two(tokens, _SMALLEST_CAPACITY), most), tokens)


def prefix_for(tokens: int) -> int:
    """The room for all but a prompt's last token: powers of two from 64."""
    return power_of_two(tokens - 1, _SMALLEST_PREFIX)


def _each(body: Generation, name: str, count: int) -> list[int]:
    """row_id, position or lane of every prompt; lanes that are not a list do not overlap."""
    given = getattr(body, name)
    if isinstance(given, list):
        if len(given) != count:
            raise malformed(f"{name} has {len(given)} entries for {count} prompts", name)
        return given
    return [given + index * body.n if name == "lane" else given for index in range(count)]


def _prompts(value: Any, most: int) -> list[str | list[int]]:
    """The prompts of a body: each a text or token ids. ApiError for anything else."""
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
        if isinstance(prompt, list) and not prompt:
            raise malformed("a prompt has no tokens; give at least one", "prompt")
        if not isinstance(prompt, str) and not _are_ids(prompt):
            raise wrong
    return list(prompts)


def _are_ids(value: Any) -> bool:
    # True and False are ints too.
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
