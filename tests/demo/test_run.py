import json

import jax
import numpy as np
import pytest

from w2s_jax.demo import Demo, DemoConfig, OtherGuide, run
from w2s_jax.demo.run import (
    Outcome,
    read_openings,
    run_demo,
    summarise,
    warm_up,
)
from w2s_jax.errors import InputError
from w2s_jax.evaluate.rewards import gold_rewards
from w2s_jax.models.model import init_model
from w2s_jax.models.reward import EncoderConfig, init_classifier
from w2s_jax.text.rows import read_jsonl
from w2s_jax.text.tokenizer import load_tokenizer, save_bpe, train_bpe


def outcome(rewards, seconds=0.5):
    return Outcome([""] * len(rewards), [0.0] * len(rewards), rewards, seconds)


def test_the_openings_are_many_short_and_different():
    openings = read_openings(80)
    assert len(set(openings)) == 80
    assert all(5 <= len(opening.split()) <= 10 for opening in openings)
    assert all(opening == opening.strip() for opening in openings)
    assert read_openings(64) == openings[:64]


@pytest.mark.parametrize("count", [0, 1, 81])
def test_more_or_fewer_openings_than_there_are(count):
    with pytest.raises(InputError, match=f"--prompts is {count}; it must lie between 2 and 80"):
        read_openings(count)


@pytest.mark.slow
def test_the_openings_are_none_of_the_data_set(shared_data):
    import lzma

    path = shared_data / "imdb" / "test.jsonl.xz"
    if not path.exists():
        pytest.skip(f"no {path}")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        reviews = file.read().lower()
    assert not [opening for opening in read_openings(80) if opening.lower() in reviews]


def test_paired_differences_are_over_the_same_prompts():
    outcomes = {
        "base": outcome([0.0, 10.0]),
        "bon": outcome([0.5, 11.0]),
        "eft": outcome([0.0, 0.0]),
        "cbs": outcome([1.0, 11.0], seconds=2.0),
        "cbs-across": outcome([3.0, 10.0]),
    }
    summary = summarise(outcomes)
    assert set(summary) == {"methods", "paired"}
    assert summary["methods"]["cbs"] == {
        "gold_reward": 6.0,
        "stderr": pytest.approx(5.0),
        "seconds_per_prompt": 2.0,
    }
    assert summary["paired"] == {
        "cbs-base": {"mean": 1.0, "stderr": 0.0},
        "cbs-bon": {"mean": 0.25, "stderr": pytest.approx(0.25)},
        "cbs-across-base": {"mean": 1.5, "stderr": pytest.approx(1.5)},
    }


def test_warming_up_takes_one_prompt_of_each_padded_length_or_all():
    prompts = [[1] * length for length in (3, 40, 5, 17, 60)]
    assert warm_up(prompts, text=False) == [[4]], "too few for two programs"
    assert warm_up(prompts * 6, text=False) == [[3], [4]]
    assert [list(some) for some in warm_up(prompts, text=True)] == [[0, 1, 2, 3, 4]]


def stand_in(directory):
    """A demo of tiny random models."""
    from tests.tiny import tiny_config

    save_bpe(train_bpe(["a film of the sea"] * 50, 300), directory, max_length=128)
    config = tiny_config(vocab_size=300, eos_ids=(0,), max_positions=128)
    policy, untuned, tuned = (init_model(config, jax.random.key(seed)) for seed in range(3))
    shape = EncoderConfig(
        vocab_size=300, width=8, layers=1, heads=2, mlp_width=16, max_positions=128, pad_id=1
    )
    gold = init_classifier(shape, jax.random.key(3))
    tokenizer = load_tokenizer(directory)
    return Demo(policy, untuned, tuned, gold, tokenizer)


def other_stand_in(directory):
    """A guide of tiny random models with a vocabulary of its own."""
    from tests.tiny import tiny_config

    save_bpe(train_bpe(["seas of films"] * 50, 270), directory, max_length=128)
    config = tiny_config(vocab_size=270, eos_ids=(0,), max_positions=128)
    tuned, untuned = (init_model(config, jax.random.key(seed)) for seed in (4, 5))
    return OtherGuide(tuned, untuned, load_tokenizer(directory))


def test_the_demo_writes_its_results_and_tables(tmp_path, monkeypatch, capsys):
    across = []

    def steer(models, openings, config, name, other):
        across.extend([name] if other == "other" else [])
        rewards = [float(len(name) + index) for index in range(len(openings))]
        return Outcome([f" {name} [bold]"] * len(openings), rewards, rewards, 0.5)

    monkeypatch.setattr(run, "load_demo", lambda: None)
    monkeypatch.setattr(run, "load_other_guide", lambda: "other")
    monkeypatch.setattr(run, "steer", steer)
    summary = run_demo(DemoConfig(str(tmp_path / "out"), prompts=3))
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert list(summary["methods"]) == ["base", "bon", "eft", "cbs", "cbs-across"]
    assert list(summary["paired"]) == ["cbs-base", "cbs-bon", "cbs-across-base"]
    assert across == ["cbs-across"]
    rows = read_jsonl(tmp_path / "out" / "results.jsonl")
    assert len(rows) == 3 * 5
    assert set(rows[0]) == {"method", "prompt", "response", "score", "gold_reward"}
    for method, figures in summary["methods"].items():
        rewards = [row["gold_reward"] for row in rows if row["method"] == method]
        assert figures["gold_reward"] == pytest.approx(np.mean(rewards))
    out = capsys.readouterr().out
    assert "Gold reward over 3 openings" in out
    assert "cbs-bon: +0.00 ± 0.00" in out
    assert "[bold]" in out


@pytest.mark.slow
def test_every_method_steers_the_models(tmp_path, monkeypatch):
    models = stand_in(tmp_path / "tokenizer")
    other = other_stand_in(tmp_path / "other")
    monkeypatch.setattr(run, "load_demo", lambda: models)
    monkeypatch.setattr(run, "load_other_guide", lambda: other)
    monkeypatch.setattr(run, "SLOTS", 2)
    monkeypatch.setattr(run, "read_openings", lambda count: ["A film", "We saw", "The sea"][:count])
    run_demo(DemoConfig(str(tmp_path / "out"), prompts=3, max_new_tokens=5))
    rows = read_jsonl(tmp_path / "out" / "results.jsonl")
    assert [row["method"] for row in rows] == ["base", "bon", "eft", "cbs", "cbs-across"] * 3
    assert any(row["response"] for row in rows)
    for row in rows:
        reward = gold_rewards(models.gold, models.tokenizer, [row["prompt"] + row["response"]])
        assert row["gold_reward"] == pytest.approx(float(reward[0]), abs=1e-5)


def test_an_unwritable_output_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.delattr(run, "load_demo")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        run_demo(DemoConfig(str(tmp_path / "file" / "demo")))
