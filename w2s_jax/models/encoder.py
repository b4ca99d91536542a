"""The DistilBERT-class encoder that classifies sequences, and what its checkpoints call its parts.

Their layout is that of transformers' DistilBertForSequenceClassification; `load.py` reads them.
"""

from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from w2s_jax.errors import InputError
from w2s_jax.models.config_json import Json, mapping, number, refused, size
from w2s_jax.models.parameters import Stored, stored_as

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Classifier:
    """An encoder's config and parameters; calling it maps right-padded tokens to label logits."""

    config: EncoderConfig = field(metadata={"static": True})
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


ENCODER, ENCODER_CLASS = "distilbert", "DistilBertForSequenceClassification"
_BODY, _LAYER = "distilbert.", "distilbert.transformer.layer.{i}."
_NAMES = {
    "embed": _BODY + "embeddings.word_embeddings",
    "positions": _BODY + "embeddings.position_embeddings",
    "embed_norm": _BODY + "embeddings.LayerNorm",
    "layers/query": _LAYER + "attention.q_lin",
    "layers/key": _LAYER + "attention.k_lin",
    "layers/value": _LAYER + "attention.v_lin",
    "layers/out": _LAYER + "attention.out_lin",
    "layers/attention_norm": _LAYER + "sa_layer_norm",
    "layers/up": _LAYER + "ffn.lin1",
    "layers/down": _LAYER + "ffn.lin2",
    "layers/mlp_norm": _LAYER + "output_layer_norm",
    "pre_classifier": "pre_classifier",
    "classifier": "classifier",
}
# Our fields, config.json's names of them, and what transformers assumes where it is silent.
_SIZES = {
    "vocab_size": ("vocab_size", 30522),
    "width": ("dim", 768),
    "layers": ("n_layers", 6),
    "heads": ("n_heads", 12),
    "mlp_width": ("hidden_dim", 3072),
    "max_positions": ("max_position_embeddings", 512),
}
_RATES = {
    "dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "head_dropout": ("seq_classif_dropout", 0.2),
}
_DEFAULTS = dict([*_SIZES.values(), *_RATES.values(), ("initializer_range", 0.02)])


def stored_in_encoder(path: str) -> Stored:
    """Where files keep the encoder's parameter at a path such as "layers_0/query/kernel"."""
    return stored_as(_NAMES, path)


def encoder_from_hf(hf: Json) -> EncoderConfig:
    """Read the contents of a config.json, with transformers' defaults for what it omits.

    Raises InputError for another architecture, an activation other than GELU, a malformed field.
    """
    if hf.get("model_type") != ENCODER:
        raise InputError(f"model_type {hf.get('model_type')!r} is not {ENCODER!r}")
    activation = hf.get("activation", "gelu")
    if activation != "gelu":
        raise InputError(f"activation {activation!r} is not 'gelu'")
    hf = {**_DEFAULTS, **hf}
    names = mapping(hf, "id2label", '{"0": "NEGATIVE"}') or {"0": "LABEL_0", "1": "LABEL_1"}
    if not all(key.isdecimal() for key in names):
        raise refused("id2label", names, "a mapping of numbers to names")
    fields: dict[str, Any] = {field: size(hf, name) for field, (name, _) in _SIZES.items()}
    fields |= {field: number(hf, name, least=0) for field, (name, _) in _RATES.items()}
    return EncoderConfig(
        **fields,
        labels=len(names),
        initializer_range=number(hf, "initializer_range", above=0),
        pad_id=0 if hf.get("pad_token_id") is None else size(hf, "pad_token_id", least=0),
        label_names=tuple(names[key] for key in sorted(names, key=int)),
    )


def encoder_to_hf(config: EncoderConfig) -> dict[str, Any]:
    """The contents of a config.json that `encoder_from_hf` and transformers read."""
    names = config.label_names or tuple(f"LABEL_{i}" for i in range(config.labels))
    fields = {name: getattr(config, field) for field, (name, _) in (_SIZES | _RATES).items()}
    return {
        "architectures": [ENCODER_CLASS],
        "model_type": ENCODER,
        "activation": "gelu",
        **fields,
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_id,
        "sinusoidal_pos_embds": False,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
