"""The bodies of requests: their fields, read strictly; what a server takes, and its refusals.

An error is a status and OpenAI's error body.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from w2s_jax.errors import InputError
from w2s_jax.ops.sampling import Sampling

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_OWN_FAULTS = 500


class ApiError(Exception):
    """A refused or failed request.

    status: HTTP status. message: one line, what is wrong and what would be right. param: the field
    at fault. code: a word that programs can compare.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body, as OpenAI's API writes it."""
        fallback = "server_error" if self.status >= _OWN_FAULTS else "invalid_request_error"
        kind = _TYPES.get(self.status, fallback)
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": told}


def unsupported(message: str, param: str) -> ApiError:
    """400: the request is well formed and asks for what this server cannot give."""
    return ApiError(400, message, param=param, code="unsupported_parameter")


def malformed(message: str, param: str | None = None) -> ApiError:
    """400: the request is not of the form that the endpoint takes."""
    return ApiError(400, message, param=param, code="invalid_request")


def too_large(message: str, param: str) -> ApiError:
    """400: the request asks for more than this server gives."""
    return ApiError(400, message, param=param, code="too_large")


def body_too_large(most: int) -> ApiError:
    """413: the body is not read."""
    told = f"the body is larger than {most} bytes, the most that this server reads"
    return ApiError(413, told, code="too_large")


def too_long(prompt: int, new: int, positions: int, param: str) -> ApiError:
    """400: prompt and response do not fit the models; in words that OpenAI's clients look for."""
    return ApiError(
        400,
        f"This model's maximum context length is {positions} tokens. However, you requested "
        f"{prompt + new} tokens ({prompt} in the {param}, {new} in the completion). Please reduce "
        f"the length of the {param} or completion.",
        param=param,
        code="context_length_exceeded",
    )


def not_finite() -> ApiError:
    """500: what the models say of this request is no number."""
    return ApiError(
        500,
        "a log-prob is not a number; a model's weights may be damaged, or overflow in this dtype",
        code="not_finite",
    )


def queue_full(waiting: int, queue: int) -> ApiError:
    """429: as many prompts wait as may."""
    return ApiError(
        429,
        f"{waiting} of {queue} places in the queue are taken; try again",
        code="queue_full",
        headers={"Retry-After": "1"},
    )


def shutting_down() -> ApiError:
    """503: the server takes no more requests."""
    return ApiError(
        503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"}
    )


@dataclass(frozen=True)
class Defaults:
    """The values of fields that a request leaves out. w, k, l are W, K and L of the search.

    policy_cache, as in SearchConfig, is the server's alone.

    Raises InputError for a value that no request could ask for either.
    """

    method: str = "cbs"
    w: int = 4
    k: int = 4
    l: int = 5  # noqa: E741
    beta: float = 1.0
    max_tokens: int = 50
    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 1.0
    policy_cache: str = "auto"

    def __post_init__(self) -> None:
        _at_least_one(self, ("w", "k", "l", "max_tokens"))
        if not 0 <= self.beta < math.inf:
            raise InputError(f"beta is {self.beta}; it must be 0 or above, and finite")
        Sampling(self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True)
class Limits:
    """The most that is taken on, in all and of one request.

    slots: prompts searched side by side, of each compiled program. queue: prompts that wait.
    rows: W·K of cbs, N of bon, n of the others. tokens: new tokens of a response. prompts: prompts
    of a request. body: bytes of a request. programs: compiled searches that keep their memory on
    the device. Raises InputError for a number below 1.
    """

    slots: int = 8
    queue: int = 256
    rows: int = 64
    tokens: int = 2048
    prompts: int = 128
    body: int = 1 << 22
    programs: int = 4

    def __post_init__(self) -> None:
        _at_least_one(self, tuple(field.name for field in dataclasses.fields(self)))


def _at_least_one(settings: object, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise InputError(f"{name} is {getattr(settings, name)}; it must be at least 1")


# OpenAI's fields that this server cannot heed, and the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
# Fields that change no answer: they name the client or its purpose.
_WITHOUT_EFFECT = ("metadata", "prompt_cache_key", "safety_identifier", "user")

MOST_STOPS = 16
_MOST_STOP_LENGTH = 1000
MOST_TOP_LOGPROBS = 20
_HALF_INT = 2**30

Text = Annotated[str, Field(min_length=1, max_length=_MOST_STOP_LENGTH)]
Count = Annotated[int, Field(ge=1)]
Place = Annotated[int, Field(ge=0, lt=_HALF_INT)]
Places = Place | list[Place]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class StreamOptions(_Strict):
    """`stream_options`."""

    include_usage: bool = False


class Generation(_Strict):
    """What both endpoints take. None: as the server was told to do.

    method, w, k, l, beta, top_k, row_id, position and lane are not OpenAI's: they choose the search
    and its draws. Of a list, row_id, position and lane go one to each prompt. return_token_ids adds
    prompt_token_ids and token_ids to the choices, as in vLLM.
    """

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1e4)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Count = 1
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    method: Literal["cbs", "bon", "eft", "ivg", "sample"] | None = None
    w: Count | None = None
    k: Count | None = None
    l: Count | None = None  # noqa: E741
    beta: Annotated[float, Field(ge=0, le=1e4)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=_HALF_INT)] | None = None
    row_id: Places = 0
    position: Places = 0
    lane: Places = 0
    return_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _nulls_are_absent(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping):
            return fields
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def counts_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class Completion(Generation):
    """Body of POST /v1/completions. prompt: text, token ids, or a list of either."""

    prompt: Any
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    best_of: Count | None = None


class Part(_Strict):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    # Chat templates write no names.
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class Chat(Generation):
    """Body of POST /v1/chat/completions.

    chat_template_kwargs, as in vLLM: values that the chat templates may read.
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


Body = TypeVar("Body", Completion, Chat)


def read_body(raw: bytes, form: type[Body]) -> Body:
    """The body of a request; ApiError 400 where it is malformed or not supported."""
    try:
        fields = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise malformed(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise malformed(f"the body is a JSON {type(fields).__name__}; it must be an object")
    fields = _supported(fields)
    if form is Chat:
        fields["messages"] = _plain_messages(fields.get("messages"))
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        raise _told(error) from None


def _supported(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without those that ask for nothing; ApiError for one that cannot be heeded."""
    kept = {}
    for name, value in fields.items():
        if name in _WITHOUT_EFFECT:
            continue
        if name not in _NEUTRAL:
            kept[name] = value
        elif value is not None and value not in _NEUTRAL[name]:
            raise unsupported(f"{name} is not supported by this server; leave it out", name)
    return kept


def _plain_messages(messages: Any) -> Any:
    """Messages without the empty fields that clients send back; ApiError for unsupported ones."""
    if not isinstance(messages, list):
        return messages
    plain = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            return messages
        where = f"messages.{index}"
        kept = {name: value for name, value in message.items() if value not in (None, [])}
        if message.get("content") == []:
            raise malformed(f"{where}.content is empty; give a text", f"{where}.content")
        if kept.get("role") in ("tool", "function"):
            raise unsupported(f"{where}: tools are not supported by this server", where)
        for name in ("tool_calls", "function_call", "audio", "refusal", "annotations"):
            if name in kept:
                raise unsupported(f"{where}.{name} is not supported by this server", where)
        content = kept.get("content")
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise unsupported(f"{where}: content of type {kind!r}; give text", where)
        plain.append(kept)
    return plain


def _told(error: ValidationError) -> Exception:
    """The first fault of a body in one line."""
    faults = error.errors(include_url=False, include_input=False)
    # Of a union, the alternative that went furthest says most.
    first = max(faults, key=lambda fault: len(fault["loc"]) if fault["loc"] else 0)
    first = faults[0] if faults[0]["type"] == "missing" else first
    words = [str(word) for word in first["loc"] if not _is_alternative(word)]
    where = ".".join(words)
    if first["type"] == "extra_forbidden":
        return unsupported(f"{where} is no field of this endpoint", where)
    return malformed(f"{where}: {first['msg']}", where or None)


def _is_alternative(word: int | str) -> bool:
    """Whether a word of a location names one type of a union, no field."""
    return (isinstance(word, str) and not word.isidentifier()) or word in ("str", "int")
