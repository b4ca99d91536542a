"""The mesh of the devices that are here is the one that a plan names for such a slice."""

import pytest

# Searches are judged without type checks, as in test_planning.py.
START = """
from w2s_jax.errors import InputError
from w2s_jax.plan import meshes
from w2s_jax.plan.meshes import preset_mesh
from w2s_jax.plan.programs import GuideShapes, SearchShapes, shape_of
from w2s_jax.train.estimate import TrainingShapes
from w2s_jax.search.config import cbs

class Device:
    process_index = 0
    def __init__(self, kind, platform, memory, slice_index):
        self.device_kind, self.platform = kind, platform
        self.memory, self.slice_index = memory, slice_index
    def memory_stats(self):
        return None if self.memory is None else {"bytes_limit": self.memory}

def on(shapes, count, kind, platform="tpu", memory=None, slices=1):
    devices = [Device(kind, platform, memory, number % slices) for number in range(count)]
    meshes.jax.devices = meshes.jax.local_devices = lambda: devices
    return meshes.choose_mesh(shapes)

model, guide = shape_of("meta-llama/Meta-Llama-3-8B"), shape_of("HuggingFaceH4/zephyr-7b-beta")
config = cbs(2, 2, 30, max_new_tokens=256)
search = SearchShapes(model, (GuideShapes(guide, guide),), config, 128, 16)
training = TrainingShapes(model, "sft", 16, 1024)
H100 = "NVIDIA H100 80GB HBM3"
"""
AS_PLANNED = """
cases = [
    (search, 4, "TPU v5 lite", "v5e:2x2"), (search, 2, H100, "h100:2"),
    (training, 8, "TPU v5 lite", "v5e:2x4"), (training, 8, "TPU v6 lite", "v6e:2x4"),
    (training, 4, "TPU v5", "v5p:2x2x1"), (training, 8, "TPU7x", "tpu7x:2x2x1"),
    (training, 8, "NVIDIA H200", "h200:8"), (training, 8, "NVIDIA A100-SXM4-80GB", "a100:8"),
]
for shapes, count, kind, topology in cases:
    platform = "tpu" if "TPU" in kind else "gpu"
    wanted = preset_mesh(shapes, topology)
    # A TPU has what is published, whatever little it says; a GPU has 75 % where jax is not told.
    chosen = on(shapes, count, kind, platform, 2**30 if platform == "tpu" else None)
    assert chosen.spec == wanted, (kind, chosen, wanted)
print("as planned")
"""
UNLISTED = """
on_cpu = on(training, 8, "cpu", "cpu")
assert on_cpu.told == f"--mesh auto: {on_cpu.spec}, for 8 devices (cpu)", on_cpu
assert on_cpu == on(training, 8, "cpu", "cpu", slices=2)
assert on_cpu.why is None
listed = on(training, 8, H100, "gpu")
assert on(training, 8, "Some GPU", "gpu").spec == listed.spec
for kind in (H100, "Some GPU"):
    small = on(training, 8, kind, "gpu", memory=2**33)
    assert small.spec != listed.spec
    assert "no mesh fits: it holds 11" in small.told, small
    assert small.told.endswith("GiB, and a device has 8.00"), small
one = on(training, 1, "cpu", "cpu")
assert (one.told, one.mesh) == ("--mesh auto: data=1, for one device (cpu)", None)
for kind, platform in (("TPU v6 lite", "tpu"), (H100, "gpu")):
    try:
        on(training, 8, kind, platform, slices=2)
    except InputError as error:
        assert "devices are of 2 slices; name the mesh, such as dcn_data=2,fsdp=-1" in str(error)
    else:
        raise AssertionError("two slices")
print("judged by what they have")
"""


@pytest.mark.slow
def test_listed_devices_get_the_mesh_of_their_plan(run_python):
    assert run_python(START + AS_PLANNED, forked=True).endswith("as planned\n")


def test_others_are_judged_by_the_memory_they_have(run_python):
    assert run_python(START + UNLISTED, forked=True).endswith("judged by what they have\n")
