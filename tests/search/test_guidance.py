"""Further guidance on the same core, against a brute-force search over the same draws."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.search.oracle import Oracle, assert_found
from tests.tiny import EOS, VOCAB, tiny_model
from w2s_jax.ops.logits import Sampling
from w2s_jax.search import FunctionScorer, Guide, search
from w2s_jax.search.config import cbs, ivg
from w2s_jax.search.methods import Maximin, TopW
from w2s_jax.text.prompts import Conversation

PLAIN = Sampling(1.0)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(4, VOCAB, size).tolist() for size in (1, 2, 5, 9, 14)]


@pytest.fixture(scope="module")
def models():
    policy = tiny_model(0, layers=1)
    first = Guide(tiny_model(1, layers=1), tiny_model(2, layers=1))
    second = Guide(tiny_model(3, layers=1), tiny_model(4, layers=1), 0.5)
    return policy, (first, second)


def test_integrated_value_guidance_equals_brute_force(models):
    """Which steers by two guides, but for the policy's few likeliest tokens, and values by them."""
    policy, guides = models
    config = ivg(2, 2, 4, 0.5, max_new_tokens=8, sampling=PLAIN, eft_top_k=3)
    results = search(policy, guides, PROMPTS, config, row_ids=range(10, 15))
    expected = assert_found(Oracle(policy, guides, config, EOS), PROMPTS, results)
    assert any(kept.finished for beam in expected for kept in beam), "change the seed"


def spell(tokens) -> str:
    return "".join(chr(ord("a") + token) for token in tokens if token != EOS)


# No two responses are valued alike: among equals roundings would decide.
def novelty(prompts, responses):
    """Reads prompt and response: letters of the response that the prompt has not."""
    pairs = zip(prompts, responses, strict=True)
    return [
        3 * sum(math.cos(ord(letter) * i) for i, letter in enumerate(r, 1) if letter not in p)
        for p, r in pairs
    ]


def lilt(prompts, responses):
    return [sum(math.sin(ord(letter) * i) for i, letter in enumerate(r, 1)) for r in responses]


def test_functions_of_texts_beside_a_guide_stop_strings_and_maximin_equal_brute_force(models):
    policy, (guide, _) = models
    scorers = [FunctionScorer(novelty, 0.5), FunctionScorer(lilt, weight=2)]
    config = cbs(2, 3, 4, max_new_tokens=9, sampling=PLAIN, selector=Maximin(0.3), stop=("oe", "l"))
    results = search(
        policy,
        guide,
        PROMPTS,
        config,
        row_ids=range(10, 15),
        scorers=scorers,
        conversations=[Conversation(text=spell(prompt)) for prompt in PROMPTS],
        decode=spell,
    )

    def oracle(config):
        return Oracle(policy, [guide], config, EOS, scorers=scorers, decode=spell)

    beams = assert_found(oracle(config), PROMPTS, results)
    assert all(len(kept.objectives) == 3 for beam in beams for kept in beam)
    ends = {kept.tokens[-1:] == (EOS,) for beam in beams for kept in beam if kept.finished}
    assert ends == {False, True}, "change the seed or the stop strings"
    by_sum = oracle(replace(config, selector=TopW()))
    rows = zip(PROMPTS, range(10, 15), strict=True)
    assert beams != [by_sum.search(*row) for row in rows], "maximin chooses as the sum does"
