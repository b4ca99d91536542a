"""Drawing tokens from logits: temperature, top-k, top-p and the Gumbel draw from explicit keys."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from w2s_jax.errors import InputError, check_fields


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; filters apply in the order temperature, top-k, top-p.

    temperature 0 is greedy (top_k and top_p are then without effect); top_k 0 and top_p 1 keep
    every token. Raises InputError for values outside these ranges.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.temperature < math.inf:
            raise InputError(
                f"temperature is {self.temperature}; it must be 0 (greedy) or above, and finite"
            )
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; it must be 0 (off) or above")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must lie in (0, 1]")


def nucleus(
    sorted_logits: Float[Array, "*rows V"], top_p: float | Float[Array, "*#rows 1"]
) -> Float[Array, "*rows V"]:
    """Mask (−inf) what follows the smallest head of descending logits whose mass reaches top_p.

    The most probable token always stays. Source: arXiv 1904.09751.
    """
    probabilities = jax.nn.softmax(sorted_logits, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    keep = (before < top_p).at[..., 0].set(True)
    return jnp.where(keep, sorted_logits, -jnp.inf)


def shortlist(
    logits: Float[Array, "*rows V"],
    sampling: Sampling,
    *,
    temperature: Float[Array, "*#rows"] | None = None,
    top_p: Float[Array, "*#rows"] | None = None,
) -> tuple[Float[Array, "*rows M"], Int[Array, "*rows M"] | None]:
    """The tokens a draw may choose from: float32 filtered logits and their token ids.

    Ids are None where the list is the whole vocabulary in order. Greedy sampling keeps one token.
    Arrays of temperatures (0 is greedy) and of masses take the places of sampling's own numbers,
    which then only say whether there is a draw and whether a nucleus is cut. Where a logit is NaN
    it, or one of +inf, is the first choice, so that what is drawn tells of it.
    """
    if sampling.temperature == 0:
        ids = jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32)
        return jnp.zeros(ids.shape, jnp.float32), ids
    scaled = logits.astype(jnp.float32)
    if temperature is None:
        scaled = scaled / sampling.temperature
    else:
        scaled = _tempered(scaled, temperature[..., None])
    # By its sign a NaN is sorted above or below all numbers.
    scaled = jnp.where(jnp.isnan(scaled), jnp.inf, scaled)
    vocabulary = logits.shape[-1]
    top_k = min(sampling.top_k, vocabulary) or vocabulary
    if top_k == vocabulary and sampling.top_p == 1.0:
        return scaled, None
    values, ids = jax.lax.top_k(scaled, top_k)
    if sampling.top_p < 1.0:
        values = nucleus(values, sampling.top_p if top_p is None else top_p[..., None])
    return values, ids


def _tempered(logits: Array, temperature: Array) -> Array:
    """Logits over temperatures [.., 1]; where one is 0 all but the first largest are −inf."""
    is_best = jnp.arange(logits.shape[-1]) == jnp.argmax(logits, axis=-1, keepdims=True)
    drawn = temperature > 0
    return jnp.where(drawn | is_best, logits / jnp.where(drawn, temperature, 1.0), -jnp.inf)


def choose(
    values: Float[Array, "*rows M"], ids: Int[Array, "*rows M"] | None, keys: Key[Array, "*draws"]
) -> Int[Array, "*draws"]:
    """One int32 token a key from shortlists (Gumbel-max; arXiv 1611.01144 eq. 1).

    The rows broadcast against the keys, so that several draws may share one shortlist. A draw
    depends on its row and its key alone.
    """
    width = values.shape[-1]
    if width == 1:
        choice = jnp.zeros(keys.shape, jnp.int32)
    else:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (width,), jnp.float32))(
            keys.reshape(-1)
        )
        choice = jnp.argmax(values + noise.reshape(*keys.shape, width), axis=-1).astype(jnp.int32)
    if ids is None:
        return choice
    ids = jnp.broadcast_to(ids, (*keys.shape, width))
    return jnp.take_along_axis(ids, choice[..., None], axis=-1)[..., 0].astype(jnp.int32)


def draw(
    logits: Float[Array, "*rows V"], keys: Key[Array, "*rows"], sampling: Sampling
) -> Int[Array, "*rows"]:
    """One int32 token a row, each from its own key. Greedy ties go to the lowest id."""
    return choose(*shortlist(logits, sampling), keys)
