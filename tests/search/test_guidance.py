"""Further guidance on the same core, against a brute-force search over the same draws."""

from dataclasses import replace

import numpy as np
import pytest

from tests.search.oracle import Oracle, assert_found
from tests.tiny import EOS, VOCAB, tiny_model
from w2s_jax.ops.sampling import Sampling
from w2s_jax.search import FunctionScorer, Guide, search
from w2s_jax.search.presets import cbs, eft, ivg
from w2s_jax.search.selectors import Maximin, TopW
from w2s_jax.text.conversations import Conversation

PLAIN = Sampling(1.0)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(4, VOCAB, size).tolist() for size in (1, 2, 5, 9, 14)]


@pytest.fixture(scope="module")
def models():
    policy = tiny_model(0, layers=1)
    first = Guide(tiny_model(1, layers=1), tiny_model(2, layers=1))
    second = Guide(tiny_model(3, layers=1), tiny_model(4, layers=1), 0.5)
    return policy, (first, second)


CASES = {
    "eft of few tokens": eft(1.5, max_new_tokens=12, sampling=PLAIN, eft_top_k=3),
    "ivg": ivg(2, 2, 4, 0.5, max_new_tokens=8, sampling=PLAIN),
    "maximin": cbs(2, 3, 4, max_new_tokens=8, sampling=PLAIN, selector=Maximin(0.3)),
}


@pytest.mark.parametrize("name", CASES)
def test_search_equals_brute_force(models, name):
    policy, guides = models
    guides, config = guides[:1] if name == "ivg" else guides, CASES[name]
    results = search(policy, guides, PROMPTS, config, row_ids=range(10, 15))
    expected = assert_found(Oracle(policy, guides, config, EOS), PROMPTS, results)
    assert any(kept.finished for beam in expected for kept in beam), "change the seed"


def test_maximin_keeps_others_than_the_highest_sum(models):
    """So that the case above can fail: its selector chooses unlike the one of its neighbours."""
    policy, guides = models
    config = CASES["maximin"]
    beams = [
        [
            Oracle(policy, guides, replace(config, selector=selector), EOS).search(prompt, 10)
            for prompt in PROMPTS
        ]
        for selector in (config.selector, TopW())
    ]
    assert beams[0] != beams[1]


def spell(tokens) -> str:
    return "".join(chr(ord("a") + token) for token in tokens if token != EOS)


def vowels(prompts, responses):
    """Reads prompt and response: vowels in the response that the prompt has not."""
    pairs = zip(prompts, responses, strict=True)
    return [3.0 * sum(letter in "aeiou" for letter in set(r) - set(p)) for p, r in pairs]


def evenness(prompts, responses):
    return [-abs(len(response) - 6) for response in responses]


@pytest.mark.parametrize("guided", [True, False], ids=["beside guides", "alone"])
def test_functions_of_texts_equal_brute_force(models, guided):
    policy, guides = models
    guides = guides if guided else ()
    scorers = [FunctionScorer(vowels, 0.5), FunctionScorer(evenness, weight=2)]
    config = cbs(2, 2, 4, max_new_tokens=9, sampling=PLAIN)
    results = search(
        policy,
        guides or None,
        PROMPTS,
        config,
        row_ids=range(10, 15),
        scorers=scorers,
        conversations=[Conversation(text=spell(prompt)) for prompt in PROMPTS],
        decode=spell,
    )
    oracle = Oracle(policy, guides, config, EOS, scorers=scorers, decode=spell)
    beams = assert_found(oracle, PROMPTS, results)
    assert all(len(kept.objectives) == len(guides) + 2 for beam in beams for kept in beam)
    assert any(kept.finished for beam in beams for kept in beam)
