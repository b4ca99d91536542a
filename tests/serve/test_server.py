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

# With n = 2 and no max_tokens each method has one program: that of test_engine.py.
FLAGS = ["--w=2", "--k=2", "--l=3", "--max-new-tokens=16", "--most-tokens=16", "--slots=3"]
FLAGS += ["--temperature=1", "--top-k=0", "--served-name=tiny", "--queue=120"]
KEY = "sesame"
BEARER = {"Authorization": f"Bearer {KEY}"}
CLIENTS = 64


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server that asks for a key; told to end it ends in good order, and has told nobody."""
    checkpoints = checkpoints_at(tmp_path_factory.mktemp("checkpoints"))
    with server(checkpoints, *FLAGS, W2S_API_KEY=KEY) as (process, address):
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert KEY not in process.stdout.read() + process.stderr.read()


@pytest.fixture(scope="module")
def client(address):
    with OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


def metric(address, line) -> float:
    text = httpx.get(f"{address}/metrics", headers=BEARER).text
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
            model="tiny", prompt="The sea", seed=5, n=2, extra_body=extra
        )
        return found.choices[0]

    assert ask(w=2, k=2, l=3).text == ask().text
    assert ask(method="sample").text != ask().text
    assert ask(method="eft", beta=0).text == ask(method="sample").text
    assert ask(method="eft", beta=0.5).text != ask(method="sample").text
    assert ask(row_id=3).text != ask().text
    assert isinstance(ask().score, float)


def test_log_probs_of_an_echo_as_harnesses_ask_for_them(client):
    prompts = [[0, 70, 71, 72], [0, 80, 81]]
    found = client.completions.create(
        model="tiny", prompt=prompts, echo=True, logprobs=1, max_tokens=2, temperature=0, seed=1,
        n=2, extra_body={"method": "sample"},
    )  # fmt: skip
    for choice in found.choices:
        logprobs, prompt = choice.logprobs, prompts[choice.index // 2]
        new = len(logprobs.tokens) - len(prompt)
        assert new in (1, 2)
        assert len(logprobs.token_logprobs) == len(logprobs.text_offset) == len(prompt) + new
        assert logprobs.token_logprobs[0] is None
        assert all(value <= 0 for value in logprobs.token_logprobs[1:])
        # What is new is greedy: its number is that of the likeliest, exactly.
        for value, likeliest in list(
            zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
        )[-new:]:
            assert value == max(likeliest.values())


def test_log_probs_of_a_chat(client):
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a"}], logprobs=True, top_logprobs=1,
        n=2, extra_body={"method": "sample"},
    )  # fmt: skip
    content = [token for choice in chat.choices for token in choice.logprobs.content]
    assert len(content) == chat.usage.completion_tokens
    assert all(len(token.top_logprobs) == 1 for token in content)


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


def test_models_and_health(client, address):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "w2s_jax"
    assert httpx.get(f"{address}/health").json() == {"status": "ready"}


def test_many_clients_at_once_get_what_they_would_alone(client, address):
    """64 clients of all methods, some streaming; the same seed and row give the same text."""
    methods = ("cbs", "sample", "eft")

    def asked(index):
        extra = {"method": methods[index % 3], "row_id": index % 6}
        return {"model": "tiny", "prompt": "The sea", "seed": 2, "n": 2, "extra_body": extra}

    answers = [client.completions.create(**asked(index)) for index in range(6)]
    alone = [[choice.text for choice in found.choices] for found in answers]

    async def crowd():
        async with AsyncOpenAI(
            base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=300
        ) as many:

            async def one(index):
                if index % 2:
                    stream = await many.completions.create(**asked(index), stream=True)
                    texts = ["", ""]
                    async for chunk in stream:
                        for choice in chunk.choices:
                            texts[choice.index] += choice.text
                    return texts
                found = await many.completions.create(**asked(index))
                return [choice.text for choice in found.choices]

            return await asyncio.gather(*(one(index) for index in range(CLIENTS)))

    found = asyncio.run(crowd())
    assert found == [alone[index % 6] for index in range(CLIENTS)]
    assert metric(address, "w2s_slots_in_use") == metric(address, "w2s_queue_depth") == 0


def test_clients_that_go_away_free_their_slots(client, address):
    before = metric(address, "w2s_cancelled_total")
    raw = {"model": "tiny", "prompt": ["The sea"] * 120, "n": 2, "method": "sample"}

    def leave(body):
        data = json.dumps(body).encode()
        host, port = address.removeprefix("http://").split(":")
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n"
        head += f"Content-Type: application/json\r\nAuthorization: Bearer {KEY}\r\n\r\n"
        with socket.create_connection((host, int(port))) as one:
            one.sendall(head.encode() + data)
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
    headers = {"content-type": "application/json"} | BEARER
    response = httpx.post(f"{address}/v1/completions", content=content, headers=headers)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]
    assert httpx.get(f"{address}/health").status_code == 200


def test_a_full_queue(address, client):
    """What is in it is answered."""
    asked = {"model": "tiny", "prompt": ["The sea"] * 120, "n": 2}
    asked["extra_body"] = {"method": "sample"}

    async def crowd():
        async with AsyncOpenAI(
            base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=120
        ) as many:
            answers = (many.completions.create(**asked) for _ in range(4))
            return await asyncio.gather(*answers, return_exceptions=True)

    found = asyncio.run(crowd())
    refused = [one for one in found if isinstance(one, openai.RateLimitError)]
    assert refused
    assert refused[0].code == "queue_full"
    assert int(refused[0].response.headers["retry-after"]) >= 1
    answered = [one for one in found if one not in refused]
    assert answered
    assert all(len(one.choices) == 240 for one in answered)


def test_a_wrong_key(address):
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()
