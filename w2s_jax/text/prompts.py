"""Prompts as text, or as messages with tools; their token ids, and the text of tokens.

Works with any transformers tokenizer; the rendering of messages for a model is in chat.py.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from w2s_jax.errors import InputError, check_kind
from w2s_jax.text.rows import Row
from w2s_jax.text.tokenizer import tokens_behind

_FIELDS = ("prompt", "messages", "instruction", "conversations")
_ROLES = ("system", "user", "assistant", "tool")
_ALIASES = {"developer": "system"}
"""Other names of roles, and the names under which chat templates know them."""
_BEFORE = {"instruction": ("system", "history"), "conversations": ("system",)}
"""Columns that are read with a prompt field, and come before it."""
# The name of a speaker, which templates do not write.
_IDLE = {("name", role) for role in ("system", "user", "assistant")}
_SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Fields of messages that hold an assistant's reasoning, under the names that templates use."""
MORE = ("tool_calls", "tool_call_id", "name", *THOUGHTS)
_MESSAGE = '{"role": "user", "content": "text"}'


@dataclass(frozen=True)
class Message:
    """One turn; role is system, user, assistant or tool.

    `more` has (name, value) of further fields that chat templates read, such as tool_calls.
    """

    role: str
    content: str
    more: tuple[tuple[str, Any], ...] = ()

    @property
    def turn(self) -> dict[str, Any]:
        """The message in the form that chat templates take."""
        return {"role": self.role, "content": self.content, **dict(self.more)}


@dataclass(frozen=True)
class Conversation:
    """What a response answers: a text to continue, or messages of which the last is the user's.

    `template_args` are values for the chat templates, such as enable_thinking, and override those
    of a template. `tools` are JSON schemas of the functions that the assistant may call.
    """

    text: str | None = None
    messages: tuple[Message, ...] = ()
    template_args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tools: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if (self.text is None) == (not self.messages):
            raise ValueError("a conversation is either a text or messages")

    def turns(self, role: str) -> tuple[Message, ...]:
        """The messages; a text becomes one message of this role."""
        return self.messages or (Message(role, self.text or ""),)


def conversation_of(row: Mapping[str, Any], where: str) -> Conversation:
    """Read a row's "prompt" (text or messages), "messages", "instruction" or "conversations".

    An instruction is a user message, with "input" after a blank line if there is one, as in
    Alpaca's files, after its "system" text and its "history" (`turns_before`). A message is
    {"role", "content"}; its content is text, or a list of {"type": "text", "text"} parts, which are
    joined. ShareGPT's conversations are {"from", "value"} turns after a "system" text; a last turn
    of the assistant is dropped since, like "output", it is an answer. Messages may call the row's
    "tools" (`tools_of`). A null field counts as absent.

    Raises:
        InputError: Unless exactly one of the four is there and well-formed; the message begins with
            `where`.
    """
    fields = [field for field in _FIELDS if row.get(field) is not None]
    if not fields:
        raise InputError(
            f'{where}: no "prompt", "messages", "instruction" or "conversations"; a row needs one, '
            'such as {"prompt": "text"}, or --prompt-field to name its own'
        )
    if len(fields) > 1:
        several = " and ".join(f'"{field}"' for field in fields)
        raise InputError(f"{where}: {several} in one row; it must hold exactly one of them")
    field, value, tools = fields[0], row[fields[0]], tools_of(row, where)
    for name in ("system", "history"):
        # Context that the prompt seems to need, and that is not read with this field.
        unread = name not in _BEFORE.get(field, ()) and isinstance(row.get(name), str | list)
        if unread and row[name]:
            raise InputError(
                f'{where}: a "{name}" beside "{field}", which is read without; make them '
                f'"messages", or leave "{name}" out'
            )
    if field == "instruction":
        asked, more = (text_in(row, name, where) for name in ("instruction", "input"))
        last = Message("user", f"{asked}\n\n{more}" if more else asked)
        return Conversation(messages=(*turns_before(row, where), last), tools=tools)
    if field == "prompt" and isinstance(value, str):
        if tools:
            raise InputError(f'{where}: "tools" beside a text; they need messages')
        return Conversation(text=value)
    place = f'{where}: "{field}"'
    if field == "conversations":
        turns = shared_turns(row, where)
        turns = turns[:-1] if turns[-1].role == "assistant" and len(turns) > 1 else turns
    else:
        takes = "text or a list of messages" if field == "prompt" else "a list of messages"
        turns = messages_of(value, place, takes)
    if turns[-1].role not in ("user", "tool"):
        raise InputError(
            f"{place} ends with a message of role {turns[-1].role}; the last one must be the "
            "user's, since the response answers it"
        )
    return Conversation(messages=turns, tools=tools)


Turns = tuple[Message, ...]


def messages_of(value: Any, where: str, takes: str = "a list of messages") -> Turns:
    """The messages of a list, whoever speaks last.

    Args:
        value: The list.
        where: Beginning of error messages.
        takes: Names what is expected, in the error for anything but a list.

    Raises:
        InputError: For malformed messages, and for anything but a list.
    """
    if not isinstance(value, list | tuple):
        raise InputError(f"{where} is {type(value).__name__}; it takes {takes}")
    if not value:
        raise InputError(f"{where} is empty; it takes messages such as {_MESSAGE}")
    return tuple(_message(item, f"{where}[{index}]") for index, item in enumerate(value))


def text_in(row: Mapping[str, Any], column: str, where: str) -> str:
    """A row's text, empty if null or missing; InputError, beginning with `where`, for no text."""
    value = row.get(column)
    if not isinstance(value, str | None):
        raise InputError(f'{where}: "{column}" is {type(value).__name__}; it takes text')
    return value or ""


def tagged(item: Any) -> Any:
    """A turn of {from, value} as {role, content}; anything else unchanged."""
    if not isinstance(item, Mapping) or "from" not in item:
        return item
    role, value = item["from"], item.get("value")
    rest = {name: held for name, held in item.items() if name not in ("from", "value")}
    if role == "function_call":
        calls = _json(value)
        calls = calls if isinstance(calls, list) else [calls]
        return rest | {"role": "assistant", "content": "", "tool_calls": calls}
    return rest | {"role": _SHAREGPT.get(role, role), "content": value}


def shared_turns(row: Mapping[str, Any], where: str) -> Turns:
    """The messages of a ShareGPT row: its "conversations", after its "system" text if there is one.

    Raises:
        InputError: For malformed turns; the message begins with `where`.
    """
    value = row["conversations"]
    items = [tagged(item) for item in value] if isinstance(value, list | tuple) else value
    turns = messages_of(items, f'{where}: "conversations"')
    system = text_in(row, "system", where)
    return (Message("system", system), *turns) if system and turns[0].role != "system" else turns


def tools_of(row: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    """The row's "tools": JSON schemas of functions, as a list or its JSON text; () without any.

    Raises:
        InputError: For anything else; the message begins with `where`.
    """
    tools = _json(row.get("tools")) or ()
    if not isinstance(tools, list | tuple) or not all(function_of(one) for one in tools):
        raise InputError(f'{where}: "tools" takes a list of functions, each with a "name"')
    return tuple(tools)


def function_of(item: Any) -> Mapping[str, Any]:
    """The {"name", ..} of a tool, or of a call of one; empty if there is none."""
    found = item.get("function") or item if isinstance(item, Mapping) else {}
    named = isinstance(found, Mapping) and isinstance(found.get("name"), str) and found["name"]
    return found if named else {}


def _json(value: Any) -> Any:
    """The value of a JSON text; anything else unchanged."""
    if isinstance(value, str):
        with suppress(ValueError):
            return json.loads(value)
    return value


def prompts_from(rows: Sequence[Row], field: str | None, source: str) -> list[Row]:
    """The rows with the field `field` copied to "prompt"; unchanged if it is None.

    Raises:
        InputError: If the field is missing, or a row has another prompt beside it; the row is named
            as "SOURCE NUMBER".
    """
    if field is None or field == "prompt":
        return list(rows)
    found = []
    for number, row in enumerate(rows, start=1):
        where = f"{source} {number}"
        if row.get(field) is None:
            names = ", ".join(f'"{name}"' for name in row) or "no fields"
            raise InputError(f'{where}: no "{field}", which --prompt-field names; found {names}')
        others = [name for name in _FIELDS if name != field and row.get(name) is not None]
        if others:
            raise InputError(
                f'{where}: a "{others[0]}" beside "{field}", which --prompt-field names; leave the '
                "flag or that field out"
            )
        rest = {name: value for name, value in row.items() if name not in _FIELDS or name == field}
        found.append({**rest, "prompt": row[field]})
    return found


def role_of(name: Any) -> Any:
    """The role's name in chat templates: OpenAI's developer is the system."""
    return _ALIASES.get(name, name) if isinstance(name, str) else name


def plain(conversation: Conversation) -> str:
    """The text of a conversation for judges and for scorers that read text.

    A text as it is; the content of a single message; of several, "role: content" lines.
    """
    if conversation.text is not None:
        return conversation.text
    if len(conversation.messages) == 1:
        return conversation.messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in conversation.messages)


def turns_before(row: Mapping[str, Any], where: str) -> Turns:
    """What precedes an Alpaca row's instruction: its "system", its "history" of pairs.

    Raises:
        InputError: For anything malformed; the message begins with `where`.
    """
    system, history = text_in(row, "system", where), row.get("history") or ()
    turns = [Message("system", system)] if system else []
    for turn in history if isinstance(history, list | tuple) else (None,):
        if not (isinstance(turn, list | tuple) and [type(text) for text in turn] == [str, str]):
            raise InputError(f'{where}: "history" takes pairs of instruction and response')
        turns += [Message("user", turn[0]), Message("assistant", turn[1])]
    return tuple(turns)


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise InputError(f"{where} is {type(item).__name__}; a message is {_MESSAGE}")
    role = role_of(item.get("role"))
    if role not in _ROLES:
        fault = "no role" if role is None else f"the role {role!r}"
        raise InputError(f"{where} has {fault}; it takes {', '.join(_ROLES)}")
    if item.get("function_call"):
        raise InputError(f'{where} has a "function_call"; it takes "tool_calls", a list of calls')
    if item.get("weight") not in (None, 1):
        raise InputError(
            f"{where} has weight {item['weight']!r}; weights of messages are not read, so that it "
            "takes 1 or none"
        )
    more = {name: item[name] for name in MORE if item.get(name) and (name, role) not in _IDLE}
    for name in THOUGHTS:
        if not isinstance(more.get(name, ""), str):
            raise InputError(f'{where}["{name}"] is {type(more[name]).__name__}; it takes text')
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"], f'{where}["tool_calls"]')
    content = item.get("content")
    if isinstance(content, list | tuple):
        places = (f'{where}["content"][{i}]' for i in range(len(content)))
        content = "".join(map(_part, content, places))
    if content is None and "tool_calls" in more:
        content = ""
    if not isinstance(content, str):
        fault = "no content" if content is None else f"{type(content).__name__} as its content"
        raise InputError(f"{where} has {fault}; it takes text")
    return Message(role, content, tuple(more.items()))


def _calls(value: Any, where: str) -> list[Any]:
    """Tool calls with their arguments as an object, which templates write as JSON."""
    if not isinstance(value, list | tuple) or not all(function_of(call) for call in value):
        raise InputError(f'{where} takes a list of calls, each of a function with a "name"')
    found = []
    for call in value:
        around, function = (call if "function" in call else {}), dict(function_of(call))
        function["arguments"] = _json(function.get("arguments", {}))
        found.append({"type": "function", **around, "function": function})
    return found


def _part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping):
        raise InputError(f'{where} is {type(part).__name__}; a part is {{"type": "text", "text"}}')
    if part.get("type") != "text":
        raise InputError(f"{where} is of type {part.get('type')!r}; only text is read")
    if not isinstance(part.get("text"), str):
        raise InputError(f'{where} has no "text" of text')
    return part["text"]


# Token ids


INCOMPLETE = "\ufffd"
"""How tokenizers decode the bytes of an incomplete character."""

CONTEXT = 64
"""Text is decoded after at most this many of the tokens before it.

The number is the same everywhere, so that a response has the same text in scores, traces and
outputs.
"""

_ESCAPE = re.compile(r"\\[ntr](?![A-Za-z])")
# Bytes of the longest UTF-8 character; each may be a token of its own.
_LONGEST_CHARACTER = 4


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt, after the special tokens that the tokenizer adds in front.

    Never empty: a prompt without tokens becomes the BOS token, or EOS if there is no BOS. Special
    tokens that the tokenizer adds at the end, such as EOS, are left out: what follows would begin
    another text. A special token in the prompt itself stays, and a BOS at its start is not doubled.

    Raises:
        InputError: If the prompt is empty and there is neither BOS nor EOS.
    """
    check_kind("a prompt", prompt, str, "text")
    check_encodable("the prompt is not text", prompt)
    bos = tokenizer.bos_token
    special = not (bos and prompt.startswith(bos))
    (tokens,) = encode_texts(tokenizer, [prompt], special=special)
    starts = [one for one in (tokenizer.bos_token_id, tokenizer.eos_token_id) if one is not None]
    if not tokens and not starts:
        raise InputError("the prompt is empty and the tokenizer has neither a BOS nor an EOS token")
    return tokens or starts[:1]


def check_encodable(told: str, *texts: str) -> None:
    """Raise InputError, beginning with `told`, for a text that UTF-8 cannot encode."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{told}: {error.reason}") from None


def encode_texts(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """Token ids of texts that may be continued: no special tokens at the end, optional in front."""
    return [ids for ids, _ in encode_spans(tokenizer, texts, special=special, offsets=False)]


def encode_spans(
    tokenizer: Any, texts: Sequence[str], *, special: bool, offsets: bool = True
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """The token ids of `encode_texts`, with each token's (start, end) in characters.

    The spans take a fast tokenizer; they are empty without `offsets`.
    """
    if not texts:
        return []
    found = tokenizer(
        list(texts),
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )
    behind = tokens_behind(tokenizer) if special else 0
    spans = found["offset_mapping"] if offsets else [[]] * len(texts)
    return [
        (list(ids[: len(ids) - behind]), list(own[: len(ids) - behind]))
        for ids, own in zip(found.input_ids, spans, strict=True)
    ]


def decode_tokens(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of token ids, without special tokens, spaces unchanged."""
    return tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def response_end(
    tokenizer: Any,
    prompt: Sequence[int],
    tokens: Sequence[int],
    *,
    finished: bool,
    stop: Sequence[str] = (),
    behind: Sequence[int] = (),
    eos_ids: Sequence[int] = (),
) -> tuple[str, str | None]:
    """The text of a response up to an EOS or a stop string, and that string.

    It is decoded after its prompt, because some tokenizers drop a leading space.

    Args:
        tokenizer: The tokenizer.
        prompt: Token ids of the prompt.
        tokens: Token ids of the response.
        finished: Whether EOS or a stop string ended it. Otherwise an incomplete last character is
            left out.
        stop: The stop strings.
        behind: Tokens that followed before a stop string cut them off; they complete the string if
            `tokens` ends within it.
        eos_ids: The last token has no text if it is one of these, special to the tokenizer or not.
    """
    text_of = partial(text_behind, partial(decode_tokens, tokenizer), prompt[-CONTEXT:])
    if finished and tokens and tokens[-1] in eos_ids:
        tokens = tokens[:-1]
    for count in range(len(behind) + 1):
        text = text_of([*tokens, *behind[:count]])
        kept = cut(text, stop)
        if kept is not None:
            rest = text[len(kept) :]
            return kept, next(one for one in stop if rest.startswith(one))
    text = text_of(tokens)
    return (text if finished else text.rstrip(INCOMPLETE)), None


def text_behind(
    decode: Callable[[Sequence[int]], str], prompt: Sequence[int], tokens: Sequence[int]
) -> str:
    """The text that tokens add to the prompt's text; that of the tokens alone if it is undefined.

    It is undefined if the prompt's text depends on what follows, as within a multi-byte character.
    """
    before, whole = decode(prompt), decode([*prompt, *tokens])
    return whole.removeprefix(before) if whole.startswith(before) else decode(tokens)


def token_texts(
    decode: Callable[[Sequence[int]], str], prompt: Sequence[int], tokens: Sequence[int]
) -> list[str]:
    """The text that each token adds after a prompt.

    A character of several tokens belongs to the last of them.
    """
    texts: list[str] = []
    before = list(prompt[-CONTEXT:])
    waiting: list[int] = []
    for token in tokens:
        waiting.append(token)
        text = text_behind(decode, before, waiting)
        if text.endswith(INCOMPLETE) and len(waiting) < _LONGEST_CHARACTER:
            texts.append("")
            continue
        texts.append(text)
        before, waiting = [*before, *waiting][-CONTEXT:], []
    return texts


def cut(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first stop string in it; None if there is none."""
    starts = [start for start in map(text.find, stop) if start >= 0]
    return text[: min(starts)] if starts else None


def escape_notes(stop: Sequence[str]) -> list[str]:
    r"""A line for each stop string that contains \\n or the like as two characters.

    A shell passes them on so, and so does YAML without double quotes.
    """
    return [
        f"note: the stop string {text!r} holds a backslash and a letter, not what they stand for; "
        f"write $'{text}' in a shell, \"{text}\" in YAML"
        for text in stop
        if _ESCAPE.search(text)
    ]


def special_stops(tokenizer: Any, stop: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Split stop strings into (texts to search for, ids of special tokens, which have no text)."""
    special = set(tokenizer.all_special_tokens)
    ids = tuple(tokenizer.convert_tokens_to_ids(text) for text in stop if text in special)
    return tuple(text for text in stop if text not in special), ids
