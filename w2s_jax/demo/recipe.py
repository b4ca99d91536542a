"""The recipe of the embedded default as frozen dataclasses, and its reading from YAML.

What the settings do is told where they are used: gold.py, language.py, preferences.py,
experiment.py.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from w2s_jax.demo.experiment import EvaluationConfig
from w2s_jax.demo.gold import GoldConfig
from w2s_jax.demo.language import LanguageConfig
from w2s_jax.demo.preferences import PreferenceConfig, TuneConfig
from w2s_jax.errors import InputError

T = TypeVar("T")


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
    """Read a recipe; its `extends` names one, from its folder, whose fields hold where it has none.

    Raises InputError naming a missing file, an unknown field or a wrong value.
    """
    return from_mapping(Recipe, _load(Path(path)), str(path))


def _load(path: Path, above: tuple[Path, ...] = ()) -> Any:
    value = _read(path)
    if not isinstance(value, Mapping) or not isinstance(value.get("extends"), str):
        return value
    if path.resolve() in above:
        raise InputError(f"{path}: extends itself, through {above[-1]}")
    base = _load(path.parent / value["extends"], (*above, path.resolve()))
    own = {name: part for name, part in value.items() if name != "extends"}
    return {**base, **own} if isinstance(base, Mapping) else base


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def from_mapping(cls: type[T], value: Any, where: str) -> T:
    """Build a dataclass, nested ones included, from YAML values; `where` heads every error."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: expected fields of {cls.__name__}, not {value!r}")
    kinds = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in value:
        if name not in fields:
            raise InputError(f"{where}: unknown field {name!r}; there are {', '.join(fields)}")
    for name, item in fields.items():
        required = item.default is item.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise InputError(f"{where}: field {name!r} is missing")
    try:
        return cls(
            **{name: _convert(kinds[name], value[name], f"{where}: {name}") for name in value}
        )
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(where) else f"{where}: {text}") from None


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_mapping(typing.cast(type, kind), value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(k for k in arguments if k is not type(None)), value, where)
    if origin is dict and isinstance(value, dict):
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], item, where) for item in value)
    if origin is typing.Literal:
        if value not in arguments:
            raise InputError(f"{where}: {value!r} is none of {', '.join(map(str, arguments))}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{where}: {value!r} is no {getattr(kind, '__name__', kind)}")
    return value
