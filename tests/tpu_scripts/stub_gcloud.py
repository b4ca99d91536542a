"""A gcloud for tests: records its calls, plays states, and runs what ssh is told on this machine.

Its folder is W2S_STUB. `calls.jsonl` holds the argv of every call; `node`, `queue` and `create` are
JSON lists of answers, of which the last stays; every worker is a folder with a home of its own, and
`bucket/` stands for Cloud Storage. An answer `ERROR words` is a call that fails with these words.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(os.environ["W2S_STUB"])


def fail(words: str) -> None:
    print(f"ERROR: (gcloud) {words}", file=sys.stderr)
    sys.exit(1)


def flag(arguments: list[str], name: str) -> str:
    return next(a for a in arguments if a.startswith(f"--{name}=")).split("=", 1)[1]


def put(name: str, answers: list[str]) -> None:
    (HERE / name).write_text(json.dumps(answers))


def take(name: str) -> str:
    """The next answer of a list; the last one stays."""
    answers = json.loads((HERE / name).read_text())
    if len(answers) > 1:
        put(name, answers[1:])
    if answers[0].startswith("ERROR "):
        fail(answers[0].removeprefix("ERROR "))
    return answers[0]


def workers() -> int:
    return int((HERE / "workers").read_text())


def wipe() -> None:
    """What a deleted machine leaves behind: no process and no disk."""
    for home in HERE.glob("worker-*"):
        for pid in home.glob("w2s/runs/*/pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid.read_text().split()[0]), signal.SIGKILL)
        shutil.rmtree(home)


def not_found(kind: str, name: str) -> None:
    fail(f"NOT_FOUND: Resource 'projects/p/locations/z/{kind}/{name}' was not found")


def node(verb: str, rest: list[str]) -> None:
    if verb == "describe":
        state = take("node")
        if state == "MISSING":
            not_found("nodes", rest[0])
        print(f"{state},{workers()},{(HERE / 'type').read_text()}")
    elif verb == "create":
        answer = take("create")
        put("node", ["CREATING", "READY"])
        (HERE / "type").write_text(flag(rest, "accelerator-type"))
        print(answer)
    elif verb == "delete":
        if json.loads((HERE / "node").read_text())[0] == "MISSING":
            not_found("nodes", rest[0])
        put("node", ["MISSING"])
        wipe()
    elif verb == "list":
        print((HERE / "others").read_text(), end="")


def queue(verb: str, rest: list[str]) -> None:
    if verb == "describe":
        state = take("queue")
        if state == "MISSING":
            not_found("queuedResources", rest[0])
        print(state)
    elif verb == "create":
        take("create")
        put("queue", ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
        put("node", ["MISSING", "CREATING", "READY"])
        (HERE / "type").write_text(flag(rest, "accelerator-type"))
    elif verb == "delete":
        put("queue", ["MISSING"])
        put("node", ["MISSING"])
        wipe()


def home_of(arguments: list[str]) -> Path:
    """The home of the one worker that ssh and scp speak to."""
    state = json.loads((HERE / "node").read_text())[0]
    if state != "READY":
        fail(f"the TPU is in state {state}")
    if (HERE / "ssh").exists() and take("ssh") != "ok":
        fail("[/usr/bin/ssh] exited with return code [255].")
    home = HERE / f"worker-{int(flag(arguments, 'worker'))}"
    home.mkdir(exist_ok=True)
    return home


def ssh(rest: list[str], home: Path) -> None:
    # gcloud splits the command at spaces and ssh joins the words again; the login shell reads that.
    command = " ".join(flag(rest, "command").split(" "))
    env = os.environ | {"HOME": str(home), "STUB_WORKER": home.name}
    sys.exit(subprocess.run(["bash", "-c", command], cwd=home, env=env, check=False).returncode)


def storage(verb: str, rest: list[str]) -> None:
    """ls, cp and rsync --recursive between `bucket/` and the working folder."""
    if (HERE / "storage").exists():
        take("storage")
    paths = [Path(a.replace("gs://", f"{HERE}/bucket/")) for a in rest if not a.startswith("--")]
    if verb == "ls":
        if not paths[0].exists():
            fail("One or more URLs matched no objects.")
        print(rest[0] if paths[0].is_file() else f"{rest[0]}/..")
    elif verb == "cp":
        paths[1].parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(*paths)
    elif verb == "rsync":
        shutil.copytree(*paths, dirs_exist_ok=True)


def main(arguments: list[str]) -> None:
    with (HERE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (HERE / "calls.jsonl").open("a") as calls:
            calls.write(json.dumps(arguments) + "\n")
        home = None
        match [a for a in arguments if a != "alpha"]:
            case ["compute", "tpus", "tpu-vm", "ssh" | "scp" as verb, *rest]:
                home = home_of(rest)
            case ["compute", "tpus", "tpu-vm", verb, *rest]:
                return node(verb, rest)
            case ["compute", "tpus", "queued-resources", verb, *rest]:
                return queue(verb, rest)
            case ["storage", verb, *rest]:
                return storage(verb, rest)
            case _:
                fail(f"what is {arguments}?")
    if verb == "ssh":
        ssh(rest, home)
    else:
        shutil.copy(rest[0], home / rest[1].split(":", 1)[1])


if __name__ == "__main__":
    main(sys.argv[1:])
