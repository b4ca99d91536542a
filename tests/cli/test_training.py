"""`w2s sft` and `w2s dpo` as a user runs them; their numbers are compared with TRL elsewhere."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.cli.test_search import tiny
from w2s_jax.cli.main import main
from w2s_jax.cli.train import print_run
from w2s_jax.errors import InputError
from w2s_jax.models.load import load_adapted, load_model
from w2s_jax.models.model import Model
from w2s_jax.models.save import save_model
from w2s_jax.text.rows import read_jsonl, write_jsonl
from w2s_jax.text.tokenizer import load_tokenizer
from w2s_jax.text.training_data import DataConfig, load
from w2s_jax.train.logprobs import reference_logprobs
from w2s_jax.train.loop import read_metrics

PAIRS = [
    {
        "prompt": f"film {i} was",
        "chosen": " so good" * (1 + i % 3),
        "rejected": " bad" * (1 + i % 2),
    }
    for i in range(24)
]
SMALL = ["--batch-size=4", "--log-every=1", "--learning-rate=1e-2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A base as checkpoints are published: in bfloat16, which holds no small changes."""
    folder = tiny(tmp_path_factory.mktemp("models") / "model", 0)
    save_model(load_model(folder, dtype="bfloat16"), folder)
    return folder


@pytest.fixture
def pairs(tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    return tmp_path / "pairs.jsonl"


@pytest.fixture
def few(tmp_path):
    """Held-out pairs."""
    write_jsonl(tmp_path / "few.jsonl", PAIRS[:4])
    return tmp_path / "few.jsonl"


def run(command, model, data, output, *flags):
    files = [f"--model={model}", f"--data={data}", f"--output={output}"]
    return main([command, *files, *SMALL, *flags])


def margins(folder, base, file, rows=4):
    """The mean implicit-reward margin of the pairs of a file, from what the folders hold."""
    config = DataConfig(data=(str(file),), max_length=96)
    pairs = load("pairs", config, load_tokenizer(base))
    models = load_model(folder), load_model(base, dtype="float32")
    found, before = (reference_logprobs(model, pairs, rows=rows) for model in models)
    chosen, rejected = (0.1 * (found - before)).mean(0)
    return chosen - rejected


def without_times(folder):
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(folder)]


def test_three_commands_from_a_preference_file_to_a_steered_policy(
    model, pairs, few, tmp_path, capsys, monkeypatch
):
    assert run("sft", model, pairs, tmp_path / "untuned", "--save-dtype=bfloat16") == 0
    untuned = tmp_path / "untuned" / "model"
    assert load_model(untuned, dtype="stored").dtype == "bfloat16"
    assert "--save-dtype bfloat16 loses " in capsys.readouterr().out
    # So small a change that bfloat16 would lose most of it.
    flags = ("--max-steps=10", "--learning-rate=1e-5", "--eval-every=5", "--save-every=5")
    held_out = f"--eval-data={few}"
    assert run("dpo", untuned, pairs, tmp_path / "tuned", held_out, *flags) == 0
    tuned = tmp_path / "tuned" / "model"
    told = capsys.readouterr().out
    assert f"step 10 written to {tuned}" in told
    assert "rewards/accuracies" in told
    assert "held out" in told
    rows = read_metrics(tmp_path / "tuned")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    half, evaluation = (row for row in rows if "eval/loss" in row)
    assert evaluation["eval/rewards/accuracies"] == 1.0
    assert {"eval/loss", "eval/rewards/margins", "eval/logps/chosen"} <= evaluation.keys()
    assert margins(tuned, untuned, few) == pytest.approx(
        evaluation["eval/rewards/margins"], abs=1e-6
    )
    assert main(["convert", str(tmp_path / "tuned"), str(tmp_path / "half"), "--step=5"]) == 0
    assert "step 5 of " in capsys.readouterr().out
    found = margins(tmp_path / "half", untuned, few)
    assert found == pytest.approx(half["eval/rewards/margins"], abs=1e-6)
    assert evaluation["eval/rewards/margins"] > half["eval/rewards/margins"] + 1e-4
    assert main(["convert", str(tmp_path / "tuned"), str(tmp_path / "none"), "--step=4"]) == 2
    assert "step 4: there is no such step; there are [5, 10]" in capsys.readouterr().err
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "film 7 was"}])
    steered = ["search", f"--policy={model}", f"--tuned={tuned}", f"--untuned={untuned}"]
    files = [f"--prompts={tmp_path / 'prompts.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    searched = []

    def watched(models, config, requests, **options):
        searched.append(models.members)
        raise InputError("enough")

    # That searches are steered by such models is tested elsewhere: here, that these are taken.
    monkeypatch.setattr("w2s_jax.search.file.search_all", watched)
    assert main([*steered, *files]) == 2
    assert "enough" in capsys.readouterr().err
    for found, folder in zip(searched[0], (model, tuned, untuned), strict=True):
        wanted = load_model(folder, dtype="float32", decoding=True).params
        jax.tree.map(np.testing.assert_array_equal, found.params, wanted)


ADAPTERS = ("--lora-rank=2", "--lora-dropout=0.1", "--rslora", "--lora-targets=q_proj",
            "--lora-targets=down_proj")  # fmt: skip


@pytest.fixture(scope="module")
def adapted(model, tmp_path_factory):
    """The folder of a run that trained adapters on `pairs`, and evaluated them on `few`."""
    folder = tmp_path_factory.mktemp("adapted")
    pairs, few = folder / "pairs.jsonl", folder / "few.jsonl"
    write_jsonl(pairs, PAIRS)
    write_jsonl(few, PAIRS[:4])
    assert run("dpo", model, pairs, folder / "run", *ADAPTERS, f"--eval-data={few}") == 0
    return folder / "run"


def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(
    model, adapted, pairs, few, tmp_path, capsys, caplog
):
    folder = shutil.copytree(adapted, tmp_path / "run")

    def again(*flags):
        return run("dpo", model, pairs, folder, *ADAPTERS, f"--eval-data={few}", *flags)

    kept = sorted((folder / "cache").glob("reference-*.npy"))
    assert len(kept) == 2
    before, stamps = (folder / "metrics.jsonl").read_bytes(), [x.stat().st_mtime_ns for x in kept]
    assert again() == 0
    assert (folder / "metrics.jsonl").read_bytes() == before
    # Nor are its reference log-probs computed again.
    assert [path.stat().st_mtime_ns for path in kept] == stamps
    capsys.readouterr()
    assert again("--beta=0.2") == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert "beta" in error
    assert again("--epochs=0.5") == 2
    assert "step 6 is saved, beyond the 3 steps" in capsys.readouterr().err
    # More micro-batches and more steps are a run that goes on, though not to the bit.
    caplog.clear()
    assert again("--accumulate=2", "--epochs=1.1") == 0
    assert "accumulate: 1 until step 6, 2 from there on; not to the bit" in caplog.text
    assert "steps: 6 until step 6, 7 from there on; learning rates follow the" in caplog.text
    steps = [row["step"] for row in read_metrics(folder) if "loss" in row]
    assert steps == [*range(1, 8)]
    write_jsonl(few, PAIRS[:3])
    assert again() == 2
    assert "eval_data: few.jsonl changed" in capsys.readouterr().err
    write_jsonl(few, PAIRS[:4])
    write_jsonl(pairs, PAIRS[:20])
    assert again() == 2
    assert "data: pairs.jsonl changed" in capsys.readouterr().err


def test_adapters_are_trained_beside_their_base_and_loaded_with_it(
    model, adapted, few, tmp_path, capsys
):
    adapter = adapted / "model"
    held = {path.name for path in adapter.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= held
    assert "model.safetensors" not in held
    base, beside = load_model(model), load_adapted(adapter)
    tokens = np.arange(10)[None]
    assert np.abs(beside(tokens) - base(tokens)).max() > 1e-3
    *rows, held_out = read_metrics(adapted)
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert rows[-1]["loss"] < rows[0]["loss"]
    sources = {"from-adapter": adapter, "from-run": adapted}
    for target, source in sources.items():
        assert main(["convert", str(source), str(tmp_path / target)]) == 0
    for folder in (adapter, *(tmp_path / target for target in sources)):
        found = margins(folder, model, few)
        assert found == pytest.approx(held_out["eval/rewards/margins"], abs=1e-5)
    capsys.readouterr()
    assert main(["convert", str(adapter), str(tmp_path / "half"), "--dtype=bfloat16"]) == 0
    assert "--dtype bfloat16 loses " in capsys.readouterr().out
    assert load_model(tmp_path / "half", dtype="stored").dtype == "bfloat16"


def test_an_adapter_is_trained_further_beside_its_base(model, adapted, pairs, tmp_path, capsys):
    first = adapted / "model"
    flags = ("--continue-adapter", "--max-steps=2", "--reference-logprobs=live")
    assert run("dpo", first, pairs, tmp_path / "run", *flags) == 0
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    # The reference is the adapter as it was, not its base.
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert losses[1] < losses[0]
    adapter = tmp_path / "run" / "model"
    one, other = (json.loads((x / "adapter_config.json").read_text()) for x in (first, adapter))
    assert one["use_rslora"] is True
    assert set(one["target_modules"]) == {"q_proj", "down_proj"}
    assert other == one | {"lora_dropout": 0.0}
    tokens = np.arange(10)[None]
    before, after = (load_adapted(folder)(tokens) for folder in (first, adapter))
    assert np.abs(after - before).max() > 1e-3
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    np.testing.assert_allclose(load_model(tmp_path / "merged")(tokens), after, atol=1e-5)
    capsys.readouterr()
    for wrong, told in (
        (("sft", model, pairs, tmp_path / "x", "--continue-adapter"), "is no adapter"),
        (("sft", first, pairs, tmp_path / "x", *flags[:1], "--lora-rank=2"), "leave out --lora-ra"),
        (("sft", first, pairs, tmp_path / "x", *flags[:1], "--from-scratch"), "--from-scratch"),
    ):
        assert run(*wrong) == 2
        assert told in capsys.readouterr().err


def test_an_adapter_is_trained_further_whole_and_never_adapted_again(
    adapted, pairs, tmp_path, capsys
):
    adapter = adapted / "model"
    assert run("sft", adapter, pairs, tmp_path / "whole") == 0
    assert load_model(tmp_path / "whole" / "model").dtype == np.float32
    capsys.readouterr()
    status = run("sft", adapter, pairs, tmp_path / "again", "--lora-rank=2")
    assert f"w2s convert {adapter} TARGET" in one_error(capsys, status)


def test_training_from_random_weights_with_the_best_step_kept(model, tmp_path, capsys):
    write_jsonl(tmp_path / "texts.jsonl", [{"text": "a film of the sea " * 9}] * 12)
    start = tmp_path / "start"
    shutil.copytree(model, start)
    (start / "model.safetensors").unlink()
    flags = ["--from-scratch", "--max-length=16", "--truncation=split", "--held-out=8",
             "--eval-every=3", "--keep-best=-eval/loss", "--max-steps=6", "--optimizer=muon",
             "--sample-every=3", "--sample-prompts=2", "--packing=best-fit"]  # fmt: skip
    assert run("sft", start, tmp_path / "texts.jsonl", tmp_path / "run", *flags) == 0
    losses = [row["eval/loss"] for row in read_metrics(tmp_path / "run") if "eval/loss" in row]
    assert losses[-1] < losses[0] < np.log(300) + 1
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert {"step", "prompt", "response"} <= samples[0].keys()
    assert len({row["step"] for row in samples}) * 2 == len(samples)
    assert load_model(tmp_path / "run" / "model").dtype == np.float32


def test_wspo_reads_a_guide(model, pairs, tmp_path):
    guide = [f"--tuned={model}", f"--untuned={model}"]
    assert run("dpo", model, pairs, tmp_path / "run", "--loss-type=wspo", *guide) == 0
    assert all(np.isfinite(row["loss"]) for row in read_metrics(tmp_path / "run"))


def test_kto_of_few_desirable_rows_leaves_a_model_and_json(model, few, tmp_path, capsys):
    """And a run may be configured by a file."""
    rows = [
        {"prompt": row["prompt"], "completion": row["rejected"], "label": i % 12 == 0}
        for i, row in enumerate(PAIRS)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_jsonl(few, [row for row in rows if not row["label"]][:4])
    config = {"model": str(model), "data": [str(tmp_path / "rows.jsonl")], "loss_type": ["kto"],
              "output": str(tmp_path / "run"), "batch_size": 8, "log_every": 1,
              "eval_data": [str(few)], "keep_best": "eval/rewards/margins"}  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert main(["dpo", f"--config={tmp_path / 'run.yaml'}"]) == 0
    assert "no evaluation gave a number for eval/rewards/margins" in capsys.readouterr().err
    assert load_model(tmp_path / "run" / "model").dtype == "float32"
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    *steps, held_out = read_metrics(tmp_path / "run")
    assert [row["step"] for row in steps] == [1, 2, 3]
    # The reference is the model as it was: every reward is zero at first.
    assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert all(np.isfinite(row["loss"]) for row in steps)
    assert held_out["eval/rewards/margins"] is None
    assert np.isfinite(held_out["eval/rewards/rejected"])


def test_the_table_shows_what_held_out_rows_alone_give(tmp_path, capsys):
    rows = [
        {"step": 3, "seconds": 1.0, "loss": 0.5, "rewards/rejected": -0.25},
        {"step": 3, "seconds": 1.0, "eval/loss": 0.4, "eval/rewards/margins": 0.125},
    ]
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    print_run(tmp_path, 3)
    told = capsys.readouterr().out
    assert re.search(r"rewards/margins +│ +│ 0\.1250", told)
    assert re.search(r"rewards/rejected +│ -0\.2500 +│ +│", told)


@pytest.mark.slow
def test_a_mesh_changes_no_loss(model, pairs, tmp_path, run_python):
    # Plain gradient steps: Adam's make large ones of gradients that are nothing but rounding.
    flags = ["--batch-size=8", "--optimizer=sgd", "--learning-rate=1e-3"]
    assert run("dpo", model, pairs, tmp_path / "one", *flags) == 0
    for mesh in ("data=4,fsdp=2", "data=8"):
        output = tmp_path / mesh.replace(",", "-")
        arguments = ["dpo", f"--model={model}", f"--data={pairs}", f"--output={output}", *SMALL,
                     *flags, f"--mesh={mesh}"]  # fmt: skip
        run_python(f"from w2s_jax.cli.main import main\nassert main({arguments!r}) == 0", devices=8)
        for one, other in zip(without_times(tmp_path / "one"), without_times(output), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
            assert one["num_tokens"] == other["num_tokens"]


@pytest.mark.slow
def test_sigterm_saves_exits_with_75_and_the_same_command_goes_on(model, pairs, tmp_path):
    assert run("dpo", model, pairs, tmp_path / "whole", "--max-steps=400") == 0
    words = ["dpo", f"--model={model}", f"--data={pairs}", f"--output={tmp_path / 'run'}", *SMALL,
             "--max-steps=400"]  # fmt: skip
    command = [sys.executable, "-m", "w2s_jax", *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.is_file() and log.stat().st_size):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert "run again to go on" in error
    assert main(words) == 0
    assert without_times(tmp_path / "run") == without_times(tmp_path / "whole")


def one_error(capsys, status):
    error = capsys.readouterr().err
    assert status == 2, error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size=5", "--accumulate=2"], "--batch-size 5 is not divisible by 2"),
        (["--max-length=4096"], "--max-length 4096 is more than the 96 positions"),
        (["--held-out=24"], "--held-out 24"),
        (["--lora-alpha=8"], "--lora-alpha has no effect without --lora-rank"),
        (["--lora-rank=2", "--lora-targets=everything"], "everything"),
        (["--loss-type=ppo"], "unknown loss type 'ppo'"),
        (["--loss-type=wspo"], "--loss-type wspo needs --tuned"),
        (["--tuned=x"], "--tuned has no effect without --loss-type wspo"),
        (["--loss-type=orpo", "--reference=x"], "reads no reference"),
        (["--label-smoothing=0.7"], "label_smoothing must be in [0, 0.5)"),
        (["--epochs=0"], "epochs 0.0 must be above 0"),
        (["--max-steps=0"], "max_steps 0"),
        (["--mesh=data=3"], "mesh 'data=3'"),
        (["--keep-last=0"], "keep_last 0 must be 1 or more"),
        (["--learning-rate=0"], "--learning-rate 0.0 must be above 0"),
        (["--eval-data=nowhere.jsonl"], "nowhere.jsonl"),
        (["--template=nowhere.jinja"], "nowhere.jinja"),
        (["--keep-best=eval/loss"], "--keep-best needs examples"),
    ],
)
def test_wrong_flags_are_told_in_one_line(model, pairs, tmp_path, capsys, flags, message):
    status = run("dpo", model, pairs, tmp_path / "run", *flags)
    assert message in one_error(capsys, status)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_wrong_rows_are_told_with_their_place(model, pairs, tmp_path, capsys):
    write_jsonl(pairs, [*PAIRS[:3], {"prompt": "a", "chosen": " b"}])
    assert "line 4" in one_error(capsys, run("dpo", model, pairs, tmp_path / "run"))
    write_jsonl(pairs, [*PAIRS[:3], PAIRS[0] | {"rejected": PAIRS[0]["chosen"]}])
    assert "line 4" in one_error(capsys, run("dpo", model, pairs, tmp_path / "run"))
    write_jsonl(pairs, [{"question": "a", "answer": "b"}])
    error = one_error(capsys, run("dpo", model, pairs, tmp_path / "run"))
    assert "chosen" in error
    assert "question" in error


def test_missing_checkpoints_and_flags(model, pairs, tmp_path, capsys):
    assert "no such directory" in one_error(capsys, run("sft", tmp_path / "no", pairs, tmp_path))
    assert "--data is missing" in one_error(capsys, main(["sft", f"--model={model}"]))
    assert "--model is missing" in one_error(capsys, main(["dpo", f"--data={pairs}"]))
    other = tiny(tmp_path / "other", 1, text="quite another vocabulary of words")
    status = run("dpo", model, pairs, tmp_path / "run", f"--reference={other}")
    assert "another vocabulary" in one_error(capsys, status)


def test_a_loss_that_is_not_a_number_stops_the_run(model, pairs, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    loaded = load_model(model, dtype="float32")
    params = jax.tree.map(lambda leaf: jax.device_put(np.full_like(leaf, np.nan)), loaded.params)
    save_model(Model(loaded.config, params), broken)
    assert run("sft", broken, pairs, tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert "loss is nan at step 1" in error
    assert "pairs.jsonl line " in error
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert not (tmp_path / "run" / "model").exists()


def test_an_estimate_loads_nothing_and_counts_what_is_known(model, tmp_path, capsys):
    start = tmp_path / "start"
    shutil.copytree(model, start)
    (start / "model.safetensors").unlink()
    flags = ["--estimate", "--lora-rank=2", "--lora-targets=q_proj", "--loss-type=kto"]
    assert main(["dpo", f"--model={start}", f"--output={tmp_path / 'run'}", *flags]) == 0
    told = capsys.readouterr().out
    assert "gradients and activations" in told
    assert "total" in told
    assert not (tmp_path / "run").exists()
