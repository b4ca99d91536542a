from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import VOCAB, tiny_model
from w2s_jax.models.lora import LoraConfig, init_adapter
from w2s_jax.train import losses
from w2s_jax.train.config import PreferenceConfig
from w2s_jax.train.logprobs import REFERENCE, response_logprobs
from w2s_jax.train.losses import PairLogprobs, preference_loss
from w2s_jax.train.objectives import (
    BASE,
    TUNED,
    UNTUNED,
    Policy,
    kto_loss,
    pair_loss,
    preference_objective,
    sft_loss,
    wspo_loss,
)

WIDTH = 11
KEY = jax.random.key(0)
LORA = LoraConfig(rank=2)


@pytest.fixture(scope="module")
def models():
    return [tiny_model(seed, layers=1) for seed in range(4)]


def rows(shape, seed=0, vocab=VOCAB):
    """Random rows with prompts of 1 to 3 tokens, padded on the right."""
    rng = np.random.default_rng(seed)
    length = rng.integers(5, WIDTH + 1, shape)[..., None]
    place = np.arange(WIDTH)
    return {
        "tokens": rng.integers(0, vocab, (*shape, WIDTH)).astype(np.int32),
        "segments": (place < length).astype(np.int32),
        "targets": (place >= rng.integers(1, 4, shape)[..., None]) & (place < length),
    }


def token_logprobs(model, batch):
    """Of every token by a plain log-softmax over all logits; 0 outside the targets."""
    tokens = np.asarray(batch["tokens"]).reshape(-1, WIDTH)
    targets = np.asarray(batch["targets"]).reshape(-1, WIDTH)
    logits = np.asarray(model(tokens), np.float64)
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = np.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    return np.where(targets[:, 1:], found, 0.0), logprobs


def sums(model, batch):
    return token_logprobs(model, batch)[0].sum(-1).reshape(np.shape(batch["tokens"])[:-1])


def test_sft_is_the_mean_over_targets_with_its_accuracy(models):
    model, batch = models[0], rows((5,))
    value, weight, metrics = jax.jit(sft_loss(Policy(model.config)))(model.params, {}, batch, KEY)
    found, logprobs = token_logprobs(model, batch)
    count = batch["targets"].sum()
    assert weight == count
    np.testing.assert_allclose(value, -found.sum() / count, rtol=1e-5)
    right = logprobs[:, :-1].argmax(-1) == batch["tokens"][:, 1:]
    expected = (right & batch["targets"][:, 1:]).sum() / count
    np.testing.assert_allclose(metrics["mean_token_accuracy"].value, expected, rtol=1e-6)
    assert metrics["num_tokens"] == batch["segments"].sum()


def test_sft_of_nothing_is_zero_with_a_gradient_of_zero(models):
    model, batch = models[0], rows((2,))
    batch |= {"targets": np.zeros_like(batch["targets"])}
    loss = sft_loss(Policy(model.config))
    slope = jax.jit(jax.value_and_grad(lambda p: loss(p, {}, batch, KEY)[0]))
    value, gradient = slope(model.params)
    assert value == 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))


def test_responses_are_summed_over_their_targets(models):
    batch = rows((3, 2))
    np.testing.assert_allclose(
        jax.jit(response_logprobs)(models[0], batch), sums(models[0], batch), atol=1e-4
    )


@pytest.mark.parametrize(
    ("options", "live"),
    [
        ({"loss_type": ("ipo",), "beta": 0.3}, True),
        ({"loss_type": ("simpo",)}, True),
        ({"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0, 0.5)}, False),
    ],
)
def test_pairs_are_the_losses_of_their_log_probs(models, options, live):
    model, reference = models[:2]
    batch, config = rows((4, 2)), PreferenceConfig(**options)
    ours, theirs = sums(model, batch), sums(reference, batch).astype(np.float32)
    lengths = batch["targets"].sum(-1)
    columns = (*ours.astype(np.float32).T, *theirs.T, *lengths.T.astype(np.int32))
    pairs = PairLogprobs(*map(jnp.asarray, columns))
    frozen = {REFERENCE: reference} if live else {}
    given = batch if live else batch | {"reference": theirs}
    loss = jax.jit(pair_loss(Policy(model.config), config))
    value, weight, metrics = loss(model.params, frozen, given, KEY)
    expected, expected_metrics = preference_loss(config, pairs)
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-4)
    assert weight == 4
    # The tokens of the chosen alone, as in TRL.
    chosen = {name: array[:, 0] for name, array in batch.items() if array.ndim == 3}
    _, logprobs = token_logprobs(model, chosen)
    right = (logprobs[:, :-1].argmax(-1) == chosen["tokens"][:, 1:]) & chosen["targets"][:, 1:]
    expected_accuracy = right.sum() / chosen["targets"].sum()
    np.testing.assert_allclose(metrics["mean_token_accuracy"].value, expected_accuracy, rtol=1e-6)
    for name, number in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-4, atol=1e-4, err_msg=name)


def test_pairs_count_by_their_weights_over_all_micro_batches(models):
    """A pair of weight 2 counts as the same pair twice, wherever micro-batches are cut."""
    model = models[0]
    batch, weights = rows((4, 2)), np.float32([1, 2, 1, 3])
    batch["reference"] = np.float32([[-9, -8], [-7, -9], [-8, -8], [-6, -7]])
    twice = jax.tree.map(lambda x: np.repeat(x, weights.astype(int), axis=0), batch)
    loss = jax.jit(pair_loss(Policy(model.config), PreferenceConfig(beta=0.5)))
    given = batch | {"weights": weights}
    value, weight, _ = loss(model.params, {}, given, KEY)
    expected, count, _ = loss(model.params, {}, twice, KEY)
    assert weight == count == 7
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    cuts = (slice(0, 2), slice(2, 4))
    micro = [{name: array[cut] for name, array in given.items()} for cut in cuts]
    parts = [loss(model.params, {}, one, KEY) for one in micro]
    whole = sum(float(part[0] * part[1]) for part in parts) / sum(float(part[1]) for part in parts)
    np.testing.assert_allclose(whole, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def adapted(models):
    """By an adapter: value, metrics and gradient of a loss of pairs against the base model."""
    model = models[0]
    loss = pair_loss(Policy(model.config, LORA), PreferenceConfig())

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(adapter):
        value, _, metrics = loss(adapter, {BASE: model}, rows((4, 2)), KEY)
        return value, metrics

    return run


def test_fresh_adapters_are_their_own_reference(models, adapted):
    (value, metrics), gradient = adapted(init_adapter(models[0].config, LORA, KEY))
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/chosen"], 0, atol=1e-6)
    size = dict.fromkeys(("lora_a", "lora_b"), 0.0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        size[path[-1].key] += float(np.abs(leaf).sum())
    assert size["lora_a"] == 0 < size["lora_b"]


def test_dropout_draws_from_the_key_and_spares_the_reference(models, adapted):
    model, lora = models[0], LoraConfig(rank=2, dropout=0.5)
    adapter = jax.tree.map(
        lambda a: np.asarray(a) + np.float32(0.3), init_adapter(model.config, lora, KEY)
    )
    loss = jax.jit(pair_loss(Policy(model.config, lora), PreferenceConfig()))
    batch = rows((4, 2))

    def value(key):
        return float(loss(adapter, {BASE: model}, batch, key)[0])

    assert value(jax.random.key(1)) != value(jax.random.key(2))
    assert value(jax.random.key(1)) == value(jax.random.key(1))
    assert value(None) == pytest.approx(float(adapted(adapter)[0][0]), rel=1e-6)


def test_kto_estimates_the_divergence_from_mismatched_responses(models):
    model, reference = models[:2]
    batch = rows((4, 2)) | {"labels": np.array([True, False, True, True])}
    config = PreferenceConfig(loss_type=("kto",), undesirable_weight=1.5)
    loss = jax.jit(kto_loss(Policy(model.config), config))
    value, _, metrics = loss(model.params, {REFERENCE: reference}, batch, KEY)
    ours, theirs = (sums(m, batch).astype(np.float32) for m in (model, reference))
    kl = max(float((ours[:, 1] - theirs[:, 1]).mean()), 0.0)
    assert metrics["kl"] == pytest.approx(kl, abs=1e-3)
    expected = losses.kto(
        jnp.asarray(ours[:, 0]), jnp.asarray(theirs[:, 0]), jnp.asarray(batch["labels"]),
        jnp.float32(kl), beta=0.1, undesirable_weight=1.5,
    ).mean()  # fmt: skip
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_wspo_follows_the_guides_shift(models):
    policy, reference, tuned, untuned = models
    batch, beta = rows((4,)), 0.5
    config = PreferenceConfig(loss_type=("wspo",), beta=beta)
    frozen = {REFERENCE: reference, TUNED: tuned, UNTUNED: untuned}
    loss = jax.jit(wspo_loss(Policy(policy.config), config))
    value, _, _ = loss(policy.params, frozen, batch, KEY)
    p, r, t, u = (token_logprobs(model, batch)[0] for model in models)
    errors = (beta * (p - r) - (t - u)) ** 2
    expected = (errors.sum(-1) / batch["targets"].sum(-1)).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sigmoid", "kto", "wspo"])
def test_the_objective_is_found_by_its_name(models, kind):
    options = {"loss_type": (kind,)}
    loss = preference_objective(Policy(models[0].config), PreferenceConfig(**options))
    assert loss.__qualname__.split(".")[0] == {"sigmoid": "pair"}.get(kind, kind) + "_loss"
