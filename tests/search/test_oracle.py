"""The search against a brute-force one over the same draws."""

import numpy as np
import pytest

from tests.search.oracle import Oracle, assert_found
from tests.tiny import EOS, VOCAB, tiny_model
from w2s_jax.ops.logits import Sampling
from w2s_jax.search import Guide, search
from w2s_jax.search.config import cbs

PLAIN = Sampling(1.0)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(4, VOCAB, size).tolist() for size in (1, 2, 5, 9, 14)][::2]


@pytest.fixture(scope="module")
def models():
    return tiny_model(0, layers=1), Guide(tiny_model(1, layers=1), tiny_model(2, layers=1), 0.5)


CASES = {
    "beam": cbs(2, 3, 4, max_new_tokens=11, sampling=PLAIN),
    "one-token chunks, top-k and top-p, quirks": cbs(
        3, 2, 1, max_new_tokens=6, sampling=Sampling(0.7, 7, 0.8), reference_quirks=True
    ),
}
# Best of n, layers in a stack and the quirks in chunks of several tokens are in
# test_identities.py; emulated fine-tuning, several guides, texts and stop strings are in
# test_guidance.py.


@pytest.mark.parametrize("name", CASES)
def test_search_equals_brute_force(models, name):
    (policy, guide), config = models, CASES[name]
    results = search(policy, guide, PROMPTS, config, row_ids=range(10, 13))
    expected = assert_found(Oracle(policy, [guide], config, EOS), PROMPTS, results)
    ended = [kept.finished for beam in expected for kept in beam]
    assert any(ended), "no response of this case ends by EOS; change the seed"
