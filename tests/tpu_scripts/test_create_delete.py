"""Renting a slice and giving it back: what is called, in which state, and what is said."""

import pytest

from tests.tpu_scripts.conftest import WHERE

TYPE = ["--type", "v6e-8", "--yes"]
TPU = ["compute", "tpus", "tpu-vm"]
QUEUED = ["compute", "tpus", "queued-resources"]
LOOK = ["tpu-vm describe", "queued-resources describe"]


@pytest.mark.parametrize(("kind", "spot"), [("on-demand", []), ("spot", ["--spot"])])
def test_a_node(cloud, kind, spot):
    done = cloud.run("create.sh", *TYPE, "--kind", kind, "--gcloud-flag=--network=a b")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == [*LOOK, "tpu-vm create", *LOOK, *LOOK]
    assert cloud.calls[2] == [
        *[*TPU, "create", "probe", *WHERE, "--accelerator-type=v6e-8", "--version=v2-alpha-tpuv6e"],
        *[*spot, "--network=a b", "--quiet"],
    ]
    assert "v6e-8, 8 chips on 1 machines" in done.stderr
    assert "costs money" in done.stderr
    assert "probe is ready: 2 workers" in done.stderr


@pytest.mark.parametrize(("kind", "spot"), [("queued", []), ("queued-spot", ["--spot"])])
def test_a_queued_resource_is_waited_for(cloud, kind, spot):
    done = cloud.run("create.sh", *TYPE, "--kind", kind)
    assert done.returncode == 0, done.stderr
    assert cloud.calls[2] == [
        *[*QUEUED, "create", "probe", "--node-id=probe", *WHERE, "--accelerator-type=v6e-8"],
        *["--runtime-version=v2-alpha-tpuv6e", *spot, "--quiet"],
    ]
    assert cloud.verbs().count("queued-resources create") == 1
    assert "WAITING_FOR_RESOURCES" in done.stderr
    assert "ready" in done.stderr


def test_waiting_ends_and_the_request_stays(cloud):
    cloud.play(queue=["WAITING_FOR_RESOURCES"])
    done = cloud.run("create.sh", *TYPE, "--kind", "queued", "--timeout", "1", "--poll", "0.4")
    assert done.returncode == 1
    assert "not ready after 1 s" in done.stderr
    assert "withdraws" in done.stderr
    assert "queued-resources create" not in cloud.verbs()


@pytest.mark.parametrize(
    ("topology", "accelerator", "runtime", "size"),
    [
        ("v5e:4x4", "v5litepod-16", "v2-alpha-tpuv5-lite", "16 chips on 4 machines"),
        ("v6e:4x4", "v6e-16", "v2-alpha-tpuv6e", "16 chips on 4 machines"),
        ("v5p:4x4x4", "v5p-128", "v2-alpha-tpuv5", "64 chips on 16 machines"),
        ("v4-8", "v4-8", "tpu-ubuntu2204-base", "4 chips on 1 machines"),
    ],
)
def test_a_topology_of_the_plan(cloud, topology, accelerator, runtime, size):
    done = cloud.run("create.sh", "--type", topology, "--kind", "spot", "--yes")
    assert done.returncode == 0, done.stderr
    assert f"--accelerator-type={accelerator}" in cloud.calls[2]
    assert f"--version={runtime}" in cloud.calls[2]
    assert size in done.stderr


@pytest.mark.parametrize("state", ["READY", "CREATING"])
def test_an_existing_node_is_told(cloud, state):
    cloud.play(node=[state, "READY"])
    done = cloud.run("create.sh", *TYPE, "--kind", "spot")
    assert done.returncode == 0
    assert f"probe is there already: node {state}; nothing is created" in done.stderr
    assert set(cloud.verbs()) == set(LOOK)


def test_an_existing_node_of_another_type(cloud):
    cloud.play(node=["READY"])
    done = cloud.run("create.sh", "--type", "v6e-16", "--kind", "spot", "--yes")
    assert done.returncode == 1
    assert "as v6e-8" in done.stderr


@pytest.mark.parametrize(
    ("node", "queue"),
    [
        ("PREEMPTED", "MISSING"),
        ("TERMINATED", "MISSING"),
        ("MISSING", "SUSPENDED"),
        ("MISSING", "FAILED"),
    ],
)
def test_what_was_taken_away_is_replaced_only_if_told(cloud, node, queue):
    cloud.play(node=[node], queue=[queue])
    kind = ["--kind", "spot" if queue == "MISSING" else "queued-spot"]
    done = cloud.run("create.sh", *TYPE, *kind)
    assert done.returncode == 1
    assert "--replace" in done.stderr
    assert set(cloud.verbs()) == set(LOOK)
    done = cloud.run("create.sh", *TYPE, *kind, "--replace")
    assert done.returncode == 0, done.stderr
    verbs = [verb for verb in cloud.verbs() if verb not in LOOK]
    group = "tpu-vm" if queue == "MISSING" else "queued-resources"
    assert verbs == [f"{group} delete", f"{group} create"]


def test_a_passing_fault_of_gcloud_is_asked_again(cloud):
    cloud.play(node=["ERROR UNAVAILABLE: try later", "ERROR INTERNAL: oops", "READY"])
    done = cloud.run("create.sh", *TYPE, "--kind", "spot")
    assert done.returncode == 0, done.stderr
    assert "UNAVAILABLE: try later" in done.stderr
    assert "create" not in " ".join(cloud.verbs())


def test_a_lasting_fault_creates_nothing(cloud):
    cloud.play(node=["ERROR UNAVAILABLE: try later"])
    done = cloud.run("create.sh", *TYPE, "--kind", "spot")
    assert done.returncode == 1
    assert cloud.verbs() == ["tpu-vm describe"] * 3
    cloud.play(node=["ERROR PERMISSION_DENIED: not yours"])
    done = cloud.run("create.sh", *TYPE, "--kind", "spot")
    assert done.returncode == 1
    assert "PERMISSION_DENIED: not yours" in done.stderr
    assert cloud.verbs() == ["tpu-vm describe"] * 4


def test_no_capacity(cloud):
    cloud.play(create=["ERROR There is no more capacity in the zone"])
    done = cloud.run("create.sh", *TYPE, "--kind", "spot")
    assert done.returncode == 1
    assert "no more capacity" in done.stderr
    assert cloud.verbs().count("tpu-vm create") == 1


def test_delete_a_node_and_its_queued_resource(cloud):
    cloud.play(node=["READY"], queue=["ACTIVE"])
    (cloud.folder / "others").write_text("other\tv6e-8\tREADY\n")
    done = cloud.run("delete.sh", "--yes")
    assert done.returncode == 0, done.stderr
    lists = ["queued-resources list", "tpu-vm list"]
    assert cloud.verbs() == [*LOOK, "queued-resources delete", *LOOK, *lists]
    assert cloud.calls[2] == [*QUEUED, "delete", "probe", *WHERE, "--force", "--quiet"]
    assert "Left in us-east5-b, and costing money:\nother\tv6e-8\tREADY" in done.stderr


def test_delete_a_node(cloud):
    cloud.ready()
    done = cloud.run("delete.sh", "--yes")
    assert done.returncode == 0, done.stderr
    assert [*TPU, "delete", "probe", *WHERE, "--quiet"] in cloud.calls
    assert "Nothing is left in us-east5-b" in done.stderr


def test_delete_asks(cloud):
    cloud.ready()
    done = cloud.run("delete.sh")
    assert done.returncode == 2
    assert "tpu-vm delete" not in cloud.verbs()


def test_delete_what_is_not_there(cloud):
    done = cloud.run("delete.sh")
    assert done.returncode == 0
    assert "nothing to delete" in done.stderr
    assert "tpu-vm delete" not in cloud.verbs()
