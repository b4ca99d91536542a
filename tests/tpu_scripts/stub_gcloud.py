"""A gcloud for tests: records its calls, plays states, and runs what ssh is told on this machine.

Its folder is W2S_STUB. `calls` holds the argv of every call, a literal a line; `node`, `queue` and
`create` hold answers, a line each, of which the last stays; every worker is a folder with a home of
its own, and `bucket/` stands for Cloud Storage. An answer `ERROR words` is a call that fails with
these words.

It starts some thousand times in a run of the tests, so that it imports what starts quickly.
"""

import fcntl
import os
import sys

HERE = os.environ["W2S_STUB"]


def fail(words: str) -> None:
    print(f"ERROR: (gcloud) {words}", file=sys.stderr)
    sys.exit(1)


def flag(arguments: list[str], name: str) -> str:
    return next(a for a in arguments if a.startswith(f"--{name}=")).split("=", 1)[1]


def text(name: str) -> str:
    with open(f"{HERE}/{name}") as file:
        return file.read()


def put(name: str, *answers: str) -> None:
    with open(f"{HERE}/{name}", "w") as file:
        file.write("\n".join(answers))


def take(name: str) -> str:
    """The next answer; the last one stays."""
    first, *rest = text(name).splitlines()
    if rest:
        put(name, *rest)
    if first.startswith("ERROR "):
        fail(first.removeprefix("ERROR "))
    return first


def wipe() -> None:
    """What a deleted machine leaves behind: no process and no disk."""
    import contextlib
    import glob
    import shutil
    import signal

    for home in glob.glob(f"{glob.escape(HERE)}/worker-*"):
        for path in glob.glob(f"{glob.escape(home)}/w2s/runs/*/pid"):
            with contextlib.suppress(ProcessLookupError), open(path) as file:
                os.killpg(int(file.read().split()[0]), signal.SIGKILL)
        shutil.rmtree(home)


def not_found(kind: str, name: str) -> None:
    fail(f"NOT_FOUND: Resource 'projects/p/locations/z/{kind}/{name}' was not found")


def node(verb: str, rest: list[str]) -> None:
    if verb == "describe":
        state = take("node")
        if state == "MISSING":
            not_found("nodes", rest[0])
        print(f"{state},{int(text('workers'))},{text('type')}")
    elif verb == "create":
        answer = take("create")
        put("node", "CREATING", "READY")
        put("type", flag(rest, "accelerator-type"))
        print(answer)
    elif verb == "delete":
        if text("node").splitlines()[0] == "MISSING":
            not_found("nodes", rest[0])
        put("node", "MISSING")
        wipe()
    elif verb == "list":
        print(text("others"), end="")


def queue(verb: str, rest: list[str]) -> None:
    if verb == "describe":
        state = take("queue")
        if state == "MISSING":
            not_found("queuedResources", rest[0])
        print(state)
    elif verb == "create":
        take("create")
        put("queue", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
        put("node", "MISSING", "CREATING", "READY")
        put("type", flag(rest, "accelerator-type"))
    elif verb == "delete":
        put("queue", "MISSING")
        put("node", "MISSING")
        wipe()


def home_of(arguments: list[str]) -> str:
    """The home of the one worker that ssh and scp speak to."""
    state = text("node").splitlines()[0]
    if state != "READY":
        fail(f"the TPU is in state {state}")
    if os.path.exists(f"{HERE}/ssh") and take("ssh") != "ok":
        fail("[/usr/bin/ssh] exited with return code [255].")
    home = f"{HERE}/worker-{int(flag(arguments, 'worker'))}"
    os.makedirs(home, exist_ok=True)
    return home


def ssh(rest: list[str], home: str) -> None:
    # gcloud splits the command at spaces and ssh joins the words again; the login shell reads that.
    command = " ".join(flag(rest, "command").split(" "))
    os.chdir(home)
    os.environ |= {"HOME": home, "STUB_WORKER": os.path.basename(home)}
    os.execvp("bash", ["bash", "-c", command])


def storage(verb: str, rest: list[str]) -> None:
    """ls, cp and rsync --recursive between `bucket/` and the working folder."""
    import shutil

    if os.path.exists(f"{HERE}/storage"):
        take("storage")
    paths = [a.replace("gs://", f"{HERE}/bucket/") for a in rest if not a.startswith("--")]
    if verb == "ls":
        if not os.path.exists(paths[0]):
            fail("One or more URLs matched no objects.")
        print(rest[0] if os.path.isfile(paths[0]) else f"{rest[0]}/..")
    elif verb == "cp":
        os.makedirs(os.path.dirname(paths[1]), exist_ok=True)
        shutil.copy(*paths)
    elif verb == "rsync":
        shutil.copytree(*paths, dirs_exist_ok=True)


def main(arguments: list[str]) -> None:
    with open(f"{HERE}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(f"{HERE}/calls", "a") as calls:
            calls.write(ascii(arguments) + "\n")
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
        import shutil

        shutil.copy(rest[0], os.path.join(home, rest[1].split(":", 1)[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
