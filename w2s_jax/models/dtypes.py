"""The dtypes that parameters may be asked for in."""

from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.errors import InputError

STORED = "stored"


def quickest_dtype() -> str:
    """What weights are loaded as where nothing else is asked for: "stored", but on a CPU float32.

    CPUs compute slowly in the half-sized types that checkpoints hold.
    """
    return "float32" if jax.default_backend() == "cpu" else STORED


def parameter_dtype(dtype: Any, stored: Any) -> jnp.dtype:
    """The dtype that `load_model`'s argument names, for parameters stored as `stored`.

    Float64, where it is stored, is read as the widest that JAX computes in. Raises InputError as
    `floating_dtype` does.
    """
    dtype = quickest_dtype() if dtype is None else dtype
    if isinstance(dtype, str) and dtype == STORED:
        dtype = jax.dtypes.canonicalize_dtype(stored)
    return floating_dtype(dtype)


def floating_dtype(dtype: Any) -> jnp.dtype:
    """The dtype of this name. Raises InputError for none, and for what JAX does not compute in."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        raise InputError(f"dtype {dtype!r} is unknown; try float32 or bfloat16") from None
    if not jnp.issubdtype(found, jnp.floating):
        raise InputError(f"dtype {found} is not a floating-point type; try float32 or bfloat16")
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise InputError(
            f"dtype {found}: JAX computes in 32 bits at most unless jax_enable_x64 is set; "
            "try float32"
        )
    return found
