"""Low-rank adapters on a decoder (LoRA, arXiv 2106.09685): beside the base's kernels or in them.

An adapter is a tree with `lora_a` and `lora_b` in the places of the base's kernels and, where one
was trained so, whole parameters in place of the base's. Files: `models/peft.py`.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from w2s_jax.errors import InputError, check_fields
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.model import Model
from w2s_jax.models.parameters import (
    ATTENTION,
    EXPERTS,
    PROJECTIONS,
    QKV,
    STACKED,
    contracted,
    declared,
    input_major_leaf,
    layer_name,
    leading_axes,
    module_of,
    of_expert,
    output_major_leaf,
    unstack_layers,
)
from w2s_jax.models.quantize import is_quantized
from w2s_jax.ops.sharding import DEFAULT_RULES, Axes, Rules, resolve_tree, with_shardings

FACTORS = ("lora_a", "lora_b")
# What checkpoints call them, bare or behind the name of the module that holds them.
_ALIASES = {
    "q_proj": ("query",),
    "k_proj": ("key",),
    "v_proj": ("value",),
    "o_proj": ("out",),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "c_attn": QKV,
    "c_proj": ("out", "down"),
    "attn.c_proj": ("out",),
    "mlp.c_proj": ("down",),
    "c_fc": ("up",),
    "qkv_proj": QKV,
    "gate_up_proj": ("gate", "up"),
    "query_key_value": QKV,
    "dense": ("out",),
    "dense_h_to_4h": ("up",),
    "dense_4h_to_h": ("down",),
    "out_proj": ("out",),
    "fc1": ("up",),
    "fc2": ("down",),
    "all-linear": PROJECTIONS,
}


@dataclass(frozen=True)
class LoraConfig:
    """What is added to a kernel W: W + scale · A B.

    scale is alpha / rank, or alpha / √rank with `rslora` (arXiv 2312.03732).

    Raises InputError for a value out of range and for an unknown target.
    """

    rank: int = 16
    """Columns of A, rows of B."""
    alpha: float = 32.0
    """The product is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs that is set to zero in training."""
    rslora: bool = False
    """Scale by alpha / √rank instead."""
    targets: tuple[str, ...] = PROJECTIONS
    """Projections: query, key, value, out, gate, up, down, or a checkpoint's names of them."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rank < 1:
            raise InputError(f"LoRA rank {self.rank}; it must be at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InputError(f"LoRA alpha {self.alpha}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise InputError(f"LoRA dropout {self.dropout}; it must be at least 0 and below 1")
        _projections(self.targets)

    @property
    def scale(self) -> float:
        """The factor of A B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def targeted(config: ModelConfig, lora: LoraConfig) -> tuple[str, ...]:
    """The projections of this decoder that are adapted; "gate" falls away where there is none.

    Raises:
        InputError: Where none is left.
    """
    held = [name for name in PROJECTIONS if config.gated_mlp or name != "gate"]
    found = tuple(name for name in held if name in _projections(lora.targets))
    if not found:
        raise InputError(
            f"LoRA targets {', '.join(lora.targets) or '()'}: a {config.architecture} has none of "
            f"them; it has {', '.join(held)}"
        )
    of_experts = [name for name in found if EXPERTS in module_of(config, name)]
    if lora.dropout and of_experts:
        raise InputError(
            f"LoRA dropout on experts ({', '.join(of_experts)}) is not supported; make it 0, or "
            f"target {', '.join(ATTENTION)} alone"
        )
    return found


def _projections(targets: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for target in targets:
        bare = target.removeprefix("self_attn.")
        bare = bare if bare in _ALIASES else re.sub(r"^(mlp|attn|attention)\.", "", bare)
        if bare not in PROJECTIONS and bare not in _ALIASES:
            known = ", ".join((*PROJECTIONS, *_ALIASES))
            raise InputError(f"unknown LoRA target {target!r}; known are {known}")
        found.update(_ALIASES.get(bare, (bare,)))
    return found


def init_adapter(
    config: ModelConfig,
    lora: LoraConfig,
    key: Array,
    *,
    dtype: DTypeLike = jnp.float32,
    scan_layers: bool = False,
) -> dict[str, Any]:
    """A fresh adapter, all of it trainable: A uniform in ±1/√inputs as in PEFT, B zero.

    lora_a [*inputs, rank] and lora_b [rank, *outputs], each with a leading N with `scan_layers`;
    both layouts hold the same numbers.

    Raises:
        InputError: Where the model has none of the targets.
    """
    flat: dict[str, Array] = {}
    shapes = _factor_shapes(config, lora)
    for layer in range(config.layers):
        drawn = jax.random.split(jax.random.fold_in(key, layer), len(PROJECTIONS))
        keys = dict(zip(PROJECTIONS, drawn, strict=True))
        for name, (a, b) in shapes.items():
            place = f"{layer_name(layer)}/{module_of(config, name)}"
            limit = math.prod(a[leading_axes(f"{place}/lora_a") : -1]) ** -0.5
            flat[f"{place}/lora_a"] = jax.random.uniform(keys[name], a, dtype, -limit, limit)
            flat[f"{place}/lora_b"] = jnp.zeros(b, dtype)
    adapter = unflatten_dict(flat, sep="/")
    return stack_adapter(adapter, config.layers) if scan_layers else adapter


def _factor_shapes(
    config: ModelConfig, lora: LoraConfig
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes of A and B of a layer's adapted projections, by their names."""
    table, shapes = declared(config), {}
    for name in targeted(config, lora):
        path = f"{layer_name(0)}/{module_of(config, name)}/kernel"
        kernel, lead = table[path][0], leading_axes(path)
        split = lead + contracted(name)
        shapes[name] = (*kernel[:split], lora.rank), (*kernel[:lead], lora.rank, *kernel[split:])
    return shapes


def attach(params: Mapping[str, Any], adapter: Mapping[str, Any], lora: LoraConfig) -> dict:
    """The base's own arrays, in either layout, with the adapter's beside (or for) them.

    Beside each adapted kernel: lora_a, lora_b, lora_scale and lora_dropout (scalars; [N] where
    layers are stacked), which `decoder.Linear` reads.

    Raises:
        InputError: Where the adapter does not fit the base.
    """
    flat, stacked = flatten_dict(params), STACKED in params
    for place, change in _changes(flat, adapter).items():
        layers = next(iter(change.values())).shape[:1] if stacked and place[0] == STACKED else ()
        flat |= {(*place, name): leaf for name, leaf in change.items()}
        if FACTORS[0] in change:
            flat[(*place, "lora_scale")] = jnp.full(layers, lora.scale, jnp.float32)
            flat[(*place, "lora_dropout")] = jnp.full(layers, lora.dropout, jnp.float32)
    return unflatten_dict(flat)


def merge(params: Mapping[str, Any], adapter: Mapping[str, Any], lora: LoraConfig) -> dict:
    """The base with the adapter added into its kernels: W + scale · A B.

    Computed in float32, then cast to the kernel's dtype.

    Raises:
        InputError: Where the adapter does not fit the base, or that is quantised.
    """
    flat = flatten_dict(params)
    for place, change in _changes(flat, adapter).items():
        for name, leaf in change.items():
            if name not in FACTORS:
                flat[(*place, name)] = jnp.asarray(leaf, flat[(*place, name)].dtype)
        if FACTORS[0] in change:
            a, b = (change[name] for name in FACTORS)
            kernel = flat[(*place, "kernel")]
            if is_quantized({"kernel": kernel}):
                raise InputError(
                    f"{'/'.join(place)} is quantised, which no adapter is merged into; attach it"
                )
            path = "/".join((*place, "kernel"))
            own = input_major_leaf(path, kernel)
            added = _added(own, a, b, lora.scale, leading_axes(path))
            if own is not kernel:
                added = output_major_leaf(path, added, tied=False)
            flat[(*place, "kernel")] = added
    return unflatten_dict(flat)


@functools.partial(jax.jit, static_argnames="lead")
def _added(kernel: Array, a: Array, b: Array, scale: float | Array, lead: int) -> Array:
    product = functools.partial(jnp.tensordot, axes=1, precision="highest")
    for _ in range(lead):
        product = jax.vmap(product)
    change = product(a.astype(jnp.float32), b.astype(jnp.float32))
    return (kernel.astype(jnp.float32) + scale * change).astype(kernel.dtype)


def with_vocabulary(base: Model, config: ModelConfig, adapter: dict[str, Any]) -> Model:
    """A base made one of `config`: embedding and head taken out of the adapter, or untied."""
    params = dict(base.params)
    if base.config.tied_embeddings and not config.tied_embeddings:
        embedding = params["embed"]["embedding"]
        if is_quantized(params["embed"]):
            raise InputError("an adapter that unties the head needs a base that is not quantised")
        params["head"] = {"kernel": input_major_leaf("embed/embedding", embedding).T}
    return replace(base, config=config, params=take_vocabulary(params, adapter))


def take_vocabulary(params: dict[str, Any], adapter: dict[str, Any]) -> dict[str, Any]:
    """The parameters with an adapter's embedding and head, which are taken out of the adapter.

    Of another vocabulary they cannot be written over the base's by `merge`.
    """
    names = [name for name in ("embed", "head") if name in adapter]
    return params | {name: params[name] | adapter.pop(name) for name in names}


def _changes(
    flat: Mapping[tuple[str, ...], Any], adapter: Mapping[str, Any]
) -> dict[tuple[str, ...], dict[str, Any]]:
    """The adapter's leaves by the module they belong to, in the layout of the base's `flat`."""
    stacked = [leaf.shape[0] for path, leaf in flat.items() if path[0] == STACKED]
    adapter = stack_adapter(adapter, stacked[0]) if stacked else unstack_layers(dict(adapter))
    changes: dict[tuple[str, ...], dict[str, Any]] = {}
    for path, leaf in flatten_dict(adapter).items():
        changes.setdefault(path[:-1], {})[path[-1]] = leaf
    for place, change in changes.items():
        for name, leaf in change.items():
            base = flat.get((*place, "kernel" if name in FACTORS else name))
            _check_fit("/".join(place), name, leaf, base)
    return changes


def _check_fit(place: str, name: str, leaf: Any, base: Any) -> None:
    """Raise InputError unless a leaf is of the shape that its base takes."""
    if base is None:
        raise InputError(f"the adapter changes {place}, which its base does not have")
    shape, lead = base.shape, leading_axes(f"{place}/{name}")
    split = contracted(place.rpartition("/")[2]) + lead
    expected = shape
    if name == "lora_a":
        expected = (*shape[:split], leaf.shape[-1])
    elif name == "lora_b":
        expected = (*shape[:lead], leaf.shape[lead], *shape[split:])
    if leaf.shape != expected:
        raise InputError(
            f"the adapter is for another base: {place}/{name} has shape {leaf.shape}, "
            f"expected {expected}"
        )


def stack_adapter(adapter: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The same adapter with its layers on a leading axis, [N, ...] each leaf.

    Where layers differ in rank, or some have no adapter, zeros fill up: they change nothing and
    receive no gradient. Stacked adapters are returned as they are.

    Raises:
        InputError: Where whole parameters are replaced in some layers only.
    """
    if STACKED in adapter:
        return dict(adapter)
    names = [layer_name(layer) for layer in range(layers)]
    rest = {name: subtree for name, subtree in adapter.items() if name not in names}
    per_layer = [flatten_dict(adapter.get(name, {})) for name in names]
    paths = dict.fromkeys(path for flat in per_layer for path in flat)
    stacked = {}
    for path in paths:
        lead = leading_axes("/".join(path))
        axis = {FACTORS[0]: -1, FACTORS[1]: lead}.get(path[-1])
        stacked[path] = _stacked([flat.get(path) for flat in per_layer], "/".join(path), axis)
    return rest | ({STACKED: unflatten_dict(stacked)} if stacked else {})


def stack_experts(config: ModelConfig, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path with all experts' side by side, of those of each as the table has them.

    An expert without an adapter gets zeros, as in `stack_adapter`.
    """
    found, rank_axis = {}, {FACTORS[0]: -1, FACTORS[1]: 0}
    for path, leaf in flat.items():
        whole = re.sub(rf"/{EXPERTS}/\d+/", f"/{EXPERTS}/", path)
        if whole == path:
            found[path] = leaf
        elif whole not in found:
            every = [flat.get(of_expert(whole, expert)) for expert in range(config.experts)]
            found[whole] = _stacked(every, whole, rank_axis.get(path.rpartition("/")[2]))
    return found


def _stacked(leaves: list[Any], path: str, axis: int | None) -> Array:
    """Leaves on a new leading axis; of factors those that are missing or short along `axis` too."""
    held = [leaf for leaf in leaves if leaf is not None]
    if axis is None:
        if len(held) < len(leaves):
            raise InputError(
                f"the adapter replaces {path} in some layers only, which stacked layers "
                "cannot hold; load the model with its layers apart"
            )
        return jnp.stack(held)
    axis %= held[0].ndim
    rank = max(leaf.shape[axis] for leaf in held)
    none = jax.lax.slice_in_dim(held[0], 0, 0, axis=axis)

    def filled(leaf: Any) -> Array:
        widths = [(0, rank - size if at == axis else 0) for at, size in enumerate(leaf.shape)]
        return jnp.pad(leaf, widths)

    return jnp.stack([filled(none if leaf is None else leaf) for leaf in leaves])


def adapter_axes(config: ModelConfig, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Logical axes of an adapter's leaves: those of the base's parameters, the rank never split."""
    table = declared(config, scan_layers=STACKED in adapter)

    def axes(path: tuple[str, ...], leaf: Any) -> Axes:
        *place, name = path
        if "/".join(path) in table:
            return table["/".join(path)][1]
        if name not in FACTORS:
            return (None,) * leaf.ndim  # the head of a reward model
        _, base = table["/".join((*place, "kernel"))]
        lead = leading_axes("/".join(path))
        split = lead + contracted(place[-1])
        return (*base[:split], None) if name == "lora_a" else (*base[:lead], None, *base[split:])

    flat = flatten_dict(dict(adapter))
    return unflatten_dict({path: axes(path, leaf) for path, leaf in flat.items()})


def abstract_adapter(
    config: ModelConfig,
    lora: LoraConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    scan_layers: bool = False,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
) -> dict[str, Any]:
    """The shapes, dtypes and, on a mesh, shardings of a fresh adapter; nothing is allocated.

    Raises:
        InputError: As `init_adapter` and `shard_adapter` do.
    """
    flat: dict[str, jax.ShapeDtypeStruct] = {}
    lead = (config.layers,) if scan_layers else ()
    for layer in (STACKED,) if scan_layers else map(layer_name, range(config.layers)):
        for name, shapes in _factor_shapes(config, lora).items():
            for factor, shape in zip(FACTORS, shapes, strict=True):
                leaf = jax.ShapeDtypeStruct((*lead, *shape), jnp.dtype(dtype))
                flat[f"{layer}/{module_of(config, name)}/{factor}"] = leaf
    adapter = unflatten_dict(flat, sep="/")
    if mesh is None:
        return adapter
    shardings = resolve_tree(adapter_axes(config, adapter), adapter, rules, mesh)
    return with_shardings(adapter, shardings)


def shard_adapter(
    config: ModelConfig, adapter: Mapping[str, Any], mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> dict[str, Any]:
    """The same adapter split over a mesh as its base is.

    Raises:
        InputError: Naming the parameter, where the mesh does not divide a dimension.
    """
    shardings = resolve_tree(adapter_axes(config, adapter), dict(adapter), rules, mesh)
    return jax.device_put(dict(adapter), shardings)
