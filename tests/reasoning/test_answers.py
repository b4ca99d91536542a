import json
from fractions import Fraction
from importlib import metadata
from pathlib import Path

import pytest

from w2s_jax.errors import InputError
from w2s_jax.reasoning import answers
from w2s_jax.reasoning.answer_text import clean, last_box
from w2s_jax.reasoning.answers import gold_answer, grade, make_checker, methods
from w2s_jax.reasoning.quantities import read_number_words
from w2s_jax.reasoning.workers import Workers
from w2s_jax.text.rows import read_jsonl

DISAGREEMENTS = Path(__file__).parent.parent / "golden" / "reasoning" / "math_disagreements.json"

# Each line: forms of one answer, which are equal both ways and cast one vote.
ONE_VOTE = [
    ("1000", "1,000", "1000.0", "1000.", "$1000", r"\$1000", "$1,000.00", "1000 dollars"),
    ("1000", "1{,}000", r"1\,000", r"1{,}\!000", "1 000", r"$1000$", r"\(1000\)", "1000 clips"),
    (
        "1/2",
        r"\frac{1}{2}",
        r"\frac12",
        r"\dfrac{1}{2}",
        r"\tfrac{2}{4}",
        "0.5",
        ".5",
        r"\frac{2}{4}",
    ),
    ("3/2", r"1\frac{1}{2}", "1 1/2", r"1 \frac12", "1.5", r"\frac{3}{2}"),
    ("-1/2", r"-\frac{1}{2}", r"\frac{-1}{2}", "−0.5", r"-\frac12"),
    ("1/2", r"50\%", "50%", "50 percent", "50 %"),
    ("5 cm", r"5\text{ cm}", r"5 \mathrm{~cm}", "5 centimeters", "x = 5 cm", "50 mm", "0.05 m"),
    ("5 cm^2", r"5\text{ cm}^2", "5 square centimeters", "5 sq cm", "5 cm²"),
    ("5", "x = 5", "5 apples", "$5", "5 dollars", "500 cents", "approximately 5."),
    ("2.5 h", "2 hours 30 minutes", "2 hours and 30 minutes", "150 min"),
    ("4:30 pm", "4:30 p.m.", "4:30 PM", "16:30"),
    ("1/3", r"0.\overline{3}", r"0.\overline3", "0.333..."),
    (r"60^\circ,120^\circ", "120°, 60°", r"60^{\circ} \text{ and } 120^{\circ}"),
    (r"2\pi", "2pi", "2π", "2*pi"),
    ("x>3", r"(3,\infty)", "3 < x", r"x \in (3, \infty)", r"x \gt 3"),
    (r"x \le 3", r"x\leq 3", r"x \leqslant 3", r"(-\infty, 3]"),
    (r"3\pmod7", r"3 \pmod{7}", r"x \equiv 3 \pmod 7"),
    ("xy", "yx", r"x \cdot y"),
    (r"\pm3", "3, -3", "±3", r"x = \pm 3"),
    ("y = 2x+1", "2x+1", "2x - y + 1 = 0"),
    (r"\sin^2 x", r"1-\cos^2 x"),
    ("90", r"90^\circ", r"90^{\circ}", "90 degrees", "90°"),
    ("72", "72 clips in total", "072", r"\text{72}", "72.00"),
    (r"(1,2)", r"\left( 1, 2 \right)", r"\left(1,2\right)", "(1, 2)", "( 1.0 , 2 )"),
    (r"\{1,2,3\}", r"\{3,2,1\}", r"\left\{ 2, 1, 3 \right\}", "3, 1, 2"),
    ("1,2", "2, 1", "1 and 2", r"2 \text{ or } 1", "x=1 or x=2"),
    (r"(0,1]", r"\left( 0, 1 \right]", r"x \in (0,1]"),
    (r"(-\infty,2)\cup(3,\infty)", r"\left(-\infty, 2\right) \cup \left(3, \infty\right)"),
    (r"(-\infty,2)\cup(3,\infty)", r"\le(-\iny,2\right)\cup(3,\iny)"),  # as published
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
    (r"2\sqrt{3}", r"\sqrt{12}", r"2\sqrt3", r"\sqrt{3} \cdot 2"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"16\pi", "16π", r"\pi \cdot 16"),
    (r"x^2+2x+1", r"(x+1)^2", "1 + 2x + x^2"),
    ("1024", "2^10", "2**10", "2^{10}"),
    (r"6.02 \times 10^{23}", "6.02e23", r"602 \cdot 10^{21}"),
    ("0.001", "10^{-3}", "1e-3"),
    ("10 m/s", r"10 \mathrm{~m/s}", "36 km/h", "10 m s^{-1}", "10 meters per second"),
    (r"\binom{12}{4}", "495"),
    ("B", r"\text{(B)}", "(B)", "B: 86 years", "B. because"),
    ("yes", "Yes", r"\text{Yes}"),
    ("4294967296", "2^{32}"),
    ("24", "4!"),
]
# Equal, but not one vote: one leaves out what the question may have told, or rounds.
EQUAL = [
    *[("5", "5 cm"), ("£5", "5"), ("12 m/s", "12"), ("50%", "50"), ("60, 120 cm", "60, 120")],
    *[(r"3 \pmod 7", "3"), ("101_2", "101"), ("4:30", "4:30 pm"), ("0.333333", r"\frac{1}{3}")],
    *[("$18 per day", "$18"), ("18 euros per hour", "€18")],
]
DIFFERENT = [
    *[("5", "6"), ("", "5"), ("-5", "5"), ("1,2", "12"), ("(1,2)", "(2,1)"), ("[0,1)", "[0,1]")],
    *[("0.33", "1/3"), (r"\{1,2\}", r"\{1,2,3\}"), ("3 or 5", "3"), ("x+1", "x+2"), ("5x", "5")],
    *[("10_2", "10_3"), (r"\sqrt{2}", "1.41"), ("1/0", "0"), ("yes", "no"), ("5i", "5")],
    *[("5 cm", "5 m"), ("5 cm", "5 cm^2"), ("36 km/h", "36 m/s"), ("5 kg", "5 s"), ("50%", "5")],
    *[(r"6.67 \times 10^{-11}", r"1 \times 10^{-11}"), ("1e-9", "0"), ("A", "B"), ("0.5%", "50%")],
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
    *[(r"(\frac{17}{4},0)", r"\frac{17}{4}"), ("17/4", r"\le(\frac{17}{4},0\right)")],
    *[("27 7", "34"), ("8 4", "12"), ("1 2", "12"), ("mg", "Mg"), ("F", "f"), ("NRT", "nRT")],
    *[("4:30", "2:15"), ("4:30 am", "4:30 pm"), ("2:00", "3:00"), ("20 °C", "20 °F"), ("5xy", "5")],
    *[("$18 per day", "€18"), ("$18 per day", "$9 per day")],
    *[("$5", "5 euros"), ("5 mg", "5 Mg"), ("x=1, y=2", "y=1, x=2"), ("x > 3", r"x \ge 3")],
]


@pytest.fixture(scope="module")
def pool():
    """One worker with the checker `math`: sympy takes long to import."""
    factory = "w2s_jax.reasoning.answers:methods"
    with Workers(factory, ("math", "math"), workers=1, seconds=20) as pool:
        yield pool


@pytest.fixture(scope="module")
def judge(pool):
    """Calls methods of the checker in the worker: `judge("equal", "1", "2")`."""
    return lambda *task: pool.run([task])[0]


@pytest.mark.parametrize("forms", ONE_VOTE, ids=lambda forms: forms[0])
def test_forms_of_one_answer(judge, forms):
    assert {judge("canonical", form) for form in forms} == {judge("canonical", forms[0])}
    assert [(f, judge("equal", f, forms[0])) for f in forms] == [(f, True) for f in forms]
    assert [(f, judge("equal", forms[0], f)) for f in forms] == [(f, True) for f in forms]


@pytest.mark.parametrize(("left", "right"), EQUAL)
def test_equal_where_one_says_less(judge, left, right):
    assert judge("equal", left, right) is True
    assert judge("equal", right, left) is True
    assert judge("canonical", left) != judge("canonical", right)


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_different_answers(judge, left, right):
    assert judge("equal", left, right) is False
    assert judge("equal", right, left) is False
    assert judge("canonical", left) != judge("canonical", right)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("five hundred thousand", (500_000, "")),
        ("one million two thousand and five", (1_002_005, "")),
        ("Twenty-one apples", (21, " apples")),
        ("minus two thirds", (Fraction(-2, 3), "")),
        ("one and a half hours", (Fraction(3, 2), " hours")),
        *[(text, None) for text in ("third", "two and three", "two thousand million", "onerous")],
    ],
)
def test_numbers_in_words(text, read):
    assert read_number_words(text) == read


def test_canonical_forms(judge):
    forms = {
        "$1,000.00": "1000",
        "90°": "90",
        "5 cm": "1/20 m",
        "€5": "5 euro",
        "50%": "1/2",
        "-0.75": "-3/4",
        "2, 1": "{1,2}",
        "(2, 1.0]": "(2,1]",
        "No": "no",
        "": "",
    }
    assert {answer: judge("canonical", answer) for answer in forms} == forms


@pytest.mark.parametrize(
    ("prediction", "gold", "same"),
    [
        *[("C, A", "AC", True), ("A and C", "AC", True), ("[A, C]", "A, C", True)],
        *[("A", "AC", False), ("b", "B", True), ("(D)", "D", True), ("D", "A", False)],
        *[("True", "true", True), (r"3.0 \times 10^8 \mathrm{~m/s}", "3e8 m/s", True)],
        *[(r"mg\sin\theta", r"m g \sin \theta", True), ("2.5 kg", "2500 g", True)],
    ],
)
def test_olympic_answers(prediction, gold, same):
    checker = methods("math", "olympicarena")
    assert checker(("equal", prediction, gold)) is same
    if same and gold != "2500 g":
        assert checker(("canonical", prediction)) == checker(("canonical", gold))


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so 48+24=72.\n#### 72", "72"),
        ("#### 5\nthen\n#### 6", "6"),
        ("#### 5\nQuestion: more\n#### 6", "5"),
        ("The answer is: $\\boxed{5}$", "5"),
        ("Hence \\boxed{3} and \\boxed{4}.", "3, 4"),
        ("First \\boxed{3}. But no. So finally we have \\boxed{4}.", "4"),
        ("\\boxed{\\frac{1}{2}}, as \\{x\\} shows", "\\frac{1}{2}"),
        ("The answer is: 12 apples, because 3*4=12.", "12 apples"),
        ("The final answer is $x = 5$ and $y=3$. I hope it is correct.", "x = 5, y=3"),
        ("**Answer:** 7", "7"),
        ("The answer is \\$5.50.", "$5.50"),
        ("The answer is 3.5. Then more.", "3.5"),
        ("The answer is:\n\n7", "7"),
        ("The answer is 3. So \\boxed{12", "3"),
        ("The final answer is \\[\\boxed{A}\\]", "A"),
        ("Hence $\\boxed{7}$. We can check that this answer is correct.", "7"),
        ("#### 18\nThe answer is in dollars, and without the eggs it would be 20.", "18"),
        ("The answer is 11. To check, the answer is valid for n = 1.", "11"),
        ("The sum is $\\boxed 5$.", "5"),
        ("The sum is $\\boxed \\frac{3}{4}$.", "\\frac{3}{4}"),
        ("The answer is **72**.", "72"),
        ("**Final Answer: 72**", "72"),
        ("### Final Answer\n\n**72**", "72"),
        ("#### Step 1: 3 dogs\n\n#### 2. Eight cats\n\nAnswer: 11 animals", "11 animals"),
        ("So she sold **72** clips in May.", "72"),
        ("**Answer:** 2**10", "2^{10}"),
        ("<think>The answer is 3.</think>\n\n**4**", "4"),
        ("The answer is approximately 3.", "3"),
        ("The answer is Evelyn.", "Evelyn"),
        ("The answer is -x^3+4x^2-7x-3.", "-x^{3}+4x^{2}-7x-3"),
        ("The answer is -n(n+1)/2.", "-n(n+1)/2"),
        ("The answer is $20 and not $30.", "$20"),
        ("She spent $70 on 7.\nEach gift cost $10", "$10"),
        *[("\\boxed{12", ""), ("She has 72 clips.", ""), ("#### ", ""), ("", "")],
        *[("This answer is correct.", ""), ("The answer is not clear to me yet", "")],
    ],
)
def test_extraction(response, answer):
    assert make_checker("math", "math").extract(response) == answer


def test_gsm8k_reads_its_own_mark_first():
    response = "#### 4\nThat is \\boxed{5}, so the answer is 6."
    assert make_checker("math", "gsm8k").extract(response) == "4"
    assert make_checker("math", "math").extract(response) == "5"


def test_boxes():
    assert last_box("a \\boxed{1{2}\\}3} b") == (2, "1{2}\\}3")
    assert last_box("\\boxed{\\boxed{5}}") == (0, "\\boxed{5}")
    assert last_box("\\fbox {x}") == (0, "x")
    assert last_box("}}\\boxed{x}{{") == (2, "x")
    assert last_box("boxed{1} \\boxed{") == (-1, "")


def test_cleaning_keeps_rows_of_matrices():
    rows = r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"
    assert clean(rows).count("\\\\") == 1
    assert clean(r"\begin{pmatrix}1\\2\end{pmatrix}") == r"\begin{pmatrix}1\\2\end{pmatrix}"


@pytest.mark.parametrize(
    ("solution", "kind", "answer"),
    [
        ("48/2 = 24\n#### 1,024", "gsm8k", "1,024"),
        ("72", "gsm8k", "72"),
        ("so $\\boxed{\\frac{1}{2}}$.", "math", "\\frac{1}{2}"),
        ("We get 5. The answer is: 5", "math", "5"),
        ("So none. The answer is: not possible for any n", "math", "not possible for any n"),
        ("\\boxed{3} The answer is: 4", "math", "3"),
        (
            "\\begin{pmatrix}1\\\\\n2\\end{pmatrix}",
            "math",
            "\\begin{pmatrix}1\\\\\n2\\end{pmatrix}",
        ),
        ("AC", "olympicarena", "AC"),
    ],
)
def test_gold_answers(solution, kind, answer):
    assert gold_answer(solution, kind) == answer


@pytest.mark.parametrize("solution", ["", "  ", "two\nlines", "####  "])
def test_solutions_without_an_answer(solution):
    if solution.strip() == "####":
        assert gold_answer(solution, "gsm8k") == "####"
        return
    with pytest.raises(InputError, match='a solution without a final answer \\(no "#### '):
        gold_answer(solution, "gsm8k")


def test_published_rules():
    published = make_checker("published", "gsm8k")
    mathematics = make_checker("published", "math")
    assert published.extract("x\n#### $1,000") == "1000"
    assert published.extract("#### 5\nmore") == ""
    assert published.extract("#### 5 Question: #### 6") == "5"
    assert published.extract("The answer is 1,200. So 5") == "1200"
    assert mathematics.extract("The answer is: \\left(1,\\dfrac12\\right)") == (
        "\\le(1,\\dfrac{1}{2}\\right)"
    )
    assert mathematics.extract("The answer is: B</s>") == "b"
    assert mathematics.extract("The answer is: 5</s> and 1234") == "5</s>and"
    assert published.equal("50", "50%")
    assert not published.equal("0.50", "0.5")
    assert answers.published_form("x = \\text{an } \\frac12 \\%") == "\\frac{1}{2}%"


@pytest.fixture(scope="module")
def llama(shared_data):
    folder = shared_data / "w2s_reasoning"
    golds = [
        gold_answer(row["answer"], "gsm8k") for row in read_jsonl(folder / "gsm8k_train_2.jsonl.gz")
    ]
    return read_jsonl(folder / "llama2_7b_weak_results.jsonl.gz"), dict(enumerate(golds))


# Of data of which the whole takes many seconds, every 31st row is judged here.
ROWS = [31, pytest.param(1, marks=pytest.mark.slow)]


@pytest.mark.parametrize("step", ROWS)
def test_published_reproduces_published_rows(llama, step):
    rows, golds = llama[0][::step], llama[1]
    asked = [{"id": row["id"], "response": row["response"]} for row in rows]
    graded = grade(asked, golds, "published", "gsm8k")
    assert len(graded) == -(-7000 // step)
    assert [row["pred"] for row in graded] == [row["pred"] for row in rows]
    assert [row["result"] for row in graded] == [row["result"] for row in rows]


@pytest.mark.parametrize("step", ROWS)
def test_math_judges_llama_rows_by_value(llama, step):
    rows, golds = llama[0][::step], llama[1]
    asked = [{"id": row["id"], "response": row["response"]} for row in rows]
    graded = grade(asked, golds, "math", "gsm8k", workers=1)
    differ = [row for row, was in zip(graded, rows, strict=True) if row["result"] != was["result"]]
    # What strings keep apart, 0.50 and 0.5, is equal; nothing that was right turns wrong.
    assert all(row["result"] for row in differ)
    worded = {
        (row["pred"], row["gold"]) for row in differ if not row["pred"].replace(".", "").isdigit()
    }
    if step == 1:
        assert len(differ) == 15
        assert worded == {("2 hours 30 minutes", "2.5"), ("$10", "10")}
    assert not any("error" in row for row in graded)


@pytest.mark.parametrize("step", ROWS)
def test_math_disagreements_are_those_explained(shared_data, pool, step):
    """All that are explained, and some rows or all of the others."""
    explained = json.loads(DISAGREEMENTS.read_text())
    rows = read_jsonl(shared_data / "answers" / "math_pred_gold_result.jsonl.gz")
    rows = {
        str(index): row
        for index, row in enumerate(rows)
        if index % step == 0 or str(index) in explained
    }
    verdicts = pool.run([("equal", row["pred"], row["gold"]) for row in rows.values()])
    differ = {
        index: verdict
        for verdict, (index, row) in zip(verdicts, rows.items(), strict=True)
        if verdict is not row["result"]
    }
    assert differ == {index: verdict for index, (verdict, _) in explained.items()}


def test_wrong_names():
    with pytest.raises(InputError, match="kind of answers 'poems': one of gsm8k, math, olympic"):
        make_checker("math", "poems")
    with pytest.raises(InputError, match="kind of answers 'poems'"):
        gold_answer("5", "poems")
    with pytest.raises(InputError, match="checker 'sympy': one of math, published, harness"):
        make_checker("sympy", "math")
    with pytest.raises(InputError, match="checker harness reads gsm8k answers only, not math"):
        make_checker("harness", "math")


@pytest.mark.parametrize("found", ["4.13.2", None])
def test_antlr_of_another_version_is_an_error(monkeypatch, found):
    def version(package: str) -> str:
        if package != "antlr4-python3-runtime":
            return metadata.version(package)
        if found is None:
            raise metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(answers, "version", version)
    with pytest.raises(InputError, match=r"pip install antlr4-python3-runtime==4\.11\.0") as error:
        grade([], None, "math", "math")
    assert (found or "none") in str(error.value)
    assert "\n" not in str(error.value)
    make_checker("published", "math")


def harness_cases(shared_data: Path) -> list[str]:
    rows = read_jsonl(shared_data / "w2s_reasoning" / "llama2_7b_weak_results.jsonl.gz")
    made = [
        "#### -1,000.50.",
        "#### $5",
        "no",
        "#### 5 #### 6",
        "it is 7.",
        "$$.",
        "#### .",
        "a -3",
    ]
    return [row["response"] for row in rows] + made


@pytest.mark.harness
@pytest.mark.parametrize("name", ["harness", "harness-flexible"])
def test_harness_filters(shared_data, name):
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    yaml = pytest.importorskip("yaml")
    import lm_eval
    from lm_eval.api.metrics import exact_match_fn

    task = yaml.safe_load(
        (Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text()
    )
    told = {"harness": "strict-match", "harness-flexible": "flexible-extract"}[name]
    listed = next(entry for entry in task["filter_list"] if entry["name"] == told)
    options = {k: v for k, v in listed["filter"][0].items() if k != "function"}
    metric = {
        k: v for k, v in task["metric_list"][0].items() if k.startswith(("ignore", "regexes"))
    }
    texts = harness_cases(shared_data)
    found = [
        kept[0] for kept in extraction.RegexFilter(**options).apply([[t] for t in texts], [{}])
    ]
    checker = make_checker(name, "gsm8k")
    golds = ["solution\n#### 72", "#### -1,000.50", "#### 7", "#### 5"]
    for text, theirs in zip(texts, found, strict=True):
        ours = checker.extract(text)
        for gold in golds:
            match = exact_match_fn(predictions=[theirs], references=[gold], **metric)["exact_match"]
            assert bool(match) is checker.equal(ours, gold), (text, gold)
        assert (ours == "") <= (theirs == "[invalid]" or not theirs.strip("$.,")), text
