"""The one train step: jitted, donated, with gradient accumulation, for every objective.

Holds no loss, no data order and no files.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

Batch = dict[str, Any]
Metrics = dict[str, Array]


LossFunction = Callable[[Any, Batch, Array], tuple[Array, Array, Metrics]]
"""(params, batch, key) -> (mean loss, weight of the mean, metrics).

The weight says how much the batch counts beside others of the same step: target tokens for SFT,
pairs for DPO. With it, accumulated gradients equal those of one large batch.
"""


class TrainState(NamedTuple):
    """All that training changes; `key` stays as it was and each step folds its number into it."""

    step: Array
    params: Any
    optimizer: Any
    key: Array


def init_state(params: Any, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    """State at step 0; the arrays of `params` are copied, as the first step donates them."""
    params = jax.tree.map(jnp.array, params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)


def make_train_step(
    loss: LossFunction, optimizer: optax.GradientTransformation, *, accumulate: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted `(state, batch) -> (state, metrics)` that donates the state.

    With `accumulate` > 1 the leading axis of every array in the batch is cut into that many equal
    micro-batches, whose gradients and metrics are averaged by the weights that `loss` returns.
    """

    def value_and_gradient(params: Any, batch: Batch, key: Array) -> tuple[Any, Array, Metrics]:
        def scalar(params: Any) -> tuple[Array, tuple[Array, Metrics]]:
            value, weight, metrics = loss(params, batch, key)
            return value, (jnp.asarray(weight, jnp.float32), metrics)

        (_, (weight, metrics)), gradient = jax.value_and_grad(scalar, has_aux=True)(params)
        return gradient, weight, metrics

    def accumulated(params: Any, batch: Batch, key: Array) -> tuple[Any, Metrics]:
        if accumulate == 1:
            gradient, _, metrics = value_and_gradient(params, batch, key)
            return gradient, metrics
        micro = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)

        def add(total: Any, item: tuple[Batch, Array]) -> tuple[Any, None]:
            gradient, weight, metrics = value_and_gradient(params, item[0], item[1])
            part = jax.tree.map(lambda x: weight * x, (gradient, metrics))
            return jax.tree.map(jnp.add, total, (*part, weight)), None

        keys = jax.random.split(key, accumulate)
        shapes = jax.eval_shape(
            value_and_gradient, params, jax.tree.map(lambda x: x[0], micro), key
        )
        gradient, weight, metrics = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(add, (gradient, metrics, weight), (micro, keys))
        gradient, metrics, weight = total
        return jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-9), (gradient, metrics))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        gradient, metrics = accumulated(state.params, batch, key)
        metrics["grad_norm"] = optax.tree.norm(gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, optimizer_state, state.key), metrics

    return jax.jit(step, donate_argnums=0)
