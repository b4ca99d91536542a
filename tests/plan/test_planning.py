"""Meshes judged by real shapes, and tried with a stand-in for the compiler."""

import json

import pytest

from w2s_jax.cli.main import main
from w2s_jax.errors import InputError
from w2s_jax.models.lora import LoraConfig
from w2s_jax.ops.sharding import mesh_shape, mesh_shapes
from w2s_jax.plan.compiled import Measured
from w2s_jax.plan.meshes import candidates, judge, preset_mesh
from w2s_jax.plan.planning import Plan, Trying, ranked, try_slices
from w2s_jax.plan.programs import shape_of
from w2s_jax.plan.topology import CHIPS, device_count, family_of, topologies
from w2s_jax.train.estimate import TrainingShapes

GIB = 2**30
SIZES = {
    "8B": shape_of("meta-llama/Meta-Llama-3-8B"),
    "70B": shape_of("meta-llama/Meta-Llama-3-70B"),
}


def training(size="8B", rows=16, **options):
    return TrainingShapes(SIZES[size], "sft", rows, 2048, **options)


class Compiler:
    """Takes the place of the compiler: programs take `beside` GiB, and what it was given is kept.

    A mesh is the quicker the more tensor parts it has, by `speed` of them.
    """

    def __init__(self, beside=1.0, speed=lambda tensor: 100.0 * tensor):
        self.beside, self.speed, self.seen = beside, speed, []

    def __call__(self, shapes, topology, mesh, tell):
        self.seen.append((topology, mesh))
        devices, chip = device_count(topology), CHIPS[topology.partition(":")[0]]
        held = judge(shapes, chip, mesh_shape(mesh, devices)).resident_bytes
        fits = held + self.beside * GIB <= chip.memory
        step = Measured("step", 1, held, int(self.beside * GIB), compile_seconds=3.0)
        speed = self.speed(mesh_shape(mesh, devices)[2])
        return Plan(
            topology, mesh, devices, float(chip.memory), {"all": held}, (step,), fits, 1.0, speed
        )


def test_families_to_be_tried():
    assert [family_of(name) for name in ("auto", "v6e:auto", "v5p:4x4x4")] == ["v5e", "v6e", None]
    with pytest.raises(InputError, match="no chip 'v9'"):
        family_of("v9:auto")


def test_what_a_mesh_holds_is_known_without_devices():
    chip = CHIPS["v5e"]
    split = judge(training(), chip, (1, 16, 1))
    parameters = 8.03e9
    # float32 parameters and two moments of them, over sixteen devices.
    assert split.resident_bytes == pytest.approx(12 * parameters / 16, rel=0.01)
    assert split.why is None
    whole = judge(training(), chip, (16, 1, 1))
    assert whole.resident_bytes == pytest.approx(12 * parameters, rel=0.01)
    assert "GiB, and a device has 15.75" in whole.why
    undivided = judge(training(), chip, (1, 1, 64))
    assert (undivided.resident_bytes, undivided.mesh) == (None, "tensor=64")
    assert "heads of size 32 is not divisible by mesh tensor 64" in undivided.why


@pytest.mark.parametrize("shapes", [training(), training(lora=LoraConfig(rank=8))])
def test_every_mesh_is_judged_and_those_ruled_out_stand_last(shapes):
    found = candidates(shapes, CHIPS["v5e"], 8)
    assert len(found) == len(list(mesh_shapes(8)))
    ruled_out = [one.why is not None for one in found]
    assert ruled_out == sorted(ruled_out)
    assert not ruled_out[0]
    possible = [one for one in found if one.why is None]
    assert all(0 < one.resident_bytes <= one.needed and one.seconds > 0 for one in possible)


def test_more_is_exchanged_where_widths_are_split_over_more_devices():
    ends = [(16, 1, 1), (1, 16, 1), (1, 1, 16)]
    judged = candidates(training(rows=64), CHIPS["v5e"], 16, ends)
    found = {one.mesh: one.seconds for one in judged}
    assert found["data=16"] < found["fsdp=16"] < found["tensor=16"]


def test_the_likeliest_meshes_are_compiled_and_ranked():
    compiler, lines = Compiler(speed=lambda tensor: 1000.0 - tensor), []
    trying = Trying(3, compile_as=compiler, tell=lines.append)
    (trials,) = try_slices(lambda _: (training(),), ["v5e:2x4"], trying).slices
    judged = candidates(training(), CHIPS["v5e"], 8)
    assert [mesh for _, mesh in compiler.seen] == [one.mesh for one in judged[:3]]
    speeds = [plan.tokens_per_second for plan in trials.plans]
    assert speeds == sorted(speeds, reverse=True)
    assert len(trials.plans) + len(trials.skipped) == len(judged)
    untried = [one for one in trials.skipped if one.why == "not tried: --try 3"]
    held = [one for one in trials.skipped if "a device has" in one.why]
    assert untried
    assert held
    assert len(untried) + len(held) == len(trials.skipped)
    assert any("mesh 3 of 3" in line for line in lines)


def test_what_fits_goes_before_what_is_quicker():
    make = Compiler(beside=1)
    fits = make(training(), "v5e:4x4", "fsdp=16", None)
    make.beside, make.speed = 12, lambda tensor: 1e6
    quick = make(training(), "v5e:4x4", "fsdp=16", None)
    assert fits.fits
    assert not quick.fits
    assert ranked([quick, fits]) == [fits, quick]


def test_the_smallest_slice_that_fits():
    compiler = Compiler(beside=1)
    found = try_slices(
        lambda _: (training(),), topologies("v5e"), Trying(2, first=True, compile_as=compiler)
    )
    # Parameters and moments are 90 GiB, and four chips have 63.
    assert [one.topology for one in found.slices] == ["v5e:1x1", "v5e:2x2", "v5e:2x4"]
    assert compiler.seen == [("v5e:2x4", found.best.mesh)]
    assert not any(one.best for one in found.slices[:2])
    assert all("GiB, and a device has 15.75" in one.why for one in found.slices[0].skipped)
    row = json.loads(json.dumps(found.as_row()))
    assert (row["fits"], row["topology"]) == (True, "v5e:2x4")
    assert row["slices"][2]["skipped"][0]["why"] == "not tried: another fits"


def test_slices_too_small_beside_what_is_held_are_refused_by_the_compiler():
    compiler = Compiler(beside=8)
    found = try_slices(
        lambda _: (training(),), topologies("v5e"), Trying(1, first=True, compile_as=compiler)
    )
    assert [name for name, _ in compiler.seen] == ["v5e:2x4", "v5e:4x4"]
    assert not found.slices[2].plans[0].fits
    assert found.best.topology == "v5e:4x4"


def test_one_mesh_on_the_slices_that_it_divides():
    compiler = Compiler()
    trying = Trying(1, "fsdp=8,tensor=2", first=True, compile_as=compiler)
    found = try_slices(lambda _: (training(),), topologies("v5e"), trying)
    assert compiler.seen == [("v5e:4x4", "fsdp=8,tensor=2")]
    assert "must equal the 8 devices" in found.slices[2].skipped[0].why


def test_nothing_fits_or_nothing_divides():
    shapes, compiler = training("70B", rows=256), Compiler(beside=1000)
    trying = Trying(1, "fsdp=-1", compile_as=compiler)
    assert try_slices(lambda _: (shapes,), topologies("v5e"), trying).best is None
    assert [name for name, _ in compiler.seen] == ["v5e:8x8", "v5e:8x16", "v5e:16x16"]
    with pytest.raises(InputError, match="v5e:2x2: no mesh: --batch-size 3 is not divisible"):
        try_slices(
            lambda _: (training(rows=3),), ["v5e:2x2"], Trying(mesh="fsdp=4", compile_as=compiler)
        )
    with pytest.raises(InputError, match="v5e:16x16: no mesh"):
        try_slices(
            lambda _: (shapes,), topologies("v5e"), Trying(mesh="tensor=3", compile_as=compiler)
        )


def test_meshes_by_default_hold_little_enough():
    for size, topology in (("8B", "v5e:2x2"), ("70B", "v5p:2x2x2")):
        devices, chip = device_count(topology), CHIPS[topology.partition(":")[0]]
        shapes = training(size, max(16, devices), lora=LoraConfig(rank=16))
        mesh = preset_mesh(shapes, topology)
        assert judge(shapes, chip, mesh_shape(mesh, devices)).resident_bytes < 0.8 * chip.memory


def test_a_mesh_by_default_where_nothing_fits_holds_the_least():
    shapes = training("70B")
    tried = candidates(shapes, CHIPS["v5e"], 4)
    sizes = [one.resident_bytes for one in tried if one.resident_bytes is not None]
    mesh = preset_mesh(shapes, "v5e:2x2")
    assert judge(shapes, CHIPS["v5e"], mesh_shape(mesh, 4)).resident_bytes == min(sizes)


# Axes of caches stand where arrays are asked for, so that searches are judged without type checks.
SEARCHES = """
from w2s_jax.ops.sharding import mesh_shape
from w2s_jax.plan.meshes import candidates, judge
from w2s_jax.plan.topology import CHIPS, device_count
from w2s_jax.plan.matrix import Cell
from w2s_jax.plan.meshes import preset_mesh

chip = CHIPS["v5e"]
shapes = Cell("v5e", "8B", "search").shapes(16)[0]
found = {one.mesh: one for one in candidates(shapes, chip, 16)}
assert len(found) == 15
one = found["fsdp=2,tensor=8"]
# An 8B policy and two 7B guides in bfloat16, most of it over sixteen devices.
weights = 2 * (8.03e9 + 2 * 7.24e9) / 16
caches = 2 * 2 * 8 * 128 * 32 * 16 * (3 * 512 + 3 * 2 * 2112) / 16
assert weights + caches < one.resident_bytes < 1.5 * (weights + caches), (one, weights, caches)
assert one.seconds < found["data=2,tensor=8"].seconds < found["data=16"].seconds
assert "a device has 15.75" in found["data=16"].why
undivided = judge(Cell("v5e", "8B", "search").shapes(64)[0], chip, (64, 1, 1))
assert undivided.resident_bytes is None, undivided
assert "--batch-size 16 is not divisible by 64 parts" in undivided.why, undivided
for size, topology in (("8B", "v5e:2x4"), ("70B", "v5e:4x8"), ("70B", "v6e:4x4")):
    count, own = device_count(topology), CHIPS[topology.partition(":")[0]]
    shapes = Cell("v5e", size, "search").shapes(count)[0]
    mesh = preset_mesh(shapes, topology)
    found = judge(shapes, own, mesh_shape(mesh, count))
    assert found.resident_bytes < 0.8 * own.memory, (size, mesh)
print("judged")
"""


def test_searches_are_judged(run_python):
    assert run_python(SEARCHES, forked=True).endswith("judged\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh=fsdp=-1", "--search-mesh"], "--search-mesh looks for what --mesh names"),
        (["--try=2"], "--try goes with --search-mesh or with a topology such as v5e:auto"),
        (["--try=0", "--search-mesh"], "--try is 0"),
        (["--topology=v9:auto"], "no chip 'v9'"),
        (["--topology=v5e:auto", "--mesh=dcn_data=2,fsdp=-1"], "looks for one slice"),
    ],
)
@pytest.mark.parametrize("command", ["search", "sft", "dpo"])
def test_flags_that_do_not_go_together(command, flags, message, capsys):
    model = ["--model=meta-llama/Meta-Llama-3-8B"]
    if command == "search":
        model = ["--policy=meta-llama/Meta-Llama-3-8B", "--tuned=HuggingFaceH4/zephyr-7b-beta"]
    assert main(["plan", command, *model, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
