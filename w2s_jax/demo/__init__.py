"""The embedded default: small models trained on movie reviews, their recipe and their demo."""

import importlib.resources
from dataclasses import dataclass
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


def load_demo(*, dtype: Any = "float32") -> Demo:
    """Load the embedded default; the files hold bfloat16, which CPUs compute slowly."""
    from w2s_jax.models.encoder_huggingface import load_classifier
    from w2s_jax.models.huggingface import load_model
    from w2s_jax.text.tokenizer import load_tokenizer

    with importlib.resources.as_file(
        importlib.resources.files("w2s_jax.demo") / "assets"
    ) as assets:
        policy, untuned, tuned = (
            load_model(assets / name, dtype=dtype) for name in ("policy", "untuned", "tuned")
        )
        gold = load_classifier(assets / "gold", dtype=dtype)
        tokenizer = load_tokenizer(assets / "policy")
    return Demo(policy, untuned, tuned, gold, tokenizer)
