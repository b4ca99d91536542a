"""Writes the trained models into the package in bfloat16, with a card of what they measure there.

Every folder holds its own copy of the tokenizer, so each is a checkpoint by itself.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.demo.corpus import Corpus, load_corpus
from w2s_jax.demo.gold import opening_accuracy, review_accuracy
from w2s_jax.demo.language import held_out_loss
from w2s_jax.evaluate.rewards import gold_rewards
from w2s_jax.models.encoder import load_classifier, save_classifier
from w2s_jax.models.huggingface import save_model
from w2s_jax.models.load import load_model
from w2s_jax.models.model import Model
from w2s_jax.ops.sampling import Sampling
from w2s_jax.search.presets import sample
from w2s_jax.search.run import search
from w2s_jax.text.prompts import decode_tokens, response_text
from w2s_jax.text.tokenizer import END_ID, load_tokenizer

ASSETS = Path(__file__).parent / "assets"
LANGUAGE_MODELS = ("policy", "untuned", "tuned")
GUIDE = ("untuned", "tuned")
LIMIT_BYTES = 25_000_000


def export(work: Path, assets: Path) -> dict[str, Any]:
    """Round the models of `work/NAME/model` to bfloat16 under `assets`; returns their figures.

    The figures are of the rounded weights, computed in float32: test losses, test accuracy, and the
    mean gold reward of plain samples after the first 8 tokens of 256 test reviews.
    """
    tokenizer, test = load_tokenizer(work / "tokenizer"), load_corpus(work / "corpus" / "test")
    for name in LANGUAGE_MODELS:
        _export_model(work / name, assets / name, tokenizer)
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
    figures |= {name: _figures(assets / name, test, assets / "gold") for name in LANGUAGE_MODELS}
    return _write_card(work, assets, figures)


def export_guide(name: str, work: Path, assets: Path) -> dict[str, Any]:
    """The same for a guide of another vocabulary: `work/NAME/tuned` becomes `assets/NAME-tuned`.

    The gold classifier must be among the assets; figures in `card.json` are added to.
    """
    folder, figures = work / name, {}
    tokenizer = load_tokenizer(folder / "tokenizer")
    test = load_corpus(folder / "corpus" / "test")
    for part in GUIDE:
        exported = assets / f"{name}-{part}"
        _export_model(folder / part, exported, tokenizer)
        figures[exported.name] = _figures(exported, test, assets / "gold")
    return _write_card(work, assets, figures)


def _export_model(folder: Path, exported: Path, tokenizer: Any) -> None:
    save_model(_rounded(load_model(folder / "model")), exported, tokenizer=tokenizer)


def _figures(folder: Path, test: Corpus, gold: Path) -> dict[str, Any]:
    model, tokenizer = load_model(folder, dtype="float32"), load_tokenizer(folder)
    texts = sampled_texts(model, tokenizer, test, prompts=256)
    judge = load_classifier(gold, dtype=jnp.float32)
    rewards = gold_rewards(judge, load_tokenizer(gold), texts)
    return {
        "parameters": _size(model),
        "test_loss": held_out_loss(model, test, reviews=1024),
        "gold_reward": float(rewards.mean()),
        "gold_reward_stderr": float(rewards.std(ddof=1) / np.sqrt(len(rewards))),
    }


def sampled_texts(model: Model, tokenizer: Any, corpus: Corpus, *, prompts: int) -> list[str]:
    """The first prompts, each with a plain sample of 50 tokens (temperature 1) behind it."""
    heads = [[END_ID, *map(int, corpus.review(i)[:8])] for i in range(min(prompts, len(corpus)))]
    settings = sample(sampling=Sampling(1.0), max_new_tokens=50, slots=64)
    results = search(model, None, heads, settings)
    return [
        decode_tokens(tokenizer, head)
        + response_text(tokenizer, head, result.best.tokens, finished=result.best.finished)
        for head, result in zip(heads, results, strict=True)
    ]


def _rounded(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _write_card(work: Path, assets: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """`card.json`: the figures of every stage and of the exported weights, beside those it has."""
    path = assets / "card.json"
    card = json.loads(path.read_text()) if path.is_file() else {"stages": {}, "exported": {}}
    for done in [*work.glob("*/done.json"), *work.glob("*/*/done.json")]:
        if done.parent.name != "export":
            record = json.loads(done.read_text())
            # The recipe is a file of its own.
            record.pop("config", None)
            card["stages"][done.parent.relative_to(work).as_posix()] = record
    weights = sum(file.stat().st_size for file in assets.rglob("*") if file.is_file())
    if weights > LIMIT_BYTES:
        raise RuntimeError(f"the assets hold {weights} bytes, more than {LIMIT_BYTES}")
    figures["bytes"] = weights
    card["exported"] = {k: v for k, v in card["exported"].items() if k != "bytes"} | figures
    card["stages"] = dict(sorted(card["stages"].items()))
    path.write_text(json.dumps(card, indent=2) + "\n")
    return figures
