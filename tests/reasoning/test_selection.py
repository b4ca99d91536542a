"""Stage I and stage II against the published sets, and the rules one by one."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reasoning.published_rule import final_answer
from w2s_jax.errors import InputError
from w2s_jax.reasoning.config import ContrastConfig
from w2s_jax.reasoning.questions import prompt_of, read_questions, read_responses
from w2s_jax.reasoning.selection import agreeing, contrastive_pairs, curate, decide, votes
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

    forms = {"": "", "1": "1", "1.0": "1", "2": "2"}
    assert agreeing(questions, weak, icl) == kept(lambda a, b: a == b != "")
    assert agreeing(questions, weak, icl, empty=True) == kept(lambda a, b: a == b)
    weak, icl = (
        {row_id: row | {"pred": forms[row["pred"]]} for row_id, row in side.items()}
        for side in (weak, icl)
    )
    assert agreeing(questions, weak, icl) == kept(
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


# --- Stage II -----------------------------------------------------------------------------------

CONFIG = ContrastConfig()
QUESTION = {"id": 1, "question": "q?"}


def test_every_published_pair_satisfies_the_rules(published):
    _, weak, read = published
    pairs = read("iter2_hybrid_paired")
    sides = Counter()
    for pair in pairs:
        own, (chosen, rejected) = weak[pair["id"]], pair["output"]
        assert (chosen == own["response"]) != (rejected == own["response"])
        other = final_answer(rejected if chosen == own["response"] else chosen)
        assert other != own["pred"]
        # the most common answer is never empty
        assert own["pred"] if chosen == own["response"] else other
        sides["chosen" if chosen == own["response"] else "rejected"] += 1
    assert sides == {"chosen": 866, "rejected": 1697}


@pytest.mark.parametrize("published_rules", [True, False])
def test_the_published_pairs_come_out_of_samples_that_hold_them(published, published_rules):
    """The samples were not published: the least sure ones that allow each pair stand for them."""
    questions, weak, read = published
    pairs, samples, sides = read("iter2_hybrid_paired")[::4], [], Counter()
    for pair in pairs:
        own, (chosen, rejected) = weak[pair["id"]], pair["output"]
        sides["chosen" if chosen == own["response"] else "rejected"] += 1
        texts = [chosen] * (6 if chosen == own["response"] else 8)
        texts += [rejected] * (10 - len(texts))
        samples += [
            {"id": pair["id"], "sample": n, "response": text, "pred": final_answer(text)}
            for n, text in enumerate(texts)
        ]
        if rejected == own["response"]:
            assert own["pred"] == final_answer(rejected)
    ids = {pair["id"] for pair in pairs}
    asked = [row for row in questions if row["id"] in ids]
    config = ContrastConfig(published=published_rules)
    found = contrastive_pairs(asked, weak, samples, config)
    assert [(row["id"], row["prompt"]) for row in found.pairs] == [
        (pair["id"], pair["instruction"]) for pair in pairs
    ]
    assert [[row["chosen"], row["rejected"]] for row in found.pairs] == [
        [f" {text}" for text in pair["output"]] for pair in pairs
    ]
    assert found.pair_counts == sides


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["2", "1", "2"], "2"),
        (["", "", "1"], ""),
        (["", "1"], "1"),  # an answer before none
        (["9", "10", "9", "10"], "10"),  # the first by characters
    ],
)
def test_votes(answers, winner):
    for order in (answers, answers[::-1]):
        assert votes(order) == (winner, answers.count(winner) / len(answers))


@pytest.mark.parametrize(
    ("weak", "answers", "verdict"),
    [
        ("1", "1111112222", "weak chosen"),
        ("1", "1111122222", "uncertain"),
        ("1", "1111111111", "unanimous"),
        ("1", "2222222211", "weak rejected"),
        ("1", "2222222111", "not overruled"),
        ("", "2222222211", "weak rejected"),
        ("", "----------", "no answer"),
        ("1", "--------11", "no answer"),
        ("1", "-----11111", "uncertain"),
    ],
)
def test_verdicts_at_the_published_thresholds(weak, answers, verdict):
    found = decide(weak, [one.strip("-") for one in answers], CONFIG)
    assert found.verdict == verdict


def graded(preds, texts=None, row_id=1):
    texts = texts or [f"{pred} by {n}" for n, pred in enumerate(preds)]
    return [
        {"id": row_id, "sample": n, "response": text, "pred": pred, "result": pred == "1"}
        for n, (pred, text) in enumerate(zip(preds, texts, strict=True))
    ]


def pairs_of(weak, samples, config=CONFIG, **options):
    own = {1: {"id": 1, "response": "own", "pred": weak, "result": weak == "1"}}
    return contrastive_pairs([QUESTION], own, samples, config, **options)


configs = st.builds(
    ContrastConfig,
    samples=st.sampled_from([5, 10]),
    min_confidence=st.sampled_from([0.2, 0.6]),
    overrule_confidence=st.sampled_from([0.6, 0.8, 1.0]),
    pairs_per_question=st.integers(1, 4),
    weighted=st.booleans(),
    seed=st.integers(0, 3),
)


@st.composite
def cases(draw):
    """A weak answer, samples of which some share their text, and a config."""
    config = draw(configs)
    texts = draw(
        st.lists(
            st.tuples(st.sampled_from(["1", "1", "1", "2", ""]), st.integers(0, 9)),
            min_size=config.samples,
            max_size=config.samples,
        )
    )
    samples = graded([pred for pred, _ in texts], [f"{pred} by {n}".strip() for pred, n in texts])
    return draw(st.sampled_from(["1", "2", ""])), samples, config


@given(cases())
def test_pairs_keep_to_counts_and_thresholds(case):
    weak, samples, config = case
    counts = Counter(sample["pred"] for sample in samples)
    most = max(counts.values())
    try:
        found = pairs_of(weak, samples, config)
    except InputError:
        winner = votes([sample["pred"] for sample in samples])[0]
        assert (
            most / len(samples) < config.min_confidence
            or winner == ""
            or (weak == winner and len(counts) == 1)
            or (weak != winner and most / len(samples) < config.overrule_confidence)
        )
        return
    assert most / len(samples) >= config.min_confidence
    texts = {" " + sample["response"]: sample["pred"] for sample in samples} | {" own": weak}
    for pair in found.pairs:
        assert counts[texts[pair["chosen"]]] == most
        assert texts[pair["chosen"]] != ""
        assert texts[pair["rejected"]] != texts[pair["chosen"]]
        assert " own" in (pair["chosen"], pair["rejected"])
        assert pair["confidence"] == most / len(samples)
        assert pair.get("weight", pair["confidence"]) == pair["confidence"]
        assert ("weight" in pair) == config.weighted
        if pair["rejected"] == " own":
            assert pair["confidence"] >= config.overrule_confidence
    sides = {(pair["chosen"], pair["rejected"]) for pair in found.pairs}
    assert len(sides) == len(found.pairs)
    winner = texts[found.pairs[0]["chosen"]]
    free = {text for text, pred in texts.items() if (pred == winner) != (weak == winner)} - {" own"}
    assert len(found.pairs) == min(config.pairs_per_question, len(free))


@given(cases(), st.randoms(use_true_random=False))
def test_order_and_duplicates_of_samples_change_nothing(case, random):
    weak, samples, config = case

    def outcome(rows, config=config):
        try:
            return pairs_of(weak, rows, config)
        except InputError as error:
            return str(error)

    expected = outcome(samples)
    again = samples + random.choices(samples, k=7)
    random.shuffle(again)
    assert outcome(again) == expected
    exact = replace(config, weighted=False, published=True)
    assert outcome(again, exact) == outcome(samples, exact)
    # nor does it matter which sample got which number
    numbers = random.sample(range(100), len(samples))
    renumbered = [row | {"sample": n} for row, n in zip(samples, numbers, strict=True)]
    assert outcome(renumbered) == expected


def test_a_draw_depends_on_seed_and_id_and_is_spread_evenly():
    preds = ["1"] * 6 + ["2"] * 4
    questions = [{"id": n, "question": "q?"} for n in range(800)]
    weak = {n: {"id": n, "response": "own", "pred": "1"} for n in range(800)}
    samples = [row for n in range(800) for row in graded(preds, row_id=n)]
    first, second = (
        contrastive_pairs(questions, weak, samples, ContrastConfig(seed=seed)).pairs
        for seed in (0, 1)
    )
    counts = Counter(pair["rejected"] for pair in first)
    assert len(counts) == 4
    assert all(abs(count - 200) < 62 for count in counts.values())  # five standard deviations
    assert 120 < sum(one == other for one, other in zip(first, second, strict=True)) < 280
    alone = contrastive_pairs(questions[7:8], weak, samples[70:80], ContrastConfig())
    assert alone.pairs == first[7:8]


def test_a_text_is_as_likely_as_its_samples_are_many():
    questions = [{"id": n, "question": "q?"} for n in range(500)]
    weak = {n: {"id": n, "response": "own", "pred": "1"} for n in range(500)}
    preds, texts = ["1"] * 6 + ["2"] * 4, ["a"] * 6 + ["b", "b", "b", "c"]
    samples = [row for n in range(500) for row in graded(preds, texts, row_id=n)]
    found = contrastive_pairs(questions, weak, samples, CONFIG)
    assert abs(sum(pair["rejected"] == " b" for pair in found.pairs) - 375) < 50


def test_several_pairs_as_published():
    config = ContrastConfig(pairs_per_question=3, published=True)
    preds = ["1"] * 8 + ["2"] * 2
    same = pairs_of("1", graded(preds, ["a"] * 8 + ["b", "b"]), config).pairs
    assert [pair["rejected"] for pair in same] == [" b", " b"]
    once = pairs_of("1", graded(preds, ["a"] * 8 + ["b", "b"]), replace(config, published=False))
    assert [pair["rejected"] for pair in once.pairs] == [" b"]

    texts = ["a", "a", "b", "b", "b", "c", "d", "e", "x", "y"]
    chosen = [pair["chosen"] for pair in pairs_of("2", graded(preds, texts), config).pairs]
    others = [f" {text}" for text in texts[:8] if f" {text}" != chosen[0]]
    assert chosen[1:] == others[:2]


def test_votes_are_counted_in_canonical_form():
    samples = graded(["1", "1.0", "$1", "1", "1", "1.00", "2", "3", "4", "5"])
    with pytest.raises(InputError, match="1 uncertain"):
        pairs_of("1", samples)
    forms = [row | {"pred": str(float(row["pred"].strip("$")))} for row in samples]
    found = pairs_of("1.0", forms)
    assert found.pair_counts == {"chosen": 1, "rejected": 0}
    assert found.pairs[0]["confidence"] == 0.6


def test_of_more_samples_than_asked_the_first_count():
    samples = graded(["1"] * 6 + ["2"] * 4 + ["3"] * 10)
    assert pairs_of("1", samples[::-1]) == pairs_of("1", samples[:10])


def test_figures():
    questions = [{"id": n, "question": "q?"} for n in (1, 2, 3)]
    weak = {n: {"id": n, "response": "own", "pred": "1", "result": True} for n in (1, 2, 3)}
    samples = graded(["1"] * 6 + ["2"] * 4)
    samples += graded(["2"] * 9 + ["1"], row_id=2) + graded(["1"] * 10, row_id=3)
    figures = contrastive_pairs(questions, weak, samples, CONFIG).as_row()
    assert figures["questions_by_verdict"] == {
        "unanimous": 1, "weak chosen": 1, "weak rejected": 1,
    }  # fmt: skip
    assert figures["mean_confidence"] == pytest.approx(2.5 / 3)
    assert figures["pairs"] == 2
    accuracies = {one["name"]: one["accuracy"]["value"] for one in figures["sets"]}
    assert accuracies == {"chosen": 0.5, "rejected": 0.5}


GOOD = graded(["1"] * 6 + ["2"] * 4)


@pytest.mark.parametrize(
    ("samples", "line"),
    [
        (GOOD[:7], "s.jsonl: id 1 has 7 of 10 samples"),
        (GOOD[:9] + GOOD[:1], "s.jsonl: id 1 has 9 of 10 samples"),
        ([], "s.jsonl: id 1 has 0 of 10 samples"),
        ([*GOOD, GOOD[0] | {"id": 5}], "s.jsonl: no question has the id 5"),
        ([*GOOD, GOOD[0] | {"pred": "7"}], "s.jsonl: two different rows are sample 0 of id 1"),
        ([*GOOD, {"id": 1, "response": ""}], 's.jsonl: a row of id 1 has no number "sample"'),
        ([row | {"pred": None} for row in GOOD], 's.jsonl: the row of id 1 has no text "pred"'),
        (graded(["1"] * 10), "stage II makes no pair of 1 questions of s.jsonl: 1 unanimous"),
    ],
)
def test_what_gives_no_pairs_is_told_in_one_line(samples, line):
    with pytest.raises(InputError) as error:
        pairs_of("1", samples, sources=("w.jsonl", "s.jsonl"))
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_question_without_weak_response():
    with pytest.raises(InputError, match="the weak responses: no row for the question of id 1"):
        contrastive_pairs([QUESTION], {}, GOOD, CONFIG)


@pytest.mark.parametrize(
    "options",
    [
        {"samples": 0},
        {"pairs_per_question": 0},
        {"min_confidence": 0.9},
        {"min_confidence": 0.0},
        {"overrule_confidence": 1.1},
        {"published": True, "weighted": True},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(InputError):
        ContrastConfig(**options)
