"""Published chips, and the devices of a slice or a host that is not here, from the compiler.

Sources: the system architecture pages of Cloud TPU (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e,
tpu7x); for TPU links jax-ml.github.io/scaling-book; for usable memory the compiler's own refusals.
NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM, rates without sparsity, and its tuning
guides (compute capability 8.0 and 9.0) for XLA's description of a GPU.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

from w2s_jax.errors import InputError

Platform = Literal["tpu", "cuda"]


@dataclass(frozen=True)
class Chip:
    """A device as jax sees it: a chip, or one of several cores that a chip shows as devices.

    Attributes:
        name: Name of the family.
        memory: Bytes of HBM available to programs, slightly less than the chip has.
        operations: bfloat16 FLOP/s.
        bandwidth: HBM bandwidth, in bytes/s.
        link: Bandwidth of one link to a neighbour, one direction, in bytes/s; a device sends over
            two.
        host: Chips of a host in a slice of several hosts.
        network: Bandwidth between slices for each device, in bytes/s.
        slices: Shapes of slices, in chips, the smallest first.
        cores: Devices of a chip.
        platform: The platform that compiles for it.
        kinds: jax's names of its devices.
    """

    name: str
    memory: int | float
    operations: float
    bandwidth: float
    link: float
    host: int
    network: float
    slices: tuple[str, ...]
    cores: int = 1
    platform: Platform = "tpu"
    kinds: tuple[str, ...] = ()


_GIB = 2**30
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
)  # fmt: skip
_HOST = ("1", "2", "4", "8")
GPU_SHARE = 0.95
"""Share of a GPU's memory for jax, by XLA_PYTHON_CLIENT_MEM_FRACTION (0.75 by default)."""
LARGEST = 2**14
"""Upper bound of the chips in a slice, or in all slices that are planned together."""
# A device of tpu7x is half a chip. v4 is left out: the compiler makes two devices of a chip, but a
# machine has one, so that it would run other programs than those compiled here. NVLink reaches all
# GPUs of a host at once: half of its bandwidth counts as a link of a ring.
DEFAULT_FAMILY = "v5e"
# fmt: off
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 15.75 * _GIB, 197e12, 819e9, 45e9, 4, 3.125e9, _FLAT,
             kinds=("TPU v5 lite", "TPU v5e")),
        Chip("v5p", 95.74 * _GIB, 459e12, 2765e9, 90e9, 4, 6.25e9, _CUBES,
             kinds=("TPU v5", "TPU v5p")),
        Chip("v6e", 31.25 * _GIB, 918e12, 1638e9, 90e9, 4, 12.5e9, _FLAT,
             kinds=("TPU v6 lite", "TPU v6e")),
        Chip("tpu7x", 94.75 * _GIB, 1153.5e12, 3690e9, 45e9, 4, 6.25e9, _CUBES, cores=2,
             kinds=("TPU7x",)),
        Chip("a100", GPU_SHARE * 85100068864, 312e12, 2039e9, 300e9 / 2, 8, 25e9, _HOST,
             platform="cuda", kinds=("NVIDIA A100-SXM4-80GB",)),
        Chip("h100", GPU_SHARE * 84942979072, 989e12, 3352e9, 450e9 / 2, 8, 50e9, _HOST,
             platform="cuda", kinds=("NVIDIA H100 80GB HBM3",)),
        Chip("h200", GPU_SHARE * 151397597184, 989e12, 4800e9, 450e9 / 2, 8, 50e9, _HOST,
             platform="cuda", kinds=("NVIDIA H200",)),
    )
}
# fmt: on


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5e:4x4"; InputError for an unknown family."""
    family = topology.partition(":")[0]
    if family not in CHIPS:
        known = ", ".join(CHIPS)
        raise InputError(f"topology {topology!r}: no chip {family!r}; one of {known}, as v6e:4x4")
    return CHIPS[family]


def chip_of_devices(kind: str, platform: str, memory: int | None) -> Chip:
    """The chip of devices of this machine.

    Args:
        kind: jax's name of the devices, such as "TPU v5 lite" or "NVIDIA H200".
        platform: jax's platform.
        memory: Bytes for programs that a device reports; None if it does not. Counts if it is less
            than the chip's on a GPU, of which jax may use a share, and for unlisted devices, where
            None is no limit.

    Returns:
        The chip. An unlisted one has the rates of h100 (GPUs) or v5e (others), which order its
        meshes.
    """
    for chip in CHIPS.values():
        if kind in chip.kinds:
            told = memory if chip.platform == "cuda" and memory is not None else chip.memory
            return replace(chip, memory=min(told, chip.memory))
    alike = CHIPS["h100" if platform in ("gpu", "cuda") else DEFAULT_FAMILY]
    return replace(alike, name=kind, memory=math.inf if memory is None else memory)


def topologies(family: str) -> list[str]:
    """The slices of a family as topologies, the smallest first."""
    return [f"{family}:{shape}" for shape in chip_of(family).slices]


def check_topology(name: str) -> None:
    """Raise InputError unless it is FAMILY:SHAPE, such as v6e:4x4, v5p:4x4x4 or h100:8.

    GPUs must be on one host, since rates between hosts differ.
    """
    chip, (_, _, shape) = chip_of(name), name.partition(":")
    parts = shape.split("x")
    wanted = chip.slices[0].count("x") + 1
    wrong = len(parts) != wanted or not all(re.fullmatch(r"[1-9]\d*", part) for part in parts)
    if wrong or not (shape in chip.slices or _of_cubes(chip, parts)):
        known = ", ".join(chip.slices)
        more = ", further multiples of 4x4x4" if chip.slices == _CUBES else ""
        raise InputError(f"topology {name!r}: {chip.name} comes as {known}{more}, or auto")
    if math.prod(int(part) for part in parts) > LARGEST:
        raise InputError(f"topology {name!r}: no slice has more than {LARGEST:,} chips")


def _of_cubes(chip: Chip, parts: Sequence[str]) -> bool:
    """Whether a shape can be made of cubes of 4 × 4 × 4 chips by optical switches."""
    return chip.slices == _CUBES and all(int(part) % 4 == 0 for part in parts)


def device_count(topology: str) -> int:
    """Number of devices in a topology; raises as `check_topology` does."""
    check_topology(topology)
    shape = topology.partition(":")[2]
    return chip_of(topology).cores * math.prod(int(size) for size in shape.split("x"))


def family_of(topology: str) -> str | None:
    """The family of "v6e:auto" or "auto" (v5e), whose slices are to be tried; None for one slice.

    Raises:
        InputError: For an unknown family.
    """
    family, colon, shape = topology.partition(":")
    if (shape if colon else family) != "auto":
        return None
    return chip_of(family if colon else DEFAULT_FAMILY).name


@dataclass(frozen=True)
class _Gpu:
    """XLA's description of a GPU.

    Attributes:
        name: Its name.
        capability: Compute capability.
        processors: Number of multiprocessors.
        units: float32 units of each.
        shared: Shared memory of each, in bytes.
        cache: L2 cache, in bytes.
        clock: In GHz.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    units: int
    shared: int
    cache: int
    clock: float


_HOPPER = ((9, 0), 132, 128, 228 * 1024, 50 * 2**20, 1.98)
_GPUS = {
    "a100": _Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 * 1024, 40 * 2**20, 1.41),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", *_HOPPER),
    "h200": _Gpu("NVIDIA H200 141GB HBM3e", *_HOPPER),
}
_RESERVED = 1024
"""Bytes of shared memory that are not available to a block of threads."""
_TARGET = """gpu_device_info {{
  name: "{gpu.name}"
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
  core_count: {gpu.processors}
  fpus_per_core: {gpu.units}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  l2_cache_size: {gpu.cache}
  shared_memory_per_core: {gpu.shared}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {block}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.name}"
"""


def target_of(chip: Chip) -> str:
    """The compiler's target description for a GPU in `CHIPS`."""
    gpu = _GPUS[chip.name]
    return _TARGET.format(
        gpu=gpu,
        memory=round(chip.memory / GPU_SHARE),
        bandwidth=int(chip.bandwidth),
        block=gpu.shared - _RESERVED,
    )


# With these libtpu looks for no TPU of this machine, queries no metadata server, and can be loaded
# while another process uses it.
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
    """Raise InputError if the compiler for a topology's chips is not installed."""
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
    """Keep jax and libtpu from using a TPU or GPU of this machine, for the rest of the process.

    Must be called before jax is imported, which with libtpu queries a TPU's metadata server.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import jax

    jax.config.update("jax_platforms", "cpu")


def open_slice(name: str, slices: int = 1) -> Slice:
    """The devices of a topology such as "v6e:4x4" or "h100:8", or of several such slices.

    Calls `leave_accelerators`.

    Raises:
        InputError: For an unknown topology, several hosts with GPUs, and if the compiler is not
            installed.
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
    """The arguments of the compiler's topology description."""
    if chip.platform == "tpu":
        # By default a host has four chips.
        alone = {"chips_per_host_bounds": (1, 1, 1)} if device_count(name) == chip.cores else {}
        return {"topology_name": name, **alone, **({"num_slices": slices} if slices > 1 else {})}
    # slices x hosts of a slice x devices of a host
    shape = f"1x1x{device_count(name)}"
    return {"topology_name": name, "topology": shape, "target_config": target_of(chip)}


def _is_there(module: str) -> bool:
    # The parent package is looked for first: find_spec raises if it is missing.
    return all(find_spec(name) for name in dict.fromkeys((module.partition(".")[0], module)))
