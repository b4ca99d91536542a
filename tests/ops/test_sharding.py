import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from w2s_jax.errors import InputError
from w2s_jax.ops.sharding import (
    DEFAULT_RULES,
    MESH_AXES,
    ON_ONE_DEVICE,
    SEARCH_RULES,
    Placement,
    make_mesh,
    parse_rules,
    resolve,
    resolve_tree,
)

MESH = AbstractMesh((2, 2, 4), MESH_AXES)


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        (("vocab", "embed"), (64, 8), P("tensor", "fsdp")),
        (("embed", "heads", "head_width"), (8, 4, 3), P("fsdp", "tensor", None)),
        (("layers", "embed", "mlp"), (3, 8, 16), P(None, "fsdp", "tensor")),
        (("slots", "prefix", "kv_heads"), (4, 7, 4), P(("data", "fsdp"), None, "tensor")),
        ((None, "embed"), (5, 8), P(None, "fsdp")),
        ((), (), P()),
    ],
)
def test_resolve(axes, shape, spec):
    assert resolve(axes, DEFAULT_RULES, MESH, shape).spec == spec


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (("embed", "slots"), (8, 4), "embed and slots both go to mesh axis 'fsdp'"),
        (("heads", "mlp"), (4, 8), "heads and mlp both go to mesh axis 'tensor'"),
        (("embed", "width"), (8, 4), "unknown logical axis 'width'; the rules know vocab, embed"),
        (
            ("kv_heads", "embed"),
            (6, 8),
            "kv_heads of size 6 is not divisible by mesh tensor 4; use",
        ),
        (("heads", "embed"), (2, 8), "heads of size 2 is not divisible by mesh tensor 4; use "),
        (("slots",), (6,), "slots of size 6 is not divisible by mesh data 2 × fsdp 2; use "),
        (("embed",), (8, 8), "1 logical axes ('embed',) for an array of shape (8, 8)"),
    ],
)
def test_wrong_axes_name_everything(axes, shape, message):
    with pytest.raises(InputError, match=f"^layers_0/kernel: .*{re.escape(message)}"):
        resolve(axes, DEFAULT_RULES, MESH, shape, name="layers_0/kernel")


def test_a_collision_is_an_error_on_one_device_too():
    with pytest.raises(InputError, match="both go to mesh axis 'tensor'"):
        resolve(("heads", "mlp"), DEFAULT_RULES, AbstractMesh((1, 1, 1), MESH_AXES), (4, 4))


def test_rules_are_values_that_change_by_replacement():
    rules = DEFAULT_RULES.replace(kv_heads=None, mlp=("fsdp", "tensor"), embed=None)
    assert resolve(("embed", "mlp"), rules, MESH, (8, 16)).spec == P(None, ("fsdp", "tensor"))
    assert DEFAULT_RULES.mesh_axes("kv_heads") == ("tensor",)
    assert hash(rules) != hash(DEFAULT_RULES)
    with pytest.raises(InputError, match="mlp goes to mesh axis 'expert'; the mesh has data"):
        resolve(("mlp",), rules.replace(mlp="expert"), MESH, (8,))


def test_fewer_key_value_heads_than_parts_stay_whole():
    kernel, cache = ("embed", "kv_heads", "head_width"), ("slots", "prefix", "kv_heads")
    assert resolve(kernel, DEFAULT_RULES, MESH, (8, 2, 3)).spec == P("fsdp", None, None)
    assert resolve(cache, SEARCH_RULES, MESH, (4, 7, 1)).spec == P(("data", "fsdp"), None, None)
    strict = dataclasses.replace(DEFAULT_RULES, shared=())
    with pytest.raises(InputError, match="kv_heads of size 2 is not divisible by mesh tensor 4"):
        resolve(kernel, strict, MESH, (8, 2, 3))


def test_the_nearest_meshes_divide_every_leaf():
    """Of 16 devices: width 24 takes fsdp of 1, 2, 4, 8, 3 heads a tensor axis of 1."""
    shapes = {"a": jax.ShapeDtypeStruct((24, 3), jnp.float32)}
    with pytest.raises(InputError) as error:
        resolve_tree({"a": ("embed", "heads")}, shapes, DEFAULT_RULES, MESH)
    told = str(error.value)
    assert told == (
        "a: heads of size 3 is not divisible by mesh tensor 4; use data=2,fsdp=8 | "
        "data=4,fsdp=4 | data=8,fsdp=2, or leave heads whole (heads= in the rules)"
    )


@pytest.mark.parametrize(
    ("text", "axes", "shape", "spec"),
    [
        ("train", ("embed", "mlp"), (8, 16), P("fsdp", "tensor")),
        ("search", ("embed", "mlp"), (8, 16), P(None, ("fsdp", "tensor"))),
        ("replicated", ("vocab", "embed"), (7, 5), P(None, None)),
        ("search, mlp = tensor", ("embed", "mlp"), (8, 16), P(None, "tensor")),
        ("train,heads=,embed=data+fsdp", ("embed", "heads"), (8, 3), P(("data", "fsdp"), None)),
    ],
)
def test_rules_from_text(text, axes, shape, spec):
    assert resolve(axes, parse_rules(text), MESH, shape).spec == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "no preset 'fast'; one of train, search, replicated"),
        ("search,mlp", "'mlp' must be AXIS=MESH_AXIS, of data, fsdp, tensor"),
        ("search,mlp=model", "'mlp=model' must be AXIS=MESH_AXIS"),
        ("search,mlp=tensor+tensor", "'mlp=tensor+tensor' must be AXIS=MESH_AXIS"),
        ("search,width=tensor", "unknown logical axis 'width'; the rules know vocab"),
    ],
)
def test_wrong_rules(text, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        parse_rules(text)
    assert repr(text) in str(error.value)


def test_resolve_tree_names_the_leaf():
    axes = {"embed": {"embedding": ("vocab", "embed")}, "head": {"kernel": ("embed", "vocab")}}
    shape = jax.ShapeDtypeStruct((64, 8), jnp.float32)
    odd = jax.ShapeDtypeStruct((8, 63), jnp.float32)
    specs = resolve_tree(
        axes, {"embed": {"embedding": shape}, "head": {"kernel": shape}}, DEFAULT_RULES, MESH
    )
    assert specs["embed"]["embedding"].spec == P("tensor", "fsdp")
    assert specs["head"]["kernel"].spec == P("fsdp", "tensor")
    with pytest.raises(InputError, match="^head/kernel: vocab of size 63"):
        resolve_tree(
            axes, {"embed": {"embedding": shape}, "head": {"kernel": odd}}, DEFAULT_RULES, MESH
        )


def test_what_is_held_is_named_by_its_place():
    place = Placement(make_mesh("data=1", jax.devices()[:1]), DEFAULT_RULES.replace(layers="data"))
    cache = {"prefix": {"keys": jnp.zeros((2, 2))}}
    with pytest.raises(InputError, match=r"^prefix/keys: layers and slots both go to mesh axis"):
        place.constrain(cache, {"prefix": {"keys": ("layers", "slots")}})


def test_constrain_without_a_mesh_is_the_identity():
    x = jnp.ones((3, 5))
    assert ON_ONE_DEVICE.constrain(x, ("slots", "embed")) is x


def test_one_device_mesh():
    mesh = make_mesh("data=1", jax.devices()[:1])
    assert mesh.axis_names == MESH_AXES
    assert mesh.size == 1


EIGHT_DEVICES = """
import jax, jax.numpy as jnp
from w2s_jax.ops.sharding import make_mesh
from w2s_jax.ops.sharding import DEFAULT_RULES, Placement, resolve
mesh = make_mesh("data=2,fsdp=-1,tensor=2")
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
split = resolve(("embed", "mlp"), DEFAULT_RULES, mesh, (8, 4))
kernel = jax.device_put(jnp.arange(32.0).reshape(8, 4), split)
assert {shard.data.shape for shard in kernel.addressable_shards} == {(4, 2)}
x = jnp.arange(64.0).reshape(8, 8)
place = Placement(mesh, DEFAULT_RULES)
step = jax.jit(lambda x, w: place.constrain(x @ w, ("slots", "mlp")))
out = step(x, kernel)
assert {shard.data.shape for shard in out.addressable_shards} == {(2, 2)}
assert jnp.array_equal(jax.device_get(out), jax.device_get(x) @ jax.device_get(kernel))
print("sharded", len(jax.devices()))
"""


def test_arrays_land_on_eight_devices(run_python):
    assert run_python(EIGHT_DEVICES, devices=8).strip() == "sharded 8"
