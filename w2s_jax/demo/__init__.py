"""The embedded default: small models trained on movie reviews, their recipe and their demo."""

import importlib.resources
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

if TYPE_CHECKING:
    from w2s_jax.models.model import Model
    from w2s_jax.models.reward import Classifier


@dataclass(frozen=True)
class DemoConfig:
    """What the demo writes, where to and by which draws."""

    output: Annotated[str, arg(metavar="DIR")] = "demo"
    """Folder of results.jsonl and summary.json."""
    prompts: int = 64
    """Openings to continue, 80 at most."""
    seed: int = 0
    """Decides the draws."""
    max_new_tokens: int = 50
    """Tokens in a response."""


@dataclass(frozen=True)
class Demo:
    """The models of the embedded default; all four share the tokenizer."""

    policy: "Model"
    untuned: "Model"
    tuned: "Model"
    gold: "Classifier"
    tokenizer: Any


@dataclass(frozen=True)
class OtherGuide:
    """A guide whose family (Mistral) and vocabulary are not the policy's; it scores texts."""

    tuned: "Model"
    untuned: "Model"
    tokenizer: Any


def load_demo(*, dtype: Any = "float32") -> Demo:
    """Load the embedded default; the files hold bfloat16, which CPUs compute slowly."""
    from w2s_jax.models.load import load_classifier

    with _assets() as assets:
        gold = load_classifier(assets / "gold", dtype=dtype)
    (policy, untuned, tuned), tokenizer = _decoders("policy", "untuned", "tuned", dtype=dtype)
    return Demo(policy, untuned, tuned, gold, tokenizer)


def load_other_guide(*, dtype: Any = "float32") -> OtherGuide:
    """Load the second guide of the embedded default; the files hold bfloat16 as the others do."""
    (tuned, untuned), tokenizer = _decoders("mistral-tuned", "mistral-untuned", dtype=dtype)
    return OtherGuide(tuned, untuned, tokenizer)


def _decoders(*names: str, dtype: Any) -> "tuple[list[Model], Any]":
    """Decoders of one vocabulary, and their tokenizer."""
    from w2s_jax.models.load import load_model
    from w2s_jax.text.tokenizer import load_tokenizer

    with _assets() as assets:
        models = [load_model(assets / name, dtype=dtype, decoding=True) for name in names]
        return models, load_tokenizer(assets / names[0])


def _assets() -> AbstractContextManager[Path]:
    return importlib.resources.as_file(importlib.resources.files("w2s_jax.demo") / "assets")
