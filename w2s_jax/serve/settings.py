"""What a server does where a request says nothing, and the most that a request may ask for."""

import dataclasses
import math
from dataclasses import dataclass

from w2s_jax.errors import InputError
from w2s_jax.ops.sampling import Sampling


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
