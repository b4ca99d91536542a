import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.evaluate.rewards import NEGATIVE, POSITIVE, gold_rewards
from w2s_jax.models.encoder import EncoderConfig, init_classifier
from w2s_jax.text.bpe import save_bpe, train_bpe
from w2s_jax.text.tokenizer import load_tokenizer

TEXTS = ["good film", "a very bad film indeed, " * 9, "so " * 100, "", "fine"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_bpe(train_bpe(TEXTS, 270), directory, max_length=64)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def classifier():
    config = EncoderConfig(
        vocab_size=270, width=16, layers=1, heads=2, mlp_width=16, max_positions=64, pad_id=1,
        initializer_range=0.5,
    )  # fmt: skip
    return init_classifier(config, jax.random.key(0))


def test_a_reward_is_the_positive_logit_minus_the_negative_one(classifier, tokenizer):
    rewards = gold_rewards(classifier, tokenizer, TEXTS, batch_size=2)
    for text, reward in zip(TEXTS, rewards, strict=True):
        tokens = jnp.array([tokenizer(text)["input_ids"][:64]])
        logits = classifier(tokens, jnp.ones(tokens.shape, bool))[0]
        np.testing.assert_allclose(reward, logits[POSITIVE] - logits[NEGATIVE], atol=1e-5)


def test_rewards_do_not_depend_on_the_company_or_the_batch_size(classifier, tokenizer):
    together = gold_rewards(classifier, tokenizer, TEXTS, batch_size=2)
    backwards = gold_rewards(classifier, tokenizer, TEXTS[::-1], batch_size=3)[::-1]
    np.testing.assert_allclose(together, backwards, atol=1e-5)


def test_no_texts_give_no_rewards(classifier, tokenizer):
    assert gold_rewards(classifier, tokenizer, []).shape == (0,)
