import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from w2s_jax.errors import InputError
from w2s_jax.reasoning import workers
from w2s_jax.reasoning.answers import canonical_answers, grade, judged, votes
from w2s_jax.reasoning.workers import Failure, Workers

BAD = "tests.reasoning.bad_checkers:Bad"


def rows_of(*answers: str) -> list[dict]:
    return [{"id": index, "response": f"It is {a}"} for index, a in enumerate(answers)]


def test_rows_keep_their_order_and_fields():
    rows = [{"id": f"q{i}", "sample": 0, "response": f"so\n#### {i}"} for i in range(300)]
    golds = {f"q{i}": str(i - i % 2) for i in range(300)}
    graded = grade(rows, golds, "published", "gsm8k", workers=2)
    assert graded == [
        row | {"pred": str(i), "gold": str(i - i % 2), "result": i % 2 == 0}
        for i, row in enumerate(rows)
    ]


def test_without_golds_only_answers_are_extracted():
    graded = grade([*rows_of("4"), {"response": "#### 5"}], None, "published", "gsm8k", workers=1)
    assert graded == [
        *[row | {"pred": ""} for row in rows_of("4")],
        {"response": "#### 5", "pred": "5"},
    ]


def test_an_empty_prediction_is_never_right():
    for name in ("math", "harness", "harness-flexible"):
        graded = grade(rows_of("unknown"), {0: "4"}, name, "gsm8k", workers=1)
        assert (graded[0]["pred"], graded[0]["result"]) == ("", False)


@pytest.mark.parametrize(
    ("seconds", "reasons"),
    [
        (0.5, {"sleep": "timed out after 0.5 s", "spin": "timed out after 0.5 s"}),
        (
            20.0,  # a busy machine takes long to fill a memory
            {
                "memory": "out of memory (256 MB)",
                "exit": "the worker died: exit code 3",
                "segfault": "the worker died: SIGSEGV",
                "deep": "nested too deeply",
                "raise": "ValueError: no such answer",
            },
        ),
    ],
)
def test_a_bad_answer_costs_itself_only(seconds, reasons):
    answers = ["a", "b", *(answer for bad in reasons for answer in (bad, f"after-{bad}"))]
    golds = dict(enumerate(answers))
    graded = grade(rows_of(*answers), golds, BAD, "math", workers=1, seconds=seconds, memory_mb=256)
    assert [row["pred"] for row in graded] == answers
    assert [row["result"] for row in graded] == [answer not in reasons for answer in answers]
    assert [row.get("error") for row in graded] == [reasons.get(answer) for answer in answers]


def test_an_answer_that_a_busy_machine_left_no_time_is_given_more(monkeypatch):
    with Workers("tests.reasoning.bad_checkers:computing", workers=1, seconds=0.1) as pool:
        monkeypatch.setattr(workers, "_processor_time", lambda pid: (True, 0.0))
        assert pool.run([0.3]) == [0.3]
        monkeypatch.setattr(workers, "_processor_time", lambda pid: (False, 0.0))
        assert pool.run([60.0]) == [Failure("timed out after 0.1 s")]


def test_answers_of_one_question_that_are_equal_are_one_vote():
    preds = {
        "says less": ["5", "5 cm", "5.0", "", "7"],
        "which unit": ["5", "5 cm", "5 m"],
        "percent": ["50", "50%", "0.75"],
        "exact": ["$1,000", "1000", "1000 clips"],
    }
    rows = [{"id": row_id, "pred": pred} for row_id, found in preds.items() for pred in found]
    voted: dict[str, list[str]] = {}
    for row in votes(rows, "math", "math"):
        voted.setdefault(row["id"], []).append(row["pred"])
    assert voted == {
        "says less": ["1/20 m", "1/20 m", "1/20 m", "", "7"],
        "which unit": ["5", "1/20 m", "5 m"],
        "percent": ["1/2", "1/2", "3/4"],
        "exact": ["1000", "1000", "1000"],
    }


def test_many_crashing_answers_among_good_ones():
    answers = [("exit", "killed", f"good{i}", f"fine{i}")[i % 4] for i in range(24)]
    unlike = [f"{answer} {i}" for i, answer in enumerate(answers)]
    with Workers("tests.reasoning.bad_checkers:crashing", workers=2, seconds=20) as pool:
        results = pool.run(unlike)
    for answer, result in zip(unlike, results, strict=True):
        if answer.startswith(("good", "fine")):
            assert result == answer
        else:
            assert isinstance(result, Failure)
            assert "died" in result.reason


def test_hanging_extraction_leaves_an_empty_answer():
    rows = [{"id": 0, "response": "extract hangs"}, {"id": 1, "response": "a"}]
    graded = grade(rows, {0: "x", 1: "a"}, BAD, "math", workers=2, seconds=0.5)
    assert [(row["pred"], row["result"]) for row in graded] == [("", False), ("a", True)]
    assert graded[0]["error"] == "timed out after 0.5 s"


def test_votes_survive_what_hangs():
    forms = canonical_answers(["a", "sleep", "exit", "b"], BAD, "math", workers=1, seconds=0.5)
    assert forms == ["A", "sleep", "exit", "B"]


def test_workers_are_used_again_and_end_with_the_block():
    with Workers("tests.reasoning.bad_checkers:crashing", workers=2) as pool:
        assert pool.run(["a"] * 10) == ["a"] * 10
        assert pool.run([]) == []
        processes = [worker.process for worker in pool._workers.values()]
        assert pool.run(["b"]) == ["b"]
        assert [worker.process for worker in pool._workers.values()] == processes
    assert all(process.poll() is not None for process in processes)


def test_workers_import_no_jax():
    graded = grade(
        rows_of("4"), None, "tests.reasoning.bad_checkers:seen_modules", "math", workers=1
    )
    assert graded[0]["pred"] == ""


def test_wrong_input():
    with pytest.raises(InputError, match=r"row 2 \(id 7\): no gold answer has its id"):
        grade(
            [{"id": 1, "response": ""}, {"id": 7, "response": ""}], {1: "4"}, "published", "gsm8k"
        )
    with pytest.raises(InputError, match='row 1: no text "response" to grade'):
        grade([{"answer": "4"}], None, "published", "gsm8k")
    with pytest.raises(InputError, match="checker 'maths': one of math, published"):
        grade([], None, "maths", "gsm8k")
    with pytest.raises(InputError, match="tests.nowhere:X: cannot be loaded"):
        grade(rows_of("1"), None, "tests.nowhere:X", "gsm8k")
    with pytest.raises(InputError, match="time limit of 0 s"):
        grade([], None, "published", "gsm8k", seconds=0)
    with pytest.raises(InputError, match="memory limit of 1 MB"):
        grade([], None, "published", "gsm8k", memory_mb=1)
    with pytest.raises(InputError, match="0 workers"):
        grade([], None, "published", "gsm8k", workers=0)


def test_a_checker_that_cannot_start_is_no_endless_loop():
    with pytest.raises(RuntimeError, match="a worker did not start: OSError"):
        grade(rows_of("1"), None, "tests.reasoning.bad_checkers:broken", "gsm8k", workers=1)


HOSTILE = (
    "{" * 10_000,
    "(" * 10_000 + "1" + ")" * 10_000,
    "(" * 700 + "1" + ")" * 700,
    "\\sqrt{" * 1500 + "2" + "}" * 1500,
    "\\boxed{" * 1500,
    "9**9**9",
    "9*9**9**9",
    "9^{9^{9^9}}",
    "10^{999999999}",
    "1e999999999",
    "1000000!",
    "(1+x)^{100000}",
    "\\binom{10^9}{10^8}",
    "\\begin{pmatrix}" * 500,
    "\x00\x01\x1b[2J",
    "\ud800",
    "$" * 10_000,
    ",000" * 2500,
    "9" * 9000,
    "__import__('os')._exit(1)",
)


@pytest.mark.slow
def test_hostile_answers_cost_themselves_only():
    ordinary = ["x^2+7", "7 + x^2"]
    answers = [answer for hostile in HOSTILE for answer in (hostile, *ordinary)]
    rows = [{"id": i, "response": f"The answer is: {a}"} for i, a in enumerate(answers)]
    golds = dict.fromkeys(range(len(answers)), "x^2+7")
    graded = grade(rows, golds, "math", "math", workers=2, seconds=2)
    assert [row["result"] for row in graded] == [False, True, True] * len(HOSTILE)
    assert {row.get("error") for row in graded} <= {
        *(None, "timed out after 2 s", "out of memory (1024 MB)", "nested too deeply")
    }
    forms = canonical_answers(answers, "math", "math", workers=2, seconds=2)
    assert forms[1] == forms[2] == forms[-1]


def test_a_few_hostile_answers():
    answers = ["9^{9^{9^9}}", "{" * 10_000, "9*9**9**9", "\ud800", "\\frac{2}{4}", "\\boxed{1"]
    rows = [{"id": i, "response": f"The answer is: {a}"} for i, a in enumerate(answers)]
    golds = dict.fromkeys(range(len(answers)), "1/2")
    graded = grade(rows, golds, "math", "math", workers=1, seconds=1)
    assert [row["result"] for row in graded] == [False] * 4 + [True, False]
    assert graded[0]["error"] == "timed out after 1 s"


GRADING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
from w2s_jax.reasoning.answers import grade
rows = [{"id": i, "response": f"FOLDER {i} WORKERS"} for i in range(2)]
factory = "tests.reasoning.bad_checkers:ending_the_parent"
grade(rows, None, factory, "SIGNAL", workers=WORKERS, seconds=SECONDS)
"""


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads processes from /proc")
@pytest.mark.parametrize(("sent", "seconds", "workers"), [("SIGINT", 100, 2), ("SIGKILL", 1, 1)])
def test_no_worker_outlives_its_parent(tmp_path, sent, seconds, workers):
    """One whose parent was killed computes for 2 s more than an answer may take."""
    code = GRADING.replace("SECONDS", str(seconds)).replace("WORKERS", str(workers))
    code = code.replace("FOLDER", str(tmp_path)).replace("SIGNAL", sent)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, stderr=subprocess.DEVNULL, check=False
    )
    assert done.returncode == -signal.Signals[sent]
    found = [int(path.name) for path in tmp_path.iterdir()]
    assert len(found) == workers
    until = time.monotonic() + 30
    while any(map(alive, found)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, found))


@pytest.mark.parametrize("judge", ["published", "harness"])
def test_rows_without_a_gold_answer_get_a_pred_and_no_verdict(judge):
    rows = [{"id": i, "sample": n, "response": f"#### {i}"} for i in (1, 2, 3) for n in (0, 1)]
    found = judged(rows, {3: "3", 1: "7"}, "published", judge, "gsm8k")
    assert [row["pred"] for row in found] == ["1", "1", "2", "2", "3", "3"]
    assert [row.get("result") for row in found] == [False, False, None, None, True, True]
    assert [(row["id"], row["sample"]) for row in found] == [(r["id"], r["sample"]) for r in rows]
    assert all("result" not in row for row in judged(rows, {}, "published", judge, "gsm8k"))
