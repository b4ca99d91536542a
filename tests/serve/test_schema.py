import json

import pytest

from w2s_jax.serve.schema import ApiError, Chat, Completion, read_body

SMALL = {"model": "m", "prompt": "a"}
TALK = {"model": "m", "messages": [{"role": "user", "content": "a"}]}


def refusal(form, body) -> ApiError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as caught:
        read_body(raw, form)
    assert "\n" not in caught.value.message
    return caught.value


def test_a_small_body_and_all_it_leaves_out():
    body = read_body(json.dumps(SMALL).encode(), Completion)
    assert (body.n, body.stops, body.stream, body.echo, body.seed) == (1, (), False, False, None)


def test_nulls_are_absent_and_fields_without_effect_are_taken():
    extra = {"n": None, "stop": None, "logit_bias": None, "user": "me", "presence_penalty": 0}
    neutral = {"response_format": {"type": "text"}, "tools": [], "metadata": {"a": "b"}}
    body = read_body(json.dumps(TALK | extra | neutral).encode(), Chat)
    assert body.n == 1


def test_ints_are_floats_but_texts_and_booleans_are_no_numbers():
    assert read_body(json.dumps(SMALL | {"temperature": 0}).encode(), Completion).temperature == 0
    for wrong in ("0", True, [0]):
        assert refusal(Completion, SMALL | {"temperature": wrong}).status == 400
        assert refusal(Completion, SMALL | {"n": wrong}).status == 400


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"no json",
        b'{"model": "m", "prompt": "a"',
        b"\xff\xfe",
        b"[]",
        b"null",
        b'"text"',
        b'{"model": "m", "prompt": "a", "temperature": NaN}',
        b'{"model": "m", "prompt": "a", "temperature": Infinity}',
        b"[" * 100_000,
        b'{"model": "m", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": "a"}',
        b'{"model": 3, "prompt": "a"}',
        b'{"model": "m"}',
        b'{"model": "m", "prompt": "\\ud800"}',
    ],
    ids=range(15),
)
def test_what_is_no_body_at_all(raw):
    assert refusal(Completion, raw).status == 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", -1),
        ("n", 1.5),
        ("max_tokens", -1),
        ("max_tokens", 10**30 * 1.0),
        ("temperature", -0.1),
        ("temperature", 1e300),
        ("top_p", 0),
        ("top_p", 1.1),
        ("seed", -(2**63) - 1),
        ("seed", 2**64),
        ("stop", ""),
        ("stop", ["a"] * 17),
        ("stop", ["a", 3]),
        ("logprobs", 21),
        ("logprobs", True),
        ("stream", "yes"),
        ("method", "beam"),
        ("w", 0),
        ("beta", -1),
        ("row_id", -1),
        ("lane", 2**40),
        ("stream_options", {"include_usage": 3}),
    ],
)
def test_values_out_of_range_name_their_field(field, value):
    error = refusal(Completion, SMALL | {field: value})
    assert error.status == 400
    assert error.param.split(".")[0] == field
    assert field in error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "auto"),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("reasoning_effort", "low"),
        ("modalities", ["text", "audio"]),
        ("store", True),
        ("nonsense", 1),
    ],
)
def test_what_is_not_supported_is_refused_not_ignored(field, value):
    error = refusal(Chat, TALK | {field: value})
    assert (error.status, error.param) == (400, field)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "a"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]},
        {"role": "user", "content": "a", "name": 3},
        {"role": "king", "content": "a"},
        {"role": "user"},
        {"role": "user", "content": []},
        {"role": "user", "content": 3},
        "hello",
    ],
)
def test_messages_that_cannot_be_read(message):
    assert refusal(Chat, {"model": "m", "messages": [message]}).status == 400


def test_messages_as_clients_send_them_back():
    sent_back = {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None}
    parts = [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]
    # Chat templates write no names.
    named = {"role": "user", "content": "a", "name": "ann"}
    messages = [named, sent_back, {"role": "user", "content": parts}]
    body = read_body(json.dumps({"model": "m", "messages": messages}).encode(), Chat)
    assert [message.text for message in body.messages] == ["a", "b", "cd"]
    for messages in ([], None, {}, [None]):
        assert refusal(Chat, {"model": "m", "messages": messages}).status == 400
