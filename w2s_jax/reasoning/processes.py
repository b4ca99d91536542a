"""Modules run in processes of their own, which stop when this one is asked to and die with it.

    python -m w2s_jax.reasoning.processes PARENT MODULE [ARGUMENT ..]

is such a process. What the modules do is their own matter.
"""

import os
import runpy
import signal
import subprocess
import sys

from w2s_jax.errors import InputError

STOPPED = (75, 130, -signal.SIGINT, -signal.SIGTERM)
"""Statuses of a process that was asked to stop; 75 says that what it did is saved."""
_PR_SET_PDEATHSIG = 1


def run_module(module: str, *arguments: str, hint: str = "see its message") -> None:
    """Run `python -m MODULE ARGUMENTS` to its end; what it says goes to this process's stderr.

    SIGINT and SIGTERM are handed on, and the process is waited for; a second SIGINT kills it. On
    Linux it is killed when this process dies in whatever way. Raises KeyboardInterrupt where it
    was stopped, and InputError, which ends with `hint`, where it fails.
    """
    from w2s_jax.train.stopping import Stop

    words = [sys.executable, "-m", "w2s_jax.reasoning.processes", str(os.getpid()), module]
    with Stop() as stop, subprocess.Popen([*words, *arguments], stdout=2) as child:
        told = False
        try:
            while _running(child):
                if stop.asked and not told:
                    told = True
                    child.terminate()
        except BaseException:
            child.kill()
            raise
    if stop.asked or child.returncode in STOPPED:
        raise KeyboardInterrupt
    if child.returncode:
        call = " ".join(("python -m", module, *arguments)).replace("python -m w2s_jax ", "w2s ")
        raise InputError(f"`{call}` ended with status {child.returncode}; {hint}")


def _running(child: "subprocess.Popen[bytes]") -> bool:
    try:
        child.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return True
    return False


def die_with(parent: int) -> None:
    """Have this process killed when the process `parent`, which started it, ends (Linux alone)."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def main(arguments: list[str]) -> None:
    """Run a module as the process that `run_module` starts."""
    parent, module, *rest = arguments
    die_with(int(parent))
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
