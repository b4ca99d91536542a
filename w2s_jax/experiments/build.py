"""Rebuilds the embedded default from the IMDb reviews in stages, and runs the experiment on it.

    python -m w2s_jax.experiments.build --config configs/demo/recipe.yaml --work DIR
    python -m w2s_jax.experiments.build --config configs/demo/sentiment.yaml --work DIR

A stage that is done is not run again; one that was killed resumes from its last checkpoint. A stage
that was done with other settings is refused. Models are written into the package in bfloat16, with
a card of their measurements in that form.
"""

import argparse
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.demo import Demo
from w2s_jax.errors import InputError
from w2s_jax.evaluate.rewards import gold_rewards
from w2s_jax.experiments import demo_models, sentiment
from w2s_jax.experiments.demo_models import (
    Corpus,
    GoldConfig,
    LanguageConfig,
    PreferenceConfig,
    TuneConfig,
    load_corpus,
    opening_accuracy,
)
from w2s_jax.experiments.sentiment import EvaluationConfig
from w2s_jax.models.load import load_classifier, load_model
from w2s_jax.models.reward import Classifier
from w2s_jax.models.save import save_classifier, save_model
from w2s_jax.ops.logits import Sampling
from w2s_jax.search.config import sample
from w2s_jax.search.run import search
from w2s_jax.search.session import hypothesis_text
from w2s_jax.text.prompts import decode_tokens
from w2s_jax.text.rows import read_jsonl, write_whole
from w2s_jax.text.tokenizer import END_ID, load_tokenizer
from w2s_jax.text.typed_yaml import read_typed
from w2s_jax.train.export import weights_identity
from w2s_jax.train.watch import read_metrics

ASSETS = Path(__file__).parent.parent / "demo" / "assets"
LANGUAGE_MODELS = ("policy", "untuned", "tuned")
LIMIT_BYTES = 25_000_000
CARD_PROMPTS = 256
"""Number of test reviews after whose openings a card's gold reward is sampled."""
_TOLD = 3

Stage = Callable[[], dict[str, Any]]
log = logging.getLogger("w2s_jax.experiments.build")


@dataclass(frozen=True)
class OtherGuide:
    """A guide with a vocabulary of its own, tuned on the same preferences.

    Attributes:
        name: Begins the names of its folders.
        vocab_size: Size of its vocabulary.
        untuned: Its untuned model.
        reviews: Number of reviews that its tokenizer and its untuned model read; None for all.
        tuned: How its tuned model is made.
    """

    name: str
    vocab_size: int
    untuned: LanguageConfig
    reviews: int | None = None
    tuned: TuneConfig = field(default_factory=TuneConfig)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the embedded default, except the data.

    Attributes:
        policy: The policy.
        untuned: The guide's untuned model.
        vocab_size: Size of the vocabulary.
        gold: The gold classifier.
        preferences: How pairs are sampled.
        tuned: How the guide's tuned model is made.
        direct: How the policy itself is tuned on the preferences, for the experiment; None skips
            it.
        evaluation: The comparison of the methods, for the experiment; None skips it.
        export: Whether to write the models that ship with the package.
        other_guides: Guides with vocabularies of their own.
    """

    policy: LanguageConfig
    untuned: LanguageConfig
    vocab_size: int = 4096
    gold: GoldConfig = field(default_factory=GoldConfig)
    preferences: PreferenceConfig = field(default_factory=PreferenceConfig)
    tuned: TuneConfig = field(default_factory=TuneConfig)
    direct: TuneConfig | None = None
    evaluation: EvaluationConfig | None = None
    export: bool = True
    other_guides: tuple[OtherGuide, ...] = ()


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe; InputError names a missing file, an unknown field or a wrong value."""
    return read_typed(Recipe, path)


@dataclass(frozen=True)
class Build:
    """A recipe with the folders it works in.

    Attributes:
        recipe: What is made.
        data: The folder that holds imdb/.
        work: Caches, checkpoints and records, in a folder per stage.
        assets: The folder of the exported models.
    """

    recipe: Recipe
    data: Path
    work: Path
    assets: Path

    def stages(self) -> dict[str, Stage]:
        """The stages of the recipe in order, by name; each is a function that returns its figures.

        Stages of another guide are named NAME/STAGE: its tokenizer, its untuned model and its tuned
        model, which uses the pairs of the first guide in its own tokens.
        """
        recipe, work, assets = self.recipe, self.work, self.assets
        tokenise = partial(demo_models.build_corpus, self.data / "imdb")
        pretrain, tune = demo_models.pretrain, partial(demo_models.tune, work)
        size, length = recipe.vocab_size, recipe.policy.max_positions
        found: dict[str, Stage] = {
            "corpus": partial(tokenise, work, size, max_length=length),
            "gold": self.gold,
            "policy": partial(pretrain, recipe.policy, size, work, "policy"),
            "untuned": partial(pretrain, recipe.untuned, size, work, "untuned"),
            "preferences": self.preferences,
            "tuned": partial(tune, recipe.tuned, "untuned", "tuned"),
        }
        if recipe.direct is not None:
            found["tuned_policy"] = partial(tune, recipe.direct, "policy", "tuned_policy")
        if recipe.evaluation is not None:
            found["evaluation"] = partial(self.evaluation, recipe.evaluation)
        if recipe.export:
            found["export"] = partial(export, work, assets)
        for guide in recipe.other_guides:
            name, size, untuned = guide.name, guide.vocab_size, guide.untuned
            limits: dict[str, Any] = {"max_length": untuned.max_positions, "reviews": guide.reviews}
            sets, folder = ("language", "test"), work / name
            found |= {
                f"{name}/corpus": partial(tokenise, folder, size, sets=sets, **limits),
                f"{name}/untuned": partial(pretrain, untuned, size, folder, "untuned"),
                f"{name}/tuned": partial(tune, guide.tuned, f"{name}/untuned", f"{name}/tuned"),
            }
            if recipe.export:
                found[f"{name}/export"] = partial(export_guide, name, work, assets)
        return found

    def gold(self) -> dict[str, Any]:
        """Train the gold classifier; its accuracy on the openings of the test reviews."""
        train, test = (load_corpus(self.work / "corpus" / name) for name in ("train", "test"))
        recipe, folder = self.recipe, self.work / "gold"
        classifier = demo_models.train_gold(recipe.gold, train, recipe.vocab_size, folder)
        save_classifier(classifier, folder / "model")
        return {"test_accuracy_openings": opening_accuracy(classifier, test)}

    def preferences(self) -> dict[str, Any]:
        """Sample pairs from the guide's untuned model, and label them by the gold reward."""
        folder, tokenizer = self.work / "preferences", load_tokenizer(self.work / "tokenizer")
        output = folder / demo_models.PAIRS
        if not output.is_file():
            texts = list(self._reviews("train"))
            untuned = load_model(self.work / "untuned" / "model", decoding=True)
            demo_models.sample_pairs(
                self.recipe.preferences, untuned, self._gold(), tokenizer, texts, output
            )
        training = folder / demo_models.TRAINING_PAIRS
        kept = demo_models.write_training_pairs(output, tokenizer.eos_token, training)
        rewards = np.array([row["rewards"] for row in read_jsonl(output)])
        gaps = rewards[:, 0] - rewards[:, 1]
        return {
            "pairs": kept,
            "mean_reward": float(rewards.mean()),
            "mean_gap": float(np.abs(gaps).mean()),
            "chosen_has_higher_reward": float((gaps > 0).mean()),
        }

    def evaluation(self, config: EvaluationConfig) -> dict[str, Any]:
        """Responses of every method to openings of test reviews; their figures, table, picture."""
        folder = self.work / "evaluation"
        names = [*LANGUAGE_MODELS, *(["tuned_policy"] if self.recipe.direct is not None else [])]
        weights = {name: weights_identity(self.work / name / "model") for name in ("gold", *names)}
        policy, untuned, tuned, *direct = (load_model(self.work / name / "model") for name in names)
        tokenizer = load_tokenizer(self.work / "tokenizer")
        models = Demo(policy, untuned, tuned, self._gold(), tokenizer)
        methods = sentiment.experiment_methods(config, models, *direct)
        seen = self._reviews("train")
        texts = [text for text in self._reviews("test") if text not in seen]
        prompts = sentiment.draw_prompts(config, texts)
        found = sentiment.decode_all(config, models, methods, prompts, folder, {"weights": weights})
        headings = {name: method.heading for name, method in methods.items()}
        rows = {name: rows for name, (_, rows) in found.items()}
        summary = sentiment.summarise_experiment(rows, headings, samples=config.samples)
        table = sentiment.result_table(summary)
        write_whole(folder / "results.json", [json.dumps(summary, indent=2).encode(), b"\n"])
        write_whole(folder / "table.md", [table.encode()])
        write_whole(folder / "figure.png", [sentiment.draw_experiment(summary)])
        # Merging removes the journals, so it comes last: until here a kill loses nothing.
        for name, (journal, _) in found.items():
            journal.merge(sentiment.responses_path(folder, name), len(prompts))
        log.info("evaluation: %s\n%s", folder, table)
        return {name: row["gold_reward"] for name, row in summary["methods"].items()}

    def _reviews(self, name: str) -> dict[str, int]:
        return demo_models.read_reviews(self.data / "imdb" / f"{name}.jsonl.xz")

    def _gold(self) -> Classifier:
        return load_classifier(self.work / "gold" / "model")


def export(work: Path, assets: Path) -> dict[str, Any]:
    """Export the models of `work/NAME/model`, rounded to bfloat16, to `assets`.

    Returns:
        Figures of the rounded weights, computed in float32: test losses, test accuracies, and the
        mean gold reward of plain samples after the first 8 tokens of 256 test reviews.
    """
    tokenizer, test = load_tokenizer(work / "tokenizer"), load_corpus(work / "corpus" / "test")
    classifier = load_classifier(work / "gold" / "model")
    save_classifier(_rounded(classifier), assets / "gold", tokenizer=tokenizer)
    gold = load_classifier(assets / "gold", dtype=jnp.float32)
    figures = {
        "gold": {
            "parameters": _size(gold),
            "test_accuracy_openings": opening_accuracy(gold, test),
            "test_accuracy_reviews": demo_models.review_accuracy(gold, test),
        }
    }
    figures |= _export_models(work, {name: name for name in LANGUAGE_MODELS}, assets)
    return _write_card(work, assets, figures)


def export_guide(name: str, work: Path, assets: Path) -> dict[str, Any]:
    """Export a guide with a vocabulary of its own: `work/NAME/tuned` as `assets/NAME-tuned`.

    The gold classifier must be in the assets; figures are added to those in `card.json`.
    """
    names = {part: f"{name}-{part}" for part in ("untuned", "tuned")}
    return _write_card(work, assets, _export_models(work / name, names, assets))


def _export_models(work: Path, names: Mapping[str, str], assets: Path) -> dict[str, Any]:
    """Export models of `work`, given names by folder; returns figures by name."""
    tokenizer, test = load_tokenizer(work / "tokenizer"), load_corpus(work / "corpus" / "test")
    for folder, name in names.items():
        model = load_model(work / folder / "model")
        save_model(_rounded(model), assets / name, tokenizer=tokenizer)
    return {name: _figures(assets / name, test, assets / "gold") for name in names.values()}


def _figures(folder: Path, test: Corpus, gold: Path) -> dict[str, Any]:
    model, tokenizer = load_model(folder, dtype="float32"), load_tokenizer(folder)
    heads = [[END_ID, *map(int, test.review(i)[:8])] for i in range(min(CARD_PROMPTS, len(test)))]
    settings = sample(sampling=Sampling(1.0), max_new_tokens=50, slots=64)
    texts = [
        decode_tokens(tokenizer, head) + hypothesis_text(tokenizer, head, result.best)
        for head, result in zip(heads, search(model, None, heads, settings), strict=True)
    ]
    judge = load_classifier(gold, dtype=jnp.float32)
    rewards = gold_rewards(judge, load_tokenizer(gold), texts)
    return {
        "parameters": _size(model),
        "test_loss": demo_models.held_out_loss(model, test, reviews=1024),
        "gold_reward": float(rewards.mean()),
        "gold_reward_stderr": float(rewards.std(ddof=1) / np.sqrt(len(rewards))),
    }


def _rounded(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _write_card(work: Path, assets: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """Write `card.json`: the figures of every stage and of the exported weights, merged."""
    path = assets / "card.json"
    card = json.loads(path.read_text()) if path.is_file() else {"stages": {}, "exported": {}}
    for done in [*work.glob("*/done.json"), *work.glob("*/*/done.json")]:
        if done.parent.name != "export":
            record = json.loads(done.read_text())
            # The recipe is in a file of its own.
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


_UPSTREAM = {
    "gold": ("corpus",),
    "policy": ("corpus",),
    "untuned": ("corpus",),
    "preferences": ("gold", "untuned"),
    "tuned": ("preferences",),
    "tuned_policy": ("policy", "preferences"),
    "evaluation": ("policy", "tuned", "tuned_policy"),
    "export": ("policy", "tuned"),
}
_FIELDS = {"tuned_policy": "direct", "export": None}


def stage_settings(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The settings of the recipe on which each stage depends, as JSON values.

    They include those of the stages that it reads: if one of these is made anew with other
    settings, what was made from it is out of date too.
    """
    values = json.loads(json.dumps(dataclasses.asdict(recipe)))
    corpus = {"vocab_size": recipe.vocab_size, "max_length": recipe.policy.max_positions}
    found: dict[str, dict[str, Any]] = {"corpus": corpus}
    for stage, before in _UPSTREAM.items():
        name = _FIELDS.get(stage, stage)
        own = {} if name is None else {name: values[name]}
        found[stage] = {key: value for each in before for key, value in found[each].items()} | own
    for guide, own in zip(recipe.other_guides, values["other_guides"], strict=True):
        length = {"max_length": guide.untuned.max_positions}
        read = {name: own[name] for name in ("vocab_size", "reviews")} | length
        untuned = read | {"untuned": own["untuned"]}
        tuned = found["preferences"] | {guide.name: untuned | {"tuned": own["tuned"]}}
        names = ("corpus", "untuned", "tuned", "export")
        parts = ({guide.name: read}, {guide.name: untuned}, tuned, tuned)
        found |= {f"{guide.name}/{name}": part for name, part in zip(names, parts, strict=True)}
    return found


def differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, as "a.b is 3, was 2" for `wanted` and `found`."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        names = [*wanted, *(name for name in found if name not in wanted)]
        return [
            text
            for name in names
            for text in differences(found.get(name), wanted.get(name), f"{path}.{name}".strip("."))
        ]
    return [] if found == wanted else [f"{path} is {wanted!r}, was {found!r}"]


def build(recipe: Recipe, data: Path, work: Path, assets: Path, only: str | None = None) -> None:
    """Run the stages in order (or the one named), and record each in `WORK/STAGE/done.json`.

    Raises:
        InputError: For an unknown name, stages that were done with other settings, missing reviews,
            and missing matplotlib if a picture is to be drawn.
    """
    stages = Build(recipe, data, work, assets).stages()
    if only is not None and only not in stages:
        raise InputError(f"no stage {only!r}; there are {', '.join(stages)}")
    settings = stage_settings(recipe)
    check_done(work, {stage: settings[stage] for stage in stages})
    chosen = tuple(stages) if only is None else (only,)
    if "evaluation" in chosen:
        sentiment.need_matplotlib()
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
    """Raise InputError, naming the stages, if some were done with other settings than these.

    A stage whose done.json has no settings is accepted.
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
    except KeyboardInterrupt:
        parser.exit(130)


if __name__ == "__main__":
    main()
