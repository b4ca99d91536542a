"""Reward models: a decoder with a linear head that reads its state at a sequence's last token.

Their labels, and which logits make the reward; their checkpoints: sequence classifiers, and
UltraRM's and Starling-RM's.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int

from w2s_jax.errors import InputError
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.config_json import ARCHITECTURES, config_to_hf
from w2s_jax.models.encoder import Classifier, EncoderConfig, encoder_config, load_classifier
from w2s_jax.models.huggingface import (
    ADAPTER_CONFIG,
    CONFIG,
    is_adapter,
    load_parameters,
    locate,
    open_tensors,
    read_json,
    save_parameters,
)
from w2s_jax.models.load import load_config, load_model
from w2s_jax.models.lora import merge
from w2s_jax.models.lora_huggingface import adapted_config, base_of, load_adapter, take_vocabulary
from w2s_jax.models.model import Model, hidden_states
from w2s_jax.models.parameters import REWARD_HEADS, StoredHead
from w2s_jax.models.tensors import Tensors, decoder_parameters
from w2s_jax.ops.sharding import DEFAULT_RULES, ON_ONE_DEVICE, Placement, Rules
from w2s_jax.pytrees import pytree


@pytree(static=("config", "labels", "placement"))
class RewardModel:
    """A decoder without a language model's head, and a head with one logit for each label.

    params: as a Model's, in either layout, but for "head". head: "kernel" [D, labels] and perhaps
    "bias" [labels]. labels: the logits' names; a reward model proper has one.
    """

    config: ModelConfig
    params: dict
    head: dict
    labels: tuple[str, ...]
    placement: Placement = ON_ONE_DEVICE

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
        if self.config.position == "learned" and tokens.shape[1] > self.config.max_positions:
            raise InputError(
                f"{tokens.shape[1]} tokens for a model of {self.config.max_positions} positions"
            )
        return _label_logits(self, jnp.asarray(tokens), None if mask is None else jnp.asarray(mask))

    def head_of(self, hidden: Float[Array, "*rows D"]) -> Float32[Array, "*rows labels"]:
        """The labels' logits of states after the last norm, as `forward` gives them."""
        kernel, contract = self.head["kernel"], ((hidden.ndim - 1,), (0,))
        out = jax.lax.dot_general(
            hidden, kernel, (contract, ((), ())), preferred_element_type=jnp.float32
        )
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


NEGATIVE, POSITIVE = 0, 1


def label_names(model: RewardModel | Classifier) -> tuple[str, ...]:
    """The names of a model's labels, one for each logit."""
    if isinstance(model, RewardModel):
        return model.labels
    return model.config.label_names or tuple(f"LABEL_{i}" for i in range(model.config.labels))


def contrast(names: Sequence[str], label: str | int | None = None) -> Float32[np.ndarray, " n"]:
    """Weights of the labels' logits in the reward.

    With a `label`, by name or number, that logit alone; without, the only one, or of two the
    positive (1) minus the negative (0). Raises InputError for an unknown label, and for more than
    two labels and no choice.
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


ENCODER = "distilbert"
SCORE = REWARD_HEADS[0]


def load_reward_model(
    path_or_hub_id: str | Path,
    *,
    base: str | Path | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    scan_layers: bool = False,
) -> RewardModel | Classifier:
    """Load a reward model from a directory or a hub id: a decoder's, or an encoder classifier.

    The head's tensors tell the layout: `score` of transformers' sequence classifiers,
    `regression_head` of UltraRM (arXiv 2310.01377), `v_head` of Starling-RM, whose decoder may be
    named `model`, `transformer` or `model.model`. An adapter is merged into `base`, by default the
    one it names, a reward model or a language model; its head may be in its own files. The other
    arguments are as in `load_model`; an encoder is small and stays whole.

    Raises InputError as `load_model` does, and for a checkpoint with no head that is known here.
    """
    directory = locate(path_or_hub_id)
    if is_adapter(directory):
        options = {"dtype": dtype, "mesh": mesh, "rules": rules, "scan_layers": scan_layers}
        return _load_adapted(directory, base_of(directory) if base is None else base, options)
    config = load_reward_config(directory)
    if isinstance(config, EncoderConfig):
        return load_classifier(directory, dtype=dtype)
    tensors = open_tensors(directory)
    head, labels = _find_head(directory, tensors)
    parameters = decoder_parameters(config)
    parameters["head/kernel"] = ((config.width, len(labels)), ("embed", None))
    if head.bias in tensors:
        parameters["head/bias"] = ((len(labels),), (None,))
    params = load_parameters(
        directory,
        config,
        parameters,
        tensors,
        head=head,
        dtype=dtype,
        mesh=mesh,
        rules=rules,
        scan_layers=scan_layers,
    )
    body = {name: subtree for name, subtree in params.items() if name != "head"}
    return RewardModel(config, body, params["head"], labels, Placement(mesh, rules))


def is_reward_model(path_or_hub_id: str | Path) -> bool:
    """Whether a checkpoint has a reward head, or is an adapter of a task or on a base with one."""
    directory = locate(path_or_hub_id)
    if is_adapter(directory):
        of_task = read_json(directory / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"
        return of_task or is_reward_model(base_of(directory))
    encoder = read_json(directory / CONFIG).get("model_type") == ENCODER
    return encoder or any(head.weight in open_tensors(directory) for head in REWARD_HEADS)


def _load_adapted(directory: Path, base: str | Path, options: dict[str, Any]) -> RewardModel:
    """An adapter merged into its base, with the head of either."""
    base = locate(base)
    # Weights of fewer bits, as bases are often stored in, would lose most of an adapter.
    options = options | {"dtype": options["dtype"] or "float32"}
    head, labels, config = _adapted_head(directory, base)
    if isinstance(config, EncoderConfig):
        raise InputError(f"{directory}: adapters on encoders ({base}) are not supported")
    old: dict[str, Any] = {}
    if is_reward_model(base):
        found = load_reward_model(base, **options)
        assert isinstance(found, RewardModel)
        params, old, placement = found.params, dict(found.head), found.placement
    else:
        whole = load_model(base, **options)
        params = {name: subtree for name, subtree in whole.params.items() if name != "head"}
        placement = whole.placement
    options = options | {"dtype": params["embed"]["embedding"].dtype}
    lora, adapter = load_adapter(directory, config, head=head, **options)
    new = old | adapter.pop("head", {})
    params = take_vocabulary(params, adapter)
    if not new:
        raise InputError(f"{directory}: neither the adapter nor its base {base} has a reward head")
    labels = _adapted_labels(labels, new)
    return RewardModel(config, merge(params, adapter, lora), new, labels, placement)


def _adapted_head(
    directory: Path, base: Path
) -> tuple[StoredHead, tuple[str, ...], ModelConfig | EncoderConfig]:
    """The head and the labels of an adapter's base, which may have none, and the adapted config."""
    config = load_reward_config(base)
    if isinstance(config, EncoderConfig):
        return SCORE, (), config
    whole = is_reward_model(base)
    head, labels = _find_head(base, open_tensors(base)) if whole else (SCORE, ())
    return head, labels, adapted_config(directory, config, head=head)


def _adapted_labels(labels: tuple[str, ...], head: Mapping[str, Any]) -> tuple[str, ...]:
    """The base's labels, or transformers' own names where the adapter's head has others."""
    count = head["kernel"].shape[-1]
    return labels if len(labels) == count else tuple(f"LABEL_{i}" for i in range(count))


def load_reward_config(path_or_hub_id: str | Path) -> ModelConfig | EncoderConfig:
    """The config of a reward model, a decoder's or an encoder's, without its weights.

    Raises InputError for a missing or malformed file and for a model that is not supported.
    """
    directory = locate(path_or_hub_id)
    if is_adapter(directory):
        return _adapted_head(directory, locate(base_of(directory)))[2]
    kind = read_json(directory / CONFIG).get("model_type")
    if kind == ENCODER:
        return encoder_config(directory)
    if kind not in ARCHITECTURES:
        raise InputError(
            f"{directory / CONFIG}: model_type {kind!r} is not supported for a reward model; "
            f"supported: {', '.join((*ARCHITECTURES, ENCODER))}"
        )
    return load_config(directory)


def load_reward_labels(path_or_hub_id: str | Path) -> tuple[str, ...]:
    """The names of a reward model's labels, one for each logit, without its weights.

    Raises InputError as `load_reward_model` does, but for the tensors' shapes.
    """
    directory = locate(path_or_hub_id)
    if is_adapter(directory):
        head, labels, config = _adapted_head(directory, locate(base_of(directory)))
        if isinstance(config, EncoderConfig):
            return config.label_names
        _, adapter = load_adapter(directory, config, head=head)
        return _adapted_labels(labels, adapter["head"]) if "head" in adapter else labels
    config = load_reward_config(directory)
    if isinstance(config, EncoderConfig):
        return config.label_names
    return _find_head(directory, open_tensors(directory))[1]


def save_reward_model(
    model: RewardModel,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a sequence classifier that `load_reward_model` and transformers load.

    transformers' classes have no bias in their head and leave out one that is there.
    `tokenizer` (anything with `save_pretrained`) is written beside it.

    Raises InputError when config.json cannot express the model or the directory is not writable.
    """
    hf = config_to_hf(model.config)
    names = [re.sub("LMHeadModel|ForCausalLM", "", name) for name in hf["architectures"]]
    hf |= {
        "architectures": [f"{name}ForSequenceClassification" for name in names],
        "torch_dtype": str(model.dtype),
        "id2label": {str(i): name for i, name in enumerate(model.labels)},
        "label2id": {name: i for i, name in enumerate(model.labels)},
    }
    params = {**model.params, "head": model.head}
    save_parameters(
        model.config, params, directory, hf, head=SCORE, max_shard_bytes=max_shard_bytes
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))


def _find_head(directory: Path, tensors: Tensors) -> tuple[StoredHead, tuple[str, ...]]:
    """The one reward head among the tensors, of a class that config.json may name; its labels."""
    hf = read_json(directory / CONFIG)
    heads = [head for head in REWARD_HEADS if head.weight in tensors]
    if len(heads) != 1:
        found = " and ".join(head.weight for head in heads) or "no reward head"
        known = ", ".join(head.weight for head in REWARD_HEADS)
        raise InputError(f"{directory}: holds {found}; a reward model has one of {known}")
    classes = hf.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InputError(f"{directory / CONFIG}: architectures is {classes!r}, not a list of names")
    known = heads[0].classes.replace(".*", "*").replace("|", ", ")
    for name in classes:
        if not re.fullmatch(heads[0].classes, name):
            raise InputError(
                f"{directory / CONFIG}: architecture {name} with a {heads[0].weight} is not "
                f"supported as a reward model; supported: {known}"
            )
    return heads[0], _labels(directory, hf) if heads[0] == SCORE else ("reward",)


def _labels(directory: Path, hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a sequence classifier's labels; transformers' own where config.json has none."""
    names, count = hf.get("id2label"), hf.get("num_labels", 2)
    if names is None and isinstance(count, int) and count > 0:
        names = {str(i): f"LABEL_{i}" for i in range(count)}
    if (
        not isinstance(names, dict)
        or set(names) != {str(i) for i in range(len(names))}
        or not names
    ):
        raise InputError(
            f"{directory / CONFIG}: id2label must name the labels 0, 1, ... (or num_labels be "
            "their number)"
        )
    return tuple(str(names[str(i)]) for i in range(len(names)))
