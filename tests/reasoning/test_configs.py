"""The configs of the published reasoning experiments: read, checked against the commands' flags."""

import dataclasses

import pytest
import yaml

from w2s_jax.cli.main import config_flags, configs_folder, find_config, main, parse
from w2s_jax.cli.train import DPO, SFT
from w2s_jax.reasoning.answers import gold_answer
from w2s_jax.reasoning.config import GenerationConfig, ReasonConfig
from w2s_jax.reasoning.pipeline import Pipeline
from w2s_jax.text.rows import write_jsonl
from w2s_jax.text.typed_yaml import read_typed

CONFIGS = sorted(path.stem for path in (configs_folder() / "reasoning").glob("*.yaml"))
WEAK = {
    "llama2_7b": "meta-llama/Llama-2-7b-hf",
    "gemma_2b": "google/gemma-2b",
    "mistral_7b": "mistralai/Mistral-7B-v0.1",
    "llama3_8b_instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
}
# Fields as in the published files.
PUBLISHED_ROWS = {
    "gsm8k": {"id": "gsm8k_2", "question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"},
    "math": {"problem": "1 + 1?", "solution": "It is $\\boxed{2}$.", "answer": "2"},
    "olympicarena": {"id": 5, "prompt": "Question: 1 + 1?\n\nAnswer:", "answer": "2"},
}
PROJECTIONS = ["query", "key", "value", "out", "gate", "up", "down"]


def config_of(name):
    return read_typed(ReasonConfig, find_config(["--config", name], folder="reasoning"))


def test_the_published_experiments_are_there():
    expected = {f"{task}_{weak}" for task in ("gsm8k", "math") for weak in list(WEAK)[:3]}
    assert set(CONFIGS) == expected | {"olympicarena_llama3_8b_instruct"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_holds_the_published_values(name):
    config = config_of(name)
    task, weak = name.split("_", 1)
    is_arena = task == "olympicarena"
    assert config.kind == task
    assert config.weak.model == WEAK[weak]
    assert "70b" in config.strong.lower()
    assert (config.weak.train is None) == is_arena
    assert config.iterations == (1 if task == "math" else 2)
    assert config.ids == "index"
    assert (config.votes, config.published) == (
        ("math", False) if is_arena else ("published", True)
    )
    two = config.stage_two
    assert (two.start, two.temperature, two.top_p, two.rounds) == ("hybrid", 1.0, 1.0, 1)
    assert two.sampler == "sample"
    rules = two.contrasts
    assert (rules.samples, rules.min_confidence, rules.overrule_confidence) == (10, 0.6, 0.8)
    assert rules.pairs_per_question == (1 if task == "gsm8k" else 3)
    assert rules.published
    assert config.sft["lora_targets"] == config.dpo["lora_targets"] == PROJECTIONS
    assert {"Question", "Answer"} <= set(config.decoding.stop)
    GenerationConfig(max_new_tokens=config.decoding.max_new_tokens, stop=config.decoding.stop)


@pytest.mark.parametrize(("command", "cls"), [("sft", SFT), ("dpo", DPO)])
def test_trainings_have_flags_that_the_commands_know(command, cls, tmp_path):
    source = tmp_path / "flags.yaml"
    checked = []
    for name in CONFIGS:
        config = config_of(name)
        own = config.weak.sft if command == "sft" else config.stage_two.dpo
        values = (config.sft if command == "sft" else config.dpo) | own
        if values in checked:  # parsing takes a second
            continue
        checked.append(values)
        source.write_text(yaml.safe_dump(values))
        found = parse([command, *config_flags(source, cls, [])])
        for field, value in values.items():
            held = getattr(found, field)
            assert (list(held) if isinstance(value, list) else held) == value
        found.check()
    assert checked


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_becomes_stages_in_order(name, tmp_path, monkeypatch):
    config = config_of(name)
    for place in (config.questions, config.test, config.weak.train):
        if place is not None:
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(tmp_path / place, [PUBLISHED_ROWS[config.kind]])
    monkeypatch.setattr(Pipeline, "weights", {config.strong: "a", config.weak.model: "b"})
    pipeline = Pipeline(config, tmp_path, tmp_path / "run")
    names = [stage.name for stage in pipeline.stages()]
    assert gold_answer(pipeline.test[0]["answer"], config.kind) == "2"
    assert names[0] == ("weak-responses" if config.weak.train is None else "weak-model")
    assert "stage-two-1-model" in names
    assert ("iteration-2-sets" in names) == (config.iterations == 2)
    assert ("ceiling-model" in names) == (config.ceiling is not False)


def test_a_name_that_is_none_lists_those_that_are(capsys):
    assert main(["reason", "--config", "gsm8k_llama2_8b"]) == 2
    told = capsys.readouterr().err
    assert all(name in told for name in CONFIGS)


def test_fields_are_all_of_the_runs_config():
    known = {field.name for field in dataclasses.fields(ReasonConfig)}
    for name in CONFIGS:
        raw = yaml.safe_load((configs_folder() / "reasoning" / f"{name}.yaml").read_text())
        assert set(raw) <= known
