"""Who the hosts are, by made environments. Several processes: cli/test_several_hosts.py."""

import os
import socket

import pytest

from tests.processes import free_port
from w2s_jax import distributed
from w2s_jax.distributed import HostConfig, HostsParted, find_hosts, start_hosts
from w2s_jax.errors import InputError

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-10]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_NTASKS": "4",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}


GKE = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "1"}
ATTRIBUTES = {
    "worker-network-endpoints": "x:y:10.0.0.1,x:y:10.0.0.2",
    "agent-worker-number": "1",
    "tpu-env": "TYPE: 'v5e'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n",
}


@pytest.fixture
def found(monkeypatch):
    """What is found in an environment that holds these values and no others of launchers."""

    def find(asked, environ, **options):
        with monkeypatch.context() as patch:
            for name in [*os.environ]:
                if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_PLATFORMS")):
                    patch.delenv(name)
            for name, value in environ.items():
                patch.setenv(name, value)
            return find_hosts(asked, **options)

    return find


@pytest.fixture
def chips(monkeypatch):
    """A machine with TPU chips, and with a metadata server that gives `attributes`."""

    def give(attributes):
        def get(name):
            if attributes is None or name not in attributes:
                raise OSError("no metadata server, or not found")
            return attributes[name]

        monkeypatch.setattr(distributed.glob, "glob", lambda pattern: ["/dev/vfio/0"])
        monkeypatch.setattr(distributed, "_metadata", get)

    return give


def test_a_process_alone_has_no_hosts(found):
    assert found("auto", {}) is None
    assert found("auto", {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}) is None
    assert not distributed.started()
    assert distributed.own_number() == (0, 1)
    assert distributed.is_first()


def test_hosts_by_flag(found):
    told = found("10.0.0.2:8476,4,1", {})
    assert told == HostConfig(4, 1, "10.0.0.2:8476", "--hosts 10.0.0.2:8476,4,1")
    assert found("10.0.0.2:8476,1,0", SLURM) is None
    assert found("off", SLURM) is None


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ("here", "give HOST:PORT,N,I"),
        ("a:1,2", "give HOST:PORT,N,I"),
        ("a:1,2,x", "give HOST:PORT,N,I"),
        ("a:1,2,-1", "give HOST:PORT,N,I"),
        ("a:1,2,2", "host 2 of 2; hosts are numbered from 0"),
        ("a,2,1", "address 'a' is not HOST:PORT"),
        ("a:99999,2,0", "address 'a:99999': ports are 1 to 65535"),
        ("a:0,2,0", "address 'a:0': ports are 1 to 65535"),
    ],
)
def test_wrong_flags_are_told(found, asked, problem):
    with pytest.raises(InputError, match=problem):
        found(asked, {})


def test_a_slurm_step_of_several_tasks(found):
    told = found("auto", SLURM)
    assert (told.count, told.index, told.source) == (4, 2, "SLURM")
    assert told.address == "gpu07:61441"
    assert told.one_device is None
    assert found("auto", SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    with pytest.raises(InputError, match="SLURM: host 9 of 4; hosts are numbered from 0"):
        found("auto", SLURM | {"SLURM_PROCID": "9"})


def test_slurm_tasks_that_share_a_node_take_one_of_its_gpus_each(found):
    shared = SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "2"}
    assert found("auto", shared).one_device is None
    gpus = shared | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert found("auto", gpus).one_device == 2
    own = shared | {"CUDA_VISIBLE_DEVICES": "0"}
    assert found("auto", own).one_device is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-0015],host2", "node001"),
        ("node[001,007-015],host2", "node001"),
        ("a-b[7]", "a-b7"),
    ],
)
def test_the_first_node_of_a_list(found, nodes, first):
    told = found("auto", SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert told.address.rpartition(":")[0] == first


def test_open_mpi(found):
    assert found("auto", MPI) == HostConfig(2, 1, None, "Open MPI")
    assert found("auto", MPI | {"OMPI_COMM_WORLD_SIZE": "1"}) is None
    newer = {name: value for name, value in MPI.items() if "URI" not in name.upper()}
    with pytest.raises(InputError, match="give --hosts HOST:PORT,2,"):
        found("auto", newer)


def test_a_tpu_slice(found, chips):
    chips(ATTRIBUTES)
    assert found("auto", GKE | {"JAX_PLATFORMS": "cpu"}) is None
    assert found("auto", GKE | {"JAX_PLATFORMS": "tpu,cpu"}).count == 4
    assert found("auto", GKE, slices=False) is None
    chips({})
    assert found("auto", {"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"}) is None
    chips(ATTRIBUTES | {"tpu-env": "", "worker-network-endpoints": "a", "agent-worker-number": "0"})
    assert found("auto", {}) is None


def test_the_workers_of_a_slice(found, chips):
    assert found("auto", GKE) is None  # without chips
    chips({})
    assert found("auto", GKE) == HostConfig(4, 1, None, "TPU")
    more = GKE | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    assert found("auto", more) == HostConfig(8, 5, None, "TPU")
    chips(ATTRIBUTES)
    assert found("auto", {}) == HostConfig(4, 3, None, "TPU")
    assert found("auto", {"TPU_SKIP_MDS_QUERY": "1"}) is None
    chips(None)
    assert found("auto", {}) is None


def test_a_coordinator_that_does_not_answer_is_told_in_time():
    config = HostConfig(2, 1, f"127.0.0.1:{free_port()}", "here")
    with pytest.raises(HostsParted, match=r"no coordinator answers at .* after 1 s; start"):
        start_hosts(config, start_seconds=1)


def test_commands_for_one_host_are_not_run_by_several(monkeypatch, capsys):
    from w2s_jax.cli.main import main

    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert main(["convert", "a", "b"]) == 2
    assert "w2s convert runs on one host, and 4 were started" in capsys.readouterr().err


def test_a_first_host_that_does_not_know_its_own_address_says_so_at_once(monkeypatch):
    def unknown(host, port):
        raise socket.gaierror(socket.EAI_NONAME, f"{host} is not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    config = find_hosts("nosuchname:1234,2,0")
    with pytest.raises(InputError, match="does not know nosuchname, its own address .*not known"):
        start_hosts(config, start_seconds=300)
