"""Device meshes (data, fsdp, tensor) from a spec string, over one slice or several.

What lies where on a mesh is in `sharding.py`.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from w2s_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")
DCN_AXES = tuple(f"dcn_{axis}" for axis in MESH_AXES)
"""Parts of the same axes that go from slice to slice, over the data-center network."""

Shape = tuple[int, int, int]


def mesh_shape(spec: str, devices: int) -> Shape:
    """Sizes of (data, fsdp, tensor) from a spec such as "data=2,tensor=-1" for so many devices.

    An absent axis is 1; one axis may be -1 and takes what the others leave. dcn_data, dcn_fsdp and
    dcn_tensor multiply their axis. Raises InputError for a malformed spec and for sizes whose
    product is not the number of devices.
    """
    inner, across = _sizes(spec, devices)
    data, fsdp, tensor = (a * b for a, b in zip(inner, across, strict=True))
    return data, fsdp, tensor


def make_mesh(spec: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) of a spec string over the given devices (default: all).

    With dcn_* axes their product is the number of slices, each of which holds all of the other
    axes: what goes along `dcn_data` is the only traffic between slices. Devices that know no slice
    are cut into equal runs in their order, so that the same spec works where they are virtual.
    Raises InputError as `mesh_shape` does, and where there is another number of slices.
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(device_grid(spec, devices), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def device_grid(spec: str, devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of `make_mesh` as an array [data, fsdp, tensor]; raises as it does."""
    inner, across = _sizes(spec, len(devices))
    slices = _slices(spec, list(devices), math.prod(across))
    placed = np.empty((*across, *inner), object)
    for place, part in zip(np.ndindex(*across), slices, strict=True):
        placed[place] = _within(inner, part)
    # Axis by axis the slices' part is the major one: [d0, f0, t0, d1, f1, t1] → [d, f, t].
    order = [axis + part * len(MESH_AXES) for axis in range(len(MESH_AXES)) for part in (0, 1)]
    return placed.transpose(order).reshape([a * b for a, b in zip(across, inner, strict=True)])


def spec_of(shape: Sequence[int]) -> str:
    """The spec string of a mesh's sizes; axes of size 1 are left out."""
    parts = [f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True) if size > 1]
    return ",".join(parts) or f"{MESH_AXES[0]}=1"


def slice_count(spec: str) -> int:
    """How many slices a spec is for: the product of its dcn axes, of which none is -1."""
    parts = (part.partition("=") for part in spec.split(","))
    sizes = {axis.strip(): size.strip() for axis, _, size in parts}
    return math.prod(int(sizes[axis]) for axis in DCN_AXES if sizes.get(axis, "").isdecimal())


def mesh_shapes(devices: int) -> Iterator[Shape]:
    """All sizes of (data, fsdp, tensor) that multiply to so many devices."""
    for tensor in _divisors(devices):
        for fsdp in _divisors(devices // tensor):
            yield devices // tensor // fsdp, fsdp, tensor


def nearest_meshes(
    shape: Sequence[int], works: Callable[[Shape], bool], *, count: int = 3
) -> list[str]:
    """Specs of meshes of as many devices for which `works` holds, the likest to `shape` first."""

    def apart(other: Shape) -> tuple[float, Shape]:
        logs = sum(abs(math.log(a / b)) for a, b in zip(shape, other, strict=True))
        return round(logs, 9), other

    found = [other for other in mesh_shapes(math.prod(shape)) if works(other)]
    return [spec_of(other) for other in sorted(found, key=apart)[:count]]


def _sizes(spec: str, devices: int) -> tuple[Shape, Shape]:
    """Sizes of the axes inside a slice, and from slice to slice."""
    known = (*MESH_AXES, *DCN_AXES)
    sizes = dict.fromkeys(known, 1)
    named: set[str] = set()
    for part in filter(None, (part.strip() for part in spec.split(","))):
        axis, _, size = (piece.strip() for piece in part.partition("="))
        if axis not in known or axis in named:
            names = f"{', '.join(MESH_AXES)} (and {', '.join(DCN_AXES)} between slices)"
            problem = "is named twice" if axis in named else f"is not one of {names}"
            raise InputError(f"mesh {spec!r}: axis {axis!r} {problem}")
        if not size.removeprefix("-").isdecimal() or (int(size) < 1 and int(size) != -1):
            raise InputError(f"mesh {spec!r}: {axis} is {size!r}; it must be 1 or above, or -1")
        if axis in DCN_AXES and int(size) == -1:
            raise InputError(f"mesh {spec!r}: {axis} is -1; give it the number of slices")
        named.add(axis)
        sizes[axis] = int(size)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise InputError(f"mesh {spec!r}: {' and '.join(open_axes)} are -1; only one axis may be")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices % fixed or (not open_axes and fixed != devices):
        verb = "must divide" if open_axes else "must equal"
        raise InputError(
            f"mesh {spec!r}: the axes multiply to {fixed}, which {verb} the {devices} devices here"
        )
    if open_axes:
        sizes[open_axes[0]] = devices // fixed
    data, fsdp, tensor, *across = (sizes[axis] for axis in known)
    return (data, fsdp, tensor), (across[0], across[1], across[2])


def _slices(spec: str, devices: list[jax.Device], count: int) -> list[list[jax.Device]]:
    """The devices of each slice; equal runs of them where there are no slices."""
    told = [getattr(device, "slice_index", None) for device in devices]
    numbers = sorted({number for number in told if number is not None})
    real = None not in told and devices[0].platform == "tpu"
    if real and count != len(numbers):
        raise InputError(
            f"mesh {spec!r}: its dcn axes are for {count} slices, and the devices are of "
            f"{len(numbers)}; write dcn_data={len(numbers)}"
        )
    if real or (count > 1 and count == len(numbers)):
        return [[d for d, at in zip(devices, told, strict=True) if at == n] for n in numbers]
    each = len(devices) // count
    return [devices[start : start + each] for start in range(0, len(devices), each)]


def _within(shape: Shape, devices: list[jax.Device]) -> np.ndarray:
    """The devices of one slice, so that neighbours on an axis are neighbours in the machine."""
    from jax.experimental import mesh_utils

    # Split, an axis of the machine may serve two of the mesh: 4x4 chips as 2 × 8.
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
