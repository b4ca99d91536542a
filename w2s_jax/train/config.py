"""The settings of a training as frozen values: data, optimizer, adapters, run, and the losses.

`SFTConfig` and `DPOConfig` are all of it; what needs less takes one of their bases. Commands are
made of these, so that a flag, a key of a YAML file and an argument in Python are one field,
declared here with its default and its help. Imports no jax, which `w2s sft --help` would wait for.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, UseAppendAction, arg

from w2s_jax.errors import InputError, check_fields

MOST_STEPS = 2**31 - 1
"""The largest number of a step: the state counts them in int32."""

Ranges = tuple[tuple[str, Callable[[Any], bool], str], ...]
"""(field names, test of a value that is not None, wording of the range in messages)."""

RANGES: Ranges = (
    ("learning_rate muon_learning_rate", lambda x: 0 < x < math.inf, "be above 0, and finite"),
    ("max_grad_norm", lambda x: 0 <= x < math.inf, "be above 0, and finite"),
    ("warmup final weight_decay", lambda x: 0 <= x < math.inf, "be 0 or above, and finite"),
    ("b1 b2", lambda x: 0 <= x < 1, "be 0 or above, and below 1"),
    ("decay", lambda x: 0 < x <= 1, "be a share of the steps, above 0 and up to 1"),
    ("max_steps", lambda x: 0 < x <= MOST_STEPS, f"be 1 or more, {MOST_STEPS} at most"),
    ("batch_size accumulate eval_batch_size log_every keep_last", lambda x: x >= 1, "be 1 or more"),
    ("seed", lambda x: 0 <= x < 2**63, "not be negative, nor 2**63 or more"),
    ("eval_every save_every sample_every save_seconds", lambda x: x >= 0, "not be negative"),
)


def check_ranges(config: Any, ranges: Ranges, told: str) -> None:
    """Raise InputError for a field out of its range; `told` formats {name}, {value}, {right}."""
    for names, within, right in ranges:
        for name in names.split():
            value = getattr(config, name, None)
            if value is not None and not within(value):
                raise InputError(told.format(name=name, value=value, right=right))


@dataclass(frozen=True)
class Settings:
    """Settings that are checked when they are made, by `check` of the class and its bases."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise InputError for a value of the wrong type, and for one out of range."""
        check_fields(self)
        check_ranges(self, RANGES, "{name} {value} must {right}")


@dataclass(frozen=True, kw_only=True)
class DataOptions(Settings):
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
    cache: Annotated[str | None, arg(metavar="DIR")] = None
    """Where tokenised data and reference log-probs are kept; by default in the output folder."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
    """Which optimizer, how fast by step, and what is done to gradients before.

    adamw: arXiv 1711.05101. adafactor: arXiv 1804.04235 with the given rate, second moments of
    matrices factored, updates clipped at 1, no first moment. lion: arXiv 2302.06675. muon: the
    matrices of the layers orthogonalised, AdamW for the rest. sgd: without momentum. `b1` and `b2`
    serve adamw, lion and muon.
    """

    optimizer: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    """The optimizer."""
    learning_rate: float | None = 1e-3
    """Peak of the learning rate."""
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


@dataclass(frozen=True, kw_only=True)
class RunConfig(OptimizerConfig):
    """How long and how a model is trained."""

    epochs: float = 1.0
    """Passes over the data; the last step is filled up from the next pass."""
    max_steps: int | None = None
    """Steps; in place of --epochs."""
    batch_size: int = 8
    """Examples of a step (pairs for dpo), over all devices and micro-batches."""
    accumulate: int = 1
    """Micro-batches that a step is cut into, to save memory."""
    eval_batch_size: int | None = None
    """Examples of an evaluation's batch; by default those of a micro-batch."""
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
    shuffle: bool = True
    """Shuffle every epoch anew, by --seed."""
    seed: int = 0
    """Seed of data order, of new weights and of dropout."""

    def check(self) -> None:
        """Raise InputError for a value of the wrong type, and for one out of range."""
        super().check()
        if self.max_steps is None and not 0 < self.epochs < math.inf:
            raise InputError(f"epochs {self.epochs} must be above 0, and finite")

    @property
    def eval_batch(self) -> int:
        """Examples in a batch of an evaluation."""
        return self.eval_batch_size or self.batch_size // self.accumulate


@dataclass(frozen=True, kw_only=True)
class LoraOptions(Settings):
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

    def check(self) -> None:
        """Raise InputError for a value of the wrong type, and for one without effect."""
        super().check()
        if self.lora_rank and self.continue_adapter:
            raise InputError(
                "--continue-adapter takes the adapter's own rank; leave out --lora-rank"
            )
        for name in ("lora_alpha", "lora_dropout", "lora_targets", "rslora"):
            kept = self.lora_rank or (name == "lora_dropout" and self.continue_adapter)
            if getattr(self, name) and not kept:
                raise InputError(f"--{name.replace('_', '-')} has no effect without --lora-rank")


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Settings):
    """How often a run tells, evaluates, samples and saves; 0 is at the end, of samples never."""

    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    save_every: int = 500
    """Steps between checkpoints; 0 saves at the end only."""
    save_seconds: float | None = 600.0
    """Save too when so many seconds have passed since the last checkpoint."""
    keep_last: int = 2
    """Checkpoints that are kept."""
    keep_best: str | None = None
    """Keep the best checkpoint too, by a metric such as eval/loss (lower is better), or
    eval/rewards/accuracies."""
    sample_every: int = 0
    """Steps between samples of the model's responses, into samples.jsonl; 0 samples none."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig, LoraOptions, RunConfig, DataOptions):
    """Settings of both trainings; `sft` and `dpo` check them when they are called."""

    name: ClassVar[str]
    model: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """Checkpoint that is trained: a folder, or an id on the Hugging Face hub."""
    from_scratch: bool = False
    """Take the config and the tokenizer of --model alone, and train from random weights."""
    learning_rate: float | None = None
    """Peak; by default TRL's, ten times as high for adapters."""
    output: Annotated[str | None, arg(aliases=["-o"], metavar="DIR")] = None
    """Folder of the run: model/, checkpoints/, metrics.jsonl; by default runs/sft or runs/dpo. The
    same command goes on in it."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What model/ keeps weights as. Those of fewer bits lose small changes: how much is told."""
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

    def __post_init__(self) -> None:
        """Leave `check` to `sft` and `dpo`: tyro would frame an error raised here in a box."""

    def check(self) -> None:
        """Raise InputError for wrong options, and for options that exclude each other."""
        if isinstance(self.learning_rate, float | int) and not self.learning_rate > 0:
            raise InputError(f"--learning-rate {self.learning_rate} must be above 0")
        super().check()
        if self.held_out and self.eval_data:
            raise InputError("--held-out and --eval-data both name what to evaluate on; give one")
        if self.keep_best is not None and not (self.held_out or self.eval_data):
            raise InputError("--keep-best needs examples to evaluate on: --held-out or --eval-data")
        if self.keep_best is not None and not self.keep_best.removeprefix("-").startswith("eval/"):
            raise InputError(
                f"--keep-best {self.keep_best}: it takes a metric of the evaluation, as eval/loss"
            )
        if self.sample_prompts < 1:
            raise InputError(f"--sample-prompts {self.sample_prompts} must be 1 or more")
        if self.save_dtype != "float32" and self.lora_rank:
            raise InputError("--save-dtype has no effect on adapters, which are small: float32")
        if self.from_scratch and (self.lora_rank or self.continue_adapter):
            raise InputError("adapters stand beside a trained model; leave out --from-scratch")


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning on texts, prompts with completions, or conversations."""

    name: ClassVar[str] = "sft"

    loss_on: Literal["auto", "completion", "assistant", "all"] = "auto"
    """Tokens that count: those of completions, of the assistant's turns, or all; auto is
    completions where there are prompts, else all."""
    packing: Literal["none", "best-fit"] = "none"
    """Put several examples in a row of max_length; they do not see one another."""


@dataclass(frozen=True)
class LossInputs:
    """What a loss reads: the fields of `PairLogprobs` it needs, and the options that affect it."""

    arrays: tuple[str, ...]
    options: tuple[str, ...] = ("beta",)
    per_token: bool = False
    """Whether rewards and log-probs are logged as means over a response's tokens, as TRL does."""

    @property
    def reference(self) -> bool:
        """Whether it reads log-probs of the reference model."""
        return any(name.startswith("reference") for name in self.arrays)


_POLICY = ("policy_chosen", "policy_rejected")
_RATIOS = (*_POLICY, "reference_chosen", "reference_rejected")
_LENGTHS = ("chosen_lengths", "rejected_lengths")
_SMOOTHED = ("beta", "label_smoothing")

LOSSES: dict[str, LossInputs] = {
    "sigmoid": LossInputs(_RATIOS, _SMOOTHED),
    "hinge": LossInputs(_RATIOS),
    "ipo": LossInputs((*_RATIOS, *_LENGTHS)),
    "exo_pair": LossInputs(_RATIOS, _SMOOTHED),
    "nca_pair": LossInputs(_RATIOS),
    "robust": LossInputs(_RATIOS, _SMOOTHED),
    "bco_pair": LossInputs(_RATIOS),
    "sppo_hard": LossInputs(_RATIOS),
    "aot": LossInputs(_RATIOS, _SMOOTHED),
    "aot_unpaired": LossInputs(_RATIOS, _SMOOTHED),
    "apo_zero": LossInputs(_RATIOS),
    "apo_down": LossInputs(_RATIOS),
    "discopop": LossInputs(_RATIOS, ("beta", "discopop_tau")),
    "sigmoid_norm": LossInputs((*_RATIOS, *_LENGTHS)),
    "orpo": LossInputs((*_POLICY, *_LENGTHS), per_token=True),
    "cpo": LossInputs((*_POLICY, "chosen_lengths"), (*_SMOOTHED, "cpo_alpha")),
    "simpo": LossInputs((*_POLICY, *_LENGTHS), (*_SMOOTHED, "simpo_gamma"), per_token=True),
    "genarm": LossInputs(_POLICY, _SMOOTHED),
    "sft": LossInputs(("policy_chosen", "chosen_lengths"), ()),
    "kto": LossInputs(("policy", "reference"), ("beta", "desirable_weight", "undesirable_weight")),
    "wspo": LossInputs(("policy", "reference", "tuned", "untuned")),
}
"""What each loss reads, by TRL's name for it. The formulas are the functions of losses.py."""

ALONE = ("kto", "wspo")
"""Losses on single responses, which cannot be mixed with others."""

RENAMED = {
    "aot_pair": "aot_unpaired", "arm": "genarm", "bco": "bco_pair", "cdpo": "sigmoid",
    "dpo": "sigmoid", "exo": "exo_pair", "nca": "nca_pair", "slic": "hinge",
    "sppo": "sppo_hard",
}  # fmt: skip
"""Names from older TRL releases and from papers: suggested in error messages, never accepted."""

OPTION_RANGES: Ranges = (
    ("beta discopop_tau", lambda x: 0 < x < math.inf, "above 0"),
    ("simpo_gamma cpo_alpha", lambda x: 0 <= x < math.inf, "0 or more"),
    ("desirable_weight undesirable_weight", lambda x: 0 <= x < math.inf, "0 or more"),
    ("label_smoothing", lambda x: 0 <= x < 0.5, "in [0, 0.5)"),
)


@dataclass(frozen=True)
class PreferenceConfig(Settings):
    """The preference losses of a run and their options, under TRL's names; defaults are TRL's."""

    loss_type: UseAppendAction[tuple[str, ...]] = ()
    """Loss, by TRL's names: sigmoid (the default), hinge, ipo, exo_pair, nca_pair, robust,
    bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop, sigmoid_norm, sft, orpo,
    cpo, simpo, genarm, kto, wspo. Given again, the weighted sum of several."""
    loss_weights: UseAppendAction[tuple[float, ...]] = ()
    """Weight of each loss, 1 by default."""
    beta: float = 0.1
    """Strength of the pull to the reference; tau in IPO, lambda in ORPO, gamma in WSPO."""
    label_smoothing: float = 0.0
    """Share of labels assumed flipped, or EXO's epsilon."""
    discopop_tau: float = 0.05
    """Temperature of DiscoPOP's mixing weight."""
    simpo_gamma: float = 0.5
    """Margin that SimPO asks for."""
    cpo_alpha: float = 1.0
    """Weight of CPO's next-token loss."""
    desirable_weight: float = 1.0
    """KTO's weight of desirable responses."""
    undesirable_weight: float = 1.0
    """KTO's weight of undesirable responses."""

    @property
    def losses(self) -> tuple[str, ...]:
        """The losses by name; DPO's ("sigmoid") if none is given."""
        return self.loss_type or ("sigmoid",)

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses reads log-probs of the reference model."""
        return any(LOSSES[name].reference for name in self.losses)

    def options(self, loss: str) -> dict[str, float]:
        """The keyword arguments of `loss` under these settings."""
        return {name: getattr(self, name) for name in LOSSES[loss].options}

    def check(self) -> None:
        """Raise InputError for an unknown loss, and for options out of range or without effect."""
        super().check()
        for name in self.losses:
            if name not in LOSSES:
                near = difflib.get_close_matches(name, LOSSES, n=1)
                hint = RENAMED.get(name.lower()) or (near[0] if near else None)
                right = f"did you mean {hint!r}?" if hint else f"one of {', '.join(LOSSES)}"
                raise InputError(f"unknown loss type {name!r}; {right}")
        alone = next((name for name in self.losses if name in ALONE), None)
        if alone and len(self.losses) > 1:
            raise InputError(f"loss type {alone!r} takes no pairs and cannot be mixed with others")
        if self.loss_weights and len(self.loss_weights) != len(self.losses):
            raise InputError(
                f"loss_weights has {len(self.loss_weights)} entries for {len(self.losses)} loss "
                "types; one each"
            )
        if not all(map(math.isfinite, self.loss_weights)):
            raise InputError(f"loss_weights must be finite, not {self.loss_weights}")
        check_ranges(self, OPTION_RANGES, "{name} must be {right}, not {value}")
        if "exo_pair" in self.losses and self.label_smoothing == 0:
            raise InputError(
                "loss type 'exo_pair' needs label_smoothing above 0; its paper uses 1e-3"
            )
        used = {name for loss in self.losses for name in LOSSES[loss].options}
        for field in fields(PreferenceConfig):
            changed: Any = getattr(self, field.name) != field.default
            if changed and field.name not in {*used, "loss_type", "loss_weights", "beta"}:
                told = " + ".join(self.losses)
                raise InputError(f"{field.name} has no effect on loss type {told}; leave it out")


@dataclass(frozen=True, kw_only=True)
class DPOConfig(TrainConfig, PreferenceConfig):
    """Preference optimisation on pairs of responses, or on responses with labels (kto)."""

    name: ClassVar[str] = "dpo"

    weight_column: Annotated[str | None, arg(metavar="NAME")] = None
    """Column of the pairs that says how much each counts in the loss, such as the confidence in
    it: the sum of weight × loss over the sum of the weights."""
    reference: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """Checkpoint of the reference; by default --model as it is at the start."""
    reference_logprobs: Literal["precomputed", "live"] = "precomputed"
    """Compute the reference's log-probs once, before the first step, and keep them; or in every
    step, with the reference in memory, as kto and wspo always do."""
    tuned: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """The guide's tuned model (wspo)."""
    untuned: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """The guide's untuned model (wspo)."""

    @property
    def reference_is_live(self) -> bool:
        """Whether steps run the reference: kto makes new pairs, wspo needs every token."""
        asked = self.reference_logprobs == "live" or self.losses[0] in ALONE
        return self.needs_reference and asked

    def check(self) -> None:
        """Raise InputError for wrong options, and for options that exclude each other."""
        super().check()
        wspo = "wspo" in self.losses
        for flag in ("tuned", "untuned"):
            if wspo and getattr(self, flag) is None:
                raise InputError(f"--loss-type wspo needs --{flag}, a model of the guide")
            if not wspo and getattr(self, flag) is not None:
                raise InputError(f"--{flag} has no effect without --loss-type wspo")
        if "kto" in self.losses and self.batch_size // self.accumulate < 2:
            raise InputError("--loss-type kto pairs responses of a batch; it needs 2 rows or more")
        if "kto" in self.losses and self.eval_batch_size == 1:
            raise InputError("--loss-type kto pairs responses; --eval-batch-size 1 holds only one")
        sorting = [name for name in self.losses if name in ("aot", "aot_unpaired")]
        if sorting and self.weight_column is not None:
            raise InputError(
                f"--weight-column has no effect on --loss-type {sorting[0]}: it compares the "
                "sorted rewards of a batch, not pairs"
            )
        if self.reference is not None and not self.needs_reference:
            names = " + ".join(self.losses)
            raise InputError(f"--reference has no effect: {names} reads no reference")


@dataclass(frozen=True)
class ConvertConfig:
    """A checkpoint, and what is changed of it."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """Checkpoint: a folder or a Hugging Face id; an adapter brings the base that it names. Or the
    folder of a training run, of which a checkpoint is written, its adapters merged. Or a .gguf file
    (pip install 'w2s-jax[gguf]'), whose tensors are dequantised."""
    target: Annotated[Positional[str], arg(metavar="TARGET")]
    """Folder to write; what it holds of an earlier checkpoint is replaced."""
    merge_lora: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """Adapter in PEFT's format that is merged into SOURCE."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; auto is as stored, or float32 of adapters, runs, quantised files."""
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
