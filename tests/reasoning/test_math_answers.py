r"""The checker `math` on a table of answers in the styles of chat models, judged by hand.

Rows of chat_answers.jsonl: gold, response, right, plain (the verdict of math-verify 0.9.0 alone:
verify(parse(\boxed{gold}), parse(response))), kind where it is not math, and vote false where the
answer is right without casting the gold's vote: it leaves a unit or the like out, or rounds.
"""

import logging
from pathlib import Path

import pytest

from w2s_jax.reasoning.answers import make_checker, methods
from w2s_jax.text.rows import read_jsonl

TABLE = read_jsonl(Path(__file__).parent.parent / "golden" / "reasoning" / "chat_answers.jsonl")
PLAIN = {"missed": 270, "taken": 83}  # of 588 right and 440 wrong answers


def rates(verdicts, rows=TABLE):
    """Right answers that are missed, and wrong ones that are taken."""
    pairs = list(zip(verdicts, rows, strict=True))
    return {
        "missed": sum(row["right"] and not verdict for verdict, row in pairs),
        "taken": sum(bool(verdict) and not row["right"] for verdict, row in pairs),
    }


def test_the_table_holds_enough_that_plain_math_verify_judges_rightly():
    right = [row for row in TABLE if row["right"]]
    assert (len(right), len(TABLE)) == (588, 1028)
    assert sum(row["plain"] for row in right) * 3 >= len(right)
    assert rates([row["plain"] for row in TABLE]) == PLAIN


def judged(call, rows):
    """For each row what was extracted, the verdict both ways, and whether the votes are one."""
    for row in rows:
        pred = call(row, "extract", row["response"])
        both = call(row, "equal", pred, row["gold"]), call(row, "equal", row["gold"], pred)
        yield pred, both, call(row, "canonical", pred) == call(row, "canonical", row["gold"])


def check(call, rows):
    wrong = [
        (row["gold"], row["response"], pred)
        for row, (pred, both, one_vote) in zip(rows, judged(call, rows), strict=True)
        if both != (row["right"], row["right"]) or one_vote is not row.get("vote", row["right"])
    ]
    assert wrong == []


def test_every_response_of_the_table_has_an_answer():
    checkers = {kind: make_checker("math", kind) for kind in ("math", "olympicarena")}
    for row in TABLE:
        assert checkers[row.get("kind", "math")].extract(row["response"]), row["response"]


def test_a_sample_of_the_table():
    checkers = {kind: methods("math", kind) for kind in ("math", "olympicarena")}
    check(lambda row, *task: checkers[row.get("kind", "math")](task), TABLE[::23])


@pytest.mark.slow
def test_the_table_is_judged_as_by_hand():
    checkers = {kind: methods("math", kind) for kind in ("math", "olympicarena")}
    check(lambda row, *task: checkers[row.get("kind", "math")](task), TABLE)


@pytest.mark.slow
def test_answers_of_one_vote_are_equal():
    checker = methods("math", "math")
    rows = [row for row in TABLE if row.get("kind", "math") == "math"]
    answers = {checker(("extract", row["response"])) for row in rows} | {r["gold"] for r in rows}
    votes: dict[str, list[str]] = {}
    for answer in sorted(answers):
        votes.setdefault(checker(("canonical", answer)), []).append(answer)
    assert len(votes) > 250
    for alike in votes.values():
        for one in alike:
            unequal = [other for other in alike if not checker(("equal", one, other))]
            assert unequal == [], one


@pytest.mark.slow
def test_plain_math_verify_judges_the_table_as_noted(monkeypatch):
    from math_verify import parse, verify

    monkeypatch.setattr(logging.getLogger("math_verify.parser"), "disabled", True)
    for row in TABLE:
        gold, found = (
            parse(text, parsing_timeout=None)
            for text in (f"\\boxed{{{row['gold']}}}", row["response"])
        )
        assert bool(verify(gold, found, timeout_seconds=None)) is row["plain"], row
