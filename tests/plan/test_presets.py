"""The mesh that is taken where none is asked for."""

CODE = """
import jax
jax.config.update("jax_platforms", "no-such-platform")
from w2s_jax.models.lora import LoraConfig
from w2s_jax.plan.meshes import preset_mesh
from w2s_jax.plan.programs import GuideShapes, SearchShapes, shape_of
from w2s_jax.train.estimate import TrainingShapes
from w2s_jax.search.config import cbs
model, guide = shape_of("meta-llama/Meta-Llama-3-8B"), shape_of("HuggingFaceH4/zephyr-7b-beta")
config = cbs(2, 2, 30, max_new_tokens=256)
print(preset_mesh(SearchShapes(model, (GuideShapes(guide, guide),), config, 128, 16), "v5e:4x4"))
shapes = TrainingShapes(model, "dpo", 16, 256, lora=LoraConfig(rank=4))
print(preset_mesh(shapes, "v5e:4x4"))
"""


def test_no_device_is_looked_for(run_python):
    search, training = run_python(CODE, forked=True).splitlines()
    assert "tensor=8" in search
    assert training


UNEVEN = """
from w2s_jax.errors import InputError
from jax.sharding import AbstractMesh
from w2s_jax.ops.sharding import MESH_AXES
from w2s_jax.plan.meshes import judge
from w2s_jax.plan.topology import CHIPS
from w2s_jax.plan.matrix import Cell
from w2s_jax.plan.meshes import preset_mesh
from dataclasses import replace
from w2s_jax.plan.programs import search_programs
shapes = replace(Cell("v5e", "8B", "search").shapes(8)[0], slots=3)
try:
    search_programs(shapes, AbstractMesh((8, 1, 1), MESH_AXES))
except InputError as error:
    print(error)
print(judge(shapes, CHIPS["v5e"], (8, 1, 1)).why)
print(preset_mesh(shapes, "v5e:2x4"))
try:
    preset_mesh(replace(shapes, guides=(), policy=replace(shapes.policy, mlp_width=3)), "v5e:2x4")
except InputError as error:
    print(error)
"""


def test_a_batch_that_is_not_divided_is_named_as_the_user_gave_it(run_python):
    explicit, judged, chosen, none = run_python(UNEVEN, forked=True).splitlines()
    assert explicit == judged == "--batch-size 3 is not divisible by 8 parts of the mesh; try 8"
    assert chosen == "tensor=8"
    assert none == f"v5e:2x4: no mesh: {judged}"
