"""The mesh of the devices that are here, chosen as a plan chooses that of a slice.

Meshes are judged by shapes: nothing is compiled and no weight is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from w2s_jax.errors import InputError
from w2s_jax.exchange import agree, gather_values
from w2s_jax.ops.meshes import make_mesh, spec_of
from w2s_jax.plan.candidates import Candidate, Shapes, candidates
from w2s_jax.plan.topology import Chip, chip_of, chip_of_devices, device_count


def preset_mesh(shapes: Shapes, topology: str) -> str:
    """The spec of the mesh that `likeliest_mesh` takes of a topology; raises as it does."""
    return likeliest_mesh(shapes, chip_of(topology), device_count(topology), topology).mesh


def likeliest_mesh(shapes: Shapes, chip: Chip, devices: int, where: str) -> Candidate:
    """The mesh of so many devices that is likeliest to fit and be quick; the same for the same.

    Of the meshes (data, fsdp, tensor) that divide every array and the rows, those come first whose
    held bytes, with a guess of the temporaries, fit a device; among them the least time guessed
    from published rates counts: what is read for each token of a search, and what is multiplied and
    exchanged in a step of training. Where none holds little enough, the one that holds least, which
    says so in its `why`.

    The rules that go with it are those of the shapes: `search` for a search, `train` for a
    training, unless they hold others. Raises InputError, saying `where`, where no mesh divides the
    arrays.
    """
    judged = candidates(shapes, chip, devices)
    known = [one for one in judged if one.resident_bytes is not None]
    if not known:
        raise InputError(f"{where}: no mesh: {judged[0].why}")
    if known[0].why is None:
        return known[0]
    return min(known, key=lambda one: one.resident_bytes or 0)


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
