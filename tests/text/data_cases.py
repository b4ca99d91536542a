"""Rows of every format that TRL has too, and the options under which both read them."""

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|endoftext|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|endoftext|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


TEXTS = [
    {"text": "the sea, and a film of it."},
    {"text": "a film<|endoftext|>"},
    {"text": "of the sea and the film " * 3},
]
# The second prompt ends inside a token, and the third row has no answer to speak of.
COMPLETIONS = [
    {"prompt": "the sea", "completion": " and a film of it."},
    {"prompt": "and a fi", "completion": "lm of the sea"},
    {"prompt": "the film", "completion": ""},
    {"prompt": "the sea and the film " * 4, "completion": " of it"},
]
TURNS = [user("the sea?"), assistant("a film"), user("of it?"), assistant("of the sea.")]
DIALOGUES = [
    {"messages": [{"role": "system", "content": "a film."}, *TURNS]},
    {"messages": TURNS[:2]},
]
ANSWERS = [
    {"prompt": TURNS[:1], "completion": TURNS[1:2]},
    {"prompt": TURNS[:3], "completion": TURNS[3:]},
    {"prompt": TURNS[:1], "completion": TURNS[1:]},
]
SHAREGPT = [
    {
        "conversations": [
            {"from": "user", "value": "the sea?"},
            {"from": "assistant", "value": "a film of it"},
        ]
    }
]
PAIRS = [
    {"prompt": "the sea", "chosen": " and a film", "rejected": " of it."},
    {"prompt": "and a fi", "chosen": "lm of the sea", "rejected": " sea"},
    {"prompt": "the sea and the film " * 4, "chosen": " of it", "rejected": " and a film" * 8},
]
IMPLICIT = [
    {"chosen": "the sea and a film", "rejected": "the sea of it"},
    {"chosen": "a film of it", "rejected": "a fils"},
]
CHATS = [
    {"prompt": TURNS[:1], "chosen": TURNS[1:2], "rejected": [assistant("it")]},
    {"prompt": TURNS[:3], "chosen": TURNS[3:], "rejected": [assistant("of it and it")]},
]
IMPLICIT_CHATS = [{"chosen": TURNS, "rejected": [*TURNS[:3], assistant("it")]}]
LABELLED = [
    {**row, "label": bool(index % 2)} for index, row in enumerate([*COMPLETIONS, COMPLETIONS[0]])
]

# name: (kind, chat template, rows, our options)
CASES = {
    "text": ("sequences", None, TEXTS, {}),
    "text keep_start": ("sequences", None, TEXTS, {"max_length": 9}),
    "text keep_end": ("sequences", None, TEXTS, {"max_length": 9, "truncation": "keep_end"}),
    "completion": ("sequences", None, COMPLETIONS, {}),
    "completion all": ("sequences", None, COMPLETIONS, {"loss_on": "all"}),
    "completion keep_start": ("sequences", None, COMPLETIONS, {"max_length": 12}),
    "completion keep_end": (
        "sequences", None, COMPLETIONS, {"max_length": 12, "truncation": "keep_end"},
    ),
    "messages": ("sequences", CHATML, DIALOGUES, {}),
    "messages assistant": ("sequences", MARKED, DIALOGUES, {"loss_on": "assistant"}),
    "answers": ("sequences", CHATML, ANSWERS, {}),
    "answers assistant": ("sequences", MARKED, ANSWERS, {"loss_on": "assistant"}),
    "sharegpt all": ("sequences", CHATML, SHAREGPT, {"loss_on": "all"}),
    "pairs": ("pairs", None, PAIRS, {}),
    "pairs keep_start": ("pairs", None, PAIRS, {"max_length": 12}),
    "pairs keep_end": ("pairs", None, PAIRS, {"max_length": 12, "truncation": "keep_end"}),
    "implicit": ("pairs", None, IMPLICIT, {}),
    "chats": ("pairs", CHATML, CHATS, {}),
    "implicit chats": ("pairs", CHATML, IMPLICIT_CHATS, {}),
    "labelled": ("labelled", None, LABELLED, {}),
    "labelled keep_start": ("labelled", None, LABELLED, {"max_length": 12}),
    "labelled pairs": ("labelled", None, PAIRS[:2], {}),
}  # fmt: skip
