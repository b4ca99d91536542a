"""Where checkpoint files keep each parameter: one table of tensor names per architecture.

Names and arrangements only; reading and writing is in `models/huggingface.py`.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from w2s_jax.models.config import ModelConfig


@dataclass(frozen=True)
class Stored:
    """How files hold one parameter: the tensor's name and how its axes lie there.

    groups: how many of our axes, in order, make up each stored axis: (1, 2) stores [D, H, C] as
        [D, H·C], (2,) stores [H, C] as [H·C].
    transposed: the stored axes are in the opposite order, [out, in].
    part: the parameter is this one of three equal parts of the last stored axis.
    """

    name: str
    groups: tuple[int, ...] = (1,)
    transposed: bool = False
    part: int | None = None

    def grouped(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The parameter's shape with its axes joined as stored, before any transposing."""
        sizes, axis = [], 0
        for group in self.groups:
            sizes.append(math.prod(shape[axis : axis + group]))
            axis += group
        return tuple(sizes)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The whole stored tensor's shape, given the parameter's."""
        *most, last = self.grouped(shape)
        sizes = (*most, last if self.part is None else 3 * last)
        return sizes[::-1] if self.transposed else sizes


@dataclass(frozen=True)
class StoredHead:
    """How files hold the head on a decoder.

    name: of its tensors, `{name}.weight` [out, in] and perhaps `{name}.bias`.
    classes: a pattern of the names in config.json's `architectures` that keep such a head.
    wrapped: the decoder was saved by a module that holds a whole language model as `model` and the
        decoder of it, a second time, as `transformer`; the language model's head is not used.
    """

    name: str
    classes: str = ".*"
    wrapped: bool = False

    @property
    def weight(self) -> str:
        """The name of the head's matrix."""
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        """The name of the head's bias, which few have."""
        return f"{self.name}.bias"


LANGUAGE_HEAD = StoredHead("lm_head")
REWARD_HEADS = (
    StoredHead("score", ".*ForSequenceClassification"),
    StoredHead("regression_head", "LlamaRewardModel"),  # UltraRM (arXiv 2310.01377)
    # Starling-RM; its files come with a config.json of their own or with the language model's.
    StoredHead(
        "v_head", "GPTRewardModel|LLMForSequenceRegression|.*ForCausalLM|.*LMHeadModel", True
    ),
)


def _linear(name: str, *groups: int) -> Stored:
    return Stored(name, groups or (1, 1), transposed=True)


_LAYER, _ATTENTION = "model.layers.{i}.", "model.layers.{i}.self_attn."
_ROTARY = {
    "embed/embedding": Stored("model.embed_tokens.weight", (1, 1)),
    "layers_{i}/attention_norm/scale": Stored(_LAYER + "input_layernorm.weight"),
    "layers_{i}/attention/query/kernel": _linear(_ATTENTION + "q_proj.weight", 1, 2),
    "layers_{i}/attention/query/bias": Stored(_ATTENTION + "q_proj.bias", (2,)),
    "layers_{i}/attention/key/kernel": _linear(_ATTENTION + "k_proj.weight", 1, 2),
    "layers_{i}/attention/key/bias": Stored(_ATTENTION + "k_proj.bias", (2,)),
    "layers_{i}/attention/value/kernel": _linear(_ATTENTION + "v_proj.weight", 1, 2),
    "layers_{i}/attention/value/bias": Stored(_ATTENTION + "v_proj.bias", (2,)),
    "layers_{i}/attention/query_norm/scale": Stored(_ATTENTION + "q_norm.weight"),
    "layers_{i}/attention/key_norm/scale": Stored(_ATTENTION + "k_norm.weight"),
    "layers_{i}/attention/out/kernel": _linear(_ATTENTION + "o_proj.weight", 2, 1),
    "layers_{i}/attention/out/bias": Stored(_ATTENTION + "o_proj.bias"),
    "layers_{i}/mlp_norm/scale": Stored(_LAYER + "post_attention_layernorm.weight"),
    "layers_{i}/mlp/gate/kernel": _linear(_LAYER + "mlp.gate_proj.weight"),
    "layers_{i}/mlp/gate/bias": Stored(_LAYER + "mlp.gate_proj.bias"),
    "layers_{i}/mlp/up/kernel": _linear(_LAYER + "mlp.up_proj.weight"),
    "layers_{i}/mlp/up/bias": Stored(_LAYER + "mlp.up_proj.bias"),
    "layers_{i}/mlp/down/kernel": _linear(_LAYER + "mlp.down_proj.weight"),
    "layers_{i}/mlp/down/bias": Stored(_LAYER + "mlp.down_proj.bias"),
    "final_norm/scale": Stored("model.norm.weight"),
}
# Gemma 2 gives the name post_attention_layernorm to a norm that others do not have.
_GEMMA2 = _ROTARY | {
    "layers_{i}/post_attention_norm/scale": Stored(_LAYER + "post_attention_layernorm.weight"),
    "layers_{i}/mlp_norm/scale": Stored(_LAYER + "pre_feedforward_layernorm.weight"),
    "layers_{i}/post_mlp_norm/scale": Stored(_LAYER + "post_feedforward_layernorm.weight"),
}

# GPT-2 stores its matrices [in, out], query, key and value side by side.
_BLOCK = "transformer.h.{i}."
_GPT2 = {
    "embed/embedding": Stored("transformer.wte.weight", (1, 1)),
    "positions/embedding": Stored("transformer.wpe.weight", (1, 1)),
    "layers_{i}/attention_norm/scale": Stored(_BLOCK + "ln_1.weight"),
    "layers_{i}/attention_norm/bias": Stored(_BLOCK + "ln_1.bias"),
    "layers_{i}/attention/query/kernel": Stored(_BLOCK + "attn.c_attn.weight", (1, 2), part=0),
    "layers_{i}/attention/query/bias": Stored(_BLOCK + "attn.c_attn.bias", (2,), part=0),
    "layers_{i}/attention/key/kernel": Stored(_BLOCK + "attn.c_attn.weight", (1, 2), part=1),
    "layers_{i}/attention/key/bias": Stored(_BLOCK + "attn.c_attn.bias", (2,), part=1),
    "layers_{i}/attention/value/kernel": Stored(_BLOCK + "attn.c_attn.weight", (1, 2), part=2),
    "layers_{i}/attention/value/bias": Stored(_BLOCK + "attn.c_attn.bias", (2,), part=2),
    "layers_{i}/attention/out/kernel": Stored(_BLOCK + "attn.c_proj.weight", (2, 1)),
    "layers_{i}/attention/out/bias": Stored(_BLOCK + "attn.c_proj.bias"),
    "layers_{i}/mlp_norm/scale": Stored(_BLOCK + "ln_2.weight"),
    "layers_{i}/mlp_norm/bias": Stored(_BLOCK + "ln_2.bias"),
    "layers_{i}/mlp/up/kernel": Stored(_BLOCK + "mlp.c_fc.weight", (1, 1)),
    "layers_{i}/mlp/up/bias": Stored(_BLOCK + "mlp.c_fc.bias"),
    "layers_{i}/mlp/down/kernel": Stored(_BLOCK + "mlp.c_proj.weight", (1, 1)),
    "layers_{i}/mlp/down/bias": Stored(_BLOCK + "mlp.c_proj.bias"),
    "final_norm/scale": Stored("transformer.ln_f.weight"),
    "final_norm/bias": Stored("transformer.ln_f.bias"),
}
_TABLES = {"gpt2": _GPT2, "gemma2": _GEMMA2}

# Constants that older versions of transformers saved among the weights.
_BUFFERS = re.compile(r"\.h\.\d+\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")


def stored_parameters(
    config: ModelConfig, paths: Iterable[str], head: StoredHead = LANGUAGE_HEAD
) -> dict[str, Stored]:
    """Where each parameter of the per-layer layout ("layers_3/mlp/up/kernel") is kept."""
    table = _TABLES.get(config.architecture, _ROTARY) | {
        "head/kernel": _linear(head.weight),
        "head/bias": Stored(head.bias),
    }
    stored = {}
    for path in paths:
        row = table[re.sub(r"^layers_\d+/", "layers_{i}/", path)]
        layer = re.match(r"layers_(\d+)/", path)
        stored[path] = replace(row, name=row.name.format(i=layer[1])) if layer else row
    return stored


def full_name(config: ModelConfig, name: str, head: StoredHead = LANGUAGE_HEAD) -> str | None:
    """A tensor's name with the prefix that base-model checkpoints leave out.

    None for what no parameter is read from: a buffer, the unused head of a wrapped language model.
    """
    decoder = "transformer." if config.architecture == "gpt2" else "model."
    if head.wrapped:
        if name.removeprefix("model.") == LANGUAGE_HEAD.weight:
            return None
        for prefix in (f"model.{decoder}", "transformer."):
            if name.startswith(prefix):
                name = decoder + name.removeprefix(prefix)
                break
    if name not in (head.weight, head.bias) and not name.startswith(decoder):
        name = decoder + name
    return None if _BUFFERS.search(name) else name
