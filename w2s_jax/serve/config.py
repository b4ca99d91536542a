"""A server's settings: where it listens, defaults of requests, and limits of what they may ask."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import UseAppendAction, arg

from w2s_jax.errors import InputError
from w2s_jax.search.settings import GuidanceConfig, TextScorersConfig

API_KEY = "W2S_API_KEY"
_LARGEST_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class ServeConfig(TextScorersConfig, GuidanceConfig):
    """A server's models and settings; those named in requests give what a request leaves out."""

    host: str = "127.0.0.1"
    """Address to listen at; others than loopback let other machines in."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    served_name: str | None = None
    """The model's name in requests; by default that of the policy's folder."""
    api_key_env: Annotated[str, arg(metavar="NAME")] = API_KEY
    """Environment variable with a key that clients must send; unset, none is asked for."""
    allowed_host: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="NAME")]] = ()
    """A name by which clients may call the server, beside localhost; again for another. On loopback
    other names are refused, on other addresses any is taken unless some are given here."""
    method: Literal["cbs", "bon", "eft", "ivg", "sample"] | None = None
    """Method where a request names none: cbs where anything scores, else sample."""
    beam_width: Annotated[int, arg(aliases=["--w"])] = 4
    """W, hypotheses kept (cbs, ivg)."""
    successors: Annotated[int, arg(aliases=["--k"])] = 4
    """K, successors of each hypothesis (cbs, ivg); N (bon)."""
    chunk_length: Annotated[int, arg(aliases=["--l"])] = 5
    """L, tokens in a chunk (cbs, ivg)."""
    beta: float = 1.0
    """Weight of tuned − untuned logits (eft, ivg)."""
    max_new_tokens: int = 50
    """Tokens in a response, where a request has no max_tokens."""
    temperature: float = 0.7
    """Sampling temperature; 0 is greedy."""
    top_k: int = 50
    """Sample from the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Sample from the likeliest tokens of this mass; 1 is off."""
    slots: int = 8
    """Prompts searched side by side."""
    queue: int = 256
    """Prompts that wait at most; further requests get 429."""
    most_rows: int = 64
    """The largest W·K, N or n that a request may ask for."""
    most_tokens: int = 2048
    """The largest max_tokens that a request may ask for."""
    most_prompts: int = 128
    """Prompts in one request at most."""
    grace: float = 20.0
    """Seconds that requests under way are given after SIGTERM."""
    warm_up: int = 64
    """Compile for prompts of so many tokens before /health says ready; 0 compiles nothing ahead."""

    @property
    def name(self) -> str:
        """The model's name in requests."""
        return self.served_name or Path(self.policy or "").expanduser().resolve().name

    @property
    def usual_method(self) -> str:
        """The method for requests that name none."""
        return self.method or ("cbs" if self.is_guided else "sample")

    @property
    def is_guided(self) -> bool:
        """Whether anything scores responses."""
        return bool(self.tuned or self.reward_model or self.scorer)

    @property
    def longest_response(self) -> int:
        """Maximum new tokens of a request, and at least the default."""
        return max(self.most_tokens, self.max_new_tokens)

    @property
    def prompts_at_once(self) -> int:
        """Maximum prompts of a request, all of which are accepted together."""
        return min(self.most_prompts, self.queue)

    def key(self) -> str | None:
        """The key that clients must send, None for none; InputError for one no header can carry."""
        key = os.environ.get(self.api_key_env)
        if key is None:
            if self.api_key_env != API_KEY:
                raise InputError(f"--api-key-env {self.api_key_env}: no such environment variable")
            return None
        if not key.strip() or not key.isascii() or not key.isprintable() or key != key.strip():
            raise InputError(
                f"the key in {self.api_key_env} must be printable ASCII without spaces around it"
            )
        return key

    def check(self) -> None:
        """Raise InputError for a value out of range, or that no request could ask for."""
        from w2s_jax.ops.logits import Sampling

        sizes = {
            "w": self.beam_width,
            "k": self.successors,
            "l": self.chunk_length,
            "max_tokens": self.max_new_tokens,
            "slots": self.slots,
            "queue": self.queue,
            "rows": self.most_rows,
            "prompts": self.most_prompts,
        }
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name} is {size}; it must be at least 1")
        if not 0 <= self.beta < math.inf:
            raise InputError(f"beta is {self.beta}; it must be 0 or above, and finite")
        Sampling(self.temperature, self.top_k, self.top_p)
        self.key()
        if self.policy is None:
            raise InputError("name what writes: --policy DIR")
        mixes = self.method in ("eft", "ivg")
        if self.method not in (None, "sample") and not (self.tuned if mixes else self.is_guided):
            raise InputError(f"--method {self.method} needs --tuned and --untuned")
        if not 0 <= self.port <= _LARGEST_PORT:
            raise InputError(f"--port is {self.port}; it must lie in 0 .. {_LARGEST_PORT}")
        for flag, value in (("--grace", self.grace), ("--warm-up", self.warm_up)):
            if not value >= 0:
                raise InputError(f"{flag} is {value}; it must be 0 or above")
