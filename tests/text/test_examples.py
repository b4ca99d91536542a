import json

import pytest

from tests.text.chats import chat, text
from w2s_jax.errors import InputError
from w2s_jax.text.examples import Example, parser
from w2s_jax.text.prompts import Message

ASK, YES, NO = (
    {"role": "user", "content": "ask"},
    {"role": "assistant", "content": "yes"},
    {"role": "assistant", "content": "no"},
)
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sea"}}}
TEXT_CALL = {"id": "7", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
HUMAN, GPT = {"from": "human", "value": "ask"}, {"from": "gpt", "value": "yes"}
GPT_NO = {"from": "gpt", "value": "no"}
ASKED = chat(("user", "ask"))
ANSWERED = chat(("assistant", "yes"))
REFUSED = chat(("assistant", "no"))


def parse(kind, row, form="auto"):
    return parser(kind, form, row, "rows.jsonl")(row, "rows.jsonl line 7")


def pair(prompt, chosen, rejected):
    return Example(prompt, (chosen, rejected), "completion")


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"text": "a", "label": 1}, Example(None, (text("a"),), "all")),
        (
            {"messages": [ASK, YES], "prompt": "ask"},
            Example(None, (chat(("user", "ask"), ("assistant", "yes")),), "all"),
        ),
        ({"prompt": "a", "completion": "b"}, Example(text("a"), (text("b"),), "completion")),
        ({"prompt": "a", "response": "b"}, Example(text("a"), (text("b"),), "completion")),
        ({"prompt": [ASK], "completion": [YES]}, Example(ASKED, (ANSWERED,), "completion")),
        ({"prompt": "ask", "completion": [YES]}, Example(ASKED, (ANSWERED,), "completion")),
        ({"prompt": [ASK], "completion": "yes"}, Example(ASKED, (ANSWERED,), "completion")),
        ({"content": "a", "output": "b"}, Example(text("a"), (text("b"),), "completion")),
        (
            {"instruction": "ask", "input": "it", "output": "yes", "system": "s"},
            Example(
                None,
                (chat(("system", "s"), ("user", "ask\nit"), ("assistant", "yes")),),
                "assistant",
            ),
        ),
        (
            {"instruction": "ask", "input": "", "output": "yes", "history": [["a", "b"]]},
            Example(
                None,
                (chat(("user", "a"), ("assistant", "b"), ("user", "ask"), ("assistant", "yes")),),
                "assistant",
            ),
        ),
        (
            {"conversations": [HUMAN, GPT], "system": "s"},
            Example(
                None, (chat(("system", "s"), ("user", "ask"), ("assistant", "yes")),), "assistant"
            ),
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            Example(text("a"), (text("b"),), "completion"),
        ),
    ],
)
def test_sequences(row, example):
    assert parse("sequences", row) == (example,)


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, pair(text("a"), text("b"), text("c"))),
        (
            {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
            pair(ASKED, ANSWERED, REFUSED),
        ),
        ({"prompt": "ask", "chosen": [YES], "rejected": [NO]}, pair(ASKED, ANSWERED, REFUSED)),
        # A prompt that the sides repeat, as UltraFeedback's.
        (
            {"prompt": "ask", "chosen": [ASK, YES], "rejected": [ASK, NO], "messages": [ASK, YES]},
            pair(ASKED, ANSWERED, REFUSED),
        ),
        ({"chosen": [ASK, YES], "rejected": [ASK, NO]}, pair(ASKED, ANSWERED, REFUSED)),
        # A system's message that only the prompt holds.
        *(
            (
                {"prompt": prompt, "chosen": [ASK, YES], "rejected": [ASK, NO]},
                pair(chat(("system", "s"), ("user", "ask")), ANSWERED, REFUSED),
            )
            for prompt in ([SYSTEM, ASK], [SYSTEM])
        ),
        (
            {"chosen": "the sea is", "rejected": "the sun"},
            pair(text("the s"), text("ea is"), text("un")),
        ),
        (
            {"chosen": "the film of it", "rejected": "the film and"},
            pair(text("the film"), text(" of it"), text(" and")),
        ),
        ({"chosen": "Yes indeed", "rejected": "Yes"}, pair(text("Yes"), text(" indeed"), text(""))),
        (
            {"prompt": "a", "responses": ["b", "c"], "chosen": 1},
            pair(text("a"), text("c"), text("b")),
        ),
        ({"instruction": "ask", "output": ["yes", "no"]}, pair(ASKED, ANSWERED, REFUSED)),
        (
            {"instruction": "ask", "chosen": "yes", "rejected": "no"},
            pair(ASKED, ANSWERED, REFUSED),
        ),
        (
            {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT_NO},
            pair(ASKED, ANSWERED, REFUSED),
        ),
    ],
)
def test_pairs(row, example):
    assert parse("pairs", row) == (example,)


def calling(call):
    calls = Message("assistant", "", (("tool_calls", [call]),))
    found = Message("tool", "a film", (("name", "look"),))
    return (Message("user", "ask"), calls, found, Message("assistant", "yes"))


@pytest.mark.parametrize(
    ("row", "call"),
    [
        (
            {
                "messages": [
                    ASK,
                    {"role": "assistant", "content": None, "tool_calls": [TEXT_CALL]},
                    {"role": "tool", "name": "look", "content": "a film"},
                    YES | {"name": "x"},
                ],
                "tools": [TOOL],
            },
            CALL | {"id": "7"},
        ),
        (
            {
                "conversations": [
                    HUMAN,
                    {
                        "from": "function_call",
                        "value": '{"name": "look", "arguments": {"at": "sea"}}',
                    },
                    {"from": "observation", "value": "a film"},
                    GPT,
                ],
                "tools": json.dumps([TOOL]),
            },
            CALL,
        ),
    ],
)
def test_tools_and_their_calls_are_read(row, call):
    (example,) = parse("sequences", row)
    (whole,) = example.responses
    assert whole.tools == (TOOL,)
    wanted = calling(call)
    assert [message.role for message in whole.messages] == [one.role for one in wanted]
    assert [message.content for message in whole.messages] == [one.content for one in wanted]
    (called,) = dict(whole.messages[1].more)["tool_calls"]
    assert {name: called[name] for name in call} == call


@pytest.mark.parametrize(
    ("kind", "row", "unread"),
    [
        ("pairs", {"prompt": "a", "system": "s", "chosen": "b", "rejected": "c"}, {'"system"'}),
        (
            "sequences",
            {"prompt": "a", "completion": "b", "notes": ["x"], "score": 3},
            {'"notes"'},
        ),
        (
            "sequences",
            {"messages": [ASK, YES | {"mood": "glad", "train": False, "thinking": "so"}]},
            {'"mood" of a message', '"train" of a message'},
        ),
        (
            "pairs",
            {"conversations": [HUMAN | {"mood": "glad"}], "chosen": GPT, "rejected": GPT_NO},
            {'"mood" of a message'},
        ),
        ("sequences", {"instruction": "a", "output": "b", "system": "s", "id": "7"}, set()),
        ("sequences", {"messages": [ASK, YES], "tools": [TOOL], "prompt": None}, set()),
    ],
)
def test_columns_that_are_no_part_of_examples_are_known(kind, row, unread):
    assert parser(kind, "auto", row, "rows.jsonl").unread(row) == unread


@pytest.mark.parametrize(
    ("row", "labels"),
    [
        ({"prompt": [ASK], "completion": [YES], "label": True}, {"yes": True}),
        ({"prompt": [ASK], "completion": "yes", "label": 0}, {"yes": False}),
        ({"instruction": "ask", "output": "yes", "kto_tag": False}, {"yes": False}),
        ({"conversations": [HUMAN, GPT], "kto_tag": True}, {"yes": True}),
        ({"prompt": [ASK], "chosen": [YES], "rejected": [NO]}, {"yes": True, "no": False}),
    ],
)
def test_labelled(row, labels):
    found = parse("labelled", row)
    assert all(example.prompt == ASKED for example in found)
    answers = {example.responses[0].messages[0].content: example.label for example in found}
    assert answers == labels
    # To imitate, those that are wanted.
    assert len(parse("sequences", row)) == sum(labels.values())


def test_what_is_not_wanted_is_never_imitated_where_the_first_row_says_nothing():
    reader = parser("sequences", "auto", ("prompt", "completion"), "rows.jsonl")
    row = {"prompt": "a", "completion": "b"}
    assert len(reader(row | {"label": None}, "line 1")) == 1
    with pytest.raises(InputError, match='^line 2: "label" is false, which rows of the format pro'):
        reader(row | {"label": False}, "line 2")


def test_a_named_format_is_read_whatever_else_a_row_holds():
    row = {"text": "a", "prompt": "b", "completion": "c"}
    assert parse("sequences", row, "text") == (Example(None, (text("a"),), "all"),)


@pytest.mark.parametrize(
    ("kind", "form", "row", "told"),
    [
        ("pairs", "preference", {"prompt": "a", "chosen": "b"},
         'rows.jsonl: no "rejected"; found "prompt", "chosen"'),
        ("pairs", "auto", {"prompt": "a", "good": "b", "bad": "c"},
         'needs "chosen" . "rejected", or .*; found "prompt", "good", "bad"'),
        ("pairs", "auto", {"text": "a"},
         'needs .*"chosen" . "rejected".*found "text"'),
        ("sequences", "auto", {"question": "a", "answer": "b"},
         'needs .*"prompt" . "completion".*found "question", "answer"'),
        ("labelled", "auto", {"completion": "b", "label": True},
         '^rows.jsonl: no "prompt"; found "completion", "label"'),
        ("pairs", "auto", {"prompt": "a", "chosen": "b"},
         'needs "chosen" . "rejected", or "prompt" . "responses" . "chosen"; found "prompt"'),
        ("pairs", "text", {"text": "a"}, "the format text holds no pairs; it takes .*preference"),
    ],
)  # fmt: skip
def test_missing_columns_are_named_with_those_found(kind, form, row, told):
    with pytest.raises(InputError, match=told):
        parser(kind, form, row, "rows.jsonl")


@pytest.mark.parametrize(
    ("kind", "first", "row", "told"),
    [
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"},
         'no "rejected"; found "prompt", "chosen"'),
        ("pairs", {"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": [ASK, NO]},
         '"chosen" and "rejected" must both be text'),
        ("pairs", None, {"prompt": "a", "responses": ["b"], "chosen": 0}, "takes a list of two"),
        ("pairs", None, {"prompt": "a", "responses": ["b", "c"], "chosen": 2}, '"chosen" is 2'),
        ("pairs", None, {"prompt": "a", "chosen": 3, "rejected": "b"}, '"chosen" is int'),
        ("pairs", None, {"instruction": "a", "output": "b"}, "one response; a pair takes"),
        ("pairs", None, {"instruction": "a", "output": ["b"]}, "the chosen and the rejected one"),
        ("pairs", None, {"chosen": [ASK, YES], "rejected": [NO]}, "begin differently"),
        ("pairs", None, {"prompt": [ASK, YES], "chosen": "a", "rejected": "b"}, "ends with a mess"),
        ("pairs", None, {"conversations": [HUMAN, GPT], "chosen": GPT, "rejected": GPT_NO},
         "must end with what the user says"),
        ("labelled", None, {"prompt": "a", "completion": "b", "label": "good"},
         '"label" is \'good\'; it takes true or false'),
        ("sequences", None, {"text": ["a"]}, '"text" is list; it takes text'),
        ("sequences", None, {"messages": "a"}, '"messages" is str; it takes a list of messages'),
        ("sequences", None, {"messages": []}, '"messages" is empty'),
        ("sequences", None, {"messages": [{"role": "bot", "content": "x"}]}, "the role 'bot'"),
        ("sequences", None, {"messages": [ASK, YES], "tools": ["x"]}, '"tools" takes a list of fu'),
        ("sequences", None, {"messages": [ASK, YES | {"tool_calls": [{"id": "1"}]}]},
         'takes a list of calls, each of a function with a "name"'),
        ("sequences", None, {"prompt": "a", "completion": "b", "tools": [TOOL]}, "beside a text"),
        ("pairs", None, {"question": "a", "chosen": "b c", "rejected": "b d", "system": "s"},
         'no "prompt", but "question" beside .*--columns prompt=question'),
        *(
            ("pairs", None, {"source": "s", name: "a", "chosen": "b c", "rejected": "b d"},
             f'no "prompt", but "{name}" beside .*--columns prompt={name} says so, else leave')
            for name in ("problem", "task", "userPrompt", "prompt_text", "Question", "post")
        ),
        ("pairs", None, {"messages": [ASK], "chosen": "b c", "rejected": "b d"},
         'no "prompt", but "messages" beside'),
        ("sequences", None, {"conversations": [HUMAN, GPT | {"weight": 0}]}, "has weight 0"),
        ("pairs", None, {"prompt": "b", "chosen": [ASK, YES], "rejected": [ASK, NO]},
         'a dialogue that is not the "prompt"'),
        ("pairs", None, {"prompt": [SYSTEM, YES], "chosen": [ASK, YES], "rejected": [ASK, NO]},
         'a dialogue that is not the "prompt"'),
        ("sequences", None, {"prompt": [ASK], "completion": [ASK, YES]},
         "must begin with what the assistant says"),
        ("sequences", None, {"conversations": [HUMAN]}, "must end with gpt's answer"),
        ("sequences", None, {"conversations": [{"from": "human"}]}, "has no content"),
        ("sequences", None, {"instruction": "a", "output": "b", "history": ["a"]},
         '"history" takes pairs'),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named(kind, first, row, told):
    parse_row = parser(kind, "auto", first or row, "rows.jsonl")
    with pytest.raises(InputError, match=f"^rows.jsonl line 7.*{told}") as error:
        parse_row(row, "rows.jsonl line 7")
    assert "\n" not in str(error.value)
