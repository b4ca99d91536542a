"""The mesh of the devices that are here, chosen as a plan chooses that of a slice.

What meshes are judged by is in `candidates.py`; nothing is compiled and no weight is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from w2s_jax.errors import InputError
from w2s_jax.exchange import agree, gather_values
from w2s_jax.ops.meshes import make_mesh, spec_of
from w2s_jax.plan.candidates import Shapes
from w2s_jax.plan.chips import chip_of_devices
from w2s_jax.plan.presets import likeliest_mesh

AUTO = "--mesh auto"


@dataclass(frozen=True)
class Chosen:
    """A mesh of the devices here, by its spec. why: where it cannot fit, what is too much."""

    spec: str
    count: int
    kind: str
    why: str | None = None

    @property
    def mesh(self) -> Mesh | None:
        """The mesh; None of one device, which needs none."""
        return make_mesh(self.spec) if self.count > 1 else None

    @property
    def name(self) -> str:
        """The mesh and the devices in words."""
        return _name(self.spec, self.count, self.kind)

    @property
    def told(self) -> str:
        """The choice in a line."""
        line = f"{AUTO}: {self.name}"
        return line if self.why is None else f"{line}; no mesh fits: it {self.why}"


def name_of(mesh: Mesh | None) -> str:
    """The name of a mesh as `Chosen` has it, one device where there is none."""
    if mesh is None:
        return _name(spec_of((1, 1, 1)), 1, jax.devices()[0].device_kind)
    return _name(spec_of(mesh.devices.shape), mesh.size, mesh.devices.flat[0].device_kind)


def _name(spec: str, count: int, kind: str) -> str:
    return f"{spec}, for {'one device' if count == 1 else f'{count} devices'} ({kind})"


def choose_mesh(shapes: Shapes) -> Chosen:
    """The mesh that `likeliest_mesh` takes of this run's devices; the same on all of its hosts.

    Every host calls it. Chips that are not listed count as `chip_of_devices` says. Raises
    InputError for devices of several slices, where no mesh divides the arrays, and where hosts
    would choose differently.
    """
    devices = jax.devices()
    _check_slices(devices)
    kind, count = devices[0].device_kind, len(devices)
    chip = chip_of_devices(kind, devices[0].platform, _memory())
    found = likeliest_mesh(shapes, chip, count, f"{AUTO}, {count} devices")
    agree("mesh", {AUTO: found.mesh})
    return Chosen(found.mesh, count, kind, found.why)


def _memory() -> int | None:
    """Bytes that every device of the run lets programs have; None where one does not say."""
    told = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    own = min((int(size) for size in told if size is not None), default=None)
    sizes = gather_values(own)
    return None if None in sizes else min(sizes)


def _check_slices(devices: Sequence[jax.Device]) -> None:
    slices = {getattr(device, "slice_index", None) for device in devices}
    # Virtual devices may lie on several machines, which are no slices.
    if devices[0].platform != "cpu" and len(slices) > 1:
        raise InputError(
            f"{AUTO} chooses for one slice, and the devices are of {len(slices)} slices; name the "
            f"mesh, such as dcn_data={len(slices)},fsdp=-1"
        )
