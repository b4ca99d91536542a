"""Writes the trained models into the package in bfloat16, with a card of what they measure there.

Every folder holds its own copy of the tokenizer, so each is a checkpoint by itself.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from w2s_jax.demo.corpus import Corpus
from w2s_jax.demo.gold import opening_accuracy, review_accuracy
from w2s_jax.demo.language import held_out_loss
from w2s_jax.evaluate.rewards import gold_rewards
from w2s_jax.models.encoder import Classifier
from w2s_jax.models.encoder_huggingface import load_classifier, save_classifier
from w2s_jax.models.huggingface import load_model, save_model
from w2s_jax.models.model import Model
from w2s_jax.ops.sampling import Sampling
from w2s_jax.search.presets import sample
from w2s_jax.search.run import search
from w2s_jax.text.bpe import END_ID

ASSETS = Path(__file__).parent / "assets"
LANGUAGE_MODELS = ("policy", "untuned", "tuned")
LIMIT_BYTES = 25_000_000


def export(work: Path, assets: Path, tokenizer: Any, test: Corpus) -> dict[str, Any]:
    """Round the models of `work/NAME/model` to bfloat16 under `assets`; returns their figures.

    The figures are of the rounded weights, computed in float32: test losses, test accuracy, and the
    mean gold reward of plain samples after the first 8 tokens of 256 test reviews.
    """
    for name in LANGUAGE_MODELS:
        model = load_model(work / name / "model")
        save_model(_rounded(model), assets / name, tokenizer=tokenizer)
    classifier = load_classifier(work / "gold" / "model")
    save_classifier(_rounded(classifier), assets / "gold", tokenizer=tokenizer)

    gold = load_classifier(assets / "gold", dtype=jnp.float32)
    figures: dict[str, Any] = {
        "gold": {
            "parameters": _size(gold),
            "test_accuracy_openings": opening_accuracy(gold, test),
            "test_accuracy_reviews": review_accuracy(gold, test),
        }
    }
    for name in LANGUAGE_MODELS:
        model = load_model(assets / name, dtype="float32")
        rewards = sampled_rewards(model, gold, tokenizer, test, prompts=256)
        figures[name] = {
            "parameters": _size(model),
            "test_loss": held_out_loss(model, test, batches=32),
            "gold_reward": float(rewards.mean()),
            "gold_reward_stderr": float(rewards.std(ddof=1) / np.sqrt(len(rewards))),
        }
    figures["bytes"] = sum(path.stat().st_size for path in assets.rglob("*") if path.is_file())
    if figures["bytes"] > LIMIT_BYTES:
        raise RuntimeError(f"the assets hold {figures['bytes']} bytes, more than {LIMIT_BYTES}")
    _write_card(work, assets, figures)
    return figures


def sampled_rewards(
    model: Model, gold: Classifier, tokenizer: Any, corpus: Corpus, *, prompts: int
) -> Float[np.ndarray, " n"]:
    """Gold rewards of one plain sample (temperature 1, 50 tokens) for each of the first prompts."""
    heads = [[END_ID, *map(int, corpus.review(i)[:8])] for i in range(min(prompts, len(corpus)))]
    settings = sample(sampling=Sampling(1.0), max_new_tokens=50, slots=64)
    results = search(model, None, heads, settings)
    texts = [
        tokenizer.decode([*head, *result.best.tokens], skip_special_tokens=True)
        for head, result in zip(heads, results, strict=True)
    ]
    return gold_rewards(gold, tokenizer, texts)


def _rounded(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _write_card(work: Path, assets: Path, figures: dict[str, Any]) -> None:
    """`card.json`: the figures of every stage and of the exported weights."""
    stages = {path.parent.name: json.loads(path.read_text()) for path in work.glob("*/done.json")}
    card = {"stages": dict(sorted(stages.items())), "exported": figures}
    (assets / "card.json").write_text(json.dumps(card, indent=2) + "\n")
