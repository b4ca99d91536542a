"""lm-eval's model class and `w2s lm-eval` on local tasks, against direct computations."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from tests.evaluate.harness_files import (
    CHOICES,
    OPENINGS,
    PAGES,
    POSITIONS,
    apart,
    greedy,
    likelihood,
    rolling,
    tiny_checkpoint,
    write_tasks,
)
from w2s_jax.cli.main import main
from w2s_jax.errors import InputError
from w2s_jax.evaluate import steered
from w2s_jax.evaluate.harness import HarnessModel, decoding_of, register, rows_of
from w2s_jax.models.load import load_model
from w2s_jax.ops.logits import Sampling
from w2s_jax.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.harness
BETA = 0.6
ROLES = ("policy", "tuned", "untuned")


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No network, and the data sets' cache in a folder of the test's own."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        cache = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {role: tiny_checkpoint(root / role, seed) for seed, role in enumerate(ROLES)}


@pytest.fixture(scope="module")
def loaded(folders):
    """(the three models, the tokenizer), read apart from what is tested."""
    models = [load_model(folders[role], dtype="float32") for role in ROLES]
    return models, load_tokenizer(folders["policy"])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own")


@pytest.fixture(scope="module")
def harness(folders):
    """The model class, made as lm-eval makes it; one for each method."""
    made = {}

    def make(method):
        if method not in made:
            guides = {} if method == "sample" else {r: folders[r] for r in ROLES[1:]}
            arguments = {"policy": folders["policy"], "method": method, "beta": BETA} | guides
            settings = {"w": 2, "k": 2, "l": 3, "n": 3, "max_gen_toks": 12}
            made[method] = register().create_from_arg_obj(
                arguments | settings, {"batch_size": 4, "max_batch_size": None, "device": None}
            )
        return made[method]

    return make


def evaluate(folders, tasks, output, names, *flags):
    roles = [word for role in ROLES for word in (f"--{role}", folders[role])]
    args = ["--tasks", names, "--include-path", tasks, "--output", str(output), "--beta", str(BETA)]
    code = main(["lm-eval", *roles, *args, "--log-samples", "--w=2", "--k=2", "--l=3", *flags])
    return code, json.loads(output.read_text()) if output.exists() else None


def direct_pair(loaded, context, continuation, beta, *, special=True):
    ids = lambda text: loaded[1](text, add_special_tokens=special).input_ids  # noqa: E731
    before, whole = ids(context), ids(context + continuation)
    return likelihood(loaded[0], before, whole[len(before) :], beta)


@pytest.mark.parametrize(("method", "beta"), [("sample", None), ("eft", BETA)])
def test_all_kinds_of_task_give_direct_numbers(folders, loaded, tasks, tmp_path, method, beta):
    output = tmp_path / "out" / "results.json"
    names = "tiny_choice,tiny_pages,tiny_write"
    code, results = evaluate(folders, tasks, output, names, "--method", method)
    assert code == 0
    _check_choices(loaded, results, beta)
    _check_pages(loaded, results, beta)
    _check_texts(loaded, results, beta)
    assert results["config"]["model"] == "w2s"
    assert results["config"]["model_args"]["method"] == method


def _check_choices(loaded, results, beta):
    right = 0
    for row, sample in zip(CHOICES, results["samples"]["tiny_choice"], strict=True):
        expected = [direct_pair(loaded, row["question"], f" {c}", beta) for c in row["choices"]]
        found = [(value, greedy) for ((value, greedy),) in sample["resps"]]
        np.testing.assert_allclose([v for v, _ in found], [v for v, _ in expected], atol=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        right += int(np.argmax([value for value, _ in expected])) == row["answer"]
    assert results["results"]["tiny_choice"]["acc,none"] == pytest.approx(right / len(CHOICES))


def _check_pages(loaded, results, beta):
    lengths = []
    for row, sample in zip(PAGES, results["samples"]["tiny_pages"], strict=True):
        tokens = loaded[1](row["page"], add_special_tokens=False).input_ids
        start = loaded[1].eos_token_id if loaded[1].bos_token_id is None else loaded[1].bos_token_id
        total = rolling(loaded[0], start, tokens, POSITIONS, beta)
        ((value,),) = sample["resps"]
        assert value == pytest.approx(total, abs=1e-3, rel=1e-5)
        lengths.append(len(tokens))
    assert max(lengths) > 2 * POSITIONS, "no page is longer than two windows"


def _check_texts(loaded, results, beta):
    texts = []
    for row, sample in zip(OPENINGS, results["samples"]["tiny_write"], strict=True):
        prompt = loaded[1](row["question"]).input_ids
        texts.append(greedy(loaded[0], loaded[1], prompt, 12, "e", beta))
        assert sample["resps"] == [[texts[-1]]]
    assert any(texts)


@pytest.mark.parametrize("method", ["cbs"])
def test_methods_that_choose_among_samples_generate(folders, tasks, tmp_path, method, capsys):
    runs = [
        evaluate(folders, tasks, tmp_path / f"{seed}.json", "tiny_write", "--method", method,
                 "--n=3", "--seed", str(seed), "--limit", limit)
        for seed, limit in ((0, "3"), (1, "3"))
    ]  # fmt: skip
    assert [code for code, _ in runs] == [0, 0]
    texts = [[row["resps"] for row in run["samples"]["tiny_write"]] for _, run in runs]
    assert texts[0] != texts[1], "the seed changes nothing: greedy decoding"
    assert not any("e" in text for rows in texts for ((text,),) in rows)
    assert "exact_match" in capsys.readouterr().out
    # A row's draws do not depend on which rows are beside it.
    code, one = evaluate(folders, tasks, tmp_path / "one.json", "tiny_write", "--method", method,
                         "--n=3", "--limit", "1")  # fmt: skip
    assert code == 0
    assert one["samples"]["tiny_write"][0]["resps"] == texts[0][0]


@pytest.mark.parametrize(("method", "task"), [("cbs", "tiny_choice"), ("bon", "tiny_pages")])
def test_methods_without_a_likelihood_say_so(folders, tasks, tmp_path, method, task, capsys):
    code, _ = evaluate(folders, tasks, tmp_path / "o.json", task, "--method", method)
    assert code == 2
    message = capsys.readouterr().err.strip().split("\n")[-1]
    assert message.startswith(f"error: --method {method} has no likelihood")
    assert not (tmp_path / "o.json").exists()


def test_answers_come_from_lm_evals_cache(folders, tasks, tmp_path, monkeypatch):
    flags = ["--method", "eft", "--use-cache", str(tmp_path / "cache")]
    names = "tiny_choice,tiny_write"
    _, first = evaluate(folders, tasks, tmp_path / "a.json", names, *flags)
    monkeypatch.setattr(steered, "score_responses", lambda *_, **__: pytest.fail("scored again"))
    monkeypatch.setattr(steered, "search_all", lambda *_, **__: pytest.fail("generated again"))
    _, second = evaluate(folders, tasks, tmp_path / "b.json", names, *flags)
    for task in names.split(","):
        resps = [[row["resps"] for row in run["samples"][task]] for run in (first, second)]
        assert json.dumps(resps[0]) == json.dumps(resps[1])


def test_each_answer_is_cached_as_soon_as_it_is_there(harness):
    class Hook:
        def __init__(self):
            self.held = []

        def add_partial(self, kind, arguments, answer):
            self.held.append((kind, arguments, answer))

    model = harness("sample")
    hook, old = Hook(), model.cache_hook
    model.set_cache_hook(hook)
    try:
        pairs = [request(("a sea", " far")), request(("over", " the night"))]
        answers = model.loglikelihood(pairs, disable_tqdm=True)
        (total,) = model.loglikelihood_rolling([request(("the old ship",))], disable_tqdm=True)
        write = request(("a sea", {"until": ["e"], "max_gen_toks": 3}))
        (text,) = model.generate_until([write], disable_tqdm=True)
    finally:
        model.set_cache_hook(old)
    held = {(kind, str(arguments)): answer for kind, arguments, answer in hook.held}
    for pair, answer in zip(pairs, answers, strict=True):
        assert held["loglikelihood", str(pair.args)] == answer
    assert held["loglikelihood_rolling", str(("the old ship",))] == total
    assert held["generate_until", str(write.args)] == text
    assert write.args[1] == {"until": ["e"], "max_gen_toks": 3}, "the arguments are the cache's key"


def request(arguments):
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, arguments, 0)


def test_the_chat_template_is_the_policys(folders, loaded, tasks, tmp_path, harness):
    flags = ["--method", "sample", "--apply-chat-template", "--system-instruction", "Be brief."]
    _, results = evaluate(folders, tasks, tmp_path / "o.json", "tiny_choice", *flags)
    for row, sample in zip(CHOICES, results["samples"]["tiny_choice"], strict=True):
        prompt = f"<system>Be brief.<user>{row['question']}<assistant>"
        assert sample["arguments"] == [[prompt, choice] for choice in row["choices"]]
        for choice, ((value, _),) in zip(row["choices"], sample["resps"], strict=True):
            expected, _ = direct_pair(loaded, prompt, choice, None, special=False)
            assert value == pytest.approx(expected, abs=1e-4)
    model = harness("sample")
    history = [{"role": "user", "content": "{braces}"}]
    assert model.apply_chat_template(history) == "<user>{braces}<assistant>"
    half = [*history, {"role": "assistant", "content": "so"}]
    text = model.apply_chat_template(half, add_generation_prompt=False)
    assert text == "<user>{braces}<assistant>so"
    assert "policy" in model.tokenizer_name
    assert "/" not in model.tokenizer_name


def test_guides_read_chats_behind_their_own_template(folders, loaded, tasks, tmp_path):
    """Response tokens are the policy's, spaces of the templates no part of them."""
    jinja = tmp_path / "guide.jinja"
    jinja.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %} > ")
    flags = ["--method", "eft", "--apply-chat-template", "--guide-template", str(jinja)]
    _, results = evaluate(folders, tasks, tmp_path / "o.json", "tiny_choice,tiny_write", *flags)
    encode = lambda text: loaded[1](text, add_special_tokens=False).input_ids  # noqa: E731
    for row, sample in zip(CHOICES, results["samples"]["tiny_choice"], strict=True):
        policy, guide = f"<user>{row['question']}<assistant>", f"[{row['question']}] > "
        contexts = [encode(policy), encode(guide), encode(guide)]
        for choice, ((value, _),) in zip(row["choices"], sample["resps"], strict=True):
            response = encode(policy + choice)[len(contexts[0]) :]
            expected = apart(loaded[0], contexts, response, BETA)
            assert value == pytest.approx(expected, abs=1e-4)
            shared = direct_pair(loaded, policy, choice, BETA, special=False)[0]
            assert abs(expected - shared) > 1e-2
    assert len(results["samples"]["tiny_write"]) == len(OPENINGS)


def test_guides_of_another_vocabulary_steer_texts(folders, tasks, tmp_path, capsys):
    far = {"policy": folders["policy"]}
    for seed, role in enumerate(ROLES[1:], start=7):
        far[role] = tiny_checkpoint(tmp_path / role, seed, text="quite other words it has")
    flags = ["--method", "cbs", "--apply-chat-template"]
    code, results = evaluate(far, tasks, tmp_path / "o.json", "tiny_write", *flags)
    assert code == 0
    assert "the guide scores texts" in capsys.readouterr().out
    near = evaluate(folders, tasks, tmp_path / "n.json", "tiny_write", *flags)[1]
    texts = [[row["resps"] for row in run["samples"]["tiny_write"]] for run in (results, near)]
    assert texts[0] != texts[1]
    code, _ = evaluate(far, tasks, tmp_path / "e.json", "tiny_choice", "--method", "eft")
    assert code == 2
    assert "different vocabularies" in capsys.readouterr().err


def test_long_contexts_are_cut_from_the_left(harness, loaded, caplog):
    model = harness("sample")
    long = " ".join(["the cold sea"] * 60)
    tokens = loaded[1](long + " again").input_ids
    count = len(tokens) - len(loaded[1](long).input_ids)
    ((value, _),) = model.loglikelihood([request((long, " again"))], disable_tqdm=True)
    cut = tokens[-(POSITIONS + 1) :]
    assert value == pytest.approx(
        likelihood(loaded[0], cut[:-count], cut[-count:], None)[0], abs=1e-4
    )
    assert "cut from the left" in caplog.text
    (text,) = model.generate_until(
        [request((long, {"until": [], "max_gen_toks": 4}))], disable_tqdm=True
    )
    prompt = loaded[1](long).input_ids[-(POSITIONS - 4) :]
    assert text == greedy(loaded[0], loaded[1], prompt, 4, "\0", None)
    with pytest.raises(InputError, match=f"a continuation of .* exceeds the {POSITIONS} positions"):
        model.loglikelihood([request(("a", long))], disable_tqdm=True)
    with pytest.raises(InputError, match="max_gen_toks is 96"):
        model.generate_until([request(("a", {"max_gen_toks": 96}))], disable_tqdm=True)


def test_an_empty_context_is_the_prefix_token(harness, loaded):
    model = harness("eft")
    ((value, _),) = model.loglikelihood([request(("", "a sea"))], disable_tqdm=True)
    tokens = loaded[1]("a sea", add_special_tokens=False).input_ids
    expected, _ = likelihood(loaded[0], [model.prefix_token_id], tokens, BETA)
    assert value == pytest.approx(expected, abs=1e-4)
    (text,) = model.generate_until([request(("", {"max_gen_toks": 3}))], disable_tqdm=True)
    assert isinstance(text, str)


def test_a_continuation_inside_the_contexts_last_token_is_scored(harness, loaded):
    """Where text grows into a token that begins in the context, that token is the response's."""
    model = harness("sample")
    word = next(
        (text[:-1], text[-1])
        for text in ("ship", "sea", "far", "night", "the", "old")
        if len(loaded[1](text).input_ids) <= len(loaded[1](text[:-1]).input_ids)
    )
    before, after = model._encode_pair(*word)
    assert after
    assert before
    ((value, _),) = model.loglikelihood([request(word)], disable_tqdm=True)
    assert value == pytest.approx(likelihood(loaded[0], before, after, None)[0], abs=1e-4)


def test_what_a_task_says_of_decoding_is_heeded(harness):
    own = Sampling(0.7, 50, 0.9)

    def decoding(method, **arguments):
        held = harness(method).steered
        config = replace(held.config, sampling=own, max_new_tokens=33)
        return decoding_of(replace(held, config=config), arguments)

    greedy = decoding("sample", until=["a", ""], max_gen_toks=5)
    assert (greedy.stop, greedy.max_new_tokens, greedy.sampling.temperature) == (("a",), 5, 0.0)
    assert decoding("eft", temperature=0.3, do_sample=False).sampling.temperature == 0.0
    assert decoding("eft", temperature=0.3, do_sample=True).sampling.temperature == 0.3
    assert decoding("eft", temperature=0.3).sampling.temperature == 0.3
    assert decoding("sample", do_sample=True).sampling.temperature == 0.7
    assert decoding("sample", until="x").stop == ("x",)
    assert decoding("sample").max_new_tokens == 33
    assert decoding("cbs").sampling == own
    assert decoding("bon", do_sample=False, temperature=0.0).sampling == own
    assert decoding("cbs", do_sample=True, temperature=1.5).sampling.temperature == 1.5
    assert decoding("cbs", top_k=0, top_p=1).sampling == Sampling(0.7, 0, 1.0)
    with pytest.raises(InputError, match="temperature"):
        decoding("cbs", do_sample=True, temperature=-1)


def test_a_special_token_may_end_a_text(harness, loaded):
    model = harness("sample")
    eos = loaded[1].convert_ids_to_tokens(0)
    arguments = {"until": [eos, "e"], "max_gen_toks": 12}
    (text,) = model.generate_until([request(("The old", arguments))], disable_tqdm=True)
    assert "e" not in text
    assert eos not in text


def test_repeats_of_a_context_draw_anew_and_alone():
    assert len({*rows_of(["a", "a", "b"])}) == 3
    assert rows_of(["a", "b"])[1] == rows_of(["b", "c"])[0]
    assert rows_of(["a", "a"])[1] == rows_of(["b", "a", "a"])[2]
    assert rows_of(["\ud800"])


def test_the_class_is_registered_once_and_reads_lm_evals_argument_string(folders, tmp_path):
    from lm_eval.api.registry import get_model

    assert register() is register() is get_model("w2s")
    text = f"policy={folders['policy']},method=sample,max_gen_toks=7,seed=3"
    (tmp_path / "calm.jinja").write_text("{% if calm %}calm: {% endif %}{{ messages[0].content }}")
    text += f',policy_template={tmp_path / "calm.jinja"},template_args={{"calm": true}}'
    model = get_model("w2s").create_from_arg_string(text, {"batch_size": "auto"})
    assert isinstance(model, HarnessModel)
    assert model.apply_chat_template([{"role": "user", "content": "sea"}]) == "calm: sea"
    config = model.steered.config
    assert (config.max_new_tokens, config.seed, model.batch_size) == (7, 3, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"betta": 1}, "model argument 'betta': it takes policy"),
        ({"method": "eft"}, "--method eft needs --tuned and --untuned"),
        ({"method": "cbs", "tuned": "x"}, "1 --tuned and 0 --untuned"),
        ({"method": "best"}, "method 'best' is none of"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"top_p": 0}, "top_p is 0"),
        ({"policy": None}, "policy is missing"),
        ({"template_args": "calm"}, "template_args: 'calm' is not JSON"),
        ({"policy_template": "chatt"}, "no template 'chatt', perhaps chat"),
    ],
)
def test_wrong_model_arguments_are_told(folders, arguments, message):
    with pytest.raises(InputError, match=message):
        register().create_from_arg_obj({"policy": folders["policy"]} | arguments)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "no_such_task"], "lm-eval knows no task no_such_task"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "x", "--include-path", "/nowhere"], "--include-path /nowhere: no such folder"),
        (["--tasks", "x", "--output", "/proc/nothing/o"], "cannot be written"),
        (["--tasks", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--tasks", "x", "--tuned", "y"], "1 --tuned and 0 --untuned"),
    ],
)
def test_wrong_flags_are_told_in_one_line(folders, flags, message, capsys):
    policy = [] if "--tuned" in flags else ["--policy", folders["policy"]]
    assert main(["lm-eval", *policy, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
