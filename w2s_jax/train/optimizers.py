"""Optimizers and learning-rate schedules from one frozen config, built as optax chains.

Gradient clipping is part of the chain; gradient accumulation is in step.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from w2s_jax.errors import InputError, check_fields

OptimizerName = Literal["adamw", "adafactor", "lion", "muon", "sgd"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, how fast by step, and what is done to gradients before.

    adamw: arXiv 1711.05101. adafactor: arXiv 1804.04235 with the given rate, second moments of
    matrices factored, updates clipped at 1, no first moment. lion: arXiv 2302.06675. muon: the
    matrices of the layers orthogonalised, AdamW for the rest. sgd: without momentum.

    `b1` and `b2` serve adamw, lion and muon; b2 None is 0.99 for lion, else 0.999. Weight decay is
    decoupled and scaled by the learning rate in all of them.

    `learning_rate` is the peak, `muon_learning_rate` that of the matrices under Muon. `warmup` is
    a share of the steps below 1, their number from 1 on; `final` is a share of the peak. A
    trapezoid stays at the peak until the last `decay` share of the steps, so their number may be
    settled on the way.
    """

    name: OptimizerName = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "linear", "cosine", "trapezoid"] = "cosine"
    warmup: float = 0.05
    decay: float = 0.3
    final: float = 0.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float | None = None
    epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    muon_learning_rate: float = 0.02

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("learning_rate", "muon_learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} {value} must be above 0, and finite")
        for name in ("warmup", "final", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} {getattr(self, name)} must be 0 or above, and finite")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise InputError(f"{name} {value} must be 0 or above, and below 1")
        if not 0 < self.decay <= 1:
            raise InputError(
                f"decay {self.decay} must be a share of the steps, above 0 and up to 1"
            )


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0 to the peak, then as `config.schedule` says."""
    peak = config.learning_rate
    warmup = round(config.warmup if config.warmup >= 1 else config.warmup * steps)
    rest = max(steps - warmup, 1)
    after: Callable[[Any], Any]
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, peak * config.final, rest)
    elif config.schedule == "trapezoid":
        falling = min(round(config.decay * steps), rest)
        after = optax.linear_schedule(peak, peak * config.final, falling, rest - falling)
    else:
        after = optax.cosine_decay_schedule(peak, rest, config.final)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The whole chain: global-norm clip, then the named optimizer with its schedule over `steps`.

    Weight decay never reaches biases and norms; under Muon it reaches the layers' kernels alone.
    """
    update = _update(config, make_schedule(config, steps))
    if config.max_grad_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), update)


def _update(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    decay, b2 = config.weight_decay, config.b2
    if config.name == "muon":
        return _muon(config, schedule)
    if config.name == "lion":
        b2 = 0.99 if b2 is None else b2
        return optax.lion(schedule, config.b1, b2, weight_decay=decay, mask=_decayed)
    if config.name == "adamw":
        b2 = 0.999 if b2 is None else b2
        return optax.adamw(
            schedule, config.b1, b2, config.epsilon, weight_decay=decay, mask=_decayed
        )
    parts = [optax.add_decayed_weights(decay, _decayed), optax.scale_by_learning_rate(schedule)]
    if config.name == "adafactor":
        # optax.adafactor itself does not scale weight decay by the learning rate.
        parts = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), *parts]
    return optax.chain(*parts)


def _decayed(params: Any) -> Any:
    """True for the leaves that weight decay reaches."""
    reached = ("kernel", "embedding", "lora_a", "lora_b")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in reached, params)


def _muon(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon (orthogonalised momentum) at its own peak; both peaks follow one schedule."""
    ratio = config.muon_learning_rate / config.learning_rate
    return muon(
        lambda step: ratio * schedule(step),
        eps=config.epsilon,
        adam_b1=config.b1,
        adam_b2=0.999 if config.b2 is None else config.b2,
        adam_learning_rate=schedule,
        weight_decay=config.weight_decay / ratio,
        weight_decay_mask=_decayed,
        muon_weight_dimension_numbers=_muon_dimensions,
    )


def _muon_dimensions(params: Any) -> Any:
    """Which axes of a layer's kernel go in and which come out; None leaves the leaf to AdamW."""

    def dimensions(path: Any, leaf: Any) -> MuonDimensionNumbers | None:
        if path[-1].key != "kernel" or not path[0].key.startswith("layers"):
            return None
        # Stacked layers have a leading axis, along which every matrix stands by itself.
        axes = tuple(range(leaf.ndim))[path[0].key == "layers" :]
        ins = 2 if path[-2].key == "out" else 1
        return MuonDimensionNumbers(axes[:ins], axes[ins:])

    return jax.tree_util.tree_map_with_path(dimensions, params)
