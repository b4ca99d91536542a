"""Who the hosts are, by made environments. Several processes: cli/test_several_hosts.py."""

import socket

import pytest

from tests.processes import free_port
from w2s_jax import hosts
from w2s_jax.errors import InputError
from w2s_jax.hosts import HostConfig, HostsParted, find_hosts, first_node, start_hosts

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


def nowhere():
    return None


def test_a_process_alone_has_no_hosts():
    assert find_hosts("auto", {}, nowhere) is None
    assert find_hosts("auto", {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, nowhere) is None
    assert not hosts.started()
    assert hosts.own_number() == (0, 1)
    assert hosts.is_first()


def test_hosts_by_flag():
    found = find_hosts("10.0.0.2:8476,4,1", {}, nowhere)
    assert found == HostConfig(4, 1, "10.0.0.2:8476", "--hosts 10.0.0.2:8476,4,1")
    assert find_hosts("10.0.0.2:8476,1,0", SLURM, nowhere) is None
    assert find_hosts("off", SLURM, nowhere) is None


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
def test_wrong_flags_are_told(asked, problem):
    with pytest.raises(InputError, match=problem):
        find_hosts(asked, {}, nowhere)


def test_a_slurm_step_of_several_tasks():
    found = find_hosts("auto", SLURM, nowhere)
    assert (found.count, found.index, found.source) == (4, 2, "SLURM")
    assert found.address == "gpu07:61441"
    assert found.one_device is None
    assert find_hosts("auto", SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, nowhere) is None


def test_slurm_tasks_that_share_a_node_take_one_of_its_gpus_each():
    shared = SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "2"}
    assert find_hosts("auto", shared, nowhere).one_device is None
    gpus = shared | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert find_hosts("auto", gpus, nowhere).one_device == 2
    own = shared | {"CUDA_VISIBLE_DEVICES": "0"}
    assert find_hosts("auto", own, nowhere).one_device is None


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
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


def test_open_mpi():
    assert find_hosts("auto", MPI, nowhere) == HostConfig(2, 1, None, "Open MPI")
    assert find_hosts("auto", MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, nowhere) is None
    newer = {name: value for name, value in MPI.items() if "URI" not in name.upper()}
    with pytest.raises(InputError, match="give --hosts HOST:PORT,2,"):
        find_hosts("auto", newer, nowhere)


def test_a_tpu_slice():
    assert find_hosts("auto", {}, lambda: (4, 3)) == HostConfig(4, 3, None, "TPU")
    assert find_hosts("auto", {}, lambda: (1, 0)) is None
    assert find_hosts("auto", {"JAX_PLATFORMS": "cpu"}, lambda: (4, 3)) is None
    assert find_hosts("auto", {"JAX_PLATFORMS": "tpu,cpu"}, lambda: (4, 3)).count == 4


GKE = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "1"}
ATTRIBUTES = {
    "worker-network-endpoints": "x:y:10.0.0.1,x:y:10.0.0.2",
    "agent-worker-number": "1",
    "tpu-env": "TYPE: 'v5e'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n",
}


def test_the_workers_of_a_slice(monkeypatch):
    def refuse(name):
        raise OSError("no metadata server")

    monkeypatch.setattr(hosts, "_metadata", ATTRIBUTES.__getitem__)
    assert hosts._slice_workers(GKE) is None  # without chips
    monkeypatch.setattr(hosts.glob, "glob", lambda pattern: ["/dev/vfio/0"])
    assert hosts._slice_workers(GKE) == (4, 1)
    more = GKE | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    assert hosts._slice_workers(more) == (8, 5)
    assert hosts._slice_workers({}) == (4, 3)
    assert hosts._slice_workers({"TPU_SKIP_MDS_QUERY": "1"}) is None
    monkeypatch.setattr(hosts, "_metadata", refuse)
    assert hosts._slice_workers({}) is None


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
