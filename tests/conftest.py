"""What all tests share: where they run, where real data lies, and processes of their own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent

# Set before jax is imported: tolerances hold on the CPU, and no test has a network.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("w2s", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("w2s")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data (W2S_DATA, or ../shared/data); without it the test is skipped."""
    folder = Path(os.environ.get("W2S_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; set W2S_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Runs source in a fresh interpreter and returns its output: `run_python(code, devices=8)`."""

    def run(code: str, *, devices: int = 1, timeout: float = 300) -> str:
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run
