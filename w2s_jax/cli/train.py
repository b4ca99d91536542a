"""What the training commands share: from their flags to a trained checkpoint in a run's folder."""

import functools
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tyro.conf import arg

from w2s_jax.cli.multihost_launch import Hosts
from w2s_jax.cli.saving import MODEL, save_run, tell_data
from w2s_jax.cli.train_flags import (
    DataFlags,
    LoraFlags,
    OptimizationFlags,
    RunFlags,
    Setup,
    check_length,
)
from w2s_jax.errors import InputError, check_fields
from w2s_jax.hosts import is_first

if TYPE_CHECKING:
    from w2s_jax.models.config import ModelConfig
    from w2s_jax.models.model import Model
    from w2s_jax.plan.training import TrainingShapes
    from w2s_jax.text.batches import Part
    from w2s_jax.text.token_rows import Data
    from w2s_jax.text.training_data import DataConfig
    from w2s_jax.train.loop import LoopConfig
    from w2s_jax.train.objectives import Policy
    from w2s_jax.train.run import RunConfig, Source, Task
    from w2s_jax.train.step import LossFunction, TrainState
    from w2s_jax.train.watch import Sink

    Rows = Data | Part

DEFAULT_LENGTH = 1024
# What an identity holds by content, what changes no number, and what a run may go on without.
_NOT_IN_IDENTITY = {
    "model", "data", "split", "eval_data", "eval_split", "cache", "mesh", "reference", "tuned",
    "untuned", "hosts", "accumulate", "remat", "epochs", "max_steps",
}  # fmt: skip
# Where a host finds or puts things.
_OWN_TO_A_HOST = {
    "hosts", "model", "data", "eval_data", "cache", "output", "config", "reference", "tuned",
    "untuned",
}  # fmt: skip
ADAPTER_PEAK = 10
"""How much higher the learning rate of adapters is by default, as in TRL's documentation."""


@dataclass(frozen=True, kw_only=True)
class Training(DataFlags, OptimizationFlags, LoraFlags, RunFlags, Hosts):
    """A command that trains a model; subclasses say on what, and by which loss."""

    model: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """Checkpoint that is trained: a folder, or an id on the Hugging Face hub."""
    from_scratch: bool = False
    """Take the config and the tokenizer of --model alone, and train from random weights."""

    name: ClassVar[str] = "train"
    peak: ClassVar[float] = 2e-5

    def run(self) -> None:
        """Train, going on from what the folder holds, and write the model.

        Raises InputError, before any weight is read, for what is wrong with flags and data.
        """
        from w2s_jax.exchange import agree, check_shared
        from w2s_jax.models.lora_huggingface import base_folder
        from w2s_jax.ops.meshes import check_batch
        from w2s_jax.plan.meshes import name_of
        from w2s_jax.text.journal import locked
        from w2s_jax.text.rows import write_whole
        from w2s_jax.train.export import Record, write_record
        from w2s_jax.train.records import MESH, METRICS
        from w2s_jax.train.reference import weights_identity
        from w2s_jax.train.run import fine_tune, number_of_steps

        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        setup = self.prepare()
        if self.estimate:
            self.show_estimate(setup)
            return
        run = self.run_config(setup)
        check_batch(run.batch_size, run.accumulate, setup.mesh, flag="--batch-size")
        check_batch(run.eval_batch, 1, setup.mesh, flag="--eval-batch-size")
        data, held_out = self.read(setup)
        number_of_steps(run, data)
        check_shared(setup.directory)
        if is_first():
            with locked(setup.directory / METRICS):
                pass  # no other run's now; the loop holds it from its first step on
        agree("run", self.alike(data, held_out))
        model = self.load(setup)
        task = self.task(setup, model, data, held_out)
        params = self.start(setup, model)
        identity = self.identity(setup, task)
        agree("run", identity)
        if is_first():
            write_whole(setup.directory / MESH, [name_of(setup.mesh).encode(), b"\n"])
            weights = None if self.from_scratch else str(identity["model"])
            if self.continue_adapter:
                weights = weights_identity(base_folder(setup.checkpoint))
            write_record(setup.directory, Record(self.base_name, weights, setup.policy.lora))
        state = fine_tune(
            task,
            params,
            run,
            self.loop_config,
            setup.directory,
            mesh=setup.mesh,
            identity=identity,
            sinks=self.sinks(),
            sample=self.sampler(setup, task),
        )
        self.save(setup, task, state)

    def alike(self, data: "Rows", held_out: "Rows | None") -> dict[str, Any]:
        """What hosts must have alike before they do anything together: examples, and most flags."""
        names = {item.name for item in fields(self)} - _OWN_TO_A_HOST
        held = {"examples": data.identity, "held out": held_out and held_out.identity}
        return {name: getattr(self, name) for name in names} | held

    def load_data(self, config: "DataConfig", tokenizer: Any) -> "Data":
        """The examples of these files, tokenised."""
        raise NotImplementedError

    def objective(self, policy: "Policy") -> "LossFunction":
        """The loss that is trained."""
        raise NotImplementedError

    def frozen(self, setup: Setup, model: "Model") -> "dict[str, Model]":
        """The models that the loss reads and does not change."""
        from w2s_jax.train.objectives import BASE

        return {} if setup.policy.lora is None else {BASE: model}

    def referenced(
        self, setup: Setup, model: "Model", data: "Rows", held_out: "Rows | None"
    ) -> "tuple[Source, Source | None]":
        """The examples with whatever a frozen model says of them before training."""
        return data, held_out

    def check(self) -> None:
        """Raises InputError for flags that do not go together."""
        from w2s_jax.train.watch import check_installed

        check_fields(self)
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise InputError(f"--learning-rate {self.learning_rate} must be above 0")
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
        self.loop_config(steps=1)
        for asked, needed in ((self.tensorboard, "tensorboardX"), (self.wandb, "wandb")):
            if asked:
                check_installed(needed)

    def prepare(self) -> Setup:
        """Read the flags, the model's config and its tokenizer; InputError for what is wrong."""
        from w2s_jax.models.huggingface import is_adapter, locate
        from w2s_jax.models.load import load_config
        from w2s_jax.models.lora_huggingface import load_factors
        from w2s_jax.ops.meshes import mesh_of
        from w2s_jax.ops.sharding import Placement
        from w2s_jax.plan.meshes import choose_mesh
        from w2s_jax.text.tokenizer import load_tokenizer
        from w2s_jax.train.objectives import Policy
        from w2s_jax.train.records import mesh_before

        self.check()
        if self.model is None:
            raise InputError("--model is missing: the checkpoint to train")
        if not self.data and not self.estimate:
            raise InputError("--data is missing: a file of examples, or an id on the hub")
        lora = self.lora()
        if self.from_scratch and (lora is not None or self.continue_adapter):
            raise InputError("adapters stand beside a trained model; leave out --from-scratch")
        checkpoint = locate(self.model)
        config = load_config(checkpoint)
        if lora is not None and is_adapter(checkpoint):
            raise InputError(
                f"--model {self.model} is an adapter itself; train it further with "
                f"--continue-adapter, or merge it first: w2s convert {self.model} TARGET"
            )
        if self.continue_adapter:
            lora = replace(load_factors(checkpoint, config)[0], dropout=self.lora_dropout)
        if lora is not None and lora.rank > config.width:
            raise InputError(
                f"--lora-rank {lora.rank} is more than the width {config.width} of {self.model}, "
                "and no projection's rank is higher than that"
            )
        length = self.max_length
        if length is None:
            length = min(DEFAULT_LENGTH, config.max_positions)
        check_length(length, config, self.model)
        directory = Path(self.output or f"runs/{self.name}")
        self.check_not_read_from(directory / MODEL, checkpoint)
        if lora is not None and any((directory / MODEL).glob("model*.safetensors")):
            raise InputError(
                f"{directory / MODEL} holds a whole model, beside which no adapter is read; remove "
                "it, or name another --output"
            )
        setup = Setup(
            checkpoint=checkpoint,
            config=config,
            tokenizer=load_tokenizer(checkpoint),
            policy=Policy(config, lora, self.remat),
            length=length,
            mesh=None,
            directory=directory,
            cache_folder=Path(self.cache).expanduser() if self.cache else None,
        )
        before = functools.partial(mesh_before, directory)
        mesh = mesh_of(self.mesh, lambda: choose_mesh(self.shapes(setup)), before=before)
        return replace(setup, policy=replace(setup.policy, placement=Placement(mesh)), mesh=mesh)

    def check_not_read_from(self, target: Path, checkpoint: Path) -> None:
        """Raises InputError where writing to `target` would replace a checkpoint that is read."""
        from w2s_jax.models.huggingface import is_adapter
        from w2s_jax.models.lora_huggingface import base_folder

        read = [checkpoint, *self.frozen_folders().values()]
        read += [base_folder(folder) for folder in read if is_adapter(folder)]
        for folder in read:
            if target.expanduser().resolve() == folder.resolve():
                raise InputError(
                    f"--output {target.parent}: its {MODEL}/ would replace {folder}, which is read "
                    "from; name another folder"
                )

    def show_estimate(self, setup: Setup) -> None:
        """Print what a step takes of each device's memory."""
        from rich.console import Console

        from w2s_jax.models.lora import abstract_adapter
        from w2s_jax.ops.meshes import check_batch
        from w2s_jax.train.estimate import (
            abstract_batch,
            abstract_on_mesh,
            estimate_step,
            report,
        )
        from w2s_jax.train.optimizers import make_optimizer

        check_batch(self.batch_size, self.accumulate, setup.mesh, flag="--batch-size")
        run = self.run_config(setup)
        shape: dict[str, Any] = {"scan_layers": self.scan_layers, "mesh": setup.mesh}
        params = abstract_on_mesh(setup.config, **shape).params
        if setup.policy.lora is not None:
            params = abstract_adapter(setup.config, setup.policy.lora, **shape)
        frozen = {
            role: abstract_on_mesh(config, dtype=self.compute_dtype, **shape)
            for role, config in self.frozen_configs(setup).items()
        }
        estimate = estimate_step(
            self.objective(setup.policy),
            make_optimizer(run.optimizer, self.max_steps or 1000),
            params,
            abstract_batch(self.batch_shapes(setup), setup.mesh),
            frozen=frozen,
            accumulate=run.accumulate,
            compute_dtype=run.compute_dtype,
            mesh=setup.mesh,
        )
        report(Console(), estimate)

    def frozen_configs(self, setup: Setup) -> "dict[str, ModelConfig]":
        """The shapes of what `frozen` holds."""
        from w2s_jax.train.objectives import BASE

        return {} if setup.policy.lora is None else {BASE: setup.config}

    def shapes(self, setup: Setup) -> "TrainingShapes":
        """The shapes of a step, and of the models that it reads beside."""
        from w2s_jax.models.load import load_config
        from w2s_jax.plan.training import TrainingShapes
        from w2s_jax.train.objectives import BASE

        run = self.run_config(setup)
        ((rows, *sides), _) = self.batch_shapes(setup)["tokens"]
        beside = {name: load_config(folder) for name, folder in self.frozen_folders().items()}
        beside |= self.frozen_configs(setup)
        beside.pop(BASE, None)
        return TrainingShapes(
            model=setup.config,
            objective="dpo" if len(sides) > 1 else "sft",
            rows=rows,
            length=setup.length,
            accumulate=run.accumulate,
            lora=setup.policy.lora,
            dtype=self.compute_dtype,
            remat=self.remat,
            optimizer=run.optimizer,
            beside=tuple(beside.values()),
            eval_rows=run.eval_batch,
        )

    def batch_shapes(self, setup: Setup) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shapes and dtypes of a batch of the longest rows."""
        rows = (self.batch_size, setup.length)
        return {"tokens": (rows, "int32"), "segments": (rows, "int32"), "targets": (rows, "bool")}

    def data_config(self, files: tuple[str, ...], split: str, setup: Setup) -> "DataConfig":
        """How these files become tokens."""
        from w2s_jax.text.training_data import DataConfig

        return DataConfig(
            data=files,
            split=split,
            format=self.format,
            columns=self.columns,
            template=self.template,
            max_length=setup.length,
            truncation=self.truncation,
            append_eos=self.append_eos,
            equal_pairs=self.equal_pairs,
            shuffle=self.shuffle,
            seed=self.seed,
            limit=self.limit,
            cache=str(setup.cache),
            **self.data_options(),
        )

    def data_options(self) -> dict[str, Any]:
        """Further fields of a DataConfig."""
        return {}

    def read(self, setup: Setup) -> "tuple[Rows, Rows | None]":
        """The examples to train on, and those held out; a line about each on stderr."""
        from w2s_jax.text.batches import hold_out

        if self.held_out and self.eval_data:
            raise InputError("--held-out and --eval-data both name what to evaluate on; give one")
        data = self.load_data(self.data_config(self.data, self.split, setup), setup.tokenizer)
        data = data.fitting(setup.config.vocab_size)
        tell_data("data", data)
        if self.held_out:
            return hold_out(data, self.held_out, seed=self.seed)
        if not self.eval_data:
            return data, None
        config = replace(self.data_config(self.eval_data, self.eval_split, setup), limit=None)
        held_out = self.load_data(config, setup.tokenizer).fitting(setup.config.vocab_size)
        tell_data("held out", held_out)
        return data, held_out

    def load(self, setup: Setup) -> "Model":
        """The model to start from: float32 where all of it is trained."""
        import jax

        from w2s_jax.models.load import load_model
        from w2s_jax.models.model import init_model, shard_model

        if self.from_scratch:
            key = jax.random.key(self.seed)
            model = init_model(setup.config, key, scan_layers=self.scan_layers)
            return model if setup.mesh is None else shard_model(model, setup.mesh)
        dtype = "float32" if setup.policy.lora is None else self.compute_dtype
        place = self.base_name if self.continue_adapter else setup.checkpoint
        return load_model(place, dtype=dtype, mesh=setup.mesh, scan_layers=self.scan_layers)

    def start(self, setup: Setup, model: "Model") -> Any:
        """What is trained as it is before the first step."""
        from w2s_jax.models.lora_huggingface import load_factors
        from w2s_jax.train.run import trainable

        if not self.continue_adapter:
            return trainable(setup.policy, model, seed=self.seed, mesh=setup.mesh)
        options: dict[str, Any] = {"mesh": setup.mesh, "scan_layers": self.scan_layers}
        return load_factors(setup.checkpoint, setup.config, **options)[1]

    @property
    def compute_dtype(self) -> str:
        """What the model computes in."""
        import jax

        if self.dtype != "auto":
            return self.dtype
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"

    def task(self, setup: Setup, model: "Model", data: "Rows", held_out: "Rows | None") -> "Task":
        """What is trained, on what, by which loss."""
        from w2s_jax.train.run import Task

        sources = self.referenced(setup, model, data, held_out)
        frozen = self.frozen(setup, model)
        return Task(setup.policy, self.objective(setup.policy), *sources, frozen)

    def run_config(self, setup: Setup) -> "RunConfig":
        """The run's config; InputError for values out of range."""
        from w2s_jax.train.optimizers import OptimizerConfig
        from w2s_jax.train.run import RunConfig

        peak = self.peak * (1 if setup.policy.lora is None else ADAPTER_PEAK)
        optimizer = OptimizerConfig(
            name=self.optimizer,
            learning_rate=peak if self.learning_rate is None else self.learning_rate,
            schedule=self.schedule,
            warmup=self.warmup,
            decay=self.decay,
            final=self.final,
            weight_decay=self.weight_decay,
            b1=self.b1,
            b2=self.b2,
            max_grad_norm=self.max_grad_norm or None,
            muon_learning_rate=self.muon_learning_rate,
        )
        compute = None if self.compute_dtype == "float32" else self.compute_dtype
        return RunConfig(
            optimizer=optimizer,
            epochs=self.epochs,
            steps=self.max_steps,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            eval_batch_size=self.eval_batch_size,
            compute_dtype=compute,
            shuffle=self.shuffle,
            seed=self.seed,
        )

    def identity(self, setup: Setup, task: "Task") -> dict[str, Any]:
        """What a run depends on: a folder that holds another run is not gone on with."""
        from w2s_jax.train.checkpoint import FILES, FREE
        from w2s_jax.train.reference import file_digests, weights_identity
        from w2s_jax.train.run import number_of_steps

        told = {item.name for item in fields(RunFlags)} | _NOT_IN_IDENTITY
        options = {
            item.name: getattr(self, item.name) for item in fields(self) if item.name not in told
        }
        weights = None if self.from_scratch else weights_identity(setup.checkpoint)
        return {
            "command": self.name,
            **options,
            "model": weights or asdict(setup.config),
            "data": task.data.identity,
            "eval_data": task.held_out and task.held_out.identity,
            "frozen": {
                name: weights_identity(folder) for name, folder in self.frozen_folders().items()
            },
            FREE: {
                "accumulate": self.accumulate,
                "remat": self.remat,
                "steps": number_of_steps(self.run_config(setup), task.data),
            },
            FILES: {"data": file_digests(self.data), "eval_data": file_digests(self.eval_data)},
        }

    def frozen_folders(self) -> dict[str, Path]:
        """Where the models lie that the loss reads, beside --model."""
        return {}

    def loop_config(self, steps: int) -> "LoopConfig":
        """How often a run of so many steps tells, evaluates and saves."""
        from w2s_jax.train.loop import LoopConfig

        return LoopConfig(
            steps=steps,
            log_every=self.log_every,
            eval_every=self.eval_every,
            save_every=self.save_every,
            save_seconds=self.save_seconds,
            keep_last=self.keep_last,
            keep_best=self.keep_best,
            sample_every=self.sample_every,
        )

    def sinks(self) -> "tuple[Sink, ...]":
        """Where metrics go beside metrics.jsonl."""
        from w2s_jax.train import watch

        found: list[Sink] = [watch.tensorboard] if self.tensorboard else []
        if self.wandb:
            found.append(watch.wandb(self.wandb, config=asdict(self)))
        return tuple(found)

    def sampler(
        self, setup: Setup, task: "Task"
    ) -> "Callable[[TrainState], list[dict[str, Any]]] | None":
        """What answers the first held-out prompts with the model as it is, if asked for."""
        if not self.sample_every:
            return None
        from w2s_jax.cli.samples import Sampler

        data = task.data if task.held_out is None else task.held_out
        return Sampler(task, setup.tokenizer, data, self.sample_prompts, self.compute_dtype)

    @property
    def base_name(self) -> str:
        """How an adapter names its base: a hub id, or the folder's full path."""
        from w2s_jax.models.lora_huggingface import base_of

        name = base_of(str(self.model)) if self.continue_adapter else str(self.model)
        folder = Path(name).expanduser()
        return str(folder.resolve() if folder.is_dir() else name)

    def save(self, setup: Setup, task: "Task", state: "TrainState") -> None:
        """Write the trained model, or its adapter, with the tokenizer, into the run's folder."""
        save_run(
            setup.directory,
            task,
            state,
            self.run_config(setup),
            base=self.base_name,
            start=functools.partial(self.load, setup),
            best=self.keep_best,
            dtype=self.save_dtype,
            tokenizer=setup.tokenizer,
            mesh=setup.mesh,
        )
