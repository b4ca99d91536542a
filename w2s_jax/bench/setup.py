"""What measurements are made of: shapes with random weights, made-up texts, other programs.

Two made-up vocabularies of one language serve guides that read another one's texts. Words are a
prefix and a suffix. The policy has a token for each word; the guide has other ids, and writes one
word in four as two tokens, so that its texts are a quarter longer.
"""

import json
import math
import subprocess
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from w2s_jax.errors import InputError
from w2s_jax.models.config import KNOWN, ModelConfig
from w2s_jax.models.model import Model, abstract_model


def call(command: list[str], *, seconds: float | None = None) -> dict[str, Any]:
    """The JSON line that a program prints; RuntimeError with its last words where it fails.

    Raises subprocess.TimeoutExpired for one that takes longer than so many seconds, and ends it.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def missing(python: str, modules: str, advice: str) -> str | None:
    """Why modules ("torch, trl") cannot be imported by this interpreter, or None."""
    try:
        done = subprocess.run(
            [python, "-c", f"import {modules}"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        return f"{python}: {error.strerror}"
    if done.returncode == 0:
        return None
    last = (done.stderr.strip().splitlines() or ["it failed"])[-1]
    return f"{python}: {last}; {advice}"


SHAPES = {"llama-1b": "meta-llama/Llama-3.2-1B", "llama-8b": "meta-llama/Meta-Llama-3-8B"}
GUIDE_SHAPE = "llama-1b"
"""The shape of the guides of a policy of a named shape."""
SPREAD = 0.02
"""Standard deviation of the weights."""


def named_shape(name: str) -> ModelConfig:
    """The config of a shape of `SHAPES`; InputError, with the known ones, for another name."""
    if name not in SHAPES:
        raise InputError(f"--shape {name}: no such shape; known are {', '.join(SHAPES)}")
    return ModelConfig.from_hf(KNOWN[SHAPES[name]])


def refuse_beside_shape(options: object, names: tuple[str, ...]) -> None:
    """Raise InputError where options that a named shape decides are set beside it."""
    usual = type(options)()
    for name in names:
        if getattr(options, name) != getattr(usual, name):
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is set beside --shape, which decides it; leave one out")


def random_model(config: ModelConfig, seed: int, *, dtype: DTypeLike = jnp.float32) -> Model:
    """A model of random weights (normal; norms at one, biases at zero), the same for the same seed.

    They are drawn on the device in their own dtype, one array after another: what that takes beside
    the weights is of one of them, and a program is compiled for each shape alone.
    """
    shapes, _ = abstract_model(config, dtype=dtype)
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes.params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        _draw(key, path[-1].key, leaf.shape, leaf.dtype)
        for key, (path, leaf) in zip(keys, leaves, strict=True)
    ]
    return Model(config, jax.tree.unflatten(structure, drawn))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: Array, name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    if name in ("scale", "bias"):
        return jnp.full(shape, float(name == "scale"), dtype)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(SPREAD, dtype)


END, UNKNOWN = "[end]", "[unknown]"
VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxz"
SPLIT = 4
"""One word in so many is no token of the guide."""


def vocabularies(size: int) -> tuple[Any, Any]:
    """Tokenizers of the policy and of the guide, with at most `size` tokens each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rows = math.isqrt(size - 1) + 1
    starts, ends = _syllables(rows, "{c}{v}"), _syllables(rows, "{c}{v}x")
    words = [start + end for start in starts for end in ends][: size - 2]
    policy = {word: index for index, word in enumerate([END, UNKNOWN, *words])}
    whole = [word for index, word in enumerate(words) if index % SPLIT]
    pieces = [UNKNOWN, END, *starts, *(f"##{end}" for end in ends), *reversed(whole)]
    guide = {piece: index for index, piece in enumerate(pieces[:size])}
    found = []
    for model in (
        models.WordLevel(policy, unk_token=UNKNOWN),
        models.WordPiece(guide, unk_token=UNKNOWN),
    ):
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token=UNKNOWN)
        found.append(fast)
    return found[0], found[1]


def _syllables(count: int, form: str) -> list[str]:
    """So many distinct syllables, all of one length."""
    short = [form.format(c=c, v=v) for c in CONSONANTS for v in VOWELS]
    if count <= len(short):
        return short[:count]
    return [one[:2] + other for one in short for other in short][:count]
