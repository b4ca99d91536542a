"""The search against a brute-force one over the same draws."""

import numpy as np
import pytest

from tests.search.oracle import Oracle, assert_found
from tests.tiny import EOS, VOCAB, tiny_model
from w2s_jax.ops.sampling import Sampling
from w2s_jax.search import Guide, search
from w2s_jax.search.presets import best_of_n, cbs

PLAIN = Sampling(1.0)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(4, VOCAB, size).tolist() for size in (1, 2, 5, 9, 14)][::2]


@pytest.fixture(scope="module")
def models():
    policy = tiny_model(0, layers=1)
    first = Guide(tiny_model(1, layers=1), tiny_model(2, layers=1))
    second = Guide(tiny_model(3, layers=1), tiny_model(4, layers=1), 0.5)
    return policy, (first, second)


CASES = {
    "beam": cbs(2, 3, 4, max_new_tokens=11, sampling=PLAIN),
    "one-token chunks": cbs(3, 2, 1, max_new_tokens=6, sampling=PLAIN),
    "one successor, top-k and top-p, quirks, whole chunks": cbs(
        3, 1, 5, max_new_tokens=10, sampling=Sampling(0.7, 7, 0.8), reference_quirks=True
    ),
    "quirks": cbs(2, 2, 4, max_new_tokens=10, sampling=PLAIN, reference_quirks=True),
    "best of n": best_of_n(5, max_new_tokens=12, sampling=PLAIN),
}
# Of these the objectives are those of two guides; emulated fine-tuning is in test_guidance.py.
TWO = {"beam", "quirks"}


@pytest.mark.parametrize("name", CASES)
def test_search_equals_brute_force(models, name):
    policy, guides = models
    guides, config = guides if name in TWO else guides[:1], CASES[name]
    results = search(policy, guides, PROMPTS, config, row_ids=range(10, 13))
    expected = assert_found(Oracle(policy, guides, config, EOS), PROMPTS, results)
    if name in {"beam", "quirks", "best of n"}:
        ended = [kept.finished for beam in expected for kept in beam]
        assert any(ended), "no response of this case ends by EOS; change the seed"
