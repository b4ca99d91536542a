"""Training: `sft` and `dpo` on typed settings, and what they are made of."""

from typing import TYPE_CHECKING, Any

from w2s_jax.train.config import DPOConfig, SFTConfig

if TYPE_CHECKING:
    from w2s_jax.train.fine_tuning import Trained, dpo, estimate_memory, sft

__all__ = ["DPOConfig", "SFTConfig", "Trained", "dpo", "estimate_memory", "sft"]


def __getattr__(name: str) -> Any:
    """What needs jax is imported when it is asked for, as the settings are also read without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from w2s_jax.train import fine_tuning

    return getattr(fine_tuning, name)
