"""Training by several processes, as by several hosts, each with two virtual devices."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.cli.test_search import tiny
from tests.conftest import ROOT
from w2s_jax.text.rows import write_jsonl
from w2s_jax.train.loop import read_metrics
from w2s_jax.train.manifest import steps_on_disk

pytestmark = pytest.mark.slow

HOST = """
import sys
import jax
address, hosts, host, arguments = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
jax.distributed.initialize(address, hosts, host)
assert jax.device_count() == 2 * hosts
from w2s_jax.cli.main import main
sys.exit(main(arguments))
"""
PAIRS = [
    {"prompt": f"film {i} was", "chosen": " good" * (1 + i % 5), "rejected": " bad" * (1 + i % 3)}
    for i in range(48)
]
TIMES = {"seconds", "tokens_per_second", "mfu"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("files")
    write_jsonl(place / "pairs.jsonl", PAIRS)
    return tiny(place / "model", 0), place / "pairs.jsonl"


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def start(hosts, arguments, tmp_path, *, devices=2):
    """One process for each host; what each says goes to a file of its own."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    address = f"127.0.0.1:{free_port()}"
    for host in range(hosts):
        with (tmp_path / f"host{host}.log").open("w") as log:
            yield subprocess.Popen(
                [sys.executable, "-c", HOST, address, str(hosts), str(host), *arguments],
                env=env,
                cwd=tmp_path,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


def ended(processes, tmp_path, seconds=240):
    """Exit statuses of all processes; none is left behind."""
    try:
        return [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
        for log in sorted(tmp_path.glob("host*.log")):
            print(log.name, log.read_text()[-3000:])


def rows(directory):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(directory)]


def assert_close(found, expected):
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for one, other in zip(found, expected, strict=True):
        for name in one:
            if name == "rewards/accuracies" and one["step"] == 1:
                continue  # before the first update margins are zero but for rounding
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=2e-5, err_msg=name)


def dpo(files, output, *flags):
    model, pairs = files
    return [
        "dpo", f"--model={model}", f"--data={pairs}", f"--output={output}", "--batch-size=8",
        "--log-every=1", "--optimizer=sgd", "--learning-rate=1e-3", "--held-out=8",
        "--eval-every=5", *flags,
    ]  # fmt: skip


def test_two_hosts_train_what_one_does_and_write_it_once(files, tmp_path, run_python):
    alone = dpo(files, tmp_path / "one", "--epochs=2")
    run_python(f"import sys; from w2s_jax.cli.main import main; sys.exit(main({alone!r}))")
    arguments = dpo(files, tmp_path / "two", "--epochs=2", "--mesh=data=2,fsdp=2")
    assert ended(list(start(2, arguments, tmp_path)), tmp_path) == [0, 0]
    assert_close(rows(tmp_path / "two"), rows(tmp_path / "one"))
    assert steps_on_disk(tmp_path / "two" / "checkpoints") == [10]
    assert (tmp_path / "two" / "model" / "model.safetensors").exists()


def test_one_told_host_stops_both_at_the_same_step_and_one_process_goes_on(
    files, tmp_path, run_python
):
    alone = dpo(files, tmp_path / "one", "--epochs=12")
    run_python(f"import sys; from w2s_jax.cli.main import main; sys.exit(main({alone!r}))")
    output = tmp_path / "two"
    arguments = dpo(files, output, "--epochs=12")
    processes = list(start(2, [*arguments, "--mesh=fsdp=4"], tmp_path))
    deadline = time.monotonic() + 120
    while len(read_metrics(output) if (output / "metrics.jsonl").exists() else []) < 5:
        assert time.monotonic() < deadline, "no step was logged"
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    assert ended(processes, tmp_path) == [75, 75]
    saved = max(steps_on_disk(output / "checkpoints"))
    assert 5 <= saved < 60
    run_python(f"import sys; from w2s_jax.cli.main import main; sys.exit(main({arguments!r}))")
    assert_close(rows(output), rows(tmp_path / "one"))
