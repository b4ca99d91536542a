"""How much host memory loading takes: below the process's part and three times the largest tensor.

Each case runs in a process of its own, whose peak Linux tells.
"""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from w2s_jax.models.config import ModelConfig
from w2s_jax.models.config_json import config_to_hf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"),
]

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=24000,
    width=1024,
    layers=6,
    heads=8,
    kv_heads=8,
    head_width=128,
    mlp_width=4096,
    max_positions=128,
    eos_ids=(0,),
)
LARGEST = 24000 * 1024 * 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """300 MB of bfloat16 in two files, as large checkpoints come."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(
        json.dumps(config_to_hf(CONFIG) | {"torch_dtype": "bfloat16"})
    )
    rng = np.random.default_rng(0)
    noise = rng.normal(size=1 << 20).astype(ml_dtypes.bfloat16)

    def fill(*shape: int) -> np.ndarray:
        return np.resize(noise, shape)

    files: dict[str, dict[str, np.ndarray]] = {"a": {}, "b": {}}
    for layer in range(CONFIG.layers):
        held, place = files["a" if layer < 3 else "b"], f"model.layers.{layer}."
        for name in "qkvo":
            held[f"{place}self_attn.{name}_proj.weight"] = fill(1024, 1024)
        for name, shape in (("gate", (4096, 1024)), ("up", (4096, 1024)), ("down", (1024, 4096))):
            held[f"{place}mlp.{name}_proj.weight"] = fill(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            held[f"{place}{name}.weight"] = fill(1024)
    files["a"]["model.embed_tokens.weight"] = fill(24000, 1024)
    files["b"] |= {"lm_head.weight": fill(24000, 1024), "model.norm.weight": fill(1024)}
    names, weight_map = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), {}
    for name, held in zip(names, files.values(), strict=True):
        save_file(held, folder / name)
        weight_map |= dict.fromkeys(held, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


CODE = """
import re, sys
from pathlib import Path
import jax, jax.numpy as jnp
from w2s_jax.models.load import load_model
from w2s_jax.models.quantize import read_quantize
from w2s_jax.ops.sharding import make_mesh

def told(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

mesh, spec, dtype, scan_layers = {mesh!r}, {spec!r}, {dtype!r}, {scan_layers!r}
made = make_mesh(mesh) if mesh else None
jax.block_until_ready(jax.device_put(jnp.ones(8), jax.devices()[-1]))
Path("/proc/self/clear_refs").write_text("5")
before = told("VmRSS")
model = load_model({folder!r}, dtype=dtype, mesh=made, scan_layers=scan_layers,
                   quantize=read_quantize(spec) if spec else None)
jax.block_until_ready(model.params)
peak = told("VmHWM") - before
leaves = jax.tree.leaves(model.params)
shard = sum(part.data.nbytes for leaf in leaves for part in leaf.addressable_shards)
print("MB:", round(peak / 1e6), "of", round(shard / 1e6), "kept")
print(peak, shard)
"""
MESH = "data=2,fsdp=2,tensor=2"


@pytest.mark.parametrize(
    ("mesh", "spec", "dtype", "scan_layers"),
    [
        (None, None, "bfloat16", False),
        (None, None, "float32", False),
        (None, "int8", "bfloat16", False),
        (None, "int4:128+head", "float32", False),
        (MESH, None, "bfloat16", False),
        (MESH, "int8", "bfloat16", False),
        (MESH, "int8", "bfloat16", True),
    ],
)
def test_no_more_than_its_part_and_three_tensors(
    run_python, checkpoint, mesh, spec, dtype, scan_layers
):
    settings = {"mesh": mesh, "spec": spec, "dtype": dtype, "scan_layers": scan_layers}
    code = CODE.format(folder=str(checkpoint), **settings)
    out = run_python(code, devices=8 if mesh else 1)
    peak, shard = map(int, out.splitlines()[-1].split())
    assert peak <= shard + 3 * LARGEST, out
