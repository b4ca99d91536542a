"""One run of training: a model, data and an objective, on a mesh, in a directory.

Puts together what the neighbours hold; reads no flags and prints nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from w2s_jax.errors import InputError
from w2s_jax.models.lora import init_adapter, shard_adapter
from w2s_jax.models.model import Model, abstract_model
from w2s_jax.ops.meshes import batch_parts, check_batch
from w2s_jax.text.batches import Batches, Data, Part
from w2s_jax.train.config import MOST_STEPS, LoopConfig, RunConfig
from w2s_jax.train.loop import train
from w2s_jax.train.losses import Mean
from w2s_jax.train.objectives import Policy
from w2s_jax.train.reference import Referenced
from w2s_jax.train.step import (
    SUMMED,
    Batch,
    LossFunction,
    TrainState,
    cast,
    host_rows,
    init_state,
    make_optimizer,
    make_schedule,
    make_train_step,
    narrow,
    place,
    place_state,
    place_whole,
)

Source = Data | Part | Referenced


@dataclass(frozen=True)
class Task:
    """What is trained: a policy by a loss on data; `frozen` models are read and never changed."""

    policy: Policy
    loss: LossFunction
    data: Source
    held_out: Source | None = None
    frozen: Mapping[str, Model] = field(default_factory=dict)


def number_of_steps(config: RunConfig, data: Source) -> int:
    """The steps of a run, in which an epoch's every row is read; InputError for too many."""
    wanted = config.epochs * len(data) / config.batch_size
    # A share such as 0.1 of an epoch is no exact number, and is not to make a step more.
    steps = config.max_steps or max(1, math.ceil(wanted - 1e-9 * wanted))
    if steps > MOST_STEPS:
        raise InputError(f"{config.epochs:g} epochs are {steps:.3g} steps, {MOST_STEPS} at most")
    return steps


def trainable(policy: Policy, model: Model, *, seed: int, mesh: Mesh | None = None) -> Any:
    """What is trained at the start: the model's parameters in float32, or new adapters.

    Parameters that are float32 already are the model's own arrays. On a mesh, adapters are placed
    by the rules of what they are beside.
    """
    if policy.lora is None:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), model.params)
    key = jax.random.key(seed)
    adapter = init_adapter(policy.config, policy.lora, key, scan_layers=model.scan_layers)
    return adapter if mesh is None else shard_adapter(policy.config, adapter, mesh)


def fine_tune(
    task: Task,
    params: Any,
    config: RunConfig,
    loop: LoopConfig,
    directory: Path,
    *,
    mesh: Mesh | None = None,
    identity: Mapping[str, Any] | None = None,
    sinks: Sequence[Any] = (),
    sample: Callable[[TrainState], list[dict[str, Any]]] | None = None,
) -> TrainState:
    """Train `params` and return the last state; goes on from what `directory` holds.

    The arrays of `params` are given up, and must not be those of a frozen model. Raises
    InputError for batches that cannot be cut as asked, and what `train.loop.train` raises.
    """
    check_batch(config.batch_size, config.accumulate, mesh, flag="--batch-size")
    steps = number_of_steps(config, task.data)
    own = host_rows(mesh, config.batch_size)
    batches = Batches(
        task.data,
        config.batch_size,
        seed=config.seed,
        shuffle=config.shuffle,
        part=(own.start, own.stop),
    )
    optimizer = make_optimizer(config, steps)
    evaluate = None
    if task.held_out is not None:
        evaluate = evaluation(task, config, mesh)
        _check_best(loop.keep_best, task, params, config)
    state = init_state(params, optimizer, jax.random.key(config.seed), copy=False)
    state = place_state(state, mesh)
    step = make_train_step(
        task.loss,
        optimizer,
        accumulate=config.accumulate,
        compute_dtype=narrow(config.dtype),
        mesh=mesh,
        like=None if mesh is None else state,
    )
    return train(
        state,
        step,
        batches,
        steps,
        config=loop,
        directory=directory,
        frozen=dict(task.frozen),
        identity=dict(identity or {}),
        evaluate=evaluate,
        sample=sample,
        names=batches.names,
        schedule=make_schedule(config, steps),
        sinks=sinks,
        put=lambda batch: place(batch, mesh, config.batch_size),
        flops_per_token=flops_per_token(task.policy, params),
    )


def flops_per_token(policy: Policy, params: Any) -> float:
    """Operations of one token, forward and backward, without those of attention over its context.

    Six for every matmul weight, arXiv 2001.08361 section 2.1; four for a frozen one, of which only
    the gradient towards its input is computed. The embedding counts where it is the head.
    """
    model, _ = abstract_model(policy.config)
    everything = model.params
    weights = sum(leaf.size for leaf in jax.tree.leaves(everything) if leaf.ndim > 1)
    lookups = 0 if policy.config.tied_embeddings else everything["embed"]["embedding"].size
    if "positions" in everything:
        lookups += everything["positions"]["embedding"].size
    weights -= lookups
    if policy.lora is None:
        return 6.0 * weights
    return 4.0 * weights + 6.0 * sum(leaf.size for leaf in jax.tree.leaves(params))


def evaluation(
    task: Task, config: RunConfig, mesh: Mesh | None = None
) -> Callable[[TrainState], dict[str, float]]:
    """What measures a state: the loss and its metrics over the held-out examples, by weight.

    Examples are read in order, without dropout; what is left of them after whole batches is a
    batch of its own. Those that the mesh does not divide are read on every part of it, few at a
    time. A mean over no example is nan.
    What is returned raises FloatingPointError where one over examples is no number.
    """
    data = task.held_out
    assert data is not None
    rows = config.eval_batch
    parts = batch_parts(mesh)
    check_batch(rows, 1, mesh, flag="--eval-batch-size")
    divided = len(data) - len(data) % parts
    spans = list(_spans(0, divided, rows))
    # Two at the least, as some losses pair the rows of a batch.
    spans += _spans(divided, len(data), max(2, rows // parts))

    @jax.jit
    def measure(params: Any, frozen: Any, batch: Batch) -> tuple[Any, Any]:
        _, weight, metrics = task.loss(cast(params, narrow(config.dtype)), frozen, batch, None)
        return weight, metrics

    def evaluate(state: TrainState) -> dict[str, float]:
        sums: dict[str, Mean] = {}
        for start, stop in spans:
            indices = _beside_another(start, stop)
            if start < divided:
                own = host_rows(mesh, stop - start)
                batch = place(data.at(indices, own), mesh, stop - start)
            else:
                batch = place_whole(data.at(indices, slice(0, stop - start)), mesh)
            weight, metrics = jax.device_get(measure(state.params, dict(task.frozen), batch))
            for name, value in metrics.items():
                part = _as_mean(value, float(weight))
                sums[name] = Mean(*map(np.add, sums.get(name, Mean(0.0, 0.0)), part))
        found = {}
        for name, mean in sums.items():
            if name in SUMMED:
                continue
            found[name] = float(mean.value) if np.all(mean.count) else math.nan
            if np.all(mean.count) and not math.isfinite(found[name]):
                raise FloatingPointError(f"{name} over the held-out examples is {found[name]}")
        return found

    return evaluate


def _spans(start: int, stop: int, rows: int) -> Iterator[tuple[int, int]]:
    return ((at, min(at + rows, stop)) for at in range(start, stop, rows))


def _beside_another(start: int, stop: int) -> np.ndarray:
    """The examples of a batch; one that is alone has the one before it behind it.

    Labelled examples are read with the response of another in their batch (TRL's KTO pairs one that
    is left over with itself, which is no estimate of the divergence).
    """
    alone = stop - start == 1 and start > 0
    return np.array([start, start - 1]) if alone else np.arange(start, stop)


def _as_mean(value: Any, weight: float) -> Mean:
    """A metric of a batch as sums in float64; one of a batch without weight counts nothing."""
    if not isinstance(value, Mean):
        value = Mean(weight * value if weight else 0.0, weight)
    return Mean(*(np.asarray(part, np.float64) for part in value))


def _check_best(wanted: str | None, task: Task, params: Any, config: RunConfig) -> None:
    """Raises InputError, before the first step, where an evaluation would not measure `wanted`."""
    if wanted is None:
        return
    assert task.held_out is not None
    indices = np.resize(np.arange(len(task.held_out)), config.eval_batch)
    batch, frozen = task.held_out.at(indices), dict(task.frozen)

    def measure(params: Any, frozen: Any, batch: Batch) -> Any:
        return task.loss(cast(params, narrow(config.dtype)), frozen, batch, None)[2]

    known = [f"eval/{name}" for name in jax.eval_shape(measure, params, frozen, batch)]
    if wanted.removeprefix("-") not in known:
        raise InputError(f"--keep-best {wanted}: the evaluation measures {', '.join(known)}")
