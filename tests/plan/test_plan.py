"""Plans: what is wrong is told at once; shapes and chips are as published."""

import json

import pytest

from w2s_jax.cli.main import main
from w2s_jax.errors import InputError
from w2s_jax.models.config import KNOWN
from w2s_jax.plan import PlanDPOConfig, PlanSearchConfig, PlanSFTConfig
from w2s_jax.plan.meshes import judge
from w2s_jax.plan.planning import shapes_of
from w2s_jax.plan.programs import shape_of
from w2s_jax.plan.topology import (
    CHIPS,
    check_compiler,
    check_topology,
    chip_of,
    device_count,
    target_of,
    topologies,
)


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


def test_the_command_that_runs_what_was_planned():
    """It names what its own defaults are not, and leaves out what they are."""
    config = PlanSearchConfig(policy="p", tuned="t", guide_rules="train", batch_size=4)
    assert config.command("fsdp=2,tensor=8") == (
        "w2s search --mesh fsdp=2,tensor=8 --batch-size 4 --w 2 --k 2 --l 30 "
        "--max-new-tokens 2048 --dtype bfloat16 --guide-rules train"
    )


@pytest.mark.parametrize("config", [PlanSFTConfig, PlanDPOConfig])
def test_the_largest_numbers_are_judged(config):
    shapes = shapes_of(config(model="meta-llama/Meta-Llama-3-8B", batch_size=2**31 - 16))
    found = judge(shapes, CHIPS["v5e"], (16, 1, 1))
    assert found.resident_bytes > 2**31 * 2048 * 8 / 16
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
