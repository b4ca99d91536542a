"""The frozen description of a decoder, and those of published models by their hub ids.

Neither a plan nor a bench needs a download: what decides on shapes in their config.json is here.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from w2s_jax.errors import InputError, check_fields
from w2s_jax.ops.attention import Rope

T = TypeVar("T")
Json = Mapping[str, Any]

_LARGEST, _MOST_LAYERS = 2**31 - 1, 10_000


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape and kinds; hashable, so it may be static under jit.

    Letters as in the shapes of arrays: D width, N layers, H heads, G kv_heads, C head_width,
    F mlp_width, V vocab_size.

    embed_width: of the embedding and of what the head reads, where it is not D: projections
        without biases lie between.
    position_offset: so many rows of the learned positions stand before the first one's (OPT: 2).
    norm: "layer_plain" is a layer norm without scale and bias.
    norm_offset: the norm multiplies by `norm_offset + scale` (Gemma: 1).
    experts: MLPs of mlp_width side by side in each layer, of which experts_per_token read a token;
        with normalised_experts the weights of their results sum to one. 1 is a plain MLP.
    norm_placement: what attention and MLP, f, make of the stream x: "pre" x + f(norm(x)),
        "sandwich" x + norm(f(norm(x))), "branch" x + norm(f(x)), "residual" norm(x + f(x)),
        without a norm behind the last layer.
    parallel_residual: the MLP reads what the attention of its layer reads, x, and not their sum.
    query_key_norm: of each head, or of the width of all heads together.
    qkv_clip: the largest size of an entry of queries, keys and values, before they are rotated.
    sliding_rope: of the layers with a sliding window, where theirs differs from `rope`.
    rope_layers: False for a layer whose queries and keys are not rotated; empty: all are.
    residual_multiplier: of what attention and MLP add to the stream.
    logit_divisor: of the logits, ahead of the soft-cap.
    attention_scale: factor on query·key; None means `head_width ** -0.5`.
    rotary_width: so many entries of each head, the first, are rotated; None means all.
    sliding_windows: one entry per layer; with window w, query i sees keys j with i - w < j <= i;
        None sees all. The empty tuple means None in every layer.
    eos_ids: any of them ends a response.

    Raises InputError when fields contradict each other.
    """

    architecture: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    max_positions: int
    norm: Literal["rms", "layer", "layer_plain"] = "rms"
    norm_epsilon: float = 1e-5
    norm_offset: float = 0.0
    norm_placement: Literal["pre", "sandwich", "branch", "residual"] = "pre"
    parallel_residual: bool = False
    position: Literal["rotary", "learned"] = "rotary"
    position_offset: int | None = None
    rope: Rope = dataclasses.field(default_factory=Rope)
    rotary_width: int | None = None
    sliding_rope: Rope | None = None
    rope_layers: tuple[bool, ...] = ()
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    experts: int = 1
    experts_per_token: int = 1
    normalised_experts: bool = True
    query_key_norm: Literal["none", "head", "width"] = "none"
    qkv_clip: float | None = None
    tied_embeddings: bool = False
    embed_width: int | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_divisor: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    sliding_windows: tuple[int | None, ...] = ()
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not any(self.sliding_windows):
            object.__setattr__(self, "sliding_windows", ())
        if not self.sliding_windows or self.sliding_rope == self.rope:
            object.__setattr__(self, "sliding_rope", None)
        if all(self.rope_layers):
            object.__setattr__(self, "rope_layers", ())
        for name in ("sliding_windows", "rope_layers"):
            given = len(getattr(self, name))
            if given not in (0, self.layers):
                named = name.replace("_", " ")
                raise InputError(f"{given} {named} for {self.layers} layers; give one per layer")
        sizes = [field.name for field in dataclasses.fields(self) if field.type is int]
        for name in sizes:
            if not 1 <= getattr(self, name) <= _LARGEST:
                raise InputError(f"{name} is {getattr(self, name)}; it must lie in 1 .. {_LARGEST}")
        if self.layers > _MOST_LAYERS:
            raise InputError(f"{self.layers} layers; at most {_MOST_LAYERS} are supported")
        if self.heads % self.kv_heads:
            raise InputError(
                f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly"
            )
        if self.logit_divisor <= 0:
            raise InputError(f"logit_divisor is {self.logit_divisor}; it must be above 0")
        if self.experts_per_token > self.experts:
            raise InputError(
                f"{self.experts_per_token} experts a token of {self.experts}; at most all can be"
            )
        if self.position == "rotary":
            self._check_rotary()

    def _check_rotary(self) -> None:
        if self.rotary_width is None and self.head_width % 2:
            raise InputError(f"rotary heads need an even width, not {self.head_width}")
        if self.rotated % 2 or not 2 <= self.rotated <= self.head_width:
            raise InputError(
                f"{self.rotated} of {self.head_width} entries of a head are rotated; "
                "it must be an even number of them"
            )
        held = [len(self.rope.short_factor), len(self.rope.long_factor)]
        if self.rope.kind == "longrope" and held != [self.rotated // 2] * 2:
            raise InputError(
                f"longrope has {held[0]} short and {held[1]} long factors; "
                f"{self.rotated} entries of a head are rotated, which takes {self.rotated // 2}"
            )

    @property
    def head_inputs(self) -> int:
        """The width of the embedding and of what the head reads."""
        return self.width if self.embed_width is None else self.embed_width

    @property
    def rotated(self) -> int:
        """How many entries of each head are rotated, where positions are rotary."""
        return self.head_width if self.rotary_width is None else self.rotary_width

    @property
    def matmul_parameters(self) -> int:
        """Parameters in the matmuls of all layers; each costs a token two operations.

        Of experts only those that read a token.
        """
        return self.parameters_read(1)

    def parameters_read(self, tokens: float) -> int:
        """Parameters in the matmuls of all layers that so many tokens meet.

        Of experts as many as even routing by chance gives.
        """
        attention = 2 * self.width * self.head_width * (self.heads + self.kv_heads)
        mlp = self.width * self.mlp_width * (3 if self.gated_mlp else 2)
        if self.experts == 1:
            return self.layers * (attention + mlp)
        met = self.experts * (1 - (1 - self.experts_per_token / self.experts) ** tokens)
        return self.layers * round(attention + self.width * self.experts + met * mlp)


def layer_windows(config: ModelConfig) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
    """The distinct sliding windows, and for every layer the index of its own among them."""
    return _distinct(config.sliding_windows or (None,) * config.layers)


def layer_ropes(config: ModelConfig) -> tuple[tuple[Rope | None, ...], tuple[int, ...]]:
    """The distinct ropes, None for no rotation, and for every layer the index of its own."""
    sliding = config.rope if config.sliding_rope is None else config.sliding_rope
    ropes = [sliding if window else config.rope for window in config.sliding_windows]
    ropes = ropes or [config.rope] * config.layers
    turned = config.rope_layers or (True,) * config.layers
    return _distinct([rope if turn else None for rope, turn in zip(ropes, turned, strict=True)])


def _distinct(values: Sequence[T]) -> tuple[tuple[T, ...], tuple[int, ...]]:
    distinct = tuple(dict.fromkeys(values))
    return distinct, tuple(distinct.index(value) for value in values)


def _llama(width: int, layers: int, heads: int, kv_heads: int, mlp: int, **other: Any) -> dict:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | other


_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
_LLAMA_3_8B = _llama(4096, 32, 32, 8, 14336, **_LLAMA_3)
_LLAMA_3_70B = _llama(8192, 80, 64, 8, 28672, **_LLAMA_3)
_LLAMA_3_2: dict[str, Any] = _LLAMA_3 | {
    "tie_word_embeddings": True, "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
_LLAMA_3_2_1B = _llama(2048, 16, 32, 8, 8192, head_dim=64, **_LLAMA_3_2)
_LLAMA_3_2_3B = _llama(3072, 28, 24, 8, 8192, head_dim=128, **_LLAMA_3_2)
_LLAMA_2_7B = _llama(4096, 32, 32, 32, 11008)
_LLAMA_2_70B = _llama(8192, 80, 64, 8, 28672)
_MISTRAL_7B = _llama(
    4096, 32, 32, 8, 14336, model_type="mistral", max_position_embeddings=32768, sliding_window=4096
)
KNOWN: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-70B": _LLAMA_3_70B,
    "meta-llama/Meta-Llama-3-70B-Instruct": _LLAMA_3_70B,
    "meta-llama/Llama-3.2-1B": _LLAMA_3_2_1B,
    "meta-llama/Llama-3.2-3B": _LLAMA_3_2_3B,
    "meta-llama/Llama-2-7b-hf": _LLAMA_2_7B,
    "meta-llama/Llama-2-7b-chat-hf": _LLAMA_2_7B,
    "meta-llama/Llama-2-13b-chat-hf": _llama(5120, 40, 40, 40, 13824),
    "meta-llama/Llama-2-70b-hf": _LLAMA_2_70B,
    "meta-llama/Llama-2-70b-chat-hf": _LLAMA_2_70B,
    "mistralai/Mistral-7B-v0.1": _MISTRAL_7B,
    "HuggingFaceH4/mistral-7b-sft-beta": _MISTRAL_7B,
    "HuggingFaceH4/zephyr-7b-beta": _MISTRAL_7B,
    "openai-community/gpt2": {
        "model_type": "gpt2",
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
    "Qwen/Qwen2.5-0.5B": _llama(
        896,
        24,
        14,
        2,
        4864,
        model_type="qwen2",
        vocab_size=151936,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
        bos_token_id=151643,
        eos_token_id=151643,
    ),
}


# Checked readers of a config.json's fields; a wrong one is named with what it lies in (`where`).


def refused(name: str, value: Any, taken: str) -> InputError:
    """The error that names a field, its value and what it takes."""
    told = repr(value)
    told = told if len(told) <= 80 else f"{told[:79]}…"
    return InputError(f"config field {name} is {told}; it must be {taken}")


def size(hf: Json, name: str, *, least: int = 1, where: str = "") -> int:
    """A whole number from `least` on. Raises InputError for anything else."""
    if name not in hf:
        raise InputError(f"config field {where}{name} is missing")
    value = hf[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        taken = "a positive whole number" if least == 1 else f"a whole number from {least} on"
        raise refused(where + name, value, taken)
    return value


def number(
    hf: Json, name: str, *, above: float = -math.inf, least: float = -math.inf, where: str = ""
) -> float:
    """A finite number above one bound or from the other on. Raises InputError for anything else."""
    value = hf.get(name)
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # not of NaN; whole numbers may be too large for one
        and value > above
        and value >= least
    ):
        return float(value)
    taken = f"a number above {above:g}" if above > -math.inf else f"a number of at least {least:g}"
    raise refused(where + name, value, taken)


def optional_number(hf: Json, name: str, **bounds: Any) -> float | None:
    """`number`, or None where the field is null or not there."""
    return None if hf.get(name) is None else number(hf, name, **bounds)


def switch(hf: Json, name: str) -> bool:
    """true or false, which null is too. Raises InputError for anything else: texts are all true."""
    value = hf.get(name)
    if value not in (None, False, True):
        raise refused(name, value, "true or false")
    return bool(value)


def mapping(hf: Json, name: str, example: str) -> Json:
    """A JSON object, empty where the field is null or not there. Raises InputError otherwise."""
    value = hf.get(name)
    if not isinstance(value, Mapping | None):
        raise refused(name, value, f"a mapping such as {example}")
    return value or {}
