"""What may steer beside one guide of the policy's vocabulary, and what is written beside rows."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli.test_search import one_error, tiny
from w2s_jax.cli.main import main, parse
from w2s_jax.models.load import load_model
from w2s_jax.search.checkpoints import plan
from w2s_jax.search.file import encode_questions
from w2s_jax.search.incremental_text import logprobs_alone
from w2s_jax.text.chat import load_template
from w2s_jax.text.prompts import conversation_of
from w2s_jax.text.rows import read_jsonl, write_jsonl
from w2s_jax.text.tokenizer import load_tokenizer

CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a>{% endif %}"
)
SMALL = ["--w=2", "--k=2", "--l=2", "--max-new-tokens=4", "--batch-size=2"]
FAR = "our quiet seas"
WITHOUT_END = 270
"""Tokens of the guides that read texts; the policy's end of turn comes behind them."""
# All of up to 16 tokens: for each size of prompts a search is compiled anew.
PROMPTS = [
    {"prompt": "A film {of} the sea", "id": 7},
    {"messages": [{"role": "user", "content": "Say {{x}}"}]},
    {"instruction": "", "input": "é"},
    {"prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": "film"}]},
]


def count_vowels(prompts, responses):
    """A scorer; found as tests.cli.test_search_guidance:count_vowels."""
    assert len(prompts) == len(responses)
    return [sum(response.count(vowel) for vowel in "aeiou") for response in responses]


def cannot_vowels(prompts, responses):
    return 1 / 0


def not_everywhere_vowels(prompts, responses):
    if PROMPTS[0]["prompt"] in prompts:
        raise KeyError("film")
    return count_vowels(prompts, responses)


def only_one(prompts, responses):
    return [1.0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy with an end of turn, a guide of its vocabulary and two that read texts.

    The far guide has another vocabulary and, as the others, chat templates; the plain one lacks
    both the template and the end of turn. They are of one shape, so that they share programs.
    """
    root = tmp_path_factory.mktemp("models")
    texts = {name: {} for name in ("tuned", "untuned", "policy")}
    few = {"vocab_size": WITHOUT_END}
    texts |= {name: {"text": FAR} | few for name in ("far-tuned", "far-untuned")}
    texts |= dict.fromkeys(("plain-tuned", "plain-untuned"), few)
    found = {}
    for seed, (name, fields) in enumerate(texts.items()):
        folder = Path(tiny(root / name, seed, max_positions=256, **fields))
        tokenizer = load_tokenizer(folder)
        if not name.startswith("plain"):
            tokenizer.chat_template = CHAT if name != "far-tuned" else CHAT.replace(">", "]")
        if not fields:
            added = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
            tokenizer.add_special_tokens(added)
            config = json.loads((folder / "config.json").read_text())
            config["eos_token_id"] = [0, tokenizer.convert_tokens_to_ids("<|im_end|>")]
            assert config["eos_token_id"][1] >= WITHOUT_END
            (folder / "config.json").write_text(json.dumps(config))
            (folder / "generation_config.json").unlink(missing_ok=True)
        tokenizer.save_pretrained(str(folder))
        found[name] = str(folder)
    return found


@pytest.fixture
def prompts(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", PROMPTS)
    return tmp_path / "in.jsonl"


def search(folders, prompts, output, *flags, guide="near"):
    mark = {"near": "", "far": "far-", "plain": "plain-"}
    roles = [
        word
        for role in ("tuned", "untuned")
        if guide is not None
        for word in (f"--{role}", folders[mark[guide] + role])
    ]
    files = ["--prompts", str(prompts), "--output", str(output)]
    return main(["search", "--policy", folders["policy"], *roles, *files, *SMALL, *flags])


def scores_alone(folders, rows):
    """For each row what its hypotheses may score, by the far guide's reading of prompt and text.

    Two numbers each: the second with the EOS by which the response may have ended.
    """
    found = []
    for name in ("far-tuned", "far-untuned"):
        model, tokenizer = load_model(folders[name]), load_tokenizer(folders[name])
        template = load_template(tokenizer, where="test")
        for row in rows:
            asked = conversation_of(row, "row")
            start = len(template.encode(asked))
            texts = [kept["response"] for kept in row["hypotheses"]]
            for tokens in template.encode_responses(asked, texts):
                values = logprobs_alone(model, [*tokens, tokenizer.eos_token_id])[start - 1 :]
                found.append((values[:-1].sum(), values.sum()))
    tuned, untuned = np.array(found).reshape(2, len(rows), -1, 2)
    return tuned - untuned


@pytest.mark.parametrize("guide", ["near", "far"])
def test_conversations_of_every_kind_are_answered(folders, prompts, tmp_path, capsys, guide):
    """Texts are scored as they are written; a report or a view of every search changes nothing."""
    out = tmp_path / "out.jsonl"
    assert search(folders, prompts, out, guide=guide) == 0
    where = {"near": "scores tokens on the device", "far": "scores texts, encoded anew"}[guide]
    assert f"the guide {where}" in capsys.readouterr().out
    rows = read_jsonl(out)
    for row, asked in zip(rows, PROMPTS, strict=True):
        assert {name: row[name] for name in asked} == asked
        assert row["score"] == row["hypotheses"][0]["score"] != 0.0
    if guide == "far":
        scores = np.array([[kept["score"] for kept in row["hypotheses"]] for row in rows])
        alone = scores_alone(folders, rows)
        assert np.isclose(scores[..., None], alone, atol=1e-3).any(-1).all()
    shown, page = tmp_path / "shown.jsonl", tmp_path / "report.html"
    told = ["--report", str(page), "--show"]
    assert search(folders, prompts, shown, *told, guide=guide) == 0
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert all("trace" not in row for row in rows)
    assert shown.read_bytes() == out.read_bytes()
    assert "A film {of} the sea" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.journal"))


def test_two_guides_a_function_and_maximin(folders, prompts, tmp_path):
    far = ["--tuned", folders["far-tuned"], "--untuned", folders["far-untuned"]]
    name = "tests.cli.test_search_guidance:count_vowels"
    out = tmp_path / "out.jsonl"
    flags = [*far, "--guide-weight", "1", "--guide-weight", "0.5", "--scorer", name]
    assert search(folders, prompts, out, *flags, "--select", "maximin") == 0
    rows = read_jsonl(out)
    assert len(rows) == len(PROMPTS)
    for row in rows:
        for kept in row["hypotheses"]:
            assert list(kept["objectives"]) == ["tuned", "far-tuned", name]
            assert sum(kept["objectives"].values()) == pytest.approx(kept["score"], abs=1e-3)
            assert kept["objectives"][name] == count_vowels([""], [kept["response"]])[0]


def test_a_function_alone_steers(folders, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    name = "tests.cli.test_search_guidance:count_vowels"
    assert search(folders, prompts, out, "--scorer", name, guide=None) == 0
    for row in read_jsonl(out):
        for kept in row["hypotheses"]:
            assert kept["score"] == count_vowels([""], [kept["response"]])[0]
    status = search(folders, prompts, out, "--scorer", "tests.nowhere:f", guide=None)
    assert "--scorer tests.nowhere:f" in one_error(capsys, status)
    status = search(folders, prompts, out, "--scorer", name.replace("count", "c"), guide=None)
    assert "c_vowels" in one_error(capsys, status)
    status = search(folders, prompts, out, "--scorer", name.replace("count", "cannot"), guide=None)
    assert "cannot_vowels raised ZeroDivisionError" in one_error(capsys, status)
    here = name.replace("count", "not_everywhere")
    status = search(folders, prompts, tmp_path / "some.jsonl", "--scorer", here, guide=None)
    told = f"{prompts} line 1: the scorer not_everywhere_vowels raised KeyError: 'film'; what was"
    assert told in one_error(capsys, status)
    kept = read_jsonl(tmp_path / "some.jsonl.journal")[1:]
    assert sorted(row["row_id"] for row in kept) == list(range(1, len(PROMPTS)))
    short = name.replace("count_vowels", "only_one")
    status = search(folders, prompts, out, "--scorer", short, guide=None)
    assert "it must return one number each" in one_error(capsys, status)


def test_a_guide_without_the_policys_end_of_turn_reads_texts(folders, prompts, tmp_path, capsys):
    """Its logits end before that token, which the policy could then never draw."""
    write_jsonl(prompts, [PROMPTS[0]] * 2)
    assert search(folders, prompts, tmp_path / "out.jsonl", guide="plain") == 0
    assert "the guide scores texts" in capsys.readouterr().out
    status = search(folders, prompts, tmp_path / "out.jsonl", "--method", "eft", guide="plain")
    assert "do not both have '<|im_end|>'" in one_error(capsys, status)


def test_sampling_takes_no_judges(folders, prompts, tmp_path, capsys):
    name = "tests.cli.test_search_guidance:count_vowels"
    status = search(folders, prompts, tmp_path / "out", "--method", "sample", "--scorer", name)
    assert "scores nothing" in one_error(capsys, status)


def test_templates_by_name(folders, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    files = ["--prompts", str(prompts), "--output", str(out), "--policy", folders["policy"]]
    guide = ["--tuned", folders["tuned"], "--untuned", folders["untuned"]]
    named = ["--policy-template", "tulu", "--guide-template", "zephyr"]
    planned = plan(parse(["search", *files, *guide, *named]).sources_of_all())
    (own,) = encode_questions(planned, PROMPTS[:1], "line", max_new_tokens=8).prompts
    texts = [planned.tokenizer.decode(ids) for ids in own]
    assert texts[0] == "<|user|>\nA film {of} the sea\n<|assistant|>\n"
    read = "<|system|>\n</s>\n<|user|>\nA film {of} the sea</s>\n<|assistant|>\n"
    assert texts[1:] == [read, read]
    status = search(folders, prompts, out, "--policy-template", "zephir")
    assert "zephyr" in one_error(capsys, status)
    status = search(folders, prompts, out, "--guide-template", "none")
    error = one_error(capsys, status)
    assert "line 2" in error
    assert "takes text only" in error


def test_mixing_methods_take_one_guide_of_the_policys_vocabulary(
    folders, prompts, tmp_path, capsys
):
    out = tmp_path / "out.jsonl"
    status = search(folders, prompts, out, "--eft-top-k", "3")
    assert "--eft-top-k is for eft and ivg, not cbs" in one_error(capsys, status)
    for method in ("eft", "ivg"):
        status = search(folders, prompts, out, "--method", method, guide="far")
        assert f"--method {method} needs one" in one_error(capsys, status)


def test_names_of_checkpoints_are_looked_up(folders, prompts, tmp_path, capsys):
    (tmp_path / "map.yaml").write_text(
        json.dumps({"some/policy": folders["policy"], "some/tuned": folders["tuned"]})
    )
    flags = ["--prompts", str(prompts), "--output", str(tmp_path / "out.jsonl"), *SMALL]
    named = ["--policy", "some/policy", "--tuned", "some/tuned", "--untuned", folders["untuned"]]
    assert main(["search", *named, *flags, "--models-map", str(tmp_path / "map.yaml")]) == 0
    (tmp_path / "map.yaml").write_text('{"some/policy": "nowhere"}')
    status = main(["search", *named, *flags, "--models-map", str(tmp_path / "map.yaml")])
    assert "no such folder" in one_error(capsys, status)


def test_alpaca_eval_files(folders, tmp_path, capsys):
    rows = [{"instruction": f"Do {i}", "dataset": "helpful_base"} for i in range(3)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out.json"
    flags = ("--format", "alpaca_eval", "--generator", "tiny")
    assert search(folders, tmp_path / "in.jsonl", out, *flags) == 0
    written = json.loads(out.read_text())
    assert [row["instruction"] for row in written] == ["Do 0", "Do 1", "Do 2"]
    assert {row["generator"] for row in written} == {"tiny"}
    assert all(set(row) == {"instruction", "output", "generator", "dataset", "datasplit"}
               for row in written)  # fmt: skip
    write_jsonl(tmp_path / "in.jsonl", [*rows, rows[0]])
    status = search(folders, tmp_path / "in.jsonl", tmp_path / "two.json", *flags)
    assert "each may be there once" in one_error(capsys, status)
    assert not list(tmp_path.glob("two*")), "it is said before the search"
