"""The losses that TRL has, with the options they are compared under, and our numbers."""

import jax
import jax.numpy as jnp

from w2s_jax.train.config import PreferenceConfig
from w2s_jax.train.losses import PairLogprobs, kto, kto_kl, kto_metrics, preference_loss

DPO_CASES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.2},
    "aot_unpaired": {"label_smoothing": 0.2},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.07},
    "sft": {},
    "sigmoid_norm": {},
}
MIXED = (("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0))
REFERENCE_FREE_CASES = {
    "orpo": {},
    "cpo": {"label_smoothing": 0.1, "cpo_alpha": 0.5},
    "simpo": {"label_smoothing": 0.1, "simpo_gamma": 0.7},
}
BETAS = (0.1, 0.7)
KTO_OPTIONS = {"desirable_weight": 1.0, "undesirable_weight": 1.3}


def pair_cases():
    """(name, loss types, weights, options) of every comparison on pairs."""
    for beta in BETAS:
        for name, options in {**DPO_CASES, **REFERENCE_FREE_CASES}.items():
            yield f"{name}, beta {beta}", (name,), None, {"beta": beta, **options}
        yield f"mixed, beta {beta}", *MIXED, {"beta": beta}


def ours_on_pairs(pairs, loss_types, weights, options):
    """Loss, gradients by the policy's log-probs, metrics: what trl_losses.py returns."""
    config = PreferenceConfig(loss_type=loss_types, loss_weights=weights or (), **options)
    arrays = {name: jnp.asarray(values) for name, values in pairs.items()}

    def mean(policy_chosen, policy_rejected):
        replaced = {"policy_chosen": policy_chosen, "policy_rejected": policy_rejected}
        losses, metrics = preference_loss(config, PairLogprobs(**{**arrays, **replaced}))
        return losses.mean(), metrics

    differentiated = jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)
    (loss, metrics), gradients = differentiated(arrays["policy_chosen"], arrays["policy_rejected"])
    return {"loss": loss, "gradients": gradients, "metrics": metrics}


def ours_on_kto(batch, beta):
    """As `ours_on_pairs`, for KTO."""
    arrays = {name: jnp.asarray(values) for name, values in batch.items()}
    kl = kto_kl(arrays["policy_mismatched"], arrays["reference_mismatched"])

    def mean(policy):
        losses = kto(policy, arrays["reference"], arrays["labels"], kl, beta=beta, **KTO_OPTIONS)
        return losses.mean()

    loss, gradient = jax.value_and_grad(mean)(arrays["policy"])
    metrics = kto_metrics(arrays["policy"], arrays["reference"], arrays["labels"], kl, beta=beta)
    metrics = {name: getattr(value, "value", value) for name, value in metrics.items()}
    return {"loss": loss, "gradients": [gradient], "metrics": metrics}
