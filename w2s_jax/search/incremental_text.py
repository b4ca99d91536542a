"""One model reading the candidates of a search as texts, and none of their tokens twice.

Every chunk encodes whole responses anew, since a tokenizer may change its mind about the end of a
text. The tokens before the first difference from what the hypothesis was read as keep their keys,
values and log-probabilities; only those behind it are read. Encoding is the caller's part.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from w2s_jax.distributed import to_host
from w2s_jax.errors import InputError
from w2s_jax.models.cache import KV, KVCache, LayersKV
from w2s_jax.models.model import Model
from w2s_jax.models.reward import RewardModel
from w2s_jax.search.decode import start_cache
from w2s_jax.search.incremental_programs import keep, prefill_slot, read_last, read_rows
from w2s_jax.search.likelihood import padded_width, token_likelihoods
from w2s_jax.search.models import SearchModels
from w2s_jax.search.proposers import PolicyProposer
from w2s_jax.text.tokenizer import bucket, pad_rows, power_of_two

log = logging.getLogger(__name__)

Place = tuple[int, int]
"""A slot and a row of it."""

MERGES = 2
"""Tokens by which a chunk's encoding may exceed its length before a wider program is needed."""

LONG_SHARE = 4
"""One of so many rows at most is read on where it is longer than the others."""

CALL_TOKENS = 32
"""Tokens whose reading takes as long as reading the weights once more (CPU, float32: 24 to 40)."""

COPIED_ENTRIES = 32
"""Entries of a cache whose copying takes as long as reading a token (CPU, float32, 12 × 768)."""


@dataclass(frozen=True)
class Known:
    """A text as a model has read it: int32 tokens, and a float32 log-probability of each."""

    tokens: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True)
class Reading:
    """What a model remembers of the slots: caches on the device, encodings on the host.

    W and K; width: tokens that a read takes at first. The prefix part of the cache holds the first
    `prefix` [P] tokens of each prompt (−1: not read yet), the committed part those behind. prompts:
    each slot's prompt as tokens; known: its hypotheses [P][W]; pending: the hypotheses that the
    rows of the last read would make, and buffer their keys and values; None when there are none.
    unsound: the rows of the last read for which the model gave what is no number.
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


def start_reading(slots: int, hypotheses: int, successors: int, chunk_length: int) -> Reading:
    """A reading of nothing; its caches are made, and grow, as texts need them."""
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
    """The reading once a slot holds a new prompt; it is read with its first responses."""
    prompts, prefix = list(reading.prompts), reading.prefix.copy()
    prompts[slot], prefix[slot] = np.asarray(prompt, np.int32), -1
    pending = {place: known for place, known in reading.pending.items() if place[0] != slot}
    return replace(reading, prompts=tuple(prompts), prefix=prefix, pending=pending)


def read_logprobs(
    model: Model, reading: Reading, texts: Mapping[Place, Sequence[int]]
) -> tuple[Reading, dict[Place, float]]:
    """Read candidates (prompt and response encoded together) and score their responses.

    Returns the sum of float32 log-probabilities of the tokens behind what each has in common with
    its prompt, one for each place; a first token, before which there is nothing, is not scored, nor
    is what lies beyond the model's positions.
    """
    rows, merged = _split(model, reading, texts)
    sums = {place: _sum_alone(model, tokens) for place, tokens in merged.items()}
    pending: dict[Place, Known] = {}
    if rows:
        reading, plan = _prepare(model, reading, rows, read_on=True)
        device = (plan.committed, plan.last, plan.tokens, plan.longer)
        logprobs, cache, buffer = read_rows(model, _cache(reading), *device, first=plan.first)
        read = to_host(logprobs)
        for place, tokens in rows.items():
            stem = plan.stems[place]
            old = _parent(reading, place).logprobs[:stem]
            known = Known(tokens, np.concatenate([old, read[place][: len(tokens) - stem]]))
            pending[place] = known
            behind = common(tokens, reading.prompts[place[0]])
            sums[place] = float(known.logprobs[behind:].sum(dtype=np.float32))
        pending |= _forgotten(reading, plan, merged)
        reading = replace(reading, cache=cache, buffer=buffer)
    unsound = frozenset(place for place, total in sums.items() if np.isnan(total))
    return replace(reading, pending=pending, unsound=unsound), sums


def read_rewards(
    model: RewardModel, reading: Reading, texts: Mapping[Place, Sequence[int]]
) -> tuple[Reading, dict[Place, np.ndarray]]:
    """Read candidates and the float32 label logits [labels] at the last token of each.

    What lies beyond the model's positions is not read.
    """
    rows, merged = _split(model.decoder, reading, texts)
    logits = {place: _logits_alone(model, tokens) for place, tokens in merged.items()}
    pending: dict[Place, Known] = {}
    if rows:
        reading, plan = _prepare(model.decoder, reading, rows)
        device = (plan.committed, plan.last, plan.tokens, plan.counts)
        found, cache, buffer = read_last(model, _cache(reading), *device)
        read = to_host(found)
        for place, tokens in rows.items():
            pending[place] = Known(tokens, np.zeros(len(tokens), np.float32))
            logits[place] = read[place]
        pending |= _forgotten(reading, plan, merged)
        reading = replace(reading, cache=cache, buffer=buffer)
    unsound = frozenset(p for p, found in logits.items() if not np.isfinite(found).all())
    return replace(reading, pending=pending, unsound=unsound), logits


def keep_rows(reading: Reading, parents: np.ndarray, rows: np.ndarray) -> Reading:
    """The reading of the kept hypotheses, int [P, W]: of which old one, and of which row."""
    if reading.buffer is None or reading.cache is None:
        return reading
    cache = keep(reading.cache, reading.buffer, parents, rows)
    known = tuple(
        tuple(
            reading.pending.get((slot, int(row)), olds[parent])
            for parent, row in zip(parents[slot], rows[slot], strict=True)
        )
        if olds
        else olds
        for slot, olds in enumerate(reading.known)
    )
    return replace(reading, cache=cache, buffer=None, known=known, pending={})


def common(one: np.ndarray, other: np.ndarray | None) -> int:
    """How many tokens two sequences begin with alike."""
    if other is None:
        raise ValueError("a text was given for a slot that holds no prompt")
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


@dataclass(frozen=True)
class _Plan:
    """One read: how many first tokens of each group and row stay, and what goes to the device.

    A group is the rows of one hypothesis, under its slot and place.
    committed [P, W]: entries of the committed part that stay, the stem's place; last [P, W]: the
    stems, which are read again; tokens [P, R, n] and counts [P, R] of what is behind them. Of all
    rows the first `first` tokens are read, the others of the rows `longer` alone: their slots and
    places, int32 [2, m], places from R on for none.
    """

    groups: dict[Place, int]
    stems: dict[Place, int]
    committed: np.ndarray
    last: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray
    first: int
    longer: np.ndarray


@dataclass(frozen=True)
class _Widths:
    """Of all rows so many first tokens are read, then so many more of `longer` rows."""

    first: int
    more: int = 0
    longer: int = 0


def _split(
    model: Model, reading: Reading, texts: Mapping[Place, Sequence[int]]
) -> tuple[dict[Place, np.ndarray], dict[Place, np.ndarray]]:
    """The texts as arrays: those that begin like their prompts, and those that do not.

    The latter are merged with the very first token of a prompt without BOS, so that nothing that
    was read before can be used.
    """
    alike: dict[Place, np.ndarray] = {}
    merged: dict[Place, np.ndarray] = {}
    limit = model.config.max_positions
    for place, text in texts.items():
        if len(text) > limit > len(_parent(reading, place).tokens):
            log.warning(
                "a prompt and response of %d tokens exceed the %d positions of a model that scores "
                "texts; it scores what fits",
                len(text),
                limit,
            )
        tokens = np.asarray(text[:limit], np.int32)
        if len(tokens) and tokens.max() >= model.config.vocab_size:
            raise InputError(
                f"token id {tokens.max()} of a tokenizer is none of the {model.config.vocab_size} "
                "of its model, which scores texts"
            )
        (alike if common(tokens, reading.prompts[place[0]]) else merged)[place] = tokens
    return alike, merged


def _forgotten(
    reading: Reading, plan: "_Plan", merged: Mapping[Place, np.ndarray]
) -> dict[Place, Known]:
    """What stays of the hypotheses of rows that were read alone: what their siblings share."""
    kept = {}
    for place in merged:
        parent = _parent(reading, place)
        stem = plan.groups.get((place[0], place[1] // reading.successors), len(parent.tokens))
        kept[place] = Known(parent.tokens[:stem], parent.logprobs[:stem])
    return kept


def _parent(reading: Reading, place: Place) -> Known:
    hypotheses = reading.known[place[0]]
    nothing = Known(np.zeros(0, np.int32), np.zeros(0, np.float32))
    return hypotheses[place[1] // reading.successors] if hypotheses else nothing


def _cache(reading: Reading) -> KVCache:
    assert reading.cache is not None
    return reading.cache


def _prepare(
    model: Model, reading: Reading, rows: Mapping[Place, np.ndarray], *, read_on: bool = False
) -> tuple[Reading, _Plan]:
    by_slot: dict[int, list[np.ndarray]] = {}
    for (slot, _), tokens in rows.items():
        by_slot.setdefault(slot, []).append(tokens)
    reading = _read_prompts(model, reading, by_slot)
    groups = _stems(reading, rows)
    stems = {place: groups[place[0], place[1] // reading.successors] for place in rows}
    counts = {place: len(tokens) - stems[place] for place, tokens in rows.items()}
    widths = _widths(reading, list(counts.values()), read_on)
    width = widths.first + widths.more
    slots, hypotheses = len(reading.prefix), reading.hypotheses
    shape = (slots, hypotheses * reading.successors)
    longer = np.array([[0], [shape[1]]], np.int32).repeat(widths.longer, axis=1)
    for i, place in enumerate(p for p, count in counts.items() if count > widths.first):
        longer[:, i] = place
    needed = max(stems[place] - int(reading.prefix[place[0]]) for place in rows) + width
    reading = _grow(reading, committed=needed)
    # Where nothing is read, the stem is written beyond the cache, and so dropped.
    committed = np.full((slots, hypotheses), _capacity(reading, "committed"), np.int32)
    plan = _Plan(
        groups=groups,
        stems=stems,
        committed=committed,
        last=np.zeros((slots, hypotheses), np.int32),
        tokens=np.zeros((*shape, width), np.int32),
        counts=np.zeros(shape, np.int32),
        first=widths.first,
        longer=longer,
    )
    for place, tokens in rows.items():
        slot, parent, stem = place[0], place[1] // reading.successors, stems[place]
        behind = tokens[stem:]
        plan.committed[slot, parent] = stem - 1 - reading.prefix[slot]
        plan.last[slot, parent] = tokens[stem - 1]
        plan.tokens[place] = tokens[stem - 1]
        plan.tokens[place][: len(behind)] = behind
        plan.counts[place] = len(behind)
    return reading, plan


def _widths(reading: Reading, counts: Sequence[int], read_on: bool) -> _Widths:
    """How to read rows of so many tokens: as wide as the longest, or the longest read on.

    The cheapest, counted in tokens. Where no more than every LONG_SHARE-th row is longer than the
    others, padding all to its width costs more than a second call, which copies what these attend
    to.
    """
    hypotheses = len(reading.prefix) * reading.hypotheses
    rows = hypotheses * reading.successors
    most = max(counts)

    def tokens(first: int) -> int:
        return hypotheses + rows * (first - 1)

    best = _Widths(_width(reading.width, most))
    least: float = tokens(best.first)
    longer = max(1, rows // LONG_SHARE)
    copied = longer * (_capacity(reading, "prefix") + _capacity(reading, "committed"))
    limit = min(most, 2 * reading.width) if read_on else 0
    for first in range(reading.width, limit, max(2, reading.width // 4)):
        more = power_of_two(most - first, 2)
        cost = tokens(first) + longer * more + copied / COPIED_ENTRIES + CALL_TOKENS
        if cost < least and sum(count > first for count in counts) <= longer:
            best, least = _Widths(first, more, longer), cost
    return best


def _width(usual: int, most: int) -> int:
    """The tokens of a read: the usual ones, or few more; every width is compiled once."""
    if most <= 2 * usual:
        return usual + 2 * max(0, -(-(most - usual) // 2))
    while usual < most:
        usual *= 2
    return usual


def _stems(reading: Reading, rows: Mapping[Place, np.ndarray]) -> dict[Place, int]:
    """How many first tokens the rows of each hypothesis have in common with what was read."""
    least: dict[Place, int] = {}
    for (slot, row), tokens in rows.items():
        group = (slot, row // reading.successors)
        alike = common(tokens, reading.known[slot][group[1]].tokens)
        least[group] = min(least.get(group, alike), alike)
    return least


def _read_prompts(
    model: Model, reading: Reading, by_slot: Mapping[int, Sequence[np.ndarray]]
) -> Reading:
    """The reading with the prompt of every slot read as far as its rows have it in common.

    A response may merge with the end of its prompt. Where one does so further back than those
    before it, the slot is read anew.
    """
    for slot, rows in by_slot.items():
        prompt = reading.prompts[slot]
        shared = min(common(row, prompt) for row in rows)
        if 0 <= reading.prefix[slot] < shared:
            continue
        reading = _grow(_allocate(model, reading, shared), prefix=shared - 1)
        # A token of its own, so that no other's embedding is read beside it.
        padded = np.full(_capacity(reading, "prefix"), rows[0][0], np.int32)
        padded[: shared - 1] = rows[0][: shared - 1]
        cache = prefill_slot(model, _cache(reading), np.int32(slot), padded, np.int32(shared))
        prefix, known = reading.prefix.copy(), list(reading.known)
        prefix[slot] = shared - 1
        start = Known(rows[0][:shared], np.zeros(shared, np.float32))
        known[slot] = (start,) * reading.hypotheses
        reading = replace(reading, cache=cache, prefix=prefix, known=tuple(known))
    return reading


def _allocate(model: Model, reading: Reading, prompt: int) -> Reading:
    if reading.cache is not None:
        return reading
    cache = start_cache(
        model,
        slots=len(reading.prefix),
        hypotheses=reading.hypotheses,
        prefix_capacity=bucket(prompt),
        committed_capacity=bucket(4 * reading.width),
    )
    return replace(reading, cache=cache)


def _capacity(reading: Reading, part: str) -> int:
    """S or T of the caches."""
    layers = getattr(reading.cache, part)
    first = layers if isinstance(layers, KV) else layers[0]
    return first.keys.shape[-3]


def _grow(reading: Reading, **needed: int) -> Reading:
    """The reading with parts of the caches grown, by a third at least, to hold so many tokens."""
    for part, least in needed.items():
        capacity = _capacity(reading, part)
        if capacity >= least:
            continue
        room = bucket(least + 1)
        # What is copied at every chunk is worth a size between the powers of two.
        more = (room if least > room - room // 4 else room - room // 4) - capacity

        def widen(array: Array, more: int = more) -> Array:
            return jnp.pad(array, [(0, 0)] * (array.ndim - 3) + [(0, more), (0, 0), (0, 0)])

        assert reading.cache is not None
        wide = jax.tree.map(widen, getattr(reading.cache, part))
        cache = replace(reading.cache, **{part: wide})
        if cache.placement.mesh is not None:
            cache = jax.jit(KVCache.constrain)(cache)
        reading = replace(reading, cache=cache)
    return reading


def logprobs_alone(model: Model, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """Float32 log-probabilities of all tokens but the first, read without a cache."""
    padded, mask = pad_rows([tokens], padded_width(len(tokens)), 0)
    found = token_likelihoods(SearchModels(model, ()), PolicyProposer(), padded, mask)
    return to_host(found.logprobs)[0, 1 : len(tokens)]


def _sum_alone(model: Model, tokens: np.ndarray) -> float:
    return float(logprobs_alone(model, tokens).sum(dtype=np.float32))


def _logits_alone(model: RewardModel, tokens: np.ndarray) -> np.ndarray:
    return to_host(model(*pad_rows([tokens], padded_width(len(tokens)), 0)))[0]
