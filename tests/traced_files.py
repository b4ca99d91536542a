"""Which files of the package three jobs enter: `python -m tests.traced_files`.

A file counts where the body of one of its functions is entered after imports; `__init__.py` and
modules of configs (`config.py`, `settings.py`) are left out. Each job runs on tiny models, in this
one process.
"""

import contextlib
import io
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tests.cli.test_search import SMALL, tiny
from w2s_jax.cli.main import main as w2s
from w2s_jax.models.load import load_model
from w2s_jax.text.rows import write_jsonl

PACKAGE = Path(__file__).parent.parent / "w2s_jax"
LEFT_OUT = ("__init__.py", "config.py", "settings.py")


@contextlib.contextmanager
def entered() -> Iterator[set[str]]:
    """The files whose functions are entered, in any thread, by their paths in the package."""
    found: set[str] = set()
    root = f"{PACKAGE}/"

    def see(frame, event, argument):
        code = frame.f_code
        # Bodies of modules and classes run at import.
        if code.co_filename.startswith(root) and code.co_flags & 0x02 and not _importing(frame):
            found.add(code.co_filename.removeprefix(root))

    threading.setprofile(see)
    sys.setprofile(see)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        for name in {name for name in found if name.endswith(LEFT_OUT)}:
            found.discard(name)


def _importing(frame) -> bool:
    """Whether a frame is of what a module does while it is imported."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") != "__main__":
            return True
        frame = frame.f_back
    return False


def search_job(folder: Path) -> Callable[[], object]:
    """`w2s search` from the command to its output."""
    roles = ("policy", "tuned", "untuned")
    flags = [f"--{role}={tiny(folder / role, seed)}" for seed, role in enumerate(roles)]
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "A film"}])
    files = [f"--prompts={folder}/prompts.jsonl", f"--output={folder}/out.jsonl"]
    return lambda: w2s(["search", *flags, *files, *SMALL])


def logits_job(folder: Path) -> Callable[[], object]:
    """From a safetensors file to logits."""
    path = tiny(folder / "model", 0)
    tokens = np.zeros((1, 4), np.int32)
    return lambda: load_model(path)(tokens)


def dpo_job(folder: Path) -> Callable[[], object]:
    """From a preference file to a DPO loss, and the model that is written."""
    path = tiny(folder / "base", 0)
    pair = {"prompt": "A", "chosen": " film", "rejected": " sea"}
    write_jsonl(folder / "pairs.jsonl", [pair] * 4)
    files = [f"--model={path}", f"--data={folder}/pairs.jsonl", f"--output={folder}/run"]
    return lambda: w2s(["dpo", *files, "--batch-size=4", "--max-steps=1"])


JOBS = {"search": search_job, "logits": logits_job, "dpo": dpo_job}


def files_of(job: str) -> set[str]:
    """The files that a job enters."""
    with tempfile.TemporaryDirectory() as scratch:
        run = JOBS[job](Path(scratch))
        with contextlib.redirect_stdout(io.StringIO()), entered() as found:
            status = run()
        assert not isinstance(status, int) or status == 0
    return found


def main() -> None:
    """Print a line for each job."""
    for name in JOBS:
        files = files_of(name)
        print(f"{name}: {len(files)} files: {' '.join(sorted(files))}")


if __name__ == "__main__":
    main()
