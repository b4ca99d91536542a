"""The search over texts against one written out by hand, over the same scripted continuations."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.search.oracle import Oracle
from tests.tiny import EOS, VOCAB, tiny_model
from w2s_jax.errors import InputError, RowsFailed
from w2s_jax.ops.logits import Sampling
from w2s_jax.search import Guide
from w2s_jax.search.config import SearchConfig, best_of_n, cbs, eft, sample
from w2s_jax.search.file import read_questions, search_rows
from w2s_jax.search.methods import Maximin, NoScore, TopW
from w2s_jax.search.scorers import Candidate, FunctionScorer
from w2s_jax.search.text_run import Continuation, Extension, TextPolicy, search_texts
from w2s_jax.text.prompts import Conversation
from w2s_jax.text.rows import open_journal

PROMPTS = ("", "the sea", "{x} \n", "ein Ω", "a b", "one more", "the sea")
LETTERS = "abcdeS|"


def bits(*parts: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def write(seed: int, row_id: int, text: str, position: int, lane: int, most: int) -> Continuation:
    """Up to `most` letters, one a token, that depend on all of the arguments."""
    said = ""
    for step in range(most):
        number = bits(seed, row_id, text + said, position + step, lane)
        if number % 9 == 0:
            return Continuation(said, True, step + 1, stopped=number % 27 == 0)
        said += LETTERS[number % 7]
    return Continuation(said, False, most)


@dataclass
class Scripted:
    """Continues as `write` does, and remembers what it was asked."""

    seed: int = 0
    asked: list[list[Extension]] = field(default_factory=list)

    def extend(self, extensions):
        self.asked.append(list(extensions))
        return [
            [
                write(self.seed, e.row_id, prompt_of(e), e.position, e.lane + k, e.max_tokens)
                for k in range(e.count)
            ]
            for e in extensions
        ]


def prompt_of(extension: Extension) -> str:
    return f"{extension.conversation.text}/{extension.response}"


def value(prompt: str, response: str, finished: bool) -> float:
    """A score that every part of a candidate decides; multiples of 1/64, so sums are exact."""
    return (bits("score", prompt, response, finished) % 4096) / 64 - 32


@dataclass(frozen=True)
class Hashed:
    """A scorer of whole candidates; its memory checks what it is told of slots and survivors."""

    weight: float | int = 1.0
    salt: str = ""

    def start(self, slots, hypotheses, successors, chunk_length):
        beams = [[None] * hypotheses for _ in range(slots)]
        return {"k": successors, "beams": beams, "rows": {}, "conversations": [None] * slots}

    def insert(self, memory, slot, conversation):
        beams, held = list(memory["beams"]), list(memory["conversations"])
        beams[slot], held[slot] = [""] * len(beams[slot]), conversation
        return memory | {"beams": beams, "conversations": held}

    def score(self, memory, candidates):
        for c in candidates:
            assert c.conversation == memory["conversations"][c.slot]
            assert c.parent == c.row // memory["k"]
            before = memory["beams"][c.slot][c.parent]
            assert c.response.startswith(before) or "S|" in before + "S|"
        assert len({(c.slot, c.row) for c in candidates}) == len(candidates)
        rows = {(c.slot, c.row): c.response for c in candidates}
        said = [value(self.salt + c.conversation.text, c.response, c.finished) for c in candidates]
        return memory | {"rows": rows}, np.array(said, np.float32)

    def keep(self, memory, parents, rows):
        assert parents.shape == rows.shape == (len(memory["beams"]), len(memory["beams"][0]))
        beams = [
            [
                memory["rows"].get((slot, row), memory["beams"][slot][parent])
                for parent, row in zip(parents[slot].tolist(), rows[slot].tolist(), strict=True)
            ]
            for slot in range(len(parents))
        ]
        return memory | {"beams": beams, "rows": {}}


@dataclass(frozen=True)
class Kept:
    response: str = ""
    score: float = 0.0
    finished: bool = False


def brute_force(prompt, row_id, seed, config: SearchConfig, scorers) -> list[Kept]:
    """One prompt at a time, every choice written out; KeepAll where selectors do not reorder."""

    def score(response, end):
        return sum(s.weight * value(s.salt + prompt, response, end) for s in scorers)

    beam = [Kept()] * config.beam_width
    base = 0
    while base < config.max_new_tokens and not all(kept.finished for kept in beam):
        length = min(config.chunk_length, config.max_new_tokens - base)
        last = base + config.chunk_length >= config.max_new_tokens
        successors: list[list[Kept]] = []
        for w, kept in enumerate(beam):
            if kept.finished:
                successors.append([kept] * (config.successors if config.reference_quirks else 1))
                continue
            grown = []
            for k in range(config.successors):
                text = f"{prompt}/{kept.response}"
                new = write(seed, row_id, text, base, w * config.successors + k, length)
                response, finished = kept.response + new.text, new.finished
                end = finished and not new.stopped
                if not finished and last and config.reference_quirks:
                    end = True
                found = [response.find(s) for s in config.stop if s in response]
                if found:
                    response, finished, end = response[: min(found)], True, False
                grown.append(Kept(response, score(response, end), finished))
            successors.append(grown)
        if config.selector.reorders:
            live = [kept for own, new in zip(beam, successors, strict=True) if not own.finished
                    for kept in new]  # fmt: skip
            over = [kept for own, new in zip(beam, successors, strict=True) if own.finished
                    for kept in new]  # fmt: skip
            beam = sorted(live + over, key=lambda kept: -kept.score)[: config.beam_width]
        else:
            beam = [new[0] for new in successors]
        base += length
    return sorted(beam, key=lambda kept: -kept.score)


def as_kept(result) -> list[tuple]:
    return [(h.response, h.score, h.finished) for h in result.hypotheses]


def conversations(prompts=PROMPTS):
    return [Conversation(text=prompt) for prompt in prompts]


SIZES = {
    # A few shapes only: the selector compiles for each.
    "sizes": st.sampled_from([(1, 1, 2), (1, 4, 3), (2, 3, 1), (3, 1, 4), (3, 2, 3), (2, 2, 7)]),
    "l": st.integers(1, 6),
    "limit": st.integers(1, 14),
    "seed": st.integers(0, 2**31),
    "quirks": st.booleans(),
    "stop": st.sampled_from([(), ("S",), ("S|", "ab"), ("cd", "c")]),
    "scorers": st.sampled_from([(Hashed(),), (Hashed(), Hashed(0.5, "x"))]),
}


@settings(max_examples=50)
@given(**SIZES)
def test_search_texts_equals_brute_force(sizes, l, limit, seed, quirks, stop, scorers):  # noqa: E741
    w, k, slots = sizes
    config = cbs(w, k, l, max_new_tokens=limit, stop=stop, slots=slots, reference_quirks=quirks)
    found = search_texts(Scripted(seed), scorers, conversations(), config)
    for row_id, (prompt, result) in enumerate(zip(PROMPTS, found, strict=True)):
        expected = brute_force(prompt, row_id, seed, config, scorers)
        assert result.row_id == row_id
        assert sorted(as_kept(result)) == sorted(
            (e.response, e.score, e.finished) for e in expected
        )
        assert [h.score for h in result.hypotheses] == [e.score for e in expected]
        assert all(sum(h.objectives) == h.score for h in result.hypotheses)


@settings(max_examples=20)
@given(
    sizes=st.sampled_from([(1, 2), (3, 3), (5, 4)]),
    **{name: SIZES[name] for name in ("limit", "seed", "quirks", "stop")},
)
def test_best_of_n_equals_brute_force(sizes, limit, seed, quirks, stop):
    w, slots = sizes
    config = best_of_n(
        w, max_new_tokens=limit, stop=stop, slots=slots, reference_quirks=quirks, chunk_length=3
    )
    found = search_texts(Scripted(seed), [Hashed()], conversations(), config)
    for row_id, (prompt, result) in enumerate(zip(PROMPTS, found, strict=True)):
        expected = brute_force(prompt, row_id, seed, config, [Hashed()])
        assert as_kept(result) == [(e.response, e.score, e.finished) for e in expected]


def test_one_hypothesis_and_one_successor_is_sampling():
    config = cbs(1, 1, 4, max_new_tokens=12)
    for result, drawn in zip(
        search_texts(Scripted(3), [Hashed()], conversations(), config),
        search_texts(Scripted(3), [], conversations(), replace(config, scorer=NoScore())),
        strict=True,
    ):
        assert result.best.response == drawn.best.response
        assert drawn.best.score == 0.0
        assert drawn.best.objectives == ()


def test_one_long_chunk_is_best_of_n():
    whole = cbs(1, 5, 12, max_new_tokens=12)
    apart = best_of_n(5, max_new_tokens=12, chunk_length=12)
    scored = search_texts(Scripted(1), [Hashed()], conversations(), whole)
    drawn = search_texts(Scripted(1), [Hashed()], conversations(), apart)
    assert [r.best for r in scored] == [r.best for r in drawn]
    assert all(len(r.hypotheses) == 5 for r in drawn)


def test_samples_are_scored_when_they_end_and_not_before():
    calls = []

    def score(prompts, responses):
        calls.extend(zip(prompts, responses, strict=True))
        return [float(len(response)) for response in responses]

    config = best_of_n(4, max_new_tokens=9, chunk_length=3)
    found = search_texts(Scripted(), [FunctionScorer(score)], conversations(("p", "q")), config)
    ended = [(p, h.response) for p, r in zip("pq", found, strict=True) for h in r.hypotheses]
    assert sorted(calls) == sorted(ended)


@settings(max_examples=12)
@given(order=st.permutations(range(len(PROMPTS))), slots=st.sampled_from([1, 2, 5, 8]))
def test_order_and_company_of_prompts_change_nothing(order, slots):
    config = cbs(2, 3, 3, max_new_tokens=9, slots=slots)
    straight = search_texts(Scripted(5), [Hashed()], conversations(), config)
    mixed = search_texts(
        Scripted(5), [Hashed()], conversations([PROMPTS[i] for i in order]), config, row_ids=order
    )
    assert [straight[i] for i in order] == mixed


@pytest.mark.parametrize("quirks", [False, True])
def test_a_finished_hypothesis_stays_once_or_k_times_with_quirks(quirks):
    class Ends:
        """Row 0 of the first chunk ends at once, and is by far the best."""

        def extend(self, extensions):
            return [
                [
                    Continuation("!", True, 1)
                    if e.position == 0 and e.lane + k == 0
                    else Continuation("ab", False, 2)
                    for k in range(e.count)
                ]
                for e in extensions
            ]

    chunks = []
    scorer = FunctionScorer(lambda _, responses: [99.0 if "!" in r else -len(r) for r in responses])
    config = cbs(3, 2, 2, max_new_tokens=6, reference_quirks=quirks)
    [result] = search_texts(Ends(), [scorer], conversations(("p",)), config, on_chunk=chunks.append)
    responses = [h.response for h in result.hypotheses]
    # With quirks its K copies fill the beam in two chunks, and the search is over.
    assert responses == (["!", "!", "!"] if quirks else ["!", "ababab", "ababab"])
    assert len(chunks) == 3
    assert [texts.count("") for texts in (chunk.texts for chunk in chunks)] == (
        [0, 1, 2] if quirks else [0, 1, 1]
    )


def test_chunks_tell_what_was_offered_and_kept():
    chunks, config = [], cbs(2, 2, 3, max_new_tokens=9)
    scorers = [Hashed(2.0), Hashed(0.5, "x")]
    results = search_texts(Scripted(8), scorers, conversations(), config, on_chunk=chunks.append)
    carried = 0
    for result in results:
        beam = [("", False)] * 2
        for chunk in (chunk for chunk in chunks if chunk.row_id == result.row_id):
            assert chunk.objectives.shape == (len(chunk.texts), 2)
            rows = zip(chunk.parents, chunk.texts, chunk.finished, chunk.kept, strict=True)
            offered = [(beam[p][0] + text, ends, kept, p, text) for p, text, ends, kept in rows]
            for _, ends, _, parent, text in offered:
                if beam[parent][1]:
                    assert (text, ends) == ("", True)
                    carried += 1
            places = sorted(entry for entry in offered if entry[2] >= 0)
            assert sorted(entry[2] for entry in places) == [0, 1]
            beam = [next((o[0], o[1]) for o in offered if o[2] == place) for place in (0, 1)]
        assert sorted(text for text, _ in beam) == sorted(h.response for h in result.hypotheses)
    assert carried, "no finished hypothesis was carried over; change the seed"


def test_every_round_asks_for_all_slots_at_once_and_refills_them():
    proposer, config = Scripted(2), cbs(2, 2, 3, max_new_tokens=7, slots=3)
    done = []
    search_texts(proposer, [Hashed()], conversations(), config, on_result=done.append)
    assert sorted(result.row_id for result in done) == list(range(len(PROMPTS)))
    assert [len({e.row_id for e in asked}) for asked in proposer.asked[:3]] == [3, 3, 3]
    draws = [(e.row_id, e.position, e.lane) for asked in proposer.asked for e in asked]
    assert len(set(draws)) == len(draws)
    assert all(e.count == 2 and e.max_tokens == (1 if e.position == 6 else 3)
               for asked in proposer.asked for e in asked)  # fmt: skip
    spent = dict.fromkeys(range(len(PROMPTS)), 0)
    for e in (e for asked in proposer.asked for e in asked):
        written = Scripted(2).extend([e])[0]
        spent[e.row_id] += sum(continuation.tokens for continuation in written)
    assert {result.row_id: result.tokens for result in done} == spent


def test_empty_continuations_end():
    class Mute:
        rounds = 0

        def extend(self, extensions):
            self.rounds += 1
            return [[Continuation("", False, 0)] * e.count for e in extensions]

    mute = Mute()
    [result] = search_texts(mute, [Hashed()], conversations(("p",)), cbs(2, 2, 5))
    assert mute.rounds == 10
    assert [h.response for h in result.hypotheses] == ["", ""]
    assert not result.best.finished


def test_maximin_keeps_what_is_good_in_every_way():
    class Two:
        def extend(self, extensions):
            return [[Continuation(text, True, 1) for text in scores] for _ in extensions]

    scores = {"loud": (10.0, -1.0), "even": (2.0, 1.0)}
    scorers = [FunctionScorer(lambda _, rs, j=j: [scores[r][j] for r in rs]) for j in (0, 1)]
    for selector, best in ((TopW(), "loud"), (Maximin(0.1), "even")):
        config = cbs(1, 2, 4, selector=selector)
        [result] = search_texts(Two(), scorers, conversations(("p",)), config)
        assert result.best.response == best
        assert result.best.objectives == scores[best]


@pytest.mark.parametrize(
    ("config", "scorers", "said"),
    [
        (eft(), [Hashed()], "EFTProposer mixes logits"),
        (cbs(), [], "no scorer is given"),
    ],
)
def test_what_needs_logits_is_refused(config, scorers, said):
    with pytest.raises(InputError, match=said):
        search_texts(Scripted(), scorers, conversations(), config)


def test_a_score_that_is_no_number_is_refused():
    @dataclass(frozen=True)
    class Broken(Hashed):
        def score(self, memory, candidates):
            return memory, np.full(len(candidates), np.nan, np.float32)

    with pytest.raises(InputError, match="the scorer Broken gave a score that is not a fini"):
        search_texts(Scripted(), [Broken()], conversations(), cbs())


def test_row_ids_must_match():
    with pytest.raises(InputError, match="2 row ids for 7 prompts"):
        search_texts(Scripted(), [Hashed()], conversations(), cbs(), row_ids=[1, 2])


def test_no_prompts_are_no_results():
    assert search_texts(Scripted(), [Hashed()], [], cbs()) == []


def test_rows_are_resumed_where_the_journal_ends(tmp_path):
    rows = [{"prompt": text, "gold": i, "score": "old"} for i, text in enumerate(PROMPTS)]
    rows.append({"instruction": "say {it}", "input": "now"})
    config = cbs(2, 2, 3, max_new_tokens=9, slots=2)
    scorer = FunctionScorer(
        lambda ps, rs: [value(p, r, False) for p, r in zip(ps, rs, strict=True)]
    )

    @dataclass
    class Failing(Scripted):
        rounds: int = 5

        def extend(self, extensions):
            if len(self.asked) == self.rounds:
                raise InputError("endpoint stopped answering")
            return super().extend(extensions)

    seen = []

    def run(proposer, journal):
        policy = TextPolicy(proposer, [scorer], config)
        search_rows(policy, read_questions(rows, "in.jsonl line"), journal, on_row=seen.append)

    whole = open_journal(tmp_path / "whole.journal", {})
    run(Scripted(), whole)
    part = open_journal(tmp_path / "part.journal", {})
    with pytest.raises(InputError, match="stopped answering"):
        run(Failing(), part)
    done = set(part.read())
    assert 0 < len(done) < len(rows)
    rest = Scripted()
    run(rest, part)
    assert {e.row_id for asked in rest.asked for e in asked} == set(range(len(rows))) - done
    assert part.read() == whole.read()
    assert len(seen) == 2 * len(rows)
    whole.merge(tmp_path / "out.jsonl", len(rows))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line.get("prompt") for line in lines] == [*PROMPTS, None]
    assert list(lines[1]) == ["prompt", "response", "score", "hypotheses", "gold"]
    assert lines[1]["hypotheses"][0] == {k: lines[1][k] for k in ("response", "score")}
    assert lines[-1]["instruction"] == "say {it}"


class Failing(Hashed):
    """Values no response to "a b", as a model would whose logits are NaN."""

    def score(self, memory, candidates):
        memory, scores = super().score(memory, candidates)
        fails = [candidate.conversation.text == "a b" for candidate in candidates]
        return memory, np.where(fails, np.float32(np.nan), scores)

    def blame(self, memory, place):
        return ("judge",)


def test_a_row_that_a_scorer_cannot_value_fails_alone():
    config, seen = cbs(2, 2, 3, max_new_tokens=6, slots=2), []
    expected = search_texts(Scripted(), [Hashed()], conversations(), config)
    with pytest.raises(RowsFailed, match="^row 4: logits of the judge are NaN or inf") as raised:
        search_texts(Scripted(), [Failing()], conversations(), config, on_result=seen.append)
    assert [failure.models for failure in raised.value.failures] == [("judge",)]
    others = [None if result.row_id == 4 else result for result in expected]
    assert list(raised.value.results) == others
    assert len(seen) == len(PROMPTS) - 1


def test_a_trace_tells_what_the_search_looked_at(tmp_path):
    journal = open_journal(tmp_path / "j.journal", {})
    rows = [{"prompt": "a", "trace": "old"}, {"prompt": "b"}]
    config = cbs(2, 2, 3, max_new_tokens=6)
    policy = TextPolicy(Scripted(4), [Hashed()], config, render=lambda c: f"<{c.text}>")
    search_rows(policy, read_questions(rows, "in"), journal, method="cbs", traced=True)
    for index, row in journal.read().items():
        trace = row.pop("trace")
        assert trace["row_id"] == index
        assert trace["prompt"] == f"<{row['prompt']}>"
        assert (trace["response"], trace["score"]) == (row["response"], row["score"])
        assert (trace["method"], trace["tokens"]) == ("cbs", [])
        assert trace["policy_tokens"] > 0
        kept = [c["kept"] for c in trace["chunks"][0]["candidates"]]
        assert sorted(k for k in kept if k is not None) == [0, 1]
        assert len(kept) == 4


def test_a_row_without_a_prompt_is_named():
    with pytest.raises(InputError, match="in.jsonl line 2"):
        read_questions([{"prompt": "a"}, {"x": 1}], "in.jsonl line")


def test_sampling_needs_no_scorer():
    results = search_texts(Scripted(), [], conversations(), sample(3, max_new_tokens=8))
    assert all(len(r.hypotheses) == 3 for r in results)


def test_candidates_name_their_slot_and_parent():
    seen: list[Candidate] = []

    @dataclass(frozen=True)
    class Watching(Hashed):
        def score(self, memory, candidates):
            seen.extend(candidates)
            return super().score(memory, candidates)

    search_texts(Scripted(), [Watching()], conversations(), cbs(2, 3, 4, slots=3))
    assert {c.slot for c in seen} == {0, 1, 2}
    assert {(c.row, c.parent) for c in seen} == {(r, r // 3) for r in range(6)}


@pytest.mark.parametrize("quirks", [False, True])
def test_scorers_are_told_what_was_kept(quirks):
    memories = []

    @dataclass(frozen=True)
    class Watching(Hashed):
        def keep(self, memory, parents, rows):
            assert (rows // 3 == parents).all()
            memories.append(super().keep(memory, parents, rows))
            return memories[-1]

    carried = 0
    config = cbs(3, 3, 2, max_new_tokens=6, slots=2, reference_quirks=quirks)
    for seed in range(20):
        [result] = search_texts(Scripted(seed), [Watching()], conversations(("p",)), config)
        assert sorted(memories[-1]["beams"][0]) == sorted(h.response for h in result.hypotheses)
        carried += len({h.finished for h in result.hypotheses}) > 1
    assert carried, "no hypothesis ends before another one; change the seed"


def spell(tokens) -> str:
    """A letter a token, and nothing for EOS, as tokenizers leave it out."""
    return "".join(chr(0x4E00 + token) for token in tokens if token != EOS)


def read(text: str) -> list[int]:
    return [ord(letter) - 0x4E00 for letter in text]


@dataclass(frozen=True)
class Drawn:
    """The on-device search's policy as a proposer: its draws, from row id, position and lane."""

    oracle: Oracle

    def extend(self, extensions):
        return [[self.one(e, e.lane + k) for k in range(e.count)] for e in extensions]

    def one(self, e: Extension, lane: int) -> Continuation:
        before, tokens = [*read(e.conversation.text or ""), *read(e.response)], []
        for step in range(e.max_tokens):
            tokens.append(self.oracle.draw([*before, *tokens], e.row_id, e.position + step, lane))
            if tokens[-1] == EOS:
                return Continuation(spell(tokens), True, len(tokens))
        return Continuation(spell(tokens), False, len(tokens))


@dataclass(frozen=True)
class Implicit(Hashed):
    """The implicit reward, read from the text."""

    oracle: Oracle | None = None

    def score(self, memory, candidates):
        memory, _ = super().score(memory, candidates)
        said = [
            self.oracle.implicit_reward(
                read(c.conversation.text), [*read(c.response), *([EOS] if c.finished else [])]
            )
            for c in candidates
        ]
        return memory, np.array(said, np.float32)


OF_TOKENS = {
    "beam": cbs(2, 3, 4, max_new_tokens=11, stop=(spell([5]), spell([9, 14]))),
    "quirks": cbs(2, 2, 4, max_new_tokens=10, reference_quirks=True),
}


# That the search on the device is the oracle's is said in test_oracle.py and test_guidance.py.
@pytest.mark.parametrize("name", OF_TOKENS)
def test_the_same_draws_give_what_the_search_of_tokens_gives(name):
    config = replace(OF_TOKENS[name], seed=4, slots=2, sampling=Sampling(1.0))
    policy, guide = tiny_model(0, layers=1), Guide(tiny_model(1, layers=1), tiny_model(2, layers=1))
    rng = np.random.default_rng(1)
    prompts = [rng.integers(4, VOCAB, size).tolist() for size in (1, 3, 9)]
    ids = (20, 21, 22)
    oracle = Oracle(policy, [guide], config, EOS, decode=spell)
    asked = [Conversation(text=spell(prompt)) for prompt in prompts]
    found = search_texts(Drawn(oracle), [Implicit(oracle=oracle)], asked, config, row_ids=ids)
    beams = [oracle.search(prompt, row_id) for prompt, row_id in zip(prompts, ids, strict=True)]
    for result, beam in zip(found, beams, strict=True):
        assert [(h.response, h.finished) for h in result.hypotheses] == [
            (spell(kept.tokens), kept.finished) for kept in beam
        ]
        scores = [[kept.score for kept in of] for of in (result.hypotheses, beam)]
        np.testing.assert_allclose(*scores, atol=2e-4, rtol=1e-4)
    ends = [kept.tokens[-1] == EOS for beam in beams for kept in beam if kept.finished]
    assert any(ends), "no response ends by EOS; change the seed"
    assert not config.stop or not all(ends), "no stop string ends a response; change the seed"
