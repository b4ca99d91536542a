import dataclasses
import json
import lzma
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from w2s_jax.errors import InputError
from w2s_jax.experiments import build
from w2s_jax.experiments.build import (
    Recipe,
    check_done,
    differences,
    main,
    read_recipe,
    stage_settings,
)
from w2s_jax.experiments.demo_models import (
    build_corpus,
    clean,
    opening_words,
    preference,
    read_reviews,
    write_training_pairs,
)
from w2s_jax.text.rows import read_jsonl, write_jsonl
from w2s_jax.text.tokenizer import END_ID
from w2s_jax.text.typed_yaml import from_mapping

TINY_SFT = {"max_steps": 3, "batch_size": 2, "max_length": 16, "truncation": "split"}
TINY_LANGUAGE = {
    "width": 16, "layers": 1, "heads": 2, "mlp_width": 16, "max_positions": 64, "sft": TINY_SFT
}  # fmt: skip
TINY_DPO = {
    "batch_size": 4, "max_length": 32, "held_out": 4, "append_eos": False, "equal_pairs": "drop"
}  # fmt: skip
TINY = {
    "vocab_size": 300,
    "gold": {
        "width": 16, "layers": 1, "heads": 2, "mlp_width": 16, "widths": [8], "rows": 4, "steps": 2,
        "held_out": 4,
    },
    "policy": TINY_LANGUAGE,
    "untuned": TINY_LANGUAGE | {"sft": TINY_SFT | {"optimizer": "muon"}},
    "preferences": {"pairs": 12, "new_tokens": 4, "slots": 4, "block": 6},
    "tuned": {"dpo": TINY_DPO},
    "other_guides": [
        {
            "name": "other",
            "vocab_size": 280,
            "reviews": 15,
            "untuned": TINY_LANGUAGE
            | {"architecture": "mistral", "kv_heads": 1, "sliding_window": 8},
            "tuned": {"dpo": TINY_DPO},
        }
    ],
}  # fmt: skip

EXPERIMENT = {
    "other_guides": [],
    "export": False,
    "direct": {"dpo": TINY_DPO},
    "evaluation": {
        "prompts": 3, "new_tokens": 4, "beam_width": 2, "successors": 2, "chunk_length": 2,
        "samples": 3, "slots": 2, "block": 2,
    },
}  # fmt: skip


def reviews(name):
    rng = np.random.default_rng(len(name))
    words = ["a", "good", "bad", "film", "<br /><br />", "the", "plot", "so-so", name]
    for i in range(20):
        text = f"{i} " + " ".join(rng.choice(words, 12))
        yield {"text": text} | ({} if name == "unsup" else {"label": i % 2})


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data" / "imdb"
    folder.mkdir(parents=True)
    for name in ("train", "unsup", "test"):
        with lzma.open(folder / f"{name}.jsonl.xz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in reviews(name))
    return folder.parent


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.mark.slow
def test_the_recipe_builds_every_model_and_a_second_run_does_nothing(data, recipe, tmp_path):
    work, assets = tmp_path / "work", tmp_path / "assets"
    arguments = [f"--config={recipe}", f"--work={work}", f"--data={data}", f"--assets={assets}"]
    main(arguments)
    card = json.loads((assets / "card.json").read_text())
    others = {"other/corpus", "other/untuned", "other/tuned"}
    own = {"corpus", "gold", "policy", "untuned", "preferences", "tuned"}
    assert set(card["stages"]) == own | others
    assert not any("config" in stage for stage in card["stages"].values())
    models = ("gold", "policy", "untuned", "tuned", "other-untuned", "other-tuned")
    assert {*models, "bytes"} == set(card["exported"])
    for name in models:
        held = {path.name for path in (assets / name).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= held
    config = json.loads((assets / "other-tuned" / "config.json").read_text())
    assert config["model_type"] == "mistral"
    assert (config["vocab_size"], config["sliding_window"]) == (280, 8)
    assert card["stages"]["other/corpus"]["language"]["reviews"] == 15
    rows = [json.loads(line) for line in (work / "preferences" / "pairs.jsonl").open()]
    assert len(rows) == 12
    assert all({"prompt", "chosen", "rejected", "rewards"} <= row.keys() for row in rows)

    before = times(work)
    main(arguments)
    assert times(work) == before

    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(yaml.safe_dump({"extends": recipe.name} | EXPERIMENT))
    main([f"--config={experiment}", *arguments[1:]])
    shared = {path: time for path, time in times(work).items() if path in before}
    assert shared == before
    folder = work / "evaluation"
    methods = ("base", "bon", "eft", "cbs", "tuned_policy")
    found = json.loads((folder / "results.json").read_text())
    assert tuple(found["methods"]) == methods
    for name in methods:
        rows = read_jsonl(folder / "responses" / f"{name}.jsonl")
        assert len(rows) == found["prompts"] == 3
        mean = np.mean([row["gold_reward"] for row in rows])
        assert found["methods"][name]["gold_reward"]["mean"] == pytest.approx(mean)
    assert len((folder / "table.md").read_text().splitlines()) == 2 + len(methods)
    assert (folder / "figure.png").read_bytes()[1:4] == b"PNG"
    assert sorted(path.name for path in (folder / "responses").iterdir()) == sorted(
        f"{name}.jsonl" for name in methods
    )
    weights = {
        name: (work / name / "model/model.safetensors").read_bytes()
        for name in ("policy", "tuned_policy")
    }
    assert weights["policy"] != weights["tuned_policy"]
    before = times(work)
    main([f"--config={experiment}", *arguments[1:]])
    assert times(work) == before


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def done_by(recipe, work, *stages):
    """The records of stages as if `recipe` had made them."""
    settings = stage_settings(from_mapping(Recipe, recipe, "recipe"))
    for stage in stages:
        (work / stage).mkdir(parents=True)
        (work / stage / "done.json").write_text(json.dumps({"config": settings[stage]}))


def test_stages_done_by_another_recipe_are_refused(data, recipe, tmp_path, capsys):
    work = tmp_path / "work"
    made = ("corpus", "gold", "policy", "untuned", "preferences", "tuned", "other/tuned")
    done_by(TINY, work, *made)
    other = TINY | {"untuned": TINY_LANGUAGE | {"sft": TINY_SFT | {"max_steps": 4}}}
    recipe.write_text(yaml.safe_dump(other))
    with pytest.raises(SystemExit) as end:
        main([f"--config={recipe}", f"--work={work}", f"--data={data}"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    folders = " ".join(
        str(work / name) for name in ("untuned", "preferences", "tuned", "other/tuned")
    )
    assert error == (
        "error: stages were done by another recipe (untuned.sft.max_steps is 4, was 3; "
        f"untuned.sft.optimizer is None, was 'muon'); to redo, delete {folders}\n"
    )


def test_a_stage_alone_is_named_and_those_without_a_record_are_taken(tmp_path):
    settings = stage_settings(from_mapping(Recipe, TINY, "recipe"))
    done_by(TINY, tmp_path, "tuned")
    for stage in ("corpus", "untuned"):
        (tmp_path / stage).mkdir()
    (tmp_path / "corpus" / "done.json").write_text('{"seconds": 3.0}')
    check_done(tmp_path, settings)
    changed = TINY | {"tuned": {"dpo": TINY_DPO | {"beta": 0.2}}}
    with pytest.raises(InputError) as error:
        check_done(tmp_path, stage_settings(from_mapping(Recipe, changed, "recipe")))
    expected = "stage tuned was done by another recipe (tuned.dpo.beta is 0.2, was None); to redo, "
    assert str(error.value) == f"{expected}delete {tmp_path / 'tuned'}"


def test_a_stage_depends_on_what_it_reads_and_on_nothing_else():
    def changed(change):
        before = stage_settings(
            from_mapping(Recipe, TINY | EXPERIMENT | {"other_guides": TINY["other_guides"]}, "a")
        )
        after = stage_settings(
            from_mapping(
                Recipe, TINY | EXPERIMENT | {"other_guides": TINY["other_guides"]} | change, "b"
            )
        )
        return {stage for stage in before if before[stage] != after[stage]}

    evaluated = {"evaluation"}
    assert changed({"evaluation": {"prompts": 7}}) == evaluated
    assert changed({"direct": {"dpo": {}}}) == evaluated | {"tuned_policy"}
    assert changed({"tuned": {"dpo": {}}}) == evaluated | {"tuned", "export"}
    pairs = {"preferences", "tuned", "tuned_policy", "evaluation", "export"}
    assert changed({"preferences": {}}) == pairs | {"other/tuned", "other/export"}
    assert changed({"policy": TINY_LANGUAGE | {"layers": 2}}) == {
        "policy",
        "tuned_policy",
        "evaluation",
        "export",
    }
    assert changed({"export": False}) == set()
    assert "gold" in changed({"vocab_size": 301})
    guide = TINY["other_guides"][0]
    assert changed({"other_guides": [guide | {"reviews": 14}]}) == {
        f"other/{name}" for name in ("corpus", "untuned", "tuned", "export")
    }


def test_differences_are_named_by_their_place():
    found = {"a": {"b": 1, "c": [1]}, "gone": True}
    wanted = {"a": {"b": 2, "c": [1]}, "new": "x"}
    assert differences(found, wanted) == [
        "a.b is 2, was 1",
        "new is 'x', was None",
        "gone is None, was True",
    ]
    assert differences(found, found) == []


def test_stages_of_the_experiment_are_there_where_the_recipe_names_them(tmp_path):
    def stages(change):
        recipe = from_mapping(Recipe, TINY | change, "recipe")
        return tuple(build.Build(recipe, tmp_path, tmp_path, tmp_path).stages())

    plain = ("corpus", "gold", "policy", "untuned", "preferences", "tuned")
    guide = ("other/corpus", "other/untuned", "other/tuned")
    assert stages({}) == (*plain, "export", *guide, "other/export")
    assert stages({"export": False}) == (*plain, *guide)
    assert stages(EXPERIMENT) == (*plain, "tuned_policy", "evaluation")
    assert stages({"evaluation": {}, "other_guides": []}) == (*plain, "evaluation", "export")


def test_a_recipe_extends_another_from_its_folder(recipe, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"extends": recipe.name, "vocab_size": 310} | EXPERIMENT))
    found, base = read_recipe(other), read_recipe(recipe)
    assert (found.vocab_size, found.other_guides, found.export) == (310, (), False)
    assert (found.policy, found.tuned) == (base.policy, base.tuned)
    third = tmp_path / "third.yaml"
    third.write_text("extends: other.yaml\nvocab_size: 320\n")
    assert read_recipe(third) == dataclasses.replace(found, vocab_size=320)
    other.write_text("extends: third.yaml\n")
    with pytest.raises(InputError, match=r"third.yaml: extends itself, through .*other.yaml$"):
        read_recipe(third)
    other.write_text("extends: none.yaml\n")
    with pytest.raises(InputError, match=r"none.yaml: cannot be read"):
        read_recipe(other)


def test_a_missing_matplotlib_is_told_before_anything_is_trained(
    data, recipe, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    recipe.write_text(yaml.safe_dump(TINY | EXPERIMENT))
    with pytest.raises(SystemExit):
        main([f"--config={recipe}", f"--work={tmp_path / 'work'}", f"--data={data}"])
    assert "pip install 'w2s-jax[plot]'" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_training_pairs_end_where_the_samples_did(tmp_path):
    rows = [
        {"prompt": "a", "chosen": " film", "rejected": " sea", "tokens": [[9], [8, END_ID], [7]]},
        {"prompt": "left out", "chosen": "", "rejected": " x", "tokens": [[9], [], [7]]},
    ]
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, rows)
    assert write_training_pairs(path, "<end>", tmp_path / "training.jsonl") == 1
    expected = [{"prompt": "a", "chosen": " film<end>", "rejected": " sea"}]
    assert read_jsonl(tmp_path / "training.jsonl") == expected


def test_a_part_of_the_reviews_is_the_same_each_time(data, tmp_path):
    counts = [
        build_corpus(
            data / "imdb", tmp_path / name, 280, max_length=64, reviews=7, sets=("language",)
        )
        for name in ("one", "two")
    ]
    assert counts[0] == counts[1]
    assert set(counts[0]) == {"language"}
    assert counts[0]["language"]["reviews"] == 7
    one, two = (
        read_jsonl(tmp_path / name / "corpus" / "language.jsonl") for name in ("one", "two")
    )
    assert one == two


def test_a_stage_that_is_not_there_is_told_with_those_that_are(data, recipe, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([f"--config={recipe}", f"--work={tmp_path}", f"--data={data}", "--only=other/gold"])
    assert end.value.code == 2
    assert "error: no stage 'other/gold'; there are corpus, gold, " in capsys.readouterr().err


def test_line_breaks_and_blanks_are_cleaned():
    assert clean("One. <br /><br />Two<br>three  \t four ") == "One.\nTwo\nthree four"


def test_duplicates_are_read_once(tmp_path):
    path = tmp_path / "reviews.jsonl"
    rows = [{"text": "a<br />b", "label": 1}, {"text": "a\nb"}, {"text": "c"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_reviews(path).items()) == [("a\nb", 1), ("c", -1)]


def test_a_prompt_is_the_first_words_as_written():
    assert opening_words("This film, well\nit is", 3) == "This film, well\nit"
    assert opening_words("Short", 5) == "Short"


def test_preferences_follow_bradley_terry():
    rng = np.random.default_rng(0)
    gap = np.array([0.3, -0.7], np.float32)
    first = np.mean([preference(gap, rng)[0] == 0 for _ in range(4000)])
    assert first == pytest.approx(1 / (1 + np.exp(-1.0)), abs=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"police": {}}, "unknown field 'police'"),
        ({"policy": {"width": 8}}, "policy: field 'layers' is missing"),
        ({"vocab_size": "many"}, "vocab_size: 'many' is no int"),
        (
            {"gold": TINY["gold"] | {"optimizer": {"optimizer": "adam"}}},
            "optimizer: optimizer: 'adam' is none of adamw, ",
        ),
        (
            {"gold": TINY["gold"] | {"optimizer": {"warmup": -1}}},
            "warmup -1.0 must be",
        ),
        ({"gold": 3}, "gold: expected fields of GoldConfig"),
        ({"other_guides": [{"name": "x"}]}, "other_guides: field 'vocab_size' is missing"),
        ({"policy": TINY_LANGUAGE | {"architecture": "rnn"}}, "'rnn' is none of llama, mistral"),
    ],
)
def test_a_wrong_recipe_is_told_with_its_place(tmp_path, change, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(TINY | change))
    with pytest.raises(InputError, match=message) as error:
        read_recipe(path)
    assert str(error.value).startswith(str(path))


def test_missing_reviews_are_told_and_end_with_status_two(recipe, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([f"--config={recipe}", f"--work={tmp_path / 'work'}", f"--data={tmp_path / 'none'}"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "train.jsonl.xz" in error


def test_the_shipped_recipes_are_readable_and_share_their_stages():
    folder = Path(__file__).parents[2] / "configs" / "demo"
    demo, experiment = (read_recipe(folder / f"{name}.yaml") for name in ("recipe", "sentiment"))
    assert demo.direct is demo.evaluation is None
    assert experiment.direct is not None
    assert experiment.evaluation is not None
    assert not experiment.export
    ours, theirs = stage_settings(experiment), stage_settings(demo)
    for stage in ("corpus", "gold", "policy", "untuned", "preferences", "tuned"):
        assert ours[stage] == theirs[stage]
