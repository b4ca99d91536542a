"""Prompts: what a row asks, as a text or messages with tools; token ids, and text of tokens again.

Works with any transformers tokenizer; how a model wants to read messages is in chat.py.
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
"""Roles that chat templates know under another name."""
_BEFORE = {"instruction": ("system", "history"), "conversations": ("system",)}
"""What rows of a field may hold beside it, to be read before it."""
# Of people, whom no template names.
_IDLE = {("name", role) for role in ("system", "user", "assistant")}
_SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Fields of messages with what an assistant thought, under the names that templates have for it."""
MORE = ("tool_calls", "tool_call_id", "name", *THOUGHTS)
_MESSAGE = '{"role": "user", "content": "text"}'


@dataclass(frozen=True)
class Message:
    """One turn; role is system, user, assistant or tool.

    `more` has (name, value) of further fields that chat templates read: the calls of tools, say.
    """

    role: str
    content: str
    more: tuple[tuple[str, Any], ...] = ()

    @property
    def turn(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        return {"role": self.role, "content": self.content, **dict(self.more)}


@dataclass(frozen=True)
class Conversation:
    """What a response answers: a text to continue, or messages of which the user's is the last.

    template_args: values for the chat templates that write it, such as enable_thinking; they go
    before those of a template. `tools` are those that the assistant may call, as JSON schemas.
    """

    text: str | None = None
    messages: tuple[Message, ...] = ()
    template_args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tools: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if (self.text is None) == (not self.messages):
            raise ValueError("a conversation is either a text or messages")

    def turns(self, role: str) -> tuple[Message, ...]:
        """The messages; of a text, one of this role."""
        return self.messages or (Message(role, self.text or ""),)


def conversation_of(row: Mapping[str, Any], where: str) -> Conversation:
    """What a row's "prompt" (text or messages), "messages", "instruction" or "conversations" asks.

    An instruction is a user's message, with "input" after a blank line where there is one, as in
    Alpaca's files, behind its "system" text and its "history" (`turns_before`). A message is
    {"role", "content"}; its content is text or a list of {"type": "text", "text"} parts, which are
    joined. Of ShareGPT's conversations, of {"from", "value"} turns behind a "system" text, a last
    turn of the assistant's is left out: like "output", it is what somebody else answered. Messages
    may call the row's "tools" (`tools_of`). A field that is null counts as absent.

    Raises:
        InputError: beginning with `where`, unless exactly one of the four is there and sound.
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
        # What the prompt seems to be asked behind, and is not read.
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

    Raises:
        InputError: beginning with `where`, for messages that are not sound, and for what is no
            list, which says what it `takes`.
    """
    if not isinstance(value, list | tuple):
        raise InputError(f"{where} is {type(value).__name__}; it takes {takes}")
    if not value:
        raise InputError(f"{where} is empty; it takes messages such as {_MESSAGE}")
    return tuple(_message(item, f"{where}[{index}]") for index, item in enumerate(value))


def text_in(row: Mapping[str, Any], column: str, where: str) -> str:
    """A row's text, empty where it is null or not there; InputError, at `where`, for no text."""
    value = row.get(column)
    if not isinstance(value, str | None):
        raise InputError(f'{where}: "{column}" is {type(value).__name__}; it takes text')
    return value or ""


def tagged(item: Any) -> Any:
    """A turn of {from, value} as {role, content}; anything else as it is."""
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
    """The messages of a ShareGPT row: its "conversations", behind its "system" text if it has one.

    Raises:
        InputError: beginning with `where`, for what is not sound.
    """
    value = row["conversations"]
    items = [tagged(item) for item in value] if isinstance(value, list | tuple) else value
    turns = messages_of(items, f'{where}: "conversations"')
    system = text_in(row, "system", where)
    return (Message("system", system), *turns) if system and turns[0].role != "system" else turns


def tools_of(row: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    """The row's "tools": JSON schemas of functions, as a list or as its JSON text; () without any.

    Raises:
        InputError: beginning with `where`, for anything else.
    """
    tools = _json(row.get("tools")) or ()
    if not isinstance(tools, list | tuple) or not all(function_of(one) for one in tools):
        raise InputError(f'{where}: "tools" takes a list of functions, each with a "name"')
    return tuple(tools)


def function_of(item: Any) -> Mapping[str, Any]:
    """The {"name", ..} of a tool or a call of one; empty where there is none."""
    found = item.get("function") or item if isinstance(item, Mapping) else {}
    named = isinstance(found, Mapping) and isinstance(found.get("name"), str) and found["name"]
    return found if named else {}


def _json(value: Any) -> Any:
    """What a JSON text holds; anything else as it is."""
    if isinstance(value, str):
        with suppress(ValueError):
            return json.loads(value)
    return value


def prompts_from(rows: Sequence[Row], field: str | None, source: str) -> list[Row]:
    """The rows with the named field as their "prompt" too; as they are where none is named.

    Raises:
        InputError: naming the row as "SOURCE NUMBER", where the field is missing or the row has
            another prompt beside it.
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
    """The role that chat templates know by this name: OpenAI's developer is the system."""
    return _ALIASES.get(name, name) if isinstance(name, str) else name


def plain(conversation: Conversation) -> str:
    """The text that a scorer of texts or a judge reads.

    A text as it is; of one message, its content; of more, "role: content" lines.
    """
    if conversation.text is not None:
        return conversation.text
    if len(conversation.messages) == 1:
        return conversation.messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in conversation.messages)


def turns_before(row: Mapping[str, Any], where: str) -> Turns:
    """What goes before an Alpaca row's instruction: its "system", its "history" of pairs.

    Raises:
        InputError: beginning with `where`, for what is not sound.
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
    """Calls of tools with their arguments as an object, which templates write as JSON."""
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
"""How tokenizers write the bytes of a character that is not complete yet."""

CONTEXT = 64
"""Text is decoded behind at most this many of the tokens before it.

The same number wherever a response is read, so that its text is the same in scores, traces and
outputs.
"""

_ESCAPE = re.compile(r"\\[ntr](?![A-Za-z])")
# Bytes of the longest character in UTF-8; each may be a token of its own.
_LONGEST_CHARACTER = 4


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt with the special tokens the tokenizer puts in front; never empty.

    Those that it puts behind, an EOS say, are left out: what follows would begin another text. A
    special token that the prompt spells stays. A prompt that begins with the BOS token gets no
    second one, and one without tokens becomes the BOS token, or EOS where there is no BOS. Raises
    InputError where there is neither.
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
    """Raise InputError, which begins as `told`, for a text without a form in UTF-8."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{told}: {error.reason}") from None


def encode_texts(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """Token ids of texts that may go on: with special tokens in front or none, and none behind."""
    return [ids for ids, _ in encode_spans(tokenizer, texts, special=special, offsets=False)]


def encode_spans(
    tokenizer: Any, texts: Sequence[str], *, special: bool, offsets: bool = True
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """The token ids that `encode_texts` gives, each text's with its tokens' places in it.

    Those are the first character and the end of each token, which takes a fast tokenizer; without
    `offsets` there is none.
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
    """The text of token ids, special tokens left out, spaces as they are."""
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
    """What a response's tokens add to their prompt, up to an EOS or stop string, and that string.

    Read behind the prompt, because some tokenizers drop a leading space from text of its own.
    finished: whether an EOS or a stop string ended it; a character that its length cut short is
    left out. behind: tokens that followed before a stop string took them off; where the last of
    `tokens` holds the beginning of that string, they show it. eos_ids: the last token, if it is one
    of them, has no text, whether or not the tokenizer knows it as special.
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
    """The text that tokens add to their prompt's; that of the tokens alone where it cannot be told.

    It cannot where the prompt's text changes with what follows, as inside a multi-byte character.
    """
    before, whole = decode(prompt), decode([*prompt, *tokens])
    return whole.removeprefix(before) if whole.startswith(before) else decode(tokens)


def token_texts(
    decode: Callable[[Sequence[int]], str], prompt: Sequence[int], tokens: Sequence[int]
) -> list[str]:
    """What each token adds to the text behind a prompt.

    A character that several tokens write belongs to the last of them.
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
    """The text before the first stop string in it, or None where there is none."""
    starts = [start for start in map(text.find, stop) if start >= 0]
    return text[: min(starts)] if starts else None


def escape_notes(stop: Sequence[str]) -> list[str]:
    r"""A line for each stop string that holds \\n or the like as two characters.

    A shell hands them on so, and so does YAML outside of double quotes.
    """
    return [
        f"note: the stop string {text!r} holds a backslash and a letter, not what they stand for; "
        f"write $'{text}' in a shell, \"{text}\" in YAML"
        for text in stop
        if _ESCAPE.search(text)
    ]


def special_stops(tokenizer: Any, stop: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Stop strings as (text to look for, token ids): a special token never shows in the text."""
    special = set(tokenizer.all_special_tokens)
    ids = tuple(tokenizer.convert_tokens_to_ids(text) for text in stop if text in special)
    return tuple(text for text in stop if text not in special), ids
