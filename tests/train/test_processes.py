"""Training by several processes, as by several hosts, each with two virtual devices."""

import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.cli.test_search import tiny
from tests.processes import Hosts, run_hosts
from w2s_jax.text.rows import write_jsonl
from w2s_jax.train.checkpoint import steps_on_disk
from w2s_jax.train.loop import read_metrics

pytestmark = pytest.mark.slow

PAIRS = [
    {"prompt": f"film {i} was", "chosen": " good" * (1 + i % 5), "rejected": " bad" * (1 + i % 3)}
    for i in range(48)
]
TIMES = {"seconds", "tokens_per_second", "mfu"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("files")
    write_jsonl(place / "pairs.jsonl", PAIRS)
    texts = [{"text": row["prompt"] + row["chosen"]} for row in PAIRS]
    write_jsonl(place / "texts.jsonl", texts)
    return tiny(place / "model", 0, kv_heads=2), place / "pairs.jsonl"


def rows(directory):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(directory)]


def assert_close(found, expected):
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for one, other in zip(found, expected, strict=True):
        for name in one:
            if name == "rewards/accuracies" and one["step"] == 1:
                continue  # before the first update margins are zero but for rounding
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=2e-5, err_msg=name)


def run(arguments):
    """In a process of its own, as the others run."""
    return f"import sys; from w2s_jax.cli.main import main; sys.exit(main({arguments!r}))"


def dpo(files, output, *flags):
    model, pairs = files
    return [
        "dpo", f"--model={model}", f"--data={pairs}", f"--output={output}", "--batch-size=8",
        "--log-every=1", "--optimizer=sgd", "--learning-rate=1e-3", "--held-out=8",
        "--eval-every=5", *flags,
    ]  # fmt: skip


def sft(files, output, *flags):
    """Of so small a step that rounding, which differs between meshes, does not grow by adamw."""
    model, pairs = files
    return [
        "sft", f"--model={model}", f"--data={pairs.with_name('texts.jsonl')}",
        f"--output={output}", "--batch-size=8", "--log-every=1", "--optimizer=adamw",
        "--learning-rate=1e-4", "--held-out=8", "--lora-rank=2", *flags,
    ]  # fmt: skip


def await_steps(hosts, output, count):
    deadline = time.monotonic() + 120
    while len(read_metrics(output)) < count:
        assert time.monotonic() < deadline, "no step was logged"
        assert hosts.alive
        time.sleep(0.05)


def assert_same_weights(found, expected):
    names = ("model.safetensors", "adapter_model.safetensors")
    one, other = (
        load_file(next(p for p in (folder / "model").iterdir() if p.name in names))
        for folder in (found, expected)
    )
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_two_hosts_train_what_one_does_and_write_it_once(files, tmp_path, run_python):
    run_python(run(dpo(files, tmp_path / "one", "--epochs=2")))
    output = tmp_path / "two"
    with Hosts(2, dpo(files, output, "--epochs=2", "--mesh=fsdp=4"), tmp_path) as hosts:
        assert hosts.statuses() == [0, 0]
        assert f"step 10 written to {output}/model" in hosts.said(0)
        assert "step" not in hosts.said(1)
    assert_close(rows(output), rows(tmp_path / "one"))
    assert steps_on_disk(output / "checkpoints") == [10]
    assert_same_weights(output, tmp_path / "one")


def test_one_told_host_stops_both_at_the_same_step_and_one_process_goes_on(
    files, tmp_path, run_python
):
    run_python(run(dpo(files, tmp_path / "one", "--epochs=12")))
    output = tmp_path / "two"
    arguments = dpo(files, output, "--epochs=12")
    with Hosts(2, [*arguments, "--mesh=fsdp=4"], tmp_path) as hosts:
        await_steps(hosts, output, 5)
        hosts.processes[1].send_signal(signal.SIGTERM)
        assert hosts.statuses() == [75, 75]
        saved = max(steps_on_disk(output / "checkpoints"))
        assert 5 <= saved < 60
        assert f"stopped after step {saved}, which is saved" in hosts.said(0)
    run_python(run(arguments))
    assert_close(rows(output), rows(tmp_path / "one"))


def test_four_hosts_of_which_one_dies_then_two_go_on(files, tmp_path, run_python):
    """With a tensor axis that reaches over hosts, so that two read the same rows."""
    run_python(run(sft(files, tmp_path / "one", "--epochs=5", "--save-every=2")))
    output = tmp_path / "many"
    arguments = sft(files, output, "--epochs=5", "--save-every=2")
    with Hosts(4, [*arguments, "--mesh=data=2,tensor=2"], tmp_path, devices=1) as hosts:
        await_steps(hosts, output, 7)
        hosts.processes[2].send_signal(signal.SIGKILL)
        statuses = hosts.statuses(120)
        assert statuses[2] == -signal.SIGKILL
        assert {statuses[host] for host in (0, 1, 3)} == {75}
        assert "another host has died" in hosts.said(0)
    assert run_hosts(2, [*arguments, "--mesh=fsdp=4"], tmp_path) == [0, 0]
    assert_close(rows(output), rows(tmp_path / "one"))
    assert_same_weights(output, tmp_path / "one")
