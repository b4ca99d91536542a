"""Texts read behind what is known of them, against plain forward passes over the whole of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.search.oracle import log_softmax
from tests.tiny import VOCAB, tiny_model
from w2s_jax.models.reward import RewardModel
from w2s_jax.search import incremental_text as reading_module
from w2s_jax.search.incremental_text import (
    MERGES,
    common,
    insert_text,
    keep_rows,
    read_logprobs,
    read_rewards,
    start_reading,
)

SLOTS, W, K, L = 2, 2, 2, 3
PADDED = 128
MODEL = tiny_model(1, layers=1)
STACKED = tiny_model(1, layers=2, scan_layers=True, sliding_windows=(5, None))
HEAD = {
    "kernel": np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32),
    "bias": np.ones(2, np.float32),
}


def whole(model, tokens, prompt):
    """The sum over the tokens behind what text and prompt have in common, by one forward pass."""
    padded = np.zeros((1, PADDED), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(model(padded))[0]
    start = max(common(np.asarray(tokens), np.asarray(prompt)), 1)
    return sum(log_softmax(logits[i - 1])[tokens[i]] for i in range(start, len(tokens)))


def last_reward(rewards, tokens):
    padded = np.zeros((1, PADDED), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(rewards(padded, np.arange(PADDED)[None] < len(tokens)))


def writings(data, before):
    """How a text continues: its encoding may change in the last tokens, then goes on."""
    back = data.draw(st.sampled_from([0, 0, 0, 0, 1, 2, 5]))
    tail = data.draw(st.lists(st.integers(4, VOCAB - 1), max_size=5))
    return [*before[: max(0, len(before) - back)], *tail]


@settings(max_examples=6)
@given(data=st.data())
def test_what_is_kept_changes_no_score(data):
    texts = st.lists(st.integers(4, VOCAB - 1), min_size=1, max_size=8)
    prompts = [data.draw(texts) for _ in range(SLOTS)]
    reading = start_reading(SLOTS, W, K, L)
    for slot, prompt in enumerate(prompts):
        reading = insert_text(reading, slot, prompt)
    beams = {(slot, w): prompts[slot] for slot in range(SLOTS) for w in range(W)}
    for _ in range(3):
        rows = {}
        for slot, w in beams:
            if data.draw(st.integers(0, 4)) == 0:  # a finished hypothesis has no rows
                continue
            for k in range(K):
                text = writings(data, beams[slot, w])
                if text:
                    rows[slot, w * K + k] = text
        if not rows:
            continue
        reading, sums = read_logprobs(MODEL, reading, rows)
        for (slot, row), text in rows.items():
            expected = whole(MODEL, text, prompts[slot])
            assert sums[slot, row] == pytest.approx(expected, abs=1e-4), (slot, row, text)
        parents = np.array([[data.draw(st.integers(0, W - 1)) for _ in range(W)] for _ in prompts])
        places = parents * K + data.draw(st.integers(0, K - 1))
        reading = keep_rows(reading, parents, places)
        kept = {}
        for slot in range(SLOTS):
            for w in range(W):
                old = beams[slot, parents[slot, w]]
                kept[slot, w] = rows.get((slot, places[slot, w]), old)
        beams = kept


def test_a_chunk_reads_only_what_changed(monkeypatch):
    prompt = list(range(4, 20))
    reading = insert_text(start_reading(SLOTS, W, K, L), 0, prompt)
    texts = {(0, r): [*prompt, 5 + r, 6] for r in range(W * K)}
    reading, _ = read_logprobs(MODEL, reading, texts)
    reading = keep_rows(reading, np.array([[0, 1]] * SLOTS), np.array([[0, 2]] * SLOTS))
    assert reading.prefix[0] == len(prompt) - 1
    assert [len(known.tokens) for known in reading.known[0]] == [len(prompt) + 2] * W
    longer = {(0, r): [*texts[0, 2 * (r // K)], 7, 8 + r] for r in range(W * K)}
    sizes = []

    def spy(model, cache, committed, last, tokens):
        sizes.append((committed[0].tolist(), tokens.shape))
        return read(model, cache, committed, last, tokens)

    read = reading_module.read_rows
    monkeypatch.setattr(reading_module, "read_rows", spy)
    _, sums = read_logprobs(MODEL, reading, longer)
    # The prefix holds all of the prompt but its last token; the last token read is read again.
    assert sizes == [([2, 2], (SLOTS, W * K, L + MERGES))]
    for (_, row), text in longer.items():
        assert sums[0, row] == pytest.approx(whole(MODEL, text, prompt), abs=1e-4)


@pytest.mark.parametrize(("model", "count"), [(STACKED, 4), (MODEL, 5)], ids=["stacked", "apart"])
def test_rows_may_be_longer_than_others(model, count):
    """All are read as wide as the longest, and any of them may be kept."""
    slots, successors = 2, 4
    generator = np.random.default_rng(count)
    draw = lambda n: generator.integers(4, VOCAB, n).tolist()  # noqa: E731
    prompts = [draw(9), draw(3)]
    reading = start_reading(slots, W, successors, L)
    for slot, prompt in enumerate(prompts):
        reading = insert_text(reading, slot, prompt)
    rows = W * successors
    kept = {(slot, w): prompts[slot] for slot in range(slots) for w in range(W)}
    longest = [(0, 1), (0, 2), (1, 7), (0, 6), (1, 0)][:count]
    for _ in range(3):
        texts = {
            # The stem is read again, so that at most 7 tokens lie behind it.
            (slot, r): [
                *kept[slot, r // successors],
                *draw(6 if (slot, r) in longest else 3 + r % 2),
            ]
            for slot in range(slots)
            for r in range(rows)
        }
        reading, sums = read_logprobs(model, reading, texts)
        for (slot, row), text in texts.items():
            assert sums[slot, row] == pytest.approx(whole(model, text, prompts[slot]), abs=1e-4)
        places = np.array([[2, 6], [7, 3]])
        reading = keep_rows(reading, places // successors, places)
        kept = {(slot, w): texts[slot, places[slot, w]] for slot, w in kept}


def test_a_refilled_slot_remembers_nothing():
    reading = insert_text(start_reading(SLOTS, W, K, L), 0, [4, 5, 6])
    reading, _ = read_logprobs(MODEL, reading, {(0, 0): [4, 5, 6, 7, 8]})
    reading = keep_rows(reading, np.zeros((SLOTS, W), int), np.zeros((SLOTS, W), int))
    reading = insert_text(reading, 0, [9, 10])
    _, sums = read_logprobs(MODEL, reading, {(0, 0): [9, 10, 11]})
    assert sums[0, 0] == pytest.approx(whole(MODEL, [9, 10, 11], [9, 10]), abs=1e-4)


def test_caches_grow_with_the_texts_and_of_one_beyond_the_positions_what_fits_is_scored(caplog):
    text = [4, *np.random.default_rng(0).integers(4, VOCAB, 139).tolist()]
    reading = insert_text(start_reading(1, 1, 1, 1), 0, [4])
    for length in (12, 56, 120, 130, 140):
        assert (length > 130) == ("exceed" in caplog.text)
        reading, sums = read_logprobs(MODEL, reading, {(0, 0): text[:length]})
        reading = keep_rows(reading, np.zeros((1, 1), int), np.zeros((1, 1), int))
        assert sums[0, 0] == pytest.approx(whole(MODEL, text[: min(length, 128)], [4]), abs=1e-4)
    assert caplog.text.count("130 tokens exceed the 128 positions") == 1
    assert "140 tokens" not in caplog.text


def test_rewards_are_read_at_the_last_token():
    rewards = RewardModel(MODEL.config, MODEL.params, HEAD, ("a", "b"))
    prompt = [4, 9, 5]
    reading = insert_text(start_reading(1, W, K, L), 0, prompt)
    texts = {(0, 0): prompt, (0, 1): [4, 9, 7, 7], (0, 2): [*prompt, 8, 8], (0, 3): [6, 6]}
    for _ in range(3):
        reading, logits = read_rewards(rewards, reading, texts)
        for place, text in texts.items():
            np.testing.assert_allclose(logits[place], last_reward(rewards, text)[0], atol=1e-4)
        reading = keep_rows(reading, np.array([[0, 1]]), np.array([[1, 2]]))
        kept = [texts[0, 1], texts[0, 2]]
        texts = {(0, r): [*kept[r // K], *range(5 + r, 8 + r)] for r in range(W * K)}
