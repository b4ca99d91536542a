"""Rebuilds the embedded default from the IMDb reviews, stage by stage; runs the experiment on it.

    python -m w2s_jax.experiments.build --config configs/demo/recipe.yaml --work DIR
    python -m w2s_jax.experiments.build --config configs/demo/sentiment.yaml --work DIR

A stage that is done is not run again; one that was killed goes on from its last checkpoint. A stage
that was done by other settings is refused. Models are written into the package in bfloat16, with a
card of what they measure there.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from w2s_jax.demo import Demo
from w2s_jax.errors import InputError
from w2s_jax.evaluate.rewards import gold_rewards
from w2s_jax.experiments.corpus import (
    LANGUAGE_TEXTS,
    Corpus,
    LanguageConfig,
    build_corpus,
    held_out_loss,
    load_corpus,
    opening_accuracy,
    read_reviews,
    review_accuracy,
    train_gold,
    write_start,
)
from w2s_jax.experiments.preferences import TuneConfig, sample_pairs, write_training_pairs
from w2s_jax.experiments.recipe import OtherGuide, Recipe, differences, read_recipe, stage_settings
from w2s_jax.experiments.sentiment import (
    decode_all,
    draw_experiment,
    draw_prompts,
    experiment_methods,
    need_matplotlib,
    responses_path,
    result_table,
    summarise_experiment,
)
from w2s_jax.models.encoder import Classifier
from w2s_jax.models.load import load_classifier, load_model
from w2s_jax.models.model import Model
from w2s_jax.models.save import save_classifier, save_model
from w2s_jax.ops.sampling import Sampling
from w2s_jax.search.config import sample
from w2s_jax.search.results import hypothesis_text
from w2s_jax.search.run import search
from w2s_jax.text.prompts import decode_tokens
from w2s_jax.text.rows import read_jsonl, write_whole
from w2s_jax.text.tokenizer import END_ID, load_tokenizer
from w2s_jax.train.loop import read_metrics
from w2s_jax.train.reference import weights_identity

ASSETS = Path(__file__).parent.parent / "demo" / "assets"
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
        decode_tokens(tokenizer, head) + hypothesis_text(tokenizer, head, result.best)
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


log = logging.getLogger("w2s_jax.experiments.build")

PAIRS, TRAINING_PAIRS = "pairs.jsonl", "training.jsonl"
ACCURACY = "eval/rewards/accuracies"
STAGES = (
    "corpus", "gold", "policy", "untuned", "preferences", "tuned", "tuned_policy", "evaluation",
    "export",
)  # fmt: skip
OTHER_STAGES = ("corpus", "untuned", "tuned", "export")
Stage = Callable[[], dict[str, Any]]
_TOLD = 3


@dataclass(frozen=True)
class Build:
    """A recipe with the folders it works in; each method that is a stage returns its figures."""

    recipe: Recipe
    data: Path
    work: Path
    assets: Path

    def corpus(self) -> dict[str, Any]:
        """Tokenizer and token arrays: `language` (train and unsup), `train` and `test`."""
        length = self.recipe.policy.max_positions
        return build_corpus(
            self.data / "imdb", self.work, self.recipe.vocab_size, max_length=length
        )

    def gold(self) -> dict[str, Any]:
        """The gold classifier and its accuracy on the openings of the test reviews."""
        classifier = train_gold(
            self.recipe.gold, self._corpus("train"), self.recipe.vocab_size, self.work / "gold"
        )
        save_classifier(classifier, self.work / "gold" / "model")
        return {"test_accuracy_openings": opening_accuracy(classifier, self._corpus("test"))}

    def policy(self) -> dict[str, Any]:
        """The policy."""
        return self._language("policy")

    def untuned(self) -> dict[str, Any]:
        """The untuned guide."""
        return self._language("untuned")

    def preferences(self) -> dict[str, Any]:
        """Pairs sampled from the untuned guide and labelled by the gold reward."""
        folder = self.work / "preferences"
        output = folder / PAIRS
        if not output.is_file():
            reviews = read_reviews(self.data / "imdb" / "train.jsonl.xz")
            sample_pairs(
                self.recipe.preferences,
                self._model("untuned"),
                self._gold(),
                self._tokenizer(),
                [review.text for review in reviews],
                output,
            )
        end = self._tokenizer().eos_token
        kept = write_training_pairs(output, end, folder / TRAINING_PAIRS)
        rewards = np.array([row["rewards"] for row in read_jsonl(output)])
        return {
            "pairs": kept,
            "mean_reward": float(rewards.mean()),
            "mean_gap": float(np.abs(rewards[:, 0] - rewards[:, 1]).mean()),
            "chosen_has_higher_reward": float((rewards[:, 0] > rewards[:, 1]).mean()),
        }

    def tuned(self) -> dict[str, Any]:
        """The tuned guide and the accuracy of its implicit reward on held-out pairs."""
        return _tuned(self.recipe.tuned, self.work, self.work / "preferences")

    def tuned_policy(self) -> dict[str, Any]:
        """The policy itself, tuned on the same pairs: what search without training is held to."""
        assert self.recipe.direct is not None
        pairs = self.work / "preferences"
        return _tuned(self.recipe.direct, self.work, pairs, "policy", "tuned_policy")

    def evaluation(self) -> dict[str, Any]:
        """Responses of every method to openings of test reviews, their figures, table, picture."""
        config, folder = self.recipe.evaluation, self.work / "evaluation"
        assert config is not None
        direct = None if self.recipe.direct is None else self._model("tuned_policy")
        names = ["gold", *LANGUAGE_MODELS, *(["tuned_policy"] if direct is not None else [])]
        weights = {name: weights_identity(self.work / name / "model") for name in names}
        policy, untuned, tuned = (self._model(name) for name in LANGUAGE_MODELS)
        models = Demo(policy, untuned, tuned, self._gold(), self._tokenizer())
        methods = experiment_methods(config, models, direct)
        prompts = draw_prompts(config, self._test_reviews())
        found = decode_all(config, models, methods, prompts, folder, {"weights": weights})
        headings = {name: method.heading for name, method in methods.items()}
        rows = {name: rows for name, (_, rows) in found.items()}
        summary = summarise_experiment(rows, headings, samples=config.samples)
        table = result_table(summary)
        write_whole(folder / "results.json", [json.dumps(summary, indent=2).encode(), b"\n"])
        write_whole(folder / "table.md", [table.encode()])
        write_whole(folder / "figure.png", [draw_experiment(summary)])
        # Last, as it removes the journals: until here a kill loses nothing.
        for name, (journal, _) in found.items():
            journal.merge(responses_path(folder, name), len(prompts))
        log.info("evaluation: %s\n%s", folder, table)
        return {name: row["gold_reward"] for name, row in summary["methods"].items()}

    def other_corpus(self, guide: OtherGuide) -> dict[str, Any]:
        """Tokenizer and token arrays of another guide."""
        return build_corpus(
            self.data / "imdb",
            self.work / guide.name,
            guide.vocab_size,
            max_length=guide.untuned.max_positions,
            reviews=guide.reviews,
            sets=("language", "test"),
        )

    def other_untuned(self, guide: OtherGuide) -> dict[str, Any]:
        """The untuned model of another guide."""
        return _language(guide.untuned, guide.vocab_size, self.work / guide.name, "untuned")

    def other_tuned(self, guide: OtherGuide) -> dict[str, Any]:
        """The tuned model of another guide, by the pairs of the first one in its own tokens."""
        return _tuned(guide.tuned, self.work / guide.name, self.work / "preferences")

    def other_export(self, guide: OtherGuide) -> dict[str, Any]:
        """Another guide in bfloat16 with its own tokenizer, checked again as exported."""
        return export_guide(guide.name, self.work, self.assets)

    def export(self) -> dict[str, Any]:
        """The four models in bfloat16 with their tokenizer, checked again as exported."""
        return export(self.work, self.assets)

    def stages(self) -> dict[str, Stage]:
        """The recipe's stages by name, in order; those of another guide are named NAME/STAGE."""
        named = {
            "tuned_policy": self.recipe.direct is not None,
            "evaluation": self.recipe.evaluation is not None,
            "export": self.recipe.export,
        }
        stages: dict[str, Stage] = {
            name: getattr(self, name) for name in STAGES if named.get(name, True)
        }
        for guide in self.recipe.other_guides:
            for name in (name for name in OTHER_STAGES if named.get(name, True)):
                stages[f"{guide.name}/{name}"] = partial(getattr(self, f"other_{name}"), guide)
        return stages

    def _language(self, name: str) -> dict[str, Any]:
        return _language(getattr(self.recipe, name), self.recipe.vocab_size, self.work, name)

    def _corpus(self, name: str) -> Corpus:
        return load_corpus(self.work / "corpus" / name)

    def _test_reviews(self) -> list[str]:
        train, test = (
            read_reviews(self.data / "imdb" / f"{name}.jsonl.xz") for name in ("train", "test")
        )
        seen = {review.text for review in train}
        return [review.text for review in test if review.text not in seen]

    def _model(self, name: str) -> Model:
        return load_model(self.work / name / "model")

    def _gold(self) -> Classifier:
        return load_classifier(self.work / "gold" / "model")

    def _tokenizer(self) -> Any:
        return load_tokenizer(self.work / "tokenizer")


def _language(config: LanguageConfig, vocab_size: int, work: Path, name: str) -> dict[str, Any]:
    folder, texts = work / name, work / "corpus" / LANGUAGE_TEXTS
    write_start(config, vocab_size, load_tokenizer(work / "tokenizer"), folder / "start")
    files = {"model": folder / "start", "data": texts, "from_scratch": True}
    _train("sft", folder, config.sft, files)
    test = load_corpus(work / "corpus" / "test")
    return {"test_loss": held_out_loss(load_model(folder / "model"), test)}


def _tuned(
    config: TuneConfig, work: Path, preferences: Path, start: str = "untuned", name: str = "tuned"
) -> dict[str, Any]:
    folder = work / name
    files = {"model": work / start / "model", "data": preferences / TRAINING_PAIRS}
    _train("dpo", folder, config.dpo, files)
    accuracies = [row[ACCURACY] for row in read_metrics(folder) if ACCURACY in row]
    return {"held_out_accuracy": accuracies[-1]} if accuracies else {}


def _train(command: str, folder: Path, flags: dict[str, Any], files: dict[str, Any]) -> None:
    """Run `w2s COMMAND` in a process of its own, by a config file that is kept in its folder.

    Raises SystemExit with its status where it ends with another than 0.
    """
    values = {name: value if value is True else str(value) for name, value in files.items()}
    source = folder / f"{command}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    source.write_text(yaml.safe_dump(flags | values | {"output": str(folder)}, sort_keys=False))
    words = [sys.executable, "-m", "w2s_jax", command, "--config", str(source)]
    status = subprocess.run(words, check=False).returncode
    if status:
        raise SystemExit(status)


def build(recipe: Recipe, data: Path, work: Path, assets: Path, only: str | None = None) -> None:
    """Run the stages in order (or the one named), each recorded in `WORK/STAGE/done.json`.

    Raises InputError for a name that is no stage, for stages that were done by other settings, for
    missing reviews, and for a missing matplotlib where a picture is to be drawn.
    """
    stages = Build(recipe, data, work, assets).stages()
    if only is not None and only not in stages:
        raise InputError(f"no stage {only!r}; there are {', '.join(stages)}")
    settings = stage_settings(recipe)
    check_done(work, {stage: settings[stage] for stage in stages})
    chosen = tuple(stages) if only is None else (only,)
    if "evaluation" in chosen:
        need_matplotlib()
    for stage in chosen:
        done = work / stage / "done.json"
        if done.is_file():
            log.info("%s: done before", stage)
            continue
        log.info("%s: started", stage)
        started = time.monotonic()
        figures = stages[stage]()
        rows = read_metrics(work / stage)
        trained = {"trained_seconds": rows[-1]["seconds"]} if rows else {}
        record = {"seconds": round(time.monotonic() - started, 1), **trained, **figures}
        kept = record | {"config": settings[stage]}
        write_whole(done, [json.dumps(kept, indent=2).encode(), b"\n"])
        log.info("%s: %s", stage, json.dumps(record))


def check_done(work: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise InputError, naming the stages, where some were done by other settings than these.

    A stage whose done.json tells no settings is taken as it is.
    """
    changed: dict[str, list[str]] = {}
    for stage, wanted in settings.items():
        done = work / stage / "done.json"
        found = json.loads(done.read_text()).get("config") if done.is_file() else None
        if found is not None and found != wanted:
            changed[stage] = differences(found, dict(wanted))
    if changed:
        what = f"stage {next(iter(changed))} was" if len(changed) == 1 else "stages were"
        texts = list(dict.fromkeys(text for found in changed.values() for text in found))
        told = "; ".join(texts[:_TOLD]) + (" .." if len(texts) > _TOLD else "")
        folders = " ".join(str(work / stage) for stage in changed)
        raise InputError(f"{what} done by another recipe ({told}); to redo, delete {folders}")


def main(arguments: list[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(
        description="Rebuild the models of the embedded default, or run an experiment on them."
    )
    parser.add_argument("--config", type=Path, required=True, help="the recipe (YAML)")
    parser.add_argument("--work", type=Path, required=True, help="folder of caches and checkpoints")
    parser.add_argument("--data", type=Path, help="folder that holds imdb/ (default: W2S_DATA)")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where the models go")
    parser.add_argument("--only", metavar="STAGE", help="run this stage alone")
    flags = parser.parse_args(arguments)
    data = flags.data or Path(os.environ.get("W2S_DATA", "../shared/data"))
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("w2s_jax").setLevel(logging.INFO)
    try:
        build(read_recipe(flags.config), data, flags.work, flags.assets, flags.only)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
