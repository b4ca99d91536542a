"""Eight devices find what one finds, in a process of its own with virtual CPU devices."""

CODE = """
import jax, numpy as np
from tests.tiny import tiny_model
from w2s_jax.errors import InputError
from w2s_jax.models.model import Model, shard_model
from w2s_jax.models.quantize import quantize, read_quantize
from w2s_jax.ops.logits import Sampling
from w2s_jax.ops.sharding import make_mesh
from w2s_jax.search import Guide, search, search_models, start_search, search_step
from w2s_jax.search.config import cbs
from w2s_jax.search.methods import EFTProposer

assert jax.device_count() == 8
rng = np.random.default_rng(0)
prompts = [rng.integers(4, 24, size).tolist() for size in (3, 9, 1, 6, 12)]
shape = {"vocab_size": 24, "layers": 1, "sharpness": 8.0}
# Of stacked layers and of others, of whole and of quantised weights and caches; the guides steer
# every token and read the chunks too.
models = [tiny_model(seed, scan_layers=seed < 2, **shape) for seed in range(3)]
models[0] = Model(models[0].config, quantize(models[0].params, read_quantize("int8:2+head")))
config = cbs(
    2, 2, 3, max_new_tokens=7, sampling=Sampling(1.0), slots=4,
    proposer=EFTProposer(0.5), policy_cache="int8",
)
mesh = make_mesh("data=2,fsdp=2,tensor=2")
one = search(models[0], Guide(*models[1:]), prompts, config)
policy, tuned, untuned = (shard_model(model, mesh) for model in models)
many = search(policy, Guide(tuned, untuned), prompts, config, mesh=mesh)
for left, right in zip(one, many, strict=True):
    assert [h.tokens for h in left.hypotheses] == [h.tokens for h in right.hypotheses]
    scores = [[h.score for h in r.hypotheses] for r in (left, right)]
    np.testing.assert_allclose(*scores, atol=2e-4)

bundle = search_models(policy, Guide(tuned, untuned))
state = start_search(bundle, config, slots=4, prefix_capacity=16, mesh=mesh)
before = jax.tree.map(lambda x: x.sharding, state)
after = jax.tree.map(lambda x: x.sharding, search_step(bundle, state))
jax.tree.map(np.testing.assert_equal, before, after)
kept = before.proposer[0].prefix
for sharding in (kept.keys, kept.key_scales, before.scorer[0].prefix.keys):
    assert sharding.spec[3] == "tensor", sharding
try:
    start_search(bundle, config, slots=3, prefix_capacity=16, mesh=mesh)
except InputError as error:
    assert "slots of size 3 is not divisible" in str(error)
else:
    raise AssertionError("a mesh that does not divide the slots must be refused")
print("same")
"""


def test_eight_devices_equal_one(run_python):
    assert run_python(CODE, devices=8).endswith("same\n")
