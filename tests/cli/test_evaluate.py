import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import tiny_model
from w2s_jax.cli import main as entry
from w2s_jax.cli.main import main
from w2s_jax.evaluate import judging
from w2s_jax.evaluate.results import read_results
from w2s_jax.evaluate.rewards import compare
from w2s_jax.models.load import load_classifier, load_reward_model
from w2s_jax.models.reward import Classifier, EncoderConfig, RewardModel, init_classifier
from w2s_jax.models.save import save_classifier, save_reward_model
from w2s_jax.text.prompts import plain
from w2s_jax.text.rows import Journal, journal_path, read_jsonl, write_jsonl
from w2s_jax.text.tokenizer import load_tokenizer, save_bpe, train_bpe

POSITIONS, VOCABULARY = 96, 300
COMMAND = ("eval",)
TEXT = "a film of the sea"
RESPONSES = [" of the sea", "", " a film " * 7, " ünder {braces}", " the film", " sea of a"]
ROWS = [
    {"prompt": "A film", "response": response, "id": i, "note": {"kept": True}}
    for i, response in enumerate(RESPONSES)
]
CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "<assistant>"
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(entry.COMMANDS, COMMAND, ("evaluate", "Evaluate", "gold rewards"))


def save_tokenizer(directory):
    save_bpe(train_bpe([TEXT] * 50, VOCABULARY), directory, max_length=POSITIONS)


def reward_model(directory: Path, labels=("reward",), seed=0) -> str:
    model = tiny_model(seed, vocab_size=VOCABULARY, max_positions=POSITIONS, layers=1)
    drawn = np.random.default_rng(seed).normal(size=(model.config.width, len(labels)))
    head = {"kernel": jax.device_put(drawn.astype(np.float32))}
    params = {name: tree for name, tree in model.params.items() if name != "head"}
    save_reward_model(RewardModel(model.config, params, head, labels), directory)
    save_tokenizer(directory)
    return str(directory)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A reward model's folder; its tokenizer has no chat template."""
    return reward_model(tmp_path_factory.mktemp("reward"))


@pytest.fixture
def results(tmp_path):
    write_jsonl(tmp_path / "out.jsonl", ROWS)
    return tmp_path / "out.jsonl"


def evaluate(model, results, *flags):
    files = ["--results", str(results), "--reward-model", str(model)]
    return main(["eval", *files, "--batch-size=4", *map(str, flags)])


def expected(model, texts, end=(), special=True):
    """The logits of whole texts, through the loaded model in one batch."""
    loaded, tokenizer = load_reward_model(model), load_tokenizer(model)
    rows = [[*tokenizer(text, add_special_tokens=special)["input_ids"], *end] for text in texts]
    width = max(map(len, rows))
    tokens = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
    mask = np.arange(width) < np.array([[len(row)] for row in rows])
    return np.asarray(loaded(tokens, mask))


def test_every_row_gets_its_reward_and_keeps_its_fields(model, results, tmp_path, capsys):
    out, figures = tmp_path / "scored.jsonl", tmp_path / "figures.json"
    assert evaluate(model, results, "--output", out, "--json", figures) == 0
    rows = read_jsonl(out)
    found = np.array([row.pop("gold_reward") for row in rows])
    assert rows == ROWS
    wanted = expected(model, ["A film" + response for response in RESPONSES])[:, 0]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    told = json.loads(figures.read_text())
    assert told["reward_model"] == model
    assert told["results"]["file"] == str(results)
    assert told["results"]["rows"] == len(ROWS)
    np.testing.assert_allclose(told["results"]["reward"], wanted.mean(), atol=1e-4)
    stderr = wanted.std(ddof=1) / np.sqrt(len(wanted))
    np.testing.assert_allclose(told["results"]["stderr"], stderr, atol=1e-4)
    assert told["results"]["characters"] == np.mean([len(text) for text in RESPONSES])
    ids = load_tokenizer(model)(RESPONSES, add_special_tokens=False)["input_ids"]
    assert told["results"]["tokens"] == np.mean([len(row) for row in ids])
    assert f"{wanted.mean():+.3f}" in capsys.readouterr().out
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "out.jsonl", "scored.jsonl", "figures.json",
    }  # fmt: skip


def test_two_files_are_compared_prompt_by_prompt(model, results, tmp_path, capsys):
    others = [row | {"response": row["response"][::-1] + "!"} for row in ROWS[:4]] + ROWS[4:]
    write_jsonl(tmp_path / "other.jsonl", others)
    figures = tmp_path / "figures.json"
    flags = ["--against", tmp_path / "other.jsonl", "--json", figures, "--seed", 5]
    assert evaluate(model, results, *flags) == 0
    texts = [[row["prompt"] + row["response"] for row in rows] for rows in (ROWS, others)]
    every = [*texts[0], *texts[1]]
    reward = dict(zip(every, expected(model, every)[:, 0], strict=True))
    ours, theirs = (np.array([reward[text] for text in some]) for some in texts)
    wanted = compare(ours, theirs, seed=5)
    told = json.loads(figures.read_text())
    assert told["comparison"]["ties"] == wanted.ties == 2
    for name in ("win_rate", "low", "high"):
        assert told["comparison"][name] == getattr(wanted, name)
    np.testing.assert_allclose(told["comparison"]["difference"], wanted.difference, atol=1e-4)
    np.testing.assert_allclose(told["against"]["reward"], theirs.mean(), atol=1e-4)
    printed = capsys.readouterr().out
    assert f"win rate {100 * wanted.win_rate:.1f} %" in printed
    assert f"{wanted.wins} wins, 2 ties, {wanted.losses} losses" in printed


def test_alpaca_evals_array_behind_a_template_of_a_file(model, tmp_path):
    asked = ["Say {it}", "Name a film"]
    array = [
        {"instruction": text, "output": f"answer {i}", "generator": "w2s", "dataset": "d"}
        for i, text in enumerate(asked)
    ]
    (tmp_path / "out.json").write_text(json.dumps(array))
    (tmp_path / "chat.jinja").write_text(CHAT)
    scored = tmp_path / "scored.jsonl"
    flags = ["--template", tmp_path / "chat.jinja", "--output", scored]
    assert evaluate(model, tmp_path / "out.json", *flags) == 0
    texts = [f"<user>{text}\n<assistant>answer {i}" for i, text in enumerate(asked)]
    found = [row["gold_reward"] for row in read_jsonl(scored)]
    np.testing.assert_allclose(found, expected(model, texts, special=False)[:, 0], atol=1e-4)


def test_an_end_token_may_be_put_behind(model, results, tmp_path):
    scored = tmp_path / "scored.jsonl"
    assert evaluate(model, results, "--end-token", "--output", scored) == 0
    texts, end = ["A film" + text for text in RESPONSES], [load_tokenizer(model).eos_token_id]
    found = [row["gold_reward"] for row in read_jsonl(scored)]
    np.testing.assert_allclose(found, expected(model, texts, end)[:, 0], atol=1e-4)


@pytest.mark.parametrize("side", ["start", "end"])
def test_long_rows_are_cut_on_the_side_that_is_asked_for(model, tmp_path, side):
    words = " ".join(str(i) for i in range(POSITIONS))
    write_jsonl(tmp_path / "out.jsonl", [{"prompt": "A film", "response": words}])
    scored = tmp_path / "scored.jsonl"
    assert evaluate(model, tmp_path / "out.jsonl", "--cut", side, "--output", scored) == 0
    ids = load_tokenizer(model)("A film" + words)["input_ids"]
    assert len(ids) > POSITIONS
    kept = ids[-POSITIONS:] if side == "start" else ids[:POSITIONS]
    wanted = load_reward_model(model)(np.array([kept], np.int32))[0, 0]
    np.testing.assert_allclose(read_jsonl(scored)[0]["gold_reward"], wanted, atol=1e-4)


def test_labels(results, tmp_path):
    folder = reward_model(tmp_path / "model", ("bad", "good"))
    logits = expected(folder, ["A film" + text for text in RESPONSES])
    for label, weights in ((None, (-1, 1)), ("bad", (1, 0))):
        scored = tmp_path / f"scored-{label}.jsonl"
        flags = ["--output", scored, *(["--label", label] if label else [])]
        assert evaluate(folder, results, *flags) == 0
        found = [row["gold_reward"] for row in read_jsonl(scored)]
        np.testing.assert_allclose(found, logits @ np.array(weights, np.float32), atol=1e-4)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An encoder classifier's folder."""
    directory = tmp_path_factory.mktemp("encoder")
    config = EncoderConfig(
        vocab_size=VOCABULARY, width=16, layers=1, heads=2, mlp_width=16, max_positions=24,
        pad_id=1, initializer_range=0.5,
    )  # fmt: skip
    drawn = jax.jit(lambda key: init_classifier(config, key).params)(jax.random.key(0))
    save_classifier(Classifier(config, drawn), directory)
    save_bpe(train_bpe([TEXT] * 50, VOCABULARY), directory, max_length=24)
    return str(directory)


def test_an_encoder_reads_prompt_and_response_as_one_text(encoder, results, tmp_path):
    scored = tmp_path / "scored.jsonl"
    assert evaluate(encoder, results, "--output", scored) == 0
    classifier, tokenizer = load_classifier(encoder), load_tokenizer(encoder)
    rows = [tokenizer("A film" + text)["input_ids"][:24] for text in RESPONSES]
    tokens = np.array([row + [0] * (24 - len(row)) for row in rows], np.int32)
    mask = np.arange(24) < np.array([[len(row)] for row in rows])
    logits = np.asarray(jax.jit(lambda *batch: classifier(*batch))(tokens, mask))
    found = [row["gold_reward"] for row in read_jsonl(scored)]
    np.testing.assert_allclose(found, logits[:, 1] - logits[:, 0], atol=1e-4)


@pytest.mark.parametrize("flags", [["--template", "zephyr"], ["--end-token"]])
def test_an_encoder_takes_no_template(flags, encoder, results, capsys):
    assert evaluate(encoder, results, *flags) == 2
    assert "an encoder classifier reads plain text" in capsys.readouterr().err


def test_a_killed_run_goes_on_where_it_stopped(model, results, tmp_path, monkeypatch):
    """From what is on the disk where a kill strikes after five rows."""
    left, asked = [], []
    append, rewards = Journal.append, judging.rewards

    def watched(self, row_id, row):
        append(self, row_id, row)
        left.append(self.path.read_bytes())

    def counting(model, encoded, **options):
        asked.append(len(encoded))
        return rewards(model, encoded, **options)

    monkeypatch.setattr(Journal, "append", watched)
    monkeypatch.setattr(judging, "rewards", counting)
    other = tmp_path / "other.jsonl"
    write_jsonl(other, [row | {"response": row["response"] + "."} for row in ROWS])
    found = {}
    for name in ("whole", "killed"):
        scored, figures = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.json"
        if name == "killed":
            journal_path(scored).write_bytes(left[4])
        flags = ["--against", other, "--output", scored, "--json", figures]
        assert evaluate(model, results, *flags) == 0
        assert not journal_path(scored).exists()
        rows = [row["gold_reward"] for row in read_jsonl(scored)]
        found[name] = rows, json.loads(figures.read_text())["comparison"]["wins"]
    assert asked == [2 * len(ROWS), 2 * len(ROWS) - 5]
    np.testing.assert_allclose(found["killed"][0], found["whole"][0], atol=1e-5)
    assert found["killed"][1] == found["whole"][1]


def spoil(rows, **changes):
    return [*rows[:2], rows[2] | changes, *rows[3:]]


WRONG = {
    "no response": (spoil(ROWS, response=None), 'out.jsonl line 3: no "response"'),
    "a list": (spoil(ROWS, response=[]), 'line 3: "response" is list; it takes text'),
    "no prompt": (spoil(ROWS, prompt=None), 'line 3: no "prompt"'),
    "half a character": (spoil(ROWS, response="\ud800"), "line 3: the prompt or the response is"),
    "too long": (spoil(ROWS, response=" 1" * 200), "line 3: prompt and response are 4"),
    "messages": (
        spoil(ROWS, prompt=[{"role": "user", "content": "hi"}]),
        "line 3: --template: the tokenizer has no chat template",
    ),
}


@pytest.mark.parametrize("problem", WRONG)
def test_a_wrong_row_is_named_before_any_weight_is_read(problem, model, tmp_path, capsys):
    rows, message = WRONG[problem]
    write_jsonl(tmp_path / "out.jsonl", rows)
    folder = tmp_path / "model"
    folder.mkdir()
    for path in Path(model).iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    assert evaluate(folder, tmp_path / "out.jsonl", "--output", tmp_path / "scored.jsonl") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "scored.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "out.json: no rows; the array is empty"),
        ("[1]", "out.json row 1: not a JSON object but int"),
        ('[{"instruction": "a", "output": "b"}', "out.json: not a JSON array"),
        ('[{"instruction": "a"}]', 'out.json row 1: no "response"'),
    ],
)
def test_a_wrong_array_is_told_in_one_line(text, message, model, tmp_path, capsys):
    (tmp_path / "out.json").write_text(text)
    assert evaluate(model, tmp_path / "out.json") == 2
    assert message in capsys.readouterr().err


def test_other_prompts_are_refused(model, results, tmp_path, capsys):
    write_jsonl(tmp_path / "other.jsonl", spoil(ROWS, prompt="Another"))
    assert evaluate(model, results, "--against", tmp_path / "other.jsonl") == 2
    assert "other.jsonl line 3: another prompt than in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size=0"], "--batch-size is 0"),
        (["--label", "best"], "no label 'best'; choose one of 0 (reward)"),
        (["--template", "zefyr"], "perhaps zephyr"),
        (["--against", "{folder}/none.jsonl"], "none.jsonl: cannot be read"),
        (["--output", "{folder}/out.jsonl"], "is also another flag's file"),
        (["--json", "{folder}/same", "--output", "{folder}/same"], "is also another flag's file"),
    ],
)
def test_wrong_flags_are_told_in_one_line(flags, message, model, results, tmp_path, capsys):
    flags = [flag.replace("{folder}", str(tmp_path)) for flag in flags]
    assert evaluate(model, results, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_rows_whose_reward_is_no_number_are_named_and_the_others_kept(results, tmp_path, capsys):
    folder = reward_model(tmp_path / "model")
    loaded, tokenizer = load_reward_model(folder), load_tokenizer(folder)
    read = read_results(results)
    pairs = zip(read.conversations, read.responses, strict=True)
    texts = [plain(asked) + said for asked, said in pairs]
    ids = [set(tokenizer(text)["input_ids"]) for text in texts]
    alone = (tokens.difference(*ids[:at], *ids[at + 1 :]) for at, tokens in enumerate(ids))
    at, token = next((at, min(tokens)) for at, tokens in enumerate(alone) if tokens)
    embedding = loaded.params["embed"]["embedding"].at[token, 0].set(jnp.nan)
    params = loaded.params | {"embed": {"embedding": embedding}}
    save_reward_model(RewardModel(loaded.config, params, loaded.head, loaded.labels), folder)
    out = tmp_path / "scored.jsonl"
    told = f"{results} line {at + 1}: logits of the reward model {folder} are NaN"
    assert evaluate(folder, results) == 2
    assert told in capsys.readouterr().err
    assert evaluate(folder, results, "--against", results, "--output", out) == 2
    error = capsys.readouterr().err
    assert error.count(told) == 2
    assert f"what was found for the others is kept in {out}.journal" in error
    kept = [json.loads(line) for line in Path(f"{out}.journal").read_text().splitlines()[1:]]
    assert sorted(row["row_id"] for row in kept) == [
        index for index in range(2 * len(ROWS)) if index % len(ROWS) != at
    ]
