"""The benchmark of training end to end at a small size, and its wrong options."""

import json
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
from rich.console import Console

from w2s_jax.bench.config import TrainBenchConfig
from w2s_jax.bench.floor import measure_rates
from w2s_jax.bench.train import batch_of, check, job_of, report, run, shape, step_operations
from w2s_jax.errors import InputError

SMALL = {
    "layers": 1, "width": 64, "vocab": 64, "batch_size": 2, "length": 16, "prompt_tokens": 4,
    "repeats": 1,
}  # fmt: skip


def test_figures_are_printed_and_written(tmp_path, capsys, monkeypatch):
    """And an interpreter without TRL is told, where one was named."""
    # As quick as can be: what is looked at is what becomes of the rates.
    rates = partial(measure_rates, side=256, megabytes=4)
    monkeypatch.setattr("w2s_jax.bench.train.measure_rates", rates)
    path = tmp_path / "bench.json"
    named = {
        "objectives": ("dpo",),
        "lora_rank": 2,
        "trl": True,
        "trl_python": str(tmp_path / "none"),
    }
    figures = run(TrainBenchConfig(**SMALL, **named, json=str(path)), apart=False)
    written = json.loads(path.read_text())
    assert written["options"]["trl_python"] == named["trl_python"]
    assert set(written["own"]) == {"dpo"} == set(written["operations"])
    side = figures.own["dpo"]
    assert side.tokens_per_second == pytest.approx(32 / side.seconds)
    assert side.peak_bytes > 10_000_000
    assert side.first_loss == pytest.approx(0.693147, abs=1e-4)
    assert not figures.trl
    out = capsys.readouterr().out
    assert "of the matmul rate" in out
    assert "TRL was not measured" in out
    report(Console(), TrainBenchConfig(**SMALL), replace(figures, no_trl=None))
    assert "TRL was not measured" not in capsys.readouterr().out


@pytest.mark.slow
def test_each_objective_is_timed_in_a_process_of_its_own():
    figures = run(TrainBenchConfig(**SMALL))
    assert set(figures.own) == {"sft", "dpo"}
    assert all(side.peak_bytes > 10_000_000 for side in figures.own.values())


@pytest.mark.parity
@pytest.mark.skipif(not find_spec("trl"), reason="needs trl: pip install -e '.[test,parity]'")
@pytest.mark.parametrize(
    ("architecture", "objective", "more"),
    [("gpt2", "dpo", {}), ("llama", "sft", {"packed": True, "lora_rank": 4})],
)
def test_trl_is_given_the_same_model_and_rows(architecture, objective, more):
    asked = {"architecture": architecture, "objectives": (objective,)} | more
    figures = run(TrainBenchConfig(**SMALL | asked, trl=True, trl_python=sys.executable))
    assert list(figures.own) == [objective]
    for objective, own in figures.own.items():
        assert own.first_loss == pytest.approx(figures.trl[objective].first_loss, abs=1e-4)


def test_operations_follow_from_shapes():
    options = TrainBenchConfig(
        layers=2, width=64, vocab=100, batch_size=2, length=10, prompt_tokens=4
    )
    weights, tokens = 2 * 12 * 64 * 64, 20
    attention = 4 * 2 * 64 * tokens * 5
    head = 2 * 64 * 100 * 2
    config = shape(options)
    expected = 3 * (2 * weights * tokens + attention + head * 9)
    assert step_operations(options, config, "sft") == expected
    frozen = 2 * weights * tokens + head * 6
    expected = 4 * (frozen + attention)
    assert step_operations(options, config, "dpo") == expected
    # Each of a layer's six projections; frozen weights have no gradient.
    adapters = 2 * 2 * 3 * (6 * (64 + 64) + 2 * 3 * 64) * tokens
    expected = expected - frozen + 3 * adapters
    assert step_operations(replace(options, lora_rank=3), config, "dpo") == expected


def test_packed_rows_hold_documents_apart():
    options = TrainBenchConfig(**SMALL, objectives=("sft",), packed=True)
    rows = job_of(options, shape(options), "sft")["rows"][:2]
    batch = batch_of(rows, dpo=False)
    for row, segments, targets in zip(rows, batch["segments"], batch["targets"], strict=True):
        np.testing.assert_array_equal(segments, np.repeat([1, 2, 3, 4], row["seq_lengths"]))
        assert targets.sum() == 16 - 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 100), ("batch_size", 0), ("batch_size", 3), ("repeats", 0), ("length", 4),
        ("vocab", 2), ("objectives", ("kto",)), ("packed", True),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(field, value):
    with pytest.raises(InputError):
        check(TrainBenchConfig(**{**SMALL, field: value}))
