"""Sources that run one after another in one process: jax and a compiler start once for all."""

import contextlib
import gc
import io
import json
import sys
import traceback
from pathlib import Path


def run_all(path: str) -> None:
    """Run the sources by name that a JSON file holds, and print what each printed and raised."""
    done = {}
    for name, source in json.loads(Path(path).read_text()).items():
        print(f"at {name}", file=sys.stderr, flush=True)  # the last one, where the process dies
        printed, error = io.StringIO(), ""
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(source, name, "exec"), {"__name__": name})
        except BaseException:
            error = traceback.format_exc()[-4000:]
        done[name] = {"printed": printed.getvalue(), "error": error}
        if "jax" in sys.modules:
            sys.modules["jax"].clear_caches()
            gc.collect()
    print(json.dumps(done))
