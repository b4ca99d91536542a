"""`w2s search` with a policy behind `w2s serve`, and behind scripted servers."""

import importlib.resources
import os
from dataclasses import replace

import pytest

from tests.cli.serving import served
from tests.cli.test_search import one_error
from tests.cli.test_search_guidance import count_vowels
from tests.serve.fake_api import FakeAPI
from w2s_jax.cli.main import main
from w2s_jax.models.load import load_model
from w2s_jax.models.model import Model, abstract_model
from w2s_jax.models.save import save_model
from w2s_jax.text.rows import read_jsonl, write_jsonl
from w2s_jax.text.tokenizer import load_tokenizer

SIZES = ["--max-new-tokens=12", "--batch-size=2", "--top-k=50", "--temperature=1.0"]
METHODS = {
    "cbs": ["--w=2", "--k=2", "--l=3"],
    "bon": ["--method=bon", "--n=3"],
    "sample": ["--method=sample"],
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The embedded models' first layers, which write words; random ones write broken characters."""
    assets = importlib.resources.files("w2s_jax.demo") / "assets"
    found = {}
    for role in ("policy", "tuned", "untuned"):
        model = load_model(str(assets / role), dtype="float32")
        config = replace(model.config, layers=1)
        params = {name: model.params[name] for name in abstract_model(config)[0].params}
        folder = tmp_path_factory.mktemp("models") / role
        save_model(Model(config, params), folder, tokenizer=load_tokenizer(assets / role))
        found[role] = str(folder)
    return found


@pytest.fixture(scope="module")
def address(checkpoints):
    with served("--policy", checkpoints["policy"], "--warm-up=0") as url:
        yield f"{url}/v1"


@pytest.fixture
def prompts(tmp_path):
    texts = ("The film", "I saw it because", "It was one of", "Nobody")
    rows = [{"prompt": text, "id": i} for i, text in enumerate(texts)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    return ["--prompts", str(tmp_path / "in.jsonl")]


def guide_of(checkpoints, method):
    if method == "sample":
        return []
    return ["--tuned", checkpoints["tuned"], "--untuned", checkpoints["untuned"]]


@pytest.mark.parametrize(
    "method", ["cbs", *(pytest.param(one, marks=pytest.mark.slow) for one in ("bon", "sample"))]
)
def test_steering_through_the_server_is_steering_in_process(
    checkpoints, address, prompts, tmp_path, capsys, method
):
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    flags = [*prompts, *guide_of(checkpoints, method), *METHODS[method], *SIZES, "--dtype=float32"]
    local = ["--policy", checkpoints["policy"], "--output", str(here), "--score-on=text"]
    assert main(["search", *flags, *local]) == 0
    assert "the guide scores texts" in capsys.readouterr().out or method == "sample"
    remote = ["--endpoint", address, "--endpoint-model=policy", "--share-draws"]
    prices = ["--price-prompt=0.5", "--price-completion=1.5"]
    assert main(["search", *flags, *remote, *prices, "--output", str(there)]) == 0
    told = capsys.readouterr().out
    assert "the policy gives text only" in told or method == "sample"
    assert "cost 0.00" in told
    for one, other in zip(read_jsonl(here), read_jsonl(there), strict=True):
        assert one["response"] == other["response"] != ""
        assert [h["response"] for h in one["hypotheses"]] == [
            h["response"] for h in other["hypotheses"]
        ]
        assert one["score"] == pytest.approx(other["score"], abs=1e-3)
        assert one["id"] == other["id"]


def test_an_endpoint_may_be_sampled_or_steered_by_a_function_alone(prompts, tmp_path, capsys):
    out, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    flags = [*prompts, *SIZES, "--output", str(out), "--endpoint-model=m"]
    with FakeAPI() as api:
        flags += ["--endpoint", api.url, "--price-completion=1e5"]
        assert main(["search", *flags, *METHODS["sample"]]) == 0
        # Three completion tokens for each of the four.
        assert "cost 1.2" in capsys.readouterr().out
        rows = read_jsonl(out)
        assert [row["id"] for row in rows] == [0, 1, 2, 3]
        assert [row["score"] for row in rows] == [0.0] * 4
        assert any(row["response"] for row in rows)
        steered = ["--scorer=tests.cli.test_search_guidance:count_vowels", *METHODS["cbs"]]
        assert main(["search", *flags, *steered, "--report", str(page), "--show"]) == 0
    rows = read_jsonl(out)
    assert all("trace" not in row for row in rows)
    for kept in (kept for row in rows for kept in row["hypotheses"]):
        assert kept["score"] == count_vowels([""], [kept["response"]])[0]
    assert page.stat().st_size > 10_000
    assert rows[0]["response"].split()[0] in capsys.readouterr().out


def test_wrong_endpoints(checkpoints, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-never-shown")
    flags = [*prompts, *guide_of(checkpoints, "cbs"), *METHODS["cbs"], *SIZES]
    flags += ["--output", str(tmp_path / "out.jsonl"), "--endpoint-model=m", "--attempts=1"]
    for url, message in (
        ("http://127.0.0.1:9/v1", "127.0.0.1:9"),
        ("ftp://x", "is no address"),
        ("http://user:pass@x/v1", "more than scheme, host and path"),
    ):
        error = one_error(capsys, main(["search", *flags, "--endpoint", url]))
        assert message in error
        assert "sk-never" not in error
        assert "pass" not in error.replace("user:pass", "")
    status = main(["search", *flags, "--endpoint", "http://127.0.0.1:9/v1", "--method=eft"])
    assert "mixes logits" in one_error(capsys, status)
    both = ["--endpoint", "http://127.0.0.1:9/v1", "--policy", checkpoints["policy"]]
    assert "either --policy or" in one_error(capsys, main(["search", *flags, *both]))
    assert os.environ["OPENAI_API_KEY"] not in "".join(
        path.read_text(errors="ignore") for path in tmp_path.iterdir() if path.is_file()
    )
