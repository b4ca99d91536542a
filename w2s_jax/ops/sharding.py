"""Device meshes (data, fsdp, tensor) from a spec string, and rules from logical axes to shardings.

A mesh lies over one slice or several.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from w2s_jax.errors import InputError, Undivided, check_kind

MESH_AXES = ("data", "fsdp", "tensor")
DCN_AXES = tuple(f"dcn_{axis}" for axis in MESH_AXES)
"""Parts of the same axes that go from slice to slice, over the data-center network."""

Shape = tuple[int, int, int]


def mesh_shape(spec: str, devices: int) -> Shape:
    """Sizes of (data, fsdp, tensor) from a spec such as "data=2,tensor=-1" for so many devices.

    An absent axis is 1; one axis may be -1 and takes what the others leave. dcn_data, dcn_fsdp and
    dcn_tensor multiply their axis.

    Raises:
        InputError: For a malformed spec and for sizes whose product is not the number of devices.
    """
    inner, across = _sizes(spec, devices)
    data, fsdp, tensor = (a * b for a, b in zip(inner, across, strict=True))
    return data, fsdp, tensor


def make_mesh(spec: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) of a spec string over the given devices (default: all).

    With dcn_* axes their product is the number of slices, each of which holds all of the other
    axes: what goes along `dcn_data` is the only traffic between slices. Devices that know no slice
    are cut into equal runs in their order, so that the same spec works where they are virtual.

    Raises:
        InputError: As `mesh_shape` does, and where there is another number of slices.
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


Axes = tuple[str | None, ...]
Leaf = tuple[str, Axes, tuple[int, ...]]
"""An array's name, the logical axes of its dimensions, and its shape."""


@dataclass(frozen=True)
class Rules:
    """For each logical axis, the mesh axes that split it, major first; () leaves it whole.

    shared: axes that stay whole too where a mesh has more parts than they have, such as key/value
    heads, of which every device then holds all; the queries that read them are split as ever.
    """

    table: tuple[tuple[str, tuple[str, ...]], ...]
    shared: tuple[str, ...] = ("kv_heads",)

    def mesh_axes(self, axis: str) -> tuple[str, ...]:
        """The mesh axes that split a logical axis; InputError for a name the rules do not hold."""
        for name, mesh_axes in self.table:
            if name == axis:
                return mesh_axes
        known = ", ".join(name for name, _ in self.table)
        raise InputError(f"unknown logical axis {axis!r}; the rules know {known}")

    def replace(self, **changes: str | tuple[str, ...] | None) -> "Rules":
        """The same rules but for the named logical axes: `rules.replace(kv_heads=None)`."""
        rules = dict(self.table)
        for axis, target in changes.items():
            rules[axis] = (target,) if isinstance(target, str) else target or ()
        return Rules(tuple(rules.items()), self.shared)

    def targets(self, axis: str, size: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """The mesh axes that split an axis of this size on a mesh of these sizes.

        Raises:
            InputError: As `mesh_axes` does.
        """
        found = self.mesh_axes(axis)
        parts = math.prod(sizes.get(target, 1) for target in found)
        return () if axis in self.shared and size < parts and not parts % size else found


# Weights are split over fsdp by their width and over tensor by what is parallel inside a layer.
# What belongs to a prompt follows the prompt: only slots (and rows of a training batch) are split.
DEFAULT_RULES = Rules(()).replace(
    vocab="tensor",
    embed="fsdp",
    layers=None,
    heads="tensor",
    kv_heads="tensor",
    head_width=None,
    mlp="tensor",
    experts="tensor",
    expert_width=None,
    positions=None,
    slots=("data", "fsdp"),
    members=None,
    objectives=None,
    hypotheses=None,
    rows=None,
    prefix=None,
    committed=None,
    chunk=None,
    batch=("data", "fsdp"),
    sequence=None,
)

# A token step reads every weight once: gathering those split over fsdp would cost more than all
# else. So fsdp takes part in what is parallel inside a layer, and widths stay whole.
SEARCH_RULES = DEFAULT_RULES.replace(
    embed=None, **dict.fromkeys(("mlp", "experts", "vocab"), ("fsdp", "tensor"))
)
# A small model beside a large one may be whole on every device: nothing is exchanged for it.
REPLICATED_RULES = SEARCH_RULES.replace(
    mlp=None, experts=None, vocab=None, heads=None, kv_heads=None
)
PRESETS = {"train": DEFAULT_RULES, "search": SEARCH_RULES, "replicated": REPLICATED_RULES}


def check_placing(mesh: Any, rules: Any) -> None:
    """Raise InputError for what is no mesh and not None, and for what is no Rules."""
    meshes = Mesh | AbstractMesh | None
    check_kind("mesh", mesh, meshes, "a jax.sharding.Mesh, as ops.sharding.make_mesh gives")
    check_kind("rules", rules, Rules, "what ops.sharding.parse_rules gives")


def parse_rules(text: str) -> Rules:
    """Rules from a preset's name and changes to it: "search", "train,mlp=fsdp+tensor,kv_heads=".

    Raises:
        InputError: For unknown presets, logical axes and mesh axes.
    """
    name, *changes = (part.strip() for part in text.split(","))
    if name not in PRESETS:
        raise InputError(f"rules {text!r}: no preset {name!r}; one of {', '.join(PRESETS)}")
    rules = PRESETS[name]
    for change in changes:
        axis, equals, targets = (part.strip() for part in change.partition("="))
        split = tuple(part.strip() for part in targets.split("+")) if targets else ()
        wrong = [target for target in split if target not in MESH_AXES]
        if not equals or wrong or len(set(split)) < len(split):
            raise InputError(
                f"rules {text!r}: {change!r} must be AXIS=MESH_AXIS, of {', '.join(MESH_AXES)} "
                "(several with +, each once; none for an axis that stays whole)"
            )
        try:
            rules.mesh_axes(axis)
        except InputError as error:
            raise InputError(f"rules {text!r}: {error}") from None
        rules = rules.replace(**{axis: split})
    return rules


def resolve(
    axes: Axes,
    rules: Rules,
    mesh: Mesh | AbstractMesh,
    shape: tuple[int, ...],
    *,
    name: str = "array",
) -> NamedSharding:
    """The sharding of an array whose dimensions carry these logical axes (None: never split).

    Raises:
        InputError: Saying `name`, for an unknown logical or mesh axis, for one mesh axis used twice
            (of size 1 too, so that small meshes catch it), and for a dimension that the mesh does
            not divide, with the nearest meshes that do.
    """
    found = NamedSharding(mesh, _spec(axes, rules, mesh, shape, name))
    _check_divided([(name, axes, shape)], rules, mesh)
    return found


def resolve_tree(axes: Any, shapes: Any, rules: Rules, mesh: Mesh | AbstractMesh) -> Any:
    """`resolve` over a tree: `axes` holds tuples of logical axes where `shapes` holds arrays.

    `shapes` may hold arrays or `jax.ShapeDtypeStruct`s. Errors name the leaf, as in
    "layers_0/attention/key/kernel", and meshes that divide every leaf.
    """
    leaves: list[Leaf] = []

    def note(path: tuple[Any, ...], array: Any, logical: Axes) -> NamedSharding:
        leaves.append((_name(path), logical, tuple(array.shape)))
        return NamedSharding(mesh, _spec(logical, rules, mesh, leaves[-1][2], leaves[-1][0]))

    found = jax.tree_util.tree_map_with_path(note, shapes, axes)
    _check_divided(leaves, rules, mesh)
    return found


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "array"


def _spec(
    axes: Axes, rules: Rules, mesh: Mesh | AbstractMesh, shape: tuple[int, ...], name: str
) -> PartitionSpec:
    if len(axes) != len(shape):
        raise InputError(f"{name}: {len(axes)} logical axes {axes} for an array of shape {shape}")
    used: dict[str, str] = {}
    entries: list[str | tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        try:
            targets = () if axis is None else rules.targets(axis, size, mesh.shape)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        for target in targets:
            if target not in mesh.shape:
                known = ", ".join(mesh.axis_names)
                raise InputError(
                    f"{name}: {axis} goes to mesh axis {target!r}; the mesh has {known}"
                )
            if target in used:
                raise InputError(
                    f"{name}: {used[target]} and {axis} both go to mesh axis {target!r}"
                )
            used[target] = str(axis)
        entries.append(targets[0] if len(targets) == 1 else targets or None)
    return PartitionSpec(*entries)


def _uneven(
    axes: Axes, rules: Rules, sizes: Mapping[str, int], shape: tuple[int, ...]
) -> tuple[str, int] | None:
    """The first logical axis that a mesh of these sizes does not divide, and its size."""
    for axis, size in zip(axes, shape, strict=True):
        targets = () if axis is None else rules.targets(axis, size, sizes)
        if size % math.prod(sizes[target] for target in targets):
            return str(axis), size
    return None


def _check_divided(leaves: list[Leaf], rules: Rules, mesh: Mesh | AbstractMesh) -> None:
    """Raise InputError for the first leaf that the mesh does not divide, with meshes that would."""
    for name, logical, shape in leaves:
        uneven = _uneven(logical, rules, mesh.shape, shape)
        if uneven is not None:
            raise _undivided(leaves, rules, mesh, name, *uneven)


def _undivided(
    leaves: list[Leaf], rules: Rules, mesh: Mesh | AbstractMesh, name: str, axis: str, size: int
) -> Undivided:
    """What to say of a leaf, one of whose axes the mesh does not divide."""
    split = " × ".join(f"{target} {mesh.shape[target]}" for target in rules.mesh_axes(axis))
    told = f"{name}: {axis} of size {size} is not divisible by mesh {split}"
    near = []
    if tuple(mesh.axis_names) == MESH_AXES:
        kinds = {(logical, shape) for _, logical, shape in leaves}

        def works(other: tuple[int, int, int]) -> bool:
            sizes = dict(zip(MESH_AXES, other, strict=True))
            return all(_uneven(logical, rules, sizes, shape) is None for logical, shape in kinds)

        near = nearest_meshes([mesh.shape[one] for one in MESH_AXES], works)
    return Undivided(told, near, f"leave {axis} whole ({axis}= in the rules)")


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of `jax.ShapeDtypeStruct`s that lie as another tree says; allocates nothing."""
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        shapes,
        shardings,
    )


@dataclass(frozen=True)
class Placement:
    """Where a model's arrays lie: on a mesh, by these rules, or on one device."""

    mesh: Mesh | None = None
    rules: Rules = DEFAULT_RULES

    def mesh_axes(self, axis: str, size: int) -> tuple[str, ...]:
        """The mesh axes that split a logical axis of this size."""
        return () if self.mesh is None else self.rules.targets(axis, size, self.mesh.shape)

    def parts(self, axis: str, size: int) -> int:
        """Into how many parts a logical axis of this size is split."""
        sizes = {} if self.mesh is None else self.mesh.shape
        return math.prod(sizes[target] for target in self.mesh_axes(axis, size))

    def constrain(self, tree: Any, axes: Any) -> Any:
        """Inside jit, every array of a tree held to the sharding of its logical axes.

        Without a mesh the tree as it is.

        Raises:
            InputError: As `resolve_tree` does.
        """
        if self.mesh is None:
            return tree
        shardings = resolve_tree(axes, tree, self.rules, self.mesh)
        return jax.lax.with_sharding_constraint(tree, shardings)

    def gather_axis(self, weight: Array, axes: Axes, axis: str) -> Array:
        """Inside jit, a weight gathered along one logical axis; its gradient is spread again.

        As it is where nothing splits that axis. Left to the compiler, each matmul might exchange
        states instead, or gather the weight once more for every use.
        """
        if self.mesh is None or not self.rules.mesh_axes(axis):
            return weight
        return _gather(self, axes, tuple(None if one == axis else one for one in axes), weight)

    def spread(self, rows: Array) -> Array:
        """Inside jit, rows of a batch split as the rules split a batch, and whole otherwise.

        As they are where the mesh does not divide them, and without a mesh.
        """
        if rows.shape[0] % self.parts("batch", rows.shape[0]):
            return rows
        return self.constrain(rows, ("batch",) + (None,) * (rows.ndim - 1))

    def spread_lookup(self, rows: Array, axis: str) -> Array:
        """`spread` of rows that were looked up in a table whose last axis is this logical one.

        They are looked up where the table's parts lie and then exchanged, not the table.
        """
        if self.mesh is None or rows.shape[0] % self.parts("batch", rows.shape[0]):
            return rows
        split = self.mesh_axes(axis, rows.shape[-1])
        left = tuple(one for one in self.rules.mesh_axes("batch") if one not in split)
        spec = PartitionSpec(left, *(None,) * (rows.ndim - 2), split)
        rows = jax.lax.with_sharding_constraint(rows, NamedSharding(self.mesh, spec))
        return self.spread(rows)


ON_ONE_DEVICE = Placement()


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather(place: Placement, own: Axes, gathered: Axes, weight: Array) -> Array:
    return place.constrain(weight, gathered)


def _gather_forward(
    place: Placement, own: Axes, gathered: Axes, weight: Array
) -> tuple[Array, None]:
    return place.constrain(weight, gathered), None


def _gather_backward(
    place: Placement, own: Axes, gathered: Axes, _: None, slope: Array
) -> tuple[Array]:
    # Never held gathered: partial sums go straight to their parts, in half the bytes.
    return (place.constrain(slope, own),)


_gather.defvjp(_gather_forward, _gather_backward)
