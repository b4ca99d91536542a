"""The black-box policy against a real server that misbehaves."""

import contextlib
import dataclasses
import http.server
import json
import logging
import re
import threading
import time
import traceback

import pytest

from tests.serve.fake_api import FakeAPI, Reply, completion, error, good, words
from w2s_jax.errors import InputError
from w2s_jax.ops.logits import Sampling
from w2s_jax.search.config import best_of_n, cbs
from w2s_jax.search.file import read_questions, search_rows
from w2s_jax.search.scorers import FunctionScorer
from w2s_jax.search.text_run import Extension, TextPolicy, search_texts
from w2s_jax.serve.client import (
    Endpoint,
    EndpointError,
    Meter,
    Usage,
    draw_seed,
    open_policy,
)
from w2s_jax.text.prompts import Conversation, Message, plain
from w2s_jax.text.rows import open_journal

KEY = "sk-w2s-0-never-shown"
FAST = {"max_attempts": 4, "backoff": 0.01, "longest_pause": 0.02, "timeout": 5.0}
CONFIG = cbs(2, 2, 3, max_new_tokens=9, sampling=Sampling(0.7, 50, 0.9), seed=7)
SCORER = FunctionScorer(lambda _, responses: [len(set(r)) - 0.01 * len(r) for r in responses])


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def policy_of(api, config=CONFIG, render=plain, **settings):
    return open_policy(Endpoint(api.url, "some-model", **(FAST | settings)), config, render)


def extension(text="once", response="", *, row_id=0, count=2, max_tokens=3, position=0, lane=0):
    conversation = Conversation(text=text)
    return Extension(row_id, conversation, response, count, max_tokens, position, lane)


def conversations(count=5):
    return [Conversation(text=f"prompt {{{i}}}") for i in range(count)]


def test_requests_carry_what_the_search_asks_for():
    with FakeAPI() as api:
        policy = policy_of(api, dataclasses.replace(CONFIG, stop=("Q:", "\n")))
        asked = [extension("a", " b"), extension("a", " c", lane=2)]
        found = policy.extend(asked)
    [body] = api.bodies
    assert body == {
        "model": "some-model",
        "prompt": ["a b", "a c"],
        "n": 2,
        "max_tokens": 3,
        "temperature": 0.7,
        "top_p": 0.9,
        "stop": ["Q:", "\n"],
        "seed": draw_seed(7, 0, 0, 0),
    }
    assert api.headers[0]["authorization"] == f"Bearer {KEY}"
    for text, continuations in zip(body["prompt"], found, strict=True):
        expected = [words(text, body["seed"], choice, 3) for choice in (0, 1)]
        assert [(c.text, c.finished) for c in continuations] == [
            (said, finish == "stop") for said, finish in expected
        ]


def test_equal_texts_go_out_once_with_more_choices():
    with FakeAPI() as api:
        asked = [extension("a", lane=lane) for lane in (0, 2, 4)]
        found = policy_of(api).extend(asked)
    [body] = api.bodies
    assert (body["prompt"], body["n"]) == (["a"], 6)
    said = [continuation.text for continuations in found for continuation in continuations]
    assert said == [words("a", body["seed"], choice, 3)[0] for choice in range(6)]


def test_many_choices_are_split():
    with FakeAPI() as api:
        found = policy_of(api).extend([extension(count=1, lane=lane) for lane in range(200)])
    assert sorted(body["n"] for body in api.bodies) == [8, 64, 64, 64]
    assert len({body["seed"] for body in api.bodies}) == 4
    assert all(body["prompt"] == ["once"] for body in api.bodies)
    assert [len(continuations) for continuations in found] == [1] * 200


def test_rows_and_unequal_counts_share_no_request():
    asked = [
        extension("a", " x", lane=0),
        extension("a", " x", lane=2),
        extension("a", " y", lane=4),
        extension("b", " x", row_id=1),
        extension("b", " z", row_id=1, lane=2),
    ]
    with FakeAPI() as api:
        policy_of(api).extend(asked)
        sent = sorted((tuple(body["prompt"]), body["n"]) for body in api.bodies)
        assert sent == [(("a x",), 4), (("a y",), 2), (("b x", "b z"), 2)]
        api.bodies.clear()
        policy_of(api, prompts_per_request=1).extend(asked)
        assert sorted(tuple(body["prompt"]) for body in api.bodies) == [
            ("a x",), ("a y",), ("b x",), ("b z",)
        ]  # fmt: skip
        assert len({body["seed"] for body in api.bodies}) == 4


def test_shared_draws_send_the_place_of_each_draw():
    asked = [extension("a", row_id=9, position=6, lane=lane) for lane in (0, 2)]
    asked.append(extension("b", row_id=10, position=3, lane=4))
    with FakeAPI() as api:
        policy_of(api, share_draws=True).extend(asked)
    first, second = sorted(api.bodies, key=lambda body: body["row_id"])
    assert (first["prompt"], first["n"]) == (["a", "a"], 2)
    shared = {"seed": 7, "top_k": 50, "method": "sample"}
    expected = shared | {"row_id": [9, 9], "position": [6, 6], "lane": [0, 2]}
    assert {name: first[name] for name in expected} == expected
    assert [second[name] for name in ("row_id", "position", "lane")] == [[10], [3], [4]]


def test_hypotheses_may_go_out_as_the_token_ids_that_came():
    with FakeAPI() as api:
        plain_texts = search_texts(policy_of(api), [SCORER], conversations(2), CONFIG)
        api.bodies.clear()
        policy = policy_of(api, token_ids=True)
        assert search_texts(policy, [SCORER], conversations(2), CONFIG) == plain_texts
    assert all(body["return_token_ids"] for body in api.bodies)
    kinds = {type(prompt) for body in api.bodies for prompt in body["prompt"]}
    assert kinds == {str, list}
    for body in api.bodies:
        is_first = body["prompt"] in (["prompt {0}"], ["prompt {1}"])
        assert all(isinstance(prompt, str) == is_first for prompt in body["prompt"])


def test_a_server_without_token_ids_is_named():
    def without(choices):
        for choice in choices:
            choice.pop("token_ids")

    said = "a malformed answer \\(KeyError: 'token_ids'\\)"
    with FakeAPI(spoiled(without)) as api, pytest.raises(EndpointError, match=said):
        policy_of(api, token_ids=True).extend([extension()])


def test_seeds_are_distinct_and_stay_as_they_are():
    seeds = [
        draw_seed(s, r, p, lane)
        for s in range(3)
        for r in range(20)
        for p in range(0, 50, 5)
        for lane in range(16)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert draw_seed(0, 1, 5, 4) == 741923534


def test_a_search_is_the_same_however_it_is_asked():
    """Concurrency, and answers out of order, change nothing; neither does the company."""
    alone = []
    with FakeAPI() as api:
        for i, conversation in enumerate(conversations()):
            policy = policy_of(api, concurrency=1)
            alone += search_texts(policy, [SCORER], [conversation], CONFIG, row_ids=[i])
    with FakeAPI(lambda number, body: good(body, delay=0.02 * (number % 3))) as api:
        policy = policy_of(api, concurrency=3)
        together = search_texts(policy, [SCORER], conversations(), CONFIG)
    assert together == alone
    assert api.most == 3
    assert any(not result.best.finished for result in alone)
    assert any(result.best.finished for result in alone)


def test_templates_render_the_prefix():
    def render(conversation):
        return f"<user>{conversation.messages[-1].content}</user>"

    with FakeAPI() as api:
        policy = policy_of(api, render=render)
        asked = Conversation(messages=(Message("user", "{0} {x}"),))
        search_texts(policy, [SCORER], [asked], CONFIG)
    assert all(text.startswith("<user>{0} {x}</user>") for b in api.bodies for text in b["prompt"])


@pytest.mark.parametrize(
    "bad",
    [
        error(429, "slow down"),
        error(500),
        error(503),
        error(408),
        Reply(b'{"choices": [', 200),
        Reply(b"<html>a proxy</html>", 200, {"content-type": "text/html"}),
        Reply(b"[]"),
        Reply(b"null"),
        Reply(b'{"choices": null}'),
        Reply(b'{"choices": [{"index": 0, "text": "a", "finish_reason": "stop"}]}'),
        Reply(b"", drop=True),
        Reply(b'{"choices": [', cut=True),
    ],
)
def test_what_may_pass_is_tried_again(bad):
    with FakeAPI(lambda number, body: bad if number < 3 else None) as api:
        policy = policy_of(api)
        [[first, second]] = policy.extend([extension("a")])
    assert first.text == words("a", api.bodies[0]["seed"], 0, 3)[0]
    assert len(api.bodies) == 4
    assert all(body == api.bodies[0] for body in api.bodies)
    assert policy.meter.usage.retries == 3
    assert second.text == words("a", api.bodies[0]["seed"], 1, 3)[0]


def spoiled(change):
    def script(number, body):
        answer = completion(body)
        change(answer["choices"])
        return Reply(json.dumps(answer).encode())

    return script


SPOILED = {
    "2 choices were": lambda choices: choices.append(dict(choices[0])),
    "finish_reason is null": lambda choices: choices[1].update(finish_reason=None),
    'finish_reason is "abort"': lambda choices: choices[0].update(finish_reason="abort"),
    "indices are not 0 .. 1": lambda choices: choices[1].update(index=0),
    "a text is int": lambda choices: choices[1].update(text=3),
    "KeyError: 'text'": lambda choices: choices[1].pop("text"),
}


@pytest.mark.parametrize("said", SPOILED)
def test_answers_that_stay_malformed_are_named(said):
    with FakeAPI(spoiled(SPOILED[said])) as api:
        policy = policy_of(api)
        with pytest.raises(EndpointError) as caught:
            policy.extend([extension(row_id=4)])
    line = str(caught.value)
    assert line.startswith(f"row 4: endpoint {api.url} stopped answering: 4 attempts failed")
    assert "a malformed answer" in line
    assert said.replace("2 choices were", "3 choices where 2 were") in line
    # What was answered was paid for, malformed or not.
    assert policy.meter.usage.completion_tokens == 4 * 6


def test_choices_may_come_in_any_order():
    with FakeAPI(spoiled(lambda choices: choices.reverse())) as api:
        [found] = policy_of(api).extend([extension("a")])
    assert [c.text for c in found] == [words("a", api.bodies[0]["seed"], i, 3)[0] for i in (0, 1)]


def test_an_endpoint_that_stops_answering_is_one_line():
    with FakeAPI(lambda number, body: error(500, "out\nof  luck")) as api:
        with pytest.raises(EndpointError, match="4 attempts failed, the last one by: 500 out of"):
            policy_of(api).extend([extension()])
        assert len(api.bodies) == 4
    with pytest.raises(EndpointError, match="no connection") as caught:
        policy_of(api).extend([extension()])
    assert isinstance(caught.value, InputError)
    assert "\n" not in str(caught.value)


def test_a_server_that_hangs_times_out():
    with FakeAPI(lambda number, body: good(body, delay=0.3)) as api:
        with pytest.raises(EndpointError, match="2 attempts failed, the last one by: no answer in"):
            policy_of(api, timeout=0.1, max_attempts=2).extend([extension()])
        assert len(api.bodies) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_refusals_fail_at_once_with_what_the_server_says(status):
    said = rf"refused: {status} the model `x` does not"
    script = lambda number, body: error(status, "the model `x` does not exist")  # noqa: E731
    with FakeAPI(script) as api, pytest.raises(EndpointError, match=said):
        policy_of(api).extend([extension()])
    assert len(api.bodies) == 1


def test_other_forms_of_refusal_are_told():
    detail = json.dumps({"detail": [{"loc": ["n"], "msg": "too large"}]}).encode()
    for body, said in ((detail, "422 .*too large"), (b"plain words", "422 plain words")):
        script = lambda number, _, body=body: Reply(body, 422)  # noqa: E731
        with FakeAPI(script) as api, pytest.raises(EndpointError, match=said):
            policy_of(api).extend([extension()])


def test_a_spent_quota_is_not_tried_again():
    spent = error(429, "You exceeded your quota", code="insufficient_quota")
    said = "refused: 429 You exceeded your quota"
    with FakeAPI(lambda number, body: spent) as api, pytest.raises(EndpointError, match=said):
        policy_of(api).extend([extension()])
    assert len(api.bodies) == 1


@pytest.mark.parametrize("headers", [{"retry_after": "0.1"}, {"retry_after_ms": "100"}])
def test_retry_after_is_honoured(headers):
    with FakeAPI(lambda number, body: None if number else error(429, **headers)) as api:
        policy_of(api).extend([extension()])
    assert 0.1 <= api.times[1] - api.times[0] < 2


def test_a_date_to_retry_after_is_honoured():
    # A date has whole seconds: the next but one is 0.2 to 1.2 s away.
    when = int(time.time() + 1.2)
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(when))
    script = lambda number, body: None if number else error(429, retry_after=date)  # noqa: E731
    with FakeAPI(script) as api:
        policy_of(api).extend([extension()])
        assert time.time() >= when
    assert len(api.bodies) == 2


def test_a_pause_beyond_reason_is_the_end():
    said = r"stopped answering: it asks to wait 86400 s \(429 come back\)"
    later = error(429, "come back", retry_after="86400")
    with FakeAPI(lambda number, body: later) as api, pytest.raises(EndpointError, match=said):
        policy_of(api).extend([extension()])
    assert len(api.bodies) == 1


def test_pauses_double_up_to_a_bound_with_jitter():
    endpoint = Endpoint("http://h/v1", "m", backoff=1.0, longest_pause=10.0)
    for attempt, bound in enumerate((1.0, 2.0, 4.0, 8.0, 10.0, 10.0)):
        pauses = [endpoint.pause(attempt, None) for _ in range(50)]
        assert bound / 2 <= min(pauses)
        assert max(pauses) <= bound
        assert len(set(pauses)) > 40
    assert endpoint.pause(5000, None) <= 10.0
    assert endpoint.pause(0, 30.0) == 30.0


def test_one_failure_ends_all_that_wait():
    patience = {"concurrency": 2, "backoff": 30.0, "longest_pause": 30.0}

    def script(number, body):
        return error(429) if body["prompt"] == ["a0"] else error(401, "bad key", delay=0.1)

    with FakeAPI(script) as api:
        started = time.monotonic()
        with pytest.raises(EndpointError, match="refused: 401 bad key"):
            policy_of(api, **patience).extend(
                [extension(f"a{row}", row_id=row) for row in range(20)]
            )
        assert time.monotonic() - started < 5
        time.sleep(0.3)
        assert len(api.bodies) <= 4


def test_tokens_and_cost_are_counted():
    with FakeAPI() as api:
        policy = policy_of(api, price_prompt=1.5, price_completion=2)
        [one, two] = policy.extend([extension("abcd"), extension("ef", row_id=1)])
        assert policy.usage == Usage(
            requests=2, retries=0, prompt_tokens=6, completion_tokens=12, unmetered=0,
            cost=(6 * 1.5 + 12 * 2) / 1e6,
        )  # fmt: skip
    assert policy.meter.usage.cost is None
    assert str(policy.usage) == (
        "2 requests (0 failed attempts), 6 prompt tokens and 12 new ones, cost 0.0000"
    )
    for found in (one, two):
        lengths = [c.tokens for c in found if not c.finished]
        assert lengths == [3] * len(lengths)


def test_answers_without_counts_are_noted():
    def script(number, body):
        return Reply(json.dumps(completion(body) | {"usage": None}).encode())

    with FakeAPI(script) as api:
        policy = policy_of(api)
        [found] = policy.extend([extension()])
    assert policy.meter.usage == Usage(1, 0, 0, 0, 1, None)
    assert str(policy.meter.usage).endswith(" new ones, 1 answers without counts")
    assert [c.tokens for c in found] == [0 if c.finished else 3 for c in found]


def test_meters_count_from_many_threads():
    from concurrent.futures import ThreadPoolExecutor

    meter = Meter()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: meter.add(requests=1, prompt_tokens=3), range(5000)))
    assert meter.usage.prompt_tokens == 15000


def finishing(*ends):
    """A script whose choices are these (text, finish_reason[, stop_reason])."""

    def change(choices):
        for choice, (text, finish, *reason) in zip(choices, ends, strict=True):
            choice.update(
                text=text, finish_reason=finish, stop_reason=reason[0] if reason else None
            )

    return spoiled(change)


def test_finish_reasons():
    ends = [
        ("a", "stop"),
        ("b", "stop", "Q:"),
        ("c", "stop", 50256),
        ("d", "content_filter"),
        ("", "stop"),
        ("f", "length"),
    ]
    with FakeAPI(finishing(*ends)) as api:
        [found] = policy_of(api).extend([extension(count=6)])
    assert [(c.text, c.finished, c.stopped) for c in found] == [
        ("a", True, False),
        ("b", True, True),
        ("c", True, False),
        ("d", True, True),
        ("", True, False),
        ("f", False, False),
    ]


def test_broken_characters_are_written_anew():
    ends = [("a\ufffd", "length"), ("b\ufffd", "stop"), ("c\ud83d", "stop"), ("d🦀", "length")]
    with FakeAPI(finishing(*ends)) as api:
        [found] = policy_of(api).extend([extension(count=4)])
    assert [c.text for c in found] == ["a", "b\ufffd", "c\ufffd", "d🦀"]


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_empty_continuations_end(finish):
    ends = [("", finish)] * 4
    with FakeAPI(lambda n, body: finishing(*ends[: body["n"] * len(body["prompt"])])(n, body)) as a:
        [result] = search_texts(policy_of(a), [SCORER], conversations(1), CONFIG)
    assert [h.response for h in result.hypotheses] == ["", ""]
    assert result.best.finished == (finish == "stop")
    assert len(a.bodies) == (1 if finish == "stop" else 3)


def test_no_key_is_needed_and_no_other_is_used(monkeypatch):
    with FakeAPI() as api:
        policy_of(api, api_key_env="W2S_LOCAL_KEY").extend([extension()])
        monkeypatch.setenv("W2S_LOCAL_KEY", "local-secret\n")
        policy_of(api, api_key_env="W2S_LOCAL_KEY").extend([extension()])
    assert [h["authorization"] for h in api.headers] == ["Bearer none", "Bearer local-secret"]


def test_the_key_is_never_shown(caplog, capfd, tmp_path):
    """Not in values, messages, tracebacks, logs, output or the journal; not if a server says it."""
    seen = []

    def note(caught):
        seen.append("".join(traceback.format_exception(caught)))
        while caught is not None:
            seen.extend((str(caught), repr(caught), repr(vars(caught))))
            caught = caught.__cause__ or caught.__context__

    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, logger=name)
    scripts = [
        lambda number, body: error(401, f"Incorrect API key: {KEY}"),
        lambda number, body: error(500, f"Bearer {KEY}"),
        lambda number, body: Reply(f'{{"choices": "{KEY}"}}'.encode()),
        lambda number, body: Reply(b"", drop=True),
    ]
    for script in scripts:
        with FakeAPI(script) as api:
            policy = policy_of(api)
            with pytest.raises(EndpointError) as caught:
                policy.extend([extension()])
        note(caught.value)
        assert KEY in api.headers[0]["authorization"]
        seen += [
            repr(policy),
            str(policy.endpoint),
            json.dumps(dataclasses.asdict(policy.endpoint)),
        ]
    journal = open_journal(tmp_path / "out.journal", dataclasses.asdict(policy.endpoint))
    with FakeAPI() as api:
        rows = [{"prompt": "a"}, {"prompt": "b"}]
        policy = TextPolicy(policy_of(api), [SCORER], CONFIG)
        search_rows(policy, read_questions(rows, "in"), journal)
    seen += [journal.path.read_text(), caplog.text, *capfd.readouterr()]
    assert caplog.records, "nothing was logged, so nothing is checked"
    assert not [text for text in seen if KEY in text]
    assert any("***" in text for text in seen)


@pytest.mark.parametrize("bad", ["sk two words", "sk-\n-lines", "sk-Ω"])
def test_a_key_that_no_header_carries_is_refused_unseen(monkeypatch, bad):
    monkeypatch.setenv("W2S_BAD", bad)
    with FakeAPI() as api, pytest.raises(InputError, match="variable W2S_BAD holds") as caught:
        policy_of(api, api_key_env="W2S_BAD")
    assert bad not in str(caught.value)


@pytest.mark.parametrize("url", ["https://me:secret1@host/v1", "https://host/v1?key=secret1"])
def test_a_key_in_the_address_is_refused_unseen(url):
    with pytest.raises(InputError, match="keys come from the environment") as caught:
        Endpoint(url, "m")
    assert "secret1" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "localhost:8000/v1", "ftp://host/v1", "http://"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(InputError, match="is no address"):
        Endpoint(url, "m")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Endpoint("http://h/v1", "m", concurrency=0), "concurrency is 0"),
        (lambda: Endpoint("http://h/v1", "m", max_attempts=0), "max_attempts is 0"),
        (lambda: Endpoint("http://h/v1", "m", timeout=0), "timeout is 0"),
        (lambda: Endpoint("http://h/v1", "m", backoff=-1), "backoff is -1"),
        (lambda: Endpoint("http://h/v1", "m", prompts_per_request=0), "prompts_per_request is 0"),
        (lambda: Endpoint("http://h/v1", "m", price_prompt=-1), "price_prompt is -1"),
    ],
)
def test_settings_out_of_range_are_refused(make, said):
    with pytest.raises(InputError, match=re.escape(said)):
        make()


def test_a_prompt_that_is_not_text_is_refused():
    with FakeAPI() as api, pytest.raises(InputError, match="row 3: the prompt is not text"):
        policy_of(api).extend([extension("\ud800", row_id=3)])


def test_best_of_n_costs_its_prompt_once():
    config = best_of_n(8, max_new_tokens=6, chunk_length=6)
    with FakeAPI() as api:
        [result] = search_texts(policy_of(api, config), [SCORER], conversations(1), config)
    assert [(len(body["prompt"]), body["n"]) for body in api.bodies] == [(1, 8)]
    assert len({h.response for h in result.hypotheses}) > 4


def test_a_search_that_was_cut_off_goes_on_and_asks_nothing_twice(tmp_path):
    config = cbs(2, 2, 3, max_new_tokens=9, slots=2)
    rows = [{"prompt": f"row {i}:"} for i in range(8)]

    def work(api, folder):
        journal = open_journal(tmp_path / folder / "out.journal", {"job": 1})
        policy = TextPolicy(policy_of(api, config), [SCORER], config)
        search_rows(policy, read_questions(rows, "in"), journal)
        journal.merge(tmp_path / folder / "out.jsonl", len(rows))

    for folder in ("part", "whole"):
        (tmp_path / folder).mkdir()
    script = lambda number, body: error(401) if number >= 12 else None  # noqa: E731
    with FakeAPI(script) as api, pytest.raises(EndpointError, match="refused: 401"):
        work(api, "part")
    journal = (tmp_path / "part" / "out.journal").read_text()
    done = [json.loads(line)["row_id"] for line in journal.splitlines()[1:]]
    assert 3 <= len(done) < len(rows)
    with FakeAPI() as api:
        work(api, "part")
        asked_again = api.bodies
    assert asked_again
    for row in done:
        assert not [b for b in asked_again if any(t.startswith(f"row {row}:") for t in b["prompt"])]
    with FakeAPI() as api:
        work(api, "whole")
    outputs = [(tmp_path / name / "out.jsonl").read_bytes() for name in ("part", "whole")]
    assert outputs[0] == outputs[1]


def test_an_answer_that_drips_does_not_last_for_ever():
    class Drips(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(200):
                    self.wfile.write(b" ")
                    time.sleep(0.02)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Drips)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        endpoint = Endpoint(url, "m", **(FAST | {"timeout": 0.1, "max_attempts": 2}))
        started = time.monotonic()
        with pytest.raises(EndpointError, match="no answer in time"):
            open_policy(endpoint, CONFIG, plain).extend([extension()])
        assert time.monotonic() - started < 5
    finally:
        server.shutdown()


def test_a_connection_that_breaks_within_an_answer_is_one_line():
    with FakeAPI(lambda number, body: Reply(b'{"choices": [', cut=True)) as api:
        said = r"the last one by: the connection broke \(peer closed connection"
        with pytest.raises(EndpointError, match=said):
            policy_of(api).extend([extension()])


def test_a_servers_message_is_shown_without_what_would_steer_a_terminal():
    with FakeAPI(lambda number, body: error(400, "\x1b[31mred\x07 \x9b2J tail")) as api:
        with pytest.raises(EndpointError) as raised:
            policy_of(api).extend([extension()])
        assert "[31mred" in str(raised.value)
        assert all(character.isprintable() for character in str(raised.value))
