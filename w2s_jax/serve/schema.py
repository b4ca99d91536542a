"""The bodies of requests, parsed strictly; which fields a server supports, and its refusals.

An error is a status and OpenAI's error body.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_OWN_FAULTS = 500


@dataclass(eq=False)
class ApiError(Exception):
    """A refused or failed request.

    Attributes:
        status: HTTP status.
        message: One line: what is wrong, and what would be right.
        param: The field at fault.
        code: A word for programs to compare.
        headers: Further headers of the response.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body, as in OpenAI's API."""
        fallback = "server_error" if self.status >= _OWN_FAULTS else "invalid_request_error"
        kind = _TYPES.get(self.status, fallback)
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": told}


unsupported = partial(ApiError, 400, code="unsupported_parameter")
"""400: the request is well-formed, but this server does not support it. (message, param)"""
malformed = partial(ApiError, 400, code="invalid_request")
"""400: the request does not have the form that the endpoint takes. (message, param)"""
too_large = partial(ApiError, 400, code="too_large")
"""400: the request exceeds a limit of this server. (message, param)"""
queue_full = partial(ApiError, 429, code="queue_full", headers={"Retry-After": "1"})
"""429: the queue of prompts is full. (message)"""
shutting_down = partial(
    ApiError, 503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"}
)
"""503: the server accepts no more requests. ()"""


# OpenAI's fields that this server does not support, and their values without effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"), ()
    ),
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), (0,)),
    **dict.fromkeys(("function_call", "tool_choice"), ("none",)),
    **dict.fromkeys(("functions", "tools"), ([],)),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
}
# Fields that change no answer: they identify the client or its purpose.
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
    """Fields of both endpoints; None takes the server's default.

    method, w, k, l, beta, top_k, row_id, position and lane are not OpenAI's: they choose the search
    and its draws. If row_id, position or lane is a list, it has an entry per prompt.
    return_token_ids adds prompt_token_ids and token_ids to the choices, as in vLLM.
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
    def _supported(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields with an effect; ApiError for an unsupported one."""
        kept = {}
        for name, value in fields.items():
            if value is None or name in _WITHOUT_EFFECT:
                continue
            if name not in _NEUTRAL:
                kept[name] = value
            elif value not in _NEUTRAL[name]:
                raise unsupported(f"{name} is not supported by this server; leave it out", name)
        return kept

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def counts_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class Completion(Generation):
    """Body of POST /v1/completions; `prompt` is text, token ids, or a list of either."""

    prompt: Any
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    best_of: Count | None = None


class Part(_Strict):
    """A part of a message's content."""

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

    As in vLLM, chat_template_kwargs are values that the chat templates may read.
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @field_validator("messages", mode="before")
    @classmethod
    def _plain_messages(cls, messages: Any) -> Any:
        """Messages without the empty fields that clients send back; ApiError if unsupported."""
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


Body = TypeVar("Body", Completion, Chat)


def read_body(raw: bytes, form: type[Body]) -> Body:
    """Parse the body of a request; ApiError 400 if it is malformed or unsupported."""
    try:
        fields = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise malformed(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise malformed(f"the body is a JSON {type(fields).__name__}; it must be an object")
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        raise _told(error) from None


def _told(error: ValidationError) -> Exception:
    """The first error in a body, as one line."""
    faults = error.errors(include_url=False, include_input=False)
    # Of a union, the error that is nested deepest says most.
    first = max(faults, key=lambda fault: len(fault["loc"]) if fault["loc"] else 0)
    first = faults[0] if faults[0]["type"] == "missing" else first
    words = [str(word) for word in first["loc"] if not _is_alternative(word)]
    where = ".".join(words)
    if first["type"] == "extra_forbidden":
        return unsupported(f"{where} is no field of this endpoint", where)
    return malformed(f"{where}: {first['msg']}", where or None)


def _is_alternative(word: int | str) -> bool:
    """Whether a part of a location names a type of a union, not a field."""
    return (isinstance(word, str) and not word.isidentifier()) or word in ("str", "int")
