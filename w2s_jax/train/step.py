"""The train step, one for every objective: jitted, donated, with accumulation; and evaluation.

The rows of a batch are split over the mesh's data axes, each host holding its own; parameters are
split by their rules in models/.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array
from optax.contrib import MuonDimensionNumbers, muon

from w2s_jax.distributed import everywhere
from w2s_jax.errors import InputError
from w2s_jax.ops.meshes import batch_parts, check_batch
from w2s_jax.ops.sharding import DEFAULT_RULES
from w2s_jax.text.batches import Rows
from w2s_jax.train.config import MOST_STEPS, OptimizerConfig, RunConfig
from w2s_jax.train.losses import Mean, Metrics

Batch = dict[str, Any]

LossFunction = Callable[[Any, Any, Batch, Array | None], tuple[Array, Array, Metrics]]
"""(params, frozen, batch, key) -> (mean loss, weight of the mean, metrics).

`frozen` is what the loss reads and does not train: a LoRA base, a reference, guides, or None. The
weight is that of the batch among the micro-batches of a step: the number of target tokens for SFT,
of pairs for DPO. With it, accumulated gradients equal those of one large batch. Metrics are means
with the same weight, except those named in `SUMMED`.
"""

SUMMED = ("num_tokens",)
"""Metrics that are summed over micro-batches."""


class TrainState(NamedTuple):
    """All that training changes.

    Attributes:
        step: Steps done, int32.
        params: The trained parameters.
        optimizer: The optimizer's state.
        key: Constant; each step folds its number into it.
    """

    step: Array
    params: Any
    optimizer: Any
    key: Array


def init_state(
    params: Any, optimizer: optax.GradientTransformation, key: Array, *, copy: bool = True
) -> TrainState:
    """The state at step 0.

    Args:
        params: The parameters.
        optimizer: The optimizer.
        key: The random key.
        copy: Whether to copy the parameters, which the first step donates. Without a copy memory is
            halved, and nobody may read `params` afterwards.
    """
    params = jax.tree.map(jnp.array, params) if copy else params
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)


def make_train_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    compute_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    like: TrainState | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A jitted `(state, frozen, batch) -> (state, metrics)` that donates the state alone.

    Args:
        loss: The loss function.
        optimizer: The optimizer.
        accumulate: Micro-batches into which the leading axis of every array of the batch is cut.
            Gradients and metrics are averaged by the weights that `loss` returns; one of weight 0
            is ignored, whatever its values.
        compute_dtype: Dtype of floating-point params and frozen in the loss; None keeps theirs.
        mesh: Mesh over whose batch axes every micro-batch is spread.
        like: A state, or shapes of one, whose shardings the new state keeps. Otherwise the compiler
            may choose others, and then has to compile again.
    """

    def value_and_gradient(
        params: Any, frozen: Any, batch: Batch, key: Array
    ) -> tuple[Any, Array, Metrics]:
        def scalar(params: Any) -> tuple[Array, tuple[Array, Metrics]]:
            value, weight, metrics = loss(cast(params, compute_dtype), frozen, batch, key)
            return value, (jnp.asarray(weight, jnp.float32), metrics)

        (_, (weight, metrics)), gradient = jax.value_and_grad(scalar, has_aux=True)(params)
        return gradient, weight, metrics

    def accumulated(params: Any, frozen: Any, batch: Batch, key: Array) -> tuple[Any, Metrics]:
        if accumulate == 1:
            gradient, _, metrics = value_and_gradient(params, frozen, batch, key)
            return gradient, metrics
        micro = jax.tree.map(lambda x: _spread(x, accumulate, mesh), batch)

        def add(total: Any, item: tuple[Batch, Array]) -> tuple[Any, None]:
            gradient, weight, metrics = value_and_gradient(params, frozen, item[0], item[1])
            means, sums = _part(metrics)
            part = jax.tree.map(lambda x: jnp.where(weight > 0, weight * x, 0.0), (gradient, means))
            return jax.tree.map(jnp.add, total, (*part, sums, weight)), None

        keys = jax.random.split(key, accumulate)
        first = jax.tree.map(lambda x: x[0], micro)
        gradient, weight, metrics = jax.eval_shape(value_and_gradient, params, frozen, first, key)
        start = jax.tree.map(
            lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)),
            (gradient, *_part(metrics), weight),
        )
        total, _ = jax.lax.scan(add, start, (micro, keys))
        gradient, means, sums, weight = total
        gradient, means = jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-9), (gradient, means))
        return gradient, means | sums

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        frozen = cast(frozen, compute_dtype)
        gradient, metrics = accumulated(state.params, frozen, batch, key)
        metrics = metrics | {"grad_norm": optax.tree.norm(gradient)}
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, optimizer_state, state.key), metrics

    if like is None:
        return jax.jit(step, donate_argnums=0)
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(step, donate_argnums=0, out_shardings=(places, None))


def compute_dtype(dtype: str) -> str:
    """Resolves "auto": float32 on a CPU, where it is faster, otherwise bfloat16."""
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def narrow(dtype: str) -> str | None:
    """The dtype to which parameters are cast for the loss; None if they are in it already."""
    return None if compute_dtype(dtype) == "float32" else compute_dtype(dtype)


def cast(tree: Any, dtype: DTypeLike | None) -> Any:
    """The tree with its floating-point leaves in `dtype`; unchanged if that is None."""
    if dtype is None:
        return tree

    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def _part(metrics: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split metrics into (means, sums)."""
    sums = {
        name: value for name, value in metrics.items() if name in SUMMED or isinstance(value, Mean)
    }
    return {name: value for name, value in metrics.items() if name not in sums}, sums


def _spread(x: Any, parts: int, mesh: Mesh | None) -> Array:
    """[n ..] as [parts, n / parts ..], each part spread over all devices of the batch axes."""
    out = jnp.reshape(x, (parts, -1, *x.shape[1:]))
    if mesh is None:
        return out
    axes = DEFAULT_RULES.mesh_axes("batch")
    return jax.lax.with_sharding_constraint(out, NamedSharding(mesh, PartitionSpec(None, axes)))


def host_rows(mesh: Mesh | None, rows: int) -> slice:
    """The rows of a batch from the first to the last that this host's devices hold.

    The parts of the mesh must divide `rows`. Hosts that share a part read the same rows.
    """
    if mesh is None:
        return slice(0, rows)
    sharding = NamedSharding(mesh, PartitionSpec(DEFAULT_RULES.mesh_axes("batch")))
    places = sharding.addressable_devices_indices_map((rows,)).values()
    held = [range(rows)[place[0]] for place in places if place is not None]
    return slice(min(own.start for own in held), max(own.stop for own in held))


def place(batch: Batch, mesh: Mesh | None, rows: int | None = None) -> Batch:
    """A batch as device arrays, split along the first axis; unchanged without a mesh.

    Args:
        batch: Arrays with the rows of the whole batch or, with `rows`, this host's `host_rows`.
        mesh: The mesh.
        rows: Rows of the whole batch over all hosts.
    """
    if mesh is None:
        return batch
    sharding = NamedSharding(mesh, PartitionSpec(DEFAULT_RULES.mesh_axes("batch")))

    def put(array: np.ndarray) -> jax.Array:
        count = len(array) if rows is None else rows
        first = 0 if rows is None else host_rows(mesh, rows).start

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            own, *others = index or (slice(None),)
            start, stop, _ = own.indices(count)
            return array[(slice(start - first, stop - first), *others)]

        return jax.make_array_from_callback((count, *array.shape[1:]), sharding, shard)

    return {name: put(np.asarray(array)) for name, array in batch.items()}


def place_whole(batch: Batch, mesh: Mesh | None) -> Batch:
    """A batch as device arrays, replicated on every device; all hosts must give the same."""
    if mesh is None:
        return batch
    return {name: everywhere(np.asarray(array), mesh) for name, array in batch.items()}


def place_state(state: TrainState, mesh: Mesh | None) -> TrainState:
    """The state with arrays on a single device (counts, the key) replicated over the mesh.

    A step takes no mix of both kinds, and a checkpoint restores arrays to where they lay before.
    """
    if mesh is None:
        return state
    leaves, structure = jax.tree.flatten(state)
    alone = {i: one for i, one in enumerate(leaves) if not isinstance(one.sharding, NamedSharding)}
    whole = NamedSharding(mesh, PartitionSpec())
    placed = jax.jit(lambda arrays: arrays, out_shardings=whole)(alone)
    return jax.tree.unflatten(structure, [placed.get(i, one) for i, one in enumerate(leaves)])


def number_of_steps(config: RunConfig, rows: int) -> int:
    """The steps of a run, so that every row of an epoch is read; InputError for too many."""
    wanted = config.epochs * rows / config.batch_size
    # Rounding errors, as in 0.1 of an epoch, must not add a step.
    steps = config.max_steps or max(1, math.ceil(wanted - 1e-9 * wanted))
    if steps > MOST_STEPS:
        raise InputError(f"{config.epochs:g} epochs are {steps:.3g} steps, {MOST_STEPS} at most")
    return steps


@dataclass(frozen=True)
class Evaluation:
    """Measures a state: the loss and its metrics over held-out examples, by weight.

    Examples are read in order, without dropout; the rest after whole batches is a smaller batch.
    Examples that the mesh does not divide are read on all devices, a few at a time. A mean over no
    examples is NaN.

    Attributes:
        loss: The loss function.
        data: The held-out examples.
        frozen: The frozen models that the loss reads, by role.
        rows: Examples in a batch.
        dtype: Dtype to which parameters are cast for the loss; None does not cast.
        mesh: The mesh.

    Raises:
        InputError: For batches that the mesh does not divide.
        FloatingPointError: From a call, if a mean over examples is not finite.
    """

    loss: LossFunction
    data: Rows
    frozen: Mapping[str, Any]
    rows: int
    dtype: str | None = None
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        check_batch(self.rows, 1, self.mesh, flag="--eval-batch-size")

    @cached_property
    def _measure(self) -> Callable[..., tuple[Any, Any]]:
        def measure(params: Any, frozen: Any, batch: Batch) -> tuple[Any, Any]:
            _, weight, metrics = self.loss(cast(params, self.dtype), frozen, batch, None)
            return weight, metrics

        return jax.jit(measure)

    def metrics(self, params: Any) -> list[str]:
        """The names of the metrics; computes nothing."""
        batch = self.data.at(np.resize(np.arange(len(self.data)), self.rows))
        return list(jax.eval_shape(self._measure, params, dict(self.frozen), batch)[1])

    def __call__(self, state: TrainState) -> dict[str, float]:
        """The means over all examples, by name."""
        sums: dict[str, Mean] = {}
        for batch in self._batches():
            weight, metrics = jax.device_get(self._measure(state.params, dict(self.frozen), batch))
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

    def _batches(self) -> Iterator[Batch]:
        parts, count = batch_parts(self.mesh), len(self.data)
        divided = count - count % parts
        for start in range(0, divided, self.rows):
            stop = min(start + self.rows, divided)
            own = host_rows(self.mesh, stop - start)
            yield place(self.data.at(_beside_another(start, stop), own), self.mesh, stop - start)
        # At least two, as some losses pair the rows of a batch.
        few = max(2, self.rows // parts)
        for start in range(divided, count, few):
            stop = min(start + few, count)
            rows = self.data.at(_beside_another(start, stop), slice(0, stop - start))
            yield place_whole(rows, self.mesh)


def _beside_another(start: int, stop: int) -> np.ndarray:
    """Indices of a batch's examples; a single one is followed by the example before it.

    A labelled example is read with the response of another one of its batch. (TRL's KTO pairs a
    single one with itself, which estimates no divergence.)
    """
    alone = stop - start == 1 and start > 0
    return np.array([start, start - 1]) if alone else np.arange(start, stop)


def _as_mean(value: Any, weight: float) -> Mean:
    """A metric of a batch as float64 sums; that of a batch of weight 0 has count 0."""
    if not isinstance(value, Mean):
        value = Mean(weight * value if weight else 0.0, weight)
    return Mean(*(np.asarray(part, np.float64) for part in value))


_EPSILON = 1e-8


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0 to the peak, then `config.schedule`."""
    peak = _peak(config)
    warmup = round(config.warmup if config.warmup >= 1 else config.warmup * steps)
    rest = max(steps - warmup, 1)
    last, falling = peak * config.final, min(round(config.decay * steps), rest)
    after: dict[str, Callable[[], Callable[[Any], Any]]] = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, last, rest),
        "trapezoid": lambda: optax.linear_schedule(peak, last, falling, rest - falling),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.final),
    }
    rising = optax.linear_schedule(0.0, peak, max(warmup, 1))
    return optax.join_schedules([rising, after.get(config.schedule, after["cosine"])()], [warmup])


def _peak(config: OptimizerConfig) -> float:
    if config.learning_rate is None:
        raise InputError("learning_rate is missing: the peak of the schedule")
    return config.learning_rate


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The full chain: clipping by global norm, then the optimizer with its schedule.

    Weight decay never applies to biases and norms; under Muon, only to the kernels of layers.
    """
    update = _update(config, make_schedule(config, steps))
    if not config.max_grad_norm:
        return update
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), update)


def _update(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    decay, b2 = config.weight_decay, config.b2
    if config.optimizer == "muon":
        return _muon(config, schedule)
    if config.optimizer == "lion":
        b2 = 0.99 if b2 is None else b2
        return optax.lion(schedule, config.b1, b2, weight_decay=decay, mask=_decayed)
    if config.optimizer == "adamw":
        b2 = 0.999 if b2 is None else b2
        return optax.adamw(schedule, config.b1, b2, _EPSILON, weight_decay=decay, mask=_decayed)
    parts = [optax.add_decayed_weights(decay, _decayed), optax.scale_by_learning_rate(schedule)]
    if config.optimizer == "adafactor":
        # optax.adafactor itself does not scale weight decay by the learning rate.
        parts = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), *parts]
    return optax.chain(*parts)


def _decayed(params: Any) -> Any:
    """True for the leaves to which weight decay applies."""
    reached = ("kernel", "embedding", "lora_a", "lora_b")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in reached, params)


def _muon(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon (orthogonalised momentum) with a peak of its own; both peaks follow one schedule."""
    ratio = config.muon_learning_rate / _peak(config)
    return muon(
        lambda step: ratio * schedule(step),
        eps=_EPSILON,
        adam_b1=config.b1,
        adam_b2=0.999 if config.b2 is None else config.b2,
        adam_learning_rate=schedule,
        weight_decay=config.weight_decay / ratio,
        weight_decay_mask=_decayed,
        muon_weight_dimension_numbers=_muon_dimensions,
    )


def _muon_dimensions(params: Any) -> Any:
    """Input and output axes of the kernels of layers; None leaves the leaf to AdamW."""

    def dimensions(path: Any, leaf: Any) -> MuonDimensionNumbers | None:
        if path[-1].key != "kernel" or not path[0].key.startswith("layers"):
            return None
        # Stacked layers have a leading axis, which is a batch axis for the orthogonalisation.
        axes = tuple(range(leaf.ndim))[path[0].key == "layers" :]
        ins = 2 if path[-2].key == "out" else 1
        return MuonDimensionNumbers(axes[:ins], axes[ins:])

    return jax.tree_util.tree_map_with_path(dimensions, params)
