"""Devices of a slice that is not here: the TPU compiler's own description of it."""

import os
from dataclasses import dataclass
from typing import Any

from w2s_jax.errors import InputError
from w2s_jax.plan.chips import Chip, check_topology, chip_of

# So that libtpu looks for no TPU of this machine, asks no metadata server, and may be loaded beside
# another process that uses it.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclass(frozen=True)
class Slice:
    """A slice, or several: its name, its chip, and devices to compile for."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    slices: int = 1


def check_compiler() -> None:
    """Raise InputError where libtpu, the compiler, is not installed."""
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "libtpu, the TPU compiler, is not installed here; it runs on any x86-64 Linux machine: "
            "pip install 'w2s-jax[tpu]'"
        )


def open_slice(name: str, slices: int = 1) -> Slice:
    """The devices of a topology such as "v6e:4x4", or of several such slices.

    To be called before jax has looked for devices: it is told to leave accelerators alone. Raises
    InputError for a topology that there is not, and where libtpu, the compiler, is not installed.
    """
    import jax

    check_topology(name)
    check_compiler()
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **({"num_slices": slices} if slices > 1 else {})
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise InputError(f"topology {name!r}: the TPU compiler refuses it: {reason}") from None
    return Slice(name, chip_of(name), tuple(found.devices), slices)
