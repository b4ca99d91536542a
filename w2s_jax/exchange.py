"""Values between the hosts of a run: arrays that all can read, agreement, bytes of every host.

Every function is called by all hosts together, in the same order; on one host each is immediate.
"""

import hashlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from w2s_jax.errors import InputError
from w2s_jax.hosts import is_first, own_number, started

BLOCK = 8 * 2**20
"""Bytes that a host gives in one exchange."""


def to_host(tree: Any) -> Any:
    """The arrays of a tree as NumPy arrays, whatever devices of whichever hosts hold their parts.

    Parts that lie on other hosts are gathered, by one program for all arrays of the tree.
    """
    leaves, structure = jax.tree.flatten(tree)
    apart = [i for i, leaf in enumerate(leaves) if _is_apart(leaf)]
    if apart:
        mesh = leaves[apart[0]].sharding.mesh
        gathered = _replicated([leaves[i] for i in apart], mesh)
        for i, leaf in zip(apart, gathered, strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(structure, [np.asarray(leaf) for leaf in leaves])


def _is_apart(leaf: Any) -> bool:
    return (
        isinstance(leaf, jax.Array)
        and not leaf.is_fully_addressable
        and not leaf.is_fully_replicated
    )


def _replicated(arrays: list[jax.Array], mesh: Mesh) -> list[jax.Array]:
    return jax.jit(_same, out_shardings=NamedSharding(mesh, PartitionSpec()))(arrays)


def _same(arrays: list[jax.Array]) -> list[jax.Array]:
    """At the top level, so that it is compiled once for each shape."""
    return arrays


def everywhere(array: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """A host's array, the same on all hosts, on every device of a mesh."""
    if mesh is None:
        return jax.device_put(array)
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def gather_bytes(payload: bytes) -> list[bytes]:
    """What every host gives, in the order of the hosts.

    Raises InputError, on every host, where they have different numbers of devices.
    """
    if not started():
        return [payload]
    _check_devices()
    from jax.experimental.multihost_utils import process_allgather

    sizes = process_allgather(np.int64(len(payload))).tolist()
    parts: list[list[bytes]] = [[] for _ in sizes]
    width = min(BLOCK, _rounded(max(sizes)))
    for start in range(0, max(sizes), width):
        block = np.frombuffer(payload[start : start + width], np.uint8)
        padded = np.zeros(width, np.uint8)
        padded[: len(block)] = block
        for host, row in enumerate(process_allgather(padded)):
            parts[host].append(row[: max(0, sizes[host] - start)].tobytes())
    return [b"".join(own) for own in parts]


def _check_devices() -> None:
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        told = ", ".join(f"host {host} has {count}" for host, count in sorted(counts.items()))
        raise InputError(f"hosts must have as many devices as one another, and {told}")


def _rounded(size: int) -> int:
    """A power of two, so that few programs are compiled."""
    return 1 << max(8, (size - 1).bit_length())


def gather_values(value: Any) -> list[Any]:
    """The JSON value of every host."""
    return [json.loads(own) for own in gather_bytes(json.dumps(value).encode())]


def agree(what: str, value: dict[str, Any]) -> None:
    """Raise InputError, on every host, unless all have the same JSON values; says which differ."""
    if not started():
        return
    # Hosts that were told of different numbers of hosts start together all the same.
    value = {"number of hosts": own_number()[1]} | value
    digests = {
        name: hashlib.sha256(json.dumps(one, sort_keys=True, default=str).encode()).hexdigest()
        for name, one in value.items()
    }
    first, *others = gather_values(digests)
    for host, other in enumerate(others, start=1):
        names = sorted(n for n in {*first, *other} if first.get(n) != other.get(n))
        if names:
            raise InputError(
                f"host {host} has another {what} than host 0 ({', '.join(names)}); start the same "
                "command on all hosts, on the same files"
            )


def from_first(compute: Callable[[], np.ndarray], like: np.ndarray) -> np.ndarray:
    """What the first host computes, in the shape and dtype of `like`; others compute nothing."""
    if not started():
        return compute()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    own = np.asarray(compute(), like.dtype) if is_first() else like
    return broadcast_one_to_all(own)


def check_shared(folder: Path, *, seconds: float | int = 10) -> None:
    """Raise InputError, on every host, unless all see what the first writes into a folder.

    File systems over a network may show it late; `seconds` are waited for. Makes the folder.
    """
    if not started():
        return
    folder.mkdir(parents=True, exist_ok=True)
    mark = gather_values(uuid.uuid4().hex)[0]
    path = folder / f".hosts-{mark}"
    if is_first():
        path.touch()
    gather_values(None)
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = gather_values(path.exists())
    if is_first():
        path.unlink(missing_ok=True)
    if not all(seen):
        raise InputError(
            f"{folder}: host {seen.index(False)} does not see what host 0 writes there; "
            "checkpoints of several hosts need a folder that all share"
        )
