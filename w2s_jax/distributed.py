"""Several hosts as one run: which they are, how jax starts over them, what they tell one another.

Importing this imports no jax, and finding hosts touches no device. How a command is started,
watched and ended on all hosts is in `cli/multihost_launch.py`.
"""

import glob
import hashlib
import json
import os
import re
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w2s_jax.errors import InputError

if TYPE_CHECKING:
    import jax
    import numpy as np
    from jax.sharding import Mesh

START_SECONDS = 300
"""How long hosts wait for one another at the start."""
HEARTBEAT_SECONDS = 30
"""A host that was not heard of for so long is dead; others end within twice that time."""
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
BLOCK = 8 * 2**20
"""Bytes that a host gives in one exchange."""


class HostsParted(Exception):
    """Another host has died or cannot be reached; a rerun on all hosts goes on."""


# Which hosts there are


@dataclass(frozen=True)
class HostConfig:
    """This process among `count`, of which it is number `index`, from 0.

    Attributes:
        count: The number of processes; 1 where jax finds it out at the start.
        index: The number of this one.
        address: HOST:PORT of the first one's coordinator, None where jax finds it.
        source: What told, as messages name it.
        one_device: The one device of its host that is this process's, as the other ones belong to
            other processes; None where all are its own.
    """

    count: int
    index: int
    address: str | None
    source: str
    one_device: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise InputError(
                f"{self.source}: host {self.index} of {self.count}; hosts are numbered from 0 to "
                "their number less one"
            )
        if self.address is not None and not re.fullmatch(r"\S+:\d{1,5}", self.address):
            raise InputError(f"{self.source}: address {self.address!r} is not HOST:PORT")
        if self.address is not None and not 0 < int(self.address.rpartition(":")[2]) < 2**16:
            raise InputError(f"{self.source}: address {self.address!r}: ports are 1 to 65535")


def find_hosts(asked: str = "auto", *, slices: bool = True) -> HostConfig | None:
    """The hosts that run this command together; None where this process is alone.

    Asks a TPU machine's metadata server and no other network; touches no device.

    Args:
        asked: HOST:PORT,N,I (the coordinator on the first host, how many, which one this is),
            "off", "jax" (whatever jax.distributed.initialize() detects, a Kubernetes job say) or
            "auto": a SLURM step or an Open MPI job of several tasks, a TPU slice of several
            workers.
        slices: Whether "auto" looks for a TPU slice.

    Raises:
        InputError: For anything else, and where a launcher does not tell enough.
    """
    if asked == "off":
        return None
    if asked == "jax":  # count and index are known once it has started
        return HostConfig(1, 0, None, "--hosts jax")
    if asked != "auto":
        return _given(asked)
    return _slurm() or _open_mpi() or (_tpu_slice() if slices else None)


def _given(asked: str) -> HostConfig | None:
    found = re.fullmatch(r"([^,]*),\s*(\d+)\s*,\s*(\d+)\s*", asked)
    if found is None:
        raise InputError(
            f"--hosts {asked}: give HOST:PORT,N,I (the first host's address, the number of hosts, "
            "which one this is from 0), auto, jax or off"
        )
    told = HostConfig(int(found[2]), int(found[3]), found[1].strip(), f"--hosts {asked}")
    return None if told.count == 1 else told


def _slurm() -> HostConfig | None:
    """A step of several tasks. A batch script is one task itself, whatever its job's number.

    Not by jax, which counts the job's tasks in place of the step's, gives every task one device,
    and reads "a[7]" as the node a7].
    """
    told = os.environ
    needed = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
    if not all(name in told for name in needed):
        return None
    job, index, local, nodes = (told[name] for name in needed)
    count = int(told.get("SLURM_STEP_NUM_TASKS") or told.get("SLURM_NTASKS") or 1)
    if count == 1:
        return None
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if first is None:
        raise InputError(
            f"SLURM: node list {nodes!r} is not understood; give --hosts HOST:PORT,N,I"
        )
    # Ports above the usual ephemeral ones, another for each job.
    address = f"{first[1]}{first[2] or ''}:{int(job) % 2**12 + 65535 - 2**12 + 1}"
    nodes_used = int(told.get("SLURM_STEP_NUM_NODES") or told.get("SLURM_NNODES") or 1)
    shares = count > nodes_used and "," in told.get("CUDA_VISIBLE_DEVICES", "")
    return HostConfig(count, int(index), address, "SLURM", int(local) if shares else None)


def _open_mpi() -> HostConfig | None:
    count = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    if count == 1:
        return None
    if "OMPI_MCA_orte_hnp_uri" not in os.environ:  # from which jax has the first one's address
        raise InputError(
            f"Open MPI has started {count} processes and does not say where the first one is; give "
            f"--hosts HOST:PORT,{count},$OMPI_COMM_WORLD_RANK, or --hosts off"
        )
    return HostConfig(count, int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")), None, "Open MPI")


def _tpu_slice() -> HostConfig | None:
    """The workers of this machine's TPU slice: from the environment (GKE) or the metadata server.

    Slices that work together over a data centre's network count as one. Not by jax, which asks the
    metadata server, for a minute each, also for what GKE leaves out, and takes no answer for one.
    """
    platforms, told = os.environ.get("JAX_PLATFORMS", ""), os.environ
    if platforms and "tpu" not in platforms:
        return None
    if not (glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")):
        return None  # no chips here
    names = told.get("TPU_PROCESS_ADDRESSES") or told.get("TPU_WORKER_HOSTNAMES")
    slices = int(told.get("MEGASCALE_NUM_SLICES") or 1)
    number = int(told.get("MEGASCALE_SLICE_ID") or 0)
    if names is not None:
        workers, own = len(names.split(",")), int(told.get("TPU_WORKER_ID") or 0)
    elif "TPU_SKIP_MDS_QUERY" in told:
        return None
    else:
        try:
            workers = len(_metadata("worker-network-endpoints").split(","))
            own = int(_metadata("agent-worker-number"))
            about = dict(re.findall(r"^(\w+): *'?([^'\n]*)", _metadata("tpu-env"), re.MULTILINE))
        except (OSError, ValueError):
            return None
        slices = int(about.get("MEGASCALE_NUM_SLICES") or slices)
        number = int(about.get("MEGASCALE_SLICE_ID") or number)
    count = slices * workers
    return HostConfig(count, number * workers + own, None, "TPU") if count > 1 else None


def _metadata(name: str) -> str:
    import urllib.request

    request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=3) as answer:
        return answer.read().decode()


# Starting


def start_hosts(
    config: HostConfig,
    *,
    start_seconds: int = START_SECONDS,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> None:
    """Start jax over all hosts; to be called before anything touches a device.

    Where a host other than the first is missing, jax ends the process by SIGABRT once the time is
    over, and so it does where a host dies later: `cli/multihost_launch.py` turns that into a line
    and a status.

    Args:
        config: The hosts, and which of them this is.
        start_seconds: How long they wait for one another.
        heartbeat_seconds: A host that was not heard of for so long is dead.

    Raises:
        HostsParted: Where the coordinator does not answer in time.
        InputError: On the first host, where the address given for it is none.
    """
    import jax

    options: dict[str, Any] = {}
    if config.address is not None:
        _await_coordinator(config, config.address, start_seconds)
        options = {
            "coordinator_address": config.address,
            "num_processes": config.count,
            "process_id": config.index,
            # Else jax gives every process one device wherever it knows the launcher.
            "cluster_detection_method": "deactivate",
        }
    if config.one_device is not None:
        options["local_device_ids"] = [config.one_device]
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=start_seconds,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    except (ValueError, RuntimeError) as error:
        told = " ".join(str(error).split())[:300]
        if jax.distributed.is_initialized() or "must be called before" in told:
            raise
        raise HostsParted(f"{config.source}: the hosts could not start together: {told}") from None


def _await_coordinator(config: HostConfig, address: str, seconds: float | int) -> None:
    """Wait until the first host listens, which tells more than jax's own waiting would.

    Raises InputError on the first host where it does not know its own address.
    """
    host, _, port = address.rpartition(":")
    place = (host.strip("[]"), int(port))
    if config.index == 0:
        try:
            socket.getaddrinfo(*place)
        except OSError as error:
            raise InputError(
                f"{config.source}: the first host does not know {host}, its own address "
                f"({error.strerror or error}); give one by which all hosts reach it"
            ) from None
        return
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(place, timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostsParted(
                    f"no coordinator answers at {address} ({error.strerror or error}) after "
                    f"{seconds} s; start the same command on all {config.count} hosts, and give "
                    "the first host's address"
                ) from None
        time.sleep(0.2)


def own_number() -> tuple[int, int]:
    """(this host's number, how many there are); (0, 1) of a process alone. Imports nothing."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return 0, 1
    state = _state()
    return state.process_id, state.num_processes


def started() -> bool:
    """Whether this process runs jax together with others; imports nothing."""
    return own_number()[1] > 1


def is_first() -> bool:
    """Whether this is the host that writes what is written once."""
    return own_number()[0] == 0


def key_values() -> Any:
    """The store of texts by key that all hosts share, at jax's coordinator on the first one."""
    return _state().client


def _state() -> Any:
    from jax._src import distributed  # the key-value store has no public name

    return distributed.global_state


# Values between hosts. Every function is called by all hosts together, in the same order; on one
# host each is immediate.


def to_host(tree: Any) -> Any:
    """The arrays of a tree as NumPy arrays, whatever devices of whichever hosts hold their parts.

    Parts that lie on other hosts are gathered, by one program for all arrays of the tree.
    """
    import jax
    import numpy as np

    leaves, structure = jax.tree.flatten(tree)
    apart = {
        place: leaf
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, jax.Array)
        and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
    }
    if apart:
        sharding: Any = next(iter(apart.values())).sharding
        mesh = sharding.mesh
        apart = jax.jit(_same, out_shardings=_on_all(mesh))(apart)
    whole = [np.asarray(apart.get(place, leaf)) for place, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, whole)


def _same(arrays: Any) -> Any:
    """At the top level, so that it is compiled once for each shape."""
    return arrays


def everywhere(array: "np.ndarray", mesh: "Mesh | None") -> "jax.Array":
    """A host's array, the same on all hosts, on every device of a mesh."""
    import jax

    if mesh is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, _on_all(mesh), lambda index: array[index])


def _on_all(mesh: "Mesh") -> Any:
    """The sharding of an array that is whole on every device of a mesh."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec())


def gather_bytes(payload: bytes) -> list[bytes]:
    """What every host gives, in the order of the hosts.

    Raises:
        InputError: On every host, where they have different numbers of devices.
    """
    if not started():
        return [payload]
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    _check_devices()
    sizes = process_allgather(np.int64(len(payload))).tolist()
    # A power of two, so that few programs are compiled.
    width = min(BLOCK, 1 << max(8, (max(sizes) - 1).bit_length()))
    blocks = np.zeros((-(-max(sizes) // width), width), np.uint8)
    blocks.reshape(-1)[: len(payload)] = np.frombuffer(payload, np.uint8)
    parts = [process_allgather(block) for block in blocks]  # each [hosts, width]
    return [
        b"".join(part[host].tobytes() for part in parts)[:size] for host, size in enumerate(sizes)
    ]


def _check_devices() -> None:
    import jax

    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        told = ", ".join(f"host {host} has {count}" for host, count in sorted(counts.items()))
        raise InputError(f"hosts must have as many devices as one another, and {told}")


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


def from_first(compute: "Callable[[], np.ndarray]", like: "np.ndarray") -> "np.ndarray":
    """What the first host computes, in the shape and dtype of `like`; others compute nothing."""
    if not started():
        return compute()
    import numpy as np
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
