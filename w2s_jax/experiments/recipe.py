"""The recipe of the embedded default as frozen dataclasses, and its reading from YAML.

What the settings do is told where they are used: corpus.py, preferences.py, sentiment.py.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from w2s_jax.experiments.corpus import GoldConfig, LanguageConfig
from w2s_jax.experiments.preferences import PreferenceConfig, TuneConfig
from w2s_jax.experiments.sentiment import EvaluationConfig
from w2s_jax.text.typed_yaml import read_typed


@dataclass(frozen=True)
class OtherGuide:
    """A guide of another vocabulary, tuned on the same preferences; `name` heads its folders.

    reviews: how many of the reviews its tokenizer and its untuned model read; None is all.
    """

    name: str
    vocab_size: int
    untuned: LanguageConfig
    reviews: int | None = None
    tuned: TuneConfig = field(default_factory=TuneConfig)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the embedded default, beside the data.

    direct (the policy itself tuned on the preferences) and evaluation (the methods compared) are
    for the experiment and left out by default; export False leaves out what ships the models.
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
    """What each stage of build.py depends on in the recipe, as JSON values.

    That of the stages it reads is included: where one of these is made anew by other settings, what
    was made from it is out of date too.
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


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe; raises InputError naming a missing file, an unknown field or a wrong value."""
    return read_typed(Recipe, path)
