"""Search with a quantised policy and an int8 key/value cache; the guides stay as they are."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cli.test_search import tiny
from tests.search.oracle import Oracle, log_softmax
from tests.search.test_adapters import adapter
from tests.tiny import EOS, tiny_model
from w2s_jax.errors import InputError
from w2s_jax.models.model import Model
from w2s_jax.models.quantize import is_quantized, quantize, read_quantize
from w2s_jax.ops.logits import Sampling
from w2s_jax.search import Guide, SearchConfig, search, search_models, search_step, start_search
from w2s_jax.search.checkpoints import GuideSource, Sources, load, plan
from w2s_jax.search.config import cbs, eft
from w2s_jax.search.decode import (
    prefill,
    read_chunk,
    read_stems,
    read_step,
    start_cache,
    start_chunk,
)

PROMPTS = [[5, 9, 4, 11], [7] * 9, [6]]
# Fine enough that a random model's choices stay the same.
FINE = read_quantize("int8:2+head")
CONFIG = cbs(2, 2, 3, max_new_tokens=7, sampling=Sampling(1.0), slots=2, policy_cache="int8")
# Programs: their operations one by one would each be compiled.
put_prompt, stems, step = jax.jit(prefill), jax.jit(read_stems), jax.jit(read_step)


def quantized(model):
    return Model(model.config, quantize(model.params, FINE))


@pytest.fixture(scope="module")
def models():
    return [tiny_model(seed, layers=1, sharpness=8.0) for seed in range(3)]


def with_prompt(model, prompt):
    """An int8 cache that holds a prompt but for its last token."""
    cache = start_cache(model, slots=1, hypotheses=1, prefix_capacity=8, committed_capacity=4,
                        dtype=jnp.int8)  # fmt: skip
    padded = np.array(prompt[:-1] + [0] * (9 - len(prompt)), np.int32)
    return put_prompt(model, cache, 0, padded, len(prompt))


def logits_along(model, prompt, tokens):
    """Logits after the prompt and after each of the tokens, read one by one from an int8 cache."""
    found, cache = stems(model, with_prompt(model, prompt), np.array([[prompt[-1]]]))
    chunk, all_found = start_chunk(model, 1, 1, len(tokens), jnp.int8), [found]
    for at, token in enumerate(tokens):
        found, chunk = step(model, cache, chunk, np.array([[token]]), np.int32(at))
        all_found.append(found)
    return np.concatenate([np.asarray(x)[0] for x in all_found]), cache


@pytest.mark.parametrize(
    ("scan_layers", "fields"),
    [(False, {"layers": 1}), (True, {"sliding_windows": (None, 3), "attention_softcap": 4.0})],
)
def test_an_int8_cache_is_near_a_whole_one(scan_layers, fields):
    model = tiny_model(0, scan_layers=scan_layers, sharpness=8.0, **fields)
    prompt, tokens = [5, 9, 4, 11, 8], [7, 6, 20]
    found, cache = logits_along(model, prompt, tokens)
    exact = np.asarray(model(np.asarray([prompt + tokens], np.int32)))[0, len(prompt) - 1 :]
    # Keys and values are off by 1/254 of their largest entry at most, and layers pass that on
    # about as it is (norms keep the stream's size): a few hundredths of the logits' spread.
    spread = exact.std()
    assert 1e-6 < np.abs(found - exact).max() < 0.05 * spread, (found - exact, spread)
    for part in (cache.prefix, cache.committed):
        first = part if scan_layers else part[0]
        assert first.keys.dtype == first.values.dtype == jnp.int8
        assert first.key_scales.shape == (*first.keys.shape[:-1], 1)


def test_a_chunk_read_at_once_is_that_read_by_steps():
    model = tiny_model(0, scan_layers=False, layers=1, sharpness=8.0)
    prompt, tokens = [5, 9, 4, 11, 8], [7, 6, 20]
    by_steps, _ = logits_along(model, prompt, tokens)
    cache = with_prompt(model, prompt)
    scores, _, chunk = jax.jit(read_chunk)(model, cache, np.array([[8]]), np.array([[tokens]]))
    expected = [log_softmax(by_steps[i])[token] for i, token in enumerate(tokens)]
    np.testing.assert_allclose(scores[0, 0], expected, atol=1e-4)
    assert chunk[0].keys.dtype == jnp.int8


def test_a_search_with_a_quantised_policy_finds_nearly_the_same(models):
    policy, guide = models[0], Guide(*models[1:])
    oracle = Oracle(policy, [guide], CONFIG, EOS)
    found = search(quantized(policy), guide, PROMPTS, CONFIG)
    plain = [oracle.search(prompt, row_id)[0] for row_id, prompt in enumerate(PROMPTS)]
    same = [a.tokens == b.best.tokens for a, b in zip(plain, found, strict=True)]
    assert any(same), "all responses changed"
    for prompt, result in zip(PROMPTS, found, strict=True):
        # The guides' scores of what is found are whole.
        for hypothesis in result.hypotheses:
            score = oracle.implicit_reward(prompt, hypothesis.tokens)
            assert hypothesis.score == pytest.approx(score, abs=1e-4)


def test_a_state_keeps_the_policy_alone_in_int8(models):
    bundle = search_models(quantized(models[0]), Guide(*models[1:]))
    for config in (CONFIG, eft(0.5, policy_cache="int8")):
        state = start_search(bundle, config, slots=2, prefix_capacity=16)
        policy, *others = (*state.proposer, *state.scorer)
        assert policy.prefix[0].is_quantized
        assert policy.committed[0].is_quantized
        assert not any(cache.prefix[0].is_quantized for cache in others)
        assert len(others) == 2
    with pytest.raises(InputError, match="policy_cache is 'int4'; it must be auto or int8"):
        SearchConfig(policy_cache="int4")


def test_no_weight_is_converted_ahead_of_the_token_loop(models):
    """Nor the prefix: what a loop carries shows what stays alive beside it."""
    bundle = search_models(quantized(models[0]), Guide(*models[1:]))
    state = start_search(bundle, CONFIG, slots=2, prefix_capacity=16)
    lowered = search_step.lower(bundle, state)
    assert lowered.out_info.proposer[0].committed[0].keys.dtype == jnp.int8
    text = lowered.compile().as_text()
    loops = [line for line in text.splitlines() if re.search(r" while\(", line)]
    held = [line for line in loops if "s8[16,24]" in line]
    assert held, "the token loop reads the policy's int8 weights"
    for line in held:
        kernels = ("f32[16,4,4]", "f32[16,2,4]", "f32[4,4,16]", "f32[16,24]", "f32[24,16]")
        prefix = ("f32[2,16,2,4]", "f32[2,1,16,2,4]")
        assert not [shape for shape in (*kernels, *prefix) if shape in line]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    found = {name: tiny(root / name, seed) for seed, name in enumerate(("policy", "untuned"))}
    found["adapter"] = adapter(root / "adapter", found["policy"])
    return found


def test_only_the_policy_is_quantised_even_where_a_guide_is_the_same_checkpoint(folders):
    guide = GuideSource(folders["policy"], folders["untuned"])
    planned = plan(Sources(folders["policy"], (guide,), quantize=FINE))
    assert "the policy's weights are read as int8:2+head" in planned.notes()
    loaded = load(planned).models
    assert is_quantized(loaded.policy.params)
    for model in loaded.members[1:]:
        assert not is_quantized(model.params)


def test_a_policy_may_be_an_adapter_on_a_quantised_base(folders):
    guide = GuideSource(folders["policy"], folders["untuned"])
    tokens = np.arange(10, dtype=np.int32)[None] + 1
    found = {}
    for quantize_as in (None, FINE):
        planned = plan(Sources(folders["adapter"], (guide,), quantize=quantize_as))
        found[quantize_as] = load(planned).models.policy
    assert any("is an adapter beside" in line for line in planned.notes())
    assert is_quantized(found[FINE].params)
    whole, near = (np.asarray(model(tokens)) for model in found.values())
    assert np.abs(whole - near).max() < 0.1 * whole.std()
