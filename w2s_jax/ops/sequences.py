"""Attention of whole sequences over themselves: by a device's own kernel, or by scores of all keys.

Kernels hold neither scores nor a mask: splash attention (Pallas) on TPUs, cuDNN on CUDA devices,
each on its share of a mesh. Which version runs is chosen where a program is lowered.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from w2s_jax.ops import tpu
from w2s_jax.ops.attention import attend_part, merge
from w2s_jax.ops.sharding import ON_ONE_DEVICE, Placement

SHORTEST = 128
"""Sequences of fewer tokens have few scores, and a kernel's blocks would be mostly empty."""
BLOCKS = (512, 256, 128)
"""Sides of a kernel's blocks of queries and of keys, in tokens; all multiples of a TPU's 128 lanes.

Not tuned on a device: larger ones read keys less often, and fit the vector memory at C = 256 too.
"""

CHUNK, CHUNKS = 128, 8
"""Without a kernel, queries go through in at most so many chunks, of so many tokens at least.

Each chunk computes scores of the keys up to its end: of long sequences little more than half.
"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reach:
    """What the tokens of whole sequences see: themselves and what stands before them.

    windows: the last how many tokens, their own among them (None: all); `chosen`, a scalar index,
    picks one where there are several. text [P A X] is False on padding, on either side, which is
    not seen. segments [P A X] numbers packed documents; each sees itself alone. placement says how
    P, the rows of a batch, and heads are split.
    """

    windows: tuple[int | None, ...] = field(default=(None,), metadata={"static": True})
    chosen: Array | None = None
    text: Array | None = None
    segments: Array | None = None
    placement: Placement = field(default=ON_ONE_DEVICE, metadata={"static": True})

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


# The rule of the gradient is ours, and not that of the choice between platforms: what that would
# save for the backward pass is what the version of any platform saves, all scores among it.
@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_sequence(
    query: Float[Array, "P A X H C"],
    keys: Float[Array, "P A X G C"],
    values: Float[Array, "P A X G C"],
    reach: Reach,
    scale: float | int,
    softcap: float | None = None,
) -> Float[Array, "P A X H C"]:
    """Float32 attention of whole sequences over themselves, as `merge` of one `attend_part`.

    The gradient keeps no weights: of its own it saves the result and two numbers a query, and
    scores are computed again, as in FlashAttention (arXiv 2205.14135 algorithm 4). Which version
    runs is chosen where the program is lowered: TPUs and CUDA devices have kernels that hold no
    scores and no mask; elsewhere, and for short sequences, scores of all keys at once.
    """
    return _forward(query, keys, values, reach, scale, softcap, differentiated=False)[0]


Kernel = Callable[..., Array]
"""(query [P A X H C], keys and values [P A X G C], reach) -> what they attend to, as query."""


def _forward(
    query: Array,
    keys: Array,
    values: Array,
    reach: Reach,
    scale: float | int,
    softcap: float | None,
    *,
    differentiated: bool = True,
) -> tuple[Array, tuple]:
    def by_kernel(kernel: Kernel, *arrays: Array) -> tuple[Array, Array]:
        # As in `_backward`, so that a compiler sees the same call twice.
        attend = partial(kernel, reach=reach)
        out = jax.vjp(attend, *arrays)[0] if differentiated else attend(*arrays)
        return out.astype(jnp.float32), jnp.zeros(out.shape[:-1], jnp.float32)

    def by_scores(query: Array, keys: Array, values: Array) -> tuple[Array, Array]:
        mask, found = reach.mask(query.shape[2]), []
        for own, seen in _spans(query.shape[2]):
            cut = (query[:, :, own], keys[:, :, seen], values[:, :, seen], mask[:, :, own, seen])
            part = attend_part(*cut, scale=scale, softcap=softcap)
            found.append((merge([part]), part.maximum + jnp.log(part.total)))
        out, normaliser = (jnp.concatenate(rows, 2) for rows in zip(*found, strict=True))
        return out, normaliser

    run = _dispatch(by_kernel, by_scores, kernels(query, keys, values, reach, scale, softcap))
    out, normaliser = run(query, keys, values)
    return out, (query, keys, values, reach, out, normaliser)


def _backward(
    scale: float | int, softcap: float | None, residuals: tuple, slope: Array
) -> tuple[Array | None, ...]:
    query, keys, values, reach, out, normaliser = residuals

    # What a kernel saves is its own affair, so it runs again. Beside a rematerialised pass the two
    # calls become one; without remat these are two matmuls more, beside nine.
    def by_kernel(kernel: Kernel, *arrays: Array) -> tuple[Array, ...]:
        *given, slope = arrays
        _, pull = jax.vjp(partial(kernel, reach=reach), *given)
        return pull(slope.astype(given[0].dtype))

    def by_scores(query: Array, keys: Array, values: Array, slope: Array) -> tuple[Array, ...]:
        length, pulled = query.shape[2], []
        mask = reach.mask(length)
        for own, seen in _spans(length):
            rows = query[:, :, own], keys[:, :, seen], values[:, :, seen], mask[:, :, own, seen]
            saved = (*rows, out[:, :, own], normaliser[:, :, own])
            by_query, *others = _pull_scores(saved, slope[:, :, own], scale=scale, softcap=softcap)
            later = [(0, 0)] * 2 + [(0, length - others[0].shape[2])] + [(0, 0)] * 2
            pulled.append((by_query, *(jnp.pad(x, later) for x in others)))
        queries, *seen_by = zip(*pulled, strict=True)
        found = jnp.concatenate(queries, 2), *(reduce(jnp.add, xs) for xs in seen_by)
        given = query, keys, values
        return tuple(x.astype(like.dtype) for x, like in zip(found, given, strict=True))

    run = _dispatch(by_kernel, by_scores, kernels(query, keys, values, reach, scale, softcap))
    return (*run(query, keys, values, slope), None)


attend_sequence.defvjp(_forward, _backward)


def _dispatch(
    by_kernel: Callable[..., tuple[Array, ...]],
    by_scores: Callable[..., tuple[Array, ...]],
    found: Mapping[str, Kernel],
) -> Callable[..., tuple[Array, ...]]:
    """By the kernel of the platform that the program is lowered for, where it takes the case."""
    if not found:
        return by_scores
    branches = {platform: partial(by_kernel, kernel) for platform, kernel in found.items()}
    return partial(jax.lax.platform_dependent, default=by_scores, **branches)


def _spans(length: int) -> list[tuple[slice, slice]]:
    """Which queries go together where all scores are computed, and the keys that they may see."""
    chunk = max(CHUNK, -(-length // CHUNKS))
    return [
        (slice(start, start + chunk), slice(0, start + chunk)) for start in range(0, length, chunk)
    ]


def _pull_scores(
    residuals: tuple, slope: Array, *, scale: float | int, softcap: float | None
) -> tuple[Array, Array, Array]:
    """The float32 gradients by query, keys and values, from scores that are computed again."""
    query, keys, values, mask, out, normaliser = residuals
    slots, groups, count, heads, width = query.shape
    shape = (slots, groups, count, keys.shape[3], heads // keys.shape[3])
    grouped, slope, out = (x.reshape(*shape, width) for x in (query, slope, out))
    normaliser = normaliser.reshape(shape)
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = dot("pamghc,pajgc->paghmj", grouped, keys) * scale
    capped = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    seen = mask[:, :, None, None]
    shift = jnp.moveaxis(normaliser, 2, 4)[..., None]
    weights = jnp.where(seen, jnp.exp(capped - shift), 0.0)
    mean = jnp.moveaxis((slope * out).sum(-1), 2, 4)[..., None]
    slope = slope.astype(values.dtype)
    by_values = dot("paghmj,pamghc->pajgc", weights.astype(values.dtype), slope)
    by_scores = weights * (dot("pamghc,pajgc->paghmj", slope, values) - mean) * scale
    if softcap is not None:
        by_scores = by_scores * (1.0 - jnp.square(capped / softcap))
    by_scores = by_scores.astype(keys.dtype)
    by_query = dot("paghmj,pajgc->pamghc", by_scores, keys).reshape(query.shape)
    by_keys = dot("paghmj,pamghc->pajgc", by_scores, grouped)
    return by_query, by_keys, by_values


def kernels(
    query: Array,
    keys: Array,
    values: Array,
    reach: Reach,
    scale: float | int,
    softcap: float | None = None,
) -> Mapping[str, Kernel]:
    """The kernels that take such a case, by the platform that has them; none for short sequences.

    TPUs multiply bfloat16, and float32 as the precision that is set says; `ops.tpu.switched_on`
    says whether they are offered theirs. cuDNN must be at hand to be asked, so it is offered only
    where CUDA devices are; it knows no soft-cap and no segments, takes 16-bit numbers, and heads
    whose width is a multiple of 8.
    """
    length, width = query.shape[2], query.shape[-1]
    if length < SHORTEST or len({query.dtype, keys.dtype, values.dtype}) > 1:
        return {}
    found: dict[str, Kernel] = {}
    if query.dtype in (jnp.bfloat16, jnp.float32) and tpu.switched_on():
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
    """Splash attention, by Pallas for TPUs; shapes as `Kernel`.

    Padding is a segment of its own: what stands there sees other padding, where `Reach.mask` lets
    it see text. Sequences that no block divides are filled up; nothing sees what is filled in. With
    `interpret` it runs on any device, slowly.
    """
    segments = reach.segments if reach.text is None else reach.text.astype(jnp.int32)
    length = query.shape[2]
    block, missing = blocks_of(length)

    def attend(rows: list[Array], segments: Array | None, choose: Callable[..., Array]) -> Array:
        rows = [fill(x, missing).swapaxes(1, 2) for x in rows]
        rows[0] = (rows[0] * scale).astype(query.dtype)
        ids = None if segments is None else fill(segments, missing)
        run = partial(attend_rows, block=block, softcap=softcap, interpret=interpret)
        return choose(run, *rows, ids).swapaxes(1, 2)[:, :length]

    return _on_shares(attend, query, keys, values, segments, reach)


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
        window: The last how many tokens are seen; None for all.
        block: Of `BLOCKS`.
        softcap: Of the scores.
        interpret: Runs on any device, slowly.

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

    def run(*rows: Array, window: int | None) -> Array:
        return jax.nn.dot_product_attention(
            *rows,
            scale=float(scale),
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=implementation,
        )

    def attend(rows: list[Array], text: Array | None, choose: Callable[..., Array]) -> Array:
        if text is None:
            return choose(run, *rows)
        order = jnp.argsort(~text, axis=1, stable=True)
        sort = partial(jnp.take_along_axis, axis=1)
        out = choose(run, *(sort(x, order[..., None, None]) for x in rows))
        return sort(out, jnp.argsort(order, axis=1)[..., None, None])

    return _on_shares(attend, query, keys, values, reach.text, reach)


def _has_cudnn_attention() -> bool:
    """Whether programs traced here may ask cuDNN: it looks at the devices while they are."""
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return "." in capability and float(capability) >= 8.0


def _on_shares(
    attend: Callable[..., Array],
    query: Array,
    keys: Array,
    values: Array,
    marks: Array | None,
    reach: Reach,
) -> Array:
    """Every device on its own rows and heads: no compiler can split a kernel.

    A device reads the key/value heads of its queries. Where it shares one with other devices, each
    has a copy; the sum over copies, in a gradient, is then the compiler's.

    marks: [P A X], of every token, or None. attend: (rows [B X H C] of queries, keys and values;
    marks [B X]; what calls a function of rows and a window with the window that is chosen) -> rows.
    """

    def of_rows(
        query: Array, keys: Array, values: Array, marks: Array | None, chosen: Array | None
    ) -> Array:
        def choose(run: Callable[..., Array], *arrays: Array | None) -> Array:
            branches = [partial(run, window=window) for window in reach.windows]
            if chosen is None:
                return branches[0](*arrays)
            return jax.lax.switch(chosen, branches, *arrays)

        rows = [x.reshape(-1, *x.shape[2:]) for x in (query, keys, values)]
        marks = None if marks is None else marks.reshape(-1, marks.shape[-1])
        return attend(rows, marks, choose).reshape(query.shape)

    mesh, rules = reach.placement.mesh, reach.placement.rules
    if mesh is None:
        return of_rows(query, keys, values, marks, reach.chosen)
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
    marks_spec = PartitionSpec(by_rows or None)
    shared: Any = jax.shard_map(
        of_rows,
        mesh=mesh,
        in_specs=(spec, spec, spec, marks_spec, PartitionSpec()),
        out_specs=spec,
        check_vma=False,
    )
    return shared(query, keys, values, marks, reach.chosen)


def _dividing(axes: tuple[str, ...], size: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Those of the axes that a mesh has, if together they divide the size; else none."""
    held = tuple(axis for axis in axes if axis in sizes)
    return () if size % math.prod(sizes[axis] for axis in held) else held
