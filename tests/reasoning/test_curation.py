import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reasoning.published_rule import final_answer
from w2s_jax.errors import InputError
from w2s_jax.reasoning.curation import agreeing, curate
from w2s_jax.reasoning.questions import prompt_of, read_questions, read_responses
from w2s_jax.text.rows import read_rows

NAME = "train_gsm8k_llama2_7b"


@pytest.fixture(scope="module")
def published(shared_data):
    """The questions, the weak results by id, and a function that reads a published set."""
    folder = shared_data / "w2s_reasoning"
    questions = read_questions(folder / "gsm8k_train_2.jsonl.gz", ids="index")
    weak = read_responses(folder / "llama2_7b_weak_results.jsonl.gz", questions, needs=("pred",))
    return questions, weak, lambda name: read_rows(folder / f"{NAME}_{name}.json.gz")[0]


def as_published(rows):
    for row in rows:
        assert row["completion"][0] == " "
    return [
        {"id": row["id"], "content": row["prompt"], "output": row["completion"][1:]} for row in rows
    ]


def answered(rows):
    return {
        row["id"]: {**row, "response": row["output"], "pred": final_answer(row["output"])}
        for row in rows
    }


def test_the_weak_results_hold_the_published_prompts(published):
    questions, weak, _ = published
    for row in questions:
        assert prompt_of(row["question"]) == weak[row["id"]]["prompt"]


def test_iteration_1_gives_the_published_rows(published):
    questions, weak, read = published
    shared = answered(read("iter1_icl"))
    # the in-context responses to the rejected questions were not published
    other = {n: {"id": n, "response": "", "pred": f"not {row['pred']}"} for n, row in weak.items()}
    found = curate(questions, weak, other | shared, published=True)
    assert len(found.kept) == 2683
    assert found.empty == 8
    assert len(curate(questions, weak, other | shared).kept) == 2675
    assert as_published(found.weak) == read("iter1_weak")
    assert as_published(found.icl) == read("iter1_icl")
    assert found.hybrid[::2] == found.weak
    assert found.hybrid[1::2] == found.icl
    qualities = {one.name: one for one in found.qualities}
    assert qualities["all weak"].accuracy.value == pytest.approx(0.4137, abs=5e-5)
    assert qualities["weak"].accuracy.total == qualities["weak"].size == 2683
    assert qualities["weak"].accuracy.value > 0.6
    assert qualities["icl"].accuracy is None
    assert found.agreement == 2683 / 7000


def test_iteration_2_of_the_published_rows_satisfies_the_rule(published):
    questions, _, read = published
    weak, icl = answered(read("iter2_weak")), answered(read("iter2_icl"))
    asked = [row for row in questions if row["id"] in weak]
    found = curate(asked, weak, icl, iteration=2, published=True)
    assert len(found.kept) == 4022
    assert found.empty == 11
    assert as_published(found.weak) == read("iter2_weak")
    assert as_published(found.icl) == read("iter2_icl")
    assert len(curate(asked, weak, icl, iteration=2).kept) == 4011
    first = {row["id"] for row in read("iter1_weak")}
    assert len(first & set(found.kept)) == 2415


preds = st.sampled_from(["", "1", "1.0", "2"])


@given(st.lists(st.tuples(preds, preds), min_size=1, max_size=20))
def test_agreement_is_equality_of_answers_that_are_there(pairs):
    questions = [{"id": f"q{n}", "question": "?"} for n in range(len(pairs))]
    weak, icl = (
        {f"q{n}": {"id": f"q{n}", "pred": pair[side]} for n, pair in enumerate(pairs)}
        for side in (0, 1)
    )
    value = {"1": 1, "1.0": 1, "2": 2}

    def kept(rule):
        return tuple(f"q{n}" for n, pair in enumerate(pairs) if rule(*pair))

    canonical = {"1": "1", "1.0": "1", "2": "2"}.__getitem__
    assert agreeing(questions, weak, icl) == kept(lambda a, b: a == b != "")
    assert agreeing(questions, weak, icl, empty=True) == kept(lambda a, b: a == b)
    assert agreeing(questions, weak, icl, canonical) == kept(
        lambda a, b: bool(a and b) and value[a] == value[b]
    )


def rows(*preds, **fields):
    return {
        n: {"id": n, "response": f"r{n} ", "pred": pred, **fields} for n, pred in enumerate(preds)
    }


QUESTIONS = [{"id": n, "question": f"q{n}?"} for n in range(3)]


def test_sets_and_figures_of_a_made_case():
    weak, icl = rows("1", "2", ""), rows("1", "3", "", result=True)
    found = curate(QUESTIONS, weak, icl)
    row = {"id": 0, "prompt": "Question: q0?\nAnswer:", "completion": " r0"}
    assert found.weak == found.icl == [row]
    assert found.hybrid == [row, row]
    figures = found.as_row()
    assert (figures["questions"], figures["kept"], figures["agree_on_no_answer"]) == (3, 1, 1)
    sizes = {one["name"]: (one["size"], one["accuracy"]) for one in figures["sets"]}
    assert sizes["weak"] == (1, None)
    assert sizes["hybrid"][0] == 2
    assert (sizes["hybrid"][1]["correct"], sizes["hybrid"][1]["total"]) == (1, 1)


def test_no_answer_counts_as_agreement_only_as_published():
    weak = icl = rows("1", "", "")
    assert curate(QUESTIONS, weak, icl).kept == (0,)
    assert curate(QUESTIONS, weak, icl, published=True).kept == (0, 1, 2)


@pytest.mark.parametrize(
    ("weak", "icl", "line"),
    [
        (rows("1", "2", ""), rows("2", "1", ""), "stage I, iteration 1, keeps none of 3 questions"),
        (rows("1", "2"), rows("1", "2", "3"), "weak.jsonl: no row for the question of id 2"),
        (
            rows("1", "2", "3"),
            rows("1", None, "3"),
            'icl.jsonl: the row of id 1 has no text "pred"',
        ),
    ],
)
def test_what_cannot_be_curated_is_told_in_one_line(weak, icl, line):
    with pytest.raises(InputError) as error:
        curate(QUESTIONS, weak, icl, sources=("weak.jsonl", "icl.jsonl"))
    assert line in str(error.value)
    assert "\n" not in str(error.value)
