"""What a run says of its files before its first stage: one line each, naming file and row."""

from pathlib import Path

import pytest
import yaml

from tests.cli.test_search import tiny
from w2s_jax.cli.main import main
from w2s_jax.errors import InputError
from w2s_jax.reasoning.config import ReasonConfig
from w2s_jax.reasoning.pipeline import Pipeline
from w2s_jax.reasoning.runner import check_run
from w2s_jax.text.rows import write_jsonl
from w2s_jax.text.typed_yaml import from_mapping

QUESTIONS = [{"id": f"q{i}", "question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(4)]
TEST = [{"id": f"t{i}", "question": f"{i} + 2?", "answer": f"#### {i + 2}"} for i in range(3)]
SOLVED = [{"id": f"s{i}", "question": f"{i} + 3?", "answer": f"#### {i + 3}"} for i in range(3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny(root / "m", 0)
    tiny(root / "other", 0, text="what else is there to read")
    return root


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    for name, rows in (("questions", QUESTIONS), ("test", TEST), ("solved", SOLVED)):
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def settings(models, **changes):
    values = {
        "kind": "gsm8k",
        "questions": "questions.jsonl",
        "test": "test.jsonl",
        "strong": str(models / "m"),
        "weak": {"model": str(models / "m"), "train": "solved.jsonl"},
        "demonstrations": {"count": 0},
        "decoding": {"max_new_tokens": 8},
        "pass_at": [1],
    }
    return values | changes


def check(models, data, root="out", **changes):
    config = from_mapping(ReasonConfig, settings(models, **changes), "run.yaml")
    pipeline = Pipeline(config, data, data.parent / root)
    return check_run(pipeline, pipeline.stages())


def refused(models, data, *, root="out", **changes):
    with pytest.raises(InputError) as error:
        check(models, data, root, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_in_order_have_nothing_to_tell(models, data):
    assert check(models, data) == []


@pytest.mark.parametrize(
    ("name", "place", "row", "message"),
    [
        ("test", 1, {"id": "t1", "question": "x?"}, 'test.jsonl line 2: no "answer"'),
        ("test", 2, {"id": "t9", "question": "x?", "answer": "one\ntwo"},
         "test.jsonl row 3 (id 't9'): a solution without a final answer"),
        ("questions", 3, {"id": "q9", "question": "x?", "answer": "one\ntwo"},
         "questions.jsonl row 4 (id 'q9'): a solution without"),
        ("questions", 0, {"id": "q2", "question": "x?"}, "line 3: the id 'q2' stands on"),
        ("questions", 2, {"id": "q7", "question": " "}, 'jsonl line 3: no text "question"'),
        ("solved", 0, {"id": "s0", "question": "x?"}, 'solved.jsonl line 1: no "answer"'),
        ("questions", 1, {"id": "q8", "question": "x " * 700},
         "questions.jsonl id 'q8': the question takes"),
        ("test", 1, {"id": "t8", "question": "x " * 700, "answer": "#### 1"},
         "test.jsonl id 't8': the question takes"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named(models, data, name, place, row, message):
    rows = [*{"questions": QUESTIONS, "test": TEST, "solved": SOLVED}[name]]
    rows[place] = row
    write_jsonl(data / f"{name}.jsonl", rows)
    assert message in refused(models, data)


def test_a_ceiling_that_is_asked_for_needs_every_answer(models, data):
    rows = [*QUESTIONS[:2], {"id": "q2", "question": "2 + 1?"}]
    write_jsonl(data / "questions.jsonl", rows)
    assert 'questions.jsonl line 3: no "answer"' in refused(models, data, ceiling=True)
    pipeline = Pipeline(from_mapping(ReasonConfig, settings(models), "run"), data, data.parent)
    assert "ceiling-model" not in [stage.name for stage in pipeline.stages()]
    assert check(models, data) == []


def test_responses_to_other_questions_are_named(models, data):
    weak = {"responses": "weak.jsonl"}
    rows = [{"id": row["id"], "response": "#### 1"} for row in QUESTIONS]
    write_jsonl(data / "weak.jsonl", [*rows[:2], {"id": "p1", "response": "1"}])
    assert "weak.jsonl line 3: no question has the id 'p1'" in refused(models, data, weak=weak)
    write_jsonl(data / "weak.jsonl", rows[:3])
    assert "weak.jsonl: no row for the id 'q3'" in refused(models, data, weak=weak)
    write_jsonl(data / "weak.jsonl", rows)
    assert check(models, data, weak=weak) == []


def test_demonstrations_too_few_or_too_long(models, data):
    write_jsonl(data / "shown.jsonl", [{"question": f"{i}?", "answer": "x " * 10} for i in "abc"])
    shown = {"file": "shown.jsonl", "count": 4}
    message = refused(models, data, demonstrations=shown)
    assert "shown.jsonl: 3 demonstrations, of which the first 4 are asked for" in message
    message = refused(models, data, demonstrations=shown | {"count": 3})
    assert "shown.jsonl row 2: 2 demonstrations and the question of" in message
    assert check(models, data, demonstrations=shown | {"count": 1}) == []
    assert check(models, data, demonstrations=shown | {"count": 3, "overflow": "drop-first"}) == []


def test_a_guide_of_another_vocabulary(models, data):
    weak = {"model": str(models / "other"), "train": "solved.jsonl"}
    two = {"sampler": "cbs", "contrasts": {"samples": 2}}
    assert "vocabular" in refused(models, data, weak=weak, stage_two=two)
    assert check(models, data, stage_two=two) == []


def test_inputs_in_the_folder_of_a_stage(models, data):
    write_jsonl(data.parent / "out" / "weak-model" / "mine.jsonl", SOLVED)
    weak = {"model": str(models / "m"), "train": "../out/weak-model/mine.jsonl"}
    assert "lies in what the run writes" in refused(models, data, weak=weak)


def test_questions_met_twice_are_told(models, data):
    write_jsonl(data / "test.jsonl", [*TEST, QUESTIONS[2] | {"id": "t9"}])
    (line,) = check(models, data)
    assert "1 of the 4 questions of" in line
    assert "test.jsonl" in line
    assert "first row 4, there row 3" in line


def test_models_are_looked_for_beside_the_data(models, data):
    weak = {"model": "m", "train": str(data / "solved.jsonl")}
    files = {name: str(data / f"{name}.jsonl") for name in ("questions", "test")}
    assert check(models, models, **files, strong="m", weak=weak) == []


def written(models, data, **changes):
    (data / "run.yaml").write_text(yaml.safe_dump(settings(models, **changes)))
    return ["reason", f"--config={data / 'run.yaml'}", f"--data={data}", f"--output={data / 'out'}"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft": {"epoch": 2}}, "run.yaml: sft: unknown key 'epoch'; perhaps epochs"),
        ({"sft": {"epochs": "two"}}, "run.yaml: sft: epochs: `w2s sft` does not take --epochs=two"),
        ({"sft": {"output": "x"}}, "run.yaml: sft: output is for the run to say"),
        ({"sft": {"learning_rate": -1.0}}, "run.yaml: sft: --learning-rate -1.0 must be above 0"),
        ({"dpo": {"loss_type": "guess"}}, "run.yaml: dpo: unknown loss type 'guess'"),
        ({"stage_two": {"dpo": {"betta": 1}}}, "run.yaml: stage_two: dpo: unknown key 'betta'"),
        ({"stage_two": {"temperature": 0.0}}, "run.yaml: stage_two: temperature 0 (greedy)"),
        ({"stage_two": {"chunk_length": 0}}, "run.yaml: stage_two: chunk_length is 0"),
        ({"decoding": {"max_new_tokens": 0}}, "run.yaml: decoding: max_new_tokens is 0"),
        ({"decoding": {"max_new_tokens": "8"}}, "decoding: max_new_tokens: '8' is no int"),
        ({"decoding": {"dtype": "half"}}, "decoding: dtype: 'half' is none of"),
        ({"demonstrations": {"count": -1}}, "demonstrations: count -1 must not be negative"),
        ({"kind": "math", "judge": "harness"}, "judge: harness reads gsm8k answers only"),
        ({"pass_at": [0, 1]}, "pass_at [0, 1]: each k must be at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"strong": "/nowhere/model"}, "/nowhere/model: no such directory"),
    ],
)
def test_wrong_settings_are_one_line_before_any_stage(models, data, capsys, changes, message):
    words = written(models, data, **changes)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (data / "out").exists()


def test_files_as_other_programs_write_them(models, data, capsys):
    text = (data / "questions.jsonl").read_text()
    (data / "questions.jsonl").write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    assert main([*written(models, data), "--dry-run"]) == 0
    assert "4 responses of up to 8 tokens" in capsys.readouterr().out
    for content, message in (
        (b"", "questions.jsonl: no rows"),
        (b'{"id": 1, "question": "\xff?"}\n', "questions.jsonl line 1: not UTF-8"),
    ):
        (data / "questions.jsonl").write_bytes(content)
        assert main(written(models, data)) == 2
        assert message in capsys.readouterr().err
    (data / "run.yaml").write_bytes(b"kind: \xff\n")
    assert main(["reason", f"--config={data / 'run.yaml'}"]) == 2
    assert "run.yaml: not UTF-8" in capsys.readouterr().err
    assert main([*written(models, data), "--data", str(data / "none")]) == 2
    assert "--data" in capsys.readouterr().err


def test_an_output_that_cannot_be_written(models, data, capsys):
    Path(data / "out").write_text("a file")
    write_jsonl(data / "questions.jsonl", QUESTIONS)
    assert main(written(models, data)) == 2
    assert "is not a folder" in capsys.readouterr().err
