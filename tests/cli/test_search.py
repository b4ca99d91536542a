import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from w2s_jax.cli.main import main, parse
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.load import load_model
from w2s_jax.models.model import Model, abstract_model
from w2s_jax.models.save import save_model
from w2s_jax.ops.logits import Sampling
from w2s_jax.search.checkpoints import Sources, plan
from w2s_jax.search.config import best_of_n, cbs, eft, ivg, sample
from w2s_jax.search.file import fingerprint as fingerprint_of
from w2s_jax.text.rows import Journal, journal_path, open_journal, read_jsonl, write_jsonl
from w2s_jax.text.tokenizer import load_tokenizer, save_bpe, train_bpe

POSITIONS = 96
VOCABULARY = 300
PROMPTS = [
    {"prompt": "A film", "id": i, "note": {"kept": True}} if i % 2 else {"prompt": "We" * i}
    for i in range(7)
]
SMALL = ["--w=2", "--k=2", "--l=3", "--n=3", "--max-new-tokens=8", "--batch-size=2"]


def tiny(directory: Path, seed: int, *, text: str = "a film of the sea", **changes: int) -> str:
    """A random llama with a byte-level tokenizer, saved as a checkpoint folder.

    Drawn in NumPy: nothing is compiled.
    """
    shape = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 24}
    shape |= {"vocab_size": VOCABULARY, "max_positions": POSITIONS} | changes
    config = ModelConfig(architecture="llama", eos_ids=(0,), **shape)
    save_bpe(train_bpe([text] * 50, VOCABULARY), directory, max_length=POSITIONS)
    shapes, _ = abstract_model(config)
    rng = np.random.default_rng(seed)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        """Larger than a fresh model's, so that distributions are far from uniform."""
        fresh = np.ones(leaf.shape) if len(leaf.shape) == 1 else rng.normal(0, 0.02, leaf.shape)
        return jax.device_put((8 * fresh).astype(leaf.dtype))

    params = jax.tree.map(fill, shapes.params)
    save_model(Model(config, params), directory, tokenizer=load_tokenizer(directory))
    return str(directory)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Flags that name a policy, a tuned and an untuned model of one vocabulary."""
    root = tmp_path_factory.mktemp("models")
    roles = ("policy", "tuned", "untuned")
    folders = {role: tiny(root / role, seed) for seed, role in enumerate(roles)}
    return [word for role, folder in folders.items() for word in (f"--{role}", folder)]


@pytest.fixture
def prompts(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", PROMPTS)
    return tmp_path / "in.jsonl"


def search(models, prompts, output, *flags):
    files = ["--prompts", str(prompts), "--output", str(output)]
    return main(["search", *models, *files, *SMALL, *flags])


@pytest.mark.parametrize(("method", "kept"), [("cbs", 2), ("sample", 1)])
def test_every_method_answers_all_rows_in_order(models, prompts, tmp_path, method, kept):
    own = models if method == "cbs" else models[:2]
    assert search(own, prompts, tmp_path / "out.jsonl", "--method", method) == 0
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in PROMPTS]
    assert [row.get("id") for row in rows] == [row.get("id") for row in PROMPTS]
    assert rows[1]["note"] == {"kept": True}
    for row in rows:
        assert list(row)[:4] == ["prompt", "response", "score", "hypotheses"]
        scores = [hypothesis["score"] for hypothesis in row["hypotheses"]]
        assert len(scores) == kept
        assert scores == sorted(scores, reverse=True)
        assert row["hypotheses"][0] == {"response": row["response"], "score": row["score"]}
    assert any(row["response"] for row in rows)
    assert {entry.name for entry in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


@pytest.mark.parametrize(
    ("method", "made"),
    [
        ("cbs", lambda **settings: cbs(2, 5, 3, **settings)),
        ("bon", lambda **settings: best_of_n(7, **settings)),
        ("eft", lambda **settings: eft(0.5, eft_top_k=4, **settings)),
        ("ivg", lambda **settings: ivg(2, 5, 3, 0.5, eft_top_k=4, **settings)),
        ("sample", sample),
    ],
)
def test_flags_describe_the_methods_preset(method, made):
    files = ["--policy=P", "--prompts=in.jsonl", "--output=out.jsonl"]
    flags = ["--w=2", "--k=5", "--l=3", "--n=7", "--beta=0.5", "--max-new-tokens=40",
             "--batch-size=6", "--seed=9", "--stop=END", "--temperature=0.9", "--top-k=11",
             "--top-p=0.8"]  # fmt: skip
    flags += ["--eft-top-k=4"] if method in ("eft", "ivg") else []
    found = parse(["search", f"--method={method}", *files, *flags]).search_config()
    assert found == made(
        max_new_tokens=40, slots=6, seed=9, stop=("END",), sampling=Sampling(0.9, 11, 0.8)
    )


def test_the_same_command_gives_the_same_file_and_another_seed_another(models, prompts, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        out = tmp_path / f"{name}.jsonl"
        assert search(models, prompts, out, "--method", "eft", "--seed", seed) == 0
    first, second, third = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "abc")
    assert first == second != third


def test_a_stop_string_ends_a_response_and_is_not_part_of_it(models, prompts, tmp_path):
    policy = models[:2]
    assert search(policy, prompts, tmp_path / "free.jsonl", "--method", "sample") == 0
    letters = {letter for row in read_jsonl(tmp_path / "free.jsonl") for letter in row["response"]}
    stop = sorted(letters & set("abcdefghijklmnopqrstuvwxyz "))[0]
    out = tmp_path / "stopped.jsonl"
    assert search(policy, prompts, out, "--method", "sample", "--stop", stop) == 0
    free, stopped = read_jsonl(tmp_path / "free.jsonl"), read_jsonl(out)
    assert [row["response"].split(stop)[0] for row in free] == [row["response"] for row in stopped]


def test_a_value_that_no_chat_template_reads_is_told(models, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0].content }}{% if not enable_thinking %}quick{% endif %}")
    args = {"enable_thinking": False, "enable_thinkin": False}
    planned = plan(Sources(models[1], policy_template=str(path), template_args=args))
    assert planned.notes() == [
        "no chat template here reads 'enable_thinkin', which is given to all of them"
    ]


def test_rows_that_a_model_fails_are_told_and_the_others_kept(models, prompts, tmp_path, capsys):
    """An embedding that is NaN, of a token that some prompts hold and others do not."""
    folder = Path(models[1])
    tokenizer = load_tokenizer(folder)
    film, we = (set(tokenizer(text).input_ids) for text in ("A film", "WeWe"))
    model = load_model(folder)
    embedding = model.params["embed"]["embedding"].at[min(film - we)].set(float("nan"))
    broken = type(model)(model.config, {**model.params, "embed": {"embedding": embedding}})
    save_model(broken, tmp_path / "broken", tokenizer=tokenizer)
    others, out = ["--policy", str(tmp_path / "broken"), *models[2:]], tmp_path / "out.jsonl"
    assert search(models, prompts, tmp_path / "sound.jsonl") == 0
    told = one_error(capsys, search(others, prompts, out)).strip()
    assert f": logits of the policy {tmp_path / 'broken'} are NaN or infinite" in told
    assert told.endswith(f"kept in {out}.journal")
    named = re.match(rf"error: {prompts} line ((?:\d+, )*\d+):", told)[1]
    failed = {int(number) - 1 for number in named.split(", ")}
    assert failed >= {1, 3, 5}
    kept = {line["row_id"]: line["row"] for line in read_jsonl(f"{out}.journal")[1:]}
    assert set(kept) == set(range(len(PROMPTS))) - failed
    assert set(kept)
    assert not out.exists()
    sound = read_jsonl(tmp_path / "sound.jsonl")
    assert all(row["response"] == sound[index]["response"] for index, row in kept.items())
    write_jsonl(prompts, [PROMPTS[index] for index in sorted(failed)])
    none = one_error(capsys, search(others, prompts, tmp_path / "none.jsonl"))
    assert "are NaN or infinite" in none
    assert "kept" not in none
    assert not list(tmp_path.glob("none.jsonl*"))


def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(
    models, prompts, tmp_path, monkeypatch
):
    """From what is on the disk where a kill strikes after three rows and half of another."""
    left, written = [], []
    append = Journal.append

    def watched(self, row_id, row):
        append(self, row_id, row)
        left.append(self.path.read_bytes())
        written.append(row_id)

    monkeypatch.setattr(Journal, "append", watched)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert search(models, prompts, whole) == 0
    done = written[:3]
    journal = journal_path(killed)
    journal.write_bytes(left[2] + b'{"row_id": 6, "row": {"prom')
    written.clear()
    assert search(models, prompts, killed) == 0
    assert sorted(written + done) == list(range(len(PROMPTS)))
    assert killed.read_bytes() == whole.read_bytes()
    assert not journal.exists()


def test_other_settings_do_not_take_up_a_journal_but_another_batch_size_does(
    models, prompts, tmp_path, capsys
):
    out = tmp_path / "out.jsonl"
    flags = ["--prompts", str(prompts), "--output", str(out), *SMALL]
    fingerprint = fingerprint_of(parse(["search", *models, *flags]), PROMPTS)
    journal = open_journal(journal_path(out), fingerprint)
    rows = [row | {"response": f"found {index}"} for index, row in enumerate(PROMPTS)]
    for row_id, row in enumerate(rows):
        journal.append(row_id, row)
    assert search(models, prompts, out, "--seed", "3") == 2
    assert "seed: 0 there, 3 here" in capsys.readouterr().err
    assert journal.path.exists()
    assert search(models, prompts, out, "--batch-size", "5") == 0
    assert read_jsonl(out) == rows


MESHES = """
import contextlib, io
from w2s_jax.cli.main import main
for flags, status, expected in (
    (["--mesh=fsdp=8"], 2, "policy: embed/embedding: vocab of size 300 is not divisible by mesh"),
    (["--mesh=data=8", "--batch-size=3"], 2, "3 is not divisible by 8 parts of the mesh; try 8\\n"),
    (["--method=sample"], 0, "one of the 8 devices here is used; --mesh data=-1, say, uses all"),
):
    with contextlib.redirect_stderr(io.StringIO()) as told:
        assert main([*{!r}, *flags]) == status, told.getvalue()
    assert expected in told.getvalue(), told.getvalue()
"""


@pytest.mark.slow
def test_eight_devices_are_asked_for_and_a_mesh_that_fails_names_the_model(
    models, prompts, tmp_path, run_python
):
    files = ["--prompts", str(prompts), "--output", str(tmp_path / "out.jsonl")]
    run_python(MESHES.format(["search", *models, *files, *SMALL, "--batch-size=8"]), devices=8)


@pytest.mark.slow
def test_a_mesh_splits_the_slots_and_changes_no_response(models, prompts, tmp_path, run_python):
    single = tmp_path / "single.jsonl"
    assert search(models, prompts, single) == 0
    wanted = [row["response"] for row in read_jsonl(single)]
    code = "from w2s_jax.cli.main import main; print('status', main({!r}))"
    for mesh, status, told in (
        ("data=2", 0, "the guide scores tokens on the device"),
        ("tensor=2", 0, "policy: every device holds all 1 key/value heads"),
        ("data=3", 2, ""),
    ):
        split = tmp_path / f"{mesh}.jsonl"
        files = ["--prompts", str(prompts), "--output", str(split), "--mesh", mesh]
        flags = ["search", *models, *files, *SMALL, "--batch-size", "2"]
        out = run_python(code.format(flags), devices=2)
        assert f"status {status}" in out, out
        assert told in out
        if status == 0:
            assert [row["response"] for row in read_jsonl(split)] == wanted, mesh


def replaced(models, role, folder):
    """The same flags with another checkpoint in one role."""
    place = models.index(f"--{role}") + 1
    return [*models[:place], str(folder), *models[place + 1 :]]


def one_error(capsys, status):
    err = re.sub(r"^\d+ of \d+ prompts.*\n", "", capsys.readouterr().err, flags=re.MULTILINE)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--w", "0"], "--w is 0; it must be at least 1"),
        (["--k", "0"], "--k is 0; it must be at least 1"),
        (["--l", "-1"], "--l is -1; it must be at least 1"),
        (["--n", "0"], "--n is 0; it must be at least 1"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--temperature", "-0.5"], "temperature is -0.5"),
        (["--top-k", "-1"], "top_k is -1"),
        (["--top-p", "0"], "top_p is 0"),
        (["--stop", ""], "a stop string is empty"),
        (["--mesh", "data=3"], "multiply to 3, which must equal the"),
        (["--mesh", "model=1"], "axis 'model' is not one of data, fsdp, tensor"),
        (["--mesh="], "--mesh is empty; give sizes such as data=2,tensor=4"),
        (["--max-new-tokens", "90"], "line 5: a prompt of"),
    ],
)
def test_values_out_of_range(models, prompts, tmp_path, capsys, flags, message):
    status = search(models, prompts, tmp_path / "out.jsonl", *flags)
    assert message in one_error(capsys, status)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": \n', "line 3: not JSON"),
        ('{"prompt": "a"}\n"b"\n', "line 2: not a JSON object"),
        ('{"prompt": "a"}\n{"text": "b"}\n', 'line 2: no "prompt"'),
        ('{"prompt": "a"}\n{"prompt": ["b"]}\n', 'line 2: "prompt"[0] is str'),
        (json.dumps({"prompt": "long " * 90}), "line 1: a prompt of"),
    ],
)
def test_wrong_prompt_files(models, tmp_path, capsys, content, message):
    path = tmp_path / "in.jsonl"
    path.write_text(content)
    error = one_error(capsys, search(models, path, tmp_path / "out.jsonl"))
    assert message in error
    assert str(path) in error


def test_a_missing_prompt_file(models, tmp_path, capsys):
    status = search(models, tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    assert "none.jsonl: cannot be read" in one_error(capsys, status)


def test_unwritable_outputs(models, prompts, tmp_path, capsys):
    for output in (tmp_path, prompts / "out.jsonl", "/dev/null"):
        assert "cannot be written" in one_error(capsys, search(models, prompts, output))
    assert "is the file of prompts" in one_error(capsys, search(models, prompts, prompts))
    assert read_jsonl(prompts) == PROMPTS


def test_checkpoints_that_are_not_there(models, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    for role in ("policy", "tuned", "untuned"):
        missing = replaced(models, role, tmp_path / "nowhere")
        assert "nowhere" in one_error(capsys, search(missing, prompts, out))
    status = search(models[:4], prompts, out)
    assert "1 --tuned and 0 --untuned" in one_error(capsys, status)
    status = search(models[:2], prompts, out)
    assert "--method cbs needs --tuned and --untuned" in one_error(capsys, status)
    status = search(models[2:], prompts, out)
    assert "either --policy or --endpoint" in one_error(capsys, status)


def test_a_checkpoint_without_safetensors(models, prompts, tmp_path, capsys):
    folder = Path(tiny(tmp_path / "empty", 0))
    (folder / "model.safetensors").unlink()
    error = one_error(capsys, search(replaced(models, "tuned", folder), prompts, tmp_path / "out"))
    assert "safetensors" in error
    assert str(folder) in error


def test_an_unknown_architecture(models, prompts, tmp_path, capsys):
    folder = Path(tiny(tmp_path / "odd", 0))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    error = one_error(capsys, search(replaced(models, "policy", folder), prompts, tmp_path / "out"))
    assert "mamba" in error.lower()


@pytest.mark.parametrize("flags", [("--method", "eft"), ("--score-on", "tokens")])
def test_vocabularies_that_differ(models, prompts, tmp_path, capsys, flags):
    folder = tiny(tmp_path / "other", 0, text="quite another text")
    error = one_error(
        capsys, search(replaced(models, "untuned", folder), prompts, tmp_path / "out", *flags)
    )
    assert " ".join(flags) in error
    assert "--policy" in error
    assert "--untuned" in error
    assert "different vocabularies" in error


def test_a_prompt_too_long_for_a_guide_alone(models, prompts, tmp_path, capsys):
    folder = tiny(tmp_path / "short", 0, max_positions=12)
    error = one_error(capsys, search(replaced(models, "tuned", folder), prompts, tmp_path / "out"))
    assert "12 positions of the tuned model" in error
