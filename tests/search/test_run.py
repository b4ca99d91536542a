"""The host's side: results, refilled slots, stop strings, wrong input."""

import inspect
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.search.oracle import Oracle, next_logprobs
from tests.tiny import EOS, VOCAB, tiny_model
from w2s_jax.errors import InputError, RowsFailed
from w2s_jax.models.model import Model
from w2s_jax.ops.logits import Sampling, choose, shortlist, token_logprobs
from w2s_jax.search import Guide, SearchConfig, search, search_models
from w2s_jax.search.config import METHODS, cbs, preset, sample
from w2s_jax.search.methods import EFTProposer, PolicyProposer, ProposedLogRatio
from w2s_jax.search.results import kept_tokens
from w2s_jax.text.prompts import cut
from w2s_jax.text.tokenizer import buckets

PLAIN = Sampling(1.0)
LETTERS = "<>|$abcdefghijklmnopqrs"


def decode(tokens):
    return "".join(LETTERS[token] for token in tokens)


@pytest.fixture(scope="module")
def policy():
    return tiny_model(0, layers=1)


@pytest.fixture(scope="module")
def guide():
    return Guide(tiny_model(1, layers=1), tiny_model(2, layers=1))


# Samples, and a search that scores what it draws alike, that several tests look at.
ENDS = (8, EOS, 19)
DRAWN = sample(max_new_tokens=8, sampling=PLAIN, slots=3, chunk_length=2, eos_ids=ENDS)
DRAWN_ROWS = range(50, 57)
ALONE = cbs(1, 1, 3, max_new_tokens=8, sampling=PLAIN, slots=3, eos_ids=ENDS)


def test_results_come_in_order_and_are_reported_as_they_finish(policy):
    prompts = [[4 + i] for i in range(7)]
    seen = []
    once = iter(DRAWN_ROWS)  # nor need they be a sequence
    unchecked = inspect.unwrap(search)
    results = unchecked(policy, None, prompts, DRAWN, row_ids=once, on_result=seen.append)
    assert [result.row_id for result in results] == list(DRAWN_ROWS)
    assert sorted(seen, key=lambda result: result.row_id) == results
    for result in results:
        assert result.best.finished == (result.best.tokens[-1] in ENDS)
        assert result.best.finished or len(result.best.tokens) == 8


def test_prompts_are_grouped_by_power_of_two():
    lengths = [1, 17, 18, 33, 34, 5]
    assert buckets(lengths) == {16: [0, 1, 5], 32: [2, 3], 64: [4]}
    assert buckets(lengths, slots=3) == {16: [0, 1, 5], 64: [2, 3, 4]}
    assert buckets(lengths, slots=8) == {64: [0, 1, 2, 3, 4, 5]}


def test_no_prompts_no_results(policy):
    assert search(policy, None, [], sample(max_new_tokens=2)) == []


def test_one_hypothesis_and_one_successor_is_sampling_at_any_chunk_length(policy, guide):
    prompts = [[4 + i] for i in range(7)]
    plain = search(policy, None, prompts, DRAWN, row_ids=DRAWN_ROWS)
    alone = search(policy, guide, prompts, ALONE, row_ids=DRAWN_ROWS)
    assert [r.best.tokens for r in alone] == [r.best.tokens for r in plain]


def test_a_stop_string_ends_the_response_before_it(policy, guide):
    """Across two chunks, within one and at once; looked for behind the prompt.

    As with tokenizers that drop a text's leading space: alone, a response reads differently.
    """

    def bare(tokens):
        return decode(tokens)[1:]

    prompts = [[4 + i] for i in range(7)]
    free = search(policy, guide, prompts, ALONE, row_ids=DRAWN_ROWS)
    texts = [decode(result.best.tokens) for result in free]
    across, within, at_once = stops = ("|o", "fd", "ke")
    places = [texts[0].find(across), texts[2].find(at_once), texts[3].find(within)]
    assert places == [2, 0, 3], "change the seed"
    heeding = replace(ALONE, stop=stops)
    stopped = search(policy, guide, prompts, heeding, decode=bare, row_ids=DRAWN_ROWS)
    for before, after in zip(free, stopped, strict=True):
        kept = cut(decode(before.best.tokens), stops)
        expected = decode(before.best.tokens) if kept is None else kept
        assert decode(after.best.tokens) == expected
        assert after.best.finished == (kept is not None or before.best.finished)
    # The score counts the kept tokens only.
    best = stopped[3].best
    assert len(best.tokens) == 3
    score = 0.0
    for place, token in enumerate(best.tokens):
        before = [*prompts[3], *best.tokens[:place]]
        score += next_logprobs(guide.tuned)(before)[token]
        score -= next_logprobs(guide.untuned)(before)[token]
    assert best.score == pytest.approx(score, abs=1e-4)


def test_kept_tokens_counts_a_token_that_holds_both():
    pieces = ["ab", "cST", "OP", "d"]
    text = lambda tokens: "".join(pieces[token] for token in tokens)  # noqa: E731
    assert kept_tokens([0, 1, 2, 3], text, ("STOP",)) == 2
    assert kept_tokens([0, 3], text, ("STOP",)) is None
    assert kept_tokens([0, 1], text, ("ab",)) == 0
    assert cut("a\nb\n", ("b", "\n")) == "a"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beam_width": 0}, "beam_width"),
        ({"successors": 0}, "successors"),
        ({"chunk_length": -1}, "chunk_length"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"slots": 0}, "slots"),
        ({"stop": ("",)}, "stop string is empty"),
    ],
)
def test_sizes_below_one_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        SearchConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_sampling_values_out_of_range_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Sampling(**fields)


def test_eos_ids_that_no_model_shares_are_refused(guide):
    wide = tiny_model(0, layers=1, vocab_size=30, eos_ids=(29,))
    config = cbs(2, 2, 2, max_new_tokens=4, reference_quirks=True)
    with pytest.raises(InputError, match="no EOS id"):
        search(wide, guide, [[4]], config)


BAD = 9
"""A token of prompts that no greedy search below draws."""


def changed(model, path, change):
    outer, inner = path
    held = {inner: change(model.params[outer][inner])}
    return Model(model.config, {**model.params, outer: held})


def never_drawing(model):
    """The model with the logit of a lower id for BAD, so that greedy draws take that."""
    return changed(model, ("head", "kernel"), lambda x: x.at[:, BAD].set(x[:, 4]))


def broken(model):
    """The model with an embedding of BAD that makes its logits NaN."""
    return changed(model, ("embed", "embedding"), lambda x: x.at[BAD, 0].set(jnp.nan))


@pytest.mark.parametrize(
    ("method", "at_fault"),
    [
        ("cbs", ("policy",)),
        ("cbs", ("tuned model",)),
        ("cbs", ("untuned model",)),
        ("eft", ("policy",)),
        ("eft", ("tuned model",)),
        ("eft", ("untuned model",)),
    ],
)
def test_a_row_that_a_model_fails_is_told_and_the_others_are_done(policy, guide, method, at_fault):
    configs = {
        "cbs": cbs(2, 2, 3, max_new_tokens=6, sampling=Sampling(0.0), slots=2),
        "eft": preset("eft", max_new_tokens=6, sampling=Sampling(0.0), slots=2, chunk_length=3),
    }
    prompts = [[4, 5], [6, BAD], [7, 8], [8, 4], [BAD, 5], [10, 11]]
    members = {"policy": policy, "tuned model": guide.tuned, "untuned model": guide.untuned}
    models = {name: never_drawing(model) for name, model in members.items()}
    steered = Guide(models["tuned model"], models["untuned model"])
    expected = search(models["policy"], steered, prompts, configs[method])
    others = [result for index, result in enumerate(expected) if index not in (1, 4)]
    assert all(BAD not in h.tokens for result in others for h in result.hypotheses)
    models |= {name: broken(models[name]) for name in at_fault}
    steered = Guide(models["tuned model"], models["untuned model"])
    seen = []
    with pytest.raises(RowsFailed, match=f"^row 1, 4: logits of the {at_fault[0]} are") as raised:
        search(models["policy"], steered, prompts, configs[method], on_result=seen.append)
    told = raised.value
    assert [(one.row_id, one.models) for one in told.failures] == [(1, at_fault), (4, at_fault)]
    # Slots that a failed row leaves are taken by others, which nothing of it reaches.
    for found in ([one for one in told.results if one], sorted(seen, key=lambda r: r.row_id)):
        assert [r.row_id for r in found] == [r.row_id for r in others]
        for one, other in zip(found, others, strict=True):
            assert [h.tokens for h in one.hypotheses] == [h.tokens for h in other.hypotheses]
            assert one.best.score == pytest.approx(other.best.score, abs=1e-4)


@pytest.mark.parametrize(
    "sampling", [Sampling(0.0), Sampling(0.7), Sampling(0.7, top_k=2), Sampling(1.0, 5, 0.5)]
)
def test_one_logit_that_is_no_number_is_found_whatever_is_drawn_from(policy, sampling):
    """Negative NaNs are what x86 makes of inf − inf, and are sorted below all numbers."""
    models = search_models(policy, None)

    @jax.jit
    def faults(logits):
        token = choose(*shortlist(logits, sampling), jax.random.split(jax.random.key(0), 4))
        mark = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        return PolicyProposer().faults(models, (logits,), mark)

    logits = np.tile(np.linspace(-1.0, 1.0, 8, dtype=np.float32), (4, 1))
    logits[:, 2] = [np.nan, -np.nan, np.inf, -np.inf]
    np.testing.assert_array_equal(faults(logits), [[True, False]] * 3 + [[False, False]])


def test_guides_may_exclude_tokens_from_a_mixture():
    """−inf for some ids is a distribution; only NaN, +inf or no finite logit is a fault."""

    def with_logit(token, value):
        logits = np.zeros((1, 1, 6), np.float32)
        logits[..., token] = value
        return logits

    flat, without = with_logit(0, 0), with_logit(2, -np.inf)
    none = np.full((1, 1, 6), -np.inf, np.float32)
    tiny = tiny_model(0, layers=1, vocab_size=6)
    models = search_models(tiny, Guide(tiny, tiny))
    proposer, mark = EFTProposer(1.0), np.zeros((1, 1), np.float32)
    mix, faults = (jax.jit(partial(of, models)) for of in (proposer.mix, proposer.faults))
    mixed = mix((flat, without, without), np.ones(1, np.float32))
    np.testing.assert_array_equal(np.isfinite(mixed[0, 0]), np.arange(6) != 2)
    assert not faults((flat, without, without), mark).any()
    policy = mix((flat, without, without), np.zeros(1, np.float32))
    np.testing.assert_allclose(policy, np.full((1, 1, 6), -np.log(6)), rtol=1e-6)
    found = faults((flat, none, without), mark)
    np.testing.assert_array_equal(found[0, 0], [False, True, False, False])
    # Probability 0 is −inf; a fault is NaN, for whichever token.
    logprobs = jax.jit(token_logprobs)
    assert logprobs(without, np.array([[2]])) == -np.inf
    for bad in (none, with_logit(1, np.inf), with_logit(1, np.nan)):
        assert np.isnan(logprobs(bad, np.array([[3]])))


def test_several_eos_ids_end_a_response_where_the_first_of_them_stands(policy):
    prompts = [[4 + i] for i in range(7)]
    several = search(policy, None, prompts, DRAWN, row_ids=DRAWN_ROWS)
    endless = Oracle(policy, (), DRAWN, eos=-1)
    last = set()
    for prompt, cut_off in zip(prompts, several, strict=True):
        (whole,) = endless.search(prompt, cut_off.row_id)
        places = [i for i, token in enumerate(whole.tokens) if token in ENDS]
        length = places[0] + 1 if places else 8
        assert cut_off.best.tokens == whole.tokens[:length]
        assert cut_off.best.finished == bool(places)
        last |= {whole.tokens[places[0]]} if places else set()
    assert last == set(ENDS), "change the seed"


def test_wrong_prompts_are_refused(policy, guide):
    config = cbs(2, 2, 2, max_new_tokens=4)
    with pytest.raises(InputError, match="row 1: the prompt has no tokens"):
        search(policy, guide, [[4], []], config)
    with pytest.raises(InputError, match="outside the vocabulary of 23"):
        search(policy, guide, [[VOCAB]], config)
    with pytest.raises(InputError, match="126 tokens and 4 new ones do not fit the policy's 128"):
        search(policy, guide, [[4] * 126], config)
    with pytest.raises(InputError, match="decode"):
        search(policy, guide, [[4]], cbs(stop=("x",)))
    with pytest.raises(InputError, match="at least one guide"):
        search(policy, None, [[4]], config)
    with pytest.raises(InputError, match="2 row ids for 1 prompts"):
        search(policy, guide, [[4]], config, row_ids=[1, 2])
    other = Guide(tiny_model(5, layers=1, vocab_size=2000), tiny_model(6, layers=1))
    with pytest.raises(InputError, match="the tuned model has 2000 logits, the policy 23"):
        search(policy, other, [[4]], config)


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        (["The film"], "not a list that holds str 'The film'"),
        ("The film", "not str 'The film'"),
        ([4, 5], "not a list that holds int 4"),
        ({"input_ids": [[4, 5]]}, "not dict {'input_ids': [[4, 5]]}"),
        ([[0.5, 1.0]], "not a list that holds list [0.5, 1.0]"),
        (7, "not int 7"),
    ],
)
def test_prompts_that_are_no_token_ids_are_refused_in_one_line(policy, prompts, told):
    unchecked = inspect.unwrap(search)  # without the test run's own checks of types
    with pytest.raises(InputError, match=re.escape(told)) as caught:
        unchecked(policy, None, prompts, sample(max_new_tokens=2))
    assert str(caught.value).startswith("prompts are a list of token ids for each prompt")
    assert "\n" not in str(caught.value)


def test_what_is_no_model_or_guide_is_refused_in_one_line(policy, guide):
    unchecked = inspect.unwrap(search_models)
    with pytest.raises(InputError, match="the policy is what load_model gives, not str"):
        unchecked("path/to/policy", None)
    with pytest.raises(InputError, match=r"a guide is Guide\(tuned, untuned\), not Model"):
        unchecked(policy, [guide.tuned, guide.untuned])
    with pytest.raises(InputError, match=r"config takes what search\.config\.cbs and others give"):
        inspect.unwrap(search)(policy, guide, [[4]], {"w": 2})


def test_models_of_a_guide_compute_in_the_wider_of_their_dtypes(guide):
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), guide.untuned.params)
    half = Model(guide.untuned.config, halves)
    found = search_models(guide.tuned, Guide(guide.tuned, half)).guides[0]
    assert found.tuned is guide.tuned
    assert found.untuned.dtype == jnp.float32
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.float32(x), y), halves, found.untuned.params
    )
    alike = search_models(guide.tuned, Guide(half, half)).guides[0]
    assert alike.tuned is alike.untuned is half
    with pytest.raises(InputError, match="not a model alone"):
        search_models(guide.tuned, guide.tuned)


def test_padded_vocabularies_of_bfloat16_are_one_and_padding_is_never_proposed(policy, guide):
    """Of bfloat16 models. With guides that steer, test_likelihood.py has them."""

    def padded(model, size):
        behind = ((0, 0), (0, size - VOCAB))
        table = np.pad(model.params["embed"]["embedding"], behind[::-1])
        head = np.pad(model.params["head"]["kernel"], behind)
        params = model.params | {"embed": {"embedding": table}, "head": {"kernel": head}}
        halves = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params)
        return Model(replace(model.config, vocab_size=size), halves)

    prompts = [[4 + i] for i in range(6)]
    # Of EOS ids the first is one that not all models know: another is scored behind a cut.
    quirks = {"reference_quirks": True, "eos_ids": (39, EOS)}
    config = cbs(2, 2, 3, max_new_tokens=12, sampling=Sampling(3.0), **quirks)
    wide = Guide(padded(guide.tuned, 30), padded(guide.untuned, VOCAB))
    results = search(padded(policy, 40), wide, prompts, config)
    hypotheses = [h for result in results for h in result.hypotheses]
    drawn = {token for hypothesis in hypotheses for token in hypothesis.tokens}
    assert len(drawn) > VOCAB // 2
    assert max(drawn) < VOCAB
    tuned, untuned = next_logprobs(wide.tuned), next_logprobs(wide.untuned)
    for prompt, result in zip(prompts, results, strict=True):
        for found in result.hypotheses:
            tokens = [*prompt, *found.tokens] if found.finished else [*prompt, *found.tokens, EOS]
            score = sum(
                tuned(tokens[:i])[tokens[i]] - untuned(tokens[:i])[tokens[i]]
                for i in range(1, len(tokens))
            )
            assert found.score == pytest.approx(score, abs=0.15)
    assert not all(hypothesis.finished for hypothesis in hypotheses), "none is cut; change the seed"


def test_presets_by_name():
    assert {preset(method).proposer.values_tokens for method in METHODS} == {False, True}
    assert preset("bon", n=7).beam_width == 7
    assert preset("cbs", w=2, k=3, l=9).rows == 6
    guided = preset("ivg", w=2, k=3, l=9, beta=0.5, eft_top_k=7)
    assert guided == replace(cbs(2, 3, 9), proposer=EFTProposer(0.5, 7), scorer=ProposedLogRatio())
    assert preset("eft", beta=0.5, eft_top_k=7).proposer == guided.proposer
    with pytest.raises(InputError, match="none of cbs, bon, eft, ivg, sample"):
        preset("beam")


def test_a_response_fills_whole_chunks_only_as_far_as_it_must():
    assert preset("sample", max_new_tokens=50).capacity == 52
    assert preset("cbs", max_new_tokens=50).capacity == 50
    assert preset("cbs", l=100, max_new_tokens=7).capacity == 7
