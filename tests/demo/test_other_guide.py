"""The embedded guide of another family and vocabulary, and what it does to the embedded policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.demo import load_demo, load_other_guide
from w2s_jax.demo.run import read_openings, text_scorer
from w2s_jax.evaluate.rewards import gold_rewards
from w2s_jax.search import search
from w2s_jax.search.config import cbs, sample
from w2s_jax.text.prompts import Conversation, decode_tokens, encode_prompt
from w2s_jax.text.tokenizer import same_vocabulary

OPENINGS = 16
SETTINGS = {"max_new_tokens": 50, "slots": OPENINGS}


@pytest.fixture(scope="module")
def demo():
    return load_demo()


@pytest.fixture(scope="module")
def other():
    return load_other_guide()


def test_its_family_and_vocabulary_are_not_the_policys(demo, other):
    policy, guide = demo.policy.config, other.tuned.config
    assert (policy.architecture, guide.architecture) == ("llama", "mistral")
    assert other.untuned.config == guide
    assert guide.kv_heads < guide.heads
    assert guide.sliding_windows == (64,) * guide.layers
    assert len(other.tokenizer) == guide.vocab_size < policy.vocab_size
    assert not same_vocabulary(other.tokenizer, demo.tokenizer)
    assert {leaf.dtype for leaf in jax.tree.leaves([other.tuned, other.untuned])} == {
        jnp.dtype("float32")
    }


def summed_logprob(model, tokens, start):
    """Log-probability of tokens[start:] by one plain forward of everything, padded."""
    padded = np.zeros((1, -(-len(tokens) // 32) * 32), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(model(padded)[0], np.float64)
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return sum(logprobs[i - 1, tokens[i]] for i in range(start, len(tokens)))


def implicit_reward(other, opening, response, *, ended):
    """The published way: encode the whole text, leave out what it shares with its prompt."""
    prompt, tokens = (other.tokenizer(text)["input_ids"] for text in (opening, opening + response))
    tokens += [other.tokenizer.eos_token_id] * ended
    start = 0
    while start < len(prompt) and prompt[start] == tokens[start]:
        start += 1
    return summed_logprob(other.tuned, tokens, start) - summed_logprob(other.untuned, tokens, start)


def test_it_tells_praise_from_blame(other):
    praise = " wonderful film. I loved every minute of it, and the acting is superb."
    blame = " terrible film. I hated every minute of it, and the acting is awful."
    good, bad = (implicit_reward(other, "This is a", text, ended=False) for text in (praise, blame))
    assert good > bad + 2


@pytest.mark.slow
def test_cbs_across_vocabularies_raises_the_gold_reward_by_scores_of_texts(demo, other):
    openings = read_openings(OPENINGS)
    prompts = [encode_prompt(demo.tokenizer, opening) for opening in openings]

    def rewards(results):
        texts = [
            opening + decode_tokens(demo.tokenizer, result.best.tokens)
            for opening, result in zip(openings, results, strict=True)
        ]
        return gold_rewards(demo.gold, demo.tokenizer, texts)

    base = search(demo.policy, None, prompts, sample(**SETTINGS))
    steered = search(
        demo.policy,
        None,
        prompts,
        cbs(**SETTINGS),
        scorers=[text_scorer(other)],
        conversations=[Conversation(opening) for opening in openings],
        decode=lambda tokens: decode_tokens(demo.tokenizer, tokens),
    )
    gain = rewards(steered) - rewards(base)
    # Over 64 openings it is 5.1 ± 0.3.
    assert gain.mean() > 3
    for opening, result in zip(openings, steered, strict=True):
        tokens = result.best.tokens
        ended = tokens[-1] in demo.policy.config.eos_ids
        response = decode_tokens(demo.tokenizer, tokens)
        expected = implicit_reward(other, opening, response, ended=ended)
        assert result.best.score == pytest.approx(expected, abs=1e-3)
