"""Reward models: decoders with a linear head at a sequence's last token, and encoder classifiers.

Their labels, and which logits make the reward. The encoder is of DistilBERT's class, in the layout
of transformers' DistilBertForSequenceClassification. `load.py` reads all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from w2s_jax.errors import InputError
from w2s_jax.models.config import Json, ModelConfig, mapping, number, refused, size
from w2s_jax.models.config_json import read_fields
from w2s_jax.models.model import Model, check_positions, hidden_states
from w2s_jax.models.parameters import REWARD_HEADS, Stored, stored_as
from w2s_jax.ops.layers import dot
from w2s_jax.ops.sharding import ON_ONE_DEVICE, Placement

SCORE = REWARD_HEADS[0]
"""The head as transformers' sequence classifiers keep it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RewardModel:
    """A decoder without a language model's head, and a head with one logit for each label.

    params: as a Model's, in either layout, but for "head". head: "kernel" [D, labels] and perhaps
    "bias" [labels]. labels: the logits' names; a reward model proper has one.
    """

    config: ModelConfig = field(metadata={"static": True})
    params: dict
    head: dict
    labels: tuple[str, ...] = field(metadata={"static": True})
    placement: Placement = field(default=ON_ONE_DEVICE, metadata={"static": True})

    @property
    def decoder(self) -> Model:
        """The decoder alone, for caches and hidden states; it has no logits of tokens."""
        return Model(self.config, self.params, self.placement)

    @property
    def dtype(self) -> jnp.dtype:
        """The parameters' dtype."""
        return self.decoder.dtype

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B X"],
        mask: Bool[Array | np.ndarray, "B X"] | None = None,
    ) -> Float32[Array, "B labels"]:
        """The labels' logits, read at each row's last unmasked token.

        `mask` is False on padding, on either side; padding is not seen and takes no position.
        Raises InputError for more tokens than learned positions.
        """
        check_positions(self.config, tokens.shape[1])
        return _label_logits(self, jnp.asarray(tokens), None if mask is None else jnp.asarray(mask))

    def head_of(self, hidden: Float[Array, "*rows D"]) -> Float32[Array, "*rows labels"]:
        """The labels' logits of states after the last norm, as `forward` gives them."""
        out = dot(hidden, self.head["kernel"], dtype=jnp.float32)
        return out + self.head["bias"].astype(jnp.float32) if "bias" in self.head else out


def last_tokens(mask: Bool[Array, "B X"]) -> Int[Array, " B"]:
    """The index of each row's last unmasked token; 0 where there is none."""
    return jnp.argmax(jnp.cumsum(mask, axis=1), axis=1)


@jax.jit
def _label_logits(
    model: RewardModel, tokens: Int[Array, "B X"], mask: Bool[Array, "B X"] | None
) -> Float32[Array, "B labels"]:
    hidden = hidden_states(model.decoder, tokens, mask)
    if mask is None:
        return model.head_of(hidden[:, -1])
    last = last_tokens(mask)
    return model.head_of(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])


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
    params: dict

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
_FIELDS = {
    "vocab_size": ("vocab_size", 30522),
    "width": ("dim", 768),
    "layers": ("n_layers", 6),
    "heads": ("n_heads", 12),
    "mlp_width": ("hidden_dim", 3072),
    "max_positions": ("max_position_embeddings", 512),
    "dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "head_dropout": ("seq_classif_dropout", 0.2),
}
_DEFAULTS = dict([*_FIELDS.values(), ("initializer_range", 0.02)])


def stored_in_encoder(path: str) -> Stored:
    """Where files keep the encoder's parameter at a path such as "layers_0/query/kernel"."""
    return stored_as(_NAMES, path)


def encoder_from_hf(hf: Json) -> EncoderConfig:
    """Read the contents of a config.json, with transformers' defaults for what it omits.

    Raises:
        InputError: For another architecture, an activation other than GELU, a malformed field.
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
    return EncoderConfig(
        **read_fields(EncoderConfig, {field: name for field, (name, _) in _FIELDS.items()}, hf),
        labels=len(names),
        initializer_range=number(hf, "initializer_range", above=0),
        pad_id=0 if hf.get("pad_token_id") is None else size(hf, "pad_token_id", least=0),
        label_names=tuple(names[key] for key in sorted(names, key=int)),
    )


def encoder_to_hf(config: EncoderConfig) -> dict[str, Any]:
    """The contents of a config.json that `encoder_from_hf` and transformers read."""
    names = config.label_names or tuple(f"LABEL_{i}" for i in range(config.labels))
    return {
        "architectures": [ENCODER_CLASS],
        "model_type": ENCODER,
        "activation": "gelu",
        **{name: getattr(config, field) for field, (name, _) in _FIELDS.items()},
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_id,
        "sinusoidal_pos_embds": False,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


NEGATIVE, POSITIVE = 0, 1


def label_names(model: RewardModel | Classifier) -> tuple[str, ...]:
    """The names of a model's labels, one for each logit."""
    if isinstance(model, RewardModel):
        return model.labels
    return model.config.label_names or tuple(f"LABEL_{i}" for i in range(model.config.labels))


def contrast(names: Sequence[str], label: str | int | None = None) -> Float32[np.ndarray, " n"]:
    """Weights of the labels' logits in the reward.

    With a `label`, by name or number, that logit alone; without, the only one, or of two the
    positive (1) minus the negative (0).

    Raises:
        InputError: For an unknown label, and for more than two labels and no choice.
    """
    weights = np.zeros(len(names), np.float32)
    if label is None and len(names) == 2:
        weights[[NEGATIVE, POSITIVE]] = -1.0, 1.0
        return weights
    if label is None and len(names) > 2:
        raise InputError(
            f"the reward model has {len(names)} labels; choose one of {_listed(names)}"
        )
    chosen = 0 if label is None else _find_label(names, label)
    weights[chosen] = 1.0
    return weights


def _find_label(names: Sequence[str], label: str | int) -> int:
    if str(label) in names:
        return list(names).index(str(label))
    if str(label).isdecimal() and int(label) < len(names):
        return int(label)
    raise InputError(f"the reward model has no label {label!r}; choose one of {_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"{i} ({name})" for i, name in enumerate(names))
