import json
import struct
import sys
import types

import numpy as np
import pytest

from w2s_jax.errors import InputError
from w2s_jax.train import watch
from w2s_jax.train.losses import Mean
from w2s_jax.train.watch import (
    Meter,
    RowFile,
    cut_back,
    peak_flops,
    read_metrics,
    tensorboard,
    wandb,
)


@pytest.fixture
def clock(monkeypatch):
    held = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(watch.time, "monotonic", lambda: held.now)
    return held


def test_speed_counts_neither_the_first_step_nor_pauses(clock):
    meter = Meter(flops_per_token=6e9, peak=1e13)
    clock.now += 50.0  # compiling
    meter.add({"loss": 2.0, "num_tokens": 1000})
    for _ in range(3):
        clock.now += 2.0
        meter.add({"loss": 1.0, "num_tokens": 1000})
    with meter.paused():
        clock.now += 30.0
    row = meter.row()
    assert row == {
        "seconds": 86.0, "num_tokens": 4000, "loss": 1.25, "tokens_per_second": 500.0, "mfu": 0.3,
    }  # fmt: skip
    clock.now += 4.0
    meter.add({"loss": 1.0, "num_tokens": 1000})
    assert meter.row()["tokens_per_second"] == 250.0


def test_a_meter_goes_on_where_it_was_saved(clock):
    whole, first = Meter(), Meter()
    values = [0.1, 0.7, 1e-9, 0.3333333, 2 / 3]

    def step(value):
        margin = Mean(np.array([value, -0.5]), np.array([3.0, value < 0.5]))
        rare = Mean(np.float32(value), np.float32(value > 0.5))
        return {"loss": value, "num_tokens": 7, "margin": margin, "rare": rare}

    for meter in (whole, first):
        for value in values[:3]:
            meter.add(step(value))
    clock.now += 5.0
    second = Meter(json.loads(json.dumps(first.saved())))
    for meter in (whole, second):
        for value in values[3:]:
            meter.add(step(value))
    row = whole.row()
    row.pop("tokens_per_second")  # of one process alone
    assert second.row() == row
    assert row["loss"] == pytest.approx(sum(values) / 5, rel=1e-15)
    # Values and counts are summed, over steps of which some count nothing.
    assert row["margin"] == pytest.approx(sum(values) / 15 - 2.5 / 3, rel=1e-12)
    assert row["rare"] == pytest.approx(sum(values) / 2, rel=1e-6)
    assert (row["num_tokens"], row["seconds"]) == (35, 5.0)
    whole.add({"rare": Mean(0.0, 0.0)})
    assert "rare" not in whole.row()


def test_without_tokens_or_a_known_device_there_is_no_speed(clock):
    meter = Meter(flops_per_token=6e9, peak=None)
    for _ in range(2):
        clock.now += 1.0
        meter.add({"loss": 1.0})
    assert meter.row() == {"seconds": 2.0, "loss": 1.0}


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("NVIDIA L400", None),
    ],
)
def test_peaks_are_found_by_the_name_of_the_device(kind, peak):
    assert peak_flops(kind) == peak


def test_rows_are_cut_back_at_the_first_that_is_refused_or_torn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = RowFile(path)
    for step in (1, 2, 3):
        rows.write({"step": step, "text": "ä"})
    rows.close()
    assert [row["step"] for row in cut_back(path, lambda row: row["step"] < 3)] == [1, 2]
    whole = path.read_text()
    path.write_text(whole + '{"step": 3, "te')
    assert len(cut_back(path, lambda row: True)) == 2
    assert path.read_text() == whole
    path.write_text(whole + "7\n" + whole)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert cut_back(tmp_path / "none.jsonl", lambda row: True) == []
    assert (tmp_path / "none.jsonl").read_text() == ""


def events(folder):
    """(tag, step, value) of the scalars in a folder's TensorBoard files."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                yield value.tag, event.step, round(value.simple_value, 4)


def test_tensorboard_gets_every_value(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = tensorboard(tmp_path, 0)
    writer.write(10, {"loss": 0.5, "rewards/margins": 0.25})
    writer.write(20, {"loss": 0.4})
    writer.close()
    assert list(events(tmp_path / "tensorboard")) == [
        ("loss", 10, 0.5), ("rewards/margins", 10, 0.25), ("loss", 20, 0.4),
    ]  # fmt: skip
    writer = tensorboard(tmp_path, 10)  # another file, which makes what came after step 10 void
    writer.write(20, {"loss": 0.4})
    writer.close()
    assert len(list((tmp_path / "tensorboard").glob("events*"))) >= 1


class FakeRun:
    def __init__(self, options):
        self.options, self.id = options, options["id"] or "r1"
        self.logged, self.finished, self.axes = [], False, []

    def define_metric(self, *names, **options):
        self.axes.append((names, options))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    runs = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: runs.append(FakeRun(options)) or runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sink = wandb("guides", config={"beta": 0.1})
    writer = sink(tmp_path, 0)
    writer.write(10, {"loss": 0.5})
    writer.close()
    assert runs[0].options["project"] == "guides"
    assert runs[0].options["config"] == {"beta": 0.1}
    assert (runs[0].options["id"], runs[0].options["resume"]) == (None, None)
    assert runs[0].logged == [{"step": 10, "loss": 0.5}]
    assert runs[0].finished
    sink(tmp_path, 10)
    assert (runs[1].options["id"], runs[1].options["resume"]) == ("r1", "allow")
    sink(tmp_path, 0)  # begun anew: a run of its own
    assert runs[2].options["id"] is None


@pytest.mark.parametrize(("sink", "library"), [(tensorboard, "tensorboardX"), (wandb(), "wandb")])
def test_a_library_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, sink, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf"needs {library}; pip install 'w2s-jax\["):
        sink(tmp_path, 0)
