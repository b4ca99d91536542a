"""The DistilBERT-class encoder that classifies sequences, and its checkpoints.

Their layout is that of transformers' DistilBertForSequenceClassification.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Float32, Int

from w2s_jax.errors import InputError
from w2s_jax.models.config_json import Json, mapping, number, refused, size
from w2s_jax.models.huggingface import CONFIG, locate, open_tensors, read_json, write_checkpoint
from w2s_jax.models.model import parameter_dtype
from w2s_jax.pytrees import pytree

Params = dict[str, Any]


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of a DistilBERT classifier (arXiv 1910.01108) and its dropout rates."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    max_positions: int = 512
    labels: int = 2
    norm_epsilon: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    head_dropout: float = 0.2
    initializer_range: float = 0.02
    pad_id: int = 0
    label_names: tuple[str, ...] = ()

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class _Block(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B X D"], mask: Bool[Array | np.ndarray, "B X"], train: bool
    ) -> Float[Array, "B X D"]:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)

        def project(name: str) -> Float[Array, "B X H C"]:
            shape = (config.heads, config.head_width)
            return nn.DenseGeneral(shape, kernel_init=init, name=name)(x)

        attention = nn.dot_product_attention_weights(
            project("query"), project("key"), mask=mask[:, None, None, :]
        )
        attention = nn.Dropout(config.attention_dropout, deterministic=not train)(attention)
        mixed = jnp.einsum("bhqk,bkhc->bqhc", attention, project("value"))
        mixed = nn.DenseGeneral(config.width, axis=(-2, -1), kernel_init=init, name="out")(mixed)
        x = nn.LayerNorm(config.norm_epsilon, name="attention_norm")(x + mixed)

        hidden = nn.Dense(config.mlp_width, kernel_init=init, name="up")(x)
        hidden = nn.Dense(config.width, kernel_init=init, name="down")(
            nn.gelu(hidden, approximate=False)
        )
        hidden = nn.Dropout(config.dropout, deterministic=not train)(hidden)
        return nn.LayerNorm(config.norm_epsilon, name="mlp_norm")(x + hidden)


class Encoder(nn.Module):
    """Post-norm transformer encoder; the label logits are read off the first token."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B X"],
        mask: Bool[Array | np.ndarray, "B X"],
        train: bool = False,
    ) -> Float32[Array, "B labels"]:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        embed = nn.Embed(config.vocab_size, config.width, embedding_init=init, name="embed")
        positions = nn.Embed(
            config.max_positions, config.width, embedding_init=init, name="positions"
        )
        x = embed(tokens) + positions(jnp.arange(tokens.shape[1]))
        x = nn.LayerNorm(config.norm_epsilon, name="embed_norm")(x)
        x = nn.Dropout(config.dropout, deterministic=not train)(x)
        for i in range(config.layers):
            x = _Block(config, name=f"layers_{i}")(x, mask, train)
        pooled = nn.relu(nn.Dense(config.width, kernel_init=init, name="pre_classifier")(x[:, 0]))
        pooled = nn.Dropout(config.head_dropout, deterministic=not train)(pooled)
        logits = nn.Dense(config.labels, kernel_init=init, name="classifier")(pooled)
        return logits.astype(jnp.float32)


@pytree(static=("config",))
class Classifier:
    """An encoder's config and parameters; calling it maps right-padded tokens to label logits."""

    config: EncoderConfig
    params: Params

    def __call__(
        self, tokens: Int[Array | np.ndarray, "B X"], mask: Bool[Array | np.ndarray, "B X"]
    ) -> Float32[Array, "B labels"]:
        return Encoder(self.config).apply({"params": self.params}, tokens, mask)


def init_classifier(config: EncoderConfig, key: Array) -> Classifier:
    """A classifier with random float32 weights; `jax.eval_shape` of it gives the shapes alone."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = Encoder(config).init(key, tokens, jnp.ones((1, 2), bool))["params"]
    return Classifier(config, params)


ARCHITECTURE = "DistilBertForSequenceClassification"
_DEFAULTS = {
    "vocab_size": 30522,
    "dim": 768,
    "n_layers": 6,
    "n_heads": 12,
    "hidden_dim": 3072,
    "max_position_embeddings": 512,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "seq_classif_dropout": 0.2,
    "initializer_range": 0.02,
}
_BODY = "distilbert."

_OUTER = {
    "embed": _BODY + "embeddings.word_embeddings",
    "positions": _BODY + "embeddings.position_embeddings",
    "embed_norm": _BODY + "embeddings.LayerNorm",
    "pre_classifier": "pre_classifier",
    "classifier": "classifier",
}
_LAYER = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "out": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "mlp_norm": "output_layer_norm",
}


def load_classifier(path_or_hub_id: str | Path, *, dtype: Any = None) -> Classifier:
    """Load a classifier from a directory or a hub id; `dtype` as in `load_model`.

    Raises InputError for a missing directory or file, another architecture, an activation other
    than GELU, and any tensor missing, misshapen or too many.
    """
    directory = locate(path_or_hub_id)
    config = encoder_config(directory)
    tensors = open_tensors(directory)
    shapes = jax.eval_shape(lambda key: init_classifier(config, key), jax.random.key(0)).params
    leaves = {}
    for path, leaf in flatten_dict(shapes, sep="/").items():
        name = _stored_name(path)
        if name not in tensors:
            raise InputError(f"{directory}: tensor {name} is missing")
        values = tensors.pop(name)[...]
        expected = _stored_shape(path, leaf.shape)
        if values.shape != expected:
            raise InputError(f"{directory}: tensor {name} has shape {values.shape}, not {expected}")
        found = _to_ours(path, values, leaf.shape)
        leaves[path] = jnp.asarray(found, parameter_dtype(dtype, found.dtype))
    if tensors:
        raise InputError(f"{directory}: tensor {min(tensors)} is no part of a {ARCHITECTURE}")
    return Classifier(config, unflatten_dict(leaves, sep="/"))


def encoder_config(directory: Path) -> EncoderConfig:
    """The EncoderConfig of a checkpoint. Raises InputError as `load_classifier` does."""
    hf = read_json(directory / CONFIG)
    if hf.get("model_type") != "distilbert":
        found = hf.get("model_type")
        raise InputError(f"{directory / CONFIG}: model_type {found!r} is not 'distilbert'")
    activation = hf.get("activation", "gelu")
    if activation != "gelu":
        raise InputError(f"{directory / CONFIG}: activation {activation!r} is not 'gelu'")
    try:
        return _config(_DEFAULTS | hf)
    except InputError as error:
        raise error.at(str(directory / CONFIG)) from None


def _config(hf: Json) -> EncoderConfig:
    names = mapping(hf, "id2label", '{"0": "NEGATIVE"}') or {"0": "LABEL_0", "1": "LABEL_1"}
    if not all(key.isdecimal() for key in names):
        raise refused("id2label", names, "a mapping of numbers to names")
    return EncoderConfig(
        vocab_size=size(hf, "vocab_size"),
        width=size(hf, "dim"),
        layers=size(hf, "n_layers"),
        heads=size(hf, "n_heads"),
        mlp_width=size(hf, "hidden_dim"),
        max_positions=size(hf, "max_position_embeddings"),
        labels=len(names),
        dropout=number(hf, "dropout", least=0),
        attention_dropout=number(hf, "attention_dropout", least=0),
        head_dropout=number(hf, "seq_classif_dropout", least=0),
        initializer_range=number(hf, "initializer_range", above=0),
        pad_id=0 if hf.get("pad_token_id") is None else size(hf, "pad_token_id", least=0),
        label_names=tuple(names[key] for key in sorted(names, key=int)),
    )


def save_classifier(
    classifier: Classifier, directory: str | Path, *, tokenizer: Any = None
) -> None:
    """Write config.json and model.safetensors, as transformers and `load_classifier` read them.

    `tokenizer` (anything with `save_pretrained`) is written beside them. Raises InputError when
    the directory is not writable.
    """
    leaves = {
        _stored_name(path): _to_stored(path, np.asarray(leaf))
        for path, leaf in flatten_dict(classifier.params, sep="/").items()
    }
    dtype = next(iter(leaves.values())).dtype.name
    sizes = {name: leaf.nbytes for name, leaf in leaves.items()}
    hf = _to_hf(classifier.config) | {"torch_dtype": dtype}
    write_checkpoint(directory, hf, sizes, leaves.__getitem__)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))


def _stored_name(path: str) -> str:
    *parts, kind = path.split("/")
    suffix = "bias" if kind == "bias" else "weight"
    layer = re.fullmatch(r"layers_(\d+)", parts[0])
    if layer is None:
        return f"{_OUTER[parts[0]]}.{suffix}"
    return f"{_BODY}transformer.layer.{layer[1]}.{_LAYER[parts[1]]}.{suffix}"


def _stored_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Torch keeps linear weights as [out, in], heads merged with their width."""
    if path.endswith("/kernel"):
        inputs = shape[:-1] if path.endswith("/out/kernel") else shape[:1]
        size = int(np.prod(inputs))
        return (int(np.prod(shape)) // size, size)
    return (int(np.prod(shape)),) if path.endswith("/bias") else shape


def _to_stored(path: str, leaf: np.ndarray) -> np.ndarray:
    shape = _stored_shape(path, leaf.shape)
    return leaf.reshape(shape[::-1]).T if path.endswith("/kernel") else leaf.reshape(shape)


def _to_ours(path: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return (values.T if path.endswith("/kernel") else values).reshape(shape)


def _to_hf(config: EncoderConfig) -> dict[str, Any]:
    names = config.label_names or tuple(f"LABEL_{i}" for i in range(config.labels))
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "distilbert",
        "activation": "gelu",
        "vocab_size": config.vocab_size,
        "dim": config.width,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "hidden_dim": config.mlp_width,
        "max_position_embeddings": config.max_positions,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "seq_classif_dropout": config.head_dropout,
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_id,
        "sinusoidal_pos_embds": False,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
