from functools import partial

import jax
import numpy as np
import pytest

import w2s_jax.evaluate.rewards as evaluate_rewards
from tests.tiny import VOCAB, tiny_model
from w2s_jax.errors import InputError
from w2s_jax.evaluate.rewards import gold_rewards, rewards
from w2s_jax.models.reward import (
    NEGATIVE,
    POSITIVE,
    EncoderConfig,
    RewardModel,
    contrast,
    init_classifier,
)
from w2s_jax.text.tokenizer import load_tokenizer, save_bpe, train_bpe

TEXTS = ["good film", "a very bad film indeed, " * 9, "so " * 100, "", "fine"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_bpe(train_bpe(TEXTS, 270), directory, max_length=64)
    return load_tokenizer(directory)


def drawn(**fields):
    """A classifier drawn in NumPy: nothing is compiled."""
    config = EncoderConfig(width=16, layers=1, heads=2, mlp_width=16, max_positions=64, **fields)
    shapes = jax.eval_shape(partial(init_classifier, config), jax.random.key(0))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: (0.5 * rng.normal(size=x.shape)).astype(x.dtype), shapes)
    return jax.device_put(drawn)


@pytest.fixture(scope="module")
def classifier():
    return drawn(vocab_size=270, pad_id=1)


jitted = jax.jit(lambda model, tokens, mask: model(tokens, mask))


def test_a_reward_is_the_positive_logit_minus_the_negative_one(classifier, tokenizer):
    rewards = gold_rewards(classifier, tokenizer, TEXTS, batch_size=2)
    logits = jitted(classifier, *padded([tokenizer(text)["input_ids"][:64] for text in TEXTS]))
    np.testing.assert_allclose(rewards, logits[:, POSITIVE] - logits[:, NEGATIVE], atol=1e-5)


def test_rewards_do_not_depend_on_the_company_or_the_batch_size(classifier, tokenizer):
    together = gold_rewards(classifier, tokenizer, TEXTS, batch_size=2)
    backwards = gold_rewards(classifier, tokenizer, TEXTS[::-1], batch_size=3)[::-1]
    np.testing.assert_allclose(together, backwards, atol=1e-5)


def test_no_texts_give_no_rewards(classifier, tokenizer):
    assert gold_rewards(classifier, tokenizer, []).shape == (0,)


# Reward models of either kind, on rows of token ids.


def reward_model(labels):
    model = tiny_model(0, layers=1)
    kernel = np.random.default_rng(1).normal(size=(model.config.width, len(labels)))
    head = jax.device_put({"kernel": kernel.astype(np.float32)})
    params = {name: tree for name, tree in model.params.items() if name != "head"}
    return RewardModel(model.config, params, head, labels)


@pytest.fixture(scope="module")
def encoded():
    """Rows of 1 to 60 tokens, two widths' worth, in no order of length."""
    rng = np.random.default_rng(2)
    return [rng.integers(0, VOCAB, length).tolist() for length in (40, 3, 60, 1, 33, 32, 7)]


def padded(encoded):
    """All rows in one batch, with their mask."""
    mask = np.arange(64) < np.array([[len(row)] for row in encoded])
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(encoded)
    return tokens, mask


@pytest.mark.parametrize(
    ("labels", "label", "weights"),
    [
        (("reward",), None, [1]),
        (("reward",), "reward", [1]),
        (("bad", "good"), None, [-1, 1]),
        (("bad", "good"), "bad", [1, 0]),
        (("a", "b", "c"), "c", [0, 0, 1]),
        (("a", "b", "c"), "1", [0, 1, 0]),
        (("a", "b", "c"), 0, [1, 0, 0]),
        (("2", "1", "0"), "2", [1, 0, 0]),  # a name before a number
    ],
)
def test_which_logits_make_the_reward(labels, label, weights):
    np.testing.assert_array_equal(contrast(labels, label), weights)


@pytest.mark.parametrize(
    ("labels", "label", "weights"),
    [(("bad", "good"), None, [-1, 1]), (("a", "b", "c"), "c", [0, 0, 1])],
)
def test_rewards_are_the_logits_of_their_labels(encoded, labels, label, weights):
    model, rows = reward_model(labels), [row for row in encoded if len(row) <= 32]
    found = rewards(model, rows, label=label, batch_size=2)
    assert found.dtype == np.float32
    logits = np.asarray(jitted(model, *padded(rows)))
    np.testing.assert_allclose(found, logits @ np.array(weights, np.float32), atol=2e-5)


def test_an_encoders_labels_count_alike(encoded):
    model = drawn(vocab_size=VOCAB, labels=3, label_names=("a", "b", "c"))
    rows = [row for row in encoded if len(row) > 32]
    found = rewards(model, rows, label="b", batch_size=2)
    np.testing.assert_allclose(found, jitted(model, *padded(rows))[:, 1], atol=1e-5)


def test_few_programs_are_compiled_for_many_lengths(monkeypatch):
    """One for each shape."""
    shapes, seen = set(), set()

    def unread(model, tokens, mask, weights):
        shapes.add(tokens.shape)
        return np.zeros(len(tokens), np.float32)

    monkeypatch.setattr(evaluate_rewards, "_rewards", unread)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, VOCAB, length).tolist() for length in range(1, 129, 3)]
    keep = lambda some, _: seen.update(some.tolist())  # noqa: E731
    rewards(reward_model(("reward",)), rows, batch_size=4, on_batch=keep)
    assert shapes == {(4, 32), (4, 64), (4, 128)}
    assert seen == set(range(len(rows)))


def test_batches_are_told_as_they_end(encoded):
    told = np.full(len(encoded), np.nan, np.float32)

    def keep(rows, values):
        told[rows] = values

    found = rewards(reward_model(("reward",)), encoded, batch_size=2, on_batch=keep)
    np.testing.assert_array_equal(told, found)


def test_equal_rows_tie_exactly_and_are_read_once(encoded, monkeypatch):
    model = reward_model(("reward",))
    real, read = evaluate_rewards._rewards, []

    def counting(model, tokens, mask, weights):
        read.append(len(np.unique(tokens, axis=0)))
        return real(model, tokens, mask, weights)

    once = rewards(model, encoded, batch_size=2)
    monkeypatch.setattr(evaluate_rewards, "_rewards", counting)
    found = rewards(model, [*encoded, *encoded[::-1]], batch_size=2)
    np.testing.assert_array_equal(found[: len(encoded)], found[len(encoded) :][::-1])
    assert sum(read) == len(encoded)
    np.testing.assert_allclose(found[: len(encoded)], once, atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "label", "row", "message"),
    [
        (("a", "b", "c"), None, [1], r"has 3 labels; choose one of 0 \(a\), 1 \(b\), 2 \(c\)"),
        (("a", "b"), "z", [1], r"no label 'z'; choose one of 0 \(a\), 1 \(b\)"),
        (("a", "b"), "2", [1], "no label '2'"),
        (("a", "b"), -1, [1], "no label -1"),
        (("a",), None, [], "row 2: 0 tokens"),
        (("a",), None, [1] * 129, "row 2: 129 tokens for a reward model of 128 positions"),
    ],
)
def test_wrong_rows_and_labels_are_told(labels, label, row, message):
    with pytest.raises(InputError, match=message):
        rewards(reward_model(labels), [[1], row], label=label)
