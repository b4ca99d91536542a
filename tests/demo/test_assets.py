import importlib.resources
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.demo import load_demo
from w2s_jax.evaluate.rewards import gold_rewards
from w2s_jax.text.tokenizer import load_tokenizer, same_vocabulary

MODELS = ("policy", "untuned", "tuned", "gold")
OTHER_GUIDE = ("mistral-untuned", "mistral-tuned")
ASSETS = importlib.resources.files("w2s_jax.demo") / "assets"


@pytest.fixture(scope="module")
def demo():
    return load_demo()


def test_the_assets_are_bfloat16_and_small():
    names = MODELS + OTHER_GUIDE
    files = [path for name in names for path in (ASSETS / name).iterdir()]
    assert sum(len(path.read_bytes()) for path in files) < 25_000_000
    for name in names:
        assert json.loads((ASSETS / name / "config.json").read_text())["torch_dtype"] == "bfloat16"
    card = json.loads((ASSETS / "card.json").read_text())
    assert set(card["exported"]) == {*names, "bytes"}


def test_models_load_in_float32_for_the_cpu(demo):
    leaves = jax.tree.leaves([demo.policy, demo.untuned, demo.tuned, demo.gold])
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def test_all_models_share_one_vocabulary(demo):
    for name in MODELS:
        assert same_vocabulary(load_tokenizer(str(ASSETS / name)), demo.tokenizer)
    assert len(demo.tokenizer) == demo.policy.config.vocab_size == demo.gold.config.vocab_size


def logprobs(model, rows):
    """Log-probs of all tokens but the first of each row; the rows are one batch."""
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    logits = np.asarray(model(tokens), np.float64)
    found = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return [found[i, np.arange(len(row) - 1), row[1:]] for i, row in enumerate(rows)]


def test_the_policy_finds_reviews_likelier_than_shuffled_ones(demo):
    review = (
        "This is one of the best movies I have ever seen. The acting is great and so is the story."
    )
    tokens = np.array(demo.tokenizer(review)["input_ids"], np.int32)
    shuffled = np.concatenate([tokens[:1], np.random.default_rng(0).permutation(tokens[1:])])
    likely, unlikely = (found.mean() for found in logprobs(demo.policy, [tokens, shuffled]))
    assert likely > unlikely + 2
    assert -likely < 3.5


def test_the_gold_reward_and_the_guide_tell_praise_from_blame(demo):
    praise = "A wonderful film. I loved every minute of it, and the acting is superb."
    blame = "A terrible film. I hated every minute of it, and the acting is awful."
    good, bad = gold_rewards(demo.gold, demo.tokenizer, [praise, blame])
    assert good > 1 > -1 > bad

    rows = [demo.tokenizer(text)["input_ids"] for text in (praise, blame)]
    tuned, untuned = (logprobs(model, rows) for model in (demo.tuned, demo.untuned))
    good, bad = (
        with_it.sum() - without.sum() for with_it, without in zip(tuned, untuned, strict=True)
    )
    assert good > bad
