"""Where the arrays of a training step lie: batches over the mesh's data axes, each host its share.

Parameters are placed by their rules in models/; nothing here knows a model.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from w2s_jax.errors import InputError
from w2s_jax.ops.sharding import DEFAULT_RULES
from w2s_jax.train.step import Batch


def batch_parts(mesh: Mesh | None) -> int:
    """Into how many parts the mesh cuts the rows of a batch."""
    if mesh is None:
        return 1
    return math.prod(mesh.shape[axis] for axis in DEFAULT_RULES.mesh_axes("batch"))


def place(batch: Batch, mesh: Mesh | None) -> Batch:
    """This host's rows of a batch as device arrays of the whole batch, cut along their first axis.

    Without a mesh the arrays go as they are.
    """
    if mesh is None:
        return batch
    sharding = NamedSharding(mesh, PartitionSpec(DEFAULT_RULES.mesh_axes("batch")))

    def put(array: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, np.asarray(array))

    return {name: put(array) for name, array in batch.items()}


def check_batch(rows: int, accumulate: int, mesh: Mesh | None, *, flag: str) -> None:
    """Raises InputError where `rows` cannot be cut into micro-batches for all parts of the mesh."""
    parts = batch_parts(mesh)
    if accumulate < 1 or rows < 1 or rows % (accumulate * parts):
        over = f" × {parts} parts of the mesh" if parts > 1 else ""
        needed = max(1, accumulate) * parts
        nearest = max(needed, round(rows / needed) * needed)
        raise InputError(
            f"{flag} {rows} is not divisible by {accumulate} micro-batches{over}; try {nearest}"
        )
