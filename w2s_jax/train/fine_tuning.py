"""`sft` and `dpo`: from settings to a trained checkpoint in a run's folder.

What tells the two apart is an `Objective`; everything else is the same way for both: read flags and
configs, then data, then weights, agree with the other hosts, train, write the model.
"""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.distributed import agree, check_shared, is_first
from w2s_jax.errors import InputError
from w2s_jax.models.huggingface import locate
from w2s_jax.models.load import load_adapted, load_model
from w2s_jax.models.lora import abstract_adapter
from w2s_jax.models.model import Model, init_model, shard_model
from w2s_jax.models.peft import base_folder, load_factors, save_adapter
from w2s_jax.models.save import save_model
from w2s_jax.ops.logits import Sampling
from w2s_jax.ops.meshes import check_batch, name_of
from w2s_jax.search.config import sample
from w2s_jax.search.run import search
from w2s_jax.text import training_data
from w2s_jax.text.batches import Data, Part, hold_out
from w2s_jax.text.rows import locked, write_whole
from w2s_jax.text.tokenizer import load_tokenizer, same_vocabulary
from w2s_jax.train import watch
from w2s_jax.train.checkpoint import FILES, FREE, best_step, read_checkpoint
from w2s_jax.train.config import DPOConfig, LoopConfig, SFTConfig, TrainConfig
from w2s_jax.train.estimate import Estimate, abstract_batch, abstract_on_mesh, estimate_step
from w2s_jax.train.export import Record, Rounding, measure_rounding, rounded, write_record
from w2s_jax.train.loop import CHECKPOINTS
from w2s_jax.train.objectives import BASE, REFERENCE, TUNED, UNTUNED
from w2s_jax.train.reference import Referenced, cached_logprobs, file_digests, weights_identity
from w2s_jax.train.run import Source, Task, evaluation, fine_tune, number_of_steps, trainable
from w2s_jax.train.setup import MODEL, ChooseMesh, Setup, frozen_configs, own_reference, prepare
from w2s_jax.train.step import TrainState, cast, make_optimizer, narrow
from w2s_jax.train.watch import MESH, METRICS

Rows = Data | Part

# What an identity holds by content, what changes no number, and what a run may go on without.
_NOT_IN_IDENTITY = {
    "model", "data", "split", "eval_data", "eval_split", "cache", "mesh", "reference", "tuned",
    "untuned", "accumulate", "remat", "epochs", "max_steps", "hosts", "output", "save_dtype",
    "eval_batch_size", "sample_prompts", "tensorboard", "wandb", "estimate", "config",
} | {item.name for item in dataclasses.fields(LoopConfig)}  # fmt: skip
# Where a host finds or puts things.
_OWN_TO_A_HOST = {
    "hosts", "model", "data", "eval_data", "cache", "output", "config", "reference", "tuned",
    "untuned",
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What a training wrote.

    Attributes:
      folder: the run's own; its model lies in `model`.
      step: the step of that model: the last, or the best one that was asked for.
      rounding: what another dtype than float32 loses of the training, where the model has one.
      measured: the evaluation with float32 weights and with those written, where there was one.
    """

    folder: Path
    step: int
    rounding: Rounding | None = None
    measured: tuple[Mapping[str, float], Mapping[str, float]] | None = None

    @property
    def model(self) -> Path:
        """Folder of the trained model, or adapter."""
        return self.folder / MODEL


def sft(config: SFTConfig, *, choose_mesh: ChooseMesh | None = None) -> Trained:
    """Fine-tune a model on texts, prompts with completions, or conversations.

    Goes on from what the run's folder holds. Lines on the data go to stderr.

    Args:
      config: the settings, which are the flags of `w2s sft`.
      choose_mesh: picks the mesh for `mesh="auto"`, as `w2s_jax.plan.meshes.choose_mesh`.

    Returns:
      What was written, and where.

    Raises:
      InputError: before any weight is read, for what is wrong with settings and data.
      Preempted: a signal asked the run to stop; it is saved, and the same call goes on.
      Diverged: the loss or a gradient is not finite.
    """
    return _train(config, choose_mesh)


def dpo(config: DPOConfig, *, choose_mesh: ChooseMesh | None = None) -> Trained:
    """Tune a model on preferences, by DPO, its relatives, KTO or WSPO; else as `sft`."""
    return _train(config, choose_mesh)


def estimate_memory(config: TrainConfig, *, choose_mesh: ChooseMesh | None = None) -> Estimate:
    """What a step of this training takes of each device's memory; loads nothing.

    Raises:
      InputError: as `sft` does.
    """
    setup = prepare(config, choose_mesh)
    config = setup.config
    check_batch(config.batch_size, config.accumulate, setup.mesh, flag="--batch-size")
    shape: dict[str, Any] = {"scan_layers": config.scan_layers, "mesh": setup.mesh}
    params = abstract_on_mesh(setup.model, **shape).params
    if setup.policy.lora is not None:
        params = abstract_adapter(setup.model, setup.policy.lora, **shape)
    frozen = {
        role: abstract_on_mesh(model, dtype=setup.dtype, **shape)
        for role, model in frozen_configs(setup).items()
    }
    return estimate_step(
        setup.objective.loss(setup.policy),
        make_optimizer(config, config.max_steps or 1000),
        params,
        abstract_batch(setup.objective.batch(config.batch_size, setup.length), setup.mesh),
        frozen=frozen,
        accumulate=config.accumulate,
        compute_dtype=narrow(config.dtype),
        mesh=setup.mesh,
    )


def _train(config: TrainConfig, choose_mesh: ChooseMesh | None) -> Trained:
    setup = prepare(config, choose_mesh)
    resolved = setup.config
    check_batch(resolved.batch_size, resolved.accumulate, setup.mesh, flag="--batch-size")
    check_batch(resolved.eval_batch, 1, setup.mesh, flag="--eval-batch-size")
    data, held_out = _read(setup)
    number_of_steps(resolved, data)
    check_shared(setup.directory)
    if is_first():
        with locked(setup.directory / METRICS):
            pass  # no other run's now; the loop holds it from its first step on
    agree("run", _alike(config, data, held_out))
    model = _load(setup)
    sources = _referenced(setup, model, data, held_out)
    frozen = _frozen(setup, model)
    task = Task(setup.policy, setup.objective.loss(setup.policy), *sources, frozen)
    params = _start(setup, model)
    identity = _identity(config, setup, task)
    agree("run", identity)
    if is_first():
        _write_begin(setup, str(identity["model"]))
    sampler = None
    if config.sample_every:
        shown = task.data if task.held_out is None else task.held_out
        sampler = Sampler(task, setup.tokenizer, shown, config.sample_prompts, setup.dtype)
    sinks: list[watch.Sink] = [watch.tensorboard] if config.tensorboard else []
    if config.wandb:
        sinks.append(watch.wandb(config.wandb, config=dataclasses.asdict(config)))
    del model
    state = fine_tune(
        task,
        params,
        resolved,
        resolved,
        setup.directory,
        mesh=setup.mesh,
        identity=identity,
        sinks=sinks,
        sample=sampler,
    )
    return _save(setup, task, state)


def _read(setup: Setup) -> tuple[Rows, Rows | None]:
    """The examples to train on, and those held out; a line about each on stderr."""
    config = setup.config
    data: Rows = _read_files(setup, "data", config.data, config.split, config.limit)
    held_out: Rows | None = None
    if config.held_out:
        data, held_out = hold_out(data, config.held_out, seed=config.seed)
    elif config.eval_data:
        held_out = _read_files(setup, "held out", config.eval_data, config.eval_split, None)
    if "labels" in setup.objective.columns and held_out is not None and len(held_out) == 1:
        raise InputError("--loss-type kto pairs responses, and only one is held out; take more")
    return data, held_out


def _read_files(
    setup: Setup, what: str, files: tuple[str, ...], split: str, limit: int | None
) -> Data:
    config = setup.config
    names = (
        "format", "columns", "template", "max_length", "truncation", "append_eos", "equal_pairs",
        "shuffle", "seed",
    )  # fmt: skip
    shared = {name: getattr(config, name) for name in names}
    settings = training_data.DataConfig(
        data=files,
        split=split,
        limit=limit,
        cache=str(setup.cache),
        **shared,
        **setup.objective.options,
    )
    data = setup.objective.load(settings, setup.tokenizer).fitting(setup.model.vocab_size)
    figures = data.figures
    told = [f"{what}: {len(data):,} rows", f"{figures['tokens']:,} tokens"]
    told.append(f"{figures['targets']:,} of them count in the loss")
    others = {name: name for name in ("truncated", "dropped", "equal")}
    others["undesirable"] = "undesirable rows left out"
    told += [f"{figures[name]:,} {words}" for name, words in others.items() if figures.get(name)]
    sys.stderr.write(", ".join(told) + "\n")
    return data


def _alike(config: TrainConfig, data: Rows, held_out: Rows | None) -> dict[str, Any]:
    """What hosts must have alike before they do anything together: examples, and most flags."""
    names = {item.name for item in dataclasses.fields(config)} - _OWN_TO_A_HOST
    examples = {"examples": data.identity, "held out": held_out and held_out.identity}
    return {name: getattr(config, name) for name in names} | examples


def _identity(config: TrainConfig, setup: Setup, task: Task) -> dict[str, Any]:
    """What a run depends on: a folder that holds another run is not gone on with."""
    options = {
        item.name: getattr(config, item.name)
        for item in dataclasses.fields(config)
        if item.name not in _NOT_IN_IDENTITY
    }
    weights = None if config.from_scratch else weights_identity(setup.checkpoint)
    frozen = {name: weights_identity(folder) for name, folder in setup.frozen_folders.items()}
    return {
        "command": setup.objective.name,
        **options,
        "model": weights or dataclasses.asdict(setup.model),
        "data": task.data.identity,
        "eval_data": task.held_out and task.held_out.identity,
        "frozen": frozen,
        FREE: {
            "accumulate": config.accumulate,
            "remat": config.remat,
            "steps": number_of_steps(config, task.data),
        },
        FILES: {"data": file_digests(config.data), "eval_data": file_digests(config.eval_data)},
    }


def _write_begin(setup: Setup, weights: str | None) -> None:
    """Say in the run's folder what is trained there, and on which mesh."""
    write_whole(setup.directory / MESH, [name_of(setup.mesh).encode(), b"\n"])
    if setup.config.from_scratch:
        weights = None
    if setup.config.continue_adapter:
        weights = weights_identity(base_folder(setup.checkpoint))
    write_record(setup.directory, Record(setup.base_name, weights, setup.policy.lora))


def _load(setup: Setup) -> Model:
    """The model to start from: float32 where all of it is trained."""
    config, mesh = setup.config, setup.mesh
    if config.from_scratch:
        key = jax.random.key(config.seed)
        model = init_model(setup.model, key, scan_layers=config.scan_layers)
        return model if mesh is None else shard_model(model, mesh)
    dtype = "float32" if setup.policy.lora is None else setup.dtype
    place = setup.base_name if config.continue_adapter else setup.checkpoint
    return load_model(place, dtype=dtype, mesh=mesh, scan_layers=config.scan_layers)


def _start(setup: Setup, model: Model) -> Any:
    """What is trained as it is before the first step."""
    config, mesh = setup.config, setup.mesh
    if not config.continue_adapter:
        return trainable(setup.policy, model, seed=config.seed, mesh=mesh)
    return load_factors(setup.checkpoint, setup.model, mesh=mesh, scan_layers=config.scan_layers)[1]


def _frozen(setup: Setup, model: Model) -> dict[str, Model]:
    """The models that the loss reads: the base of adapters, a live reference, a guide."""
    frozen = {} if setup.policy.lora is None else {BASE: model}
    if setup.objective.live and own_reference(setup):
        start = model
        if setup.policy.lora is None and REFERENCE not in setup.objective.frozen:
            # The arrays of a model that is trained are given up in the first step.
            start = Model(model.config, jax.tree.map(jnp.copy, model.params))
        frozen[REFERENCE] = _reference(setup, start)
    for role in (TUNED, UNTUNED):
        if role in setup.objective.frozen:
            frozen[role] = _other_model(setup, role)
    return frozen


def _reference(setup: Setup, model: Model) -> Model:
    """The reference in the dtype that is computed in: the one named, or the model as it is."""
    if REFERENCE in setup.objective.frozen:
        return _other_model(setup, REFERENCE)
    if setup.config.continue_adapter:
        return load_adapted(setup.checkpoint, model, merged=False, mesh=setup.mesh)
    return Model(model.config, cast(model.params, setup.dtype))


def _other_model(setup: Setup, role: str) -> Model:
    """A frozen model that reads the same tokens; InputError where its vocabulary differs."""
    path = setup.objective.frozen[role]
    folder = locate(path)
    if not same_vocabulary(setup.tokenizer, load_tokenizer(folder)):
        raise InputError(
            f"--{role} {path} has another vocabulary than --model {setup.config.model}; losses "
            "compare the log-probs of the same tokens"
        )
    model = load_model(folder, dtype=setup.dtype, mesh=setup.mesh)
    if model.config.max_positions < setup.length:
        raise InputError(
            f"--{role} {path} has {model.config.max_positions} positions, fewer than "
            f"--max-length {setup.length}"
        )
    return model


def _referenced(
    setup: Setup, model: Model, data: Rows, held_out: Rows | None
) -> tuple[Source, Source | None]:
    """The examples with the reference's log-probs, where those are computed before training."""
    if setup.objective.reference != "precomputed":
        return data, held_out
    config = setup.config
    reference = _reference(setup, model)
    named = setup.objective.frozen.get(REFERENCE)
    identity = weights_identity(setup.checkpoint if named is None else locate(named))
    if config.from_scratch:
        identity = f"{setup.model!r} {config.seed}"

    def with_logprobs(source: Rows) -> Source:
        found = cached_logprobs(
            reference,
            source,
            rows=config.eval_batch,
            cache=setup.cache,
            identity=f"{identity} {setup.dtype}",
            mesh=setup.mesh,
        )
        return Referenced(source, found)

    return with_logprobs(data), None if held_out is None else with_logprobs(held_out)


def _save(setup: Setup, task: Task, state: TrainState) -> Trained:
    """Write the trained model, or its adapter, with the tokenizer, into the run's folder."""
    best = setup.config.keep_best
    checkpoints = setup.directory / CHECKPOINTS
    if best is not None and best_step(checkpoints) is None:
        sys.stderr.write(f"no evaluation gave a number for {best}: the last step is written\n")
    elif best is not None:
        state = read_checkpoint(checkpoints, state, best=True)
    trained = Trained(setup.directory, int(state.step))
    params, policy, tokenizer = state.params, task.policy, setup.tokenizer
    if policy.lora is not None:
        base = setup.base_name
        lora = policy.lora
        save_adapter(trained.model, policy.config, lora, params, base=base, tokenizer=tokenizer)
        return trained
    if setup.config.save_dtype != "float32":
        params, trained = _rounded(setup, task, state, trained)
    save_model(Model(policy.config, params), trained.model, tokenizer=tokenizer)
    return trained


def _rounded(setup: Setup, task: Task, state: TrainState, trained: Trained) -> tuple[Any, Trained]:
    """The parameters in another dtype, and with what that loses of the training.

    As they are, with a line, where that dtype does not reach far enough.
    """
    dtype = setup.config.save_dtype
    try:
        params = rounded(state.params, dtype)
    except InputError as error:
        sys.stderr.write(f"--save-dtype: {error}; float32 is written\n")
        return state.params, trained
    rounding = measure_rounding(_load(setup).params, state.params, dtype)
    measured = None
    if task.held_out is not None:
        evaluate = evaluation(task, setup.config, setup.mesh)
        before = evaluate(state)
        # As float32 again, which the program for it is compiled for.
        measured = before, evaluate(state._replace(params=cast(params, "float32")))
    return params, replace(trained, rounding=rounding, measured=measured)


NEW_TOKENS = 64
OPENING = 8
"""Where a row has no prompt, so many of its first tokens stand for one."""


@dataclass(frozen=True)
class Sampler:
    """Answers the first `prompts` prompts of `data` with the model of a state, at temperature 0.7.

    The draws are the same for every state, so that what changes is the model.
    """

    task: Task
    tokenizer: Any
    data: Source
    prompts: int
    dtype: str

    def __call__(self, state: TrainState) -> list[dict[str, Any]]:
        """Rows of `prompt` and `response`."""
        ids = prompts_of(self.data, self.prompts)
        room = self.task.policy.config.max_positions - max(map(len, ids))
        settings = sample(
            1, sampling=Sampling(0.7), max_new_tokens=min(NEW_TOKENS, room), slots=len(ids)
        )
        params, frozen = cast((state.params, dict(self.task.frozen)), self.dtype)
        model = self.task.policy.model(params, frozen)
        decode = self.tokenizer.decode
        return [
            {
                "prompt": decode(prompt),
                "response": decode(list(result.best.tokens), skip_special_tokens=True),
            }
            for prompt, result in zip(ids, search(model, None, ids, settings), strict=True)
        ]


def prompts_of(data: Source, count: int) -> list[list[int]]:
    """What stands before the first target of each of the first rows, as token ids."""
    found = []
    for index in range(min(count, len(data))):
        batch = data.at([index])
        shape = (-1, batch["tokens"].shape[-1])
        tokens, targets = (batch[name].reshape(shape)[0] for name in ("tokens", "targets"))
        first = int(np.argmax(targets)) if targets.any() else 0
        found.append([int(token) for token in tokens[: first if first > 1 else OPENING]])
    return jax.tree.map(int, found)
