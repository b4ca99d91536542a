"""Models that read and sample: a prompt into a slot, one token a row, a chunk of tokens.

A reader processes new tokens once and returns the cache that holds their keys and values. The token
loop samples K successors of L tokens for every hypothesis, from the logits of one or several models
as the config's proposer mixes them. Nothing is scored or selected here.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from w2s_jax.models.cache import (
    KV,
    KVCache,
    LayersKV,
    any_layer,
    empty_cache,
    empty_part,
    part_dtype,
    quantize_part,
)
from w2s_jax.models.decoder import logits, read_sequences
from w2s_jax.models.forward import Layout, forward
from w2s_jax.models.model import Model
from w2s_jax.models.parameters import is_output_major
from w2s_jax.ops.logits import Sampling, blocked_token_logprobs, choose, shortlist
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.methods import Logits
from w2s_jax.search.models import SearchModels

LOGIT_BYTES = 256 * 2**20
"""Scoring keeps at most about this many bytes of float32 logits alive at a time."""


def start_cache(model: Model, *, dtype: DTypeLike | None = None, **sizes: int) -> KVCache:
    """An empty cache for prompts of up to prefix_capacity + 1 tokens, placed as the model is.

    Args:
        model: The model that will read.
        dtype: Of keys and values, by default the model's; int8 quantises them.
        **sizes: slots, hypotheses, prefix_capacity and committed_capacity.

    Raises:
        InputError: Where the mesh does not divide the slots or the key/value heads.
    """
    kept = model.dtype if dtype is None else dtype

    def build() -> KVCache:
        return empty_cache(
            model.config,
            **sizes,
            dtype=kept,
            stacked=model.scan_layers,
            head_major=_is_head_major(model, kept),
            placement=model.placement,
        ).constrain()

    # Made in its shards: no device has room for all of it.
    return build() if model.placement.mesh is None else jax.jit(build)()


def prefill(
    model: Model,
    cache: KVCache,
    slot: Int[Array, ""],
    prompt: Int[Array, " S"],
    length: Int[Array, ""],
) -> KVCache:
    """Read a prompt, all but its last token, into the prefix part of one slot.

    The last token is left for `read_stems`, which needs its logits anyway. The committed part of
    the slot is set to zero, not only masked: a sum over values with weight 0 is still NaN where one
    of them is.

    Args:
        model: The reader.
        cache: Its cache.
        slot: int32 [], the slot's index.
        prompt: int32 [S], right-padded; S is the capacity of the prefix part.
        length: int32 [], tokens of the prompt, the last one included.

    Returns:
        The cache with the prompt in the slot.
    """
    place = model.placement
    _, read = read_sequences(model.config, model.params, prompt[None], placement=place)
    if part_dtype(cache.prefix) == jnp.int8:
        read = jax.tree.map(quantize_part, read, is_leaf=lambda part: isinstance(part, KV))
    stacked = model.scan_layers
    if isinstance(read, tuple):
        read = tuple(layer.arranged(any_layer(cache.prefix).head_major) for layer in read)

    def put(prefix: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(prefix, new, slot, axis=int(stacked))

    def empty(committed: Array) -> Array:
        zeros = jnp.zeros_like(committed[:, 0] if stacked else committed[0])
        return jax.lax.dynamic_update_index_in_dim(committed, zeros, slot, axis=int(stacked))

    return replace(
        cache,
        prefix=jax.tree.map(put, cache.prefix, read),
        committed=jax.tree.map(empty, cache.committed),
        prefix_length=cache.prefix_length.at[slot].set(length - 1),
        committed_length=cache.committed_length.at[slot].set(0),
    )


def read_stems(
    model: Model, cache: KVCache, last: Int[Array, "P W"]
) -> tuple[Float[Array, "P W V"], KVCache]:
    """Read the last token of every hypothesis.

    Returns:
        Float32 logits [P, W, V] of the tokens that follow, and the cache with the last tokens
        committed.
    """
    read = forward(model.config, model.params, last[:, :, None], Layout(True, 0, 0), cache=cache)
    return logits(model.config, model.params, read.hidden[:, :, 0]), read.cache


def start_chunk(
    model: Model, slots: int, rows: int, length: int, dtype: DTypeLike | None = None
) -> LayersKV:
    """An empty chunk buffer for token steps, [P, R, length, G, C] a layer.

    The dtype is chosen as in `start_cache`.
    """
    kept = model.dtype if dtype is None else dtype
    shape, stacked = (slots, rows, length), model.scan_layers
    return empty_part(model.config, shape, kept, stacked, _is_head_major(model, kept))


def _is_head_major(model: Model, dtype: DTypeLike) -> bool:
    """Whether a cache lies as CPUs' products take it: where the weights do, and are not int8."""
    return is_output_major(model.params) and jnp.dtype(dtype) != jnp.int8


def read_step(
    model: Model,
    cache: KVCache,
    chunk: LayersKV,
    tokens: Int[Array, "P R"],
    start: Int[Array, ""],
) -> tuple[Float[Array, "P R V"], LayersKV]:
    """Read one token of every row, at index `start` of the chunk, behind its earlier tokens.

    Returns:
        Float32 logits [P, R, V] of the tokens that follow, and the chunk buffer with the keys and
        values of these.
    """
    slots, rows = tokens.shape
    hypotheses = cache.committed_length.shape[1]
    layout = Layout(False, rows // hypotheses, 1)
    grouped = tokens.reshape(slots, hypotheses, layout.successors)
    read = forward(
        model.config, model.params, grouped, layout, cache=cache, chunk=chunk, chunk_start=start
    )
    hidden = read.hidden.reshape(slots, rows, -1)
    assert read.chunk is not None
    return logits(model.config, model.params, hidden), read.chunk


def read_chunk(
    model: Model, cache: KVCache, last: Int[Array, "P W"], tokens: Int[Array, "P R n"]
) -> tuple[Float[Array, "P R n"], KVCache, LayersKV | None]:
    """Score n tokens of every row in one teacher-forced call.

    Each hypothesis's last token is read once, and the first n − 1 tokens of its successors; the
    n-th needs no reading.

    Returns:
        Float32 log-probs [P, R, n] in nats, the cache with the last tokens committed, and the keys
        and values of what was read of the chunk, [P, R, n − 1, G, C] a layer.
    """
    slots, rows, count = tokens.shape
    hypotheses = last.shape[1]
    layout, read = _read_branches(model, cache, last, tokens[:, :, :-1])
    # Slots lie on the devices of their group, and their logits should.
    groups = (model.placement.parts("slots", slots), -1)
    targets = _targets(tokens, hypotheses)
    scores = blocked_token_logprobs(
        read.hidden.reshape(*groups, read.hidden.shape[-1]),
        targets.reshape(*groups, targets.shape[-1]),
        lambda hidden: logits(model.config, model.params, hidden),
        block=max(1, LOGIT_BYTES // (4 * model.config.vocab_size)),
    ).reshape(slots, hypotheses, layout.tokens, layout.successors)
    first = scores[:, :, 0].reshape(slots, rows, 1)
    rest = scores[:, :, 1:, 0].reshape(slots, rows, count - 1)
    return jnp.concatenate([first, rest], axis=2), read.cache, read.chunk


def _read_branches(
    model: Model, cache: KVCache, last: Int[Array, "P W"], tokens: Int[Array, "P R n"]
) -> tuple[Layout, Any]:
    """Read each hypothesis's last token once, and all tokens of its successors."""
    (slots, rows, count), hypotheses = tokens.shape, last.shape[1]
    layout = Layout(True, rows // hypotheses, count)
    new = jnp.concatenate([last[:, :, None], tokens.reshape(slots, hypotheses, -1)], axis=2)
    return layout, forward(model.config, model.params, new, layout, cache=cache)


def _targets(tokens: Int[Array, "P R n"], hypotheses: int) -> Int[Array, "P W M K"]:
    """What follows each token read: K first tokens after a stem, else one token, K times."""
    slots, rows, count = tokens.shape
    successors = rows // hypotheses
    grouped = tokens.reshape(slots, hypotheses, successors, count)
    first = grouped[:, :, None, :, 0]
    rest = grouped[..., 1:].reshape(slots, hypotheses, successors * (count - 1), 1)
    return jnp.concatenate([first, jnp.repeat(rest, successors, axis=3)], axis=2)


def read_ends(
    model: Model,
    cache: KVCache,
    last: Int[Array, "P W"],
    tokens: Int[Array, "P R n"],
    counts: Int[Array, "P R"],
) -> tuple[Float[Array, "P R D"], KVCache, LayersKV | None]:
    """The hidden state at the last counted token of each row, or at its stem where none is counted.

    Args:
        model: The reader.
        cache: Its cache.
        last: int32 [P, W], the last token of every hypothesis.
        tokens: int32 [P, R, n], right-padded.
        counts: int32 [P, R], how many of them count.

    Returns:
        Hidden states [P, R, D], the cache with the last tokens committed, and the keys and values
        of the n tokens, [P, R, n, G, C] a layer.
    """
    slots, rows, length = tokens.shape
    layout, read = _read_branches(model, cache, last, tokens)
    stems = jnp.repeat(read.hidden[:, :, 0], layout.successors, axis=1)
    behind = read.hidden[:, :, 1:].reshape(slots, rows, length, -1)
    at = jnp.maximum(counts - 1, 0)[..., None, None]
    ends = jnp.take_along_axis(behind, at, axis=2)[:, :, 0]
    return jnp.where((counts > 0)[..., None], ends, stems), read.cache, read.chunk


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draws:
    """The random draws of a prompt, its length limit, and its own sampling parameters.

    All are arrays, so that no value of theirs is compiled in: scalars, or [P] for all slots.

    Attributes:
        key: The prompt's typed PRNG key.
        position: int32, added to the response position of each draw.
        lane: int32, added to the lane w·K + k of each draw.
        limit: int32, new tokens at most.
        temperature: float32; 0 is greedy.
        top_p: float32, read where the config's sampling has a top_p below 1.
        beta: float32, β of an EFT proposer.
    """

    key: Array
    position: Array
    lane: Array
    limit: Array
    temperature: Array
    top_p: Array
    beta: Array

    def keys(self, positions: Int[Array, " P"], rows: int) -> Key[Array, "P R"]:
        """The keys of one draw of every row, folded from its slot's key, its position and its lane.

        They do not depend on what other slots hold, so neither do a response's draws.

        Args:
            positions: int32 [P], response positions of the token to draw.
            rows: R, rows of a slot.

        Returns:
            Typed keys [P, R].
        """

        def slot(key: Array, position: Array, lanes: Array) -> Array:
            at = jax.random.fold_in(key, position)
            return jax.vmap(lambda lane: jax.random.fold_in(at, lane))(lanes)

        lanes = self.lane[:, None] + jnp.arange(rows)
        return jax.vmap(slot)(self.key, self.position + positions, lanes)

    def shortlist(self, sampling: Sampling, logits: Array) -> tuple[Array, Array | None]:
        """The tokens that may be drawn and their logits, at each slot's own temperature and top_p.

        Args:
            sampling: The config's, which says what cuts are made.
            logits: float32 [P, .., V].

        Returns:
            As `ops.logits.shortlist`.
        """
        axes = (-1, *(1,) * (logits.ndim - 2))
        own = {"temperature": self.temperature.reshape(axes), "top_p": self.top_p.reshape(axes)}
        return shortlist(logits, sampling, **own)


def draw_numbers(config: SearchConfig, own: Any = None) -> tuple[Any, ...]:
    """The fields of `Draws` after its key, as NumPy scalars.

    Args:
        config: The search, whose values are the defaults.
        own: An object with fields of these names, such as a `results.Request`; those that it lacks
            or that are None take the defaults.
    """
    usual: dict[str, Any] = {
        "position": np.int32(0),
        "lane": np.int32(0),
        "limit": np.int32(config.max_new_tokens),
        "temperature": np.float32(config.sampling.temperature),
        "top_p": np.float32(config.sampling.top_p),
        "beta": np.float32(getattr(config.proposer, "beta", 0.0)),
    }
    given: dict[str, Any] = {name: getattr(own, name, None) for name in usual}
    own_numbers = {name: type(usual[name])(one) for name, one in given.items() if one is not None}
    return tuple((usual | own_numbers).values())


def draws_of(config: SearchConfig, request: Any) -> tuple:
    """Arguments of `make_draws` for a `results.Request`, as arrays: no value is compiled in."""
    # A row id may be any int; the key folds in 32 bits of it.
    ids = (np.uint32(number & 0xFFFFFFFF) for number in (request.row_id, request.seed))
    return (*ids, *draw_numbers(config, request))


def make_draws(row_id: Any, seed: Any, *numbers: Any) -> Draws:
    """The draws of one prompt: a key from seed and row id, and the other fields as `numbers`."""
    key = jax.random.fold_in(jax.random.key(seed), row_id)
    return Draws(key, *map(jnp.asarray, numbers))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunk:
    """A sampled chunk.

    Attributes:
        tokens: int32 [P, R, L].
        values: float32 [P, R, L, J], what the proposer says of each token; None where not needed.
        faults: bool [P, R, L, F], whether each source's logits were no distribution at the draw.
        caches: One for each model that reads, the hypotheses' last tokens committed.
        buffers: Keys and values of all but the last token, [P, R, L − 1, G, C] a layer, one for
            each model that reads.
    """

    tokens: Array
    values: Array | None
    faults: Array
    caches: tuple[KVCache, ...]
    buffers: tuple[LayersKV, ...]


def sample_chunk(
    models: SearchModels,
    config: SearchConfig,
    draws: Draws,
    caches: tuple[KVCache, ...],
    last: tuple[Int[Array, "P W"], ...],
    base: Int[Array, " P"],
) -> Chunk:
    """Sample L tokens for each of the K successors of every hypothesis.

    Args:
        models: The policy and the guides; the proposer says which of them read.
        config: The search: its proposer mixes logits, and values drawn tokens if the scorer needs
            that.
        draws: [P] each.
        caches: One for each model that reads.
        last: int32 [P, W], the hypotheses' last tokens, one array for each model that reads; each
            is read once, not once for each successor.
        base: int32 [P], response position of the chunk's first token.

    Returns:
        The chunk, whose last token no model has read.
    """
    proposer, rows, length = config.proposer, config.rows, config.length
    members = [models.members[reader] for reader in proposer.readers(models)]
    slots, hypotheses = last[0].shape

    def draw(logits: Logits, keys: Array) -> tuple[Array, Array | None, Array]:
        """Tokens, what the proposer says of them, and faults: [P ..] as the keys are."""
        mixed = proposer.mix(models, logits, draws.beta)
        tokens = choose(*draws.shortlist(config.sampling, mixed), keys)
        needed = config.scorer.needs_values
        values = proposer.value(models, logits, tokens) if needed else None
        # It is not finite where a logit is NaN or +inf, or all are −inf.
        drawn = jnp.take_along_axis(mixed, tokens[..., None], axis=-1)[..., 0]
        return tokens, values, proposer.faults(models, logits, drawn)

    stems = [read_stems(*reader) for reader in zip(members, caches, last, strict=True)]
    caches = tuple(cache for _, cache in stems)
    keys = draws.keys(base, rows).reshape(slots, hypotheses, config.successors)
    first = draw(tuple(jnp.expand_dims(logits, 2) for logits, _ in stems), keys)
    said = jax.tree.map(lambda x: x.reshape(slots, rows, 1, *x.shape[3:]), first)
    buffers = tuple(
        start_chunk(model, slots, rows, length - 1, part_dtype(cache.committed))
        for model, cache in zip(members, caches, strict=True)
    )

    def step(carry: tuple, t: Array) -> tuple[tuple, tuple]:
        buffers, tokens = carry
        reads = [
            read_step(model, cache, buffer, tokens, t - 1)
            for model, cache, buffer in zip(members, caches, buffers, strict=True)
        ]
        drawn = draw(tuple(logits for logits, _ in reads), draws.keys(base + t, rows))
        return (tuple(buffer for _, buffer in reads), drawn[0]), drawn

    if length > 1:
        places = jnp.arange(1, length, dtype=jnp.int32)
        (buffers, _), later = jax.lax.scan(step, (buffers, said[0][..., 0]), places)
        join = lambda one, more: jnp.concatenate([one, jnp.moveaxis(more, 0, 2)], axis=2)  # noqa: E731
        said = jax.tree.map(join, said, later)
    tokens, values, faults = said
    return Chunk(tokens, values, faults, caches, buffers)


def row_ends(
    tokens: Int[Array, "P R L"],
    base: Int[Array, " P"],
    eos_ids: tuple[int, ...],
    limit: Int[Array, " P"],
) -> tuple[Array, Array]:
    """Where rows end: at their first EOS or at the limit.

    Args:
        tokens: int32 [P, R, L], the chunk.
        base: int32 [P], response position of its first token.
        eos_ids: Token ids that end a response.
        limit: int32 [P], tokens of a response at most.

    Returns:
        Response lengths int32 [P, R], an EOS included, and bool [P, R], whether an EOS ended the
        row.
    """
    length = tokens.shape[-1]
    room = jnp.minimum(limit - base, length)[:, None]
    is_end = jnp.zeros(tokens.shape, bool)
    for eos in eos_ids:
        is_end = is_end | (tokens == eos)
    first = jnp.where(jnp.any(is_end, axis=-1), jnp.argmax(is_end, axis=-1), length)
    return (base[:, None] + jnp.minimum(first + 1, room)).astype(jnp.int32), first < room
