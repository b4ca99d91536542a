"""Search and evaluation by several processes, as by several hosts; and how they end together."""

import json
import signal
import time

import numpy as np
import pytest

from tests.cli.test_search import PROMPTS, tiny
from tests.conftest import ROOT
from tests.processes import MAIN, Hosts, run_hosts
from w2s_jax.cli.main import main
from w2s_jax.text.rows import read_jsonl, write_jsonl

pytestmark = pytest.mark.slow
MANY = [{"prompt": f"film {i} " + "We" * (i % 5), "id": i} for i in range(30)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Flags of a search over a short file of prompts, and the folder that holds everything."""
    place = tmp_path_factory.mktemp("files")
    write_jsonl(place / "in.jsonl", PROMPTS)
    write_jsonl(place / "many.jsonl", MANY)
    names = ("policy", "tuned", "untuned")
    models = [f"--{name}={tiny(place / name, seed)}" for seed, name in enumerate(names)]
    return models, place


def search(files, output, *flags, prompts="in"):
    models, place = files
    return [
        "search", *models, f"--prompts={place}/{prompts}.jsonl", f"--output={output}", "--w=2",
        "--k=2", "--l=3", "--n=3", "--max-new-tokens=8", "--batch-size=4", *flags,
    ]  # fmt: skip


def assert_same(found, expected):
    """Equal texts, and scores but for the order of float32 sums; no response is a near-tie here."""
    found, expected = read_jsonl(found), read_jsonl(expected)
    assert [row["response"] for row in found] == [row["response"] for row in expected]
    scores = [[h["score"] for row in rows for h in row["hypotheses"]] for rows in (found, expected)]
    np.testing.assert_allclose(*scores, rtol=1e-4, atol=5e-4)


def test_two_hosts_find_what_one_does_and_write_it_once(files, tmp_path):
    alone, together = tmp_path / "one.jsonl", tmp_path / "two" / "out.jsonl"
    assert main(search(files, alone)) == 0
    with Hosts(2, search(files, together, "--mesh=data=2,fsdp=2"), tmp_path) as hosts:
        assert hosts.statuses() == [0, 0]
        assert "7 rows, 7 of them" in hosts.said(0)
        assert "rows" not in hosts.said(1)
    assert_same(together, alone)
    assert [path.name for path in together.parent.iterdir()] == ["out.jsonl"]


def test_scores_of_texts_are_the_same_on_two_hosts(files, tmp_path, monkeypatch):
    (tmp_path / "lengths.py").write_text(
        "def of(prompts, responses):\n    return [len(text) / 9 for text in responses]\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = ["--score-on=text", "--stop=e", "--scorer=lengths:of", "--report=page.html"]
    alone, together = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert main(search(files, alone, *flags)) == 0
    (tmp_path / "page.html").unlink()
    assert run_hosts(2, search(files, together, *flags), tmp_path, devices=1) == [0, 0]
    assert_same(together, alone)
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_a_killed_host_ends_the_others_and_a_rerun_goes_on(files, tmp_path):
    arguments = search(files, tmp_path / "out.jsonl", "--max-new-tokens=24", prompts="many")
    journals = [tmp_path / f"out.jsonl{host}.journal" for host in ("", ".host1")]
    with Hosts(2, arguments, tmp_path, devices=1) as hosts:
        deadline = time.monotonic() + 120
        while not all(path.exists() and path.read_bytes().count(b"\n") > 2 for path in journals):
            assert hosts.alive
            assert time.monotonic() < deadline
            time.sleep(0.02)
        hosts.processes[0].send_signal(signal.SIGKILL)
        started = time.monotonic()
        statuses = hosts.statuses(90)
        assert time.monotonic() - started < 60
        assert statuses[0] == -signal.SIGKILL
        assert statuses[1] == 75
        last = hosts.said(1).splitlines()[-1]
        assert last.startswith("host 1: another host has died or cannot be reached")
        assert last.endswith("run the same command again on all hosts to go on")
    kept = {row for path in journals for row in open_ids(path)}
    assert 3 < len(kept) < len(MANY)
    with Hosts(1, arguments, tmp_path, devices=1) as hosts:
        assert hosts.statuses() == [0]
        assert f"{len(MANY)} rows, {len(MANY) - len(kept)} of them" in hosts.said(0)
    whole = tmp_path / "whole.jsonl"
    assert main(search(files, whole, "--max-new-tokens=24", prompts="many")) == 0
    assert_same(tmp_path / "out.jsonl", whole)
    assert not list(tmp_path.glob("*.journal"))


def open_ids(journal):
    return [json.loads(line)["row_id"] for line in journal.read_bytes().splitlines()[1:]]


def test_an_error_on_one_host_ends_all_with_its_line(files, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    write_jsonl(here / "in.jsonl", PROMPTS)
    arguments = search(files, "out.jsonl", "--prompts=in.jsonl")
    problem = "error: in.jsonl: cannot be read (No such file or directory)"
    with Hosts(2, arguments, tmp_path, devices=1, folders=[here, there]) as hosts:
        assert hosts.statuses(90) == [2, 2]
        assert f"host 0: stopped, as host 1 says: {problem}\n" in hosts.said(0)
        assert f"host 1: {problem}\n" in hosts.said(1)
    write_jsonl(there / "in.jsonl", PROMPTS[:-1])
    with Hosts(2, arguments, tmp_path, devices=1, folders=[here, there]) as hosts:
        assert hosts.statuses(90) == [2, 2]
        assert "host 1 has another search than host 0 (rows); start the same" in hosts.said(0)


OF_THREE = 'sys.argv[-1] = sys.argv[-1].replace(",2,1", ",3,1"); sys.exit'
OTHER_NUMBER = MAIN.replace("sys.exit", OF_THREE)


def test_hosts_that_count_themselves_differently_are_told(files, tmp_path):
    arguments = search(files, "out.jsonl")
    with Hosts(2, arguments, tmp_path, devices=1, code=OTHER_NUMBER) as hosts:
        assert hosts.statuses(90) == [2, 2]
        told = "host 1 has another command than host 0 (number of hosts); start the same"
        assert told in hosts.said(0) + hosts.said(1)


SLEEP = """
import sys, time
from w2s_jax.cli.multihost_launch import End, run_together
from w2s_jax.distributed import find_hosts
def sleep():
    print("up", flush=True)
    time.sleep(60)
    return End()
sys.exit(run_together(find_hosts(sys.argv[1].removeprefix("--hosts=")), sleep, heartbeat_seconds=4))
"""


def test_hosts_that_wait_for_nothing_end_too(tmp_path):
    with Hosts(2, [], tmp_path, devices=1, code=SLEEP) as hosts:
        while "up" not in hosts.said(0):
            assert hosts.alive
            time.sleep(0.05)
        time.sleep(1)
        hosts.processes[1].send_signal(signal.SIGKILL)
        assert hosts.processes[0].wait(30) == 75
        assert hosts.said(0).splitlines()[-1].startswith("host 0: another host has died")


EXCHANGE = """
import sys
from pathlib import Path
import numpy as np
from w2s_jax import distributed
from w2s_jax.errors import InputError
from w2s_jax.distributed import find_hosts, own_number, start_hosts

start_hosts(find_hosts(sys.argv[1].removeprefix("--hosts=")))
import jax
from jax.sharding import NamedSharding, PartitionSpec
host, count = own_number()
distributed.BLOCK = 1000
sizes = [0, 2500, 1000][:count]
assert distributed.gather_bytes(bytes([host]) * sizes[host]) == [
    bytes([i]) * size for i, size in enumerate(sizes)
]
assert distributed.gather_values({"host": host}) == [{"host": i} for i in range(count)]
like = np.zeros(3, np.float32)
def compute():
    assert host == 0
    return [1.5, 2.5, -1.0]
np.testing.assert_array_equal(distributed.from_first(compute, like), [1.5, 2.5, -1.0])
mesh = jax.make_mesh((2 * count,), ("data",))
values = np.arange(24.0, dtype=np.float32).reshape(12, 2)
split = jax.make_array_from_callback(
    values.shape, NamedSharding(mesh, PartitionSpec("data")), values.__getitem__
)
tree = distributed.to_host({"split": split, "plain": np.ones(2), "local": jax.numpy.ones(3)})
np.testing.assert_array_equal(tree["split"], values)
np.testing.assert_array_equal(distributed.everywhere(values, mesh).addressable_data(1), values)
distributed.agree("run", {"a": 1, "b": [2]})
try:
    distributed.agree("run", {"a": 1, "b": [host == 2]})
except InputError as error:
    assert str(error).startswith("host 2 has another run than host 0 (b)"), error
else:
    raise AssertionError("hosts differ")
distributed.check_shared(Path("."))
try:
    distributed.check_shared(Path(f"own{host}"), seconds=1)
except InputError as error:
    assert "host 1 does not see what host 0 writes there" in str(error), error
else:
    raise AssertionError("the folders differ")
"""


def test_what_hosts_tell_one_another(tmp_path):
    with Hosts(3, [], tmp_path, code=EXCHANGE) as hosts:
        assert hosts.statuses(120) == [0] * 3
    assert not list(tmp_path.glob("**/.hosts-*"))


def test_two_hosts_reward_what_one_does(files, tmp_path):
    rows = [{"prompt": "A film", "response": " good" * (1 + i % 3) + " bad" * i} for i in range(7)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    gold = ROOT / "w2s_jax" / "demo" / "assets" / "gold"

    def evaluate(name):
        return [
            "eval", "--results", str(tmp_path / "rows.jsonl"), f"--reward-model={gold}",
            f"--output={tmp_path}/{name}.jsonl", f"--json={tmp_path}/{name}.json",
            "--batch-size=4",
        ]  # fmt: skip

    assert main(evaluate("one")) == 0
    assert run_hosts(2, evaluate("two"), tmp_path) == [0, 0]
    found, expected = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("two", "one"))
    values = [[row["gold_reward"] for row in rows] for rows in (found, expected)]
    np.testing.assert_allclose(*values, atol=1e-4)
    figures = [json.loads((tmp_path / f"{n}.json").read_text())["results"] for n in ("two", "one")]
    assert figures[0]["reward"] == pytest.approx(figures[1]["reward"], abs=1e-4)


def test_two_hosts_choose_one_mesh(files, tmp_path):
    alone, together = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert main(search(files, alone)) == 0
    with Hosts(2, search(files, together, "--mesh=auto"), tmp_path) as hosts:
        assert hosts.statuses() == [0, 0]
        assert ", for 4 devices (cpu)" in hosts.said(0)
        assert "--mesh auto" not in hosts.said(1)
    assert_same(together, alone)


OTHER_MESH = """
import sys
host = sys.argv[-1][-1]
sys.argv = [one.replace("auto", "data=-1") if host == "1" else one for one in sys.argv]
from w2s_jax.cli.main import main; sys.exit(main())
"""
FEWER_DEVICES = """
import os, sys
host = sys.argv[-1][-1]
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={3 - int(host)}"
from w2s_jax.cli.main import main; sys.exit(main())
"""


@pytest.mark.parametrize(
    ("code", "told"),
    [(OTHER_MESH, "host 1 has another command than host 0 (--mesh); start the same command on all"),
     (FEWER_DEVICES,
      "hosts must have as many devices as one another, and host 0 has 3, host 1 has 2")],
)  # fmt: skip
def test_hosts_of_other_meshes_or_devices_are_told(files, tmp_path, code, told):
    arguments = search(files, tmp_path / "out.jsonl", "--mesh=auto")
    with Hosts(2, arguments, tmp_path, code=code) as hosts:
        assert hosts.statuses(90) == [2, 2]
        assert told in hosts.said(0) + hosts.said(1)
        assert "Traceback" not in hosts.said(0) + hosts.said(1)
