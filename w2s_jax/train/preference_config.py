"""Which preference loss, with which options: a table from TRL's names to the functions.

Holds no formula. `preference_loss` evaluates one or several weighted losses on a batch of pairs;
`kto` and `wspo`, which take single responses, are found here too but called by their objectives.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from w2s_jax.errors import InputError, check_fields
from w2s_jax.pytrees import pytree
from w2s_jax.train import losses, preference_losses
from w2s_jax.train.losses import Metrics, preference_metrics
from w2s_jax.train.preference_losses import per_token

Loss = Callable[..., Float[Array, " B"]]

WITH_REFERENCE: Mapping[str, Loss] = {
    name: getattr(preference_losses, name)
    for name in (
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
        "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm",
    )
}  # fmt: skip
REFERENCE_FREE: Mapping[str, Loss] = {
    name: getattr(losses, name) for name in ("orpo", "cpo", "simpo", "genarm")
}
PAIR_LOSSES: Mapping[str, Loss] = {
    **WITH_REFERENCE, **REFERENCE_FREE, "sft": preference_losses.sft
}  # fmt: skip
RESPONSE_LOSSES: Mapping[str, Loss] = {name: getattr(losses, name) for name in ("kto", "wspo")}
LOSSES: Mapping[str, Loss] = {**PAIR_LOSSES, **RESPONSE_LOSSES}

RENAMED = {
    "aot_pair": "aot_unpaired", "arm": "genarm", "bco": "bco_pair", "cdpo": "sigmoid",
    "dpo": "sigmoid", "exo": "exo_pair", "nca": "nca_pair", "slic": "hinge",
    "sppo": "sppo_hard",
}  # fmt: skip
"""Names in older releases of TRL and in the papers: hints, and never accepted."""

LENGTH_NORMALISED = ("orpo", "simpo")
"""Losses on mean log-probs without a reference; their metrics are of the means, as in TRL."""


@pytree()
class PairLogprobs:
    """A batch of pairs as the losses see it: summed log-probs in nats, and the tokens summed over.

    Fields that the chosen losses do not need may be None (`PreferenceConfig.needs`). `chosen_nll`
    takes the place of ORPO's own NLL term where given.
    """

    policy_chosen: Float[Array, " B"]
    policy_rejected: Float[Array, " B"]
    reference_chosen: Float[Array, " B"] | None = None
    reference_rejected: Float[Array, " B"] | None = None
    chosen_lengths: Int[Array, " B"] | None = None
    rejected_lengths: Int[Array, " B"] | None = None
    chosen_nll: Float[Array, " B"] | None = None


@dataclass(frozen=True)
class PreferenceConfig:
    """The preference losses of a run and their options, under TRL's names; defaults are TRL's.

    Raises InputError for an unknown loss and for options out of range or without effect.
    """

    loss_type: tuple[str, ...] = ("sigmoid",)
    """One loss, or several whose weighted sum is trained on; `kto` and `wspo` stand alone."""
    loss_weights: tuple[float, ...] | None = None
    """One weight per loss; all 1 by default."""
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

    def __post_init__(self) -> None:
        check_fields(self)
        _check_names(self.loss_type)
        _check_weights(self.loss_type, self.loss_weights)
        _check_options(self)

    @property
    def needs(self) -> frozenset[str]:
        """The arrays that the losses take, by their parameters' names; optional ones left out."""
        return frozenset(name for loss in self.loss_type for name in _arrays(loss)[0])

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses reads log-probs of the reference."""
        return any(name.startswith("reference") for name in self.needs)

    def options(self, loss: str) -> dict[str, float]:
        """The keyword arguments of `loss` under this config."""
        return {name: getattr(self, name) for name in _options(loss)}


def preference_loss(
    config: PreferenceConfig, pairs: PairLogprobs
) -> tuple[Float[Array, " B"], Metrics]:
    """The weighted sum of the config's losses, one number per pair, and the metrics' batch means.

    Its mean over the batch is TRL's loss. With `aot`, `aot_unpaired` and terms that weigh tokens
    (`sft`, `orpo`, `cpo`) an entry depends on the whole batch. Rewards are beta times the
    log-ratio to the reference, or the log-prob where there is none. Raises InputError where an
    array that a loss needs is missing.
    """
    weights = config.loss_weights or (1.0,) * len(config.loss_type)
    total = jnp.zeros_like(pairs.policy_chosen)
    for loss, weight in zip(config.loss_type, weights, strict=True):
        total = total + weight * _evaluate(config, loss, pairs)
    return total, _metrics(config, pairs)


def _evaluate(config: PreferenceConfig, loss: str, pairs: PairLogprobs) -> Float[Array, " B"]:
    if loss not in PAIR_LOSSES:
        raise InputError(f"loss type {loss!r} is not a loss on pairs of responses")
    required, optional = _arrays(loss)
    for name in required:
        if getattr(pairs, name) is None:
            raise InputError(f"loss type {loss!r} needs {name}, which this batch has not")
    arrays = {name: getattr(pairs, name) for name in (*required, *optional)}
    return PAIR_LOSSES[loss](**arrays, **config.options(loss))


def _metrics(config: PreferenceConfig, pairs: PairLogprobs) -> Metrics:
    first = next((loss for loss in config.loss_type if loss != "sft"), "sft")
    chosen, rejected = pairs.policy_chosen, pairs.policy_rejected
    chosen_scores, rejected_scores = chosen, rejected
    if first in LENGTH_NORMALISED:
        assert pairs.chosen_lengths is not None
        assert pairs.rejected_lengths is not None
        chosen = chosen_scores = per_token(chosen, pairs.chosen_lengths)
        rejected = rejected_scores = per_token(rejected, pairs.rejected_lengths)
    elif first not in REFERENCE_FREE and pairs.reference_chosen is not None:
        assert pairs.reference_rejected is not None
        chosen_scores = chosen - pairs.reference_chosen
        rejected_scores = rejected - pairs.reference_rejected
    metrics = preference_metrics(
        chosen, rejected, config.beta * chosen_scores, config.beta * rejected_scores
    )
    return jax.lax.stop_gradient(metrics)


@cache
def _parameters(loss: str) -> tuple[inspect.Parameter, ...]:
    return tuple(inspect.signature(LOSSES[loss]).parameters.values())


def _arrays(loss: str) -> tuple[list[str], list[str]]:
    """Names of the arrays that a loss takes: those required, those optional."""
    positional = [p for p in _parameters(loss) if p.kind is not p.KEYWORD_ONLY]
    required = [p.name for p in positional if p.default is p.empty]
    return required, [p.name for p in positional if p.default is not p.empty]


def _options(loss: str) -> list[str]:
    return [p.name for p in _parameters(loss) if p.kind is p.KEYWORD_ONLY]


def _check_names(losses: tuple[str, ...]) -> None:
    if not losses:
        raise InputError(f"loss_type is empty; name at least one of {', '.join(LOSSES)}")
    for loss in losses:
        if loss in LOSSES:
            continue
        near = difflib.get_close_matches(loss, LOSSES, n=1)
        hint = RENAMED.get(loss.lower()) or (near[0] if near else None)
        right = f"did you mean {hint!r}?" if hint else f"one of {', '.join(LOSSES)}"
        raise InputError(f"unknown loss type {loss!r}; {right}")
    alone = [loss for loss in losses if loss in RESPONSE_LOSSES]
    if alone and len(losses) > 1:
        raise InputError(f"loss type {alone[0]!r} takes no pairs and cannot be mixed with others")


def _check_weights(losses: tuple[str, ...], weights: tuple[float, ...] | None) -> None:
    if weights is None:
        return
    if len(weights) != len(losses):
        raise InputError(
            f"loss_weights has {len(weights)} entries for {len(losses)} loss types; one each"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"loss_weights must be finite, not {weights}")


def _check_options(config: PreferenceConfig) -> None:
    def check(name: str, right: str, within: Callable[[float], bool]) -> None:
        value = getattr(config, name)
        if not (math.isfinite(value) and within(value)):
            raise InputError(f"{name} must be {right}, not {value}")

    check("beta", "above 0", lambda x: x > 0)
    check("discopop_tau", "above 0", lambda x: x > 0)
    for name in ("simpo_gamma", "cpo_alpha", "desirable_weight", "undesirable_weight"):
        check(name, "0 or more", lambda x: x >= 0)
    check("label_smoothing", "in [0, 0.5)", lambda x: 0 <= x < 0.5)
    if "exo_pair" in config.loss_type and config.label_smoothing == 0:
        raise InputError("loss type 'exo_pair' needs label_smoothing above 0; its paper uses 1e-3")
    used = {name for loss in config.loss_type for name in _options(loss)}
    for field in fields(config):
        changed: Any = getattr(config, field.name) != field.default
        if changed and field.name not in {*used, "loss_type", "loss_weights", "beta"}:
            names = " + ".join(config.loss_type)
            raise InputError(f"{field.name} has no effect on loss type {names}; leave it out")
