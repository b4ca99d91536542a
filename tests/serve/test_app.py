"""The endpoints over an engine that only pretends."""

import asyncio
import json
import time
from dataclasses import replace

import httpx
import numpy as np
import pytest

from tests.serve.tiny_server import served_at
from w2s_jax.search.likelihood import ScoredResponse
from w2s_jax.serve.answers import Choice, TokenTexts
from w2s_jax.serve.app import Service, create_app
from w2s_jax.serve.config import ServeConfig
from w2s_jax.serve.engine import Engine
from w2s_jax.serve.jobs import Reader
from w2s_jax.serve.schema import ApiError, queue_full
from w2s_jax.serve.tasks import Done, Failed, Metrics, Progress, Ticket

BODY = {"model": "tiny", "prompt": "The sea", "method": "sample"}
JSON = "application/json"
CONFIG = ServeConfig(method="cbs", most_prompts=3)


class Pretender(Engine):
    """Answers every job with "ab" and "cd", in two pieces; or fails, refuses, says nothing."""

    def __init__(self) -> None:
        self.state, self.refusal, self.failure, self.is_silent = "ready", None, None, False
        self.metrics = Metrics()
        self.scored = None
        self.tickets: list[Ticket] = []
        self.jobs: list = []

    def submit(self, jobs) -> Ticket:
        if self.refusal is not None:
            raise self.refusal
        ticket = Ticket()
        self.tickets.append(ticket)
        self.jobs.extend(jobs)
        if self.is_silent:
            return ticket
        for index, job in enumerate(jobs):
            ticket.put(Progress(index, ("ab",) * job.choices))
            if self.failure is not None:
                ticket.put(Failed(index, self.failure))
                continue
            ticket.put(Progress(index, ("ab",) * job.choices))
            choice = Choice("abcd é", (5, 6, 7), "eos", scored=self.scored)
            ticket.put(Done(index, (choice,) * job.choices))
        return ticket


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return served_at(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine():
    return Pretender()


@pytest.fixture
def service(served, engine):
    reader = Reader(served, CONFIG)
    tokens, most_body = TokenTexts(served.tokenizer), 10_000
    return Service("tiny", engine, reader, tokens, created=7, most_body=most_body)


def call(service, method, path, **request) -> httpx.Response:
    async def send():
        transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def post(service, body, path="/v1/completions", *, kind=JSON, headers=()) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return call(
        service, "POST", path, content=content, headers={"content-type": kind} | dict(headers)
    )


def lines(response) -> list:
    assert response.headers["content-type"].startswith("text/event-stream")
    datas = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


def told(response, status) -> dict:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]


def test_a_completion(service):
    answer = post(service, BODY | {"prompt": ["a", "b"], "n": 2}).json()
    assert answer["object"] == "text_completion"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert {choice["text"] for choice in answer["choices"]} == {"abcd é"}
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    assert answer["usage"]["completion_tokens"] == 12


def test_token_ids_where_they_are_asked_for(service, served):
    body = BODY | {"return_token_ids": True, "prompt": [[5, 6]]}
    choice = post(service, body).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([5, 6], [5, 6, 7])
    assert "token_ids" not in post(service, BODY).json()["choices"][0]


def test_an_impossible_token_has_a_log_prob_that_json_knows(service, engine):
    impossible = np.full((3, 2), -np.inf, np.float32)
    engine.scored = ScoredResponse(
        impossible[:, 0], np.zeros(3, bool), np.array([[5, 6]] * 3), impossible
    )
    (choice,) = post(service, BODY | {"logprobs": 2}).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-9999.0] * 3
    assert set(choice["logprobs"]["top_logprobs"][0].values()) == {-9999.0}


def test_an_echo(service):
    assert post(service, BODY | {"echo": True}).json()["choices"][0]["text"] == "The seaabcd é"


def test_a_chat(service):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
    answer = post(service, body, "/v1/chat/completions").json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == "abcd é"


def test_a_stream_says_every_character_once(service):
    body = BODY | {"stream": True, "n": 2, "stream_options": {"include_usage": True}}
    *chunks, usage, end = lines(post(service, body))
    assert end == "[DONE]"
    for index in range(2):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert [choice["text"] for choice in mine] == ["ab", "cd é"]
        assert [choice["finish_reason"] for choice in mine] == [None, "stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 6)


def test_a_chat_stream_opens_with_the_role(service):
    messages = [{"role": "user", "content": "a"}]
    body = {"model": "tiny", "messages": messages, "stream": True}
    *chunks, _ = lines(post(service, body, "/v1/chat/completions"))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "abcd é"
    assert "usage" not in chunks[0]


def test_failures_before_and_within_a_stream(service, engine):
    engine.failure = ApiError(500, "it broke")
    assert told(post(service, BODY), 500)["message"] == "it broke"
    *_, last = lines(post(service, BODY | {"stream": True}))
    assert last["error"]["message"] == "it broke"
    engine.refusal = queue_full("3 of 3 places")
    for body in (BODY, BODY | {"stream": True}):
        response = post(service, body)
        assert told(response, 429)["code"] == "queue_full"
        assert response.headers["retry-after"] == "1"


def test_models_and_what_is_not_there(service):
    assert call(service, "GET", "/v1/models").json()["data"][0]["id"] == "tiny"
    assert call(service, "GET", "/v1/models/tiny").json()["created"] == 7
    told(call(service, "GET", "/v1/models/gpt-4"), 404)
    assert told(post(service, BODY | {"model": "gpt-4"}), 404)["code"] == "model_not_found"
    told(call(service, "GET", "/v2/nothing"), 404)
    told(call(service, "GET", "/v1/completions"), 405)


def test_bodies_that_are_too_large_or_of_another_kind(service):
    told(post(service, BODY | {"prompt": "a" * 20_000}), 413)
    told(post(service, BODY | {"prompt": ["a"] * 4}), 400)
    raw = json.dumps(BODY).encode()
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/xml", ""):
        assert "application/json" in told(post(service, raw, kind=kind), 415)["message"]
    for kind in ("application/json", "Application/JSON; charset=utf-8"):
        assert post(service, raw, kind=kind).status_code == 200

    async def pieces():
        for _ in range(30):
            yield b" " * 1000

    kind = {"content-type": JSON}
    told(call(service, "POST", "/v1/completions", content=pieces(), headers=kind), 413)
    declared = kind | {"content-length": str(10**12)}
    told(call(service, "POST", "/v1/completions", content=b"{}", headers=declared), 413)


def test_bodies_that_are_malformed(service):
    for raw in (b"", b"{", b"[]", b'{"n": NaN}', b"[" * 5000, b"\xff"):
        told(post(service, raw), 400)
    assert told(post(service, BODY | {"n": -1}), 400)["param"] == "n"
    assert told(post(service, BODY | {"suffix": "x"}), 400)["param"] == "suffix"


def test_health_follows_the_engine(service, engine):
    assert call(service, "GET", "/health").status_code == 200
    for state in ("starting", "draining", "failed"):
        engine.state = state
        response = call(service, "GET", "/health")
        assert (response.status_code, response.json()) == (503, {"status": state})


def test_metrics_count_requests_by_endpoint_and_status(service):
    post(service, BODY)
    post(service, b"{")
    call(service, "GET", "/secret/path")
    response = call(service, "GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = response.text
    assert 'w2s_requests_total{endpoint="/v1/completions",status="200"} 1.0' in text
    assert 'w2s_requests_total{endpoint="/v1/completions",status="400"} 1.0' in text
    assert 'w2s_requests_total{endpoint="other",status="404"} 1.0' in text
    assert "secret" not in text


def test_a_key_is_asked_for_everywhere_but_at_health(served, engine):
    reader = Reader(served, CONFIG)
    tokens = TokenTexts(served.tokenizer)
    service = Service("tiny", engine, reader, tokens, key="sesame")
    for path in ("/v1/models", "/metrics", "/nothing"):
        response = call(service, "GET", path)
        assert "sesame" not in response.text
        told(response, 401)
    wrong = ("Bearer open", "sesame", "Basic sesame", "Bearer sesamé".encode(), "Bearer ")
    for value in wrong:
        told(post(service, BODY, headers={"authorization": value}), 401)
    assert engine.jobs == []
    right = {"authorization": "Bearer sesame"}
    assert post(service, BODY, headers=right).status_code == 200
    assert call(service, "GET", "/health").status_code == 200


@pytest.mark.parametrize(
    ("host", "is_known"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("a.localhost:80", True),
        ("127.0.0.1:8000", True),
        ("127.3.2.1", True),
        ("[::1]:8000", True),
        ("[::1]", True),
        ("Box.Example:8000", True),
        ("box.example.", True),
        ("", True),
        ("evil.example", False),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:8000", False),
        ("192.168.0.3", False),
        ("[2001:db8::1]:80", False),
        ("box.example.evil", False),
    ],
)
def test_a_strange_host_is_refused_on_loopback(service, host, is_known):
    """A page that a browser shows may be called by the name of this machine: DNS rebinding."""
    on_loopback = replace(service, hosts=("box.example",))
    response = call(on_loopback, "GET", "/v1/models", headers={"host": host})
    if is_known:
        assert response.status_code == 200
    else:
        assert told(response, 403)["code"] == "host_not_allowed"
    assert call(service, "GET", "/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_goes_away_is_not_worked_for(service, engine, streams):
    engine.is_silent = True
    raw = json.dumps(BODY | {"stream": streams}).encode()

    async def visit():
        leaves = time.monotonic() + 0.3
        came = iter([{"type": "http.request", "body": raw, "more_body": False}])

        async def receive():
            message = next(came, None)
            if message is None:
                # As uvicorn's: at once when it is gone, else it waits.
                if (left := leaves - time.monotonic()) > 0:
                    await asyncio.sleep(left)
                return {"type": "http.disconnect"}
            return message

        async def send(message):
            pass

        headers = [(b"content-type", JSON.encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        scope |= {"query_string": b"", "asgi": {"version": "3.0", "spec_version": "2.3"}}
        await asyncio.wait_for(create_app(service)(scope, receive, send), 10)

    asyncio.run(visit())
    assert [ticket.is_cancelled for ticket in engine.tickets] == [True]
