"""Seeing a command through: preemptions survived, and not more of them than allowed."""

import pytest

GIT = "git+https://example.org/w2s.git@v1"
WATCH = [
    "--type",
    "v6e-8",
    "--source",
    GIT,
    "--no-check",
    "--backoff",
    "0",
    "--settle",
    "0",
    "--yes",
]
# Counts its lives in the cloud's folder, and goes on from a file that only a bucket keeps.
COUNT = (
    'echo x >>"$W2S_STUB/lives-$STUB_WORKER"; lives=$(wc -l <"$W2S_STUB/lives-$STUB_WORKER"); '
    "mkdir -p out; echo row >>out/rows; "
)
# The first worker's last act, once the other has begun.
TAKEN = (
    '[[ $STUB_WORKER == worker-0 ]] || exec sleep 60; until [[ -e "$W2S_STUB/lives-worker-1" && '
    '$(wc -l <"$W2S_STUB/lives-worker-1") -ge lives ]]; do sleep 0.02; done; '
    'echo PREEMPTED >"$W2S_STUB/node"; exec sleep 60'
)


def watch(cloud, code: str, *flags: str, kind: str = "spot"):
    return cloud.run("watch.sh", *WATCH, "--kind", kind, *flags, "--", "bash", "-c", COUNT + code)


def lives(cloud, worker: int = 0) -> int:
    return len((cloud.folder / f"lives-worker-{worker}").read_text().splitlines())


def made(cloud) -> list[str]:
    return [verb for verb in cloud.verbs() if verb.split()[-1] in ("create", "delete")]


def test_a_preemption_is_survived(cloud):
    sync = ["--sync", "out=gs://bucket/run", "--sync-every", "1"]
    # It is taken away after the first row is in the bucket; what came after is lost with the disk.
    rows = [f'-e "$W2S_STUB/bucket/bucket/run/worker-{n}/rows"' for n in (0, 1)]
    copied = " && ".join(rows)
    code = f"if ((lives == 1)); then until [[ {copied} ]]; do sleep 0.05; done; {TAKEN}; fi"
    done = watch(cloud, code, *sync)
    assert done.returncode == 0, done.stderr
    assert made(cloud) == ["tpu-vm create", "tpu-vm delete", "tpu-vm create"]
    assert [lives(cloud, worker) for worker in (0, 1)] == [2, 2]
    assert "was taken away: node PREEMPTED" in done.stderr
    assert "restart 1 of 20" in done.stderr
    assert "done after 1 restarts" in done.stderr
    assert "probe stays, and costs money" in done.stderr
    # The second life found the first one's row, and the bucket has both.
    rows = cloud.folder / "bucket/bucket/run/worker-1/rows"
    assert rows.read_text() == "row\nrow\n"


def test_a_queued_resource_that_is_suspended(cloud):
    cloud.play(workers=["1"])
    states = {"queue": "SUSPENDED", "node": "MISSING"}
    suspended = "".join(f"echo '{s}' >\"$W2S_STUB/{name}\"; " for name, s in states.items())
    suspended += "exec sleep 60"
    done = watch(
        cloud, f"((lives > 1)) || {{ {suspended}; }}", "--delete-at-end", kind="queued-spot"
    )
    assert done.returncode == 0, done.stderr
    queued = ["queued-resources create", "queued-resources delete"]
    assert made(cloud) == [*queued, *queued]
    assert "Nothing is left" in done.stderr


def test_more_preemptions_than_allowed(cloud):
    cloud.play(workers=["1"])
    taken = 'echo PREEMPTED >"$W2S_STUB/node"; exec sleep 60'
    done = watch(cloud, taken, "--max-restarts", "1")
    assert done.returncode == 75
    assert made(cloud).count("tpu-vm create") == 2
    assert lives(cloud) == 2
    assert "given up after 1 restarts" in done.stderr
    cloud.run("delete.sh", "--yes")


def test_a_worker_that_dies_again_and_again_is_no_preemption(cloud):
    # The others end with 75, as w2s does where a host is missing.
    done = watch(cloud, "[[ $STUB_WORKER == worker-1 ]] && exit 137; exit 75")
    assert done.returncode == 137
    assert lives(cloud) == 1
    assert "failed with status 137, on a slice in good health" in done.stderr


@pytest.mark.parametrize(("code", "flags"), [("exit 75", []), ("exit 3", ["--restart-on-failure"])])
def test_what_is_started_again_on_the_same_slice(cloud, code, flags):
    cloud.play(workers=["1"])
    done = watch(cloud, f"((lives > 1)) || {code}", *flags)
    assert done.returncode == 0, done.stderr
    assert made(cloud) == ["tpu-vm create"]
    assert lives(cloud) == 2


def test_passing_faults_of_gcloud(cloud):
    cloud.play(
        node=["ERROR UNAVAILABLE: one", "MISSING", "ERROR INTERNAL: two", "MISSING"],
        create=["ERROR no capacity", "created"],
        ssh=["broken", "ok", "ok", "broken", "ok"],
    )
    done = watch(cloud, "true")
    assert done.returncode == 0, done.stderr
    assert made(cloud) == ["tpu-vm create"] * 2
    assert lives(cloud) == 1


def test_a_watch_takes_up_the_run_that_is_under_way(cloud):
    cloud.play(workers=["1"])
    cloud.ready()
    # It ends after the second look at it: the watch's own first, and one that follows it.
    looks = 'grep -ao "worker.sh read" "$W2S_STUB/calls" | wc -l'
    code = f"until (($({looks}) > 1)); do sleep 0.05; done; echo ended"
    cloud.run("run.sh", "--detach", "--", "bash", "-c", code)
    done = watch(cloud, "true")
    assert done.returncode == 0, done.stderr
    assert "'main' is under way already" in done.stderr
    assert "ended" in done.stdout
    assert not (cloud.folder / "lives-worker-0").exists()
