"""What holds for all scripts: help, dry runs that call nothing, wrong usage, shellcheck."""

import shlex
import shutil
import subprocess

import pytest

from tests.tpu_scripts.conftest import SCRIPTS, SLICE, STUB

CREATE = ["--type", "v6e-16", "--kind", "spot"]
GIT = "git+https://example.org/w2s.git@v1"
COMMANDS = {
    "create.sh": CREATE,
    "setup.sh": ["--source", GIT],
    "run.sh": ["--", "w2s", "search"],
    "watch.sh": [*CREATE, "--source", GIT, "--sync", "out=gs://b/p", "--", "w2s", "search"],
    "copy.sh": ["--worker", "all", "up", "out", "gs://b/p"],
    "delete.sh": [],
}


def test_every_script_is_covered():
    assert {p.name for p in SCRIPTS.glob("*.sh")} == {*COMMANDS, "common.sh", "worker.sh"}


@pytest.mark.parametrize("script", COMMANDS)
def test_help(cloud, script):
    done = cloud.run(script, "--help", slice_flags=False)
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: {script} ")
    assert "--dry-run" in done.stdout
    assert not cloud.calls


@pytest.mark.parametrize("script", COMMANDS)
def test_dry_run_prints_commands_and_calls_nothing(cloud, script):
    done = cloud.run(script, "--dry-run", *COMMANDS[script])
    assert done.returncode == 0, done.stderr
    assert not cloud.calls
    code = "\n".join(line for line in done.stdout.splitlines() if not line.startswith("#"))
    words = shlex.split(code.replace("\n", " \n"))
    assert words.count("gcloud") >= 2
    assert "--name" not in words
    # What is printed can be pasted: a shell reads it, and the stub knows every command of it.
    pasted = subprocess.run(
        ["bash", "-c", code.replace("gcloud ", ": gcloud ")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert pasted.returncode == 0, pasted.stderr


def test_dry_run_prints_each_worker_of_a_known_type(cloud):
    done = cloud.run("run.sh", "--dry-run", "--detach", "--", "true", W2S_TPU_TYPE="v5litepod-16")
    assert [f"--worker={n} " in done.stdout for n in range(5)] == [True] * 4 + [False]


def test_the_dry_run_of_create_is_what_create_calls(cloud):
    printed = cloud.run("create.sh", "--dry-run", *CREATE).stdout
    cloud.run("create.sh", "--yes", *CREATE)
    made = next(call for call in cloud.calls if call[3] == "create")
    assert ["gcloud", *made] in [
        shlex.split(line) for line in printed.splitlines() if line[0] != "#"
    ]


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("create.sh", [], "which type? --type TYPE, or W2S_TPU_TYPE"),
        ("create.sh", ["--type", "v6e-16"], "--kind KIND, or W2S_TPU_KIND"),
        ("create.sh", ["--type", "v6e-16", "--kind", "cheap"], "not 'cheap'"),
        ("create.sh", ["--type", "a100", "--kind", "spot"], "not 'a100'"),
        ("create.sh", ["--type", "v6e:4x2x", "--kind", "spot"], "'v6e:4x2x'"),
        ("create.sh", ["--type", "v5p:2x2x16", "--kind", "spot"], "v5p-128 comes as 4x4x4"),
        ("create.sh", ["--type", "tpu7x-8", "--kind", "spot"], "gke.yaml"),
        ("create.sh", [*CREATE], "--yes says yes"),
        ("run.sh", ["--logs", "--x"], "--logs needs a folder, not '--x'"),
        ("run.sh", ["--logs=", "--", "true"], "--logs needs a folder, not ''"),
        ("create.sh", [*CREATE, "--yes=please"], "what is 'please'"),
        ("create.sh", [*CREATE, "--timeout", "soon"], "--timeout"),
        ("create.sh", ["--type"], "--type needs a value"),
        ("setup.sh", [], "which package?"),
        ("setup.sh", ["--source", "git+https://example.org/w2s.git"], "@REF"),
        ("setup.sh", ["--source", "missing.whl"], "there is no file missing.whl"),
        ("setup.sh", ["--source", GIT, "--mount", "bucket"], "gs://BUCKET"),
        ("run.sh", [], "which command?"),
        ("run.sh", ["w2s"], "what is 'w2s'? the command stands behind --"),
        ("run.sh", ["--attach", "--", "w2s"], "--attach takes no command"),
        ("run.sh", ["--run", "a b", "--", "w2s"], "--run takes"),
        ("watch.sh", [*CREATE, "--source", GIT], "which command?"),
        ("watch.sh", ["--kind", "spot", "--source", GIT, "--", "w2s"], "which type?"),
        ("watch.sh", [*CREATE, "--", "w2s"], "which package?"),
        ("watch.sh", [*COMMANDS["watch.sh"]], "--yes says yes"),
        ("watch.sh", [*CREATE, "--source", GIT, "--sync", "out", "--", "w2s"], "PATH=gs://"),
        ("copy.sh", ["up", "out", "gs://b/p"], "which worker?"),
        ("copy.sh", ["--worker", "all", "up", "out"], "copy what?"),
        ("copy.sh", ["--worker", "all", "up", "out", "s3://b"], "'s3://b'"),
        ("copy.sh", ["--worker", "0", "--shared", "up", "out", "gs://b"], "--shared goes with"),
        ("delete.sh", ["--force"], "what is '--force'"),
        ("delete.sh", ["--via", "pigeon"], "external, internal or iap"),
        ("delete.sh", ["--poll", "often"], "--poll is a number of seconds"),
        ("delete.sh", ["--name", "Probe"], "'Probe'"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(cloud, script, arguments, words):
    done = cloud.run(script, *arguments)
    assert done.returncode == 2
    error = done.stderr.strip().splitlines()[-1]
    assert "error: " in error
    assert words in error
    assert not [verb for verb in cloud.verbs() if "describe" not in verb]


@pytest.mark.parametrize("script", COMMANDS)
@pytest.mark.parametrize("missing", ["--name", "--project", "--zone"])
def test_nothing_is_assumed_of_where(cloud, script, missing):
    at = SLICE.index(missing)
    flags = SLICE[:at] + SLICE[at + 2 :]
    done = cloud.run(script, *flags, *COMMANDS[script], slice_flags=False)
    assert done.returncode == 2
    assert f"W2S_TPU_{missing[2:].upper()}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not cloud.calls


def test_flags_by_variables_and_by_equals_signs(cloud):
    variables = {"W2S_TPU_NAME": "other", "W2S_TPU_PROJECT": "p", "W2S_TPU_ZONE": "z"}
    done = cloud.run("delete.sh", "--zone=us-west4-a", "--dry-run", slice_flags=False, **variables)
    assert "delete other --project=p --zone=us-west4-a" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck")
def test_shellcheck():
    scripts = [str(path) for path in (*sorted(SCRIPTS.glob("*.sh")), STUB)]
    done = subprocess.run(
        ["shellcheck", "-x", *scripts],
        cwd=SCRIPTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_strict(script):
    text = script.read_text()
    if script.name == "common.sh":
        assert not text.startswith("#!")
    else:
        assert text.startswith("#!/usr/bin/env bash\n")
        assert "\nset -euo pipefail\n" in text
        assert script.stat().st_mode & 0o111


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("copy.sh", ["--worker", "01", "up", "out", "gs://bucket/out"]),
        ("run.sh", ["--grace", "08", "--stop"]),
        ("run.sh", ["--show", "01", "--attach"]),
    ],
)
def test_numbers_that_bash_reads_otherwise_are_refused(cloud, script, arguments):
    cloud.ready()
    done = cloud.run(script, *arguments)
    assert done.returncode == 2, done.stderr
    assert not cloud.calls
