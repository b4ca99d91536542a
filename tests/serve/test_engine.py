import asyncio
import threading
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from tests.serve.tiny_server import served_at
from w2s_jax.errors import InputError, RowFailed, RowsFailed
from w2s_jax.ops.logits import Sampling
from w2s_jax.search import search
from w2s_jax.search.config import cbs
from w2s_jax.search.likelihood import score_responses, token_likelihoods
from w2s_jax.search.methods import EFTProposer
from w2s_jax.search.scorers import FunctionScorer
from w2s_jax.serve import engine as room
from w2s_jax.serve import tasks
from w2s_jax.serve.config import ServeConfig
from w2s_jax.serve.engine import Engine
from w2s_jax.serve.jobs import Reader
from w2s_jax.serve.schema import ApiError, Completion
from w2s_jax.serve.tasks import Done, Failed, Progress
from w2s_jax.text.prompts import decode_tokens, response_end

CONFIG = ServeConfig(
    method="cbs", beam_width=2, successors=2, chunk_length=3, max_new_tokens=12, temperature=1.0,
    top_k=0, slots=3, queue=64, most_tokens=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return served_at(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def engine(served):
    engine = Engine(served, CONFIG)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def reader(served):
    return Reader(served, CONFIG)


def jobs(reader, **fields):
    """Two choices each, so that one program serves all that a method is asked for."""
    usual = {"model": "m", "prompt": "The", "seed": 1, "n": 2}
    return reader.completion(Completion(**(usual | fields)))


async def events(engine, asked):
    """All events of some jobs."""
    ticket, found, over = engine.submit(asked), [], 0
    while over < len(asked):
        found.append(await asyncio.wait_for(ticket.next(), 120))
        over += isinstance(found[-1], Done | Failed)
    return found


async def answers(engine, asked):
    ends = {e.job: e for e in await events(engine, asked) if isinstance(e, Done | Failed)}
    return [ends[index] for index in range(len(asked))]


def answer(engine, reader, **fields):
    """The choices of one job, alone."""
    (done,) = asyncio.run(answers(engine, jobs(reader, **fields)))
    if isinstance(done, Failed):
        raise done.error
    return done.choices


def metric(engine, name):
    return engine.metrics.registry.get_sample_value(name)


def settle(engine):
    async def wait():
        while not engine.is_idle:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(wait(), 60))


def test_it_finds_what_search_finds(engine, reader, served):
    prompts = [[0, 5, 40], [0, 70], [0, *range(5, 45)]]  # of a length that the engine compiles for
    config = cbs(2, 2, 3, max_new_tokens=16, sampling=Sampling(1.0, 0, 1.0), seed=4, slots=3)
    models = served.models
    expected = search(models.policy, models.guides, prompts, config, row_ids=[7, 9, 11])
    asked = {"max_tokens": 16, "seed": 4, "row_id": [7, 9, 11], "lane": [0, 0, 0]}
    found = asyncio.run(answers(engine, jobs(reader, prompt=prompts, **asked)))
    for done, result, prompt in zip(found, expected, prompts, strict=True):
        for choice, hypothesis in zip(done.choices, result.hypotheses, strict=True):
            assert choice.tokens == hypothesis.tokens
            assert choice.score == pytest.approx(hypothesis.score, abs=1e-4)
            ends = {"finished": hypothesis.finished, "eos_ids": served.eos_ids}
            text, _ = response_end(served.tokenizer, prompt, hypothesis.tokens, **ends)
            assert choice.text == text
            assert choice.ended_by == ("eos" if hypothesis.finished else "length")


@pytest.mark.parametrize("method", ["cbs", "eft"])
def test_a_seed_and_a_row_give_one_text_whatever_the_load(engine, reader, method):
    alone = answer(engine, reader, method=method, row_id=3)

    async def crowd():
        many = [answers(engine, jobs(reader, method=method, row_id=i % 5)) for i in range(20)]
        others = [
            answers(engine, jobs(reader, method=method, prompt=f"A {i}", temperature=0.5, beta=2.0))
            for i in range(9)
        ]
        return (await asyncio.gather(*many, *others))[:20]

    found = asyncio.run(crowd())
    for index, (done,) in enumerate(found):
        if index % 5 == 3:
            assert done.choices == alone
    assert len({done.choices[0].text for (done,) in found}) > 1


@pytest.mark.parametrize(
    ("method", "n"),
    [
        *[("cbs", 1), ("sample", 2), ("eft", 2)],
        *[pytest.param(method, 1, marks=pytest.mark.slow) for method in ("ivg", "bon")],
    ],
)
def test_what_a_stream_said_is_never_taken_back(engine, reader, method, n):
    for seed in range(4):
        asked = jobs(reader, method=method, n=n, seed=seed, stream=True, max_tokens=16)
        *shown, done = asyncio.run(events(engine, asked))
        assert all(isinstance(event, Progress) for event in shown)
        said = [""] * n
        for event in shown:
            assert len(event.texts) == n
            for index, text in enumerate(event.texts):
                assert text.startswith(said[index])
                said[index] = text
        for text, choice in zip(said, done.choices, strict=True):
            assert choice.text.startswith(text)
    assert len(shown) >= (0 if method != "cbs" else 2)


def test_a_character_that_the_length_cuts_short_is_left_out(engine, reader, served):
    incomplete = 0
    for seed in range(8):
        for choice in answer(engine, reader, method="sample", seed=seed, max_tokens=16):
            if choice.ended_by == "length":
                incomplete += decode_tokens(served.tokenizer, choice.tokens).endswith("\ufffd")
                assert not choice.text.endswith("\ufffd")
    assert incomplete, "no response was cut inside a character"


def test_a_stop_string_is_in_no_event(engine, reader):
    whole = answer(engine, reader, method="sample", seed=11)[0].text
    # A letter: what decodes to U+FFFD may do so only until further bytes come.
    stop = next(letter for letter in whole[3:] if letter.isascii() and letter.isprintable())
    asked = jobs(reader, method="sample", seed=11, stop=["\x00", stop], stream=True)
    *shown, done = asyncio.run(events(engine, asked))
    choice = done.choices[0]
    assert (choice.ended_by, choice.stop) == ("stop", stop), "the string that stopped is told"
    assert choice.text == whole[: whole.index(stop)]
    for event in shown:
        assert all(stop not in text for text in event.texts)
    assert all(stop not in choice.text for choice in done.choices)


def test_likelihoods_are_those_of_the_mixture(engine, reader, served):
    asked = {"method": "eft", "beta": 0.5, "logprobs": 2, "temperature": 0.7}
    choices = answer(engine, reader, **asked)
    prompt = jobs(reader)[0].prompt
    rows = np.zeros((2, len(prompt) + 12), np.int32)
    for row, choice in zip(rows, choices, strict=True):
        row[: len(prompt) + len(choice.tokens)] = (*prompt, *choice.tokens)
    likelihoods_of = jax.jit(partial(token_likelihoods, served.models, EFTProposer(0.5)))
    expected = np.asarray(likelihoods_of(rows).logprobs)
    for choice, row in zip(choices, expected, strict=True):
        whole = row[len(prompt) : len(prompt) + len(choice.tokens)]
        np.testing.assert_allclose(choice.scored.logprobs, whole, atol=1e-4)
    echoed = answer(engine, reader, **asked, echo=True)
    for choice, again, row in zip(choices, echoed, expected, strict=True):
        assert again.tokens == choice.tokens
        whole = row[1 : len(prompt) + len(choice.tokens)]
        np.testing.assert_allclose(again.scored.logprobs, whole, atol=1e-4)
    for scored in answer(engine, reader, **asked, echo=True, max_tokens=0):
        assert scored.tokens == ()
        np.testing.assert_allclose(scored.scored.logprobs, expected[0, 1 : len(prompt)], atol=1e-4)


def test_lanes_tell_samples_apart(engine, reader):
    """Asked for together or one by one, as a client that searches for itself would."""
    together = answer(engine, reader, method="sample", lane=0)
    behind = answer(engine, reader, method="sample", lane=1)
    assert [choice.text for choice in together[1:]] == [choice.text for choice in behind[:1]]
    assert together[0].text != together[1].text


def test_a_response_in_pieces_has_the_draws_of_the_whole(engine, reader):
    """Position and lane let a client that searches for itself share them."""
    whole = answer(engine, reader, prompt=[5, 40], method="sample", row_id=2, lane=3)[0].tokens
    said: tuple[int, ...] = ()
    while len(said) < len(whole):
        piece, _ = answer(
            engine, reader, prompt=[5, 40, *said], method="sample", row_id=2, lane=3,
            position=len(said), max_tokens=5,
        )  # fmt: skip
        said = (*said, *piece.tokens)
    assert said[: len(whole)] == whole


def test_who_goes_away_frees_slots_and_queue(engine, reader):
    async def leave():
        asked = jobs(reader, prompt=[[5, i] for i in range(20)], method="sample")
        ticket = engine.submit(asked)
        ticket.cancel()
        (done,) = await answers(engine, jobs(reader, method="sample"))
        return done

    before = metric(engine, "w2s_cancelled_total")
    assert isinstance(asyncio.run(leave()), Done)
    settle(engine)
    assert metric(engine, "w2s_cancelled_total") == before + 20
    assert metric(engine, "w2s_slots_in_use") == metric(engine, "w2s_queue_depth") == 0


def test_more_programs_than_have_room_take_turns(served, monkeypatch):
    monkeypatch.setattr(room, "SEATS", 1)
    engine, reader = Engine(served, CONFIG), Reader(served, CONFIG)

    async def mixed():
        kinds = [{"method": "sample"}, {"method": "eft"}, {"method": "cbs"}]
        asked = [jobs(reader, **kinds[i % 3], prompt=[[5, 6]] * 4) for i in range(9)]
        return await asyncio.gather(*(answers(engine, one) for one in asked))

    engine.start()
    found = asyncio.run(mixed())
    assert metric(engine, "w2s_programs") == 1
    engine.stop()
    assert all(isinstance(done, Done) for each in found for done in each)


def test_a_full_queue_takes_all_of_a_request_or_nothing(served):
    engine = Engine(served, replace(CONFIG, queue=3))  # never started
    reader = Reader(served, CONFIG)

    async def fill():
        engine.submit(jobs(reader, prompt=["a", "b"]))
        with pytest.raises(ApiError) as caught:
            engine.submit(jobs(reader, prompt=["a", "b"]))
        engine.submit(jobs(reader))
        return caught.value

    error = asyncio.run(fill())
    assert (error.status, error.headers) == (429, {"Retry-After": "1"})
    assert metric(engine, "w2s_queue_depth") == 3


def test_ending_lets_run_what_runs_and_refuses_the_rest(served):
    engine, reader = Engine(served, CONFIG), Reader(served, CONFIG)
    engine.start()

    async def end():
        first = asyncio.ensure_future(answers(engine, jobs(reader, method="sample")))
        await asyncio.sleep(0)
        engine.drain()
        with pytest.raises(ApiError) as caught:
            engine.submit(jobs(reader))
        return caught.value, await first

    error, (done,) = asyncio.run(end())
    assert (error.status, error.code) == (503, "shutting_down")
    assert isinstance(done, Done)
    settle(engine)

    async def cut():
        ticket = Engine.submit(late, jobs(reader))
        late.stop()
        late.start()
        return await ticket.next()

    late = Engine(served, CONFIG)
    failed = asyncio.run(cut())
    assert (type(failed), failed.error.status) == (Failed, 503)
    engine.stop()


def test_a_job_that_breaks_a_search_fails_alone(served):
    """One text that a scorer cannot value; the others' draws are as if it had not been there."""

    def value(prompts, responses):
        if any("bad" in prompt for prompt in prompts):
            raise InputError("no value for this prompt")
        return [float(len(response)) for response in responses]

    texts = replace(
        served, models=replace(served.models, guides=()), scorers=(FunctionScorer(value),)
    )
    engine, reader = Engine(texts, CONFIG), Reader(texts, CONFIG)
    engine.start()
    prompts = ["a sea", "bad", "a film"]
    good, bad, also = asyncio.run(answers(engine, jobs(reader, prompt=prompts)))
    assert (type(bad), bad.error.status, bad.error.code) == (Failed, 500, "search_failed")
    assert bad.error.message == "the scorer value raised InputError: no value for this prompt"
    again = asyncio.run(answers(engine, jobs(reader, prompt=["a sea", "good", "a film"])))
    assert (good, also) == (again[0], again[2])
    engine.stop()


def test_log_probs_that_are_no_numbers_fail_their_request_alone(served, reader, monkeypatch):
    def damaged(models, proposer, responses, **settings):
        found = score_responses(models, proposer, responses, **settings)
        failed = []
        for index, response in enumerate(responses):
            one, token = found[index], response.prompts[0][-1]
            if token == 70:
                found[index] = None
                failed.append(RowFailed(index, ("policy",)))
            elif token == 6:
                found[index] = replace(one, top_logprobs=one.top_logprobs - np.inf)
        raise RowsFailed(failed, found)

    monkeypatch.setattr(tasks, "score_responses", damaged)
    engine = Engine(served, CONFIG)
    engine.start()
    prompts = [[0, 5], [0, 70], [0, 6]]
    asked = jobs(reader, prompt=prompts, method="sample", logprobs=1, max_tokens=5)
    good, bad, also = asyncio.run(answers(engine, asked))
    engine.stop()
    assert (type(good), type(also)) == (Done, Done), "a log-prob of −inf is legitimate"
    assert (type(bad), bad.error.status, bad.error.code) == (Failed, 500, "not_finite")


def test_a_fault_of_the_program_is_told_without_its_insides(served, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("XLA: secret insides")

    monkeypatch.setattr(tasks, "score_responses", broken)
    engine = Engine(served, CONFIG)
    reader = Reader(served, CONFIG)
    engine.start()
    with pytest.raises(ApiError) as caught:
        answer(engine, reader, method="sample", logprobs=1)
    assert caught.value.status == 500
    assert "secret" not in caught.value.message
    assert answer(engine, reader, method="sample")
    engine.stop()
    assert "secret insides" in capsys.readouterr().err


def test_a_warm_up_comes_before_readiness(served):
    reader = Reader(served, CONFIG)
    engine = Engine(served, CONFIG, warm_up=jobs(reader))
    assert engine.state == "starting"
    engine.start()

    async def ready():
        while engine.state == "starting":
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(ready(), 120))
    assert engine.state == "ready"
    assert metric(engine, "w2s_tokens_generated_total") > 0
    engine.stop()
    assert engine.state == "stopped"


@pytest.mark.parametrize(
    ("new", "known"),
    [({"method": "eft"}, 1), ({"logprobs": 1}, 1), ({"method": "eft"}, 2)],
    ids=["search", "likelihoods", "seats"],
)
def test_what_is_new_is_compiled_beside_what_runs(served, reader, monkeypatch, new, known):
    """Who asks for it waits alone, also where it takes the place of a program that is known."""
    begun, over = threading.Event(), threading.Event()

    def slowly(compile_it):
        def compile_slowly(*args, **settings):
            if not begun.is_set():
                begun.set()
                assert over.wait(60)
            return compile_it(*args, **settings)

        return compile_slowly

    monkeypatch.setattr(room, "SEATS", 2)
    engine = Engine(served, CONFIG)
    engine.start()
    others = [{"method": "sample"}, {"method": "sample", "stop": "xyz"}][:known]
    for fields in others:
        assert answer(engine, reader, **fields)
    monkeypatch.setattr(room.compiling, "compile_session", slowly(room.compiling.compile_session))
    monkeypatch.setattr(tasks, "compile_scores", slowly(tasks.compile_scores))

    async def ask():
        waits = asyncio.ensure_future(answers(engine, jobs(reader, **({"method": "sample"} | new))))
        assert await asyncio.to_thread(begun.wait, 60)
        assert engine.is_running
        found = [await asyncio.wait_for(ask_for(fields), 30) for fields in others]
        waited = not waits.done()
        over.set()
        return found, waited, *(await waits)

    async def ask_for(fields):
        (done,) = await answers(engine, jobs(reader, **fields))
        return done

    try:
        found, waited, late = asyncio.run(ask())
    finally:
        over.set()
        engine.stop()
    assert [type(one) for one in [*found, late]] == [Done] * (known + 1)
    assert waited


def test_a_compilation_that_fails_fails_who_asked_for_it(served, reader, monkeypatch, capsys):
    def broken(session, request):
        raise RuntimeError("out of memory")

    engine = Engine(served, CONFIG)
    engine.start()
    with monkeypatch.context() as patch:
        patch.setattr(room.compiling, "compile_session", broken)
        with pytest.raises(ApiError) as caught:
            answer(engine, reader, method="sample")
    assert (caught.value.status, caught.value.code) == (500, "search_failed")
    assert "out of memory" in capsys.readouterr().err
    assert answer(engine, reader, method="sample")
    engine.stop()
