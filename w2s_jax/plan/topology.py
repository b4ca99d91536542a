"""Devices of a slice or a host that is not here: the compiler's own description of it."""

import os
from dataclasses import dataclass
from typing import Any

from w2s_jax.errors import InputError
from w2s_jax.plan.chips import LARGEST, Chip, check_topology, chip_of, device_count
from w2s_jax.plan.gpus import target_of

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


def check_compiler(topology: str) -> None:
    """Raise InputError where the compiler of a topology's chips is not installed."""
    if chip_of(topology).platform == "cuda":
        if not _is_there("jax_plugins.xla_cuda12") and not _is_there("jax_plugins.xla_cuda13"):
            raise InputError(
                "the CUDA plugin of jax, the GPU compiler, is not installed here; it compiles "
                "without a GPU: pip install 'w2s-jax[cuda]'"
            )
    elif not _is_there("libtpu"):
        raise InputError(
            "libtpu, the TPU compiler, is not installed here; it runs on any x86-64 Linux machine: "
            "pip install 'w2s-jax[tpu]'"
        )


def leave_accelerators() -> None:
    """Let jax and libtpu take no TPU or GPU of this machine, for the rest of the process.

    To be called before jax is imported, which asks the metadata server of a TPU where libtpu is.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import jax

    jax.config.update("jax_platforms", "cpu")


def open_slice(name: str, slices: int = 1) -> Slice:
    """The devices of a topology such as "v6e:4x4" or "h100:8", or of several such slices.

    Calls `leave_accelerators`. Raises InputError for a topology that there is not, for several
    hosts with GPUs, and where the compiler is not installed.
    """
    check_topology(name)
    check_compiler(name)
    chip = chip_of(name)
    if slices * device_count(name) > LARGEST * chip.cores:
        raise InputError(f"topology {name!r}: {slices:,} slices have more than {LARGEST:,} chips")
    if chip.platform == "cuda" and slices > 1:
        raise InputError(f"topology {name!r}: GPUs are planned on one host; leave dcn axes out")
    leave_accelerators()
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform=chip.platform, **_options(name, chip, slices))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise InputError(f"topology {name!r}: the compiler refuses it: {reason}") from None
    return Slice(name, chip, tuple(found.devices), slices)


def _options(name: str, chip: Chip, slices: int) -> dict[str, Any]:
    """What the compiler is asked for."""
    if chip.platform == "tpu":
        # The default is a host of four chips.
        alone = {"chips_per_host_bounds": (1, 1, 1)} if device_count(name) == chip.cores else {}
        return {"topology_name": name, **alone, **({"num_slices": slices} if slices > 1 else {})}
    # Slices, hosts of a slice, devices of a host.
    shape = f"1x1x{device_count(name)}"
    return {"topology_name": name, "topology": shape, "target_config": target_of(chip)}


def _is_there(module: str) -> bool:
    import importlib.util

    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
