"""The real openai client against a real server process."""

import asyncio
import json
import signal
import socket
import time

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.serve.tiny_server import checkpoints_at, server

FLAGS = ["--w=2", "--k=2", "--l=3", "--max-new-tokens=16", "--slots=8", "--temperature=1"]
FLAGS += ["--served-name=tiny", "--top-k=0"]
CLIENTS = 64


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return checkpoints_at(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def address(checkpoints):
    with server(checkpoints, *FLAGS, "--most-tokens=64") as (_, address):
        yield address


@pytest.fixture
def client(address):
    with OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=120) as client:
        yield client


def metric(address, line) -> float:
    text = httpx.get(f"{address}/metrics").text
    return next(
        (float(one.split()[-1]) for one in text.splitlines() if one.startswith(f"{line} ")), 0.0
    )


def wait_for(check, seconds=60.0):
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def test_completions_whole_and_as_a_stream(client):
    asked = {"model": "tiny", "prompt": ["The sea", "A"], "seed": 5}
    whole = client.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert {choice.finish_reason for choice in whole.choices} <= {"stop", "length"}
    usage = whole.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    texts, last = ["", ""], None
    options = {"include_usage": True}
    for chunk in client.completions.create(**asked, stream=True, stream_options=options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        last = chunk
    assert texts == [choice.text for choice in whole.choices]
    assert last.usage == usage


def test_chats_whole_and_as_a_stream(client):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Hi {you}"}], "seed": 5}
    whole = client.chat.completions.create(**asked)
    message = whole.choices[0].message
    assert message.role == "assistant"
    text = "".join(
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**asked, stream=True)
    )
    assert text == message.content


def test_the_search_rides_in_the_extra_body(client):
    def ask(**extra):
        found = client.completions.create(
            model="tiny", prompt="The sea", seed=5, max_tokens=12, extra_body=extra
        )
        return found.choices[0]

    assert ask(w=2, k=2, l=3).text == ask().text
    assert ask(method="sample").text != ask().text
    assert ask(method="eft", beta=0).text == ask(method="sample").text
    assert ask(method="eft", beta=0.5).text != ask(method="sample").text
    assert ask(row_id=3).text != ask().text
    assert isinstance(ask().score, float)


def test_lanes_tell_samples_apart(client):
    """Asked for together or one by one, as a client that searches for itself would."""

    def ask(n, lane):
        found = client.completions.create(
            model="tiny", prompt="The sea", seed=5, n=n,
            extra_body={"method": "sample", "lane": lane},
        )  # fmt: skip
        return [choice.text for choice in found.choices]

    assert ask(2, 0) == ask(1, 0) + ask(1, 1)


def test_log_probs_of_an_echo_as_harnesses_ask_for_them(client):
    prompts = [[0, 70, 71, 72], [0, 80, 81]]
    found = client.completions.create(
        model="tiny", prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1,
        extra_body={"method": "sample"},
    )  # fmt: skip
    for choice, prompt in zip(found.choices, prompts, strict=True):
        logprobs = choice.logprobs
        assert len(logprobs.token_logprobs) == len(logprobs.tokens) == len(prompt) + 1
        assert logprobs.token_logprobs[0] is None
        assert all(value <= 0 for value in logprobs.token_logprobs[1:])
        # The last one is greedy: its number is that of the likeliest, exactly.
        assert logprobs.token_logprobs[-1] == max(logprobs.top_logprobs[-1].values())
        assert len(logprobs.text_offset) == len(logprobs.tokens)
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a"}], logprobs=True, top_logprobs=3,
        max_tokens=4, extra_body={"method": "eft"},
    )  # fmt: skip
    content = chat.choices[0].logprobs.content
    assert len(content) == chat.usage.completion_tokens
    assert all(len(token.top_logprobs) == 3 for token in content)


def test_what_a_search_cannot_give_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="chunk-level beam search has no likelihood"):
        client.completions.create(model="tiny", prompt="a", logprobs=1)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "a"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.completions.create(model="gpt-4", prompt="a")


def test_stop_strings(client):
    asked = {"model": "tiny", "prompt": "The sea", "seed": 8}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[2:4]
    found = client.completions.create(**asked, stop=["\x00", stop]).choices[0]
    assert stop not in found.text
    if found.finish_reason == "stop" and found.stop_reason:
        assert found.stop_reason == stop


def test_models_and_health(client, address):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "w2s_jax"
    assert httpx.get(f"{address}/health").json() == {"status": "ready"}


def test_many_clients_at_once_get_what_they_would_alone(client, address):
    """64 clients of all methods, some streaming; the same seed and row give the same text."""
    methods = ("cbs", "sample", "eft")

    def asked(index):
        extra = {"method": methods[index % 3], "row_id": index % 6}
        return {"model": "tiny", "prompt": "The sea", "seed": 2, "extra_body": extra}

    alone = [client.completions.create(**asked(index)).choices[0].text for index in range(6)]

    async def crowd():
        async with AsyncOpenAI(
            base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=300
        ) as many:

            async def one(index):
                if index % 2:
                    stream = await many.completions.create(**asked(index), stream=True)
                    return "".join([chunk.choices[0].text async for chunk in stream])
                found = await many.completions.create(**asked(index))
                return found.choices[0].text

            return await asyncio.gather(*(one(index) for index in range(CLIENTS)))

    found = asyncio.run(crowd())
    assert found == [alone[index % 6] for index in range(CLIENTS)]
    assert metric(address, "w2s_slots_in_use") == metric(address, "w2s_queue_depth") == 0


def test_clients_that_go_away_free_their_slots(client, address):
    before = metric(address, "w2s_cancelled_total")
    raw = {"model": "tiny", "prompt": ["The sea"] * 30, "max_tokens": 64, "method": "sample"}

    def leave(body):
        data = json.dumps(body).encode()
        host, port = address.removeprefix("http://").split(":")
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n"
        with socket.create_connection((host, int(port))) as one:
            one.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
            wait_for(lambda: metric(address, "w2s_queue_depth") > 0)

    for stream in (False, True):
        leave(raw | {"stream": stream})
        wait_for(lambda: metric(address, "w2s_slots_in_use") == 0)
        wait_for(lambda: metric(address, "w2s_queue_depth") == 0)
    assert metric(address, "w2s_cancelled_total") > before
    assert client.completions.create(model="tiny", prompt="a").choices


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"not json", 400),
        (b'{"model": "tiny", "prompt": NaN}', 400),
        (b"[" * 200_000, 400),
        (b'{"model": "tiny", "prompt": "a", "n": -1}', 400),
        (b'{"model": "tiny", "prompt": "a", "temperature": "hot"}', 400),
        (b'{"model": "tiny", "prompt": {"a": 1}}', 400),
        (b'{"model": "tiny", "prompt": "a", "best_of": 3}', 400),
        (b'{"model": "huge", "prompt": "a"}', 404),
        (b'{"model": "tiny", "prompt": "' + b"a" * 5_000_000 + b'"}', 413),
        (b'{"model": "tiny", "prompt": "' + b"a" * 5_000 + b'"}', 400),
        (b'{"model": "tiny", "prompt": "a", "max_tokens": 65}', 400),
        (b'{"model": "tiny", "prompt": "a", "w": 50, "k": 50}', 400),
    ],
    ids=range(13),
)
def test_malformed_bodies_hurt_nobody(address, content, status):
    kind = {"content-type": "application/json"}
    response = httpx.post(f"{address}/v1/completions", content=content, headers=kind)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]
    assert httpx.get(f"{address}/health").status_code == 200


def test_a_full_queue_a_key_and_an_orderly_end(checkpoints):
    """One server with a short queue and a key, ended while it works."""
    flags = [*FLAGS, "--method=sample", "--slots=1", "--queue=2", "--grace=60"]
    with server(checkpoints, *flags, W2S_API_KEY="sesame") as (process, address):
        key = {"Authorization": "Bearer sesame"}
        body = {"model": "tiny", "prompt": "The sea", "seed": 1, "max_tokens": 16}

        async def crowd():
            async with httpx.AsyncClient(base_url=address, headers=key, timeout=120) as many:
                posts = (many.post("/v1/completions", json=body) for _ in range(24))
                return await asyncio.gather(*posts)

        assert httpx.post(f"{address}/v1/completions", json=body).status_code == 401
        found = asyncio.run(crowd())
        assert {response.status_code for response in found} == {200, 429}
        full = next(response for response in found if response.status_code == 429)
        assert full.json()["error"]["code"] == "queue_full"
        assert int(full.headers["retry-after"]) >= 1
        with pytest.raises(openai.AuthenticationError):
            OpenAI(base_url=f"{address}/v1", api_key="wrong").models.list()

        async def end():
            async with httpx.AsyncClient(base_url=address, headers=key, timeout=120) as client:
                long = body | {"max_tokens": 100, "method": "cbs", "l": 1}
                running = asyncio.ensure_future(client.post("/v1/completions", json=long))
                while "w2s_slots_in_use 1.0" not in (await client.get("/metrics")).text:
                    await asyncio.sleep(0.01)
                process.send_signal(signal.SIGTERM)
                while (await client.get("/health")).status_code == 200:
                    await asyncio.sleep(0.01)
                late = await client.post("/v1/completions", json=body)
                return await running, late

        answered, late = asyncio.run(end())
        assert answered.status_code == 200
        assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
        assert process.wait(30) == 0
        assert "sesame" not in process.stdout.read() + process.stderr.read()
