"""What a training step for a TPU slice exchanges: its weights thrice, and little else."""

import importlib.util

import pytest

CODE = """
from w2s_jax.models.config import ModelConfig
from w2s_jax.ops.meshes import make_mesh
from w2s_jax.plan.compiled import collectives
from w2s_jax.plan.topology import open_slice
from w2s_jax.plan.training import TrainingShapes, training_program
config = ModelConfig(
    architecture="llama", vocab_size=16384, width=1024, layers=2, heads=8, kv_heads=8,
    head_width=128, mlp_width=4096, max_positions=512, eos_ids=(2,),
)
layers, vocabulary = 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096), 2 * 1024 * 16384
mesh = make_mesh("fsdp=-1", open_slice("v5e:4x4").devices)
program = training_program(TrainingShapes(config, "sft", 16, 512), mesh).program
compiled = program.trace().lower(lowering_platforms=("tpu",)).compile()
moved = sum(one.moved for one in collectives(compiled.as_text(), program.loops))
# In bfloat16: gathered forward, gathered back, gradients scattered. The vocabulary's parts are
# exchanged with the rows that they are multiplied by.
rows = 2 * 16 * 512 * 1024
assert 2 * 3 * layers * 15 / 16 < moved < 2 * 3 * layers + 6 * rows + vocabulary, moved / layers
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu, the TPU compiler")
def test_weights_are_gathered_twice_and_gradients_scattered_once(run_python):
    run_python(CODE)
