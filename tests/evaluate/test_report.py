import base64
import json
import random
import re
import zlib

import numpy as np
import pytest

from tests.evaluate.browser import find_browser, read_png, start_browser
from w2s_jax.errors import InputError
from w2s_jax.evaluate.report import shading_scale, write_report

NASTY = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{style}} \x00\x1b \ud83d "
    "&amp; \"q\" 'p' ${1} \u202eمرحبا 👩‍👩‍👧 \u2028\n<!-- end"
)
W, K, CHUNKS = 2, 3, 4


def candidate(parent, text, score, kept=None, finished=False, **more):
    return {
        "parent": parent, "text": text, "score": score, "objectives": [score], "kept": kept,
        "finished": finished, **more,
    }  # fmt: skip


def searched(row_id, rng, *, prompt=None):
    """A row as a search of W hypotheses and K successors leaves it, and its winner's places."""
    hypotheses, chunks = [(0.0, [])] * W, []
    for depth in range(CHUNKS):
        made = []
        for parent, (score, tokens) in enumerate(hypotheses):
            for _ in range(K):
                new = [(f" {rng.choice('abcdefgh')}{depth}", rng.gauss(0, 1)) for _ in range(2)]
                made.append((parent, score + sum(ratio for _, ratio in new), tokens, new))
        order = sorted(range(len(made)), key=lambda i: -made[i][1])[:W]
        chunks.append(
            {
                "candidates": [
                    candidate(parent, "".join(text for text, _ in new), score,
                              order.index(i) if i in order else None)
                    for i, (parent, score, _, new) in enumerate(made)
                ]
            }
        )  # fmt: skip
        hypotheses = [(made[i][1], made[i][2] + made[i][3]) for i in order]
    score, tokens = hypotheses[0]
    return {
        "row_id": row_id,
        "prompt": f"prompt {row_id}" if prompt is None else prompt,
        "response": "".join(text for text, _ in tokens),
        "score": score,
        "method": "cbs",
        "chunks": chunks,
        "tokens": [list(token) for token in tokens],
    }


ROWS = [searched(row_id, random.Random(row_id)) for row_id in range(12)]
ROWS[3] = searched(3, random.Random(3), prompt=NASTY)
ROWS[5] = {
    "row_id": 5,
    "prompt": "odd",
    "response": NASTY,
    "score": float("-inf"),
    "method": NASTY,
    "chunks": [
        {"candidates": [candidate(0, NASTY, 1.5, 0, objectives=[1.0, 0.5]),
                        candidate(1, "b", float("nan"), objectives=[1.0, float("inf")])]},
        {"candidates": [candidate(0, "", 1.5, 0, True)]},
    ],
    "tokens": [["</>", -1e9], ["\x00", float("nan")], ["\n", 0.1], ["مرحبا", 0.25], ["\ud83d", 0]],
}  # fmt: skip
ROWS[6] = {"row_id": 6, "prompt": "", "response": "", "score": 0.0}
SETTINGS = {"policy": NASTY, "w": W, "stop": ["\n"], "seed": None}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "a" / "report.html"
    write_report(path, iter(ROWS), title=f"Trial {NASTY}", settings=SETTINGS)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    binary = find_browser()
    if binary is None:
        pytest.skip("no browser: install chromium (Debian: apt-get install chromium)")
    page = start_browser(binary, tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture
def page(browser):
    browser.faults.clear()
    browser.requests.clear()
    browser.size(1280, 900)
    browser.scheme("light")
    yield browser
    assert not browser.faults
    addresses = {address.split("#")[0] for address in browser.requests}
    assert all(address.startswith(("file:", "about:", "data:")) for address in addresses)
    assert len([address for address in addresses if address.startswith("file:")]) <= 1


def texts(page, selector):
    return page.run(
        f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)"
    )


def count(page, selector):
    return page.run(f"document.querySelectorAll({json.dumps(selector)}).length")


def packed(path):
    """The values that the page holds, by the name of their element."""
    blocks = re.findall(
        rb'<script type="text/plain" id="([\w-]+)">([^<]*)</script>', path.read_bytes()
    )
    return {
        name.decode(): json.loads(zlib.decompress(base64.b64decode(data))) for name, data in blocks
    }


def test_the_file_holds_every_row_and_no_markup_from_data(report):
    values = packed(report)
    assert len(values) == len(ROWS) + 1
    entry = values["index-data"]["rows"][3]
    assert entry[:3] == [3, NASTY, ROWS[3]["response"]]
    assert entry[3] == pytest.approx(ROWS[3]["score"], rel=1e-6)
    page = report.read_text("utf-8")
    assert page.count("<script") == len(ROWS) + 2
    assert "<img" not in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


def test_the_index_lists_every_row(report, page):
    page.open(report)
    assert count(page, "#rows tr") == len(ROWS)
    assert texts(page, "#rows td.row") == [str(row["row_id"]) for row in ROWS]
    assert texts(page, "#rows td.prompt")[4] == "prompt 4"
    assert texts(page, "#rows td.response")[4] == ROWS[4]["response"]
    assert texts(page, "#rows td.score")[4] == f"{ROWS[4]['score']:.2f}".replace("-", "−")
    assert texts(page, "#rows td.score")[5] == "−∞"
    assert page.run("document.getElementById('summary').textContent").startswith("12 prompts · ")
    assert texts(page, "#settings dt") == list(SETTINGS)
    assert texts(page, "#settings dd")[1:] == ["2", '["\\n"]', "null"]
    assert page.run("document.getElementById('view').hidden")
    assert count(page, ".node") == 0


def test_the_index_sorts_and_filters(report, page):
    page.open(report)
    page.run("document.querySelector('[data-sort=\"3\"]').click()")
    found = [int(text) for text in texts(page, "#rows td.row")]
    assert found == sorted(range(12), key=lambda i: -ROWS[i]["score"])
    assert page.run("document.querySelector('th:last-child').ariaSort") == "descending"
    page.run("document.querySelector('[data-sort=\"3\"]').click()")
    assert [int(text) for text in texts(page, "#rows td.row")] == found[::-1]
    page.press("/")
    for letter in "ONERROR=alert":
        page.press(letter)
    assert {int(text) for text in texts(page, "#rows td.row")} == {3, 5}
    assert page.run("document.getElementById('count').value") == "2 of 12"
    page.press("Escape")
    for letter in "#11":
        page.press(letter)
    assert texts(page, "#rows td.row") == ["11"]


def test_an_opened_row_shows_its_tree(report, page):
    row = ROWS[2]
    page.open(report, "#row-2")
    assert count(page, ".column") == CHUNKS
    assert count(page, ".node") == W * K * CHUNKS
    assert count(page, ".node.kept") == W * CHUNKS
    assert count(page, ".node.winner") == CHUNKS
    assert texts(page, ".column h4")[1] == "Chunk 2 · 2 of 6 kept"
    assert "".join(texts(page, ".node.winner .text")) == row["response"]
    best = max(row["chunks"][-1]["candidates"], key=lambda one: one["score"])["score"]
    assert texts(page, ".node.winner .score")[-1] == f"{best:.2f}".replace("-", "−")
    links = page.run("""Object.fromEntries([...document.querySelectorAll('.links path')].map(
        (path) => [path.getAttribute('class'), path.getAttribute('d')]))""")
    assert {name: path.count("M") for name, path in links.items()} == {
        "dropped": (W * K - W) * CHUNKS,
        "kept": (W - 1) * CHUNKS,
        "winner": CHUNKS,
        "chosen": CHUNKS,
    }
    places = "".join(texts(page, ".column:nth-child(3) .place"))
    assert sorted(places) == sorted("12––––")
    assert count(page, ".objectives") == 0
    assert "M" in page.run("document.querySelector('.chart.whole .winner').getAttribute('d')")


def test_links_begin_and_end_at_their_nodes(report, page):
    page.open(report, "#row-2")
    ends = page.run("""[...document.querySelectorAll('.links .winner')].map((path) => {
        const box = document.querySelector('.tree').getBoundingClientRect();
        const last = [...document.querySelectorAll('.node.winner')].at(-1).getBoundingClientRect();
        const end = path.getPointAtLength(path.getTotalLength());
        return [end.x - (last.left - box.left), end.y - ((last.top + last.bottom) / 2 - box.top)];
    })[0]""")
    assert np.abs(ends).max() < 1.5


def test_children_stand_with_their_parent_in_its_order(report, page):
    page.open(report, "#row-2")
    parents = page.run("""[...document.querySelectorAll('.column')].map((column) =>
        [...column.querySelectorAll('.node')].map((button) => button.node.parent?.order))""")
    for column in parents[1:]:
        assert column == sorted(column)
        assert len(set(column)) == W


def test_the_winners_tokens_are_shaded(report, page):
    page.open(report, "#row-2")
    tokens = ROWS[2]["tokens"]
    found = page.run("""[...document.querySelectorAll('.tokens .token')].map((token) => ({
        text: token.firstChild.textContent, less: token.classList.contains('less'),
        share: Number(token.style.getPropertyValue('--t')), title: token.title,
        colour: getComputedStyle(token).backgroundColor,
        line: getComputedStyle(token).borderBottomStyle,
    }))""")
    scale = packed(report)["index-data"]["scale"]
    assert [token["text"] for token in found] == [text for text, _ in tokens]
    for token, (_, ratio) in zip(found, tokens, strict=True):
        assert token["share"] == pytest.approx(min(1, abs(ratio) / scale), abs=1e-3)
        assert token["less"] == (ratio < 0)
        assert token["line"] == ("dotted" if ratio < 0 else "solid")
        assert float(token["title"].split()[0].replace("−", "-")) == pytest.approx(ratio, rel=1e-6)
        red, _, blue = [int(part) for part in re.findall(r"\d+", token["colour"])[:3]]
        assert (red > blue) == (ratio < 0)
    assert len(texts(page, ".swatches .token")) == 7


def test_values_can_be_read_without_colour(report, page):
    page.open(report, "#row-2")
    hidden = "getComputedStyle(document.querySelector('.tokens .token i')).display === 'none'"
    assert page.run(hidden)
    page.run("document.getElementById('valued').click()")
    assert not page.run(hidden)
    ratios = [float(text.replace("−", "-")) for text in texts(page, ".tokens .token i")]
    np.testing.assert_allclose(ratios, [ratio for _, ratio in ROWS[2]["tokens"]], atol=0.0051)
    page.run("document.querySelector('.tokens').focus()")
    page.press("ArrowRight")
    page.press("ArrowRight")
    readout = page.run("document.getElementById('readout').textContent")
    assert readout.startswith(f"Token 2 “{ROWS[2]['tokens'][1][0]}”: log-ratio ")


def test_the_keyboard_walks_tree_and_rows(report, page):
    page.open(report, "#row-2")
    where = "[document.activeElement.node.depth, document.activeElement.node.order]"
    page.run("document.querySelector('.node[tabindex=\"0\"]').focus()")
    assert page.run(where)[0] == CHUNKS - 1
    page.press("ArrowLeft")
    assert page.run(where)[0] == CHUNKS - 2
    page.press("Home")
    assert page.run(where)[0] == 0
    page.press("ArrowDown")
    chosen = page.run("document.querySelector('.node[aria-current]').textContent")
    assert chosen == page.run("document.activeElement.textContent")
    assert page.run("document.querySelector('.inspector').textContent").startswith("Chunk1 of 4")
    assert page.run("document.querySelector('.links .chosen').getAttribute('d')").count("M") == 1
    page.press("n")
    page.wait("document.querySelector('#view h2')?.textContent === 'Row 3'")
    page.press("p")
    page.wait("document.querySelector('#view h2')?.textContent === 'Row 2'")
    page.press("Escape")
    page.wait("!document.getElementById('index').hidden")
    assert page.run("document.activeElement.hash") == "#row-2"
    page.press("Enter")
    page.wait("document.querySelector('#view h2')?.textContent === 'Row 2'")


def test_nasty_texts_are_shown_as_text(report, page):
    shown = NASTY.replace("\x00", "␀").replace("\x1b", "␛").replace("\ud83d", "\ufffd")
    page.open(report, "#row-3")
    assert texts(page, ".prose.prompt")[0].replace("\ud83d", "\ufffd") == shown
    page.open(report, "#row-5")
    assert count(page, "img, #view script, #index script") == 0
    assert texts(page, ".node .score") == ["1.50", "n/a", "1.50"]
    assert texts(page, ".node .objectives") == ["1.00 · 0.50", "1.00 · ∞"]
    assert texts(page, ".node .text")[2] == "carried over"
    assert texts(page, ".end") == ["end"]
    assert texts(page, ".tokens .token")[0].startswith("</>")
    assert page.run("document.querySelector('.tokens').matches(':dir(rtl)')") is True
    page.open(report, "#row-6")
    assert "holds no chunks" in texts(page, "#view")[0]
    page.open(report, "#row-99")
    assert texts(page, "#notice") == ["There is no row 99 on this page."]
    assert count(page, "#rows tr") == len(ROWS)


@pytest.mark.parametrize("fragment", ["", "#row-2"])
def test_light_and_dark_are_drawn_and_can_be_read(report, page, fragment):
    ground = {}
    for scheme in ("light", "dark"):
        page.scheme(scheme)
        page.open(report, fragment)
        image = read_png(page.screenshot(scale=0.25))[..., :3]
        assert image.shape == (225, 320, 3)
        ground[scheme] = np.median(image.reshape(-1, 3), axis=0).mean()
        ink = np.abs(image.astype(float) - ground[scheme]).max(axis=-1) > 40
        assert 0.01 < ink.mean() < 0.5
        # Ink stands in the upper part and in the middle, left and right: the page is laid out.
        for part in (ink[:60, :160], ink[60:140, :160], ink[60:140, 160:]):
            assert part.any()
        assert min(page.run(CONTRASTS)) >= 4.5
    assert ground["light"] > 235
    assert ground["dark"] < 40


# The contrast of every text with the colours behind it, by the definition of WCAG 2.
CONTRASTS = """(() => {
    const parts = (colour) => {
        const found = colour.match(/[\\d.]+/g).map(Number);
        return [...found.slice(0, 3), found[3] ?? 1];
    };
    const light = (colour) => colour.slice(0, 3).map((v) => v / 255)
        .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const over = (under, [r, g, b, a]) => [r, g, b].map((v, i) => a * v + (1 - a) * under[i]);
    const behind = (element) => {
        const layers = [];
        for (let at = element; at; at = at.parentElement) {
            layers.unshift(parts(getComputedStyle(at).backgroundColor));
        }
        return layers.reduce(over, [255, 255, 255]);
    };
    const worded = (element) => element.checkVisibility() && !element.closest('svg')
        && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    return [...document.querySelectorAll('body *')].filter(worded).map((element) => {
        const pair = [light(parts(getComputedStyle(element).color)), light(behind(element))];
        return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    });
})()"""


def test_a_phone_scrolls_one_way_only(report, page):
    page.size(360, 740)
    for fragment in ("", "#row-2"):
        page.open(report, fragment)
        assert page.run("document.documentElement.scrollWidth") <= 360


def test_the_largest_pages_stay_usable(tmp_path, page):
    rng = random.Random(0)
    path = tmp_path / "many.html"
    write_report(path, (searched(i, rng) for i in range(1000)), title="many", settings={})
    assert path.stat().st_size < 3e6
    page.open(path)
    assert count(page, "#rows tr") == 1000
    page.open(path, "#row-999")
    assert count(page, ".node") == W * K * CHUNKS


def test_no_rows_make_an_empty_page(tmp_path, page):
    path = tmp_path / "none.html"
    write_report(path, [], title="nothing", settings={})
    page.open(path)
    assert page.run("document.getElementById('summary').textContent") == "0 prompts"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"score": "high"}, "could not convert"),
        ({"prompt": ["a"]}, "a text is list"),
        ({"row_id": None}, "int"),
        ({"tokens": [["a"]]}, "not enough values"),
        ({"chunks": [{"candidates": [{"parent": 0}]}]}, "no 'kept'"),
        ({"row_id": 0}, "row_id 0 came before"),
    ],
)
def test_a_row_of_another_form_is_told_and_leaves_no_file(tmp_path, change, fault):
    path = tmp_path / "report.html"
    with pytest.raises(InputError, match=rf"^trace row 2: .*{fault}.*$"):
        write_report(path, [ROWS[0], ROWS[1] | change], title="t", settings={})
    assert list(tmp_path.iterdir()) == []


def test_tokens_are_counted_as_the_policy_wrote_them(tmp_path):
    """A guide of another vocabulary reads the response in tokens of its own, which are shaded."""
    path = tmp_path / "report.html"
    write_report(path, [ROWS[0] | {"policy_tokens": 2}, ROWS[1]], title="t", settings={})
    sizes = [entry[5] for entry in packed(path)["index-data"]["rows"]]
    assert sizes == [2, len(ROWS[1]["tokens"])]


def test_a_failing_trace_leaves_the_old_page(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")

    def rows():
        yield ROWS[0]
        raise RuntimeError("the search failed")

    with pytest.raises(RuntimeError):
        write_report(path, rows(), title="t", settings={})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_place_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(tmp_path / "file" / "report.html", [], title="t", settings={})
    with pytest.raises(InputError, match="name a file"):
        write_report(tmp_path, [], title="t", settings={})


def test_the_scale_is_round_and_heeds_no_outlier():
    ratios = np.random.default_rng(0).normal(0, 1, 2000)
    assert shading_scale(ratios) == 3.0
    assert shading_scale(np.append(ratios, [1e9, np.inf, np.nan])) == 3.0
    assert shading_scale(ratios / 100) == pytest.approx(0.03)
    assert shading_scale(np.zeros(0)) == shading_scale(np.zeros(5)) == 1.0
    assert shading_scale(np.array([10.0])) == 10.0
    assert shading_scale(np.array([9.5e3])) == 1e4
