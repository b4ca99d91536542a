"""Rotary position embedding: the frequencies of each published scaling, and the rotation.

Heads are rotated in halves (component i with component i + C/2), as Hugging Face stores them.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """How positions turn into angles; the fields a kind does not name are not read by it.

    `linear` reads factor; `llama3` reads factor, low/high_frequency_factor and
    original_max_positions; `yarn` reads factor, beta_fast, beta_slow, original_max_positions,
    truncate and attention_factor (None: the paper's 0.1·ln(factor) + 1).
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def inverse_frequencies(rope: Rope, head_width: int) -> tuple[np.ndarray, float]:
    """Angles per position, float32 [C/2], and the factor on cosine and sine (1 except for yarn).

    Computed on the host once per trace. Sources: arXiv 2104.09864 (default), arXiv 2306.15595
    (linear), the Llama 3.1 release (llama3), arXiv 2309.00071 (yarn).
    """
    exponent = np.arange(0, head_width, 2, dtype=np.float32) / head_width
    base = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.kind == "default":
        return base, 1.0
    if rope.kind == "linear":
        return base / np.float32(rope.factor), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, base), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, base, head_width)
    raise ValueError(f"rope kind {rope.kind!r} is none of {', '.join(ROPE_KINDS)}")


def _llama3(rope: Rope, base: np.ndarray) -> np.ndarray:
    wavelength = 2 * np.pi / base
    low = rope.original_max_positions / rope.low_frequency_factor
    high = rope.original_max_positions / rope.high_frequency_factor
    blend = (rope.original_max_positions / wavelength - rope.low_frequency_factor) / (
        rope.high_frequency_factor - rope.low_frequency_factor
    )
    smooth = (1 - blend) * base / rope.factor + blend * base
    scaled = np.where(wavelength > low, base / rope.factor, base)
    medium = (wavelength <= low) & (wavelength >= high)
    return np.where(medium, smooth, scaled).astype(np.float32)


def _yarn(rope: Rope, base: np.ndarray, head_width: int) -> tuple[np.ndarray, float]:
    def correction(rotations: float) -> float:
        reach = rope.original_max_positions / (rotations * 2 * math.pi)
        return head_width * math.log(reach) / (2 * math.log(rope.theta))

    low, high = correction(rope.beta_fast), correction(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_width - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(head_width // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    scaled = base / rope.factor * (1 - keep) + base * keep
    factor = rope.attention_factor
    if factor is None:
        factor = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return scaled.astype(np.float32), factor


def rotation(
    positions: Int[Array, "*batch"], rope: Rope, head_width: int
) -> tuple[Float[Array, "*batch half"], Float[Array, "*batch half"]]:
    """Cosines and sines of the positions' angles, float32."""
    frequencies, factor = inverse_frequencies(rope, head_width)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    heads: Float[Array, "*batch heads C"],
    cosine: Float[Array, "*batch half"],
    sine: Float[Array, "*batch half"],
) -> Float[Array, "*batch heads C"]:
    """Rotate queries or keys by their positions' angles; float32 inside, their dtype outside."""
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine[..., None, :], sine[..., None, :]
    turned = jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )
    return turned.astype(heads.dtype)
