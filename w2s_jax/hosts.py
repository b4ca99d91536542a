"""Several hosts as one run: who they are, how they start together, how one tells all of its end.

Knows flags, environments and jax's coordination service; no arrays (`exchange.py`), no commands.
"""

import glob
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from w2s_jax.errors import InputError

START_SECONDS = 300
"""How long hosts wait for one another at the start."""
HEARTBEAT_SECONDS = 30
"""A host that was not heard of for so long is dead; others end within twice that time."""
LEAVE_SECONDS = 10
"""How long the first host waits, where one failed, for the others to hear of it."""
_FAILURE, _SEEN, _END = "w2s/failure", "w2s/seen", "w2s/end"
_DAY_MS = 86_400_000
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


class HostsParted(Exception):
    """Another host has died or cannot be reached; a rerun on all hosts goes on."""


@dataclass(frozen=True)
class HostConfig:
    """This process among `count`, of which it is number `index`, from 0.

    address: HOST:PORT of the first one's coordinator, None where jax finds it. source: what told.
    one_device: it has one device of its host, whose other ones belong to other processes.
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


Workers = Callable[[], tuple[int, int] | None]
"""(number of workers of this TPU slice, this one's number), None off a TPU."""


def find_hosts(
    asked: str = "auto",
    environ: Mapping[str, str] | None = None,
    tpu_workers: Workers | None = None,
) -> HostConfig | None:
    """The hosts that run this command together; None where this process is alone.

    asked: HOST:PORT,N,I (the coordinator on the first host, how many, which one this is), "off",
    "jax" (whatever jax.distributed.initialize() detects, a Kubernetes job say) or "auto": a SLURM
    step or an Open MPI job of several tasks, a TPU slice of several workers. Asks a TPU machine's
    metadata server and no other network; touches no device. Raises InputError for anything else.
    """
    environ = os.environ if environ is None else environ
    if asked == "off":
        return None
    if asked == "jax":
        return _by_jax()
    if asked != "auto":
        return _given(asked)
    found = _slurm(environ) or _open_mpi(environ)
    return found or _tpu(environ, tpu_workers or (lambda: _slice_workers(environ)))


def _given(asked: str) -> HostConfig | None:
    address, count, index = (*asked.split(","), "", "")[:3]
    if asked.count(",") != 2 or not (count.strip().isdecimal() and index.strip().isdecimal()):
        raise InputError(
            f"--hosts {asked}: give HOST:PORT,N,I (the first host's address, the number of hosts, "
            "which one this is from 0), auto, jax or off"
        )
    found = HostConfig(int(count), int(index), address.strip(), f"--hosts {asked}")
    return None if found.count == 1 else found


def _by_jax() -> HostConfig:
    """Count and index are told once jax has started; until then one of one."""
    return HostConfig(1, 0, None, "--hosts jax")


def _slurm(environ: Mapping[str, str]) -> HostConfig | None:
    """A step of several tasks. A batch script is one task itself, whatever its job's number."""
    needed = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
    if not all(name in environ for name in needed):
        return None
    count = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or 1)
    if count == 1:
        return None
    job, index, local, nodes = (environ[name] for name in needed)
    # Ports above the usual ephemeral ones, another for each job.
    port = int(job) % 2**12 + 65535 - 2**12 + 1
    nodes_used = int(environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES") or 1)
    gpus = environ.get("CUDA_VISIBLE_DEVICES", "").count(",") + 1
    own = int(local) if count > nodes_used and gpus > 1 else None
    return HostConfig(count, int(index), f"{first_node(nodes)}:{port}", "SLURM", own)


def first_node(nodes: str) -> str:
    """The first of a SLURM node list such as "a[003-005,9],b"."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if found is None:
        raise InputError(
            f"SLURM: node list {nodes!r} is not understood; give --hosts HOST:PORT,N,I"
        )
    return found[1] + (found[2] or "")


def _open_mpi(environ: Mapping[str, str]) -> HostConfig | None:
    count = int(environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    if count == 1:
        return None
    index = int(environ.get("OMPI_COMM_WORLD_RANK", "0"))
    if "OMPI_MCA_orte_hnp_uri" not in environ:
        raise InputError(
            f"Open MPI has started {count} processes and does not say where the first one is; give "
            f"--hosts HOST:PORT,{count},$OMPI_COMM_WORLD_RANK, or --hosts off"
        )
    return HostConfig(count, index, None, "Open MPI")


def _tpu(environ: Mapping[str, str], workers: Workers) -> HostConfig | None:
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return None
    found = workers()
    return None if found is None or found[0] == 1 else HostConfig(*found, None, "TPU")


def _slice_workers(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """The workers of this machine's TPU slice: from the environment (GKE) or the metadata server.

    Slices that work together over a data centre's network count as one.
    """
    if not (glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")):
        return None  # no chips here
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    number = int(environ.get("MEGASCALE_SLICE_ID") or 0)
    if names is not None:
        workers, own = len(names.split(",")), int(environ.get("TPU_WORKER_ID") or 0)
    elif "TPU_SKIP_MDS_QUERY" in environ:
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
    return slices * workers, number * workers + own


def _metadata(name: str) -> str:
    import urllib.request

    request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=3) as answer:
        return answer.read().decode()


def start_hosts(
    config: HostConfig,
    *,
    start_seconds: int = START_SECONDS,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> None:
    """Start jax over all hosts; to be called before anything touches a device.

    Raises HostsParted where the coordinator does not answer in time, and InputError on the first
    host where the address given for it is none. Where a host other than the
    first is missing, jax ends the process by SIGABRT once the time is over, and so it does where a
    host dies later: `cli/multihost_launch.py` turns that into a line and a status.
    """
    import jax

    options: dict[str, Any] = {}
    if config.address is not None:
        _await_coordinator(config, start_seconds)
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


def _await_coordinator(config: HostConfig, seconds: float | int) -> None:
    """Wait until the first host listens, which tells more than jax's own waiting would.

    Raises InputError on the first host where it does not know its own address.
    """
    if config.address is None:
        return
    host, _, port = config.address.rpartition(":")
    if config.index == 0:
        try:
            socket.getaddrinfo(host.strip("[]"), int(port))
        except OSError as error:
            raise InputError(
                f"{config.source}: the first host does not know {host}, its own address "
                f"({error.strerror or error}); give one by which all hosts reach it"
            ) from None
        return
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostsParted(
                    f"no coordinator answers at {config.address} ({error.strerror or error}) after "
                    f"{seconds} s; start the same command on all {config.count} hosts, and give "
                    "the first host's address"
                ) from None
        time.sleep(0.2)


def started() -> bool:
    """Whether this process runs jax together with others; imports nothing."""
    return own_number()[1] > 1


def own_number() -> tuple[int, int]:
    """(this host's number, how many there are); (0, 1) of a process that is alone."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return 0, 1
    return _state().process_id, _state().num_processes


def is_first() -> bool:
    """Whether this is the host that writes what is written once."""
    return own_number()[0] == 0


def _state() -> Any:
    from jax._src import distributed  # its key-value store has no public name

    return distributed.global_state


@dataclass(frozen=True)
class Failure:
    """What ended a run: the host, its exit status and its one line."""

    host: int
    status: int
    line: str


def tell_failure(failure: Failure) -> Failure:
    """Make a failure known to all hosts; returns the first that was told, this or another's."""
    from jax.errors import JaxRuntimeError

    value = json.dumps([failure.host, failure.status, failure.line])
    try:
        _state().client.key_value_set(_FAILURE, value)
        return failure
    except JaxRuntimeError:
        return read_failure() or failure


def read_failure() -> Failure | None:
    """The failure that a host has told, if any."""
    from jax.errors import JaxRuntimeError

    try:
        return Failure(*json.loads(_state().client.key_value_try_get(_FAILURE)))
    except JaxRuntimeError:
        return None


def leave_together(seconds: float | int = LEAVE_SECONDS) -> None:
    """Before a process ends early: let the first host go last, as the others' answers lie there."""
    from jax.errors import JaxRuntimeError

    index, count = own_number()
    try:
        if index:
            _state().client.key_value_set(f"{_SEEN}/{index}", "", allow_overwrite=True)
            return
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if len(_state().client.key_value_dir_get(_SEEN)) >= count - 1:
                break
            time.sleep(0.1)
    except JaxRuntimeError:
        return


def finish_together() -> None:
    """Return when all hosts have come to their ends; how long one takes is not bounded.

    Raises HostsParted where one has died.
    """
    from jax.errors import JaxRuntimeError

    try:
        _state().client.wait_at_barrier(_END, _DAY_MS)
    except JaxRuntimeError as error:
        raise HostsParted(" ".join(str(error).split())[:200]) from None


class Watch:
    """A thread that looks, twice a second, whether a host has told a failure.

    `on_failure` is called in that thread, once.
    """

    def __init__(self, on_failure: Callable[[Failure], None]):
        self._on_failure = on_failure
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="hosts")
        self._thread.start()

    def close(self) -> None:
        """Stop looking; nothing is called after."""
        self._over.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.5):
            failure = read_failure()
            if failure is not None:
                self._on_failure(failure)
                return
