"""What `w2s sft` and `w2s dpo` say of wrong input, in one line and before expensive work."""

import shutil
from pathlib import Path

import jax
import pytest

from tests.cli.test_search import tiny
from tests.cli.test_training import PAIRS, one_error, run
from tests.search.test_adapters import adapter
from w2s_jax.text.rows import locked, write_jsonl
from w2s_jax.train.export import weights_identity


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("models") / "model", 0)


@pytest.fixture
def pairs(tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    return tmp_path / "pairs.jsonl"


@pytest.fixture
def unread(monkeypatch):
    """No weight may be read."""

    def fail(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("w2s_jax.models.load.load_parameters", fail)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning-rate=inf"], "learning_rate inf must be above 0, and finite"),
        (["--warmup=nan"], "warmup nan must be 0 or above"),
        (["--b2=1"], "b2 1.0 must be 0 or above, and below 1"),
        (["--max-grad-norm=-1"], "max_grad_norm -1.0 must be above 0"),
        (["--optimizer=muon", "--muon-learning-rate=0"], "muon_learning_rate 0.0 must be above 0"),
        (["--epochs=inf"], "epochs inf must be above 0, and finite"),
        (["--epochs=1e30"], "epochs are 6e+30 steps"),
        (["--max-steps=99999999999"], "max_steps 99999999999 must be 1 or more"),
        (["--seed=-1"], "seed -1 must not be negative"),
        (["--save-seconds=nan"], "save_seconds nan must not be negative"),
        (["--held-out=4", "--eval-batch-size=0"], "eval_batch_size 0 must be 1 or more"),
        (["--held-out=4", "--keep-best=loss"], "--keep-best loss: it takes a metric"),
        (["--sample-every=2", "--sample-prompts=0"], "--sample-prompts 0 must be 1 or more"),
        (["--max-length=0"], "--max-length 0 is below 2"),
        (["--loss-type=aot", "--weight-column=weight"], "no effect on --loss-type aot"),
        (["--weight-column=sure"], 'line 1: "sure" is None; as --weight-column it takes a number'),
        (["--loss-type=kto", "--held-out=1"], "kto pairs responses, and only one is held out"),
        (["--mesh="], "--mesh is empty; give sizes such as data=2,tensor=4, or leave it out"),
        (["--lora-rank=17"], "--lora-rank 17 is more than the width 16"),
    ],
)
def test_wrong_flags_are_told_before_weights_are_read(
    model, pairs, tmp_path, capsys, unread, flags, message
):
    status = run("dpo", model, pairs, tmp_path / "run", *flags)
    assert message in one_error(capsys, status)


def test_an_odd_vocabulary_is_told(tmp_path, pairs, capsys, monkeypatch):
    """As one device eight times: nothing is placed before the sizes are known to be divisible."""
    devices = jax.devices()[:1] * 8
    monkeypatch.setattr("jax.devices", lambda: devices)
    odd = tiny(tmp_path / "odd", 0, vocab_size=301)
    error = one_error(
        capsys, run("sft", odd, pairs, tmp_path / "run", "--batch-size=8", "--mesh=tensor=8")
    )
    assert "vocab of size 301 is not divisible by mesh tensor 8; use fsdp=8 | " in error
    assert "rules" not in error


def test_what_is_not_installed_is_told_before_data_is_read(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    status = run("dpo", model, tmp_path / "nowhere.jsonl", tmp_path / "run", "--wandb=project")
    assert "pip install 'w2s-jax[wandb]'" in one_error(capsys, status)


def test_an_unknown_best_metric_is_told_before_the_first_step(model, pairs, tmp_path, capsys):
    flags = ["--held-out=4", "--keep-best=eval/accuracy"]
    error = one_error(capsys, run("dpo", model, pairs, tmp_path / "run", *flags))
    assert "--keep-best eval/accuracy" in error
    assert "eval/rewards/accuracies" in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_tokenizer_of_another_model_is_told(model, pairs, tmp_path, capsys, unread):
    mixed = tmp_path / "mixed"
    shutil.copytree(model, mixed)
    few = tiny(tmp_path / "few", 0, vocab_size=40)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(f"{few}/{name}", mixed)
    error = one_error(capsys, run("sft", mixed, pairs, tmp_path / "run"))
    assert "it is the tokenizer of another model" in error
    assert "the model has 40" in error


def test_a_run_never_replaces_what_it_reads(model, pairs, tmp_path, capsys):
    for role in ("--model", "--reference"):
        folder = tmp_path / role / "model"
        shutil.copytree(model, folder)
        before = (folder / "model.safetensors").read_bytes()
        start = folder if role == "--model" else model
        other = [f"--reference={folder}"] if role == "--reference" else []
        status = run("dpo", start, pairs, folder.parent, *other)
        assert "which is read from" in one_error(capsys, status)
        assert (folder / "model.safetensors").read_bytes() == before


def test_a_second_run_in_a_folder_is_told_before_weights_are_read(
    model, pairs, tmp_path, capsys, unread
):
    with locked(tmp_path / "run" / "metrics.jsonl"):
        status = run("dpo", model, pairs, tmp_path / "run", f"--cache={tmp_path / 'cache'}")
    assert "another run is writing this output" in one_error(capsys, status)


def test_an_adapters_weights_are_those_of_its_base_too(model, tmp_path):
    """By which its reference log-probs are kept."""
    base = shutil.copytree(model, tmp_path / "base")
    own = Path(adapter(tmp_path / "adapter", base))
    before = weights_identity(own)
    tiny(base, 5)
    assert weights_identity(own) != before


def test_adapters_are_not_written_beside_a_whole_model(model, pairs, tmp_path, capsys, unread):
    shutil.copytree(model, tmp_path / "run" / "model")
    status = run("sft", model, pairs, tmp_path / "run", "--lora-rank=2")
    assert "holds a whole model, beside which no adapter is read" in one_error(capsys, status)
