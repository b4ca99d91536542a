"""The quantisation report, and the flags that quantise a policy, on tiny checkpoints."""

import json

import jax
import numpy as np
import pytest

from tests.cli.test_search import models, prompts, search, tiny  # noqa: F401
from w2s_jax.cli.main import main, parse
from w2s_jax.errors import InputError
from w2s_jax.models.load import load_model
from w2s_jax.models.model import Model
from w2s_jax.models.quantize import quantize, read_quantize, weight_bytes
from w2s_jax.search.results import Hypothesis, SearchResult
from w2s_jax.search.run import search as run_search
from w2s_jax.text.rows import write_jsonl
from w2s_jax.text.tokenizer import load_tokenizer

TEXTS = ["a film of the sea, and of a film", "We film the sea", "the sea of a film, a sea"]
SMALL = ["--prompt-tokens=4", "--max-new-tokens=6", "--batch-size=2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {role: tiny(root / role, seed) for seed, role in enumerate("ptu")}


@pytest.fixture
def data(tmp_path):
    rows = [{"text": TEXTS[0]}, {"prompt": TEXTS[1][:8], "response": TEXTS[1][8:]}]
    write_jsonl(tmp_path / "texts.jsonl", [*rows, {"text": TEXTS[2]}])
    return tmp_path / "texts.jsonl"


def report(policy, data, *flags):
    files = ["--quantisation-report", policy, "--data", str(data)]
    return main(["eval", *files, *SMALL, *map(str, flags)])


def read_alone(model, ids):
    """Every text's token log-probs and likeliest tokens, from whole rows of logits."""
    width = max(map(len, ids))
    logits = np.asarray(model(np.array([[*row, *[0] * (width - len(row))] for row in ids])))
    found = []
    for row, own in zip(ids, logits, strict=True):
        own = own[: len(row) - 1].astype(np.float64)
        logprobs = own - np.log(np.exp(own).sum(-1, keepdims=True))
        found.append((logprobs[np.arange(len(row) - 1), row[1:]], logprobs.argmax(-1)))
    return [np.concatenate(part) for part in zip(*found, strict=True)]


def test_the_report_tells_what_whole_rows_of_logits_tell(
    folders, data, tmp_path, capsys, monkeypatch
):
    """Perplexity is read without a cache; quantised policies continue and search with their own."""
    out = tmp_path / "figures.json"
    searched, scores = [], {"auto": (1.0, 2.0, 3.0), "int8": (1.5, 2.0, 1.0)}

    def watched(policy, guides, asked, config, *, on_result, **options):
        searched.append((config.policy_cache, config.beam_width if guides else None))
        if not guides:
            return run_search(policy, guides, asked, config, on_result=on_result, **options)
        # What is found behind a guide is tested in search/: here only what becomes of the scores.
        found = [
            SearchResult(row, (Hypothesis((5,), score, True, (score,)),))
            for row, score in enumerate(scores[config.policy_cache])
        ]
        for result in found:
            on_result(result)
        return found

    monkeypatch.setattr("w2s_jax.evaluate.quantisation.search", watched)
    guide = ["--tuned", folders["t"], "--untuned", folders["u"]]
    flags = ["--quantise", "int4:8+head", "--policy-cache", "int8", *guide, "--json", out]
    assert report(folders["p"], data, *flags) == 0
    assert searched == [("auto", None), ("auto", 2), ("int8", None), ("int8", 2)]
    told = json.loads(out.read_text())
    assert told["policy_cache"] == "int8"
    assert list(told["figures"]) == ["as stored", "int4:8+head"]
    tokenizer = load_tokenizer(folders["p"])
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert told["rows"] == 3
    assert told["tokens"] == sum(map(len, ids))
    plain = load_model(folders["p"], dtype="float32")
    before, likeliest = read_alone(plain, ids)
    for spec, figures in told["figures"].items():
        model = plain
        if spec != "as stored":
            model = Model(plain.config, quantize(plain.params, read_quantize(spec)))
        logprobs, top = read_alone(model, ids)
        assert figures["weight_bytes"] == weight_bytes(model.params)
        np.testing.assert_allclose(figures["perplexity"], np.exp(-logprobs.mean()), rtol=1e-4)
        change = np.exp(before.mean() - logprobs.mean()) - 1
        np.testing.assert_allclose(figures["perplexity_change"], change, atol=1e-4)
        assert figures["equal_next"] == pytest.approx((top == likeliest).mean())
        assert figures["equal_continuations"] <= figures["equal_length"] <= 1
    stored, coarse = told["figures"]["as stored"], told["figures"]["int4:8+head"]
    assert stored["perplexity_change"] == stored["score_change"] == 0
    assert stored["equal_next"] == stored["equal_continuations"] == 1
    assert coarse["perplexity_change"] != 0
    assert (stored["score"], coarse["score"]) == (2.0, 1.5)
    assert coarse["score_change"] == pytest.approx(-0.5)
    changes = np.subtract(scores["int8"], scores["auto"])
    assert coarse["score_change_stderr"] == pytest.approx(changes.std(ddof=1) / np.sqrt(3))
    assert coarse["weight_bytes"] < stored["weight_bytes"]
    table = capsys.readouterr().out
    assert "int4:8+head" in table
    assert "perplexity" in table


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh=auto"], "--mesh auto is of search, serve, sft and dpo; name it, as data=-1"),
        (["--quantise", "int8", "--quantise", "int2"], "quantisation 'int2' is not int8 or int4"),
        (["--tuned", "T"], "a guide is a --tuned and an --untuned model; give both or none"),
        (["--prompt-tokens", "0"], "--prompt-tokens is 0; it must be at least 1"),
        (["--max-new-tokens", "93"], "--prompt-tokens 4 and --max-new-tokens 93 exceed the 96"),
        (["--results", "r.jsonl"], "--results has no part in --quantisation-report"),
    ],
)
def test_wrong_flags_are_one_line(folders, data, flags, message, capsys):
    assert report(folders["p"], data, *flags) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_groups_are_judged_before_weights_and_finished_columns_stay(
    folders, data, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "figures.json"
    assert report(folders["p"], data, "--quantise=int8", "--quantise=int4:5", "--json", out) == 2
    assert "16 inputs are not divisible into groups of 5; give 8" in capsys.readouterr().err
    assert not out.exists()

    def full(*arguments, **options):
        raise InputError("no room")

    monkeypatch.setattr("w2s_jax.evaluate.quantisation.load_decoders", full)
    assert report(folders["p"], data, "--quantise=int8", "--json", out) == 2
    said = capsys.readouterr()
    assert "no room" in said.err
    assert "as stored" in said.out
    figures = json.loads(out.read_text())["figures"]
    assert list(figures) == ["as stored"]
    assert figures["as stored"]["score"] is None


def test_texts_that_cannot_be_scored_are_named(folders, tmp_path, capsys):
    for row, message in (({"note": 1}, 'no "text", and no "prompt"'), ({"text": ""}, "a text of")):
        write_jsonl(tmp_path / "bad.jsonl", [{"text": TEXTS[0]}, row])
        assert report(folders["p"], tmp_path / "bad.jsonl") == 2
        assert f"bad.jsonl line 2: {message}" in capsys.readouterr().err
    assert main(["eval", "--quantisation-report", folders["p"]]) == 2
    assert "needs --data" in capsys.readouterr().err
    assert main(["eval"]) == 2
    assert "give --results and --reward-model" in capsys.readouterr().err


def test_a_search_takes_a_quantised_policy_and_cache(
    models,  # noqa: F811
    prompts,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    seen = []

    def watched(models, config, requests, **options):
        seen.append((models.policy, models.guides, config.policy_cache))
        raise InputError("enough")

    monkeypatch.setattr("w2s_jax.search.file.search_all", watched)
    flags = ["--quantise-policy", "int8:2+head", "--policy-cache", "int8"]
    assert search(models, prompts, tmp_path / "out.jsonl", *flags) == 2
    assert "enough" in capsys.readouterr().err
    ((policy, guides, cache),) = seen
    assert cache == "int8"
    options = {"dtype": "float32", "decoding": True}
    plain = [load_model(folder, **options).params for folder in models[1::2]]
    jax.tree.map(
        np.testing.assert_array_equal, policy.params, quantize(plain[0], read_quantize(flags[1]))
    )
    for guide, whole in zip((guides[0].tuned, guides[0].untuned), plain[1:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, guide.params, whole)


def test_quantising_needs_a_policy_here(models, prompts, tmp_path, capsys):  # noqa: F811
    flags = ["--quantise-policy", "int9"]
    assert search(models, prompts, tmp_path / "out.jsonl", *flags) == 2
    assert "--quantise-policy: quantisation 'int9' is not int8 or int4" in capsys.readouterr().err
    remote = ["--endpoint", "http://127.0.0.1:9", "--endpoint-model", "m", *models[2:]]
    for flag in (["--quantise-policy", "int8"], ["--policy-cache", "int8"]):
        assert search(remote, prompts, tmp_path / "out.jsonl", *flag) == 2
        assert f"{flag[0]} is for a --policy in this process" in capsys.readouterr().err


def test_a_server_keeps_its_policy_cache_as_asked():
    server = parse(["serve", "--policy", "P", "--policy-cache", "int8"])
    assert server.policy_cache == "int8"
    assert parse(["serve", "--policy", "P"]).policy_cache == "auto"
