"""How the kernel over prefix, committed response and chunk cuts them, and the memory that takes."""

from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array

LANES, SUBLANES = 128, 16
"""Sides of a tile of bfloat16 numbers."""
KEYS, BLOCK, SCORES = 512, (2**19, 2**21), 2**21
"""Keys of a block: so many, but within these bytes of keys and values, and these of scores.

With fewer bytes what a step takes besides, some 400 cycles, would be longer than they take to come.
With more, two blocks (the one that is read and the one that is coming), and scores beside them,
would leave the vector memory no room for the sums of all hypotheses.
"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Part:
    """Keys and values that new tokens see: [P J G C], or [P W J G C], of one layer or of all.

    lengths: how many from the first are seen, int32 [P], or [P W]; None where a mask tells. Keys
    and values with scales, float32 [.. J G 1] of the layer that runs, are int8.
    """

    keys: Array
    values: Array
    lengths: Array | None = None
    key_scales: Array | None = None
    value_scales: Array | None = None


@dataclass(frozen=True)
class Sizes:
    """What the kernel goes through for a slot, on one device.

    width: hypotheses, W; queries: of a hypothesis for a key/value head, M · H/G, H/G filled up;
    rows: the same in whole tiles; kv_heads: G; prefix, committed: keys J, keys of a block, and
    blocks; own: keys X in whole tiles.
    """

    width: int
    queries: int
    rows: int
    kv_heads: int
    prefix: tuple[int, int, int]
    committed: tuple[int, int, int]
    own: int

    @property
    def steps(self) -> int:
        """Blocks of the prefix, of every hypothesis' response, and all own tokens."""
        return self.prefix[2] + self.width * self.committed[2] + 1


def by_heads(kv_heads: int, dtype: Any) -> bool:
    """Whether a compiler lays keys [J G C] head by head: so many heads leave gaps in a tile."""
    is_small_tile = kv_heads in (2, 4) and kv_heads * dtype.itemsize % 4 == 0
    return kv_heads % 8 > 0 and not is_small_tile


def sizes_of(query: Array, prefix: Part, committed: Part, own: int, parts: int = 1) -> Sizes:
    """The sizes of queries [P W M H C] and X own keys, where so many devices share the heads."""
    _, width, count, heads, size = query.shape
    kv_heads = prefix.keys.shape[-2]
    queries = count * filled(heads // kv_heads)
    # Whole tiles of float32, so that every hypothesis' sums begin with one.
    rows = up(queries, SUBLANES // 2)
    kv_heads = kv_heads // parts

    def blocks(part: Part, rows: int) -> tuple[int, int, int]:
        keys = part.keys.shape[-3]
        a_key = 2 * kv_heads * size * part.keys.dtype.itemsize
        longest = min(max(KEYS, BLOCK[0] // a_key), BLOCK[1] // a_key, SCORES // (4 * rows))
        # Of whole tiles, since keys are lanes of scores; one block where there are fewer keys, as
        # more than there is of an array cannot be fetched.
        block = min(max(LANES, longest // LANES * LANES), keys)
        return keys, block, -(-keys // block)

    # All hypotheses read the prefix at once.
    first, second = blocks(prefix, width * rows), blocks(committed, rows)
    return Sizes(width, queries, rows, kv_heads, first, second, up(own, SUBLANES))


def room(sizes: Sizes, head_width: int, itemsize: int, kept: int) -> int:
    """Bytes of vector memory: queries, sums, scores, and twice what comes and goes.

    Args:
        sizes: Of the blocks.
        head_width: C.
        itemsize: Bytes of a number of the queries.
        kept: Bytes of a number of keys and values.
    """
    rows = sizes.width * sizes.kv_heads * sizes.rows
    sums = 4 * rows * (2 * head_width + 2 * LANES)
    ends = 2 * 2 * rows * head_width * itemsize
    blocks = (sizes.prefix[1], sizes.committed[1])
    numbers = 2 * sizes.kv_heads * head_width
    held = 2 * (sum(blocks) + sizes.width * sizes.own) * numbers * kept
    own = up(sizes.own, LANES)
    mask = 2 * 4 * sizes.rows * own
    # Besides as they lie, keys and values stand head by head, and scores as weights.
    scores = max(sizes.width * sizes.rows * blocks[0], sizes.rows * max(blocks[1], own))
    again = (max(blocks) + sizes.own) * numbers * itemsize + 4 * 4 * scores
    return sums + ends + held + mask + again


def filled(heads: int) -> int:
    """Query heads of a key/value head, filled up to a power of two: tiles hold those best."""
    return 1 << (heads - 1).bit_length()


def up(size: int, step: int) -> int:
    """The next multiple of a step."""
    return -(-size // step) * step
