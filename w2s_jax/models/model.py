"""The model value: a config and its parameters, callable on tokens. No files, no tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from w2s_jax.errors import InputError, check_kind
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.decoder import Remat, initial_params, logits, read_sequences
from w2s_jax.models.parameters import declared, input_major_params, output_major_params
from w2s_jax.models.quantize import QuantizeConfig, quantize, quantized_axes
from w2s_jax.ops.sharding import (
    DEFAULT_RULES,
    ON_ONE_DEVICE,
    Placement,
    Rules,
    check_placing,
    resolve_tree,
)

STORED = "stored"


def quickest_dtype() -> str:
    """What weights are loaded as where nothing else is asked for: "stored", but on a CPU float32.

    CPUs compute slowly in the half-sized types that checkpoints hold.
    """
    return "float32" if jax.default_backend() == "cpu" else STORED


def parameter_dtype(dtype: Any, stored: Any) -> jnp.dtype:
    """The dtype that `load_model`'s argument names, for parameters stored as `stored`.

    Float64, where it is stored, is read as the widest that JAX computes in.

    Raises:
        InputError: As `floating_dtype` does.
    """
    dtype = quickest_dtype() if dtype is None else dtype
    if isinstance(dtype, str) and dtype == STORED:
        dtype = jax.dtypes.canonicalize_dtype(stored)
    return floating_dtype(dtype)


def floating_dtype(dtype: Any) -> jnp.dtype:
    """The dtype of this name. Raises InputError for none, and for what JAX does not compute in."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        raise InputError(f"dtype {dtype!r} is unknown; try float32 or bfloat16") from None
    if not jnp.issubdtype(found, jnp.floating):
        raise InputError(f"dtype {found} is not a floating-point type; try float32 or bfloat16")
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise InputError(
            f"dtype {found}: JAX computes in 32 bits at most unless jax_enable_x64 is set; "
            "try float32"
        )
    return found


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Model:
    """A decoder: a static config and a plain nested dict of parameters, as one pytree.

    The layout of the parameters (per layer, or stacked for a scan) is read from the dict itself.
    placement says where they lie, and so where the model's caches will.
    """

    config: ModelConfig = field(metadata={"static": True})
    params: dict
    placement: Placement = field(default=ON_ONE_DEVICE, metadata={"static": True})

    @property
    def scan_layers(self) -> bool:
        """Whether the layers are stacked on a leading axis."""
        return "layers" in self.params

    @property
    def dtype(self) -> jnp.dtype:
        """The parameters' dtype, of quantised ones that which they compute as."""
        return jnp.dtype(self.params["embed"]["embedding"].dtype)

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B X"],
        mask: Bool[Array | np.ndarray, "B X"] | None = None,
    ) -> Float[Array, "B X V"]:
        """Float32 next-token logits at every position.

        `mask` is False on padding, on either side; padding is not seen and takes no position.
        Raises InputError for what is no array of token ids, for a mask of another shape, and for
        more tokens than learned positions.
        """
        check_tokens(tokens, mask)
        check_positions(self.config, tokens.shape[1])
        return _logits(self, tokens, mask)


def init_model(
    config: ModelConfig, key: Array, *, dtype: DTypeLike = jnp.float32, scan_layers: bool = False
) -> Model:
    """A model with random parameters (normal, 0.02; norms at one, biases at zero).

    Raises:
        InputError: For what is no ModelConfig, and for a dtype that is no floating-point type.
    """
    check_kind("init_model", config, ModelConfig, "a ModelConfig")
    return Model(config, _drawing(config, floating_dtype(dtype), scan_layers)(key))


def decodes_output_major(mesh: Mesh | None, *, scan_layers: bool) -> bool:
    """Whether matrices kept output-major make decoding faster: on one CPU, with layers apart."""
    return mesh is None and not scan_layers and jax.default_backend() == "cpu"


def for_decoding(model: Model) -> Model:
    """The model with its matrices laid out for reading few tokens at a time, as a search does.

    On one CPU they are kept output-major, which makes a search of one prompt twice as fast; any
    other model is returned as it is. Until the given one is dropped, its weights are held twice:
    `load_model(.., decoding=True)` reads them so at once.

    Raises:
        InputError: For what is no Model.
    """
    check_kind("for_decoding", model, Model, "what load_model gives")
    if not decodes_output_major(model.placement.mesh, scan_layers=model.scan_layers):
        return model
    tied = model.config.tied_embeddings
    return replace(model, params=output_major_params(model.params, tied=tied))


def check_tokens(tokens: Any, mask: Any = None) -> None:
    """Raise InputError where tokens are no array of whole numbers [B, X], or the mask is not alike.

    Of arrays the kind and shape are looked at, which are known of traced ones too.
    """
    taken = "an array of token ids, rows by positions"
    check_kind("a model", tokens, Array | np.ndarray, taken)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(f"a model takes {taken}, not {tokens.dtype} of shape {tokens.shape}")
    if mask is not None and np.shape(mask) != tokens.shape:
        raise InputError(f"the mask is of shape {np.shape(mask)}, the tokens of {tokens.shape}")


def check_positions(config: ModelConfig, length: int) -> None:
    """Raise InputError for more tokens than learned positions."""
    if config.position == "learned" and length > config.max_positions:
        raise InputError(f"{length} tokens for a model of {config.max_positions} positions")


@lru_cache(maxsize=16)
def _drawing(config: ModelConfig, dtype: np.dtype, scan_layers: bool) -> Callable[[Array], dict]:
    """Compiled once for all the models of a shape: a policy's guides are two."""

    def draw(key: Array) -> dict:
        return meta.unbox(initial_params(config, key, dtype, scan_layers))

    return jax.jit(draw)


def abstract_model(
    config: ModelConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    scan_layers: bool = False,
    quantize_as: QuantizeConfig | None = None,
) -> tuple[Model, dict]:
    """Shapes and dtypes of a model's parameters, and their logical axes as tuples of names.

    Nothing is allocated. A QTensor stands, with its own axes, where `quantize_as` names a weight.
    """
    params, axes = _abstract_params(config, jnp.dtype(dtype), scan_layers, quantize_as)
    return Model(config, params), axes


@lru_cache(maxsize=16)
def _abstract_params(
    config: ModelConfig,
    dtype: np.dtype,
    scan_layers: bool,
    quantize_as: QuantizeConfig | None,
) -> tuple[dict, dict]:
    """Made once for all the meshes that a model is judged on."""
    table = declared(config, scan_layers)
    params = {path: jax.ShapeDtypeStruct(shape, dtype) for path, (shape, _) in table.items()}
    params = unflatten_dict(params, sep="/")
    if quantize_as is not None:
        params = jax.eval_shape(partial(quantize, config=quantize_as), params)
    axes = unflatten_dict({path: axes for path, (_, axes) in table.items()}, sep="/")
    return params, quantized_axes(axes, params)


def shard_model(model: Model, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Model:
    """The same model with its parameters split over a mesh as the rules say.

    Raises:
        InputError: Naming the parameter, where the mesh does not divide a dimension.
    """
    check_placing(mesh, rules)
    model = replace(model, params=input_major_params(model.params))
    _, axes = abstract_model(model.config, dtype=model.dtype, scan_layers=model.scan_layers)
    shardings = resolve_tree(quantized_axes(axes, model.params), model.params, rules, mesh)
    return Model(model.config, jax.device_put(model.params, shardings), Placement(mesh, rules))


def hidden_states(
    model: Model,
    tokens: Int[Array | np.ndarray, "B X"],
    mask: Bool[Array | np.ndarray, "B X"] | None = None,
    *,
    segments: Int[Array | np.ndarray, "B X"] | None = None,
    remat: Remat = "none",
    key: Array | None = None,
) -> Float[Array, "B X D"]:
    """The states after the last norm, before the head; for losses that never hold all logits.

    Args:
        model: The decoder.
        tokens: Token ids.
        mask: False on padding.
        segments: Instead of a mask: 0 on padding (on the right), 1, 2, .. for the documents packed
            in a row, of which none sees another.
        remat: What a gradient recomputes in every layer.
        key: Draws dropout, where the parameters have any.

    Returns:
        States in the parameters' dtype.
    """
    hidden, _ = read_sequences(
        model.config,
        model.params,
        jnp.asarray(tokens),
        mask=None if mask is None else jnp.asarray(mask),
        segments=None if segments is None else jnp.asarray(segments),
        remat=remat,
        key=key,
        placement=model.placement,
    )
    return hidden


@jax.jit
def _logits(
    model: Model, tokens: Int[Array, "B X"], mask: Bool[Array, "B X"] | None
) -> Float[Array, "B X V"]:
    return logits(model.config, model.params, hidden_states(model, tokens, mask))
