"""Sequences in programs compiled for TPUs: the kernel of attention, its memory, and exchanges."""

import pytest

from tests.plan.conftest import NEEDS_LIBTPU
from tests.plan.programs import START

pytestmark = NEEDS_LIBTPU

ATTENTION = """
rows, length, text = %r
def attend(query, keys, values, text):
    reach = Reach(text=text, placement=placement)
    return attend_sequence(query, keys, values, reach, scale=128**-0.5).astype(jnp.bfloat16)

def step(*arrays):
    *arrays, text, slope = arrays
    return jax.vjp(lambda *three: attend(*three, text), *arrays)[1](slope)

split = "fsdp" if rows > 1 else None
shapes = [given((rows, 1, length, heads, 128), split, None, None, "tensor") for heads in (32, 8, 8)]
text = given((rows, 1, length), split, dtype=jnp.bool_) if text else None
used = {}
for name, function, more in (("forward", attend, ()), ("gradient", step, (shapes[0],))):
    found = compiled(function, *shapes, text, *more)
    used[name] = found.memory_analysis().temp_size_in_bytes
    assert found.as_text().count("tpu_custom_call") == {"forward": 1, "gradient": 3}[name]
    assert not square(found.as_text(), length), square(found.as_text(), length)
    assert not re.search("all-gather|all-to-all", found.as_text())
# All scores of a device would be rows/4 x 8 heads x length x length numbers of four bytes.
scores = 4 * max(1, rows // 4) * 8 * length**2
print(used, scores)
assert max(used.values()) < scores / 2
"""


MODEL = """
rows, length, windows, told = %r
whole = shape_of("meta-llama/Meta-Llama-3-8B-Instruct")
small = {"layers": 2, "mlp_width": 1024, "vocab_size": 1024, "width": 1024}
small |= {"heads": 8, "kv_heads": 4}  # one key head on a device; ATTENTION has those of 8B
config = dataclasses.replace(whole, **small, sliding_windows=windows)
model, axes = abstract_model(config, dtype="bfloat16", scan_layers=True)
placed = resolve_tree(axes, model.params, DEFAULT_RULES, mesh)
params = jax.tree.map(
    lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), model.params, placed
)

def loss(params, tokens, told):
    own = Model(config, params, placement)
    read = hidden_states(own, tokens, remat="full", **told)
    return jnp.square(read.astype(jnp.float32)).mean()

tokens = given((rows, length), "fsdp", dtype=jnp.int32)
kinds = {"mask": jnp.bool_, "segments": jnp.int32}
more = {told: given((rows, length), "fsdp", dtype=kinds[told])} if told else {}
found = compiled(jax.grad(loss) if %r else loss, params, tokens, more)
text = found.as_text()
assert [phase for phase in ("fwd", "dq", "dkv") if f"splash_mha_{phase}" in text] == %r
assert not square(text, length), square(text, length)
print(found.memory_analysis().temp_size_in_bytes / 2**20)
"""


STEP = """
from w2s_jax.models.config import ModelConfig
from w2s_jax.ops.sharding import make_mesh
from w2s_jax.plan.compiled import collectives
from w2s_jax.plan.topology import open_slice
from w2s_jax.plan.programs import training_programs
from w2s_jax.train.estimate import TrainingShapes
config = ModelConfig(
    architecture="llama", vocab_size=16384, width=1024, layers=2, heads=8, kv_heads=8,
    head_width=128, mlp_width=4096, max_positions=512, eos_ids=(2,),
)
layers, vocabulary = 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096), 2 * 1024 * 16384
mesh = make_mesh("fsdp=-1", open_slice("v5e:4x4").devices)
(program,) = training_programs(TrainingShapes(config, "sft", 16, 512), mesh).programs
compiled = program.trace().lower(lowering_platforms=("tpu",)).compile()
moved = sum(one.moved for one in collectives(compiled.as_text(), program.loops))
# In bfloat16: gathered forward, gathered back, gradients scattered. The vocabulary's parts are
# exchanged with the rows that they are multiplied by.
rows = 2 * 16 * 512 * 1024
assert 2 * 3 * layers * 15 / 16 < moved < 2 * 3 * layers + 6 * rows + vocabulary, moved / layers
"""


ATTENDED = [(1, 4096, False), (8, 4096, True), (1, 32768, False)]
# Rows, their length, windows of the layers, and what says which tokens see one another.
TRAINED = (8, 2560, (None, 1024), "segments"), True, ["fwd", "dq", "dkv"]
READ = (8, 2560, (None, None), "mask"), False, ["fwd"]


@pytest.fixture(scope="module")
def printed(run_together):
    sources = {f"attention {case}": START + ATTENTION % (case,) for case in ATTENDED}
    sources |= {"gradient": START + MODEL % TRAINED, "masked": START + MODEL % READ}
    return run_together(sources | {"step": STEP})


@pytest.mark.parametrize("case", ATTENDED)
def test_attention_of_8b_shapes_is_the_kernel(printed, case):
    print(printed(f"attention {case}"))


@pytest.mark.parametrize("name", ["gradient", "masked"])
def test_a_pass_of_layers_holds_no_scores_and_no_mask(printed, name):
    print(printed(name))


def test_a_step_gathers_weights_twice_and_scatters_gradients_once(printed):
    """What it exchanges is its weights thrice, and little else."""
    printed("step")
