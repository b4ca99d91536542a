"""Distributions over the vocabulary from logits: drawing tokens, and log-probs of given ones.

Draws are from explicit keys. Log-probs are float32, and keep no more of the vocabulary than needed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from w2s_jax.errors import InputError, check_fields


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; filters apply in the order temperature, top-k, top-p.

    temperature 0 is greedy, whatever top_k and top_p; top_k 0 and top_p 1 keep every token.
    InputError for values outside these ranges.
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
        noisy = partial(jax.random.gumbel, shape=(width,), dtype=jnp.float32)
        noise = jax.vmap(noisy)(keys.reshape(-1))
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


def token_logprobs(
    logits: Float[Array, "*#rows V"], tokens: Int[Array, "*#rows"]
) -> Float[Array, "*rows"]:
    """log softmax(logits)[token] in float32, without the normalised [.., V] array.

    Rows broadcast: several tokens may be looked up in one row of logits. NaN, for every token,
    where the logits are no distribution (see `normalised`).
    """
    wide = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(wide, tokens[..., None], axis=-1)[..., 0]
    return normalised(chosen, jax.nn.logsumexp(wide, axis=-1))


def normalised(logits: Float[Array, "*#rows"], normaliser: Float[Array, "*#rows"]) -> Array:
    """Log-probabilities: logits less the log of their normaliser, NaN where that is not finite.

    It is not where a logit is NaN or +inf, or where all are −inf. Some may be −inf: their tokens
    have probability 0, and it would not be told from a normaliser of +inf.
    """
    return jnp.where(jnp.isfinite(normaliser), logits - normaliser, jnp.nan)


def blocked_token_logprobs(
    hidden: Float[Array, "groups rows D"],
    targets: Int[Array, "groups rows n"],
    head: Callable[[Array], Array],
    *,
    block: int,
) -> Float[Array, "groups rows n"]:
    """Log-probabilities of n targets after each hidden state, as `token_logprobs` has them.

    `head` maps [.. m D] to float32 logits [.. m V]; of each group at most `block` rows of logits
    are alive at a time, so that groups that lie on devices of their own stay there.
    """

    def score(hidden: Array, targets: Array) -> Array:
        logits = head(hidden)
        normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return normalised(jnp.take_along_axis(logits, targets, axis=-1), normaliser)

    groups, rows, width = targets.shape
    if rows <= block:
        return score(hidden, targets)
    blocks = -(-rows // block)

    def cut(array: Array) -> Array:
        padded = jnp.pad(array, ((0, 0), (0, blocks * block - rows), (0, 0)))
        return jnp.moveaxis(padded.reshape(groups, blocks, block, -1), 1, 0)

    found = jax.lax.map(lambda pair: score(*pair), (cut(hidden), cut(targets)))
    return jnp.moveaxis(found, 0, 1).reshape(groups, -1, width)[:, :rows]


@dataclass(frozen=True)
class Spread:
    """How the logits of a block lie on a mesh: by which of its axes rows and vocabulary are split.

    Groups of rows lie on the mesh axes `batch`. Those of them that are not among `rows` have the
    rows of a block gathered, so that each device has its part of the vocabulary for all of them:
    no logits, and no gradient of the kernel, are summed over devices in the loop over blocks.
    """

    mesh: Mesh | None = None
    batch: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()

    @property
    def parts(self) -> int:
        """Into how many parts the logits of a block are split."""
        return self._size(self.rows) * self._size(self.vocab)

    @property
    def row_parts(self) -> int:
        """Into how many parts the rows of a block are split."""
        return self._size(self.rows)

    def own(self, rows: Array) -> Array:
        """[G ..] with every group on devices of its own."""
        return self._hold(rows, self.batch)

    def gathered(self, rows: Array) -> Array:
        """[G ..] with groups together on the devices that share the vocabulary between them."""
        # Held in both places, or the compiler would gather all blocks to cut one of them.
        return self._hold(self.own(rows), self.rows)

    def logits(self, logits: Array) -> Array:
        """[G n V] where a block's logits lie."""
        return self._hold(logits, self.rows, (), self.vocab)

    def kernel(self, kernel: Array, vocab_axis: int) -> Array:
        """[V D] or [D V] with its vocabulary split and its width whole."""
        return self._hold(kernel, *((self.vocab,) if vocab_axis == 0 else ((), self.vocab)))

    def _size(self, axes: tuple[str, ...]) -> int:
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in axes)

    def _hold(self, x: Array, *axes: tuple[str, ...]) -> Array:
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*axes)))


@dataclass(frozen=True)
class Head:
    """How hidden states become logits, and how many rows of these are alive at a time.

    The kernel is [V D] with `vocab_axis` 0 and [D V] with 1. Logits are divided by `divisor`, and
    `softcap` c maps one, z, to c·tanh(z/c). At most `block` whole rows of float32 logits are on a
    device at any moment, and hidden states of at most `states` rows.
    """

    vocab_axis: int
    block: int
    softcap: float | None = None
    spread: Spread = Spread()
    states: int | None = None
    divisor: float = 1.0

    def blocks(self, groups: int, rows: int) -> int:
        """Into how many blocks so many rows of each group are cut."""
        most = self.block * self.spread.parts
        if self.states is not None:
            most = min(most, self.states * self.spread.row_parts)
        return -(-rows // min(rows, max(1, most // groups)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def head_logprobs(
    head: Head,
    kernel: Float[Array, "n m"],
    hidden: Float[Array, "G T D"],
    tokens: Int[Array, "G T"],
    counted: Bool[Array, "G T"],
) -> tuple[Float[Array, "G T"], Bool[Array, "G T"]]:
    """log softmax(head(hidden))[token] in float32, and whether the token has the largest logit.

    Where `counted` is False they are 0 and False, and blocks without a counted row cost nothing:
    counted rows are moved together, within each of the G groups (so that a group stays on its
    devices). The gradient, by hidden and kernel, computes the logits a second time.
    """
    order = _order(counted, head)
    kernel = head.spread.kernel(kernel, head.vocab_axis)
    hidden, tokens = order.sort(hidden, tokens)
    logprobs, hits, _ = _scores(head, kernel, hidden, tokens, order)
    return _shown(order, counted, logprobs, hits)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_head_logprobs(
    head: Head,
    kernel: Float[Array, "n m"],
    hidden: Float[Array, "G T D"],
    tokens: Int[Array, "G T"],
    weights: Float[Array, "G T"],
) -> tuple[Float[Array, ""], Float[Array, "G T"], Bool[Array, "G T"]]:
    """sum(weights · logprobs), with the log-probs and hits of `head_logprobs`, where weights ≠ 0.

    Only the sum has a gradient, by hidden and kernel. As its weights are known when the logits
    are, the gradient is made in the same pass and no logit is computed twice.
    """
    logprobs, hits = head_logprobs(head, kernel, hidden, tokens, weights != 0)
    return (weights * logprobs).sum(), logprobs, hits


class _Order(NamedTuple):
    """Counted rows first: where each row comes from and goes back to, and the blocks in use."""

    forward: Array
    back: Array
    blocks: Array
    block: int

    def sort(self, *rows: Array) -> list[Array]:
        """Rows [G T ..] in blocks' order, [G blocks·block ..]."""
        return [_take(x, self.forward) for x in rows]

    def restore(self, rows: Array) -> Array:
        """What `sort` moved, back in its place."""
        return _take(rows, self.back)

    def cut(self, block: Array, *rows: Array) -> list[Array]:
        """A block of sorted rows."""
        start = block * self.block
        return [jax.lax.dynamic_slice_in_dim(x, start, self.block, axis=1) for x in rows]


def _take(rows: Array, index: Array) -> Array:
    index = index.reshape(*index.shape, *(1,) * (rows.ndim - 2))
    return jnp.take_along_axis(rows, index, axis=1)


def _order(counted: Array, head: Head) -> _Order:
    groups, rows = counted.shape
    count = head.blocks(groups, rows)
    block = -(-rows // count)
    forward = jnp.argsort(~counted, axis=1, stable=True)
    back = jnp.argsort(forward, axis=1)
    # Filling rows repeat the last one, which is never read back.
    forward = jnp.pad(forward, ((0, 0), (0, count * block - rows)), mode="edge")
    blocks = (jnp.max(counted.sum(1)) + block - 1) // block
    return _Order(forward, back, blocks, block)


def _put(rows: Array, new: Array, block: Array) -> Array:
    start = block * new.shape[1]
    return jax.lax.dynamic_update_slice_in_dim(rows, new.astype(rows.dtype), start, axis=1)


def _head_logits(head: Head, kernel: Array, hidden: Array) -> Array:
    contract = (((hidden.ndim - 1,), (1 - head.vocab_axis,)), ((), ()))
    out = jax.lax.dot_general(hidden, kernel, contract, preferred_element_type=jnp.float32)
    out = head.spread.logits(out) / head.divisor
    return out if head.softcap is None else head.softcap * jnp.tanh(out / head.softcap)


def _read(head: Head, logits: Array, tokens: Array) -> tuple[Array, Array, Array]:
    """Log-prob of each token, whether it is the likeliest, and the log of the normaliser."""
    top, normaliser = logits.max(-1), jax.nn.logsumexp(logits, axis=-1)
    if head.spread.mesh is None:
        chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    else:
        # A lookup would gather the vocabulary's parts; a sum over it is added up where it lies.
        hit = tokens[..., None] == jnp.arange(logits.shape[-1])
        chosen = jnp.where(hit, logits, 0.0).sum(-1)
    return normalised(chosen, normaliser), chosen >= top, normaliser


def _pulled(
    head: Head, kernel: Array, logits: Array, rows: Sequence[Array], out: tuple, block: Array
) -> tuple:
    """The gradients `out`, by hidden states and (or None) kernel, with those of a block in them.

    rows: its hidden states, tokens, normalisers, and the slopes of their log-probs.
    """
    by_hidden, by_kernel = out
    by_logits = _by_logits(head, logits, *rows[1:]).astype(kernel.dtype)
    by_hidden = head.spread.own(_put(by_hidden, _by_hidden(head, kernel, by_logits), block))
    if by_kernel is not None:
        by_kernel = by_kernel + _by_kernel(head, rows[0], by_logits)
    return by_hidden, by_kernel


def _by_logits(head: Head, logits: Array, tokens: Array, normaliser: Array, slope: Array) -> Array:
    """Gradient by the logits as they are multiplied, of logprobs that weigh `slope` each."""
    hit = tokens[..., None] == jnp.arange(logits.shape[-1])
    out = (slope / head.divisor)[..., None] * (hit - jnp.exp(logits - normaliser[..., None]))
    return out if head.softcap is None else out * (1.0 - jnp.square(logits / head.softcap))


def _by_hidden(head: Head, kernel: Array, slopes: Array) -> Array:
    contract = (((2,), (head.vocab_axis,)), ((), ()))
    out = jax.lax.dot_general(slopes, kernel, contract, preferred_element_type=jnp.float32)
    return head.spread.own(out)


def _by_kernel(head: Head, hidden: Array, slopes: Array) -> Array:
    """[parts D V], of every part of the rows its own share.

    Of the two orders, the one that moves the hidden states and not the slopes.
    """
    parts = head.spread.row_parts
    hidden, slopes = (x.reshape(parts, -1, x.shape[-1]) for x in (hidden, slopes))
    contract = (((1,), (1,)), ((0,), (0,)))
    out = jax.lax.dot_general(hidden, slopes, contract, preferred_element_type=jnp.float32)
    return head.spread.logits(out)


def _no_gradient(hidden: Array, head: Head, kernel: Array, trained: bool) -> Array | None:
    """Zeros to add gradients of the kernel to; None where it is not trained."""
    if not trained:
        return None
    shape = (head.spread.row_parts, hidden.shape[-1], kernel.shape[head.vocab_axis])
    return head.spread.logits(jnp.zeros(shape, jnp.float32))


def _as_kernel(head: Head, gradient: Array | None, kernel: Array) -> Array | None:
    if gradient is None:
        return None
    gradient = head.spread.kernel(gradient.sum(0), 1)
    return (gradient if head.vocab_axis else gradient.T).astype(kernel.dtype)


def _scores(
    head: Head, kernel: Array, hidden: Array, tokens: Array, order: _Order
) -> tuple[Array, Array, Array]:
    """Log-probs, hits and normalisers of sorted rows; zeros in blocks without a counted one."""

    def score(block: Array, out: tuple) -> tuple:
        states, ids = map(head.spread.gathered, order.cut(block, hidden, tokens))
        found = _read(head, _head_logits(head, kernel, states), ids)
        return tuple(_put(rows, new, block) for rows, new in zip(out, found, strict=True))

    zeros = jnp.zeros(tokens.shape, jnp.float32)
    out = (zeros, zeros.astype(bool), zeros)
    return jax.lax.fori_loop(0, order.blocks, score, out)


def _shown(order: _Order, counted: Array, logprobs: Array, hits: Array) -> tuple[Array, Array]:
    return jnp.where(counted, order.restore(logprobs), 0.0), order.restore(hits) & counted


def _logprobs_forward(
    head: Head, kernel: Any, hidden: Any, tokens: Any, counted: Any
) -> tuple[tuple[Array, Array], tuple]:
    trained = kernel.perturbed
    kernel, hidden, tokens, counted = (x.value for x in (kernel, hidden, tokens, counted))
    kernel = head.spread.kernel(kernel, head.vocab_axis)
    order = _order(counted, head)
    rows, ids = order.sort(hidden, tokens)
    logprobs, hits, normaliser = _scores(head, kernel, rows, ids, order)
    # An empty tuple or None: whether the kernel is trained is part of the residuals' structure.
    residuals = (kernel, hidden, tokens, counted, normaliser, () if trained else None)
    return _shown(order, counted, logprobs, hits), residuals


def _logprobs_backward(head: Head, residuals: tuple, slopes: tuple) -> tuple:
    kernel, hidden, tokens, counted, normaliser, trained = residuals
    slope = slopes[0]
    if isinstance(slope, SymbolicZero):
        slope = jnp.zeros(tokens.shape, jnp.float32)
    order = _order(counted, head)
    states, ids, slope = order.sort(hidden, tokens, jnp.where(counted, slope, 0.0))

    def pull(block: Array, out: tuple) -> tuple:
        rows = list(map(head.spread.gathered, order.cut(block, states, ids, normaliser, slope)))
        logits = _head_logits(head, kernel, rows[0])
        return _pulled(head, kernel, logits, rows, out, block)

    start = (jnp.zeros_like(states), _no_gradient(hidden, head, kernel, trained is not None))
    by_hidden, by_kernel = jax.lax.fori_loop(0, order.blocks, pull, start)
    return _as_kernel(head, by_kernel, kernel), order.restore(by_hidden), None, None


head_logprobs.defvjp(_logprobs_forward, _logprobs_backward, symbolic_zeros=True)


def _weighted_forward(
    head: Head, kernel: Any, hidden: Any, tokens: Any, weights: Any
) -> tuple[tuple[Array, Array, Array], tuple]:
    trained = kernel.perturbed
    kernel, hidden, tokens, weights = (x.value for x in (kernel, hidden, tokens, weights))
    counted = weights != 0
    kernel = head.spread.kernel(kernel, head.vocab_axis)
    order = _order(counted, head)
    states, ids, slope = order.sort(hidden, tokens, weights)

    def step(block: Array, out: tuple) -> tuple:
        logprobs, hits, *slopes = out
        rows = list(map(head.spread.gathered, order.cut(block, states, ids, slope)))
        logits = _head_logits(head, kernel, rows[0])
        found, hit, normaliser = _read(head, logits, rows[1])
        given = (*rows[:2], normaliser, rows[2])
        pulled = _pulled(head, kernel, logits, given, tuple(slopes), block)
        return _put(logprobs, found, block), _put(hits, hit, block), *pulled

    zeros = jnp.zeros(ids.shape, jnp.float32)
    none = _no_gradient(hidden, head, kernel, trained)
    start = (zeros, zeros.astype(bool), jnp.zeros_like(states), none)
    logprobs, hits, by_hidden, by_kernel = jax.lax.fori_loop(0, order.blocks, step, start)
    shown = _shown(order, counted, logprobs, hits)
    slopes = (_as_kernel(head, by_kernel, kernel), order.restore(by_hidden))
    return ((weights * shown[0]).sum(), *shown), slopes


def _weighted_backward(head: Head, residuals: tuple, slopes: tuple) -> tuple:
    slope = slopes[0]
    if isinstance(slope, SymbolicZero):
        slope = jnp.zeros((), jnp.float32)
    by_kernel, by_hidden = (None if x is None else (slope * x).astype(x.dtype) for x in residuals)
    return by_kernel, by_hidden, None, None


weighted_head_logprobs.defvjp(_weighted_forward, _weighted_backward, symbolic_zeros=True)
