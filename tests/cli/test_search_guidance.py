"""What may steer beside one guide of the policy's vocabulary, and what is written beside rows."""

import json
from pathlib import Path

import pytest

from tests.cli.test_search import SMALL, one_error, tiny
from w2s_jax.cli.main import main
from w2s_jax.models.huggingface import load_model
from w2s_jax.search.reading import logprobs_alone
from w2s_jax.text.chat import load_template
from w2s_jax.text.conversations import Conversation
from w2s_jax.text.rows import read_jsonl, write_jsonl
from w2s_jax.text.tokenizer import load_tokenizer

CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a>{% endif %}"
)
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


def only_one(prompts, responses):
    return [1.0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy, a guide of its vocabulary and one of another, each with a chat template."""
    root = tmp_path_factory.mktemp("models")
    texts = {"tuned": {}, "untuned": {}, "policy": {}}
    texts |= {"far-tuned": {"text": "quite another sea of words"}}
    texts |= {"far-untuned": {"text": "quite another sea of words"}}
    found = {}
    for seed, (name, fields) in enumerate(texts.items()):
        folder = Path(tiny(root / name, seed, max_positions=256, **fields))
        options = json.loads((folder / "tokenizer_config.json").read_text())
        template = CHAT if name != "far-tuned" else CHAT.replace(">", "]")
        (folder / "tokenizer_config.json").write_text(
            json.dumps(options | {"chat_template": template})
        )
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        found[name] = str(folder)
    return found


@pytest.fixture
def prompts(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", PROMPTS)
    return tmp_path / "in.jsonl"


def search(folders, prompts, output, *flags, guide="near"):
    mark = {"near": "", "far": "far-"}
    roles = [
        word
        for role in ("tuned", "untuned")
        if guide is not None
        for word in (f"--{role}", folders[mark[guide] + role])
    ]
    files = ["--prompts", str(prompts), "--output", str(output)]
    return main(["search", "--policy", folders["policy"], *roles, *files, *SMALL, *flags])


@pytest.mark.parametrize("guide", ["near", "far"])
def test_conversations_of_every_kind_are_answered(folders, prompts, tmp_path, capsys, guide):
    """And a report or a view of every search changes no response."""
    out = tmp_path / "out.jsonl"
    assert search(folders, prompts, out, guide=guide) == 0
    where = {"near": "scores tokens on the device", "far": "scores texts, encoded anew"}[guide]
    assert f"the guide {where}" in capsys.readouterr().out
    rows = read_jsonl(out)
    for row, asked in zip(rows, PROMPTS, strict=True):
        assert {name: row[name] for name in asked} == asked
        assert row["score"] == row["hypotheses"][0]["score"] != 0.0
    shown, page = tmp_path / "shown.jsonl", tmp_path / "report.html"
    assert search(folders, prompts, shown, "--report", str(page), "--show", guide=guide) == 0
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert all("trace" not in row for row in rows)
    assert shown.read_bytes() == out.read_bytes()
    assert "A film {of} the sea" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.journal"))


def test_a_guide_scored_on_text_is_the_one_scored_on_tokens(folders, tmp_path):
    """Where texts encode to the tokens that were sampled, as under greedy draws mostly."""
    write_jsonl(tmp_path / "in.jsonl", [{"prompt": f"A film {i}"} for i in range(4)])
    rows = {}
    for where in ("tokens", "text"):
        out = tmp_path / f"{where}.jsonl"
        flags = ("--score-on", where, "--max-new-tokens", "3", "--method", "bon")
        assert search(folders, tmp_path / "in.jsonl", out, *flags) == 0
        rows[where] = read_jsonl(out)
    alike = 0
    for one, other in zip(rows["tokens"], rows["text"], strict=True):
        scores = {h["response"]: h["score"] for h in one["hypotheses"]}
        for hypothesis in other["hypotheses"]:
            assert hypothesis["response"] in scores, "the same draws give the same samples"
            alike += hypothesis["score"] == pytest.approx(scores[hypothesis["response"]], abs=1e-3)
    assert alike >= 4


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
    assert search(folders, prompts, out, "--scorer", name, "--method", "bon", guide=None) == 0
    for row in read_jsonl(out):
        for kept in row["hypotheses"]:
            assert kept["score"] == count_vowels([""], [kept["response"]])[0]
    status = search(folders, prompts, out, "--scorer", "tests.nowhere:f", guide=None)
    assert "--scorer tests.nowhere:f" in one_error(capsys, status)
    status = search(folders, prompts, out, "--scorer", name.replace("count", "c"), guide=None)
    assert "c_vowels" in one_error(capsys, status)
    status = search(folders, prompts, out, "--scorer", name.replace("count", "cannot"), guide=None)
    assert "cannot_vowels raised ZeroDivisionError" in one_error(capsys, status)
    short = name.replace("count_vowels", "only_one")
    status = search(folders, prompts, out, "--scorer", short, guide=None)
    assert "it must return one number each" in one_error(capsys, status)


def test_a_guide_without_the_policys_end_of_turn_reads_texts(folders, tmp_path, capsys):
    """Its logits end before that token, which the policy could then never draw."""
    policy = Path(tiny(tmp_path / "chat", 5, vocab_size=302, max_positions=256))
    tokenizer = json.loads((policy / "tokenizer.json").read_text())
    size = max(token["id"] for token in tokenizer["added_tokens"])
    size = max(size, *tokenizer["model"]["vocab"].values()) + 1
    config = json.loads((policy / "config.json").read_text())
    loaded = load_tokenizer(policy)
    loaded.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    loaded.save_pretrained(str(policy))
    end = loaded.convert_tokens_to_ids("<|im_end|>")
    (policy / "config.json").write_text(json.dumps(config | {"eos_token_id": [0, end]}))
    (policy / "generation_config.json").unlink(missing_ok=True)
    small = {name: tiny(tmp_path / name, seed, vocab_size=size) for seed, name in enumerate("tu")}
    write_jsonl(tmp_path / "in.jsonl", [{"prompt": "A film"}])
    flags = ["--prompts", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    models = ["--policy", str(policy), "--tuned", small["t"], "--untuned", small["u"]]
    assert main(["search", *models, *flags, *SMALL]) == 0
    assert "the guide scores texts" in capsys.readouterr().out
    status = main(["search", *models, *flags, *SMALL, "--method", "eft"])
    assert "do not both have '<|im_end|>'" in one_error(capsys, status)


def test_what_is_written_is_what_was_scored(folders, tmp_path, capsys):
    write_jsonl(tmp_path / "in.jsonl", [{"prompt": f"sea {i}"} for i in range(6)])
    out = tmp_path / "out.jsonl"
    assert search(folders, tmp_path / "in.jsonl", out, guide="far") == 0
    readers = [load_model(folders[name]) for name in ("far-tuned", "far-untuned")]
    template = load_template(load_tokenizer(folders["far-tuned"]), where="test")
    scored = 0
    for row in read_jsonl(out):
        asked = Conversation(text=row["prompt"])
        for kept in row["hypotheses"]:
            (tokens,) = template.encode_responses(asked, [kept["response"]])
            start = len(template.encode(asked))
            sums = [logprobs_alone(model, tokens)[start - 1 :].sum() for model in readers]
            scored += kept["score"] == pytest.approx(sums[0] - sums[1], abs=1e-3)
    # Those that ended by EOS are scored with one more token.
    assert scored >= 6


def test_sampling_takes_no_judges(folders, prompts, tmp_path, capsys):
    name = "tests.cli.test_search_guidance:count_vowels"
    status = search(folders, prompts, tmp_path / "out", "--method", "sample", "--scorer", name)
    assert "scores nothing" in one_error(capsys, status)


def test_templates_by_name(folders, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    flags = ("--policy-template", "tulu", "--guide-template", "zephyr")
    assert search(folders, prompts, out, *flags) == 0
    status = search(folders, prompts, out, "--policy-template", "zephir")
    assert "zephyr" in one_error(capsys, status)
    status = search(folders, prompts, out, "--guide-template", "none")
    error = one_error(capsys, status)
    assert "line 2" in error
    assert "takes text only" in error


def test_integrated_value_guidance_and_its_top_k(folders, prompts, tmp_path, capsys):
    for name, flags in (("a", []), ("b", ["--eft-top-k", "3"])):
        out = tmp_path / f"{name}.jsonl"
        assert search(folders, prompts, out, "--method", "ivg", "--beta", "0.5", *flags) == 0
    assert (tmp_path / "a.jsonl").read_bytes() != (tmp_path / "b.jsonl").read_bytes()
    status = search(folders, prompts, tmp_path / "c", "--eft-top-k", "3")
    assert "--eft-top-k is for eft and ivg, not cbs" in one_error(capsys, status)
    status = search(folders, prompts, tmp_path / "c", "--method", "ivg", guide="far")
    assert "--method ivg needs one" in one_error(capsys, status)


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
