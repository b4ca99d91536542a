"""Plans: what is wrong is told at once; with libtpu, a small search is compiled for a slice."""

import importlib.util
import json

import pytest

from w2s_jax.cli.main import main
from w2s_jax.cli.plan import PlanDPO, PlanSFT
from w2s_jax.errors import InputError
from w2s_jax.plan.candidates import judge
from w2s_jax.plan.chips import CHIPS, check_topology, chip_of, device_count, topologies
from w2s_jax.plan.gpus import target_of
from w2s_jax.plan.shapes import KNOWN, shape_of
from w2s_jax.plan.topology import check_compiler


@pytest.mark.parametrize(
    "name", ["v5e:4x4", "v6e:2x4", "v6e:1x1", "v5p:4x4x4", "tpu7x:2x2x1", "h100:8"]
)
def test_topologies(name):
    check_topology(name)
    assert name in topologies(chip_of(name).name)


@pytest.mark.parametrize(
    "name",
    ["v5e", "v5e:4", "v5e:4x4x4", "v5p:4x4", "v9:2x2", "v6e:0x4", "h100:16", "h100:2x8", "",
     "v6e:999999x999999", "v6e:3x3", "v5e:2x8", "v5p:4x4x3", "v5p:4x4x16384"],
)  # fmt: skip
def test_wrong_topologies(name):
    with pytest.raises(InputError, match=r"^topology "):
        check_topology(name)


def test_cubes_are_joined_in_all_directions():
    check_topology("v5p:4x4x12")
    check_topology("tpu7x:8x8x12")


def test_published_shapes_are_configs():
    sizes = {name: shape_of(name) for name in KNOWN}
    assert sizes["meta-llama/Meta-Llama-3-70B-Instruct"].kv_heads == 8
    assert sizes["HuggingFaceH4/zephyr-7b-beta"].sliding_windows[0] == 4096
    assert sizes["meta-llama/Llama-2-13b-chat-hf"].head_width == 128


def test_a_shape_from_a_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(KNOWN["meta-llama/Llama-2-7b-hf"]))
    assert shape_of(str(path)) == shape_of(str(tmp_path)) == shape_of("meta-llama/Llama-2-7b-hf")
    path.write_text("{")
    with pytest.raises(InputError, match="config.json is not readable JSON"):
        shape_of(str(path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v7:2x2"], "no chip 'v7'; one of v5e, v5p, v6e, tpu7x, a100, h100, h200"),
        (["--batch-size=0"], "--batch-size is 0; it must be at least 1"),
        (["--w=0"], "--w is 0; it must be at least 1"),
        (["--max-new-tokens=0"], "--max-new-tokens is 0; it must be at least 1"),
        (["--batch-size=1000000000000"], "--batch-size is 1000000000000; it must be less than"),
        (["--l=99999999999999999999"], "--l is 99999999999999999999; it must be less than 2147"),
        (
            ["--w=1000000000", "--k=1000000000"],
            "times --batch-size 16 are 16000000000000000000 rows; there must be less than 2147483",
        ),
        (["--policy=~nouser/x"], "~nouser/x: no such file or directory (Could not determine home"),
        ([f"--policy={'x' * 5000}"], "xxx...: no such file or directory (File name too long)"),
        (["--mesh="], "--mesh is empty; give sizes such as data=2,tensor=4"),
        (
            ["--max-new-tokens=7700"],
            "512 and --max-new-tokens 7700 exceed the 8192 positions of policy",
        ),
        (["--quantise-policy=int3"], "int3"),
        (["--policy-rules=fast"], "no preset 'fast'"),
        (["--policy=no/such-dir/here"], "no/such-dir/here"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    usual = ["--policy=meta-llama/Meta-Llama-3-8B", "--tuned=HuggingFaceH4/zephyr-7b-beta"]
    assert main(["plan", "search", *usual, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v5e"], "topology 'v5e'"),
        (["--max-length=1"], "--max-length 1 is below 2"),
        (["--max-length=9000"], "--max-length 9000 is more than the 8192 positions of meta-llama"),
        (["--lora-rank=0"], "LoRA rank 0"),
        (["--lora-rank=99999999999999999999"], "--lora-rank is 99999999999999999999; it must be"),
        (["--batch-size=0"], "--batch-size is 0; it must be at least 1"),
        (["--accumulate=0"], "--accumulate is 0; it must be at least 1"),
        (["--batch-size=99999999999999999999"], "--batch-size is 99999999999999999999; it must be"),
        (["--model=no/such-dir/here"], "no/such-dir/here"),
    ],
)
@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_wrong_flags_of_trainings(command, flags, message, capsys):
    assert main(["plan", command, "--model=meta-llama/Meta-Llama-3-8B", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "config.json holds a list, not a JSON object"),
        ("[" * 100_000, "config.json is not readable JSON"),
        ('{"model_type": "llama", "hidden_size": []}', "config.json: "),
        ('{"model_type": 5}', "config.json: "),
    ],
)
def test_a_file_that_holds_no_config(content, message, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(content)
    assert main(["plan", "sft", f"--model={path}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", [PlanSFT, PlanDPO])
def test_the_largest_numbers_are_judged(command):
    shapes = command(model="meta-llama/Meta-Llama-3-8B", batch_size=2**31 - 16).shapes()
    found = judge(shapes, CHIPS["v5e"], (16, 1, 1))
    assert found.held > 2**31 * 2048 * 8 / 16
    assert "and a device has 15.75" in found.why


def test_chips_are_ordered_by_their_figures():
    assert CHIPS["v6e"].operations > CHIPS["v5p"].operations > CHIPS["v5e"].operations
    assert CHIPS["h200"].bandwidth > CHIPS["h100"].bandwidth > CHIPS["a100"].bandwidth
    assert all(1e11 < chip.bandwidth < 1e13 for chip in CHIPS.values())
    assert device_count("tpu7x:2x2x1") == device_count("v5e:2x4") == device_count("a100:8") == 8


def test_a_gpu_is_told_to_the_compiler_as_it_is():
    target = target_of(CHIPS["h200"])
    assert "device_memory_size: 151397597184\n" in target
    assert "memory_bandwidth: 4800000000000\n" in target
    assert "cuda_compute_capability { major: 9 minor: 0 }" in target
    assert target.count("{") == target.count("}") == 3
    assert "major: 8 minor: 0" in target_of(CHIPS["a100"])


def test_compilers_that_are_not_installed(monkeypatch):
    monkeypatch.setattr("w2s_jax.plan.topology._is_there", lambda module: False)
    with pytest.raises(InputError, match=r"w2s-jax\[tpu\]"):
        check_compiler("v5e:2x2")
    with pytest.raises(InputError, match=r"w2s-jax\[cuda\]"):
        check_compiler("h100:8")
    assert main(["plan", "sft", "--model=meta-llama/Meta-Llama-3-8B", "--topology=v6e:auto"]) == 2


TINY = {
    "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 512, "vocab_size": 1024,
    "max_position_embeddings": 512, "head_dim": 128,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu, the TPU compiler")
@pytest.mark.parametrize("vocabulary", [1024, 4096])
def test_a_small_search_is_compiled_for_a_slice(tmp_path, run_python, vocabulary):
    (tmp_path / "policy.json").write_text(json.dumps(TINY))
    (tmp_path / "guide.json").write_text(json.dumps(TINY | {"vocab_size": vocabulary}))
    out = tmp_path / "plan.json"
    arguments = [
        "plan", "search", f"--policy={tmp_path}/policy.json", f"--tuned={tmp_path}/guide.json",
        "--topology=v5e:2x2", "--mesh=fsdp=2,tensor=2", "--batch-size=4", "--l=4",
        "--prompt-tokens=32", "--max-new-tokens=32", f"--json={out}",
    ]  # fmt: skip
    run_python(f"from w2s_jax.cli.main import main\nassert main({arguments!r}) == 0")
    plan = json.loads(out.read_text())
    names = {one["name"]: one for one in plan["programs"]}
    tokens = vocabulary == 1024
    assert ("search_step" in names) == tokens
    assert ("tuned scores" in names) != tokens
    # Guides of one shape: one is compiled, and stands for both.
    for name in set(names) - {"prefill", "search_step", "propose", "select"}:
        assert (names[name]["compile_seconds"] == 0) == name.startswith("untuned")
    assert plan["fits"]
    # bfloat16 weights: MLP and vocabulary over four chips, heads over two.
    mlp, attention, vocab = 2 * 3 * 256 * 512, 2 * 2 * 256 * 128 * (8 + 4), 2 * 256 * 1024
    norms = 256 * 5
    expected = 2 * (mlp // 4 + attention // 2 + vocab // 4 + norms)
    assert plan["held"]["policy"] == expected
    for one in plan["programs"]:
        assert not one["refusal"]
        assert not one["gathered"], one
        assert 0 < one["arguments"] < 2**26


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu, the TPU compiler")
@pytest.mark.parametrize(("command", "flags"), [("sft", []), ("dpo", ["--lora-rank=4"])])
def test_a_training_step_is_compiled_for_a_slice(tmp_path, run_python, command, flags):
    (tmp_path / "model.json").write_text(json.dumps(TINY))
    out = tmp_path / "plan.json"
    arguments = [
        "plan", command, f"--model={tmp_path}/model.json", "--topology=v6e:2x2",
        "--mesh=data=2,fsdp=2", "--batch-size=4", "--max-length=64", f"--json={out}", *flags,
    ]  # fmt: skip
    printed = run_python(f"from w2s_jax.cli.main import main\nassert main({arguments!r}) == 0")
    # What a run needs to be what was planned; its defaults are others.
    last = printed.strip().splitlines()[-1]
    rank = " --lora-rank 4" if flags else ""
    assert last == (
        f"to run it: w2s {command} --mesh data=2,fsdp=2 --batch-size 4 --accumulate 1 "
        f"--max-length 64 --remat full --optimizer adamw --dtype bfloat16{rank} --scan-layers"
    )
    plan = json.loads(out.read_text())
    (step,) = plan["programs"]
    assert plan["fits"]
    assert not step["refusal"]
    # Widths over fsdp; float32 where trained, else bfloat16.
    weights = 2 * (3 * 256 * 512 + 2 * 256 * 128 * (8 + 4)) + 2 * 256 * 1024 + 256 * 5
    held = plan["held"]
    if flags:
        assert held["frozen parameters"] == 2 * weights // 2
        assert 0 < held["trained parameters"] < held["frozen parameters"] / 4
    else:
        assert held["trained parameters"] == 4 * weights // 2
        assert held["frozen parameters"] == 0
    assert held["optimizer"] == pytest.approx(2 * held["trained parameters"], rel=1e-3)
    assert {one["kind"] for one in step["exchanges"]} & {"all-reduce", "reduce-scatter"}


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu, the TPU compiler")
def test_meshes_of_a_slice_are_compiled_and_ranked(tmp_path, run_python):
    (tmp_path / "model.json").write_text(json.dumps(TINY))
    out = tmp_path / "found.json"
    arguments = [
        "plan", "sft", f"--model={tmp_path}/model.json", "--topology=v5e:2x2", "--search-mesh",
        "--try=2", "--batch-size=4", "--max-length=64", f"--json={out}",
    ]  # fmt: skip
    run_python(f"from w2s_jax.cli.main import main\nassert main({arguments!r}) == 0")
    found = json.loads(out.read_text())
    (trials,) = found["slices"]
    plans = trials["plans"]
    assert [plan["fits"] for plan in plans] == [True, True]
    assert plans[0]["tokens_per_second"] >= plans[1]["tokens_per_second"] > 0
    assert (found["topology"], found["mesh"]) == ("v5e:2x2", plans[0]["mesh"])
    assert len({plan["mesh"] for plan in plans} | {one["mesh"] for one in trials["skipped"]}) == 6


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu, the TPU compiler")
def test_the_smallest_slice_is_found_and_what_it_may_hold_is_the_compilers(tmp_path, run_python):
    (tmp_path / "model.json").write_text(json.dumps(TINY))
    out = tmp_path / "found.json"
    arguments = [
        "plan", "dpo", f"--model={tmp_path}/model.json", "--topology=v6e:auto",
        "--batch-size=4", "--max-length=64", f"--json={out}",
    ]  # fmt: skip
    run_python(f"from w2s_jax.cli.main import main\nassert main({arguments!r}) == 0")
    found = json.loads(out.read_text())
    assert (found["fits"], found["topology"]) == (True, "v6e:1x1")
    assert len(found["slices"][0]["plans"]) == 1


TOO_LARGE = """
import re
import jax, jax.numpy as jnp
from w2s_jax.plan.chips import CHIPS, topologies
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


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu, the TPU compiler")
def test_memory_is_what_the_compiler_lets_a_program_have(run_python):
    assert run_python(TOO_LARGE).endswith("as told\n")


def _cuda_plugin():
    try:
        return importlib.util.find_spec("jax_plugins.xla_cuda12")
    except ModuleNotFoundError:
        return None


@pytest.mark.slow
@pytest.mark.skipif(not _cuda_plugin(), reason="needs the CUDA plugin of jax")
@pytest.mark.parametrize("topology", ["a100:2", "h100:2", "h200:2"])
def test_a_training_step_is_compiled_for_gpus(tmp_path, run_python, topology):
    (tmp_path / "model.json").write_text(json.dumps(TINY))
    out = tmp_path / "plan.json"
    arguments = [
        "plan", "sft", f"--model={tmp_path}/model.json", f"--topology={topology}",
        "--mesh=fsdp=2", "--batch-size=4", "--max-length=64", f"--json={out}",
    ]  # fmt: skip
    run_python(f"from w2s_jax.cli.main import main\nassert main({arguments!r}) == 0")
    plan = json.loads(out.read_text())
    (step,) = plan["programs"]
    assert plan["fits"]
    weights = 2 * (3 * 256 * 512 + 2 * 256 * 128 * (8 + 4)) + 2 * 256 * 1024 + 256 * 5
    assert plan["held"]["trained parameters"] == 4 * weights // 2
    assert step["temporary"] > 0
    assert {one["kind"] for one in step["exchanges"]} & {"all-reduce", "reduce-scatter"}
