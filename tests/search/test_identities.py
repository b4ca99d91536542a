"""Identities of DESIGN that hold for every search, on tiny random models."""

from dataclasses import replace

import numpy as np
import pytest

from tests.search.oracle import Oracle, assert_found, next_logprobs
from tests.tiny import EOS, VOCAB, tiny_model
from w2s_jax.ops.logits import Sampling
from w2s_jax.search import Guide, Request, search, search_models
from w2s_jax.search.config import best_of_n, cbs, eft, sample
from w2s_jax.search.methods import EFTProposer
from w2s_jax.search.session import start_session

PLAIN = Sampling(1.0)
RNG = np.random.default_rng(1)
PROMPTS = [RNG.integers(4, VOCAB, size).tolist() for size in (3, 7, 1, 12, 5)]
SHORT = [[4 + i] for i in range(8)]
BEAM = cbs(2, 2, 3, max_new_tokens=9, sampling=PLAIN, slots=4)
STEERED = eft(1.0, max_new_tokens=9, sampling=PLAIN, slots=5)


@pytest.fixture(scope="module")
def policy():
    return tiny_model(0, layers=1)


@pytest.fixture(scope="module")
def guide():
    return Guide(tiny_model(1, layers=1), tiny_model(2, layers=1))


def tokens_of(results):
    return [[h.tokens for h in result.hypotheses] for result in results]


def scores_of(results):
    return np.array([h.score for result in results for h in result.hypotheses])


def test_chunk_scores_add_up_to_the_score_of_the_whole(policy, guide):
    tuned, untuned = next_logprobs(guide.tuned), next_logprobs(guide.untuned)
    for prompt, result in zip(PROMPTS, search(policy, guide, PROMPTS, BEAM), strict=True):
        for hypothesis in result.hypotheses:
            whole = 0.0
            for place, token in enumerate(hypothesis.tokens):
                before = [*prompt, *hypothesis.tokens[:place]]
                whole += tuned(before)[token] - untuned(before)[token]
            assert hypothesis.score == pytest.approx(whole, abs=2e-4)


def test_one_long_chunk_is_best_of_n(policy, guide):
    """And what brute force finds."""
    config = best_of_n(6, max_new_tokens=10, sampling=PLAIN)
    beam = search(policy, guide, PROMPTS, cbs(1, 6, 10, max_new_tokens=10, sampling=PLAIN))
    best = search(policy, guide, PROMPTS, config)
    assert_found(Oracle(policy, [guide], config, EOS), PROMPTS, best)
    assert [r.best.tokens for r in beam] == [r.best.tokens for r in best]
    np.testing.assert_allclose(
        [r.best.score for r in beam], [r.best.score for r in best], atol=1e-4
    )
    assert all(len(r.hypotheses) == 6 for r in best)
    ended = [h.finished for r in best for h in r.hypotheses]
    assert {*ended} == {False, True}, "change the seed"


def side_by_side(policy, guide, requests):
    """The results of five requests by `STEERED`, from the first chunk on in a slot each."""
    models = search_models(policy, guide)
    session = start_session(models, STEERED, slots=5, prefix_capacity=16)
    for slot, request in enumerate(requests):
        session = session.insert(slot, request)
    while len(session.done_slots()) < 5:
        session = session.advance()
    found, failed = session.outcomes(range(5))
    assert not failed
    return list(found.values())


def test_eft_without_weight_or_with_equal_models_is_the_policy(policy, guide):
    oracle = Oracle(policy, (), sample(max_new_tokens=9, sampling=PLAIN), EOS)
    plain = [
        [kept.tokens for kept in oracle.search(prompt, row_id)]
        for row_id, prompt in enumerate(PROMPTS)
    ]
    unweighted = [Request(i, (tuple(prompt),), beta=0) for i, prompt in enumerate(PROMPTS)]
    assert tokens_of(side_by_side(policy, guide, unweighted)) == plain
    twins = search(policy, Guide(guide.tuned, guide.tuned), PROMPTS, STEERED)
    assert tokens_of(twins) == plain
    np.testing.assert_allclose(scores_of(twins), 0, atol=1e-6)


def test_each_request_has_its_own_beta(policy, guide):
    betas = (None, 0, 0.3, 2, 5)
    asked = [Request(8, (tuple(PROMPTS[0]),), beta=beta) for beta in betas]
    found = side_by_side(policy, guide, asked)
    for beta, result in zip(betas, found, strict=True):
        own = replace(STEERED, proposer=EFTProposer(1.0 if beta is None else float(beta)))
        assert_found(Oracle(policy, [guide], own, EOS), PROMPTS[:1], [result])
    assert len({tokens for of in tokens_of(found) for tokens in of}) >= 3


def test_greedy_search_follows_the_argmax(policy):
    """Also behind a prompt that is longer than the smallest room for prompts."""
    config = sample(max_new_tokens=6, sampling=Sampling(0.0))
    following = next_logprobs(policy)
    prompts = [*PROMPTS, RNG.integers(4, VOCAB, 30).tolist()]
    for prompt, result in zip(prompts, search(policy, None, prompts, config), strict=True):
        sequence = list(prompt)
        for _ in range(6):
            sequence.append(int(np.argmax(following(sequence))))
            if sequence[-1] == EOS:
                break
        assert list(result.best.tokens) == sequence[len(prompt) :]


def test_order_batch_and_slots_change_nothing(policy, guide):
    ids = list(range(5))
    together = search(policy, guide, PROMPTS, BEAM, row_ids=ids)
    order = [3, 0, 4, 2, 1]
    shuffled = search(policy, guide, [PROMPTS[i] for i in order], BEAM, row_ids=order)
    assert [r.row_id for r in shuffled] == order
    back = sorted(shuffled, key=lambda result: result.row_id)
    assert tokens_of(back) == tokens_of(together)
    # The same program on the same rows gives the same bits, wherever in the batch they stood.
    np.testing.assert_array_equal(scores_of(back), scores_of(together))
    alone = [search(policy, guide, [PROMPTS[i]], BEAM, row_ids=[i])[0] for i in ids]
    assert tokens_of(alone) == tokens_of(together)
    np.testing.assert_array_equal(scores_of(alone), scores_of(together))


def copies_of_finished(results):
    kept = [[h.tokens for h in result.hypotheses if h.finished] for result in results]
    assert any(kept), "no response ends by EOS here; change the seed"
    return sum(len(tokens) - len(set(tokens)) for tokens in kept)


def test_a_finished_hypothesis_is_kept_once(policy, guide):
    assert copies_of_finished(search(policy, guide, SHORT, BEAM)) == 0


def test_stacked_layers_search_the_same_and_with_the_quirks_what_ended_fills_the_beam(guide):
    """As brute force does with the layers one by one."""
    apart, stacked = (
        tiny_model(0, scan_layers=scan, sliding_windows=(4, None)) for scan in (False, True)
    )
    config = replace(BEAM, reference_quirks=True)
    results = search(stacked, guide, PROMPTS[:3] + SHORT, config)
    assert_found(Oracle(apart, [guide], config, EOS), PROMPTS[:3] + SHORT, results)
    assert copies_of_finished(results) > 0
