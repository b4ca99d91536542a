"""Whole runs of `w2s sft` and `w2s dpo` against TRL's trainers: the same loss, step for step."""

import json
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.cli.test_search import tiny
from w2s_jax.cli.main import main
from w2s_jax.models.load import load_model
from w2s_jax.models.model import Model
from w2s_jax.models.save import save_model
from w2s_jax.text.rows import read_jsonl, write_jsonl
from w2s_jax.train.loop import read_metrics

WORDS = ("a", "film", "of", "the", "sea", "and", "an", "actor", "who", "was", "seen", "there")
RATE, BATCH = 1e-3, 4

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not (find_spec("trl") and find_spec("torch")),
        reason="live parity needs trl: pip install -e '.[test,parity]'",
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint with weights small enough that rounding does not grow over the steps."""
    folder = tiny(tmp_path_factory.mktemp("models") / "model", 0)
    sharp = load_model(folder)
    params = jax.tree.map(lambda leaf: leaf / 3, sharp.params)
    save_model(Model(sharp.config, params), folder)
    return folder


def rows(kind):
    rng = np.random.default_rng(0)

    def text(shortest, longest):
        return " ".join(rng.choice(WORDS, int(rng.integers(shortest, longest))))

    sides = {"dpo": ("chosen", "rejected"), "sft": ("completion",)}[kind]
    return [{"prompt": text(2, 6), **{side: " " + text(2, 9) for side in sides}} for _ in range(48)]


def both(kind, model, folder: Path, flags=(), **options):
    """(our rows of metrics, TRL's logged rows) of a run over the same rows in order."""
    from tests.train.trl_curves import curve

    examples = rows(kind)
    write_jsonl(folder / "rows.jsonl", examples)
    status = main(
        [kind, f"--model={model}", f"--data={folder / 'rows.jsonl'}", f"--output={folder / 'run'}",
         f"--batch-size={BATCH}", f"--learning-rate={RATE}", "--no-shuffle", "--log-every=1",
         "--epochs=2", *flags]
    )  # fmt: skip
    assert status == 0
    theirs = curve(
        kind, model, examples, folder / "trl", learning_rate=RATE, num_train_epochs=2,
        per_device_train_batch_size=BATCH, **options,
    )  # fmt: skip
    return read_metrics(folder / "run"), theirs


def compare(ours, theirs, names):
    assert len(ours) == len(theirs) == 24
    for row, expected in zip(ours, theirs, strict=True):
        for name in names:
            if name == "rewards/accuracies" and abs(expected["rewards/margins"]) < 1e-4:
                continue  # the model is still the reference: rounding decides which side is above
            np.testing.assert_allclose(
                row[name], expected[name], rtol=1e-3, atol=1e-3, err_msg=f"{name} {row['step']}"
            )


DPO_METRICS = (
    "loss", "grad_norm", "learning_rate", "num_tokens", "rewards/chosen", "rewards/rejected",
    "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    "mean_token_accuracy",
)  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (("--loss-type=ipo", "--warmup=0.25"), {"loss_type": ["ipo"], "warmup_steps": 6}),
        (
            ("--loss-type=sigmoid", "--loss-type=sft", "--loss-weights=1", "--loss-weights=0.5",
             "--schedule=cosine"),
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5],
             "lr_scheduler_type": "cosine"},
        ),
        (("--reference-logprobs=live", "--weight-decay=0.1"), {"weight_decay": 0.1}),
    ],
    ids=["ipo", "mixed", "live"],
)  # fmt: skip
def test_dpo_follows_trl(model, tmp_path, flags, options):
    compare(*both("dpo", model, tmp_path, flags, **options), DPO_METRICS)


def test_sft_follows_trl(model, tmp_path):
    names = ("loss", "grad_norm", "learning_rate", "num_tokens", "mean_token_accuracy")
    compare(*both("sft", model, tmp_path), names)


def test_sft_on_whole_texts_with_micro_batches_follows_trl(model, tmp_path):
    flags = ("--loss-on=all", "--accumulate=2")
    ours, theirs = both("sft", model, tmp_path, flags, completion_only_loss=False)
    compare(ours, theirs, ("loss", "grad_norm", "num_tokens"))


def test_the_trained_checkpoint_is_transformers_own(model, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    both("dpo", model, tmp_path)
    trained = tmp_path / "run" / "model"
    tokens = np.arange(12)[None] % 300
    theirs = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(load_model(trained)(tokens), expected, atol=1e-4)
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert json.loads((trained / "config.json").read_text())["architectures"]
