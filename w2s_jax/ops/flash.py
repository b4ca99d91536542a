"""Attention of whole sequences by a device's own kernels, which hold neither scores nor a mask.

Splash attention (Pallas) on TPUs, cuDNN on CUDA devices, each on its share of a mesh. Which version
runs, and the one without a kernel, is in `attention.py`.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool

from w2s_jax.ops.sharding import ON_ONE_DEVICE, Placement
from w2s_jax.pytrees import pytree

SHORTEST = 128
"""Sequences of fewer tokens have few scores, and a kernel's blocks would be mostly empty."""
BLOCKS = (512, 256, 128)
"""Sides of a kernel's blocks of queries and of keys, in tokens; all multiples of a TPU's 128 lanes.

Not tuned on a device: larger ones read keys less often, and fit the vector memory at C = 256 too.
"""


@pytree(static=("windows", "placement"))
class Reach:
    """What the tokens of whole sequences see: themselves and what stands before them.

    windows: the last how many tokens, their own among them (None: all); `chosen`, a scalar index,
    picks one where there are several. text [P A X] is False on padding, on either side, which is
    not seen. segments [P A X] numbers packed documents; each sees itself alone. placement says how
    P, the rows of a batch, and heads are split.
    """

    windows: tuple[int | None, ...] = (None,)
    chosen: Array | None = None
    text: Array | None = None
    segments: Array | None = None
    placement: Placement = ON_ONE_DEVICE

    def mask(self, length: int) -> Bool[Array, "#P #A X X"]:
        """True where a query (third axis) sees a key (fourth)."""
        query, key = jnp.arange(length)[:, None], jnp.arange(length)
        seen = key <= query
        if len(self.windows) > 1:
            reach = jnp.asarray([length if one is None else one for one in self.windows])
            seen = seen & (key > query - reach[self.chosen])
        elif self.windows[0] is not None:
            seen = seen & (key > query - self.windows[0])
        seen = seen[None, None]
        if self.text is not None:
            seen = seen & self.text[..., None, :]
        if self.segments is not None:
            seen = seen & (self.segments[..., :, None] == self.segments[..., None, :])
        return seen


Kernel = Callable[..., Array]
"""(query [P A X H C], keys and values [P A X G C], reach) -> what they attend to, as query."""


def kernels(
    query: Array,
    keys: Array,
    values: Array,
    reach: Reach,
    scale: float | int,
    softcap: float | None = None,
) -> Mapping[str, Kernel]:
    """The kernels that take such a case, by the platform that has them; none for short sequences.

    TPUs multiply bfloat16, and float32 as the precision that is set says. cuDNN must be at hand to
    be asked, so it is offered only where CUDA devices are; it knows no soft-cap and no segments,
    takes 16-bit numbers, and heads whose width is a multiple of 8.
    """
    length, width = query.shape[2], query.shape[-1]
    if length < SHORTEST or len({query.dtype, keys.dtype, values.dtype}) > 1:
        return {}
    found: dict[str, Kernel] = {}
    if query.dtype in (jnp.bfloat16, jnp.float32):
        found["tpu"] = partial(splash, scale=scale, softcap=softcap)
    small = query.dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 128
    if small and softcap is None and reach.segments is None and _has_cudnn_attention():
        found["cuda"] = partial(cudnn, scale=scale)
    return found


def splash(
    query: Array,
    keys: Array,
    values: Array,
    reach: Reach,
    *,
    scale: float | int,
    softcap: float | None = None,
    interpret: bool = False,
) -> Array:
    """Splash attention, by Pallas for TPUs; shapes as `Kernel`. interpret: on any device, slowly.

    Padding is a segment of its own: what stands there sees other padding, where `Reach.mask` lets
    it see text. Sequences that no block divides are filled up; nothing sees what is filled in.
    """
    segments = reach.segments
    if reach.text is not None:
        segments = reach.text.astype(jnp.int32)
    length = query.shape[2]
    block, missing = _blocks(length)

    def attend(
        query: Array, keys: Array, values: Array, segments: Array | None, chosen: Array | None
    ) -> Array:
        folded = [_fill(_rows(x), missing).swapaxes(1, 2) for x in (query, keys, values)]
        folded[0] = (folded[0] * scale).astype(query.dtype)
        ids = None if segments is None else _fill(_rows(segments), missing)
        run = partial(_splash_rows, block=block, softcap=softcap, interpret=interpret)
        branches = [partial(run, window=window) for window in reach.windows]
        given = (*folded, ids)
        out = branches[0](*given) if chosen is None else jax.lax.switch(chosen, branches, *given)
        return out.swapaxes(1, 2)[:, :length].reshape(query.shape)

    return _on_shares(attend, query, keys, values, segments, reach)


def _splash_rows(
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
    """The kernel over rows: query [B H X C], keys and values [B G X C], segments [B X]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, heads, length, _ = query.shape
    shape = (length, length)
    one: Any = masks.CausalMask(shape)
    if window is not None and window < length:
        one = masks.LocalMask(shape, (window - 1, 0), 0)
    kernel = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([one] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    if segments is None:
        return jax.vmap(kernel)(query, keys, values)
    return jax.vmap(kernel)(query, keys, values, kernels.SegmentIds(segments, segments))


def cudnn(
    query: Array,
    keys: Array,
    values: Array,
    reach: Reach,
    *,
    scale: float | int,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:
    """cuDNN's flash attention; shapes as `Kernel`. It reads no segments and no soft-cap.

    It masks no padding on the left without a bias of X × X numbers. So text is moved to the front,
    where, with causality, no text sees padding.
    """

    def attend(
        query: Array, keys: Array, values: Array, text: Array | None, chosen: Array | None
    ) -> Array:
        folded = [_rows(x) for x in (query, keys, values)]
        order = None if text is None else jnp.argsort(_rows(~text), axis=1, stable=True)
        if order is not None:
            folded = [jnp.take_along_axis(x, order[..., None, None], axis=1) for x in folded]

        def run(window: int | None, query: Array, keys: Array, values: Array) -> Array:
            return jax.nn.dot_product_attention(
                query,
                keys,
                values,
                scale=float(scale),
                is_causal=True,
                local_window_size=None if window is None else (window - 1, 0),
                implementation=implementation,
            )

        branches = [partial(run, window) for window in reach.windows]
        out = branches[0](*folded) if chosen is None else jax.lax.switch(chosen, branches, *folded)
        if order is not None:
            back = jnp.argsort(order, axis=1)
            out = jnp.take_along_axis(out, back[..., None, None], axis=1)
        return out.reshape(query.shape)

    return _on_shares(attend, query, keys, values, reach.text, reach)


def _has_cudnn_attention() -> bool:
    """Whether programs traced here may ask cuDNN: it looks at the devices while they are."""
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return "." in capability and float(capability) >= 8.0


def _blocks(length: int) -> tuple[int, int]:
    """The side of a block, and how many tokens are missing to a multiple of it."""
    short = [-length % block for block in BLOCKS]
    fitting = [at for at, missing in enumerate(short) if 8 * missing <= length]
    at = fitting[0] if fitting else len(BLOCKS) - 1
    return BLOCKS[at], short[at]


def _rows(x: Array) -> Array:
    """[P A X ...] as rows [B X ...]."""
    return x.reshape(-1, *x.shape[2:])


def _fill(x: Array, missing: int) -> Array:
    """Rows [B X ...] with so many more tokens of zeros, in segment 0 as padding is."""
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x


def _on_shares(
    attend: Callable[..., Array],
    query: Array,
    keys: Array,
    values: Array,
    rows: Array | None,
    reach: Reach,
) -> Array:
    """Every device on its own rows and heads: no compiler can split a kernel.

    A device reads the key/value heads of its queries. Where it shares one with other devices, each
    has a copy; the sum over copies, in a gradient, is then the compiler's.
    """
    mesh, rules = reach.placement.mesh, reach.placement.rules
    if mesh is None:
        return attend(query, keys, values, rows, reach.chosen)
    heads, kv_heads = query.shape[3], keys.shape[3]
    by_heads = _dividing(rules.targets("heads", heads, mesh.shape), heads, mesh.shape)
    batch = rules.targets("batch", query.shape[0], mesh.shape)
    batch = tuple(axis for axis in batch if axis not in by_heads)
    by_rows = _dividing(batch, query.shape[0], mesh.shape)
    parts = math.prod(mesh.shape[axis] for axis in by_heads)
    if kv_heads % parts:
        copies = math.lcm(kv_heads, parts) // kv_heads
        copies = copies if not heads % (copies * kv_heads) else heads // kv_heads
        keys, values = (jnp.repeat(x, copies, axis=3) for x in (keys, values))
    spec = PartitionSpec(by_rows or None, None, None, by_heads or None, None)
    row_spec = PartitionSpec(by_rows or None)
    shared: Any = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(spec, spec, spec, row_spec, PartitionSpec()),
        out_specs=spec,
        check_vma=False,
    )
    return shared(query, keys, values, rows, reach.chosen)


def _dividing(axes: tuple[str, ...], size: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Those of the axes that a mesh has, if together they divide the size; else none."""
    held = tuple(axis for axis in axes if axis in sizes)
    return () if size % math.prod(sizes[axis] for axis in held) else held
