"""The embedded default: small models trained on movie reviews, their recipe and their demo."""

import importlib.resources
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from w2s_jax.models.encoder import Classifier
    from w2s_jax.models.model import Model


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
    from w2s_jax.models.load import load_classifier, load_model
    from w2s_jax.text.tokenizer import load_tokenizer

    with _assets() as assets:
        policy, untuned, tuned = (
            load_model(assets / name, dtype=dtype) for name in ("policy", "untuned", "tuned")
        )
        gold = load_classifier(assets / "gold", dtype=dtype)
        tokenizer = load_tokenizer(assets / "policy")
    return Demo(policy, untuned, tuned, gold, tokenizer)


def load_other_guide(*, dtype: Any = "float32") -> OtherGuide:
    """Load the second guide of the embedded default; the files hold bfloat16 as the others do."""
    from w2s_jax.models.load import load_model
    from w2s_jax.text.tokenizer import load_tokenizer

    with _assets() as assets:
        tuned, untuned = (
            load_model(assets / f"mistral-{part}", dtype=dtype) for part in ("tuned", "untuned")
        )
        tokenizer = load_tokenizer(assets / "mistral-tuned")
    return OtherGuide(tuned, untuned, tokenizer)


def _assets() -> AbstractContextManager[Path]:
    return importlib.resources.as_file(importlib.resources.files("w2s_jax.demo") / "assets")
