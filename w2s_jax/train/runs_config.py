"""What is made of training runs: a checkpoint of a step, a picture of the curves.

Imports no jax, which `--help` would wait for.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class ConvertConfig:
    """A checkpoint, and what is changed of it."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """Checkpoint: a folder or a Hugging Face id; an adapter brings the base that it names. Or the
    folder of a training run, of which a checkpoint is written, its adapters merged."""
    target: Annotated[Positional[str], arg(metavar="TARGET")]
    """Folder to write; what it holds of an earlier checkpoint is replaced."""
    merge_lora: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """Adapter in PEFT's format that is merged into SOURCE."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; auto is as stored, and float32 for what was trained: adapters, runs."""
    step: int | None = None
    """Step of a run's checkpoints, by default the newest."""


@dataclass(frozen=True)
class PlotConfig:
    """The runs and what is drawn of them."""

    runs: Positional[Annotated[tuple[str, ...], arg(metavar="RUN_DIR")]]
    """Folders of runs, each with a metrics.jsonl."""
    output: Annotated[str | None, arg(aliases=["-o"], metavar="FILE")] = None
    """Where the picture goes; by default curves.png in the first run's folder."""
    metrics: tuple[str, ...] = ()
    """Metrics to draw, each in a panel of its own; by default all of the usual ones."""
