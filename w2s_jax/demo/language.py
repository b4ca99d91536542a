"""The language models of the embedded default: their shapes, and their loss on held-out reviews.

They are trained by `w2s sft` and `w2s dpo`, which build.py calls.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from w2s_jax.demo.corpus import Corpus
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.config_json import config_to_hf
from w2s_jax.models.model import Model
from w2s_jax.text.batches import pad_rows
from w2s_jax.text.tokenizer import END_ID, PAD_ID
from w2s_jax.train.logprobs import sequence_scores

LOSS_TOKENS = 64


@dataclass(frozen=True)
class LanguageConfig:
    """A small decoder, and the flags of the `w2s sft` that trains it from random weights.

    kv_heads None means as many as `heads`; a sliding window holds in every layer.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    architecture: Literal["llama", "mistral"] = "llama"
    kv_heads: int | None = None
    sliding_window: int | None = None
    max_positions: int = 256
    sft: dict[str, Any] = field(default_factory=dict)


def model_config(config: LanguageConfig, vocab_size: int) -> ModelConfig:
    """The decoder that a LanguageConfig describes."""
    return ModelConfig(
        architecture=config.architecture,
        vocab_size=vocab_size,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads or config.heads,
        head_width=config.width // config.heads,
        mlp_width=config.mlp_width,
        max_positions=config.max_positions,
        tied_embeddings=True,
        sliding_windows=(config.sliding_window,) * config.layers,
        bos_id=END_ID,
        eos_ids=(END_ID,),
        pad_id=PAD_ID,
    )


def write_start(config: LanguageConfig, vocab_size: int, tokenizer: Any, folder: Path) -> None:
    """What `w2s sft --from-scratch` starts from: a config.json and the tokenizer, no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = config_to_hf(model_config(config, vocab_size))
    (folder / "config.json").write_text(json.dumps(shape, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(str(folder))


def held_out_loss(model: Model, corpus: Corpus, *, reviews: int = 2048) -> float:
    """Mean next-token loss, in nats, over the first 63 tokens of the first reviews."""
    total = count = 0.0
    for first in range(0, min(reviews, len(corpus)), LOSS_TOKENS):
        indices = range(first, min(first + LOSS_TOKENS, len(corpus)))
        rows = [np.concatenate([[END_ID], corpus.review(i)]) for i in indices]
        tokens, mask = pad_rows(rows, LOSS_TOKENS, PAD_ID)
        total -= float(_sum(model, tokens, mask))
        count += int(mask[:, 1:].sum())
    return total / count


@jax.jit
def _sum(model: Model, tokens: Int[Array, "B X"], mask: Bool[Array, "B X"]) -> Float[Array, ""]:
    return sequence_scores(model, tokens, mask.astype(np.int32)).logprobs.sum()
