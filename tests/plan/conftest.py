"""What tests that compile for other machines share: their marks, and one process for many cases."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NEEDS_LIBTPU = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("libtpu"), reason="needs libtpu, the TPU compiler"
    ),
]


@pytest.fixture(scope="session")
def run_together(
    run_python: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Callable[[str], str]]:
    """Runs sources by name in one fresh interpreter: `printed = run_together({name: source})`.

    `printed(name)` is what one printed; it fails with what the source raised.
    """

    def run(sources: dict[str, str], *, timeout: float = 1800) -> Callable[[str], str]:
        path = tmp_path_factory.mktemp("together") / "sources.json"
        path.write_text(json.dumps(sources))
        code = f"from tests.plan.together import run_all\nrun_all({str(path)!r})"
        done: dict[str, Any] = json.loads(run_python(code, timeout=timeout).splitlines()[-1])

        def printed(name: str) -> str:
            assert not done[name]["error"], done[name]["error"]
            return done[name]["printed"]

        return printed

    return run


@pytest.fixture(scope="module")
def module_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the tests of a file share."""
    return tmp_path_factory.mktemp("shared")
