"""Where the arrays of a training step lie: batches over the mesh's data axes, each host its share.

Parameters are placed by their rules in models/; nothing here knows a model.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from w2s_jax.errors import InputError
from w2s_jax.ops.sharding import DEFAULT_RULES, Placement
from w2s_jax.train.step import Batch, TrainState


def batch_parts(mesh: Mesh | None) -> int:
    """Into how many parts the mesh cuts the rows of a batch."""
    return Placement(mesh).parts("batch", 0)


def host_rows(mesh: Mesh | None, rows: int) -> slice:
    """The rows of a batch that this host's devices hold, and what lies between them.

    `rows` must be divisible by the parts of the mesh. Hosts that share a part read the same rows.
    """
    if mesh is None:
        return slice(0, rows)
    sharding = NamedSharding(mesh, PartitionSpec(DEFAULT_RULES.mesh_axes("batch")))
    places = sharding.addressable_devices_indices_map((rows,)).values()
    held = [range(rows)[place[0]] for place in places if place is not None]
    return slice(min(own.start for own in held), max(own.stop for own in held))


def place(batch: Batch, mesh: Mesh | None, rows: int | None = None) -> Batch:
    """A batch as device arrays, cut along their first axis; without a mesh as it is.

    With `rows`, those of the whole batch, it holds this host's alone: `host_rows` of them.
    """
    if mesh is None:
        return batch
    sharding = NamedSharding(mesh, PartitionSpec(DEFAULT_RULES.mesh_axes("batch")))

    def put(array: np.ndarray) -> jax.Array:
        count = len(array) if rows is None else rows
        first = 0 if rows is None else host_rows(mesh, rows).start

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            own, *others = index or (slice(None),)
            start, stop, _ = own.indices(count)
            return array[(slice(start - first, stop - first), *others)]

        return jax.make_array_from_callback((count, *array.shape[1:]), sharding, shard)

    return {name: put(np.asarray(array)) for name, array in batch.items()}


def place_whole(batch: Batch, mesh: Mesh | None) -> Batch:
    """A batch as device arrays, all of it on every device; every host gives the same."""
    if mesh is None:
        return batch
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, everywhere, lambda index: array[index])

    return {name: put(np.asarray(array)) for name, array in batch.items()}


def place_state(state: TrainState, mesh: Mesh | None) -> TrainState:
    """The state with what lies on one device (counts, the key) on all of the mesh's.

    What a checkpoint restores lies where it lay before; a step takes no arrays of both kinds.
    """
    if mesh is None:
        return state
    leaves, structure = jax.tree.flatten(state)
    alone = [i for i, leaf in enumerate(leaves) if not isinstance(leaf.sharding, NamedSharding)]
    everywhere = NamedSharding(mesh, PartitionSpec())
    placed = jax.jit(lambda arrays: arrays, out_shardings=everywhere)([leaves[i] for i in alone])
    for i, leaf in zip(alone, placed, strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


def check_batch(rows: int, accumulate: int, mesh: Mesh | None, *, flag: str) -> None:
    """Raises InputError where `rows` cannot be cut into micro-batches for all parts of the mesh."""
    parts = batch_parts(mesh)
    if accumulate < 1 or rows < 1 or rows % (accumulate * parts):
        cuts = [f"{accumulate} micro-batches"] if accumulate != 1 or parts == 1 else []
        over = " × ".join([*cuts, *([f"{parts} parts of the mesh"] if parts > 1 else [])])
        needed = max(1, accumulate) * parts
        nearest = max(needed, round(rows / needed) * needed)
        raise InputError(f"{flag} {rows} is not divisible by {over}; try {nearest}")
