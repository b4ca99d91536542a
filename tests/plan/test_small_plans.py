"""Plans of small models compiled for TPUs and GPUs that are not here."""

import importlib.util
import json

import pytest

from tests.plan.conftest import NEEDS_LIBTPU

TINY = {
    "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 512, "vocab_size": 1024,
    "max_position_embeddings": 512, "head_dim": 128,
}  # fmt: skip
# Layers that differ in windows and ropes, and norms over heads that a mesh splits.
OLMO3 = TINY | {
    "model_type": "olmo3", "sliding_window": 64, "eos_token_id": 2,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
# Numbers in its weights.
MLP, ATTENTION, VOCABULARY, NORMS = (
    2 * 3 * 256 * 512,
    2 * 2 * 256 * 128 * 12,
    2 * 256 * 1024,
    256 * 5,
)
WEIGHTS = MLP + ATTENTION + VOCABULARY + NORMS
ROWS = ["--batch-size=4", "--max-length=64"]
SEARCH = [
    *("search", "--policy={0}/1024.json", "--topology=v5e:2x2", "--mesh=fsdp=2,tensor=2", "--l=4"),
    *("--batch-size=4", "--prompt-tokens=32", "--max-new-tokens=32"),
]
STEP = ["--model={0}/1024.json", "--topology=v6e:2x2", "--mesh=data=2,fsdp=2", *ROWS]
ON_TPUS = {
    "search 1024": [*SEARCH, "--tuned={0}/1024.json"],
    "search 4096": [*SEARCH, "--tuned={0}/4096.json"],
    "search olmo3": [*SEARCH, "--policy={0}/olmo3.json", "--tuned={0}/olmo3.json"],
    "sft": ["sft", *STEP],
    "dpo": ["dpo", *STEP, "--lora-rank=4"],
    "ranked": [
        *("sft", "--model={0}/1024.json", "--topology=v5e:2x2", "--search-mesh", "--try=2", *ROWS),
    ],
    "smallest": ["dpo", "--model={0}/1024.json", "--topology=v6e:auto", *ROWS],
}
GPUS = ("a100:2", "h100:2", "h200:2")
ON_GPUS = {
    name: ["sft", "--model={0}/1024.json", f"--topology={name}", "--mesh=fsdp=2", *ROWS]
    for name in GPUS
}

TOO_LARGE = """
import re
import jax, jax.numpy as jnp
from w2s_jax.plan.topology import CHIPS, topologies
from w2s_jax.plan.topology import open_slice
for name, chip in CHIPS.items():
    if chip.platform != "tpu":
        continue
    place = open_slice(topologies(name)[0])
    one = jax.sharding.SingleDeviceSharding(place.devices[0])
    given = jax.ShapeDtypeStruct((2**38,), jnp.int8, sharding=one)
    try:
        jax.jit(lambda x: x + 1).trace(given).lower(lowering_platforms=("tpu",)).compile()
    except Exception as error:
        said = re.search(r"available HBM \\(([\\d.]+)G\\)", str(error))
        assert said and float(said[1]) * 2**30 == chip.memory, (name, error)
    else:
        raise AssertionError(name)
print("as told")
"""


def planned(plans, run_together, folder, **more):
    """Plans by name, each with what it printed; all are compiled in one process."""
    for vocabulary in (1024, 4096):
        path = folder / f"{vocabulary}.json"
        path.write_text(json.dumps(TINY | {"vocab_size": vocabulary}))
    (folder / "olmo3.json").write_text(json.dumps(OLMO3))
    sources = {}
    for name, flags in plans.items():
        asked = ["plan", *(flag.format(folder) for flag in flags), f"--json={folder}/{name} plan"]
        sources[name] = f"from w2s_jax.cli.main import main\nassert main({asked!r}) == 0"
    printed = run_together(sources | more)

    def read(name):
        told = printed(name)
        path = folder / f"{name} plan"
        return (json.loads(path.read_text()) if path.exists() else None), told

    return read


@pytest.fixture(scope="module")
def on_tpus(run_together, module_path):
    return planned(ON_TPUS, run_together, module_path, memory=TOO_LARGE)


@pytest.fixture(scope="module")
def on_gpus(run_together, module_path):
    return planned(ON_GPUS, run_together, module_path)


def needs_libtpu(test):
    for mark in NEEDS_LIBTPU:
        test = mark(test)
    return test


@needs_libtpu
@pytest.mark.parametrize("vocabulary", [1024, 4096])
def test_a_small_search_is_compiled_for_a_slice(on_tpus, vocabulary):
    plan, _ = on_tpus(f"search {vocabulary}")
    names = {one["name"]: one for one in plan["programs"]}
    tokens = vocabulary == 1024
    assert ("search_step" in names) == tokens
    assert ("tuned scores" in names) != tokens
    # Guides of one shape: one is compiled, and stands for both.
    for name in set(names) - {"prefill", "search_step", "propose", "select"}:
        assert (names[name]["compile_seconds"] == 0) == name.startswith("untuned")
    assert plan["fits"]
    # bfloat16 weights: MLP and vocabulary over four chips, heads over two.
    parts = MLP // 4 + ATTENTION // 2 + VOCABULARY // 4 + NORMS
    assert plan["resident_bytes"]["policy"] == 2 * parts
    for one in plan["programs"]:
        assert not one["refusal"]
        assert not one["gathered"], one
        assert 0 < one["arguments"] < 2**26


@needs_libtpu
def test_a_search_of_layers_that_differ_is_compiled_for_a_slice(on_tpus):
    plan, _ = on_tpus("search olmo3")
    assert plan["fits"]
    assert "search_step" in {one["name"] for one in plan["programs"]}
    for one in plan["programs"]:
        assert not one["refusal"]
        assert not one["gathered"], one


@needs_libtpu
@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_a_training_step_is_compiled_for_a_slice(on_tpus, command):
    plan, printed = on_tpus(command)
    # What a run needs to be what was planned; its defaults are others.
    rank = " --lora-rank 4" if command == "dpo" else ""
    assert printed.strip().splitlines()[-1] == (
        f"to run it: w2s {command} --mesh data=2,fsdp=2 --batch-size 4 --accumulate 1 "
        f"--max-length 64 --remat full --optimizer adamw --dtype bfloat16{rank} --scan-layers"
    )
    (step,) = plan["programs"]
    assert plan["fits"]
    assert not step["refusal"]
    # Widths over fsdp; float32 where trained, else bfloat16.
    held = plan["resident_bytes"]
    if rank:
        assert held["frozen parameters"] == 2 * WEIGHTS // 2
        assert 0 < held["trained parameters"] < held["frozen parameters"] / 4
    else:
        assert held["trained parameters"] == 4 * WEIGHTS // 2
        assert held["frozen parameters"] == 0
    assert held["optimizer"] == pytest.approx(2 * held["trained parameters"], rel=1e-3)
    assert {one["kind"] for one in step["exchanges"]} & {"all-reduce", "reduce-scatter"}


@needs_libtpu
def test_meshes_of_a_slice_are_compiled_and_ranked(on_tpus):
    found, _ = on_tpus("ranked")
    (trials,) = found["slices"]
    plans = trials["plans"]
    assert [plan["fits"] for plan in plans] == [True, True]
    assert plans[0]["tokens_per_second"] >= plans[1]["tokens_per_second"] > 0
    assert (found["topology"], found["mesh"]) == ("v5e:2x2", plans[0]["mesh"])
    assert len({plan["mesh"] for plan in plans} | {one["mesh"] for one in trials["skipped"]}) == 6


@needs_libtpu
def test_the_smallest_slice_is_found(on_tpus):
    found, _ = on_tpus("smallest")
    assert (found["fits"], found["topology"]) == (True, "v6e:1x1")
    assert len(found["slices"][0]["plans"]) == 1


@needs_libtpu
def test_memory_is_what_the_compiler_lets_a_program_have(on_tpus):
    assert on_tpus("memory")[1].endswith("as told\n")


def _cuda_plugin():
    try:
        return importlib.util.find_spec("jax_plugins.xla_cuda12")
    except ModuleNotFoundError:
        return None


@pytest.mark.slow
@pytest.mark.skipif(not _cuda_plugin(), reason="needs the CUDA plugin of jax")
@pytest.mark.parametrize("topology", GPUS)
def test_a_training_step_is_compiled_for_gpus(on_gpus, topology):
    plan, _ = on_gpus(topology)
    (step,) = plan["programs"]
    assert plan["fits"]
    assert plan["resident_bytes"]["trained parameters"] == 4 * WEIGHTS // 2
    assert step["temporary"] > 0
    assert {one["kind"] for one in step["exchanges"]} & {"all-reduce", "reduce-scatter"}
