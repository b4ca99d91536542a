"""Search and training on golden checkpoints, an architecture after the other."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.search.oracle import next_logprobs
from w2s_jax.models.load import load_model
from w2s_jax.models.lora import LoraConfig, attach, init_adapter
from w2s_jax.models.model import Model
from w2s_jax.models.quantize import quantize, read_quantize
from w2s_jax.ops.logits import Sampling
from w2s_jax.search import Guide, search
from w2s_jax.search.config import cbs
from w2s_jax.train.logprobs import sequence_scores

pytestmark = pytest.mark.slow
GOLDEN = Path(__file__).parent.parent / "golden"
CASES = (
    "gemma3_text", "gpt_neox", "granite", "olmo", "olmo3", "opt_projected", "phi3_long", "smollm3",
)  # fmt: skip
PROMPTS = [[5, 9, 4, 11], [7] * 8]
CONFIG = cbs(2, 2, 3, max_new_tokens=6, sampling=Sampling(1.0), slots=2)


@pytest.fixture(scope="module", params=CASES)
def model(request):
    return load_model(GOLDEN / request.param)


def nudged(model, seed):
    """The model with its decoder's matrices changed a little."""
    rng = np.random.default_rng(seed)
    changed = jax.tree.map(
        lambda x: x + 0.1 * x.std() * rng.normal(size=x.shape).astype(np.float32), model.params
    )
    return replace(model, params=changed)


@pytest.mark.parametrize("spec", [None, "int8:2"])
def test_a_search_scores_what_it_finds_as_full_passes_do(model, spec):
    tuned = nudged(model, 1)
    policy, config = model, CONFIG
    if spec is not None:
        policy = Model(model.config, quantize(model.params, read_quantize(spec)))
        config = replace(CONFIG, policy_cache="int8")
    after, before = next_logprobs(tuned), next_logprobs(model)
    found = search(policy, Guide(tuned, model), PROMPTS, config)
    for prompt, result in zip(PROMPTS, found, strict=True):
        for hypothesis in result.hypotheses:
            whole = 0.0
            for place, token in enumerate(hypothesis.tokens):
                text = [*prompt, *hypothesis.tokens[:place]]
                whole += after(text)[token] - before(text)[token]
            assert hypothesis.score == pytest.approx(whole, abs=2e-4)


def test_an_adapters_gradients_are_the_same_recomputed_and_lower_the_loss(model):
    lora = LoraConfig(rank=2, alpha=4.0)
    adapter = init_adapter(model.config, lora, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(4, 50, (2, 12)), jnp.int32)
    segments = jnp.ones_like(tokens)

    @partial(jax.jit, static_argnames="remat")
    @jax.value_and_grad
    def loss(adapter, remat="none"):
        attached = replace(model, params=attach(model.params, adapter, lora))
        return -sequence_scores(attached, tokens, segments, remat=remat).logprobs.mean()

    plain, slope = loss(adapter)
    for remat in ("dots", "full"):
        jax.tree.map(
            partial(np.testing.assert_allclose, atol=1e-5), loss(adapter, remat=remat)[1], slope
        )
    stepped = jax.tree.map(lambda x, dx: x - 0.05 * dx, adapter, slope)
    assert loss(stepped)[0] < plain
