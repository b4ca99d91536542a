"""Making workers ready: what is brought, what is installed, once, and the check of the chips."""

import shutil
import subprocess
import tarfile

import pytest

from tests.tpu_scripts.conftest import SCRIPTS

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


@pytest.mark.parametrize(
    "line", ["T=a b", "T=$U", "T='a", "T=a;b", 'T="$U"', "T=a\r", "T = a", "a", "T=`a`", "1=a"]
)
def test_secrets_that_a_shell_would_lose_are_refused(cloud, line):
    cloud.ready(set_up=False)
    (cloud.work / "secrets").write_bytes(f"# mine\nGOOD=1\n{line}\n".encode())
    done = cloud.run("setup.sh", "--source", f"{GIT}1", "--no-check", "--env-file", "secrets")
    assert done.returncode == 2
    assert "secrets, line 3: write KEY=VALUE" in done.stderr
    assert not cloud.calls


def test_secrets_in_quotes_come_as_they_are(cloud):
    cloud.ready(set_up=False)
    text = '# mine\n\nexport A=hf_a-B.c/d+e==\nB=\'a $b "c"\'\nC="it\'s"\nD='
    (cloud.work / "secrets").write_text(text)
    flags = ["--no-check", "--env-file", "secrets"]
    assert cloud.run("setup.sh", "--source", f"{GIT}1", *flags).returncode == 0
    shown = cloud.run("run.sh", "--", "bash", "-c", 'printf "<%s>" "$A" "$B" "$C" "$D"')
    assert """<hf_a-B.c/d+e==><a $b "c"><it's><>""" in shown.stdout


def test_this_checkout_as_it_is(cloud):
    """What is tracked and what is new, as it is now; not what was deleted or is ignored."""
    root = cloud.folder.parent / "checkout"
    shutil.copytree(SCRIPTS, root / "tpu_scripts")
    for name in ("pyproject.toml", "gone.py", "a name.py", "é.py"):
        (root / name).write_text("as it was\n")
    (root / ".gitignore").write_text("*.pyc\n")
    git = ["git", "-C", str(root), "-c", "init.defaultBranch=main"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    (root / "gone.py").unlink()
    for name in ("new.py", "ignored.pyc", "pyproject.toml"):
        (root / name).write_text("as it is\n")
    cloud.ready(set_up=False)
    script = root / "tpu_scripts/setup.sh"
    done = cloud.run(str(script), "--source", "checkout", "--no-check")
    assert done.returncode == 0, done.stderr
    with tarfile.open(cloud.home(0) / "source/checkout.tar.gz") as tar:
        names = {name for name in tar.getnames() if not name.startswith("tpu_scripts/")}
    assert names == {".gitignore", "a name.py", "é.py", "new.py", "pyproject.toml"}
    for worker in (0, 1):
        unpacked = cloud.home(worker) / "source/checkout"
        assert (unpacked / "pyproject.toml").read_text() == "as it is\n"
        assert (unpacked / "tpu_scripts/setup.sh").exists()


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
