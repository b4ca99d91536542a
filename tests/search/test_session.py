"""Slots of one compiled search, each with numbers of its own, against brute force."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.compiled import compilations
from tests.search.oracle import Oracle, assert_found
from tests.tiny import EOS, VOCAB, tiny_model
from w2s_jax.errors import InputError
from w2s_jax.ops.logits import Sampling
from w2s_jax.search import FunctionScorer, Guide, Request, search, search_models, step
from w2s_jax.search.compile import compile_session, compiled_beside
from w2s_jax.search.config import cbs, sample
from w2s_jax.search.methods import NoScore
from w2s_jax.search.session import (
    done_program,
    insert_program,
    release_program,
    search_requests,
    start_session,
)
from w2s_jax.text.prompts import Conversation, cut

RNG = np.random.default_rng(2)
PROMPTS = tuple(tuple(RNG.integers(4, VOCAB, size).tolist()) for size in (3, 1, 8, 5))
NUCLEUS = Sampling(1.0, 0, 0.9)
SAMPLES = sample(2, max_new_tokens=8, sampling=NUCLEUS, chunk_length=4)
BEAM = cbs(2, 2, 3, max_new_tokens=9, sampling=Sampling(1.0))
LETTERS = "<>|$abcdefghijklmnopqrs"


def decode(tokens):
    return "".join(LETTERS[token] for token in tokens)


@pytest.fixture(scope="module")
def policy():
    return tiny_model(0, layers=1)


@pytest.fixture(scope="module")
def guide():
    return Guide(tiny_model(1, layers=1), tiny_model(2, layers=1))


@pytest.fixture(scope="module")
def start(policy, guide):
    """Empty slots of one program, compiled for the first test that needs it."""

    def begin(config=SAMPLES, guides=guide, **settings):
        models = search_models(policy, guides)
        return start_session(models, config, slots=4, prefix_capacity=16, **settings)

    return begin


def results(session, slots):
    found, failed = session.outcomes(slots)
    assert not failed
    return found


def run(session, requests):
    """The result of each request, all side by side from the first chunk on."""
    for slot, request in enumerate(requests):
        session = session.insert(slot, request)
    found = {}
    while session.requests:
        session = session.advance()
        for slot, result in results(session, session.done_slots()).items():
            found[slot] = result
            session = session.release(slot)
    return [found[slot] for slot in range(len(requests))]


def tokens_of(result):
    return [h.tokens for h in result.hypotheses]


def test_what_is_compiled_ahead_is_all_that_runs(start):
    """Compiled on a thread of its own, for a server whose other thread goes on meanwhile."""
    jax.clear_caches()
    session = start(decode=decode)
    on_tokens = Request(0, PROMPTS[:1])
    through_texts = Request(0, PROMPTS[:1] * 3, stop=("ab",))
    # Of the first insert, step, done and release; of the other insert, propose and conclude.
    for request, count in ((on_tokens, 4), (through_texts, 3)):
        with compilations() as ahead, ThreadPoolExecutor(1) as other:
            other.submit(compile_session, session, request).result()
        assert len(ahead) == count
        with compilations() as later:
            run(start(decode=decode), [request, request])
        assert later == []


def test_where_texts_are_scored_two_chunks_are_searched_ahead(start):
    """What scorers compile has the shapes of texts, which are not known before."""
    seen = []

    def length(prompts, responses):
        seen.extend(responses)
        return [float(len(response)) for response in responses]

    config = replace(BEAM, scorer=NoScore())
    request = Request(0, PROMPTS[:1], conversation=Conversation(text="a"))
    options = {"guides": None, "decode": decode, "scorers": [FunctionScorer(length)]}
    session = compile_session(start(config, **options), request)
    assert BEAM.length < max(map(len, seen)) <= 2 * BEAM.length
    assert not session.requests
    assert run(session, [request]) == run(start(config, **options), [request])


def by_length(policy, guide):
    """What a search finds for prompts of two lengths, in 3 slots as nothing else here."""
    requests = [Request(index, (PROMPTS[0] * times,)) for index, times in enumerate((1, 9, 1, 1))]
    models, how = search_models(policy, guide), {"slots": 3, "beside": compiled_beside}
    return dict(search_requests(models, SAMPLES, requests, **how))


def test_the_programs_of_the_next_length_are_compiled_beside_the_search(policy, guide):
    """Of shapes alone, and the search uses what another thread has compiled."""
    with compilations() as everywhere, compilations(here=True) as here:
        by_length(policy, guide)
    # What makes the state, insert, step, done and release; for one length each.
    assert len(here) == len(set(here)) == 5
    assert sorted(everywhere) == sorted([*here, *here])


def test_what_cannot_be_compiled_beside_a_search_does_not_end_it(
    policy, guide, monkeypatch, caplog
):
    expected = by_length(policy, guide)

    def fail(*args, **settings):
        raise MemoryError

    monkeypatch.setattr("w2s_jax.search.compile.start_search", fail)
    with caplog.at_level("INFO"):
        assert by_length(policy, guide) == expected
    assert "could not be compiled" in caplog.text


def test_each_slot_heeds_its_own_numbers(start, policy):
    """And none of them is compiled in: no program is made for another number."""
    requests = [
        Request(3, PROMPTS[:1]),
        Request(4, PROMPTS[1:2], seed=9, limit=5),
        Request(-5, PROMPTS[2:3], temperature=2.5, top_p=0.6),
        Request(6, PROMPTS[3:], seed=7, temperature=0.4, top_p=1.0, limit=1),
    ]
    run(start(), requests[:1])
    programs = (step.search_step, insert_program, release_program, done_program)
    compiled = [program._cache_size() for program in programs]
    for asked, result in zip(requests, run(start(), requests), strict=True):
        # Where a nucleus may be cut the likeliest token is drawn first, even if none is.
        nucleus = Sampling(
            1.0 if asked.temperature is None else asked.temperature,
            0,
            0.9 if asked.top_p is None else min(asked.top_p, 1 - 1e-9),
        )
        limit = asked.limit or SAMPLES.max_new_tokens
        config = replace(SAMPLES, seed=asked.seed, sampling=nucleus, max_new_tokens=limit)
        oracle = Oracle(policy, (), config, EOS)
        # The key folds in 32 bits of a row id.
        expected = oracle.search(asked.prompts[0], asked.row_id % 2**32)
        assert result.row_id == asked.row_id
        assert tokens_of(result) == [kept.tokens for kept in expected], asked
        assert [h.finished for h in result.hypotheses] == [kept.finished for kept in expected]
    assert [program._cache_size() for program in programs] == compiled


def test_limits_end_searches_chunk_by_chunk(start):
    wholes = run(start(), [Request(row_id, ((4, 5),)) for row_id in range(4)])
    whole = next(r for r in wholes if not any(h.finished for h in r.hypotheses))
    session = start()
    limits = (1, 4, 5, 8)
    for slot, limit in enumerate(limits):
        session = session.insert(slot, Request(whole.row_id, ((4, 5),), limit=limit))
    assert session.done_slots() == []
    session = session.advance()
    assert session.done_slots() == [0, 1]
    session = session.advance()
    assert session.done_slots() == [0, 1, 2, 3]
    for slot, result in results(session, range(4)).items():
        assert tokens_of(result) == [tokens[: limits[slot]] for tokens in tokens_of(whole)]


def test_temperature_zero_follows_the_argmax(start, policy):
    """Of what one temperature compiled in gives, test_identities.py says the same."""
    asked = [Request(i, (prompt,), temperature=0) for i, prompt in enumerate(PROMPTS)]
    greedy = Oracle(policy, (), replace(SAMPLES, sampling=Sampling(0.0)), EOS)
    assert_found(greedy, PROMPTS, run(start(), asked))


def test_position_and_lane_go_on_where_a_whole_search_is(start):
    """A client that extends a response by pieces draws what the search in one piece draws."""
    prompt = PROMPTS[0]
    (whole,) = run(start(), [Request(1, (prompt,), seed=5)])
    by_lane = tokens_of(whole)
    assert by_lane[0] != by_lane[1]
    pieces = [
        Request(1, ((*prompt, *by_lane[lane][:position]),), seed=5, position=position, lane=lane)
        for lane, position in ((0, 3), (1, 3), (1, 5), (0, 0))
    ]
    for piece, result in zip(pieces, run(start(), pieces), strict=True):
        length = len(by_lane[piece.lane]) - piece.position
        assert length > 0
        own, next_lane = tokens_of(result)
        assert own[:length] == by_lane[piece.lane][piece.position :], piece
        if piece.lane == 0 and piece.position == 0:
            assert next_lane == by_lane[1]


def test_a_stop_string_ends_the_request_that_brought_it(start):
    free = run(start(), [Request(1, ((4, 5),)), Request(2, ((4, 5),))])
    texts = [[decode(h.tokens) for h in result.hypotheses] for result in free]
    stops = ((texts[0][0][3:5], "no such"), (texts[1][0][:1],))
    asked = [Request(1, ((4, 5),), stop=stops[0]), Request(2, ((4, 5),)),
             Request(2, ((4, 5),), stop=stops[1])]  # fmt: skip
    found = run(start(decode=decode), asked)
    assert found[1] == free[1]
    for result, before, stop in ((found[0], texts[0], stops[0]), (found[2], texts[1], stops[1])):
        for hypothesis, text in zip(result.hypotheses, before, strict=True):
            kept = cut(text, stop)
            assert decode(hypothesis.tokens) == (text if kept is None else kept)
            assert hypothesis.finished == (kept is not None or text.endswith(LETTERS[EOS]))
    assert found[0].hypotheses[0].finished
    assert found[2].hypotheses[0].tokens == ()


def test_results_so_far_slots_released_and_used_again(start, policy, guide):
    """After every chunk a slot shows what brute force has by then, whoever is beside it."""
    oracle = Oracle(policy, [guide], BEAM, EOS)
    session = start(BEAM)
    session = session.insert(0, Request(20, PROMPTS[:1]))
    session = session.insert(2, Request(21, PROMPTS[1:2]))
    assert results(session, [0])[0].best.tokens == ()
    session = session.advance()
    session = session.release(0)
    assert session.free == [0, 1, 3]
    session = session.insert(0, Request(22, PROMPTS[2:3]))
    session = session.insert(1, Request(20, PROMPTS[:1]))
    for chunk in (1, 2, 3):
        session = session.advance()
        shown = results(session, sorted(session.requests))
        behind = {0: (PROMPTS[2], chunk), 1: (PROMPTS[0], chunk), 2: (PROMPTS[1], chunk + 1)}
        for slot, result in shown.items():
            prompt, chunks = behind[slot]
            beam = oracle.search(prompt, result.row_id, chunks=min(chunks, BEAM.chunks))
            assert tokens_of(result) == [kept.tokens for kept in beam], (slot, chunks)
            for hypothesis, kept in zip(result.hypotheses, beam, strict=True):
                assert hypothesis.score == pytest.approx(kept.score, abs=2e-4, rel=1e-4)
                assert sum(hypothesis.token_scores) == pytest.approx(kept.score, abs=1e-3)
                assert len(hypothesis.token_scores) == len(hypothesis.tokens)
    assert session.done_slots() == [0, 1, 2]


def test_members_read_prompts_of_their_own(start, policy, guide):
    """As where the guide's template is another than the policy's."""
    others = [((4, *prompt, 6, 7), prompt[-1:]) for prompt in PROMPTS]
    found = search(policy, guide, PROMPTS, BEAM, guide_prompts=others)
    for prompt, own, result in zip(PROMPTS, others, found, strict=True):
        oracle = Oracle(policy, [guide], BEAM, EOS, behind=(prompt, own))
        assert_found(oracle, [prompt], [result])
    requests = [
        Request(i, (p, *own)) for i, (p, own) in enumerate(zip(PROMPTS, others, strict=True))
    ]
    # One request whose members read the same, among those that do not.
    session = start(BEAM).insert(0, Request(9, PROMPTS[:1]))
    for slot, request in enumerate(requests[1:], 1):
        session = session.insert(slot, request)
    while len(session.done_slots()) < 4:
        session = session.advance()
    beside = results(session, range(4))
    assert [tokens_of(beside[slot]) for slot in (1, 2, 3)] == [tokens_of(r) for r in found[1:]]
    assert_found(Oracle(policy, [guide], BEAM, EOS), PROMPTS[:1], [beside[0]])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(3, ()), "row 3: 0 prompts for 3 models"),
        (Request(3, ((4,), (5,))), "row 3: 2 prompts for 3 models; give one for all or one each"),
        (Request(3, ((),)), "row 3: a prompt must have 1 to 17 tokens here"),
        (Request(3, ((4,), (4,), (4,) * 18)), "row 3: a prompt must have 1 to 17 tokens here"),
        (Request(3, ((4,),), limit=0), "row 3: the limit is 0 new tokens; it must lie in 1 .. 9"),
        (Request(3, ((4,),), limit=10), "the limit is 10 new tokens"),
        (Request(3, ((4,),), stop=("x",)), "stop strings need `decode`"),
        (Request(3, ((4,),), temperature=float("nan")), "row 3: temperature is nan"),
        (Request(3, ((4,),), top_p=0), "row 3: top_p is 0.0"),
        (Request(3, ((4,),), beta=-1), "row 3: beta is -1.0"),
    ],
)
def test_wrong_requests_are_refused(start, guide, request_, message):
    with pytest.raises(InputError, match=message):
        start(BEAM).insert(0, request_)


def test_a_slot_that_is_not_there_is_refused(start, guide):
    with pytest.raises(InputError, match="slot 99 is none of the"):
        start(BEAM).insert(99, Request(3, ((4,),)))


def test_wrong_sessions_are_refused(start, policy, guide):
    scorer = FunctionScorer(lambda _, responses: [0.0] * len(responses))
    with pytest.raises(InputError, match="need `decode`"):
        start(BEAM, scorers=[scorer])
    with pytest.raises(InputError, match="need `decode`"):
        start(BEAM, traced=True)
    session = start(BEAM, scorers=[scorer], decode=decode)
    with pytest.raises(InputError, match="row 3: scorers of texts need its conversation"):
        session.insert(0, Request(3, ((4,),)))
    with pytest.raises(InputError, match="row 0: 2 prompts for 3 models; give one each"):
        search(policy, guide, [[4]], BEAM, guide_prompts=[[[4]]])
    with pytest.raises(InputError, match="row 0: the prompt has no tokens"):
        search(policy, guide, [[4]], BEAM, guide_prompts=[[[4], []]])
    with pytest.raises(InputError, match="120 tokens and 9 new ones do not fit the tuned model's"):
        search(policy, guide, [[4]], BEAM, guide_prompts=[[[4] * 120, [4]]])
    with pytest.raises(InputError, match="0 guide prompts for 1 prompts"):
        search(policy, guide, [[4]], BEAM, guide_prompts=[])
