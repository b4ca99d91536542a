"""Wheels for an accelerator machine that has no network: which it lacks, and packing them.

    python .ci/wheels.py pack FOLDER      download them into FOLDER (needs a package index)
    python .ci/wheels.py lacking FOLDER   names of those in FOLDER that this interpreter lacks

What such a machine has is `HELD`; what is needed follows from pyproject.toml and from the wheels.
"""

import subprocess
import sys
import tomllib
from email import message_from_bytes
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYTHON = "3.12"
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64")
MEGABYTES = 60
# What tests import beside the package; what only servers and plots need stays away.
FOR_TESTS = ("beartype", "hypothesis", "jaxtyping", "pytest", "pytest-xdist")
# fmt: off
HELD = frozenset((
    "absl-py", "aiohttp", "anyio", "attrs", "certifi", "charset-normalizer", "chex", "click",
    "etils", "execnet", "filelock", "flax", "fsspec", "h11", "hf-xet", "httpcore", "httpx",
    "huggingface-hub", "humanize", "hypothesis", "idna", "iniconfig", "jax", "jaxlib",
    "jaxtyping", "jinja2", "markdown-it-py", "markupsafe", "mdurl", "ml-dtypes", "mpmath",
    "msgpack", "multidict", "numpy", "opt-einsum", "optax", "orbax-checkpoint", "packaging",
    "pandas", "peft", "pluggy", "propcache", "protobuf", "psutil", "pyarrow", "pygments",
    "pytest", "python-dateutil", "pyyaml", "regex", "requests", "rich", "safetensors",
    "scipy", "sentencepiece", "setuptools", "shellingham", "simplejson", "six",
    "sortedcontainers", "sympy", "tensorstore", "tokenizers", "toolz", "torch", "tqdm",
    "transformers", "treescope", "typer", "typing-extensions", "urllib3", "wadler-lindig",
    "xxhash", "yarl", "zipp",
))
# fmt: on


def main() -> int:
    """Run the command that the arguments name; its exit status."""
    command, folder = sys.argv[1], Path(sys.argv[2])
    if command == "lacking":
        sys.stdout.write(" ".join(lacking(folder)) + "\n")
        return 0
    return pack(folder)


def lacking(folder: Path) -> list[str]:
    """Names of the distributions in a folder of wheels that this interpreter has not."""
    names = sorted({wheel.name.split("-")[0] for wheel in folder.glob("*.whl")})
    return [name for name in names if not _is_here(name)]


def _is_here(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def pack(folder: Path) -> int:
    """Download what is needed and not held, with what that needs in turn; the exit status."""
    for old in folder.glob("*.whl"):
        old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    found: dict[str, Path] = {}
    stated = wanted = _applying([*project["dependencies"], *FOR_TESTS])
    while missing := [one for one in wanted if canonicalize_name(one.name) not in found]:
        _download(missing, folder)
        wheels = {canonicalize_name(one.name.split("-")[0]): one for one in folder.glob("*.whl")}
        new = [wheels[name] for name in wheels.keys() - found.keys()]
        found = wheels
        wanted = _applying([need for wheel in new for need in _needs(wheel)])
        stated = [*stated, *wanted]
    for one in stated:
        wheel = found[canonicalize_name(one.name)]
        if not one.specifier.contains(wheel.name.split("-")[1], prereleases=True):
            sys.stderr.write(f"{wheel.name} does not satisfy {one}\n")
            return 1
    size = sum(wheel.stat().st_size for wheel in found.values()) / 1e6
    for wheel in sorted(found.values()):
        sys.stdout.write(f"{wheel.stat().st_size / 1e6:8.2f} MB  {wheel.name}\n")
    sys.stdout.write(f"{size:8.2f} MB in {folder}, of at most {MEGABYTES}\n")
    return int(size > MEGABYTES)


def _applying(requirements: list[str]) -> list[Requirement]:
    """Those that hold on the machine and that it does not satisfy by what it has."""
    version = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0"}
    there = version | {"sys_platform": "linux", "platform_system": "Linux", "extra": ""}
    read = [Requirement(one) for one in requirements]
    return [
        one
        for one in read
        if canonicalize_name(one.name) not in HELD
        and (one.marker is None or one.marker.evaluate(there))
    ]


def _download(requirements: list[Requirement], folder: Path) -> None:
    """Wheels for the machine; of what comes as source alone, one is built."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    platforms = [word for one in PLATFORMS for word in ("--platform", one)]
    only = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    fetch = [*pip, "download", "--no-deps", *only, *platforms, "--dest", str(folder)]
    named = [f"{one.name}{one.specifier}" for one in requirements]
    if subprocess.run([*fetch, *named], check=False).returncode == 0:
        return
    for one in named:
        if subprocess.run([*fetch, one], check=False).returncode:
            build = [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), one]
            subprocess.run(build, check=True)


def _needs(wheel: Path) -> list[str]:
    """The requirements that a wheel states."""
    with ZipFile(wheel) as file:
        (path,) = (one for one in file.namelist() if one.endswith(".dist-info/METADATA"))
        stated = message_from_bytes(file.read(path)).get_all("Requires-Dist")
    return list(stated or ())


if __name__ == "__main__":
    sys.exit(main())
