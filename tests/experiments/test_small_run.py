"""The small run's data, stages and table; the run itself is for its own command."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from w2s_jax.errors import InputError
from w2s_jax.experiments import small_run
from w2s_jax.experiments.small_run import SIZES, SmallRun, main, over_runs, table
from w2s_jax.models.load import load_config
from w2s_jax.reasoning.config import ReasonConfig
from w2s_jax.reasoning.stages import run_stages
from w2s_jax.text.rows import read_jsonl
from w2s_jax.text.typed_yaml import from_mapping


def report(weak, hybrid, ceiling):
    values = {"weak": weak, "iteration-1-hybrid": hybrid, "ceiling": ceiling}
    part = {"name": "weak", "size": 10 * ceiling, "accuracy": {"value": hybrid}}
    return {
        "models": {name: {"value": value} for name, value in values.items()},
        "data": {
            "iteration-1-sets": {"sets": [part]},
            "weak-responses": {"rows": 4, "answered": 4, "accuracy": {"value": weak}},
            "weak-model": {"rows": 9},
        },
    }


def test_the_table_holds_means_and_intervals_over_seeds():
    found = over_runs([report(0.2, 0.3, 0.4), report(0.2, 0.4, 0.6), report(0.2, 0.5, 0.8)])
    row = found["models"]["iteration-1-hybrid"]
    assert row["by_seed"] == [0.3, 0.4, 0.5]
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # t of 2 degrees of freedom
    assert row["accuracy"]["low"] == pytest.approx(0.4 - half)
    assert row["gap_recovered"]["mean"] == pytest.approx(0.5)
    assert found["models"]["weak"]["gap_recovered"] is None
    assert found["sets"]["iteration-1-sets: weak"] == pytest.approx({"size": 6, "accuracy": 0.4})
    text = table(found)
    assert "| stage I, iteration 1, hybrid | 40.0 % | 15.2 – 64.8 | 0.50 0.50 – 0.50 |" in text
    assert "| weak floor | 20.0 % | 20.0 – 20.0 |  |" in text
    assert "| weak-responses | 4 | 20.0 % |" in text
    assert "nan" not in table(over_runs([report(0.2, 0.3, 0.4)]))


def test_runs_of_other_models_are_refused():
    other = report(0.2, 0.3, 0.4)
    del other["models"]["weak"]
    with pytest.raises(InputError, match="tested different models"):
        over_runs([report(0.2, 0.3, 0.4), other])


def test_data_are_apart_and_their_checkpoints_can_be_read(tmp_path):
    size = replace(SIZES["tests"], part1=40, part2=30, test=20, texts=600)
    run_stages(SmallRun(size, (0,), tmp_path).stages(), tmp_path, last="data")
    data = tmp_path / "data"
    sets = [{row["question"] for row in read_jsonl(data / "test.jsonl")}]
    for seed in range(small_run.SEEDS):
        for part in ("part1", "part2"):
            sets.append({row["question"] for row in read_jsonl(data / f"{part}-{seed}.jsonl")})
    assert len(set.union(*sets)) == sum(map(len, sets)) == 20 + 5 * (40 + 30)
    texts = " ".join(row["text"] for row in read_jsonl(data / "general.jsonl"))
    assert not any(question in texts for question in set.union(*sets))
    assert load_config(data / "strong-start").width == size.strong.width
    before = (data / "done.json").read_bytes()
    run_stages(SmallRun(size, (0, 1), tmp_path).stages(), tmp_path, last="data")
    assert (data / "done.json").read_bytes() == before


@pytest.mark.parametrize("size", SIZES)
def test_a_size_is_a_config_of_the_pipeline(size):
    fixed = {"kind": "gsm8k", "questions": "q", "strong": "s", "weak": {"model": "w"}}
    config = from_mapping(ReasonConfig, fixed | SIZES[size].reason, size)
    assert config.iterations == 2
    names = [stage.name for stage in SmallRun(SIZES[size], (0, 2), Path("x")).stages()]
    assert names == ["data", "weak-pretrained", "strong-pretrained", "seed-0", "seed-2", "table"]


@pytest.mark.parametrize("seeds", ["7", "a", "0,-1", "0,"])
def test_wrong_seeds_are_one_line(seeds, tmp_path, capsys):
    assert main(["--work", str(tmp_path), "--seeds", seeds]) == 2
    assert "are needed" in capsys.readouterr().err
