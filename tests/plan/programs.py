"""What sources that compile programs for a slice of v5e begin with."""

START = r"""
import dataclasses, re
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from w2s_jax.models.forward import Layout
from w2s_jax.models.model import Model, abstract_model, hidden_states
from w2s_jax.ops.sequences import Reach, attend_sequence
from w2s_jax.ops.sharding import make_mesh
from w2s_jax.ops.sharding import DEFAULT_RULES, SEARCH_RULES, Placement, resolve_tree
from w2s_jax.plan.programs import shape_of
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
