"""One command on all workers: arguments, logs, statuses, detaching, stopping, lost connections."""

import os
import signal

import pytest

from tests.tpu_scripts.conftest import WHERE, wait_for

NASTY = [
    "two  spaces",
    "it's",
    'say "hi"',
    "$HOME `id` $(id)",
    "line\nbreak",
    "*",
    "\\",
    "",
    "ü;&|<>",
    "-n",
    " ",
]


def shell(code: str) -> list[str]:
    return ["--", "bash", "-c", code]


def log(cloud, worker: int, run: str = "main") -> str:
    return (cloud.work / "runs/tpu/probe" / run / f"worker-{worker}.log").read_text()


def test_arguments_arrive_as_they_are(cloud):
    cloud.ready()
    code = "import sys; print(sys.argv[1:])"
    done = cloud.run("run.sh", "--", os.sys.executable, "-c", code, *NASTY)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{NASTY}\n"  # worker 0's log
    assert [log(cloud, worker).splitlines()[-1] for worker in (0, 1)] == [str(NASTY)] * 2
    assert (cloud.home(1) / "runs/main/log").read_text() == f"{NASTY}\n"
    started = [call for call in cloud.calls if any("worker.sh start" in word for word in call)]
    assert {tuple(call[:-1]) for call in started} == {
        (
            "compute",
            "tpus",
            "tpu-vm",
            "ssh",
            "probe",
            *WHERE,
            f"--worker={n}",
            "--ssh-flag=-oServerAliveInterval=15",
            "--quiet",
        )
        for n in (0, 1)
    }


@pytest.mark.parametrize(
    ("via", "group", "flag"),
    [("internal", "compute", "--internal-ip"), ("iap", "alpha", "--tunnel-through-iap")],
)
def test_ways_to_the_workers(cloud, via, group, flag):
    cloud.ready()
    done = cloud.run("run.sh", "--via", via, "--detach", *shell("true"))
    assert done.returncode == 0, done.stderr
    ssh = [call for call in cloud.calls if "ssh" in call]
    assert len(ssh) == 2
    assert all(call[0] == group and flag in call for call in ssh)


def test_the_worst_status_and_the_words_of_who_failed(cloud):
    cloud.ready()
    code = 'echo "I am $STUB_WORKER"; [[ $STUB_WORKER == worker-0 ]] || { echo no memory; exit 7; }'
    done = cloud.run("run.sh", *shell(code))
    assert done.returncode == 7
    assert "worker 0: exit:0" in done.stderr
    assert "worker 1: exit:7" in done.stderr
    assert "no memory" in done.stderr
    assert "I am worker-0" in done.stdout
    assert "I am worker-1" not in done.stdout


def test_one_failure_stops_the_others_after_the_grace(cloud):
    cloud.ready()
    code = (
        'trap "echo saved; exit 143" TERM; '
        "[[ $STUB_WORKER != worker-1 ]] || { echo oh; exit 3; }; sleep 60 & wait"
    )
    flags = ["--grace", "1", "--poll", "0.1", "--show", "none"]
    done = cloud.run("run.sh", *flags, *shell(code))
    # The status and the log of the one that failed, not of the one that was stopped.
    assert done.returncode == 3, done.stderr
    assert "worker 1 ended (exit:3); the others have 1 s" in done.stderr
    assert "the end of worker 1's log" in done.stderr
    assert "worker 0's log" not in done.stderr
    assert "oh" in done.stderr
    assert "saved" in log(cloud, 0)


def test_a_host_that_died_is_told_from_those_that_saw_it(cloud):
    cloud.ready()
    code = "[[ $STUB_WORKER == worker-1 ]] && exit 134; exit 75"
    assert cloud.run("run.sh", *shell(code)).returncode == 134
    assert cloud.run("run.sh", *shell("exit 75")).returncode == 75


def test_the_end_of_a_log_is_of_this_run(cloud):
    cloud.ready()
    cloud.run("run.sh", *shell("echo long ago"))
    done = cloud.run("run.sh", *shell("echo now; exit 3"))
    assert "now" in done.stderr
    assert "long ago" not in done.stderr


def test_a_start_that_is_refused_leaves_the_logs_alone(cloud):
    cloud.ready()
    cloud.run(
        "run.sh", "--detach", *shell("echo first; while [[ ! -e ~/go ]]; do sleep 0.05; done")
    )
    cloud.run("run.sh", "--status")
    before = log(cloud, 1)
    assert cloud.run("run.sh", *shell("echo second")).returncode == 1
    assert log(cloud, 1) == before
    for worker in (0, 1):
        (cloud.home(worker).parent / "go").touch()
    assert cloud.run("run.sh", "--attach").returncode == 0
    assert log(cloud, 1).splitlines()[1:] == ["first"]


def test_one_worker_alone(cloud):
    cloud.ready()
    done = cloud.run("run.sh", "--worker", "1", *shell("echo I am $STUB_WORKER"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "I am worker-1\n"
    assert not (cloud.home(0) / "runs").exists()
    assert cloud.run("run.sh", "--status").stdout == "worker 0: none\nworker 1: exit:0\n"
    assert cloud.run("run.sh", "--status", "--worker", "1").stdout == "worker 1: exit:0\n"
    done = cloud.run("run.sh", "--worker", "2", *shell("true"))
    assert "there is no worker 2: probe has 2, counted from 0" in done.stderr
    assert cloud.run("run.sh", "--worker", "both", *shell("true")).returncode == 2


def test_detach_status_attach_stop(cloud):
    cloud.ready()
    code = "echo begun; while [[ ! -e ~/go ]]; do sleep 0.05; done; echo ended"
    assert cloud.run("run.sh", "--status").stdout == "worker 0: none\nworker 1: none\n"
    assert cloud.run("run.sh", "--attach").returncode == 1
    assert cloud.run("run.sh", "--detach", *shell(code)).returncode == 0
    assert cloud.run("run.sh", "--status").stdout == "worker 0: running\nworker 1: running\n"
    again = cloud.run("run.sh", *shell(code))
    assert again.returncode == 1
    assert "'main' is under way on probe: --attach follows it" in again.stderr
    for worker in (0, 1):
        (cloud.home(worker).parent / "go").touch()
    done = cloud.run("run.sh", "--attach")
    assert done.returncode == 0, done.stderr
    assert log(cloud, 1).endswith("begun\nended\n")
    assert cloud.run("run.sh", "--status").stdout == "worker 0: exit:0\nworker 1: exit:0\n"


def test_stop_ends_with_sigterm_or_kills(cloud):
    cloud.ready()
    code = '[[ $STUB_WORKER == worker-1 ]] && trap "" TERM; touch ~/ready; exec sleep 60'
    cloud.run("run.sh", "--detach", *shell(code))
    wait_for(lambda: all((cloud.home(n).parent / "ready").exists() for n in (0, 1)))
    done = cloud.run("run.sh", "--stop", "--grace", "1")
    assert done.returncode == 0, done.stderr
    assert "'main' is not under way any more" in done.stderr
    assert cloud.run("run.sh", "--status").stdout == "worker 0: exit:143\nworker 1: exit:137\n"


def test_a_machine_that_was_started_anew(cloud):
    """Its process is gone, or its number is another's."""
    cloud.ready()
    cloud.run("run.sh", "--detach", *shell("sleep 60"))
    pids = [cloud.home(worker) / "runs/main/pid" for worker in (0, 1)]
    first, second = (int(pid.read_text().split()[0]) for pid in pids)
    os.killpg(first, signal.SIGKILL)
    pids[1].write_text(f"{second} another-boot\n")
    # Until who has started it is told, a process that was killed is there.
    done = cloud.run("run.sh", "--attach", "--poll", "0.2")
    os.killpg(second, signal.SIGKILL)
    assert done.returncode == 75
    assert "worker 0: lost" in done.stderr
    assert "worker 1: lost" in done.stderr


def test_broken_connections_are_tried_again(cloud):
    cloud.ready()
    cloud.play(ssh=["broken", "ok", "broken", "ok", "ok", "broken", "ok"])
    done = cloud.run("run.sh", *shell("for n in {1..3}; do echo $n; sleep 0.1; done"))
    assert done.returncode == 0, done.stderr
    assert [log(cloud, worker).splitlines()[1:] for worker in (0, 1)] == [list("123")] * 2


def test_a_slice_that_does_not_answer(cloud):
    cloud.ready()
    cloud.play(ssh=["ok", "ok", "broken"])
    done = cloud.run("run.sh", *shell("sleep 60"))
    assert done.returncode == 69
    assert "does not answer; the run may be going on" in done.stderr
    cloud.play(ssh=["ok"])
    cloud.run("run.sh", "--stop")


def test_a_slice_that_is_taken_away(cloud):
    cloud.ready()
    begun = f"{cloud.folder}/begun-"
    code = (
        f"touch {begun}$STUB_WORKER; until [[ -e {begun}worker-0 && -e {begun}worker-1 ]]; "
        f"do sleep 0.02; done; echo PREEMPTED >{cloud.folder}/node; exec sleep 60"
    )
    done = cloud.run("run.sh", *shell(code))
    assert done.returncode == 75
    assert "probe was taken away: node PREEMPTED" in done.stderr
    assert cloud.run("run.sh", "--attach").returncode == 75
    cloud.run("delete.sh", "--yes")


def test_a_slice_that_is_taken_away_while_a_run_starts(cloud):
    cloud.ready()
    cloud.play(node=["READY", "PREEMPTED"])
    done = cloud.run("run.sh", *shell("true"))
    assert done.returncode == 75
    assert "probe was taken away: node PREEMPTED" in done.stderr


def test_no_slice_and_no_setup(cloud):
    done = cloud.run("run.sh", *shell("true"))
    assert done.returncode == 1
    assert "create.sh makes one" in done.stderr
    cloud.ready(set_up=False)
    done = cloud.run("run.sh", *shell("true"))
    assert done.returncode == 1
    assert "probe is not set up: setup.sh does it" in done.stderr


def test_runs_get_the_secrets_and_the_venv(cloud):
    cloud.ready()
    (cloud.home(0) / "env").write_text("TOKEN='hush 4711'\n")
    done = cloud.run("run.sh", *shell('echo "$TOKEN ${PATH%%:*} $PWD"'))
    assert done.stdout == f"hush 4711 {cloud.home(0)}/venv/bin {cloud.home(0)}\n"
    assert not any("hush 4711" in word for call in cloud.calls for word in call)
