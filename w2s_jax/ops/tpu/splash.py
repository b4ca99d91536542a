"""Splash attention: Pallas' kernel for whole sequences, which holds neither scores nor a mask."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

BLOCKS = (512, 256, 128)
"""Sides of a kernel's blocks of queries and of keys, in tokens; all multiples of a TPU's 128 lanes.

Not tuned on a device: larger ones read keys less often, and fit the vector memory at C = 256 too.
"""


def attend_rows(
    query: Array,
    keys: Array,
    values: Array,
    segments: Array | None,
    *,
    window: int | None,
    block: int,
    softcap: float | None,
    interpret: bool,
) -> Array:
    """Causal attention of rows over themselves.

    Args:
        query: [B H X C], multiplied by the scale already: the kernel has no scale of its own.
        keys: [B G X C]. X is a multiple of `block`: the kernel cuts no last block short.
        values: [B G X C].
        segments: [B X], of which each sees itself alone; None where there is one.
        window: the last how many tokens are seen; None for all.
        block: of `BLOCKS`.
        softcap: of the scores.
        interpret: runs on any device, slowly.

    Returns:
        What they attend to, as `query`.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, heads, length, _ = query.shape
    shape = (length, length)
    # Masks by their rule, never as numbers: blocks of which nothing is seen are left out.
    one: Any = masks.CausalMask(shape)
    if window is not None and window < length:
        one = masks.LocalMask(shape, (window - 1, 0), 0)
    # One side for the forward pass and both of the gradient's, since none was tuned on a device.
    sides = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
    blocks: Any = {f"block_{side}": block for side in sides}
    kernel = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([one] * heads),
        block_sizes=kernels.BlockSizes(**blocks),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    if segments is None:
        return jax.vmap(kernel)(query, keys, values)
    return jax.vmap(kernel)(query, keys, values, kernels.SegmentIds(segments, segments))


def blocks_of(length: int) -> tuple[int, int]:
    """The side of a block, and how many tokens are missing to a multiple of it.

    The largest that at most an eighth of the length is filled up for: what is filled in is computed
    with, so that a short sequence in long blocks would cost more than the blocks save.
    """
    short = [-length % block for block in BLOCKS]
    fitting = [at for at, missing in enumerate(short) if 8 * missing <= length]
    at = fitting[0] if fitting else len(BLOCKS) - 1
    return BLOCKS[at], short[at]


def fill(x: Array, missing: int) -> Array:
    """Rows [B X ...] with so many more tokens of zeros, in segment 0 as padding is."""
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x
