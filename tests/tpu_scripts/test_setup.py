"""Making workers ready: what is brought, what is installed, once, and the check of the chips."""

import os
import subprocess
import tarfile

from tests.tpu_scripts.conftest import ROOT

GIT = "git+https://example.org/w2s.git@v1"


def installs(cloud) -> list[str]:
    path = cloud.folder / "pip"
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted(line for line in lines if " @ " in line)


def chips_counted(cloud) -> bool:
    return any("jax.device_count" in word for call in cloud.calls for word in call)


def test_from_git_and_once(cloud):
    cloud.ready(set_up=False)
    done = cloud.run("setup.sh", "--source", GIT)
    assert done.returncode == 0, done.stderr
    assert installs(cloud) == [f"worker-{n}: install --quiet w2s-jax[tpu] @ {GIT}" for n in (0, 1)]
    assert "worker 0: exit:0\nworker 1: exit:0" in done.stderr
    assert "probe is set up: 2 workers" in done.stderr
    again = cloud.run("setup.sh", "--source", GIT, "--no-check")
    assert again.returncode == 0, again.stderr
    assert len(installs(cloud)) == 2
    other = cloud.run("setup.sh", "--source", f"{GIT}2", "--no-check")
    assert other.returncode == 0, other.stderr
    assert len(installs(cloud)) == 4


def test_a_wheel_secrets_and_a_mount(cloud):
    cloud.ready(set_up=False)
    wheel = cloud.work / "w2s_jax-1-py3-none-any.whl"
    wheel.write_text("wheel")
    (cloud.work / "secrets").write_text("TOKEN=1\n")
    gcsfuse = cloud.folder.parent / "bin" / "gcsfuse"
    gcsfuse.write_text('#!/bin/sh\necho "$@" >>"$W2S_STUB/gcsfuse"\n')
    gcsfuse.chmod(0o755)
    flags = ["--env-file", "secrets", "--mount", "gs://bucket/a/b", "--no-check"]
    done = cloud.run("setup.sh", "--source", wheel.name, *flags)
    assert done.returncode == 0, done.stderr
    for worker in (0, 1):
        home = cloud.home(worker)
        assert (home / "source" / wheel.name).read_text() == "wheel"
        assert (home / "env").read_text() == "TOKEN=1\n"
        assert home.stat().st_mode & 0o77 == 0
        assert (
            f"worker-{worker}: install --quiet w2s-jax[tpu] @ file://{home}/source/{wheel.name}"
            in installs(cloud)
        )
    mounts = [
        line
        for line in (cloud.folder / "gcsfuse").read_text().splitlines()
        if "bucket bucket" in line
    ]
    assert len(mounts) == 2
    assert "--only-dir=a/b" in mounts[0]
    assert "--metadata-cache-ttl-secs=0" in mounts[0]


def test_this_checkout_as_it_is(cloud):
    cloud.ready(set_up=False)
    done = cloud.run("setup.sh", "--source", "checkout", "--no-check")
    assert done.returncode == 0, done.stderr
    with tarfile.open(cloud.home(0) / "source/checkout.tar.gz") as tar:
        names = set(tar.getnames())
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    assert names == {name for name in listed if name and os.path.lexists(ROOT / name)}
    assert (cloud.home(1) / "source/checkout/pyproject.toml").exists()


def test_a_failing_install_is_shown_and_stops(cloud):
    cloud.ready(set_up=False)
    (cloud.folder / "pip_fails").touch()
    done = cloud.run("setup.sh", "--source", GIT)
    assert done.returncode == 1
    assert "worker 1: install failed with status 1; its last words:\nno wheel" in done.stderr
    assert not (cloud.home(0) / "installed").exists()
    assert not chips_counted(cloud)


def test_a_failing_check(cloud):
    cloud.ready(set_up=False)
    (cloud.folder / "probe").write_text("1")
    done = cloud.run("setup.sh", "--source", GIT)
    assert done.returncode == 1
    assert chips_counted(cloud)
    assert "is set up" not in done.stderr


def test_a_worker_that_is_not_up_yet(cloud):
    cloud.ready(set_up=False)
    cloud.play(ssh=["broken", "broken", "ok"])
    done = cloud.run("setup.sh", "--source", GIT, "--no-check")
    assert done.returncode == 0, done.stderr
    cloud.play(ssh=["broken"])
    done = cloud.run("setup.sh", "--source", GIT, "--no-check")
    assert done.returncode == 69
    assert "worker 0 does not answer: ERROR: (gcloud) [/usr/bin/ssh] exited" in done.stderr
