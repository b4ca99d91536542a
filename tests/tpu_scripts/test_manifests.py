"""The manifests for GKE and SkyPilot: they parse, and hold what makes a slice of them."""

import shlex
import subprocess

import pytest
import yaml

from tests.tpu_scripts.conftest import SCRIPTS

# Chips a machine has, by GKE's name of the family.
CHIPS = {"tpu-v6e-slice": 4, "tpu-v5-lite-podslice": 4, "tpu-v5p-slice": 4}


def test_gke_has_a_pod_for_every_machine_of_the_topology():
    manifest = yaml.safe_load((SCRIPTS / "gke.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert manifest["metadata"]["annotations"][exclusive] == "cloud.google.com/gke-nodepool"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    (group,) = manifest["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["backoffLimit"] == 0  # the JobSet restarts all workers, not a job one of them
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    selector = pod["nodeSelector"]
    chips = CHIPS[selector["cloud.google.com/gke-tpu-accelerator"]]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert container["resources"]["requests"] == {"google.com/tpu": chips}
    all_chips = 1
    for side in selector["cloud.google.com/gke-tpu-topology"].split("x"):
        all_chips *= int(side)
    assert job["completions"] == job["parallelism"] == all_chips // chips
    (volume,) = pod["volumes"]
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert "metadata-cache:ttl-secs:0" in volume["csi"]["volumeAttributes"]["mountOptions"]
    assert container["volumeMounts"][0]["name"] == volume["name"]
    assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"


def test_skypilot_names_a_slice_and_a_bucket():
    task = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    resources = task["resources"]
    assert resources["accelerators"] == "tpu-v6e-16"
    assert resources["accelerator_args"]["runtime_version"] == "v2-alpha-tpuv6e"
    assert resources["infra"].startswith("gcp/")
    assert resources["use_spot"] is True
    assert task["secrets"] == {"HF_TOKEN": None}
    assert task["file_mounts"]["/bucket"]["mode"] == "MOUNT"


def commands() -> dict[str, str]:
    gke = yaml.safe_load((SCRIPTS / "gke.yaml").read_text())
    (group,) = gke["spec"]["replicatedJobs"]
    (container,) = group["template"]["spec"]["template"]["spec"]["containers"]
    task = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    return {"gke": container["command"][-1], "setup": task["setup"], "run": task["run"]}


@pytest.mark.parametrize("name", ["gke", "setup", "run"])
def test_what_they_run_is_a_shell_script(name):
    done = subprocess.run(["bash", "-n"], input=commands()[name], text=True, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("name", ["gke", "run"])
def test_what_they_run_is_a_command_of_the_package(name, capsys):
    from w2s_jax.cli.main import main

    words = shlex.split(commands()[name][commands()[name].index("exec") :])
    assert words[1].endswith("w2s")
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    known = capsys.readouterr().out
    assert all(word in known for word in words[3:] if word.startswith("--"))
    output = words[words.index("--output") + 1]
    assert output.startswith("/bucket/")  # where all workers see it, and a preemption leaves it
