"""What XLA's GPU compiler is told of a GPU that is not here: its GpuTargetConfigProto, as text.

Figures are of NVIDIA's tuning guides (compute capability 8.0 and 9.0) and data sheets; rates and
memory are in `chips.py`.
"""

from dataclasses import dataclass

from w2s_jax.plan.chips import GPU_SHARE, Chip


@dataclass(frozen=True)
class _Gpu:
    """Multiprocessors and what each has: float32 units, shared memory in bytes, clock in GHz."""

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
"""Bytes of shared memory that a block of threads cannot have."""
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
    """The target of the compiler for a GPU of `CHIPS`."""
    gpu = _GPUS[chip.name]
    return _TARGET.format(
        gpu=gpu,
        memory=round(chip.memory / GPU_SHARE),
        bandwidth=int(chip.bandwidth),
        block=gpu.shared - _RESERVED,
    )
