"""Reading, searching and quantised products on an accelerator, against the CPU."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.accelerator.near_ties import Margins, assert_alike, margin
from tests.models.test_quantize import plain
from tests.tiny import EOS, VOCAB
from w2s_jax.models.model import Model, shard_model
from w2s_jax.models.quantize import quantize, read_quantize
from w2s_jax.ops.logits import Sampling
from w2s_jax.plan.meshes import choose_mesh
from w2s_jax.plan.programs import GuideShapes, SearchShapes
from w2s_jax.search import Guide, search
from w2s_jax.search.config import cbs, eft
from w2s_jax.search.decode import prefill, read_stems, start_cache

pytestmark = pytest.mark.accelerator
SEARCHES = {
    "cbs": cbs(2, 2, 3, max_new_tokens=7, sampling=Sampling(1.0), slots=2),
    "eft": eft(0.5, beam_width=2, max_new_tokens=6, sampling=Sampling(1.0), slots=2),
}
NEAR = 1e-3
PROMPTS = [np.random.default_rng(n).integers(4, VOCAB, n).tolist() for n in (3, 9, 14)]


@pytest.mark.parametrize("method", SEARCHES)
def test_a_search_finds_what_the_cpu_finds(method, make, exact, on_cpu):
    config = SEARCHES[method]
    models = [make(seed) for seed in range(3)]
    found = search(models[0], Guide(*models[1:]), PROMPTS, config)

    def again(policy, guide):
        return search(policy, guide, PROMPTS, config)

    def alike(policy, guide):
        oracle = Margins(policy, [guide], config, EOS)
        assert 0 < margin(oracle, PROMPTS[0], 0) < np.inf
        assert_alike(found, expected, PROMPTS, oracle, near=NEAR)

    expected = on_cpu(again, models[0], Guide(*models[1:]))
    on_cpu(alike, models[0], Guide(*models[1:]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", ["int8", "int4"])
def test_quantised_weights_compute_what_they_stand_for(spec, dtype, make, toy, on_cpu, distance):
    config = read_quantize(
        {"int8": "int8", "int4": f"int4:{2 if toy else 32}+head+embedding"}[spec]
    )
    model = make(0)
    params = quantize(jax.tree.map(lambda leaf: leaf.astype(dtype), model.params), config)
    tokens = np.arange(12, dtype=np.int32)[None] + 3

    def wide(params):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), plain(params))

    with jax.default_matmul_precision("highest"):
        found = Model(model.config, params)(tokens)
        expected = on_cpu(lambda params: Model(model.config, wide(params))(tokens), params)
    assert distance(found, expected) < {"float32": 1e-4, "bfloat16": 0.05}[dtype]


def test_a_long_prompt_is_read_as_by_one_float32_pass(make, toy, on_cpu, distance):
    length = 256 if toy else 8192
    wide = {} if toy else {"layers": 2, "heads": 4, "kv_heads": 2, "head_width": 64}
    model = make(0, max_positions=length + 8, **wide)
    narrow = Model(model.config, jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params))
    rounded = Model(model.config, jax.tree.map(lambda x: x.astype(jnp.float32), narrow.params))
    tokens = np.random.default_rng(0).integers(4, VOCAB, length).astype(np.int32)

    @jax.jit
    def read(model, tokens):
        cache = start_cache(
            model, slots=1, hypotheses=1, prefix_capacity=length, committed_capacity=8
        )
        padded = jnp.append(tokens[:-1], 0)
        cache = prefill(model, cache, jnp.int32(0), padded, jnp.int32(length))
        return read_stems(model, cache, tokens[None, -1:])[0][0, 0]

    found = read(narrow, jnp.asarray(tokens))
    expected = on_cpu(lambda model: model(tokens[None])[0, -1], rounded)
    assert distance(found, expected) < 0.05


def test_auto_is_a_mesh_of_the_devices_here(make, exact):
    models, config = [make(seed) for seed in range(3)], SEARCHES["cbs"]
    guides = (GuideShapes(models[1].config, models[2].config),)
    # As many slots as devices, so that they always divide.
    config = replace(config, slots=2 * jax.device_count())
    shapes = SearchShapes(
        models[0].config, guides, config, prompt_tokens=14, slots=config.slots, dtype="float32"
    )
    chosen = choose_mesh(shapes)
    kind = jax.devices()[0].device_kind
    assert chosen.told.startswith("--mesh auto: ")
    assert chosen.told.endswith(f"({kind})")
    assert chosen.why is None
    expected = search(models[0], Guide(*models[1:]), PROMPTS, config)
    if chosen.mesh is not None:
        models = [shard_model(model, chosen.mesh) for model in models]
    found = search(models[0], Guide(*models[1:]), PROMPTS, config, mesh=chosen.mesh)
    for ours, right in zip(found, expected, strict=True):
        scores = [[h.score for h in one.hypotheses] for one in (ours, right)]
        np.testing.assert_allclose(*scores, atol=NEAR, rtol=NEAR)
