"""The mesh that is taken where none is asked for."""

CODE = """
import jax
jax.config.update("jax_platforms", "no-such-platform")
from w2s_jax.models.lora import LoraConfig
from w2s_jax.plan.presets import preset_mesh
from w2s_jax.plan.programs import SearchShapes
from w2s_jax.plan.shapes import shape_of
from w2s_jax.plan.training import TrainingShapes
from w2s_jax.search.presets import cbs
model, guide = shape_of("meta-llama/Meta-Llama-3-8B"), shape_of("HuggingFaceH4/zephyr-7b-beta")
config = cbs(2, 2, 30, max_new_tokens=256)
print(preset_mesh(SearchShapes(model, guide, guide, config, 128, 16), "v5e:4x4"))
shapes = TrainingShapes(model, "dpo", 16, 256, lora=LoraConfig(rank=4))
print(preset_mesh(shapes, "v5e:4x4"))
"""


def test_no_device_is_looked_for(run_python):
    search, training = run_python(CODE).splitlines()
    assert "tensor=8" in search
    assert training
