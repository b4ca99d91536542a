"""AlpacaEval files: their form, what is refused, and the real `alpaca_eval` with a local judge."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from w2s_jax.errors import InputError
from w2s_jax.evaluate.results import alpaca_rows, write_alpaca
from w2s_jax.text.rows import read_jsonl

FIELDS = ["instruction", "output", "generator", "dataset", "datasplit"]
ROWS = [
    {"instruction": "Name a sea.", "response": "The Aral Sea.", "score": 1.5, "dataset": "koala"},
    {"instruction": "Say {this}\n\nand that", "response": "", "datasplit": "test"},
]


@pytest.fixture(scope="module")
def instructions(shared_data):
    """AlpacaEval's 805 real instructions."""
    return read_jsonl(shared_data / "alpaca_eval" / "alpaca_eval_prompts.jsonl.gz")


@pytest.fixture(scope="module")
def answers(shared_data):
    """Real answers of two models: (Zephyr's as search would write them, the reference's)."""
    folder = shared_data / "alpaca_eval" / "model_outputs"
    zephyr = read_jsonl(folder / "zephyr-7b-beta.jsonl.gz")
    own = [
        {"prompt": "..", "response": row["output"], "score": 0.0, "hypotheses": []}
        | {name: value for name, value in row.items() if name not in ("output", "generator")}
        for row in zephyr
    ]
    return own, read_jsonl(folder / "gpt4_1106_preview.jsonl.gz")


def test_rows_have_the_five_fields_and_nothing_else():
    assert alpaca_rows(ROWS, generator="w2s") == [
        {
            "instruction": "Name a sea.",
            "output": "The Aral Sea.",
            "generator": "w2s",
            "dataset": "koala",
            "datasplit": "eval",
        },
        {
            "instruction": "Say {this}\n\nand that",
            "output": "",
            "generator": "w2s",
            "dataset": "alpaca_eval",
            "datasplit": "test",
        },
    ]


def test_all_805_real_instructions_once_each(instructions, answers, tmp_path):
    assert len(instructions) == 805
    own, _ = answers
    path = tmp_path / "deep" / "answers.json"
    write_alpaca(path, own, generator="zephyr", reference=instructions)
    written = json.loads(path.read_text())
    assert len(written) == 805
    assert {row["instruction"] for row in written} == {row["instruction"] for row in instructions}
    assert all(list(row) == FIELDS for row in written)
    assert all(isinstance(value, str) for row in written for value in row.values())
    assert [row["output"] for row in written] == [row["response"] for row in own]
    assert [row["dataset"] for row in written] == [row["dataset"] for row in own]
    assert [entry.name for entry in path.parent.iterdir()] == ["answers.json"]


def test_a_missing_a_double_and_a_foreign_answer_are_named(instructions, answers):
    own, _ = answers
    with pytest.raises(InputError, match="^1 of 805 instructions have no answer, first reference"):
        alpaca_rows(own[:-1], generator="w2s", reference=instructions)
    with pytest.raises(InputError, match="^row 806: the instruction of row 3 again"):
        alpaca_rows([*own, own[2]], generator="w2s", reference=instructions)
    foreign = {"instruction": "Is this\none known?", "response": "No."}
    with pytest.raises(InputError, match="^row 806: the reference has no .*'Is this one known\\?'"):
        alpaca_rows([*own, foreign], generator="w2s", reference=instructions)
    with pytest.raises(InputError, match="^reference row 2: the instruction of reference row 1"):
        alpaca_rows(ROWS[:1], generator="w2s", reference=[*ROWS[:1], *ROWS[:1]])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"response": "x"}, 'row 2: no "instruction"'),
        ({"instruction": "x"}, 'row 2: no "response"'),
        ({"instruction": "x", "response": ["y"]}, 'row 2: "response" is list'),
        ({"instruction": "x", "response": "y", "dataset": 3}, 'row 2: "dataset" is int'),
    ],
)
def test_a_wrong_row_is_named(row, message):
    with pytest.raises(InputError, match=message):
        alpaca_rows([ROWS[0], row], generator="w2s")


def test_a_generator_needs_a_name():
    with pytest.raises(InputError, match="generator has no name"):
        alpaca_rows(ROWS, generator="")


def test_text_without_a_utf8_form_is_written(tmp_path):
    rows = [{"instruction": "é", "response": "a\ud800b"}]
    write_alpaca(tmp_path / "o.json", rows, generator="ü")
    (row,) = json.loads((tmp_path / "o.json").read_text())
    assert (row["instruction"], row["output"], row["generator"]) == ("é", "a\ud800b", "ü")


def test_a_file_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_alpaca(tmp_path / "taken", ROWS, generator="w2s")


# The real evaluator. A judge of the test's own prefers the longer answer.

PROMPT = """<|im_start|>user
{instruction}
<<A>>{output_1}<</A>>
<<B>>{output_2}<</B>>
<|im_end|>
"""
CONFIGS = """longest:
  prompt_template: "longest/prompt.txt"
  fn_completions: "openai_completions"
  completions_kwargs:
    model_name: "judge"
    max_tokens: 1
    temperature: 0
    num_procs: 2
  fn_completion_parser: "regex_parser"
  completion_parser_kwargs:
    outputs_to_match:
      1: "A"
      2: "B"
  batch_size: 1
"""


class Judge(BaseHTTPRequestHandler):
    """A chat server that answers A or B, whichever answer is the longer one."""

    asked: list[dict]

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        text = body["messages"][-1]["content"]
        first, second = (
            re.search(f"<<{name}>>(.*)<</{name}>>", text, re.DOTALL)[1] for name in "AB"
        )
        message = {"role": "assistant", "content": "A" if len(first) >= len(second) else "B"}
        answer = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def judge():
    asked: list[dict] = []
    handler = type("OneJudge", (Judge,), {"asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    thread.join()
    server.server_close()


def run_alpaca_eval(folder: Path, url: str, **files: Path) -> dict[str, dict[str, str]]:
    """The leaderboard that `alpaca_eval` writes, by generator; it sees no network but the judge."""
    annotators = folder / "annotators" / "longest"
    annotators.mkdir(parents=True)
    (annotators / "prompt.txt").write_text(PROMPT)
    (annotators / "configs.yaml").write_text(CONFIGS)
    flags = {
        "model_outputs": files["outputs"],
        "reference_outputs": files["reference"],
        "annotators_config": annotators,
        "precomputed_leaderboard": None,
        "fn_metric": "get_winrate",
        "sort_by": "win_rate",
        "caching_path": None,
        "output_path": folder / "out",
    }
    command = [Path(sys.executable).with_name("alpaca_eval")]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    keyless = {name: value for name, value in os.environ.items() if "OPENAI" not in name}
    env = keyless | {"OPENAI_API_BASE": url, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": "x"}
    env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HOME": str(folder)}
    done = subprocess.run(
        command, env=env, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with next(iter((folder / "out").rglob("leaderboard.csv"))).open() as file:
        return {row[""]: row for row in csv.DictReader(file)}


@pytest.mark.harness
@pytest.mark.skipif(
    importlib.util.find_spec("alpaca_eval") is None, reason="alpaca_eval is not installed"
)
def test_the_real_alpaca_eval_takes_the_file(answers, judge, tmp_path):
    url, asked = judge
    own, reference = (some[:8] for some in answers)
    write_alpaca(tmp_path / "ours.json", own, generator="w2s-test", reference=own)
    (tmp_path / "reference.json").write_text(json.dumps(reference))
    files = {"outputs": tmp_path / "ours.json", "reference": tmp_path / "reference.json"}
    board = run_alpaca_eval(tmp_path, url, **files)
    longer = [
        len(mine["response"]) > len(theirs["output"])
        for mine, theirs in zip(own, reference, strict=True)
    ]
    assert 0 < sum(longer) < 8, "the judge prefers one side always: the test shows nothing"
    assert board["w2s-test"]["n_total"] == "8"
    assert float(board["w2s-test"]["win_rate"]) == pytest.approx(100 * sum(longer) / 8)
    assert len(asked) == 8
    for row in own:
        assert any(row["instruction"] in body["messages"][-1]["content"] for body in asked)
