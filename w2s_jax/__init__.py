"""Weak-to-strong alignment in JAX: small tuned models steer large frozen ones.

Public names load on first use, so that `import w2s_jax` stays cheap and touches no device.
"""

import importlib
from typing import TYPE_CHECKING, Any

from w2s_jax.errors import InputError

if TYPE_CHECKING:
    from w2s_jax.models.config import ModelConfig
    from w2s_jax.models.load import load_model
    from w2s_jax.models.model import Model
    from w2s_jax.models.save import save_model
    from w2s_jax.search import Guide, SearchConfig
    from w2s_jax.text.tokenizer import load_tokenizer

__version__ = "0.1.0"

__all__ = [
    "Guide",
    "InputError",
    "Model",
    "ModelConfig",
    "SearchConfig",
    "__version__",
    "load_model",
    "load_tokenizer",
    "save_model",
]

_HOMES = {
    "Guide": "w2s_jax.search",
    "Model": "w2s_jax.models.model",
    "ModelConfig": "w2s_jax.models.config",
    "SearchConfig": "w2s_jax.search",
    "load_model": "w2s_jax.models.load",
    "load_tokenizer": "w2s_jax.text.tokenizer",
    "save_model": "w2s_jax.models.save",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
