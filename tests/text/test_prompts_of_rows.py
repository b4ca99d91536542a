"""Rows as conversations: texts, messages, tools."""

import pytest

from tests.text.chats import chat, text
from w2s_jax.errors import InputError
from w2s_jax.text.prompts import Conversation, Message, conversation_of, plain, prompts_from


@pytest.mark.parametrize(
    ("row", "conversation"),
    [
        ({"prompt": "a film", "id": 3}, text("a film")),
        ({"prompt": "", "messages": None}, text("")),
        ({"prompt": [{"role": "user", "content": "hi"}]}, chat(("user", "hi"))),
        (
            {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}]},
            chat(("system", ""), ("user", "hi")),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "one"},
                    {"role": "assistant", "content": "two", "name": "x"},
                    {"role": "user", "content": [{"type": "text", "text": "thr"}] * 2},
                ]
            },
            chat(("user", "one"), ("assistant", "two"), ("user", "thrthr")),
        ),
        ({"messages": [{"role": "user", "content": []}]}, chat(("user", ""))),
        (
            {"messages": [{"role": "developer", "content": "be"}, {"role": "user", "content": ""}]},
            chat(("system", "be"), ("user", "")),
        ),
        ({"instruction": "Sum up.", "output": "x"}, chat(("user", "Sum up."))),
        ({"instruction": "Sum up.", "input": ""}, chat(("user", "Sum up."))),
        ({"instruction": "Sum up.", "input": None}, chat(("user", "Sum up."))),
        ({"instruction": "Sum up.", "input": "A text"}, chat(("user", "Sum up.\n\nA text"))),
        ({"instruction": ""}, chat(("user", ""))),
        (
            {"instruction": "c", "input": "d", "system": "Be kind.", "history": [["a", "b"]]},
            chat(("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c\n\nd")),
        ),
        ({"prompt": "a", "system": "", "history": []}, text("a")),
        ({"prompt": "a", "input": 3}, text("a")),
        (
            {
                "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "x"}],
                "system": "Be kind.",
            },
            chat(("system", "Be kind."), ("user", "hi")),
        ),
    ],
)
def test_a_row_holds_a_conversation(row, conversation):
    assert conversation_of(row, "rows.jsonl line 2") == conversation


def user(content):
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, 'no "prompt", "messages", "instruction" or "conversations"; a row'),
        ({"prompt": None}, 'no "prompt", "messages"'),
        ({"prompt": "a", "messages": user("a")}, '"prompt" and "messages" in one row'),
        ({"prompt": "", "instruction": ""}, '"prompt" and "instruction" in one row'),
        ({"prompt": 3}, '"prompt" is int; it takes text or a list of messages'),
        ({"prompt": {"role": "user"}}, '"prompt" is dict; it takes text or a list of messages'),
        ({"prompt": ["b"]}, '"prompt"[0] is str; a message is {"role": "user", "content": "text"}'),
        ({"messages": "a"}, '"messages" is str; it takes a list of messages'),
        ({"messages": []}, '"messages" is empty'),
        ({"messages": [user("a")]}, '"messages"[0] is list'),
        (
            {"messages": [{"content": "a"}]},
            '"messages"[0] has no role; it takes system, user, assi',
        ),
        ({"messages": [*user("a"), {"role": "bot"}]}, "\"messages\"[1] has the role 'bot'"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "has the role ['user']"),
        (
            {"messages": [{"role": "user", "content": "", "function_call": {"name": "f"}}]},
            '"messages"[0] has a "function_call"; it takes "tool_calls"',
        ),
        ({"messages": [{"role": "user", "content": "a", "weight": 0}]}, "[0] has weight 0"),
        (
            {"messages": [{"role": "user", "content": "a", "weight": 0.5}]},
            "has weight 0.5; weights",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "thinking": ["b"]}]},
            '"messages"[0]["thinking"] is list; it takes text',
        ),
        ({"prompt": "a", "system": "b"}, 'a "system" beside "prompt", which is read without; make'),
        ({"messages": user("a"), "history": [["b", "c"]]}, 'a "history" beside "messages", which'),
        ({"conversations": user("a"), "history": [["b", "c"]]}, 'a "history" beside "conversatio'),
        (
            {"instruction": "a", "history": [["b"]]},
            '"history" takes pairs of instruction and',
        ),
        ({"messages": [{"role": "user"}]}, '"messages"[0] has no content; it takes text'),
        ({"messages": user(7)}, '"messages"[0] has int as its content'),
        ({"messages": user({"type": "text"})}, '"messages"[0] has dict as its content'),
        ({"messages": user(["a"])}, '"messages"[0]["content"][0] is str; a part is'),
        ({"messages": user([{"type": "image_url"}])}, "[0] is of type 'image_url'; only text"),
        ({"messages": user([{"type": "text"}])}, '"messages"[0]["content"][0] has no "text"'),
        (
            {"messages": [*user("a"), {"role": "assistant", "content": "b"}]},
            "ends with a message of role assistant; the last one must be the user's",
        ),
        ({"messages": [{"role": "system", "content": "b"}]}, "ends with a message of role system"),
        ({"conversations": "a"}, '"conversations" is str; it takes a list of messages'),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "ends with a message of role assist"),
        ({"conversations": user("a"), "system": 3}, '"system" is int; it takes text'),
        ({"instruction": ["a"]}, '"instruction" is list; it takes text'),
        ({"instruction": "a", "input": 4}, '"input" is int; it takes text'),
    ],
)
def test_a_row_without_a_sound_conversation_is_refused_in_one_line(row, message):
    with pytest.raises(InputError) as error:
        conversation_of(row, "rows.jsonl line 2")
    assert str(error.value).startswith("rows.jsonl line 2: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_field_of_another_name_is_the_prompt():
    rows = [{"question": "one", "prompt": None}, {"question": user("two"), "id": 3}]
    assert prompts_from(rows, "question", "in line") == [
        {"question": "one", "prompt": "one"},
        {"question": user("two"), "id": 3, "prompt": user("two")},
    ]
    assert prompts_from(rows, None, "in line") == rows
    with pytest.raises(InputError, match='^in line 1: no "text", which --prompt-field names; fou'):
        prompts_from(rows, "text", "in line")
    with pytest.raises(InputError, match='^in line 1: a "messages" beside "question", which --pr'):
        prompts_from([{"question": "a", "messages": user("b")}], "question", "in line")


def test_a_conversation_is_a_text_or_messages():
    for wrong in ({}, {"text": "a", "messages": (Message("user", "b"),)}):
        with pytest.raises(ValueError, match="either a text or messages"):
            Conversation(**wrong)


@pytest.mark.parametrize(
    ("conversation", "shown"),
    [
        (text("a {film}"), "a {film}"),
        (text(""), ""),
        (chat(("user", "hi\nthere")), "hi\nthere"),
        (chat(("system", "Be kind."), ("user", "hi")), "system: Be kind.\nuser: hi"),
        (
            chat(("user", "a"), ("assistant", "b"), ("user", "c")),
            "user: a\nassistant: b\nuser: c",
        ),
    ],
)
def test_the_plain_text_of_a_conversation(conversation, shown):
    assert plain(conversation) == shown
