"""What a client is told when a request is not answered: a status and OpenAI's error body."""

from collections.abc import Mapping
from typing import Any

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
