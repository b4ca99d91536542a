"""Flags that the training commands share, as mixins, and the typed configs they stand for.

What a command does with them is in `cli/train.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

from w2s_jax.errors import InputError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from w2s_jax.models.config import ModelConfig
    from w2s_jax.models.lora import LoraConfig
    from w2s_jax.train.objectives import Policy

CACHE = "cache"


@dataclass(frozen=True)
class Setup:
    """What is known before data and weights are read."""

    checkpoint: Path
    config: "ModelConfig"
    tokenizer: Any
    policy: "Policy"
    length: int
    mesh: "Mesh | None"
    directory: Path
    cache_folder: Path | None

    @property
    def cache(self) -> Path:
        """Where tokenised data and reference log-probs are kept."""
        return self.cache_folder or self.directory / CACHE


def check_length(length: int, config: "ModelConfig", model: str) -> None:
    """Raise InputError unless --max-length is of 2 tokens up to the positions of the model."""
    if not 2 <= length <= config.max_positions:
        what = f"more than the {config.max_positions} positions of {model}"
        what = "below 2, the shortest there is" if length < 2 else what
        raise InputError(f"--max-length {length} is {what}")


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """What is trained on."""

    data: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="FILE|ID")]] = ()
    """File of examples (.jsonl, .json, .parquet), or an id on the hub; again for more."""
    split: str = "train"
    """Split of a hub data set."""
    eval_data: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="FILE|ID")]] = ()
    """Held-out examples, read as --data is."""
    eval_split: str = "test"
    """Split of --eval-data on the hub."""
    held_out: int = 0
    """Keep so many of the examples, drawn by --seed, from training, and evaluate on them."""
    format: Literal[
        "auto", "text", "messages", "prompt-completion", "labelled", "preference", "responses",
        "alpaca", "sharegpt",
    ] = "auto"  # fmt: skip
    """Layout of the examples; auto finds it by their columns."""
    columns: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="NAME=COLUMN")]] = ()
    """Columns that are read under another name, such as prompt=question response=answer."""
    template: Annotated[str, arg(metavar="NAME|FILE")] = "auto"
    """Chat template: auto is the tokenizer's own for messages, and none for texts."""
    max_length: int | None = None
    """Tokens of an example, prompt and response; by default 1024, or the model's positions."""
    truncation: Literal["keep_start", "keep_end", "keep_response", "drop", "error", "split"] = (
        "keep_start"
    )
    """What becomes of longer ones: which end is kept, or drop, error, or split (texts only)."""
    append_eos: bool = True
    """Put EOS behind texts and responses; chat templates end their turns themselves."""
    equal_pairs: Literal["error", "drop"] = "error"
    """What becomes of pairs whose chosen and rejected responses are equal."""
    limit: int | None = None
    """Use the first so many examples."""
    shuffle: bool = True
    """Shuffle every epoch anew, by --seed."""
    cache: Annotated[str | None, arg(metavar="DIR")] = None
    """Where tokenised data and reference log-probs are kept; by default in the output folder."""


@dataclass(frozen=True, kw_only=True)
class OptimizationFlags:
    """How the parameters change."""

    epochs: float = 1.0
    """Passes over the data; the last step is filled up from the next pass."""
    max_steps: int | None = None
    """Steps; in place of --epochs."""
    batch_size: int = 8
    """Examples of a step (pairs for dpo), over all devices and micro-batches."""
    accumulate: int = 1
    """Micro-batches that a step is cut into, to save memory."""
    learning_rate: float | None = None
    """Peak; by default TRL's, ten times as high for adapters."""
    optimizer: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    """The optimizer."""
    schedule: Literal["constant", "linear", "cosine", "trapezoid"] = "linear"
    """Learning rate after the warm-up."""
    warmup: float = 0.0
    """Share of the steps that warm up, below 1; from 1 on their number, so 1 is one step."""
    decay: float = 0.3
    """Share of the steps at the end in which a trapezoid falls."""
    final: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay; never of biases and norms."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float | None = None
    """Decay of the second moment, by default 0.999, or 0.99 for lion."""
    max_grad_norm: float = 1.0
    """Clip gradients to this global norm; 0 is off."""
    muon_learning_rate: float = 0.02
    """Peak for the matrices of the layers under muon."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in; weights that are trained stay float32. auto: float32 on a CPU.
    The numbers of held-out examples are computed in it too, not in the float32 that is saved."""
    remat: Literal["none", "full", "dots"] = "none"
    """What a backward pass computes again, to save memory: nothing, each layer, all but matmuls; on
    a CPU it takes --scan-layers."""
    scan_layers: bool = False
    """Run the layers in a loop: large models compile faster and take less memory."""
    mesh: Annotated[str | None, arg(metavar="SPEC")] = None
    """Device mesh such as data=2,fsdp=4; one axis may be -1. auto (in one slice) is the likeliest
    to fit and be quick, as of `w2s plan`."""
    seed: int = 0
    """Seed of data order, of new weights and of dropout."""


@dataclass(frozen=True, kw_only=True)
class LoraFlags:
    """Adapters in place of all weights."""

    lora_rank: int = 0
    """Train adapters of this rank (arXiv 2106.09685); 0 trains all weights."""
    lora_alpha: float | None = None
    """Adapters count alpha / rank times; by default twice the rank."""
    lora_dropout: float = 0.0
    """Share of an adapter's inputs that is dropped in training."""
    lora_targets: UseAppendAction[tuple[str, ...]] = ()
    """Projections with an adapter, by default all seven: query key value out gate up down."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732)."""
    continue_adapter: bool = False
    """Train the adapter that --model is further, beside its base; without this an adapter is merged
    and all weights are trained."""

    def lora(self) -> "LoraConfig | None":
        """The adapters' config; InputError for options without effect or out of range."""
        from w2s_jax.models.lora import LoraConfig

        if self.lora_rank == 0:
            used = {
                "--lora-alpha": self.lora_alpha,
                "--lora-dropout": self.lora_dropout and not self.continue_adapter,
                "--lora-targets": self.lora_targets,
                "--rslora": self.rslora,
            }
            for flag, value in used.items():
                if value:
                    raise InputError(f"{flag} has no effect without --lora-rank")
            return None
        if self.continue_adapter:
            raise InputError(
                "--continue-adapter takes the adapter's own rank; leave out --lora-rank"
            )
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        options = {"targets": self.lora_targets} if self.lora_targets else {}
        return LoraConfig(
            rank=self.lora_rank,
            alpha=alpha,
            dropout=self.lora_dropout,
            rslora=self.rslora,
            **options,
        )


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """What a run writes, and when."""

    output: Annotated[str | None, arg(aliases=["-o"], metavar="DIR")] = None
    """Folder of the run: model/, checkpoints/, metrics.jsonl; by default runs/sft or runs/dpo. The
    same command goes on in it."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    eval_batch_size: int | None = None
    """Examples of an evaluation's batch; by default those of a micro-batch."""
    save_every: int = 500
    """Steps between checkpoints; 0 saves at the end only."""
    save_seconds: float | None = 600.0
    """Save too when so many seconds have passed since the last checkpoint."""
    keep_last: int = 2
    """Checkpoints that are kept."""
    keep_best: str | None = None
    """Keep the best checkpoint too, by a metric such as eval/loss (lower is better), or
    eval/rewards/accuracies."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What model/ keeps weights as. Those of fewer bits lose small changes: how much is told."""
    sample_every: int = 0
    """Steps between samples of the model's responses, into samples.jsonl; 0 samples none."""
    sample_prompts: int = 4
    """Prompts that are sampled for, the first of the held-out examples."""
    tensorboard: bool = False
    """Write TensorBoard files as well (pip install 'w2s-jax[tensorboard]')."""
    wandb: Annotated[str | None, arg(metavar="PROJECT")] = None
    """Log to this Weights & Biases project as well (pip install 'w2s-jax[wandb]')."""
    estimate: bool = False
    """Print the memory a step takes on each device, and load nothing."""
    config: Annotated[str | None, arg(metavar="FILE|NAME")] = None
    """YAML values of these flags, by file or by the name of a built-in one; flags override them."""
