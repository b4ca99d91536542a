"""Attention: rotary positions of queries and keys, and partial softmaxes over parts of the keys.

Partials are merged by log-sum-exp. What a part means (prefix, committed, chunk) is decided by the
caller.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rope:
    """How positions turn into angles; the fields a kind does not name are not read by it.

    `linear` reads factor; `llama3` reads factor, low/high_frequency_factor and
    original_max_positions; `yarn` reads factor, beta_fast, beta_slow, original_max_positions,
    truncate and attention_factor (None: the paper's 0.1·ln(factor) + 1); `longrope` reads
    short_factor, one number a frequency, and factor, original_max_positions and attention_factor
    (None: the paper's √(1 + ln(factor) / ln(original))). Its long_factor, for positions beyond the
    original ones, turns all keys otherwise, those kept too; it is held for files alone.
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
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def inverse_frequencies(rope: Rope, width: int) -> tuple[np.ndarray, float]:
    """Angles per position, float32 [width/2], and the factor on cosine and sine.

    Computed on the host once per trace. Sources: arXiv 2104.09864 (default), arXiv 2306.15595
    (linear), the Llama 3.1 release (llama3), arXiv 2309.00071 (yarn), arXiv 2402.13753 (longrope).
    """
    exponent = np.arange(0, width, 2, dtype=np.float32) / width
    base = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.kind == "default":
        return base, 1.0
    if rope.kind == "linear":
        return base / np.float32(rope.factor), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, base), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, base, width)
    if rope.kind == "longrope":
        return _longrope(rope, base)
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


def _longrope(rope: Rope, base: np.ndarray) -> tuple[np.ndarray, float]:
    factor = rope.attention_factor
    if factor is None:
        grown = math.log(rope.factor) / math.log(rope.original_max_positions)
        factor = math.sqrt(1 + grown) if rope.factor > 1 else 1.0
    return base / np.asarray(rope.short_factor, np.float32), factor


def rotation(
    positions: Int[Array, "*batch"], rope: Rope | None, width: int
) -> tuple[Float[Array, "*batch half"], Float[Array, "*batch half"]]:
    """Cosines and sines of the positions' angles, float32, for so many of a head's entries.

    Without a rope all angles are 0.
    """
    none = np.zeros(width // 2, np.float32), 1.0
    frequencies, factor = none if rope is None else inverse_frequencies(rope, width)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    heads: Float[Array, "*batch heads C"],
    cosine: Float[Array, "*batch half"],
    sine: Float[Array, "*batch half"],
) -> Float[Array, "*batch heads C"]:
    """Rotate queries or keys by their positions' angles; float32 inside, their dtype outside.

    Of a head that is wider than the angles are for, what is behind stays as it is.
    """
    width = 2 * cosine.shape[-1]
    first, second = jnp.split(heads[..., :width].astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine[..., None, :], sine[..., None, :]
    turned = jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )
    turned = turned.astype(heads.dtype)
    if width == heads.shape[-1]:
        return turned
    return jnp.concatenate([turned, heads[..., width:]], axis=-1)


MASKED = -1e30
"""Score of a masked key: finite, so that a fully masked part merges with weight zero, not NaN."""
TPU_BLOCK_BYTES, BLOCK_BYTES = 16 * 2**20, 256 * 2**20
"""Scores that a device has at a time: a TPU's vector memory holds so many, beside the rest.

Elsewhere they lie in main memory as it is, and a loop costs a start of every operation.
"""
BLOCK_KEYS = 512
"""Fewer keys than these at a time would move more of sums and maxima than of scores."""
TPU_TURN_BYTES = 2 * 2**20
"""Scores of `BLOCK_KEYS` keys of the slots that a TPU takes in one turn of several.

Their queries and sums then stay in its vector memory too. Twice as many go in one turn alone.
"""
LANES = 128
"""Keys that stand beside one another in a tile of a TPU; blocks of them are not cut."""


@dataclass(frozen=True)
class Split:
    """Over how many devices the slots of a cache lie, and over how many its heads."""

    slots: int = 1
    heads: int = 1

    @property
    def devices(self) -> int:
        """How many share the scores of all slots and heads."""
        return self.slots * self.heads


UNSPLIT = Split()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Partial:
    """An unnormalised softmax over some of the keys, all float32.

    weighted [P A m H C]: sum of exp(score − maximum)·value; total [P A m H]: sum of
    exp(score − maximum); maximum [P A m H].
    """

    weighted: Array
    total: Array
    maximum: Array

    def reshape(self, *groups: int) -> "Partial":
        """The same partial with its leading (slot, group, query) axes laid out as `groups`."""
        heads, width = self.weighted.shape[-2:]
        return Partial(
            self.weighted.reshape(*groups, heads, width),
            self.total.reshape(*groups, heads),
            self.maximum.reshape(*groups, heads),
        )


def attend_part(
    query: Float[Array, "P A m H C"],
    keys: Float[Array, "P A _ _ _"] | Int8[Array, "P A J G C"],
    values: Float[Array, "P A _ _ _"] | Int8[Array, "P A J G C"],
    mask: Bool[Array, "#P #A #m J"],
    key_scales: Float[Array, "P A J G 1"] | None = None,
    value_scales: Float[Array, "P A J G 1"] | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    head_major: bool = False,
) -> Partial:
    """Partial attention of m queries in each of A groups over the J keys that the group shares.

    Scores and sums are float32, as is the result. Rows of a group share one read of its keys: they
    join the query axis. A key's scale is a factor of its scores, a value's of its weights: they go
    there, and neither is ever multiplied out.

    Args:
        query: Its heads H are a multiple of the key heads G.
        keys: float [P A J G C], or int8 with `key_scales`.
        values: float [P A J G C], or int8 with `value_scales`.
        mask: True where a query may see a key.
        key_scales: float32, of int8 keys.
        value_scales: float32, of int8 values.
        scale: The factor on query·key.
        softcap: C of c·tanh(s/c), to which a score s is mapped (arXiv 2408.00118).
        head_major: Keys are [P A G C J] instead and values [P A G J C], as CPUs multiply them.
    """
    key_axes, value_axes = ("pagcj", "pagjc") if head_major else ("pajgc", "pajgc")
    if key_scales is not None:
        # Tied to the query, so that no loop over tokens converts them once ahead of itself.
        query, keys, values = jax.lax.optimization_barrier((query, keys, values))
        keys, values = keys.astype(query.dtype), values.astype(query.dtype)
    slots, groups, count, heads, width = query.shape
    kv_heads = keys.shape[2 if head_major else 3]
    grouped = query.reshape(slots, groups, count, kv_heads, heads // kv_heads, width)
    product = f"pamghc,{key_axes}->pagmhj"
    scores = jnp.einsum(product, grouped, keys, preferred_element_type=jnp.float32)
    scores = scores * scale
    if key_scales is not None:
        scores = scores * _of_keys(key_scales)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, :, None, :, None, :], scores, MASKED)
    maximum = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - maximum[..., None])
    total = jnp.sum(weights, axis=-1)
    if value_scales is not None:
        weights = weights * _of_keys(value_scales)
    weighted = jnp.einsum(
        f"pagmhj,{value_axes}->pagmhc",
        weights.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    shape = (slots, groups, count, heads)
    return Partial(
        jnp.moveaxis(weighted, 2, 3).reshape(*shape, width),
        jnp.moveaxis(total, 2, 3).reshape(shape),
        jnp.moveaxis(maximum, 2, 3).reshape(shape),
    )


def attend_in_blocks(
    query: Float[Array, "P A m H C"],
    keys: Float[Array, "P A _ _ _"] | Int8[Array, "P A J G C"],
    values: Float[Array, "P A _ _ _"] | Int8[Array, "P A J G C"],
    mask: Bool[Array, "#P #A #m J"],
    key_scales: Float[Array, "P A J G 1"] | None = None,
    value_scales: Float[Array, "P A J G 1"] | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    devices: int = 1,
    head_major: bool = False,
) -> Partial:
    """`attend_part` over blocks of the keys one after another, where all scores would be many.

    P and H together are split over `devices`, each of which has scores of `BLOCK_BYTES` at a time
    (on TPUs of `TPU_BLOCK_BYTES`), or of `BLOCK_KEYS` keys if those are more. Online softmax
    (arXiv 1805.02867). The other arguments are those of `attend_part`.
    """
    slots, groups, count, heads, _ = query.shape
    largest = functools.partial(_largest, 4 * slots * groups * count * heads / devices)
    options: Any = {"scale": scale, "softcap": softcap, "head_major": head_major}
    run = functools.partial(_blocks, **options)
    arrays = (query, keys, values, mask, key_scales, value_scales)
    if mask.shape[-1] <= largest(TPU_BLOCK_BYTES):
        return attend_part(*arrays, **options)
    return jax.lax.platform_dependent(
        *arrays,
        tpu=functools.partial(run, largest=largest(TPU_BLOCK_BYTES)),
        default=functools.partial(run, largest=largest(BLOCK_BYTES)),
    )


def _largest(of_a_key: float, most: int) -> int:
    """How many keys are in a block, where each has so many bytes of scores on a device."""
    return max(BLOCK_KEYS, int(most / max(1, of_a_key)) // LANES * LANES)


def in_turns(
    run: Callable[[Array, Any], Array],
    query: Float[Array, "P A m H C"],
    held: Any,
    split: Split = UNSPLIT,
) -> Float[Array, "P A m H C"]:
    """`run(query, held)`, on TPUs of a few slots after another where the scores of all are many.

    Slots know nothing of each other. The arrays of `held` have P of them in front, or one that
    stands for all; `split` says over how many devices P lies. A device takes as many of its own
    slots in a turn as `TPU_TURN_BYTES` allows.
    """
    together = _together(query.shape, split)
    if together * split.slots == len(query):
        return run(query, held)
    turned = functools.partial(_turned, run, split=split, together=together)
    return jax.lax.platform_dependent(query, held, tpu=turned, default=run)


def _together(shape: tuple[int, ...], split: Split) -> int:
    """How many of its own slots a TPU takes in a turn, of queries [P A m H C]."""
    slots, groups, count, heads, _ = shape
    own = slots // split.slots
    of_a_slot = 4 * BLOCK_KEYS * groups * count * heads / split.heads
    if own * of_a_slot <= 2 * TPU_TURN_BYTES:
        return own
    most = max(1, int(TPU_TURN_BYTES / of_a_slot))
    return max(n for n in range(1, own + 1) if own % n == 0 and n <= most)


def goes_in_blocks(query: Float[Array, "P A m H C"], keys: int, split: Split = UNSPLIT) -> bool:
    """Whether TPUs read so many keys block by block, in the turns of `in_turns`."""
    _, groups, count, heads, _ = query.shape
    of_a_key = 4 * _together(query.shape, split) * groups * count * heads / split.heads
    return keys > _largest(of_a_key, TPU_BLOCK_BYTES)


def _turned(
    run: Callable[[Array, Any], Array], query: Array, held: Any, *, split: Split, together: int
) -> Array:
    slots = query.shape[0]
    own = slots // split.slots

    def cut(x: Array, at: Array) -> Array:
        if x.shape[0] != slots:
            return x
        # Cut along an axis that no mesh splits.
        x = x.reshape(split.slots, own, *x.shape[1:])
        x = jax.lax.dynamic_slice_in_dim(x, at * together, together, 1)
        return x.reshape(split.slots * together, *x.shape[2:])

    def turn(at: Array, done: Array) -> Array:
        mixed = run(*jax.tree.map(lambda x: cut(x, at), (query, held)))
        mixed = mixed.reshape(split.slots, together, *mixed.shape[1:])
        return jax.lax.dynamic_update_slice_in_dim(done, mixed, at * together, 1)

    shape = jax.eval_shape(run, query, held)
    start = jnp.zeros((split.slots, own, *shape.shape[1:]), shape.dtype)
    return jax.lax.fori_loop(0, own // together, turn, start).reshape(shape.shape)


def _blocks(
    query: Array, keys: Array, values: Array, mask: Array, *scales: Any, largest: int, **how: Any
) -> Partial:
    """`attend_part` of the same arrays and options, at most `largest` keys at a time."""
    total, axes = mask.shape[-1], (4, 3) if how["head_major"] else (2, 2)
    if total <= largest:
        return attend_part(query, keys, values, mask, *scales, **how)
    blocks = -(-total // largest)
    # Of one size, since the body of a loop has one shape, and of whole tiles.
    size = -(-total // (blocks * LANES)) * LANES

    def block(at: Array, seen: Partial) -> Partial:
        # The last one reaches back, over keys that were seen.
        start = jnp.minimum(at * size, total - size)

        def cut(x: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, size, axis)

        # Cut before use: compilers would read all keys ahead, for every block.
        own: Any = jax.lax.optimization_barrier(tuple(map(cut, (keys, values), axes)))
        own_scales: Any = [None if x is None else cut(x, 2) for x in scales]
        new = cut(mask, 3) & (start + jnp.arange(size) >= at * size)
        part = (*own, new, *own_scales)
        return join([seen, attend_part(query, *part, **how)])

    return jax.lax.fori_loop(0, blocks, block, unseen(query))


def _of_keys(scales: Float[Array, "P A J G 1"]) -> Float[Array, "P A G 1 1 J"]:
    """Scales of keys as factors of their scores [P, A, G, m, h, J]."""
    return jnp.moveaxis(scales[..., 0], 2, 3)[:, :, :, None, None, :]


def unseen(like: Float[Array, "P A m H C"]) -> Partial:
    """The partial of queries that see no key of a part; it merges with weight zero."""
    zeros = jnp.zeros(like.shape, jnp.float32)
    return Partial(zeros, zeros[..., 0], zeros[..., 0] + MASKED)


def concatenate(partials: Sequence[Partial], axis: int) -> Partial:
    """Partials of different queries side by side along one of the leading axes."""
    return jax.tree.map(lambda *own: jnp.concatenate(own, axis), *partials)


def join(partials: Sequence[Partial]) -> Partial:
    """The partial over the union of the parts' keys, by log-sum-exp."""
    maximum = partials[0].maximum
    for partial in partials[1:]:
        maximum = jnp.maximum(maximum, partial.maximum)
    factors = [jnp.exp(partial.maximum - maximum) for partial in partials]
    pairs = list(zip(factors, partials, strict=True))
    zero = jnp.zeros((), jnp.float32)
    total = sum((factor * partial.total for factor, partial in pairs), zero)
    weighted = sum((factor[..., None] * partial.weighted for factor, partial in pairs), zero)
    return Partial(weighted, total, maximum)


def merge(partials: Sequence[Partial]) -> Float[Array, "P A m H C"]:
    """Softmax attention over the union of the parts' keys, float32.

    Every query must see at least one key in one of the parts.
    """
    whole = partials[0] if len(partials) == 1 else join(partials)
    return whole.weighted / whole.total[..., None]
