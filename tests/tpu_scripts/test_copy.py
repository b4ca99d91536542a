"""Copies between workers and a bucket: one worker, all, shared, again and again."""

from tests.tpu_scripts.conftest import wait_for


def write(cloud, worker: int, name: str, text: str) -> None:
    path = cloud.home(worker) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_each_worker_has_a_folder_of_its_own(cloud):
    cloud.ready()
    for worker in (0, 1):
        write(cloud, worker, "my out/rows.jsonl", f"{worker}\n")
    done = cloud.run("copy.sh", "--worker", "all", "up", "my out", "gs://bucket/run 1/")
    assert done.returncode == 0, done.stderr
    assert "my out is copied up, on 2 of 2 workers" in done.stderr
    bucket = cloud.folder / "bucket/bucket/run 1"
    assert [(bucket / f"worker-{n}/rows.jsonl").read_text() for n in (0, 1)] == ["0\n", "1\n"]
    assert [
        "storage",
        "rsync",
        "--recursive",
        "my out",
        "gs://bucket/run 1/worker-0",
    ] in cloud.calls
    done = cloud.run("copy.sh", "--worker", "all", "down", "gs://bucket/run 1", "back")
    assert done.returncode == 0, done.stderr
    assert (cloud.home(1) / "back/rows.jsonl").read_text() == "1\n"


def test_one_worker_one_file_and_a_shared_model(cloud):
    cloud.ready()
    write(cloud, 1, "out.jsonl", "rows\n")
    done = cloud.run("copy.sh", "--worker", "1", "up", "out.jsonl", "gs://bucket/out.jsonl")
    assert done.returncode == 0, done.stderr
    done = cloud.run(
        "copy.sh", "--worker", "all", "--shared", "down", "gs://bucket/out.jsonl", "in/rows.jsonl"
    )
    assert done.returncode == 0, done.stderr
    assert [(cloud.home(n) / "in/rows.jsonl").read_text() for n in (0, 1)] == ["rows\n"] * 2
    assert cloud.run("copy.sh", "--worker", "2", "up", "out.jsonl", "gs://b").returncode == 1


def test_nothing_there(cloud):
    cloud.ready()
    down = ["--worker", "all", "down", "gs://bucket/none", "back"]
    done = cloud.run("copy.sh", *down)
    assert done.returncode == 1
    assert "matched no objects" in done.stderr
    assert cloud.run("copy.sh", *down, "--if-any").returncode == 0
    # A fault is not an empty bucket: a run must not begin anew because of it.
    cloud.play(storage=["ERROR HTTPError 503: try again"])
    done = cloud.run("copy.sh", *down, "--if-any")
    assert done.returncode == 1
    assert "503" in done.stderr
    cloud.play(storage=["ok"])
    done = cloud.run("copy.sh", "--worker", "0", "up", "none", "gs://bucket/none")
    assert "there is no none" in done.stderr


def test_again_and_again(cloud):
    cloud.ready()
    done = cloud.run("copy.sh", "--worker", "all", "--every", "1", "up", "out", "gs://bucket/x")
    assert done.returncode == 0, done.stderr
    write(cloud, 1, "out/rows.jsonl", "row\n")
    copied = cloud.folder / "bucket/bucket/x/worker-1/rows.jsonl"
    wait_for(lambda: copied.exists() and copied.read_text() == "row\n")
    done = cloud.run("run.sh", "--run", "copy", "--stop")
    assert done.returncode == 0, done.stderr
