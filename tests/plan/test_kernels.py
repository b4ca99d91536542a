"""Attention in programs compiled for TPUs: its kernel, its memory, the bytes that it moves."""

import importlib.util

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("libtpu"), reason="needs libtpu, the TPU compiler"
    ),
]

START = r"""
import dataclasses, re
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from w2s_jax.models.decoder import Layout
from w2s_jax.models.forward import forward
from w2s_jax.models.model import abstract_model
from w2s_jax.ops import flash
from w2s_jax.ops.attention import attend_sequence
from w2s_jax.ops.flash import Reach
from w2s_jax.ops.meshes import make_mesh
from w2s_jax.ops.sharding import DEFAULT_RULES, Placement, resolve_tree
from w2s_jax.plan.shapes import shape_of
from w2s_jax.plan.topology import open_slice

place = open_slice("v5e:4x4", 1)
mesh = make_mesh("fsdp=4,tensor=4", place.devices)
placement = Placement(mesh, DEFAULT_RULES)

def given(shape, *spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

def compiled(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()

def square(text, length):
    shapes = set(re.findall(r"\b[a-z]+\d*\[[\d,]+\]", text))
    return [one for one in shapes if re.findall(r"\d+", one.split("[")[1]).count(str(length)) > 1]
"""

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


@pytest.mark.parametrize("case", [(1, 4096, False), (8, 4096, True), (1, 32768, False)])
def test_attention_of_8b_shapes_is_the_kernel(run_python, case):
    run_python(START + ATTENTION % (case,))
