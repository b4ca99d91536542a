"""One model that reads the candidates of a search as texts, and none of their tokens twice.

Every chunk encodes whole responses anew, since new text may change the encoding of what is before
it. The tokens before the first difference from the hypothesis as it was read keep their keys,
values and log-probs; only those from there on are read, by the programs at the end of this file.
The caller encodes.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from w2s_jax.distributed import to_host
from w2s_jax.errors import InputError
from w2s_jax.models.cache import KV, KVCache, LayersKV, any_layer, commit_chunk
from w2s_jax.models.model import Model
from w2s_jax.models.reward import RewardModel
from w2s_jax.search.decode import prefill, read_chunk, read_ends, start_cache
from w2s_jax.search.likelihood import padded_width, token_likelihoods
from w2s_jax.search.methods import PolicyProposer
from w2s_jax.search.models import SearchModels
from w2s_jax.text.tokenizer import bucket, pad_rows

log = logging.getLogger(__name__)

Place = tuple[int, int]
"""A slot and a row of it."""

MERGES = 2
"""Tokens by which a chunk's encoding may exceed its length before a wider program is needed."""


@dataclass(frozen=True)
class Known:
    """A text as a model has read it: int32 tokens [n], and a float32 log-prob of each [n]."""

    tokens: np.ndarray
    logprobs: np.ndarray

    def first(self, count: int) -> "Known":
        """The first `count` tokens."""
        return Known(self.tokens[:count], self.logprobs[:count])


NOTHING = Known(np.zeros(0, np.int32), np.zeros(0, np.float32))


@dataclass(frozen=True)
class Reading:
    """The state of a model that reads the hypotheses of all slots.

    Attributes:
        hypotheses: W.
        successors: K.
        width: Tokens of a row that a read takes unless texts need more.
        cache: On the device; None until the first text.
        buffer: Keys and values of the rows of the last read; None when there are none.
        prefix: int [P], tokens of each prompt in the prefix part of the cache, −1 where it has not
            been read; the committed part holds those behind.
        prompts: Each slot's prompt as int32 tokens; None where there is none.
        known: [P][W], what has been read of each hypothesis.
        pending: What each row of the last read would be as a hypothesis.
        unsound: Rows of the last read for which the model gave no finite number.
    """

    hypotheses: int
    successors: int
    width: int
    cache: KVCache | None
    buffer: LayersKV | None
    prefix: np.ndarray
    prompts: tuple[np.ndarray | None, ...]
    known: tuple[tuple[Known, ...], ...]
    pending: Mapping[Place, Known]
    unsound: frozenset[Place] = frozenset()

    def group(self, place: Place) -> Place:
        """The slot and the hypothesis that a row continues."""
        return place[0], place[1] // self.successors

    def parent(self, place: Place) -> Known:
        """What has been read of the hypothesis that a row continues."""
        slot, hypothesis = self.group(place)
        return self.known[slot][hypothesis] if self.known[slot] else NOTHING

    def capacity(self, part: str) -> int:
        """Tokens that a part of the cache holds: S of "prefix", T of "committed"."""
        return any_layer(getattr(self.cache, part)).room


def start_reading(slots: int, hypotheses: int, successors: int, chunk_length: int) -> Reading:
    """A reading of nothing. Its caches are made, and grow, as texts need them."""
    return Reading(
        hypotheses=hypotheses,
        successors=successors,
        width=chunk_length + MERGES,
        cache=None,
        buffer=None,
        prefix=np.full(slots, -1),
        prompts=(None,) * slots,
        known=((),) * slots,
        pending={},
    )


def insert_text(reading: Reading, slot: int, prompt: Sequence[int]) -> Reading:
    """The reading with a new prompt in a slot, which is read together with its first responses."""
    prompts, prefix = list(reading.prompts), reading.prefix.copy()
    prompts[slot], prefix[slot] = np.asarray(prompt, np.int32), -1
    pending = {place: known for place, known in reading.pending.items() if place[0] != slot}
    return replace(reading, prompts=tuple(prompts), prefix=prefix, pending=pending)


def read_logprobs(
    model: Model, reading: Reading, texts: Mapping[Place, Sequence[int]]
) -> tuple[Reading, dict[Place, float]]:
    """Read candidates and score their responses.

    Args:
        model: The reader.
        reading: Its state.
        texts: Token ids of prompt and response, encoded together, by slot and row.

    Returns:
        The new state, and for each place the sum of float32 log-probs, in nats, of the tokens
        behind the prefix in common with the prompt. The first token of a text is not scored, since
        nothing precedes it, nor are tokens beyond the model's positions.
    """

    def together(cache: KVCache | None, plan: _Plan) -> tuple:
        return read_rows(model, cache, plan.committed, plan.last, plan.tokens)

    def settle(place: Place, tokens: np.ndarray, stem: Known, row: np.ndarray) -> tuple:
        read = row[: len(tokens) - len(stem.tokens)]
        known = Known(tokens, np.concatenate([stem.logprobs, read]))
        behind = common(tokens, reading.prompts[place[0]])
        return known, float(known.logprobs[behind:].sum(dtype=np.float32))

    def alone(tokens: np.ndarray) -> float:
        return float(logprobs_alone(model, tokens).sum(dtype=np.float32))

    found, sums = _read(model, reading, texts, together, settle, alone)
    unsound = frozenset(place for place, total in sums.items() if np.isnan(total))
    return replace(found, unsound=unsound), sums


def read_rewards(
    model: RewardModel, reading: Reading, texts: Mapping[Place, Sequence[int]]
) -> tuple[Reading, dict[Place, np.ndarray]]:
    """Read candidates, as `read_logprobs` does, and compute their rewards.

    Returns:
        The new state, and for each place the float32 label logits [labels] at its last token. What
        lies beyond the model's positions is not read.
    """

    def together(cache: KVCache | None, plan: _Plan) -> tuple:
        return read_last(model, cache, plan.committed, plan.last, plan.tokens, plan.counts)

    def settle(place: Place, tokens: np.ndarray, stem: Known, row: np.ndarray) -> tuple:
        return Known(tokens, np.zeros(len(tokens), np.float32)), row

    def alone(tokens: np.ndarray) -> np.ndarray:
        return to_host(model(*pad_rows([tokens], padded_width(len(tokens)), 0)))[0]

    found, labels = _read(model.decoder, reading, texts, together, settle, alone)
    unsound = frozenset(place for place, row in labels.items() if not np.isfinite(row).all())
    return replace(found, unsound=unsound), labels


def keep_rows(reading: Reading, parents: np.ndarray, rows: np.ndarray) -> Reading:
    """The reading of the kept hypotheses.

    Args:
        reading: The state after a read.
        parents: int [P, W], the old hypothesis of each new one.
        rows: int [P, W], the row whose chunk it takes.
    """
    if reading.buffer is None or reading.cache is None:
        return reading
    cache = keep(reading.cache, reading.buffer, parents, rows)
    known = [
        tuple(
            reading.pending.get((slot, int(row)), olds[parent])
            for parent, row in zip(parents[slot], rows[slot], strict=True)
            if olds
        )
        for slot, olds in enumerate(reading.known)
    ]
    return replace(reading, cache=cache, buffer=None, known=tuple(known), pending={})


def common(one: np.ndarray, other: np.ndarray | None) -> int:
    """The length of the common prefix of two sequences of tokens."""
    if other is None:
        raise ValueError("a text was given for a slot that holds no prompt")
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def logprobs_alone(model: Model, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """Float32 log-probs, in nats, of all tokens but the first, read without a cache."""
    padded, mask = pad_rows([tokens], padded_width(len(tokens)), 0)
    found = token_likelihoods(SearchModels(model, ()), PolicyProposer(), padded, mask)
    return to_host(found.logprobs)[0, 1 : len(tokens)]


@dataclass(frozen=True)
class _Plan:
    """One read: the tokens of each group that stay, and the arguments of the program.

    A group is the rows of one hypothesis, named by slot and hypothesis.

    Attributes:
        stems: Tokens of each group that stay.
        committed: int32 [P, W], entries of the committed part that stay, and so the stem's place.
        last: int32 [P, W], the stems: last tokens that stay, which are read again.
        tokens: int32 [P, R, n], the tokens behind them.
        counts: int32 [P, R], how many of these there are.
    """

    stems: dict[Place, int]
    committed: np.ndarray
    last: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray


def _read(
    model: Model,
    reading: Reading,
    texts: Mapping[Place, Sequence[int]],
    together: Callable[[KVCache | None, _Plan], tuple],
    settle: Callable[[Place, np.ndarray, Known, np.ndarray], tuple[Known, Any]],
    alone: Callable[[np.ndarray], Any],
) -> tuple[Reading, dict[Place, Any]]:
    """Read texts behind what has been read of them.

    Args:
        model: The reader.
        reading: Its state.
        texts: Token ids by slot and row.
        together: The program; it returns an output for each row, the cache, and the rows' buffer.
        settle: From a place, its tokens, what was known of them, and the row's output: what is
            known now, and the row's value.
        alone: The value of tokens for which nothing read before can be used.

    Returns:
        The new state, and the value of each place.
    """
    rows, merged = _split(model, reading, texts)
    found = {place: alone(tokens) for place, tokens in merged.items()}
    pending: dict[Place, Known] = {}
    if rows:
        reading, plan = _prepare(model, reading, rows)
        said, cache, buffer = together(reading.cache, plan)
        read = to_host(said)
        for place, tokens in rows.items():
            stem = reading.parent(place).first(plan.stems[reading.group(place)])
            pending[place], found[place] = settle(place, tokens, stem, read[place])
        for place in merged:  # of what was read alone stays what its siblings share
            parent = reading.parent(place)
            pending[place] = parent.first(plan.stems.get(reading.group(place), len(parent.tokens)))
        reading = replace(reading, cache=cache, buffer=buffer)
    return replace(reading, pending=pending), found


def _split(
    model: Model, reading: Reading, texts: Mapping[Place, Sequence[int]]
) -> tuple[dict[Place, np.ndarray], dict[Place, np.ndarray]]:
    """The texts as arrays: those that begin with a token of their prompts, and those that do not.

    The encoding of the latter merges response and the very first token of a prompt without BOS, so
    that nothing read before can be used.
    """
    alike: dict[Place, np.ndarray] = {}
    merged: dict[Place, np.ndarray] = {}
    limit, vocabulary = model.config.max_positions, model.config.vocab_size
    for place, text in texts.items():
        if len(text) > limit > len(reading.parent(place).tokens):
            log.warning(
                "a prompt and response of %d tokens exceed the %d positions of a model that scores "
                "texts; it scores what fits",
                len(text),
                limit,
            )
        tokens = np.asarray(text[:limit], np.int32)
        if len(tokens) and tokens.max() >= vocabulary:
            raise InputError(
                f"token id {tokens.max()} of a tokenizer is none of the {vocabulary} "
                "of its model, which scores texts"
            )
        (alike if common(tokens, reading.prompts[place[0]]) else merged)[place] = tokens
    return alike, merged


def _prepare(
    model: Model, reading: Reading, rows: Mapping[Place, np.ndarray]
) -> tuple[Reading, _Plan]:
    reading = _read_prompts(model, reading, rows)
    stems: dict[Place, int] = {}
    for place, tokens in rows.items():
        alike = common(tokens, reading.parent(place).tokens)
        stems[reading.group(place)] = min(stems.get(reading.group(place), alike), alike)
    behind = {place: tokens[stems[reading.group(place)] :] for place, tokens in rows.items()}
    width = _width(reading.width, max(map(len, behind.values())))
    each = (len(reading.prefix), reading.hypotheses)
    shape = (each[0], each[1] * reading.successors)
    most = max(stem - int(reading.prefix[slot]) for (slot, _), stem in stems.items())
    reading = _grow(reading, "committed", most + width)
    plan = _Plan(
        stems=stems,
        # Where nothing is read, the stem is written beyond the cache, and so dropped.
        committed=np.full(each, reading.capacity("committed"), np.int32),
        last=np.zeros(each, np.int32),
        tokens=np.zeros((*shape, width), np.int32),
        counts=np.zeros(shape, np.int32),
    )
    for place, tokens in rows.items():
        group = reading.group(place)
        stem = stems[group]
        plan.committed[group] = stem - 1 - reading.prefix[place[0]]
        plan.last[group] = plan.tokens[place] = tokens[stem - 1]
        plan.tokens[place][: len(behind[place])] = behind[place]
        plan.counts[place] = len(behind[place])
    return reading, plan


def _width(usual: int, most: int) -> int:
    """The tokens of a read: the usual number, or few others, as each is compiled once."""
    if most <= 2 * usual:
        return usual + 2 * max(0, -(-(most - usual) // 2))
    while usual < most:
        usual *= 2
    return usual


def _read_prompts(model: Model, reading: Reading, rows: Mapping[Place, np.ndarray]) -> Reading:
    """The reading with the prompt of every slot read, as far as all its rows begin with it.

    A response may merge with the end of its prompt. Where one does so further back than those
    before it, the slot is read anew.
    """
    for slot in dict.fromkeys(slot for slot, _ in rows):
        own, prompt = [rows[place] for place in rows if place[0] == slot], reading.prompts[slot]
        shared = min(common(row, prompt) for row in own)
        if 0 <= reading.prefix[slot] < shared:
            continue
        if reading.cache is None:
            cache = start_cache(
                model,
                slots=len(reading.prefix),
                hypotheses=reading.hypotheses,
                prefix_capacity=bucket(shared),
                committed_capacity=bucket(4 * reading.width),
            )
            reading = replace(reading, cache=cache)
        reading = _grow(reading, "prefix", shared - 1)
        # A token of its own, so that no other's embedding is read beside it.
        padded = np.full(reading.capacity("prefix"), own[0][0], np.int32)
        padded[: shared - 1] = own[0][: shared - 1]
        cache = prefill_slot(model, reading.cache, np.int32(slot), padded, np.int32(shared))
        prefix, known = reading.prefix.copy(), list(reading.known)
        prefix[slot] = shared - 1
        known[slot] = (Known(own[0][:shared], np.zeros(shared, np.float32)),) * reading.hypotheses
        reading = replace(reading, cache=cache, prefix=prefix, known=tuple(known))
    return reading


def _grow(reading: Reading, part: str, least: int) -> Reading:
    """The reading with a part of the cache grown, by a third at least, to hold `least` tokens."""
    capacity = reading.capacity(part)
    if capacity >= least:
        return reading
    room = bucket(least + 1)
    # What is copied at every chunk is worth a size between the powers of two.
    more = (room if least > room - room // 4 else room - room // 4) - capacity

    def widen(array: Array, axis: int) -> Array:
        added = [(0, 0)] * array.ndim
        added[axis] = (0, more)
        return jnp.pad(array, added)

    assert reading.cache is not None
    held = getattr(reading.cache, part)
    wide: Any = held.map(widen) if isinstance(held, KV) else tuple(kv.map(widen) for kv in held)
    cache = replace(reading.cache, **{part: wide})
    if cache.placement.mesh is not None:
        cache = jax.jit(KVCache.constrain)(cache)
    return replace(reading, cache=cache)


# The programs.


@partial(jax.jit, donate_argnums=1)
def prefill_slot(model: Model, cache: KVCache, slot: Any, prompt: Any, length: Any) -> KVCache:
    """The cache, which is donated, with a slot's prompt read: `decode.prefill`."""
    return prefill(model, cache, slot, prompt, length).constrain()


@partial(jax.jit, donate_argnums=1)
def read_rows(
    model: Model, cache: KVCache, committed: Any, last: Any, tokens: Any
) -> tuple[Array, KVCache, LayersKV | None]:
    """Score the tokens of every row.

    Arguments are as in `_Plan`; the cache is donated.

    Returns:
        Float32 log-probs [P, R, n], the cache with the stems, and the keys and values of all but
        the last token of every row.
    """
    cache = replace(cache, committed_length=committed)
    logprobs, cache, chunk = read_chunk(model, cache, last, tokens)
    return logprobs, cache.constrain(), chunk


@partial(jax.jit, donate_argnums=1)
def read_last(
    model: RewardModel, cache: KVCache, committed: Any, last: Any, tokens: Any, counts: Any
) -> tuple[Array, KVCache, LayersKV | None]:
    """The label logits at the last counted token of every row.

    Arguments are as in `_Plan`; the cache is donated.

    Returns:
        Float32 logits [P, R, labels], the cache with the stems, and the keys and values of all
        tokens.
    """
    cache = replace(cache, committed_length=committed)
    states, cache, chunk = read_ends(model.decoder, cache, last, tokens, counts)
    return model.head_of(states), cache.constrain(), chunk


@partial(jax.jit, donate_argnums=0)
def keep(cache: KVCache, buffer: LayersKV, parents: Any, rows: Any) -> KVCache:
    """The cache (donated) of the kept hypotheses: their parents' entries, then their rows'."""
    count = any_layer(buffer).room
    return commit_chunk(cache, buffer, parents=parents, rows=rows, count=count).constrain()
