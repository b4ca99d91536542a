"""What is known of a training before its data and weights are read.

`Objective` is what distinguishes `sft` from `dpo`; `Setup` is what follows from settings, configs
and files.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from w2s_jax.errors import InputError
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.huggingface import is_adapter, locate
from w2s_jax.models.load import load_config
from w2s_jax.models.lora import LoraConfig
from w2s_jax.models.peft import base_folder, base_of, load_factors
from w2s_jax.ops.meshes import ChosenMesh, mesh_of
from w2s_jax.ops.sharding import Placement
from w2s_jax.text.batches import Kind
from w2s_jax.text.tokenizer import load_tokenizer
from w2s_jax.train import watch
from w2s_jax.train.config import DPOConfig, SFTConfig, TrainConfig
from w2s_jax.train.estimate import TrainingShapes
from w2s_jax.train.logprobs import REFERENCE
from w2s_jax.train.objectives import BASE, TUNED, UNTUNED, Policy, preference_objective, sft_loss
from w2s_jax.train.step import LossFunction, compute_dtype
from w2s_jax.train.watch import mesh_before

MODEL = "model"
"""Folder of the trained model in a run's folder."""
CACHE = "cache"
DEFAULT_LENGTH = 1024
ADAPTER_PEAK = 10
"""Factor on the default learning rate for adapters, as in TRL's documentation."""

ChooseMesh = Callable[[TrainingShapes], ChosenMesh]


@dataclass(frozen=True)
class Objective:
    """What distinguishes a training from others, beside its settings.

    Attributes:
        kind: Kind of the examples.
        peak: Default peak of the learning rate if all weights are trained.
        loss: The loss function of a policy.
        columns: Arrays of a batch other than tokens, by name: shape after the rows, and dtype.
        frozen: Checkpoints of the frozen models that the loss reads, by role.
        reference: "precomputed" if the loss reads the reference's log-probs from the batch, "live"
            if it runs the reference model, None if it reads no reference.
    """

    kind: Kind
    peak: float
    loss: Callable[[Policy], LossFunction]
    columns: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    frozen: Mapping[str, str] = field(default_factory=dict)
    reference: str | None = None

    @property
    def sides(self) -> int:
        """Sequences in an example."""
        return 1 if self.kind == "sequences" else 2

    @property
    def live(self) -> bool:
        """Whether steps run the reference model."""
        return self.reference == "live"

    def batch(self, rows: int, length: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shapes and dtypes of a batch in which all rows have the full length."""
        shape = (rows, length) if self.sides == 1 else (rows, self.sides, length)
        tokens = {"tokens": (shape, "int32"), "segments": (shape, "int32")}
        columns = {name: ((rows, *rest), dtype) for name, (rest, dtype) in self.columns.items()}
        return tokens | {"targets": (shape, "bool")} | columns


@dataclass(frozen=True)
class Setup:
    """What is known before data and weights are read.

    Attributes:
        config: The settings, with defaults that depend on the model filled in.
        objective: What is trained for.
        checkpoint: Folder of the model to train.
        model: Its config.
        tokenizer: Its tokenizer.
        policy: The model in training.
        directory: The run's folder.
        mesh: The mesh; None for one device.
    """

    config: TrainConfig
    objective: Objective
    checkpoint: Path
    model: ModelConfig
    tokenizer: Any
    policy: Policy
    directory: Path
    mesh: Mesh | None = None

    @property
    def dtype(self) -> str:
        """Dtype of the model's computations."""
        return compute_dtype(self.config.dtype)

    @property
    def length(self) -> int:
        """Maximum tokens of an example."""
        assert self.config.max_length is not None
        return self.config.max_length

    @property
    def cache(self) -> Path:
        """Folder of tokenised data and reference log-probs."""
        cache = self.config.cache
        return Path(cache).expanduser() if cache else self.directory / CACHE

    @property
    def base_name(self) -> str:
        """How an adapter names its base: a hub id, or the folder's full path."""
        name = str(self.config.model)
        if self.config.continue_adapter:
            name = base_of(name)
        folder = Path(name).expanduser()
        return str(folder.resolve() if folder.is_dir() else name)

    @property
    def frozen_folders(self) -> dict[str, Path]:
        """Folders of the frozen models that the loss reads, by role."""
        return {role: locate(path) for role, path in self.objective.frozen.items()}


def objective_of(config: TrainConfig) -> Objective:
    """The objective of an SFTConfig or a DPOConfig."""
    if isinstance(config, SFTConfig):
        return Objective("sequences", 2e-5, sft_loss)
    assert isinstance(config, DPOConfig)
    kinds: dict[str, Kind] = {"kto": "labelled", "wspo": "sequences"}
    kind = kinds.get(config.losses[0], "pairs")
    reference = None
    if config.needs_reference:
        reference = "live" if config.reference_is_live else "precomputed"
    columns: dict[str, tuple[tuple[int, ...], str]] = {
        "labels": ((), "bool"), "weights": ((), "float32"), REFERENCE: ((2,), "float32")
    }  # fmt: skip
    held = {
        "labels": kind == "labelled",
        "weights": kind == "pairs" and config.weight_column is not None,
        REFERENCE: reference == "precomputed",
    }
    named = {REFERENCE: config.reference, TUNED: config.tuned, UNTUNED: config.untuned}
    return Objective(
        kind,
        1e-6,
        functools.partial(preference_objective, preference=config),
        columns={name: column for name, column in columns.items() if held[name]},
        frozen={role: path for role, path in named.items() if path is not None},
        reference=reference,
    )


def prepare(config: TrainConfig, choose_mesh: ChooseMesh | None = None) -> Setup:
    """Check the settings, and read the model's config and tokenizer.

    Args:
        config: The settings.
        choose_mesh: Picks the mesh for `mesh="auto"`.

    Raises:
        InputError: For wrong settings, and for a model that cannot be read.
    """
    config.check()
    if config.model is None:
        raise InputError("--model is missing: the checkpoint to train")
    if not config.data and not config.estimate:
        raise InputError("--data is missing: a file of examples, or an id on the hub")
    check_trackers(config)
    objective, new = objective_of(config), _new_adapters(config)
    checkpoint = locate(config.model)
    model = load_config(checkpoint)
    lora = _adapters(config, new, checkpoint, model)
    length = config.max_length
    if length is None:
        length = min(DEFAULT_LENGTH, model.max_positions)
    check_length(length, model, config.model)
    peak = objective.peak * (1 if lora is None else ADAPTER_PEAK)
    rate = peak if config.learning_rate is None else config.learning_rate
    directory = Path(config.output or f"runs/{config.name}")
    setup = Setup(
        config=replace(config, max_length=length, learning_rate=rate),
        objective=objective,
        checkpoint=checkpoint,
        model=model,
        tokenizer=load_tokenizer(checkpoint),
        policy=Policy(model, lora, config.remat),
        directory=directory,
    )
    _check_output(setup)
    choose = None if choose_mesh is None else lambda: choose_mesh(training_shapes(setup))
    mesh = mesh_of(config.mesh, choose, before=lambda: mesh_before(directory))
    return replace(setup, policy=replace(setup.policy, placement=Placement(mesh)), mesh=mesh)


def check_trackers(config: TrainConfig) -> None:
    """Raise InputError if TensorBoard or W&B is asked for and not installed."""
    for asked, needed in ((config.tensorboard, "tensorboardX"), (config.wandb, "wandb")):
        if asked:
            watch.check_installed(needed)


def check_length(length: int, config: ModelConfig, model: str) -> None:
    """Raise InputError unless --max-length lies between 2 and the model's positions."""
    if not 2 <= length <= config.max_positions:
        what = f"more than the {config.max_positions} positions of {model}"
        what = "below 2, the shortest there is" if length < 2 else what
        raise InputError(f"--max-length {length} is {what}")


def training_shapes(setup: Setup) -> TrainingShapes:
    """The shapes of a step, and of the frozen models in memory beside it."""
    config, folders = setup.config, setup.frozen_folders
    beside = {role: load_config(at) for role, at in folders.items()} | frozen_configs(setup)
    beside.pop(BASE, None)
    return TrainingShapes(
        model=setup.model,
        objective="dpo" if setup.objective.sides == 2 else "sft",
        rows=config.batch_size,
        length=setup.length,
        accumulate=config.accumulate,
        lora=setup.policy.lora,
        dtype=setup.dtype,
        remat=config.remat,
        optimizer=config,
        beside=tuple(beside.values()),
        eval_rows=config.eval_batch,
    )


def _new_adapters(config: TrainConfig) -> LoraConfig | None:
    """The config of new adapters, None if there are none; InputError for one out of range."""
    if not config.lora_rank:
        return None
    return LoraConfig(
        rank=config.lora_rank,
        alpha=2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        dropout=config.lora_dropout,
        rslora=config.rslora,
        **({"targets": config.lora_targets} if config.lora_targets else {}),
    )


def _adapters(
    config: TrainConfig, new: LoraConfig | None, checkpoint: Path, model: ModelConfig
) -> LoraConfig | None:
    """The adapters' config, new or continued; InputError if the model cannot have them."""
    if new is not None and is_adapter(checkpoint):
        raise InputError(
            f"--model {config.model} is an adapter itself; train it further with "
            f"--continue-adapter, or merge it first: w2s convert {config.model} TARGET"
        )
    lora = new
    if config.continue_adapter:
        lora = replace(load_factors(checkpoint, model)[0], dropout=config.lora_dropout)
    if lora is not None and lora.rank > model.width:
        raise InputError(
            f"--lora-rank {lora.rank} is more than the width {model.width} of "
            f"{config.model}, and no projection's rank is higher than that"
        )
    return lora


def _check_output(setup: Setup) -> None:
    """Raise InputError if the model to write would replace one that is read."""
    target = setup.directory / MODEL
    read = [setup.checkpoint, *setup.frozen_folders.values()]
    read += [base_folder(folder) for folder in read if is_adapter(folder)]
    for folder in read:
        if target.expanduser().resolve() == folder.resolve():
            raise InputError(
                f"--output {target.parent}: its {MODEL}/ would replace {folder}, which is read "
                "from; name another folder"
            )
    if setup.policy.lora is not None and any(target.glob("model*.safetensors")):
        raise InputError(
            f"{target} holds a whole model, beside which no adapter is read; remove it, or name "
            "another --output"
        )


def frozen_configs(setup: Setup) -> dict[str, ModelConfig]:
    """The configs of the frozen models that a step reads, by role."""
    frozen = {} if setup.policy.lora is None else {BASE: setup.model}
    if setup.objective.live and own_reference(setup):
        frozen[REFERENCE] = setup.model
    folders = setup.frozen_folders
    if not setup.objective.live:
        folders.pop(REFERENCE, None)
    return frozen | {role: load_config(folder) for role, folder in folders.items()}


def own_reference(setup: Setup) -> bool:
    """Whether a live reference has weights of its own; new adapters start equal to their base."""
    named = REFERENCE in setup.objective.frozen
    return named or setup.config.continue_adapter or setup.policy.lora is None
