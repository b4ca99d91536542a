import json
import re

import pytest

from w2s_jax.errors import InputError
from w2s_jax.reasoning.questions import (
    Demonstration,
    completion_of,
    draw_demonstrations,
    fit_prompts,
    prompt_of,
    read_demonstrations,
    read_questions,
    read_responses,
    solution_text,
    solved_row,
)
from w2s_jax.text.rows import read_jsonl

QUESTIONS = [{"id": "a", "question": "1+1?"}, {"id": "b", "question": "2+2?"}]


@pytest.fixture
def file(tmp_path):
    def write(rows, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    return write


def refused(call, *parts):
    """The one line of the InputError, which must hold every part."""
    with pytest.raises(InputError) as error:
        call()
    line = str(error.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


def test_the_prompt_as_published():
    shots = [Demonstration("1+1?", "It is 2.\n#### 2"), Demonstration("{x}?", "{}")]
    assert prompt_of("2+2?") == "Question: 2+2?\nAnswer:"
    assert prompt_of("{0}", shots) == (
        "Question: 1+1?\nAnswer: It is 2.\n#### 2\n\nQuestion: {x}?\nAnswer: {}\n\n"
        "Question: {0}\nAnswer:"
    )
    assert prompt_of("1+1?", shots[:1]) == "Question: 1+1?\nAnswer:"
    assert completion_of(" so 4\n\n") == " so 4"


def test_a_question_that_is_a_prompt_itself_is_not_framed_again(shared_data):
    path = shared_data / "olympicarena" / "test_prompts_subset.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    questions, rows = read_questions(path), read_jsonl(path)
    assert [prompt_of(row["question"]) for row in questions] == [row["prompt"] for row in rows]
    first, second = (row["question"] for row in questions[:2])
    assert "$\\boxed{ANSWER}$" in first
    shown = prompt_of(second, [Demonstration(first, "So $\\boxed{A}$.")])
    assert shown == f"{first} So $\\boxed{{A}}$.\n\n{second}"


def test_questions_keep_their_fields_and_get_numbers_for_ids(file):
    path = file([{"question": "1+1?", "answer": 2, "source": "x"}, {"question": "2+2?"}])
    first, second = read_questions(path)
    assert first == {"id": 1, "question": "1+1?", "answer": "2", "source": "x"}
    assert second == {"id": 2, "question": "2+2?"}
    assert [row["id"] for row in read_questions(path, ids="index")] == [0, 1]


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        # The published text of MATH.
        ({"solution": "So \\boxed{2}.", "answer": "2"}, "So \\boxed{2}. The answer is: 2"),
        ({"solution": "So \\boxed{2}.", "answer": None}, "So \\boxed{2}."),
        ({"solution": "Two", "answer": 2}, "Two The answer is: 2"),
        ({"answer": "2"}, "2"),
    ],
)
def test_the_fields_of_math(file, fields, answer):
    path = file([{"id": 7, "problem": "1+1?", "level": 1, **fields}])
    assert read_questions(path, answers_needed=True) == [
        {"id": 7, "question": "1+1?", "answer": answer, "level": 1}
    ]
    assert read_demonstrations(path) == (Demonstration("1+1?", answer),)


def test_solutions_are_trained_on_without_the_calculators_marks():
    row = {"id": 3, "question": "48/2?", "answer": "<<48/2=24>>24, <<a\n>> <<1+1=2>>2\n#### 24"}
    assert solved_row(row, "gsm8k") == {
        "id": 3,
        "prompt": "Question: 48/2?\nAnswer:",
        "completion": " 24, <<a\n>> 2\n#### 24",
    }
    assert solved_row(row, "math")["completion"] == completion_of(row["answer"])


@pytest.mark.parametrize(("part", "changed"), [(1, 6821), (2, 6846)])
def test_marks_of_the_published_questions(shared_data, part, changed):
    path = shared_data / "w2s_reasoning" / f"gsm8k_train_{part}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    answers = [row["answer"] for row in read_questions(path)]
    shown = [solution_text(answer, "gsm8k") for answer in answers]
    assert sum(a != b for a, b in zip(answers, shown, strict=True)) == changed
    assert not any("<<" in text for text in shown)


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([{"question": "q"}, {"text": "q"}], ('line 2: no text "question"; found "text"',)),
        ([{"question": " "}], ('line 1: no text "question"',)),
        ([{"id": 5, "question": "q"}] * 2, ("line 2: the id 5 stands on", "line 1 already")),
        ([{"id": 2, "question": "q"}, {"question": "q"}], ("line 2: the id 2 stands on",)),
        ([{"id": True, "question": "q"}], ("line 1: the id True is neither",)),
        ([{"id": 1.5, "question": "q"}], ("line 1: the id 1.5 is neither",)),
        ([{"question": "q", "answer": ["2"]}], ('line 1: no text "answer"',)),
        ([{"question": "q", "answer": ""}], ('line 1: no text "answer"',)),
    ],
)
def test_unsound_questions_name_file_and_row(file, rows, parts):
    path = file(rows)
    refused(lambda: read_questions(path), str(path), *parts)


def test_a_row_without_an_answer_where_one_is_needed(file):
    path = file([{"question": "q", "answer": "2"}, {"question": "q", "answer": None}])
    assert "answer" not in read_questions(path)[1]
    refused(lambda: read_questions(path, answers_needed=True), f'{path} line 2: no "answer"')


def test_responses_come_by_id_in_the_order_of_the_questions(file):
    path = file(
        [
            {"id": "b", "response": "4", "prompt": "Question: 2+2?\nAnswer:"},
            {"id": "a", "output": "2", "content": "Question: 0?\n\nQuestion: 1+1?\nAnswer:"},
        ]
    )
    found = read_responses(path, QUESTIONS)
    assert list(found) == ["a", "b"]
    assert [row["response"] for row in found.values()] == ["2", "4"]


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([{"id": "c", "response": ""}], ("line 1: no question has the id 'c'", "'a' .. 'b'")),
        ([{"id": "a", "response": ""}] * 2, ("line 2: a second row for the id 'a'",)),
        ([{"id": "b", "response": ""}], ("no row for the id 'a'; 1 of 2 questions",)),
        ([{"id": "a"}], ("line 1: no text \"response\" for the id 'a'",)),
        ([{"id": "a", "response": "", "prompt": "Question: 2+2?"}], ("line 1", "have shifted")),
    ],
)
def test_responses_that_do_not_match_name_file_and_row(file, rows, parts):
    path = file(rows)
    refused(lambda: read_responses(path, QUESTIONS), str(path), *parts)


def test_ids_of_another_type_are_told(file):
    path = file([{"id": "1", "response": ""}])
    numbered = [{"id": 1, "question": "q"}]
    refused(lambda: read_responses(path, numbered), "line 1: the id '1' is a text; the questions")


def test_responses_may_be_for_some_of_the_questions(file):
    path = file([{"id": "b", "response": "4"}])
    assert list(read_responses(path, QUESTIONS, complete=False)) == ["b"]
    refused(lambda: read_responses(path, QUESTIONS, needs=("pred",), complete=False), '"pred"')


def test_demonstrations_from_a_file(file):
    path = file([{"question": "1+1?", "answer": "2"}])
    assert read_demonstrations(path) == (Demonstration("1+1?", "2"),)
    path = file([{"question": "1+1?", "answer": "2"}, {"question": "2+2?"}])
    refused(lambda: read_demonstrations(path), f'{path} line 2: no text "answer"')


def drawing(count=40):
    questions = [{"id": n, "question": f"{n // 2}?"} for n in range(count)]
    answers = {
        n: {"id": n, "response": f" r{n}\n", "pred": "" if n % 5 == 0 else "1", "result": n % 4 < 2}
        for n in range(count)
    }
    return questions, answers


def test_demonstrations_are_drawn_from_right_answers_by_the_seed():
    questions, answers = drawing()
    drawn = draw_demonstrations(questions, answers, 6, seed=1)
    numbers = [int(one.answer[1:]) for one in drawn]
    assert all(n % 4 < 2 and n % 5 for n in numbers)
    assert [one.question for one in drawn] == [f"{n // 2}?" for n in numbers]
    assert len({one.question for one in drawn}) == 6
    assert drawn == draw_demonstrations(questions[::-1], answers, 6, seed=1)
    assert drawn[:3] == draw_demonstrations(questions, answers, 3, seed=1)
    assert drawn != draw_demonstrations(questions, answers, 6, seed=2)


def test_too_few_answers_to_demonstrate():
    questions, answers = drawing(8)
    call = lambda: draw_demonstrations(questions, answers, 5, seed=0, source="weak.jsonl")  # noqa: E731
    refused(call, "weak.jsonl: 2 questions", "5 demonstrations")


SHOTS = [Demonstration(f"{n}?", "x " * 8) for n in range(3)]


def words(text):
    return len(re.findall(r"\S+", text))


def fitted(context, **options):
    files = {"source": "q.jsonl", "demonstrations_source": "d.jsonl"}
    budget = {"context": context, "max_new_tokens": 10}
    return fit_prompts(QUESTIONS, SHOTS, words, **budget, **files, **options)


def test_prompts_that_fit_hold_every_demonstration():
    # three of 11 words, the question of 3, and 10 for the response
    assert fitted(46) == [prompt_of(row["question"], SHOTS) for row in QUESTIONS]


def test_demonstrations_that_overflow_the_context():
    refused(lambda: fitted(45), "d.jsonl row 3: 3 demonstrations", "q.jsonl id 'a' take 36 tokens")
    refused(lambda: fitted(30), "d.jsonl row 2:", "of the 30 of the context 10 are")
    refused(lambda: fitted(12), "q.jsonl id 'a': the question takes 3 tokens")


def test_demonstrations_may_be_dropped_from_the_front():
    for context, left in ((45, 2), (34, 1), (13, 0)):
        kept = SHOTS[3 - left :]
        found = fitted(context, overflow="drop-first")
        assert found == [prompt_of(row["question"], kept) for row in QUESTIONS]
    refused(lambda: fitted(12, overflow="drop-first"), "q.jsonl id 'a': the question takes 3")
