"""What `.ci/accelerator` runs, in one process: parts with a time limit each, told in a JSON file.

    python .ci/accelerator.py FOLDER [--rehearse]

Where FOLDER/accelerator.json tells of parts already, those that it lacks are run. Exit status 0:
all passed; 2: there is no accelerator; 3: some failed. With any other the process died in a part,
and another start goes on behind it.
"""

import faulthandler
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

TOLD = "accelerator.json"
VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
PATIENCE = 6
"""A rehearsal has so many times a part's limit: its CPU may be busy with other work."""
PASSED, FAILED, RUNNING, STOPPED = "passed", "failed", "running", "stopped"


@dataclass(frozen=True)
class Part:
    """A piece of the work: `run(rehearse, tell)` gives figures, and may tell some on its way."""

    name: str
    seconds: float
    run: Callable[[bool, Callable[[Any], None]], Any]


class Record:
    """The JSON file: whatever is told is there at once, so that it outlives the process."""

    def __init__(self, path: Path):
        self.path = path
        self.told: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"parts": {}}
        for name, part in self.told["parts"].items():
            if part["status"] == RUNNING:
                error = f"the process ended within it; its limit is {part['limit']:.0f} seconds"
                self.tell(name, status=STOPPED, error=error)

    def tell(self, part: str, **fields: Any) -> None:
        """Set fields of a part."""
        self.told["parts"].setdefault(part, {}).update(fields)
        self.write()

    def write(self) -> None:
        """Write the file."""
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.told, indent=2) + "\n")
        unfinished.replace(self.path)

    @property
    def passed(self) -> bool:
        """Whether every part passed."""
        return all(part["status"] == PASSED for part in self.told["parts"].values())


def run_parts(parts: tuple[Part, ...], record: Record, *, rehearse: bool) -> None:
    """Run the parts that the record does not tell of; none keeps the others from running.

    At its limit a part ends the process, since nothing else stops a compiler or a device.
    """
    for part in parts:
        if part.name in record.told["parts"]:
            continue
        sys.stdout.write(f"=== {part.name}\n")
        start = time.perf_counter()
        limit = part.seconds * (PATIENCE if rehearse else 1)
        record.tell(part.name, status=RUNNING, limit=limit)

        def tell(figures: Any, name: str = part.name) -> None:
            record.tell(name, figures=figures)

        faulthandler.dump_traceback_later(limit, exit=True)
        try:
            tell(part.run(rehearse, tell))
            fields = {"status": PASSED}
        except Exception as error:
            traceback.print_exc()
            fields = {"status": FAILED, "error": f"{type(error).__name__}: {error}"[:2000]}
        faulthandler.cancel_dump_traceback_later()
        record.tell(part.name, **fields, seconds=round(time.perf_counter() - start, 2))
        gc.collect()


def tests(rehearse: bool, tell: Callable[[Any], None]) -> Any:
    """`pytest -m accelerator`, test by test."""
    import pytest

    found: list[dict[str, Any]] = []

    class Plugin:
        @staticmethod
        def pytest_runtest_logreport(report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                one = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
                if report.outcome != "passed":
                    one["told"] = str(report.longrepr)[-1500:]
                found.append(one)
                tell(found)

    # Without the checks of types, since what is measured behind them is the same process. Its own
    # alarm of hanging tests would take the place of this part's.
    options = ["-o", "addopts=--import-mode=importlib", "-p", "no:faulthandler", "-q"]
    options += ["-p", "no:cacheprovider", "-m", "accelerator", "tests/accelerator"]
    status = pytest.main([*options, *(["--rehearse"] if rehearse else [])], plugins=[Plugin()])
    if status != 0:
        raise RuntimeError(f"pytest ended with status {int(status)}")
    return found


def search(rehearse: bool, tell: Callable[[Any], None]) -> Any:
    """`w2s bench search`: an 8B policy with 1B guides, 4 slots of 16 rows."""
    from w2s_jax.bench import search as bench
    from w2s_jax.bench.config import SearchBenchConfig

    if rehearse:
        options = SearchBenchConfig(
            policy_layers=1, policy_width=64, guide_layers=1, guide_width=64, vocab=64,
            beam_width=2, successors=2, chunk_length=2, max_new_tokens=4, prompt_tokens=5,
            batch_size=2, repeats=1,
        )  # fmt: skip
    else:
        options = SearchBenchConfig(
            shape="llama-8b", dtype="bfloat16", batch_size=4, prompt_tokens=512, repeats=3
        )
    (figures,) = bench.run(options)
    return {"options": asdict(options), **asdict(figures)}


def decoding(rehearse: bool, tell: Callable[[Any], None]) -> Any:
    """`w2s bench generate`: plain decoding of as many rows, by transformers as well."""
    from w2s_jax.bench import decoding as bench
    from w2s_jax.bench.config import GenerateBenchConfig

    if rehearse:
        options = GenerateBenchConfig(
            architecture="llama", layers=1, width=64, vocab=64, batch_size=2, samples=2,
            prompt_tokens=5, max_new_tokens=4, repeats=1, compare=("generate",),
        )  # fmt: skip
    else:
        options = GenerateBenchConfig(
            shape="llama-8b", dtype="bfloat16", batch_size=4, prompt_tokens=512,
            compare=("generate",), compare_seconds=55,
        )  # fmt: skip
    (figures,) = bench.run(options)
    return {"options": asdict(options), **asdict(figures)}


def training(rehearse: bool, tell: Callable[[Any], None]) -> Any:
    """`w2s bench train`: SFT of a 1B model, all parameters; its share of the published rate."""
    import jax

    from w2s_jax.bench import train as bench
    from w2s_jax.bench.config import TrainBenchConfig
    from w2s_jax.plan.topology import CHIPS

    if rehearse:
        options = TrainBenchConfig(
            ("sft",), architecture="llama", layers=1, width=64, vocab=64, batch_size=2, length=16,
            prompt_tokens=4, repeats=1,
        )  # fmt: skip
    else:
        options = TrainBenchConfig(
            ("sft",), shape="llama-1b", dtype="bfloat16", batch_size=8, length=1024, repeats=3,
        )  # fmt: skip
    figures = bench.run(options, apart=False)
    rate = figures.operations["sft"] / figures.own["sft"].seconds
    kind = jax.devices()[0].device_kind
    published = [chip.operations for chip in CHIPS.values() if kind in chip.kinds]
    shares = {"of_measured_rate": figures.share("sft")}
    if published:
        shares["mfu"] = rate / published[0]
        sys.stdout.write(f"MFU {shares['mfu']:.1%}, of {published[0] / 1e12:.0f} TFLOP/s\n")
    return {"options": asdict(options), **asdict(figures), "shares": shares}


# Limits add up to less than eight minutes.
PARTS = (
    Part("tests", 150, tests),
    Part("search", 150, search),
    Part("decoding", 90, decoding),
    Part("training", 75, training),
)


def machine() -> dict[str, Any]:
    """What the figures are of."""
    import jax

    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "python": sys.version.split()[0],
        "versions": versions,
    }


def main() -> int:
    """Run what is left of the parts; the exit status."""
    folder, rehearse = Path(sys.argv[1]), "--rehearse" in sys.argv[2:]
    here = machine()
    if here["platform"] == "cpu" and not rehearse:
        sys.stderr.write(
            "error: jax finds no GPU or TPU here; .ci/accelerator --rehearse does the same on the "
            "CPU at toy size\n"
        )
        return 2
    record = Record(folder / TOLD)
    record.told |= {"rehearsal": rehearse, **here}
    run_parts(PARTS, record, rehearse=rehearse)
    for name, part in record.told["parts"].items():
        line = f"{name:9} {part['status']:8} {part.get('seconds', part['limit']):7.1f} s"
        sys.stdout.write(
            f"{line}  {part.get('error', '').splitlines()[0] if 'error' in part else ''}\n"
        )
    sys.stdout.write(f"{record.path}\n")
    return 0 if record.passed else 3


if __name__ == "__main__":
    sys.exit(main())
