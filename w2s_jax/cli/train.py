"""`w2s sft` and `w2s dpo`: their flags are the settings of `w2s_jax.train`, which does the work."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w2s_jax.cli.multihost_launch import Hosts
from w2s_jax.train.config import DPOConfig, SFTConfig, TrainConfig

if TYPE_CHECKING:
    from w2s_jax.train.fine_tuning import Trained

SHOWN = (
    "loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected",
    "mean_token_accuracy", "kl",
)  # fmt: skip
EVAL = "eval/"


@dataclass(frozen=True, kw_only=True)
class SFT(SFTConfig, Hosts):
    """Fine-tune a model on texts, prompts with completions, or conversations.

    The folder of the run gets model/ (a Hugging Face checkpoint, or a PEFT adapter), metrics.jsonl
    and checkpoints/. The same command goes on where it was stopped; SIGTERM saves first and exits
    with status 75.
    """

    def run(self) -> None:
        """Train, or estimate; raises InputError for wrong input."""
        from w2s_jax.train import sft

        _run(self, sft)


@dataclass(frozen=True, kw_only=True)
class DPO(DPOConfig, Hosts):
    """Tune a model on preferences: pairs of responses, or responses with labels (kto).

    The tuned model and the one it came from make a guide. The folder of the run gets model/ (a
    Hugging Face checkpoint, or a PEFT adapter), metrics.jsonl and checkpoints/. The same command
    goes on where it was stopped; SIGTERM saves first and exits with status 75.
    """

    def run(self) -> None:
        """Train, or estimate; raises InputError for wrong input."""
        from w2s_jax.train import dpo

        _run(self, dpo)


def _run(config: TrainConfig, train: Any) -> None:
    from rich.console import Console

    from w2s_jax.plan.meshes import choose_mesh
    from w2s_jax.train import estimate_memory
    from w2s_jax.train.estimate import report

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if config.estimate:
        report(Console(), estimate_memory(config, choose_mesh=choose_mesh))
    else:
        print_trained(train(config, choose_mesh=choose_mesh))


def print_trained(trained: "Trained") -> None:
    """Print what rounding lost, the last numbers of the run, and where its model lies."""
    from rich.console import Console
    from rich.table import Table

    if trained.rounding is not None:
        print(f"--save-dtype {trained.rounding}")
    if trained.measured is not None and trained.rounding is not None:
        before, after = trained.measured
        table = Table("held out", "float32", trained.rounding.dtype)
        for name in (name for name in SHOWN if name in before):
            table.add_row(name, f"{before[name]:.5f}", f"{after[name]:.5f}")
        Console().print(table)
    print_run(trained.folder, trained.step)
    print(f"step {trained.step} written to {trained.model}")


def print_run(folder: Path, step: int) -> None:
    """Print the last training row and the last evaluation of a run, side by side, to stdout."""
    from rich.console import Console
    from rich.table import Table

    from w2s_jax.train.watch import read_metrics

    rows = [row for row in read_metrics(folder) if row["step"] <= step]
    training, held_out = _last(rows, "loss"), _last(rows, f"{EVAL}loss")
    # A last batch without a desirable response has no margin, where held-out rows have one.
    names = [name for name in SHOWN if name in training or EVAL + name in held_out]
    if not names:
        return
    table = Table("after step", str(training["step"]), *(["held out"] if held_out else []))
    for name in names:
        found = [training.get(name), *([held_out.get(EVAL + name)] if held_out else [])]
        table.add_row(name, *("" if value is None else f"{value:.4f}" for value in found))
    Console().print(table)
    told = [f"{training['num_tokens']:,} tokens"] if "num_tokens" in training else []
    print(", ".join([*told, f"{training['seconds']:.0f} s"]))


def _last(rows: list[dict[str, Any]], name: str) -> Mapping[str, Any]:
    return next((row for row in reversed(rows) if name in row), {})
