"""What all tests share: where they run, where real data lies, and processes of their own."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import settings

from tests.forks import run_forked
from tests.typechecking import check_shapes

ROOT = Path(__file__).parent.parent

# Most of the suite's time is the compiler's, which need not work hard for programs that run once.
XLA_FLAGS = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    # By the element-wise emitters small programs compile in half the time; later ones die of them.
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

check_shapes()

# Set before jax is imported: tolerances hold on the CPU, and no test has a network.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Tracing makes objects by the hundred thousand, few of them garbage.
gc.set_threshold(100_000, 20, 50)

MOST_MAPPINGS = 10_000
"""With so many a file of tests leaves its programs to nobody."""

settings.register_profile("w2s", deadline=None, derandomize=True, database=None, max_examples=25)
settings.load_profile("w2s")


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "tests marked accelerator run at toy size on the CPU"
    parser.addoption("--rehearse", action="store_true", help=told)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("accelerator") and not item.config.getoption("--rehearse"):
        import jax

        if jax.default_backend() == "cpu":
            pytest.skip("jax has no GPU or TPU here (JAX_PLATFORMS says which it may look for)")


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage need look at it again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Nor need pytest's own, five in a row, when all is over."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Lets go of compiled programs before they map as much memory as a process may.

    Each program takes several mappings; at Linux's 65,530 the process dies in LLVM. What few are
    left serve the next file: the many small programs of operations outside of any program.
    """
    yield
    if "jax" in sys.modules and _mappings() > MOST_MAPPINGS:
        sys.modules["jax"].clear_caches()
        gc.collect()


def _mappings() -> int:
    try:
        with open("/proc/self/maps", "rb") as file:
            return sum(1 for _ in file)
    except OSError:  # another system, whose limit is not known
        return MOST_MAPPINGS + 1


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data (W2S_DATA, or ../shared/data); without it the test is skipped."""
    folder = Path(os.environ.get("W2S_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; set W2S_DATA to its folder")
    return folder


def with_devices(count: int) -> str:
    """XLA_FLAGS of a process that has so many CPU devices."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Runs source in a process of its own and returns its output: `run_python(code, devices=8)`.

    On one device in a fresh interpreter; on several, or where asked for, in a fork of a process
    that has its imports done.
    """

    def run(code: str, *, devices: int = 1, forked: bool = False, timeout: float = 300) -> str:
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": with_devices(devices),
            "PYTHONPATH": str(ROOT),
        }
        if forked or devices > 1:
            return run_forked(code, env, ROOT, timeout)
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
