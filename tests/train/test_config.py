import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.errors import InputError
from w2s_jax.train.config import LOSSES, RENAMED, PreferenceConfig
from w2s_jax.train.losses import PAIR_LOSSES, PairLogprobs, kto, preference_loss, wspo

ROWS = [jnp.array(row) for row in ([-9.0, -4.0], [-8.0, -7.0], [-8.5, -5.0], [-9.5, -6.0])]
LENGTHS = [jnp.array([4, 2]), jnp.array([2, 7])]
PAIRS = PairLogprobs(*ROWS, *LENGTHS)
POLICY = ("policy_chosen", "policy_rejected")

WRONG = [
    ({"loss_type": ("sigmod",)}, "unknown loss type 'sigmod'; did you mean 'sigmoid'?"),
    ({"loss_type": ("aot_pair",)}, "did you mean 'aot_unpaired'?"),
    ({"loss_type": ("DPO",)}, "did you mean 'sigmoid'?"),
    ({"loss_type": ("xyz",)}, "one of sigmoid, hinge, "),
    ({"loss_type": ("kto", "sft")}, "'kto' takes no pairs and cannot be mixed"),
    ({"loss_weights": (1.0, 2.0)}, "loss_weights has 2 entries for 1 loss types"),
    ({"loss_weights": (float("nan"),)}, "loss_weights must be finite"),
    ({"beta": 0.0}, "beta must be above 0, not 0.0"),
    ({"beta": float("inf")}, "beta must be above 0"),
    ({"label_smoothing": 0.5}, r"label_smoothing must be in [0, 0.5), not 0.5"),
    ({"label_smoothing": -0.1}, "label_smoothing must be in"),
    ({"loss_type": ("exo_pair",)}, "'exo_pair' needs label_smoothing above 0"),
    ({"loss_type": ("discopop",), "discopop_tau": 0.0}, "discopop_tau must be above 0"),
    ({"loss_type": ("simpo",), "simpo_gamma": -1.0}, "simpo_gamma must be 0 or more"),
    ({"loss_type": ("hinge",), "label_smoothing": 0.1}, "label_smoothing has no effect on loss"),
    ({"loss_type": ("simpo",), "cpo_alpha": 0.0}, "cpo_alpha has no effect on loss type simpo"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_told_in_one_line(options, message):
    with pytest.raises(InputError) as error:
        PreferenceConfig(**options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_hints_name_losses():
    assert set(RENAMED.values()) <= set(LOSSES)
    assert not set(RENAMED) & set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_every_option_of_a_loss_is_one_of_the_config(name):
    config = PreferenceConfig((name,), label_smoothing=0.01 if name == "exo_pair" else 0.0)
    assert set(config.options(name)) <= set(PreferenceConfig.__dataclass_fields__)
    loss = {**PAIR_LOSSES, "kto": kto, "wspo": wspo}[name]
    keywords = {
        name for name, each in inspect.signature(loss).parameters.items()
        if each.kind is each.KEYWORD_ONLY
    }  # fmt: skip
    assert keywords == set(config.options(name))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_loss_reads_the_arrays_that_its_entry_names(name):
    """Without one of them it is refused; with no other it has a value."""
    config = PreferenceConfig((name,), label_smoothing=0.01 if name == "exo_pair" else 0.0)
    given = {each: getattr(PAIRS, each) for each in (*LOSSES[name].arrays, *POLICY)}
    values, _ = preference_loss(config, PairLogprobs(**given))
    assert np.isfinite(values).all()


def test_what_losses_need():
    assert set(LOSSES["simpo"].arrays) == {*POLICY, "chosen_lengths", "rejected_lengths"}
    assert not PreferenceConfig(("genarm", "sft")).needs_reference
    assert PreferenceConfig(("genarm", "hinge")).needs_reference
    assert PreferenceConfig(("kto",)).needs_reference
    assert "chosen_nll" not in LOSSES["orpo"].arrays


def test_a_missing_array_is_told():
    with pytest.raises(InputError, match="'ipo' needs chosen_lengths, which this batch has not"):
        preference_loss(PreferenceConfig(("ipo",)), PairLogprobs(*ROWS))
    with pytest.raises(InputError, match="'kto' is not a loss on pairs"):
        preference_loss(PreferenceConfig(("kto",)), PAIRS)


def test_the_default_is_dpo():
    assert PreferenceConfig().losses == ("sigmoid",)
    values, metrics = preference_loss(PreferenceConfig(), PAIRS)
    chosen, rejected, reference_chosen, reference_rejected = map(np.asarray, ROWS)
    rewards = 0.1 * (chosen - reference_chosen), 0.1 * (rejected - reference_rejected)
    np.testing.assert_allclose(values, np.log1p(np.exp(rewards[1] - rewards[0])), rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/chosen"], rewards[0].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/rejected"], rewards[1].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["logps/rejected"], rejected.mean(), rtol=1e-6)


def test_a_mix_is_the_weighted_sum():
    mixed = PreferenceConfig(("simpo", "sft"), (2.0, 0.5), simpo_gamma=0.3)
    simpo, metrics = preference_loss(PreferenceConfig(("simpo",), simpo_gamma=0.3), PAIRS)
    sft, _ = preference_loss(PreferenceConfig(("sft",)), PAIRS)
    values, mixed_metrics = preference_loss(mixed, PAIRS)
    np.testing.assert_allclose(values, 2 * simpo + 0.5 * sft, rtol=1e-6)
    assert mixed_metrics == metrics
    assert metrics["logps/chosen"] == (-9 / 4 - 4 / 2) / 2  # the mean log-prob of a token


def test_rewards_without_a_reference_are_log_probs():
    bare = PairLogprobs(ROWS[0], ROWS[1], None, None, *LENGTHS)
    metrics = preference_loss(PreferenceConfig(("sft",), beta=0.5), bare)[1]
    assert metrics["rewards/chosen"] == -3.25
    assert preference_loss(PreferenceConfig(("genarm",), beta=0.5), PAIRS)[1] == metrics
    with_reference = preference_loss(PreferenceConfig(("sft",), beta=0.5), PAIRS)[1]
    assert with_reference["rewards/chosen"] == 0.125


def test_orpo_s_own_nll_gives_way():
    other = PairLogprobs(*ROWS, *LENGTHS, jnp.array([1.0, 2.0]))
    config = PreferenceConfig(("orpo",))
    given = preference_loss(config, other)[0] - preference_loss(config, PAIRS)[0]
    np.testing.assert_allclose(given, [1 - 9 / 3, 2 - 4 / 3], rtol=1e-5)
