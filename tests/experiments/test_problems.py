"""Word problems made from a seed: that they are right, repeatable, apart, and held out."""

import re

import pytest

from w2s_jax.errors import InputError
from w2s_jax.experiments.problems import (
    WORDINGS,
    ProblemConfig,
    general_text,
    is_held_out,
    make_problem,
    make_problems,
    question_rows,
)
from w2s_jax.reasoning.answers import gold_answer, make_checker

SUM = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
APPLY = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}
HELD_OUT = ProblemConfig(wordings="held out")


def solve(question):
    """The answer, read from the sentences alone by patterns written for this test."""
    sentences = re.split(r"(?<=[.?]) ", question)
    opening = re.match(r"(?:At first )?(\w+) (?:has|owns) (\d+) (\w+)\.", sentences[0])
    name, start, items = opening.groups()
    value, other = int(start), None
    for sentence in sentences[1:-1]:
        numbers = [int(n) for n in re.findall(r"\d+", sentence)]
        if items not in sentence:
            continue  # of something else
        if "more" in sentence and "than" in sentence:
            other = value + numbers[0]
        elif "fewer" in sentence:
            other = value + numbers[0] * (1 if sentence.startswith(name) else -1)
        elif re.search(r"times as many \w+ as (?!before)\w+\.$", sentence):
            other = value * numbers[0]
        elif "times" in sentence:
            value *= numbers[0]
        elif "equal" in sentence:
            value = value / numbers[0]
        elif len(numbers) == 2:
            value += numbers[0] * numbers[1]
        elif re.search(rf"{name} (finds|buys|takes|gets)|gives .* to {name}|gets", sentence):
            value += numbers[0]
        else:
            value -= numbers[0]
    return value if other is None else value + other


@pytest.mark.parametrize("config", [None, HELD_OUT, ProblemConfig((5,), 20, 1.0, "all")])
def test_solutions_are_right_and_answer_the_question(config):
    for problem in make_problems(150, 3, config):
        largest = (config or ProblemConfig()).largest
        sums = SUM.findall(problem.solution)
        assert len(sums) == len(problem.lines)
        for left, sign, right, value in sums:
            assert APPLY[sign](int(left), int(right)) == int(value)
            assert 1 <= int(value) <= largest
        assert problem.solution.endswith(f"\n#### {problem.answer}")
        assert solve(problem.question) == problem.answer, problem


def test_final_answers_are_read_by_the_checkers_of_gsm8k():
    problem = make_problem(0, 0)
    for name in ("published", "harness", "math"):
        assert make_checker(name, "gsm8k").extract(problem.solution) == str(problem.answer)
    assert gold_answer(problem.solution, "gsm8k") == str(problem.answer)


def test_a_problem_depends_on_its_seed_and_index_alone():
    alone = make_problem(7, 40)
    assert alone == make_problem(7, 40)
    assert alone in [make_problem(7, index) for index in range(41)]
    assert alone != make_problem(8, 40)
    assert make_problems(50, 7)[:20] == make_problems(20, 7)


def test_all_step_counts_and_wordings_come_up():
    problems = make_problems(600, 0, ProblemConfig(wordings="all"))
    assert {len(problem.lines) for problem in problems} == {2, 3, 4, 5}
    wordings = {wording for problem in problems for wording in problem.wordings}
    assert wordings == {(name, i) for name, texts in WORDINGS.items() for i in range(len(texts))}
    only = make_problems(40, 0, ProblemConfig(steps=(5,)))
    assert {len(problem.lines) for problem in only} == {5}


def test_held_out_wordings_are_in_all_tests_and_in_no_training():
    shown, held_out = make_problems(150, 1), make_problems(150, 1, HELD_OUT)
    assert not any(problem.held_out for problem in shown)
    assert all(problem.held_out for problem in held_out)
    assert any(is_held_out(*wording) for wording in held_out[0].wordings)


def test_sets_share_no_question():
    first = make_problems(250, 5, ProblemConfig((2,), 12, 0.0))
    asked = {problem.question for problem in first}
    assert len(asked) == 250
    second = make_problems(250, 5, ProblemConfig((2,), 12, 0.0), without=asked)
    assert not asked & {problem.question for problem in second}


def test_general_text_answers_no_question_that_is_kept_from_it():
    easy = ProblemConfig((2,), 12, 0.0)
    kept = {problem.question for problem in make_problems(300, 9, easy)}
    texts = general_text(300, 9, easy, without=kept)
    assert texts[:30] == general_text(30, 9, easy, without=kept)
    assert not any(question in text for text in texts for question in kept)
    blocks = [text for text in texts if text.startswith("Question: ")]
    assert 100 < len(blocks) < 200
    for block in blocks:
        assert 2 <= len(re.findall(r"(?:^|\n\n)Question: .*\nAnswer: ", block)) <= 4
    rights = [
        APPLY[sign](int(left), int(right)) == int(value)
        for block in blocks
        for left, sign, right, value in SUM.findall(block)
    ]
    assert 0.85 < sum(rights) / len(rights) < 0.99


def test_held_out_wordings_are_told_in_stories_alone():
    told = [
        text
        for text in general_text(400, 4)
        if re.search(r"there are \d+ times as many \w+ as before|equal parts and keeps", text)
    ]
    assert len(told) > 5
    for text in told:
        assert "Now " in text
        assert "Question" not in text


def test_careful_text_has_no_slips():
    for text in general_text(200, 4, careless=0.0):
        for left, sign, right, value in SUM.findall(text):
            assert APPLY[sign](int(left), int(right)) == int(value)


def test_rows_are_questions_with_gold_answers():
    rows = question_rows(make_problems(3, 0), "a")
    assert [row["id"] for row in rows] == ["a0", "a1", "a2"]
    assert all(row["answer"].splitlines()[-1].startswith("#### ") for row in rows)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": (1,)}, "from 2 to 5"),
        ({"steps": ()}, "from 2 to 5"),
        ({"largest": 5}, "up to 12"),
    ],
)
def test_settings_out_of_range_are_one_line(values, message):
    with pytest.raises(InputError, match=message):
        ProblemConfig(**values)
