"""A whole run on tiny models that add: its stages, what is redone, and that kills cost nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.cli.test_search import tiny
from w2s_jax.cli.main import main
from w2s_jax.errors import InputError
from w2s_jax.reasoning import ReasonConfig, StagesConfig, answers, generation, pipeline, run
from w2s_jax.reasoning.pipeline import Pipeline
from w2s_jax.reasoning.stages import BEGUN, plan_stages
from w2s_jax.reasoning.workers import Workers
from w2s_jax.text.rows import Journal, read_jsonl, write_jsonl
from w2s_jax.text.typed_yaml import from_mapping

SUMS = [(a, b) for a in range(5) for b in range(4)]
# At a constant rate the step is one program, however many of them there are.
SFT = {"batch_size": 16, "learning_rate": 0.008, "max_length": 64}
SFT |= {"schedule": "constant", "warmup": 0}
SHORT = {"iterations": 1, "naive": False, "ceiling": False}
RUN = {
    "kind": "gsm8k",
    "questions": "part2.jsonl",
    "test": "test.jsonl",
    "votes": "published",
    "judge": "published",
    "demonstrations": {"count": 0},
    "decoding": {"max_new_tokens": 8, "batch_size": 16},  # no more than there are of any questions
    "sets": ["hybrid"],
    "sft": {"max_steps": 6} | SFT,
    "dpo": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-4, "max_length": 64},
    "stage_two": {
        "temperature": 1.5,
        "contrasts": {"samples": 4, "min_confidence": 0.5, "overrule_confidence": 0.5},
    },
    "pass_at": [1, 4, 9],
}


def rows_of(sums, prefix):
    return [
        {"id": f"{prefix}{i}", "question": f"{a} + {b}?", "answer": f"#### {a + b}"}
        for i, (a, b) in enumerate(sums)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions, and a model that has learned to add: half-way it is the weak one."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "part1.jsonl", rows_of(SUMS[:12], "a"))
    write_jsonl(folder / "part2.jsonl", rows_of(SUMS, "q"))
    write_jsonl(folder / "test.jsonl", rows_of(SUMS[:16], "t"))
    taught = [
        {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}
        for row in rows_of(SUMS, "p")
    ]
    write_jsonl(folder / "taught.jsonl", taught)
    start = tiny(folder / "start", 1, width=48, mlp_width=96)
    flags = SFT | {"model": start, "data": str(folder / "taught.jsonl"), "from_scratch": True}
    flags |= {"output": str(folder / "strong"), "max_steps": 80, "save_every": 40}
    (folder / "strong.yaml").write_text(yaml.safe_dump(flags))
    assert main(["sft", "--config", str(folder / "strong.yaml")]) == 0
    weak = str(folder / "weak" / "model")
    assert main(["convert", str(folder / "strong"), weak, "--step=40"]) == 0
    return folder


def settings(data, **changes):
    models = {"strong": str(data / "strong" / "model")}
    return RUN | models | {"weak": {"model": str(data / "weak" / "model")}} | changes


@pytest.fixture
def in_process(monkeypatch):
    """Stages and graders without processes of their own; `cut` is called before and after work."""

    class Calls:
        made = 0

        def cut(self, moment):
            pass

    calls = Calls()

    def run_module(module, *arguments, hint=""):
        calls.cut(("before", arguments))
        calls.made += 1
        status = main(list(arguments)) if module == "w2s_jax" else generation.main([*arguments])
        if status:
            raise InputError(f"status {status}")
        calls.cut(("after", arguments))

    class NoWorkers(Workers):
        def run(self, tasks):
            check = answers.methods(*self._setup[1])
            return [check(task) for task in tasks]

    monkeypatch.setattr(pipeline, "run_module", run_module)
    monkeypatch.setattr(answers, "Workers", NoWorkers)
    return calls


def build(data, root, **changes):
    return Pipeline(from_mapping(ReasonConfig, settings(data, **changes), "run"), data, root)


def go(data, root, **options):
    config = from_mapping(ReasonConfig, settings(data, **options), "run")
    return run(config, StagesConfig(data=str(data), output=str(root)))


def results(root):
    """The bytes of all that a run leaves for its reader or a later stage, but times."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        kept = name.endswith(("graded.jsonl", "training.jsonl", ".safetensors", ".md"))
        if kept and "start" not in name and "checkpoints" not in name:
            found[name] = path.read_bytes()
    return found


@pytest.mark.slow
def test_a_whole_run_reports_every_model(data, in_process, tmp_path):
    text = go(data, tmp_path)
    summary = json.loads((tmp_path / "report.json").read_text())
    assert list(summary["models"]) == [
        "weak", "strong-icl", "naive", "iteration-1-weak", "iteration-1-icl",
        "iteration-1-hybrid", "iteration-2-hybrid", "stage-two-1", "ceiling",
    ]  # fmt: skip
    assert all(found["total"] == 16 for found in summary["models"].values())
    assert set(summary["samples"]["stage-two-1-samples"]) == {"1", "4"}
    assert text == (tmp_path / "report.md").read_text()
    for name in summary["models"]:
        assert f"| {name} |" in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    sets = summary["data"]["iteration-1-sets"]
    kept = {row["id"] for row in read_jsonl(tmp_path / "iteration-1-sets" / "weak.jsonl")}
    weak, icl = (
        {row["id"]: row["pred"] for row in read_jsonl(tmp_path / name / "graded.jsonl")}
        for name in ("weak-responses", "icl-responses")
    )
    assert kept == {i for i in weak if weak[i] and weak[i] == icl[i]}
    assert sets["kept"] == len(kept) > 0


@pytest.mark.slow
def test_adapters_and_weights_of_pairs_reach_the_next_stage(data, in_process, tmp_path):
    lora = {"lora_rank": 4}
    contrasts = RUN["stage_two"]["contrasts"] | {"weighted": True}
    two = RUN["stage_two"] | {"rounds": 2, "contrasts": contrasts}
    go(
        data,
        tmp_path,
        **SHORT,
        sets=[],
        sft=RUN["sft"] | lora,
        dpo=RUN["dpo"] | lora,
        stage_two=two,
    )
    for name in ("iteration-1-hybrid", "stage-two-1", "stage-two-2"):
        assert (tmp_path / f"{name}-model" / "model" / "adapter_config.json").is_file()
    flags = yaml.safe_load((tmp_path / "stage-two-1-model" / "dpo.yaml").read_text())
    assert flags["weight_column"] == "weight"
    models = json.loads((tmp_path / "report.json").read_text())["models"]
    assert list(models) == [
        "weak",
        "strong-icl",
        "iteration-1-hybrid",
        "stage-two-1",
        "stage-two-2",
    ]


class Killed(BaseException):
    pass


def test_cut_off_at_every_stage_border_the_files_are_the_same(data, in_process, tmp_path):
    text = go(data, tmp_path / "whole", **SHORT)
    before = results(tmp_path / "whole")
    moments = set()

    def cut(moment):
        if moment not in moments:
            moments.add(moment)
            raise Killed

    in_process.cut = cut
    for _ in range(60):
        try:
            assert go(data, tmp_path / "cut", **SHORT) == text
            break
        except Killed:
            continue
    assert len(moments) > 15
    assert results(tmp_path / "cut") == before

    summary = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert list(summary["models"]) == ["weak", "strong-icl", "iteration-1-hybrid", "stage-two-1"]
    assert (tmp_path / "whole" / "report.md").read_text() == text
    assert summary["data"]["iteration-1-sets"]["kept"] > 0

    made = in_process.made
    assert go(data, tmp_path / "whole", **SHORT) == text
    assert in_process.made == made
    assert results(tmp_path / "whole") == before

    two = RUN["stage_two"] | {"contrasts": RUN["stage_two"]["contrasts"] | {"samples": 3}}
    stages = build(data, tmp_path / "whole", **SHORT, stage_two=two).stages()
    states = {one.stage.name: one.state for one in plan_stages(stages, tmp_path / "whole")}
    assert {name for name, state in states.items() if state != "done"} == {
        *("stage-two-1-samples", "stage-two-1-pairs", "stage-two-1-model", "test-stage-two-1")
    }


def test_guides_and_weights_reach_the_commands_of_their_stages(data, in_process, tmp_path):
    """By the stages alone, cut off where they would start a command."""
    weak = {"model": str(data / "weak" / "model"), "train": "part1.jsonl"}
    contrasts = RUN["stage_two"]["contrasts"] | {"weighted": True}
    two = RUN["stage_two"] | {"sampler": "cbs", "beam_width": 2, "contrasts": contrasts}
    built = build(data, tmp_path, **SHORT, weak=weak, stage_two=two)
    stages = {stage.name: stage for stage in built.stages()}

    def cut(moment):
        raise Killed

    in_process.cut = cut
    for name in ("stage-two-1-samples", "stage-two-1-pairs", "stage-two-1-model"):
        (tmp_path / name).mkdir()
    with pytest.raises(Killed):
        stages["stage-two-1-samples"].work(tmp_path / "stage-two-1-samples")
    task = json.loads((tmp_path / "stage-two-1-samples" / "answering.json").read_text())
    assert task["model"] == str(tmp_path / "iteration-1-hybrid-model" / "model")
    assert task["tuned"] == str(tmp_path / "weak-model" / "model")
    assert task["untuned"] == weak["model"]
    assert (task["generation"]["method"], task["generation"]["samples"]) == ("cbs", 4)

    write_jsonl(tmp_path / "stage-two-1-pairs" / "training.jsonl", [{"prompt": "a"}])
    shutil.copytree(data / "strong" / "model", tmp_path / "iteration-1-hybrid-model" / "model")
    with pytest.raises(Killed):
        stages["stage-two-1-model"].work(tmp_path / "stage-two-1-model")
    flags = yaml.safe_load((tmp_path / "stage-two-1-model" / "dpo.yaml").read_text())
    assert flags["weight_column"] == "weight"
    assert flags["model"] == str(tmp_path / "iteration-1-hybrid-model" / "model")


@pytest.mark.slow
def test_samples_of_a_guided_search_cut_off_inside_are_the_same(
    data, in_process, tmp_path, monkeypatch
):
    short = SHORT | {"sets": [], "test": None}
    short["weak"] = {"model": str(data / "weak" / "model"), "train": "part1.jsonl"}
    short["weak"]["sft"] = {"max_steps": 4, "learning_rate": 1e-4}
    shape = {"sampler": "cbs", "beam_width": 2, "successors": 2, "chunk_length": 2}
    short["stage_two"] = RUN["stage_two"] | shape
    appended = []

    def append(self, row_id, row, before=Journal.append):
        before(self, row_id, row)
        appended.append(row_id)
        if len(appended) in (5, 40, 70):
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append", append)
        for _ in range(3):
            with pytest.raises(Killed):
                go(data, tmp_path, **short)
        go(data, tmp_path, **short)
    assert len(appended) == 20 + 20 + 20 * 4
    samples = tmp_path / "stage-two-1-samples"
    rows = read_jsonl(samples / "graded.jsonl")
    assert [(row["id"], row["sample"]) for row in rows] == [
        (f"q{i}", n) for i in range(20) for n in range(4)
    ]
    assert len({row["response"] for row in rows}) > 4
    assert read_jsonl(tmp_path / "stage-two-1-pairs" / "training.jsonl")

    before, made = results(tmp_path), in_process.made
    shutil.rmtree(samples)
    go(data, tmp_path, **short)
    assert in_process.made == made + 1
    assert results(tmp_path) == before


@pytest.mark.slow
def test_killed_at_random_moments_the_files_are_the_same(data, tmp_path):
    short = settings(data, **SHORT | {"sets": ["weak"]})
    short["stage_two"] = RUN["stage_two"] | {"start": "weak"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(short))

    def start(root):
        words = ["reason", f"--config={tmp_path / 'run.yaml'}", f"--data={data}"]
        words = [sys.executable, "-m", "w2s_jax", *words, f"--output={tmp_path / root}"]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.Popen(
            words, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
        )

    began = time.monotonic()
    process = start("whole")
    assert process.wait(600) == 0, process.stderr.read()
    alone = time.monotonic() - began
    chance = random.Random(3)
    for _ in range(2):
        process = start("killed")
        time.sleep(chance.uniform(0.1, 0.45) * alone)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = start("killed")
    assert process.wait(600) == 0, process.stderr.read()
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": "none.jsonl"}, r"none.jsonl: not found; it is the file of test"),
        ({"weak": {}}, "weak: name a model, or a file of its responses"),
        ({"weak": {"responses": "x", "train": "y"}}, "train needs the model"),
        ({"iterations": 0}, "iterations 0 must be at least 1"),
        ({"stage_two": {"sampler": "cbs"}}, "guided by the weak model before and after"),
        ({"votes": "guess"}, "'guess' is none of published, harness"),
        ({"colour": "red"}, "unknown field 'colour'"),
    ],
)
def test_wrong_settings_are_one_line(data, tmp_path, change, message):
    with pytest.raises(InputError, match=message) as error:
        build(data, tmp_path, **change).stages()
    assert "\n" not in str(error.value)


def test_nothing_kept_is_one_line_that_names_the_stages(data, in_process, tmp_path):
    responses = [
        {"id": row["id"], "response": "#### 99"} for row in read_jsonl(data / "part2.jsonl")
    ]
    write_jsonl(tmp_path / "weak.jsonl", responses)
    with pytest.raises(
        InputError, match=r"keeps none of 20 questions: .*weak-responses/graded.jsonl.*icl"
    ):
        go(data, tmp_path / "run", weak={"responses": str(tmp_path / "weak.jsonl")}, test=None)


def test_a_dry_run_writes_nothing_and_a_part_can_be_asked_for(data, tmp_path, capsys, in_process):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(data)))
    words = ["reason", f"--config={tmp_path / 'run.yaml'}", f"--data={data}"]
    words.append(f"--output={tmp_path / 'out'}")
    assert main([*words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "4 × 20 responses of up to 8 tokens" in told
    for name in ("naive", "iteration-1-weak", "iteration-2-hybrid", "stage-two-1", "ceiling"):
        assert f"test-{name}" in told
    assert not (tmp_path / "out").exists()
    assert main([*words, "--until", "weak-responses"]) == 0
    assert [path.parent.name for path in (tmp_path / "out").glob(f"*/{BEGUN}")] == [
        "weak-responses"
    ]
    assert main([*words, "--from", "iteration-1-sets"]) == 2
    assert "reads what icl-responses writes, which is not done" in capsys.readouterr().err
    assert main(["reason"]) == 2
    assert "--config is missing" in capsys.readouterr().err
