"""`sft` and `dpo`: from settings to a trained checkpoint in a run's folder.

An `Objective` is what distinguishes the two. Both go through the same steps: read flags and
configs, then data, then weights, agree with the other hosts, train, and write the model.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.distributed import agree, check_shared, is_first
from w2s_jax.errors import InputError
from w2s_jax.models.huggingface import locate
from w2s_jax.models.load import load_adapted, load_model
from w2s_jax.models.lora import abstract_adapter, init_adapter, shard_adapter
from w2s_jax.models.model import Model, abstract_model, init_model, shard_model
from w2s_jax.models.peft import base_folder, load_factors, save_adapter
from w2s_jax.models.save import save_model
from w2s_jax.ops.logits import Sampling
from w2s_jax.ops.meshes import check_batch, name_of
from w2s_jax.search.config import sample
from w2s_jax.search.run import search
from w2s_jax.text import training_data
from w2s_jax.text.batches import Batches, Data, hold_out
from w2s_jax.text.rows import locked, write_whole
from w2s_jax.text.tokenizer import load_tokenizer, same_vocabulary
from w2s_jax.train import watch
from w2s_jax.train.checkpoint import FILES, FREE, best_step, read_checkpoint
from w2s_jax.train.config import DPOConfig, LoopConfig, SFTConfig, TrainConfig
from w2s_jax.train.estimate import Estimate, abstract_batch, abstract_on_mesh, estimate_step
from w2s_jax.train.export import (
    Record,
    Rounding,
    file_digests,
    measure_rounding,
    rounded,
    weights_identity,
    write_record,
)
from w2s_jax.train.logprobs import REFERENCE, with_reference
from w2s_jax.train.loop import CHECKPOINTS, train
from w2s_jax.train.objectives import BASE, TUNED, UNTUNED, Policy
from w2s_jax.train.setup import MODEL, ChooseMesh, Setup, frozen_configs, own_reference, prepare
from w2s_jax.train.step import (
    Evaluation,
    TrainState,
    cast,
    host_rows,
    init_state,
    make_optimizer,
    make_schedule,
    make_train_step,
    narrow,
    number_of_steps,
    place,
    place_state,
)
from w2s_jax.train.watch import MESH, METRICS

Examples = tuple[Data, Data | None]
"""(examples to train on, held-out examples if any)."""

# Flags that are in the identity by content, that change no result, or that may change on resuming.
_NOT_IN_IDENTITY = {
    "model", "data", "split", "eval_data", "eval_split", "cache", "mesh", "reference", "tuned",
    "untuned", "accumulate", "remat", "epochs", "max_steps", "hosts", "output", "save_dtype",
    "eval_batch_size", "sample_prompts", "tensorboard", "wandb", "estimate", "config",
} | {item.name for item in fields(LoopConfig)}  # fmt: skip
# Flags that may differ between hosts: where a host finds and puts files.
_OWN_TO_A_HOST = {
    "hosts", "model", "data", "eval_data", "cache", "output", "config", "reference", "tuned",
    "untuned",
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What a training wrote.

    Attributes:
        folder: The run's folder; its model lies in `model`.
        step: The step of that model: the last one, or the best one if that was asked for.
        rounding: What is lost of the training in the model's dtype, if that is not float32.
        measured: The evaluation with float32 weights and with the written ones, if there was one.
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

    Resumes from what the run's folder holds. Lines about the data go to stderr.

    Args:
        config: The settings, which are the flags of `w2s sft`.
        choose_mesh: Picks the mesh for `mesh="auto"`, as `w2s_jax.plan.meshes.choose_mesh` does.

    Returns:
        What was written, and where.

    Raises:
        InputError: For wrong settings or data, before any weight is read.
        Preempted: If a signal asked the run to stop. It is saved, and the same call resumes it.
        Diverged: If the loss or a gradient is not finite.
    """
    return _train(config, choose_mesh)


def dpo(config: DPOConfig, *, choose_mesh: ChooseMesh | None = None) -> Trained:
    """Tune a model on preferences, by DPO or a related loss, KTO or WSPO; otherwise as `sft`."""
    return _train(config, choose_mesh)


def estimate_memory(config: TrainConfig, *, choose_mesh: ChooseMesh | None = None) -> Estimate:
    """The memory that a step of this training takes on each device; loads no weights.

    Raises:
        InputError: As `sft` does.
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
    resolved, mesh = setup.config, setup.mesh
    check_batch(resolved.batch_size, resolved.accumulate, mesh, flag="--batch-size")
    check_batch(resolved.eval_batch, 1, mesh, flag="--eval-batch-size")
    data, held_out = _read(setup)
    steps = number_of_steps(resolved, len(data))
    check_shared(setup.directory)
    if is_first():
        with locked(setup.directory / METRICS):
            pass  # fails early if another run holds the lock; the loop takes it for the steps
    agree("run", _alike(config, data, held_out))
    model = _load(setup)
    if setup.objective.reference == "precomputed":
        data, held_out = _with_reference(setup, model, data, held_out)
    frozen = _frozen(setup, model)
    params = _start(setup, model)
    identity = _identity(config, setup, (data, held_out), steps)
    agree("run", identity)
    if is_first():
        _write_begin(setup, str(identity["model"]))
    del model
    loss, dtype = setup.objective.loss(setup.policy), narrow(resolved.dtype)
    evaluate = None
    if held_out is not None:
        evaluate = Evaluation(loss, held_out, frozen, resolved.eval_batch, dtype, mesh)
        if resolved.keep_best is not None:
            _check_best(resolved.keep_best, evaluate.metrics(params))
    sampler = None
    if config.sample_every:
        sampler = _sampler(setup, frozen, data if held_out is None else held_out)
    sinks: list[watch.Sink] = [watch.tensorboard] if config.tensorboard else []
    if config.wandb:
        sinks.append(watch.wandb(config.wandb, config=dataclasses.asdict(config)))
    rows = host_rows(mesh, resolved.batch_size)
    batches = Batches(
        data, resolved.batch_size, resolved.seed, resolved.shuffle, part=(rows.start, rows.stop)
    )
    optimizer = make_optimizer(resolved, steps)
    state = init_state(params, optimizer, jax.random.key(resolved.seed), copy=False)
    state = place_state(state, mesh)
    step = make_train_step(
        loss,
        optimizer,
        accumulate=resolved.accumulate,
        compute_dtype=dtype,
        mesh=mesh,
        like=None if mesh is None else state,
    )
    state = train(
        state,
        step,
        batches,
        steps,
        config=resolved,
        directory=setup.directory,
        frozen=frozen,
        identity=identity,
        evaluate=evaluate,
        sample=sampler,
        names=batches.names,
        schedule=make_schedule(resolved, steps),
        sinks=sinks,
        put=lambda batch: place(batch, mesh, resolved.batch_size),
        flops_per_token=_flops_per_token(setup.policy, params),
    )
    return _save(setup, state, evaluate)


def _read(setup: Setup) -> Examples:
    """The examples to train on and those held out; writes a line about each to stderr."""
    config = setup.config
    data = _read_files(setup, "data", config.data, config.split, config.limit)
    held_out = None
    if config.held_out:
        data, held_out = hold_out(data, config.held_out, seed=config.seed)
    elif config.eval_data:
        held_out = _read_files(setup, "held out", config.eval_data, config.eval_split, None)
    if setup.objective.kind == "labelled" and held_out is not None and len(held_out) == 1:
        raise InputError("--loss-type kto pairs responses, and only one is held out; take more")
    return data, held_out


def _read_files(
    setup: Setup, what: str, files: tuple[str, ...], split: str, limit: int | None
) -> Data:
    names = {item.name for item in fields(training_data.DataConfig)}
    shared = {name: value for name, value in vars(setup.config).items() if name in names}
    own = {"data": files, "split": split, "limit": limit, "cache": str(setup.cache)}
    settings = training_data.DataConfig(**shared | own)
    data = training_data.load(setup.objective.kind, settings, setup.tokenizer)
    data = data.fitting(setup.model.vocab_size)
    figures = data.figures
    told = [f"{what}: {len(data):,} rows", f"{figures['tokens']:,} tokens"]
    told.append(f"{figures['targets']:,} of them count in the loss")
    others = {name: name for name in ("truncated", "dropped", "equal")}
    others["undesirable"] = "undesirable rows left out"
    told += [f"{figures[name]:,} {words}" for name, words in others.items() if figures.get(name)]
    sys.stderr.write(", ".join(told) + "\n")
    return data


def _alike(config: TrainConfig, data: Data, held_out: Data | None) -> dict[str, Any]:
    """What must be equal on all hosts before they work together: examples, and most flags."""
    names = {item.name for item in fields(config)} - _OWN_TO_A_HOST
    examples = {"examples": data.identity, "held out": held_out and held_out.identity}
    return {name: getattr(config, name) for name in names} | examples


def _identity(config: TrainConfig, setup: Setup, examples: Examples, steps: int) -> dict[str, Any]:
    """What a run depends on; a folder that holds a run with another identity is refused."""
    names = [item.name for item in fields(config) if item.name not in _NOT_IN_IDENTITY]
    weights = None if config.from_scratch else weights_identity(setup.checkpoint)
    data, held_out = examples
    return {
        "command": config.name,
        **{name: getattr(config, name) for name in names},
        "model": weights or dataclasses.asdict(setup.model),
        "data": data.identity,
        "eval_data": held_out and held_out.identity,
        "frozen": {role: weights_identity(at) for role, at in setup.frozen_folders.items()},
        FREE: {"accumulate": config.accumulate, "remat": config.remat, "steps": steps},
        FILES: {"data": file_digests(config.data), "eval_data": file_digests(config.eval_data)},
    }


def _write_begin(setup: Setup, weights: str | None) -> None:
    """Record in the run's folder what is trained there, and on which mesh."""
    write_whole(setup.directory / MESH, [name_of(setup.mesh).encode(), b"\n"])
    if setup.config.from_scratch:
        weights = None
    if setup.config.continue_adapter:
        weights = weights_identity(base_folder(setup.checkpoint))
    write_record(setup.directory, Record(setup.base_name, weights, setup.policy.lora))


def _load(setup: Setup) -> Model:
    """The model to start from, in float32 if all of its weights are trained."""
    config, mesh = setup.config, setup.mesh
    if config.from_scratch:
        key = jax.random.key(config.seed)
        model = init_model(setup.model, key, scan_layers=config.scan_layers)
        return model if mesh is None else shard_model(model, mesh)
    dtype = "float32" if setup.policy.lora is None else setup.dtype
    place = setup.base_name if config.continue_adapter else setup.checkpoint
    return load_model(place, dtype=dtype, mesh=mesh, scan_layers=config.scan_layers)


def _start(setup: Setup, model: Model) -> Any:
    """The trained parameters before the first step: all weights in float32, or adapters.

    Parameters that are in float32 already are the model's own arrays. On a mesh, new adapters are
    sharded like the weights that they adapt.
    """
    config, mesh, lora = setup.config, setup.mesh, setup.policy.lora
    shape: dict[str, Any] = {"scan_layers": config.scan_layers}
    if lora is None:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), model.params)
    if config.continue_adapter:
        return load_factors(setup.checkpoint, setup.model, mesh=mesh, **shape)[1]
    adapter = init_adapter(setup.model, lora, jax.random.key(config.seed), **shape)
    return adapter if mesh is None else shard_adapter(setup.model, adapter, mesh)


def _frozen(setup: Setup, model: Model) -> dict[str, Model]:
    """The models that the loss reads but does not train: an adapter's base, reference, guide."""
    frozen = {} if setup.policy.lora is None else {BASE: model}
    if setup.objective.live and own_reference(setup):
        start = model
        if setup.policy.lora is None and REFERENCE not in setup.objective.frozen:
            # The first step donates the arrays of the model that is trained.
            start = Model(model.config, jax.tree.map(jnp.copy, model.params))
        frozen[REFERENCE] = _reference(setup, start)
    for role in (TUNED, UNTUNED):
        if role in setup.objective.frozen:
            frozen[role] = _other_model(setup, role)
    return frozen


def _reference(setup: Setup, model: Model) -> Model:
    """The reference in the computation's dtype: the one named, or the model before training."""
    if REFERENCE in setup.objective.frozen:
        return _other_model(setup, REFERENCE)
    if setup.config.continue_adapter:
        return load_adapted(setup.checkpoint, model, merged=False, mesh=setup.mesh)
    return Model(model.config, cast(model.params, setup.dtype))


def _other_model(setup: Setup, role: str) -> Model:
    """A frozen model with the policy's vocabulary; InputError if it has another one."""
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


def _with_reference(setup: Setup, model: Model, data: Data, held_out: Data | None) -> Examples:
    """The examples with the reference's log-probs, which are computed before training."""
    config = setup.config
    reference = _reference(setup, model)
    named = setup.objective.frozen.get(REFERENCE)
    identity = weights_identity(setup.checkpoint if named is None else locate(named))
    if config.from_scratch:
        identity = f"{setup.model!r} {config.seed}"
    found = functools.partial(
        with_reference,
        reference,
        rows=config.eval_batch,
        cache=setup.cache,
        identity=f"{identity} {setup.dtype}",
        mesh=setup.mesh,
    )
    return found(data), None if held_out is None else found(held_out)


def _check_best(wanted: str, measured: list[str]) -> None:
    """Raise InputError, before the first step, if an evaluation would not measure `wanted`."""
    known = [f"eval/{name}" for name in measured]
    if wanted.removeprefix("-") not in known:
        raise InputError(f"--keep-best {wanted}: the evaluation measures {', '.join(known)}")


def _flops_per_token(policy: Policy, params: Any) -> float:
    """FLOPs of one token, forward and backward, without those of attention over its context.

    Six for each matmul weight (arXiv 2001.08361 section 2.1); four for a frozen one, for which only
    the gradient with respect to its input is computed. The embedding counts if it is also the head.
    """
    everything = abstract_model(policy.config)[0].params
    weights = sum(leaf.size for leaf in jax.tree.leaves(everything) if leaf.ndim > 1)
    lookups = ["positions"] if policy.config.tied_embeddings else ["positions", "embed"]
    weights -= sum(everything[name]["embedding"].size for name in lookups if name in everything)
    if policy.lora is None:
        return 6.0 * weights
    return 4.0 * weights + 6.0 * sum(leaf.size for leaf in jax.tree.leaves(params))


def _save(setup: Setup, state: TrainState, evaluate: Evaluation | None) -> Trained:
    """Write the trained model, or its adapter, with the tokenizer into the run's folder."""
    best, dtype = setup.config.keep_best, setup.config.save_dtype
    checkpoints = setup.directory / CHECKPOINTS
    if best is not None and best_step(checkpoints) is None:
        sys.stderr.write(f"no evaluation gave a number for {best}: the last step is written\n")
    elif best is not None:
        state = read_checkpoint(checkpoints, state, best=True)
    trained = Trained(setup.directory, int(state.step))
    params, lora, beside = state.params, setup.policy.lora, {"tokenizer": setup.tokenizer}
    if lora is not None:
        save_adapter(trained.model, setup.model, lora, params, base=setup.base_name, **beside)
        return trained
    if dtype != "float32":
        try:
            params = rounded(state.params, dtype)
        except InputError as error:
            sys.stderr.write(f"--save-dtype: {error}; float32 is written\n")
        else:
            trained = _measured(setup, state, params, trained, evaluate)
    save_model(Model(setup.model, params), trained.model, **beside)
    return trained


def _measured(
    setup: Setup, state: TrainState, params: Any, trained: Trained, evaluate: Evaluation | None
) -> Trained:
    """What the dtype of `params` loses of the training, in weights and on held-out examples."""
    dtype = setup.config.save_dtype
    rounding = measure_rounding(_load(setup).params, state.params, dtype)
    measured = None
    if evaluate is not None:
        # Back in float32, for which the evaluation is compiled already.
        kept = state._replace(params=cast(params, "float32"))
        measured = evaluate(state), evaluate(kept)
    return replace(trained, rounding=rounding, measured=measured)


NEW_TOKENS = 64
OPENING = 8
"""Tokens at the start of a row without a prompt that serve as its prompt."""


def _sampler(
    setup: Setup, frozen: Mapping[str, Model], data: Data
) -> Callable[[TrainState], list[dict[str, Any]]]:
    """A function that samples responses to the first prompts of `data`, at temperature 0.7.

    It takes a state and returns rows of `prompt` and `response`. The draws are the same for every
    state, so that only the model makes a difference.
    """
    decode = setup.tokenizer.decode

    def answer(state: TrainState) -> list[dict[str, Any]]:
        ids = [_prompt_of(data, i) for i in range(min(setup.config.sample_prompts, len(data)))]
        room = min(NEW_TOKENS, setup.model.max_positions - max(map(len, ids)))
        settings = sample(1, sampling=Sampling(0.7), max_new_tokens=room, slots=len(ids))
        model = setup.policy.model(*cast((state.params, dict(frozen)), setup.dtype))
        return [
            {
                "prompt": decode(prompt),
                "response": decode(list(result.best.tokens), skip_special_tokens=True),
            }
            for prompt, result in zip(ids, search(model, None, ids, settings), strict=True)
        ]

    return answer


def _prompt_of(data: Data, index: int) -> list[int]:
    """Token ids of a row before its first target."""
    batch = data.at([index])
    tokens, targets = (
        batch[name].reshape(-1, batch[name].shape[-1])[0] for name in ("tokens", "targets")
    )
    first = int(np.argmax(targets)) if targets.any() else 0
    return [int(token) for token in tokens[: first if first > 1 else OPENING]]
