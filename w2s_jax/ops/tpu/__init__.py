"""Kernels that only TPUs take, and which programs have them.

None has run on a chip yet: they have run interpreted, and compile for v5e, v5p and v6e.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.errors import InputError
from w2s_jax.ops.sharding import Placement

SWITCH = "W2S_TPU_KERNELS"
"""The environment variable that says "on", the default, or "off"."""
TWO_CORES = ("TPU v5", "TPU v5p")
"""Kinds of devices whose cores share no vector memory."""
ONE_CORE = ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e")


def switched_on() -> bool:
    """Whether a program that is being traced may have the kernels of this folder.

    `W2S_TPU_KERNELS=off` leaves them out, and attention is of scores as on other devices. The
    variable is read while a program is traced, which is when the devices are asked for too; a
    program that is compiled already stays as it is. All hosts of a run need the same value, or they
    would compile different programs.

    Raises:
        InputError: For another value.
    """
    value = os.environ.get(SWITCH, "on")
    if value not in ("on", "off"):
        raise InputError(f"{SWITCH} is {value!r}; it must be on or off")
    return value == "on"


def has_kernel(dtype: Any, placement: Placement, in_blocks: bool = False) -> bool:
    """Whether token steps and chunks, so placed, are read on chips that need `parts_kernel`.

    Chips of one core need it for keys of several heads that they would read block by block. Without
    a mesh only where there is one device: arrays that lie on several all the same could not be
    read, since no compiler splits a kernel.

    Args:
        dtype: Of the queries.
        placement: Where the cache lies.
        in_blocks: Whether a compiler would read the keys, of several heads, block by block.
    """
    devices = jax.devices() if placement.mesh is None else placement.mesh.devices.flat
    if placement.mesh is None and len(devices) > 1:
        return False
    kinds = (*TWO_CORES, *ONE_CORE) if in_blocks else TWO_CORES
    needed = devices[0].device_kind in kinds and dtype == jnp.bfloat16
    return needed and switched_on()
