"""Likelihoods against a NumPy float64 mixture of the models' plain logits, and their identities."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compilations
from tests.tiny import VOCAB, tiny_model
from w2s_jax.errors import InputError, RowsFailed
from w2s_jax.models.model import Model
from w2s_jax.search import Guide, SearchModels, likelihood, search_models
from w2s_jax.search.likelihood import (
    Response,
    compile_scores,
    padded_shape,
    score_responses,
    token_likelihoods,
)
from w2s_jax.search.methods import EFTProposer, PolicyProposer

BETA = 0.7
STEERED = EFTProposer(BETA)
BATCHES = {"top": 3, "batch_size": 4}


@pytest.fixture(scope="module")
def models():
    """A policy with a padded embedding, and two guides, the second of weight −0.5."""
    policy = tiny_model(0, layers=1, vocab_size=VOCAB + 5)
    first = Guide(tiny_model(1, layers=1), tiny_model(2, layers=1))
    second = Guide(tiny_model(3, layers=1), tiny_model(4, layers=1, vocab_size=VOCAB + 1), -0.5)
    return search_models(policy, [first, second])


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def plain_logits(model, row):
    """[X, V] of one sequence; one width for all, so that a model is compiled once."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(row)] = row
    return np.asarray(model(padded))[0, : len(row)]


def mixture(models, rows, beta, *, count):
    """Log-probs [count, V] of the EFT mixture for the last `count` tokens of the rows.

    `rows` holds one member's whole sequence each.
    """
    read = [
        log_softmax(plain_logits(model, row)[-count - 1 : -1])[:, :VOCAB]
        for model, row in zip(models.members, rows, strict=True)
    ]
    total = read[0]
    for guide, tuned, untuned in zip(models.guides, read[1::2], read[2::2], strict=True):
        total = total + beta * guide.weight * (tuned - untuned)
    return log_softmax(total)


def draw(seed, *shape):
    return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)


def check(found, rows, expected, top):
    """`found` (log-probs, greedy, ids, values of one row) against log-probs of all tokens."""
    logprobs, greedy, ids, values = found
    count = len(rows)
    np.testing.assert_allclose(logprobs, expected[np.arange(count), rows], atol=1e-4)
    np.testing.assert_array_equal(greedy, expected.argmax(-1) == rows)
    np.testing.assert_allclose(values, -np.sort(-expected, axis=-1)[:, :top], atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(expected, ids, -1), values, atol=1e-4)


def in_blocks(patch, block_bytes):
    """Lets only so many bytes of logits be alive, in programs that nothing else shares."""
    patch.setattr(likelihood, "BLOCK_BYTES", block_bytes)
    plain = likelihood._likelihoods.__wrapped__
    program = jax.jit(partial(plain), static_argnames=("proposer", "top"))
    patch.setattr(likelihood, "_likelihoods", program)


@pytest.mark.parametrize("block_bytes", [None, 1500], ids=["at once", "in blocks"])
def test_the_mixture_equals_brute_force_in_float64(models, monkeypatch, block_bytes):
    if block_bytes:
        in_blocks(monkeypatch, block_bytes)
    tokens = draw(0, 3, 11)
    found = token_likelihoods(models, STEERED, tokens, top=4)
    assert found.logprobs.dtype == np.float32
    assert not np.asarray(found.logprobs[:, 0]).any()
    assert not np.asarray(found.greedy[:, 0]).any()
    for b, row in enumerate(tokens):
        expected = mixture(models, [row] * 5, BETA, count=10)
        parts = (found.logprobs, found.greedy, found.top_ids, found.top_logprobs)
        check([np.asarray(part)[b, 1:] for part in parts], row[1:], expected, 4)
    assert np.asarray(found.greedy).any(), "no token was greedy: the test shows nothing"


def test_only_a_block_of_logits_is_alive(models):
    """The mixed logits of all rows, float32, must not stand in the compiled program's memory."""
    vocabulary, rows, width = 8192, 8, 128
    wide = search_models(tiny_model(0, layers=1, vocab_size=vocabulary), None)
    tokens = np.zeros((rows, width), np.int32)
    row = ((tokens, np.ones_like(tokens, bool), np.zeros(rows, np.int32)),)
    betas = np.zeros(rows, np.float32)

    def temporary(block_bytes):
        with pytest.MonkeyPatch.context() as patch:
            in_blocks(patch, block_bytes)
            arguments = (wide, PolicyProposer(), row, tokens, tokens == 0, betas, 2)
            program = likelihood._likelihoods.lower(*arguments).compile()
            return program.memory_analysis().temp_size_in_bytes

    whole = 4 * rows * width * vocabulary
    assert temporary(1 << 27) >= whole
    assert temporary(whole // 32) < whole / 4


def test_beta_zero_and_equal_guides_are_the_policy(models):
    tokens, none = draw(1, 3, 11), np.zeros(3, np.float32)
    alone = search_models(models.policy, None)
    narrow = search_models(models.policy, Guide(*[tiny_model(5, layers=1)] * 2))
    # The policy alone also proposes the ids of its padded embedding; within 0 .. VOCAB − 1 the
    # three differ by their share.
    whole = log_softmax([plain_logits(models.policy, row) for row in tokens])
    shared = whole[..., :VOCAB] - np.log(np.exp(whole[..., :VOCAB]).sum(-1, keepdims=True))
    for held, proposer, beta, logprobs in (
        (models, STEERED, none, shared),
        (narrow, EFTProposer(3.0), None, shared),
        (models, PolicyProposer(), None, shared),
        (alone, PolicyProposer(), None, whole),
    ):
        found = token_likelihoods(held, proposer, tokens, beta=beta, top=4).logprobs[:, 1:]
        expected = np.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], -1)[..., 0]
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_each_row_has_its_own_beta(models):
    tokens, betas = draw(2, 3, 11), np.array([0.0, BETA, 2.0], np.float32)
    found = token_likelihoods(models, STEERED, tokens, beta=betas, top=4).logprobs
    for row, beta in enumerate((0.0, None, 2.0)):
        same = None if beta is None else np.full(3, beta, np.float32)
        alike = token_likelihoods(models, STEERED, tokens, beta=same, top=4).logprobs
        np.testing.assert_allclose(found[row], alike[row], atol=1e-5)


def test_padding_changes_nothing(models):
    tokens = draw(3, 3, 11)
    mask = np.arange(11) < np.array([[7], [11], [9]])
    whole = token_likelihoods(models, STEERED, tokens, top=4)
    padded = np.where(mask, tokens, VOCAB - 1).astype(np.int32)
    found = token_likelihoods(models, STEERED, padded, mask, top=4)
    np.testing.assert_allclose(found.logprobs[mask], whole.logprobs[mask], atol=1e-5)
    np.testing.assert_array_equal(found.greedy[mask], whole.greedy[mask])
    np.testing.assert_array_equal(found.top_ids[:, :7], whole.top_ids[:, :7])
    assert not np.asarray(found.logprobs)[~mask].any()
    assert not np.asarray(found.greedy)[~mask].any()


def test_a_lone_token_has_no_likelihood(models):
    found = token_likelihoods(models, PolicyProposer(), draw(4, 2, 1), top=2)
    assert found.logprobs.shape == found.greedy.shape == (2, 1)
    assert found.top_ids.shape == (2, 1, 2)
    assert not np.asarray(found.logprobs).any()


def test_responses_of_many_lengths_behind_one_or_several_prompts(models):
    rng = np.random.default_rng(5)

    def ids(low, high):
        return tuple(rng.integers(0, VOCAB, rng.integers(low, high)).tolist())

    responses = [Response((ids(9, 30),), ids(16, 30)) for _ in range(3)]
    responses += [Response((ids(1, 9),), ids(1, 9)) for _ in range(3)]
    responses += [
        Response(tuple(ids(1, 9) for _ in models.members), ids(1, 9), beta=2.0) for _ in range(4)
    ]
    heard = {}
    found = score_responses(models, STEERED, responses, on_scored=heard.__setitem__, **BATCHES)
    assert all(heard[index] is scored for index, scored in enumerate(found))
    for response, scored in zip(responses, found, strict=True):
        prompts = response.prompts if len(response.prompts) > 1 else response.prompts * 5
        beta = BETA if response.beta is None else response.beta
        rows = [[*prompt, *response.tokens] for prompt in prompts]
        expected = mixture(models, rows, beta, count=len(response.tokens))
        parts = (scored.logprobs, scored.greedy, scored.top_ids, scored.top_logprobs)
        check(parts, np.asarray(response.tokens), expected, 3)


def test_what_is_compiled_ahead_is_all_that_scores(models):
    """Also of rows that are far shorter than the others."""
    rows = [Response(((1,),), (4, 5)), Response(((1, 2),), (6,) * 30)]
    settings = {"top": 2, "batch_size": 2}  # of which no other test has a program
    compile_scores(models, PolicyProposer(), rows[1:], **settings)
    with compilations() as later:
        found = score_responses(
            models, PolicyProposer(), rows, shape=padded_shape(rows[1:]), **settings
        )
    assert later == []
    expected = score_responses(models, PolicyProposer(), rows, **settings)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_a_row_that_a_model_fails_is_told_and_the_others_are_scored(models):
    bad = 9
    embedding = models.guides[0].untuned.params["embed"]["embedding"].at[bad, 0].set(jnp.nan)
    params = {**models.guides[0].untuned.params, "embed": {"embedding": embedding}}
    untuned = Model(models.guides[0].untuned.config, params)
    guides = (replace(models.guides[0], untuned=untuned), *models.guides[1:])
    responses = [Response(((4, 5),), (6, 7)), Response(((4, bad),), (6,)), Response(((8,),), (5,))]
    heard = {}
    with pytest.raises(RowsFailed, match="^row 1: logits of the untuned model 0 are") as raised:
        score_responses(
            SearchModels(models.policy, guides), STEERED, responses,
            on_scored=heard.__setitem__, **BATCHES,
        )  # fmt: skip
    assert [row is None for row in raised.value.results] == [False, True, False]
    assert sorted(heard) == [0, 2]
    assert all(np.isfinite(scored.logprobs).all() for scored in heard.values())


def test_greedy_tokens_carry_the_very_log_prob_of_the_top(models):
    greedy = [3]
    for _ in range(12):
        expected = mixture(models, [[*greedy, 0]] * 5, BETA, count=1)
        greedy.append(int(expected[0].argmax()))
    asked = [Response(((3,),), tuple(greedy[1:]))]
    (found,) = score_responses(models, STEERED, asked, **BATCHES)
    assert found.greedy.all()
    np.testing.assert_array_equal(found.logprobs, found.top_logprobs[:, 0])


def test_a_row_may_fill_every_position(models):
    positions = models.policy.config.max_positions
    tokens = tuple(draw(6, positions + 1).tolist())
    (found,) = score_responses(models, PolicyProposer(), [Response((tokens[:1],), tokens[1:])])
    assert found.logprobs.shape == (positions,)
    with pytest.raises(InputError, match=f"row 0: {positions + 1} tokens to read exceed the"):
        score_responses(models, PolicyProposer(), [Response((tokens[:1],), (*tokens[1:], 1))])


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (Response(((),), (1,)), "at least one token"),
        (Response(((1,),), ()), "at least one token"),
        (Response(((1,), (1,)), (1,)), "2 prompts for 5 models"),
        (Response(((1,),), (VOCAB,)), f"outside the vocabulary of {VOCAB}"),
        (Response(((-1,),), (1,)), "outside the vocabulary"),
    ],
)
def test_wrong_responses_are_named(models, response, message):
    good = Response(((1,),), (2,))
    with pytest.raises(InputError, match=f"row 1: .*{message}"):
        score_responses(models, PolicyProposer(), [good, response])


def test_top_beyond_the_vocabulary_is_refused(models):
    with pytest.raises(InputError, match=f"top is {VOCAB + 1}"):
        score_responses(models, PolicyProposer(), [Response(((1,),), (2,))], top=VOCAB + 1)


def test_blocks_need_no_top_tokens(models, monkeypatch):
    tokens = draw(5, 3, 20)
    whole = token_likelihoods(models, PolicyProposer(), tokens)
    in_blocks(monkeypatch, 1500)
    parts = token_likelihoods(models, PolicyProposer(), tokens)
    np.testing.assert_allclose(parts.logprobs, whole.logprobs, atol=1e-5)
