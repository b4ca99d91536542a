"""Conversations: what a row asks, and how each model wants to read it, as text and as token ids.

The published templates themselves are in text/templates.py; holds no model code.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

from w2s_jax.errors import InputError
from w2s_jax.text.prompts import encode_prompt, encode_texts
from w2s_jax.text.rows import Row
from w2s_jax.text.templates import BOS_TEXTS, PUBLISHED
from w2s_jax.text.time_limit import apply_template

TEMPLATES = tuple(PUBLISHED)
TEXT_TEMPLATES = ("imdb", "plain")
"""Published templates that write no special tokens, so that the tokenizer's own go in front."""
_NAMES = ("auto", "none", "chat", *TEMPLATES)
_FIELDS = ("prompt", "messages", "instruction", "conversations")
_ROLES = ("system", "user", "assistant", "tool")
_ALIASES = {"developer": "system"}
"""Roles that chat templates know under another name."""
# Of people, whom no template names.
_IDLE = {("name", role) for role in ("system", "user", "assistant")}
_SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}
_MORE = ("tool_calls", "tool_call_id", "name", "reasoning_content")
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


def conversation_of(row: Mapping[str, Any], where: str) -> Conversation:
    """What a row's "prompt" (text or messages), "messages", "instruction" or "conversations" asks.

    An instruction is one user message, with "input" after a blank line where there is one, as in
    Alpaca's files. A message is {"role", "content"}; its content is text or a list of
    {"type": "text", "text"} parts, which are joined. Of ShareGPT's conversations, of {"from",
    "value"} turns behind a "system" text, a last turn of the assistant's is left out: like
    "output", it is what somebody else answered. Messages may call the row's "tools" (`tools_of`). A
    field that is null counts as absent.

    Raises InputError, beginning with `where`, unless exactly one of the four is there and sound.
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
    if field == "instruction":
        return Conversation(messages=(Message("user", _instruction(row, where)),), tools=tools)
    if field == "prompt" and isinstance(value, str):
        if tools:
            raise InputError(f'{where}: "tools" beside a text; they need messages')
        return Conversation(text=value)
    if field == "conversations" and isinstance(value, list | tuple):
        turns = shared_turns(row, where)
        asked = turns[:-1] if turns[-1].role == "assistant" and len(turns) > 1 else turns
        return Conversation(messages=_ended(asked, f'{where}: "{field}"'), tools=tools)
    if isinstance(value, list | tuple):
        messages = messages_of(value, f'{where}: "{field}"')
        return Conversation(messages=_ended(messages, f'{where}: "{field}"'), tools=tools)
    takes = "text or a list of messages" if field == "prompt" else "a list of messages"
    raise InputError(f'{where}: "{field}" is {type(value).__name__}; it takes {takes}')


def messages_of(value: Sequence[Any], where: str) -> tuple[Message, ...]:
    """The messages of a list, whoever speaks last. Raises InputError, beginning with `where`."""
    if not value:
        raise InputError(f"{where} is empty; it takes messages such as {_MESSAGE}")
    return tuple(_message(item, f"{where}[{index}]") for index, item in enumerate(value))


def tagged(item: Any) -> Any:
    """A turn of {from, value} as {role, content}; anything else as it is."""
    if not isinstance(item, Mapping) or "from" not in item:
        return item
    role, value = item["from"], item.get("value")
    if role == "function_call":
        calls = _json(value)
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": "assistant", "content": "", "tool_calls": calls}
    return {"role": _SHAREGPT.get(role, role), "content": value}


def shared_turns(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """The messages of a ShareGPT row: its "conversations", behind its "system" text if it has one.

    Raises InputError, beginning with `where`, for what is not sound.
    """
    value, place = row["conversations"], f'{where}: "conversations"'
    if not isinstance(value, list | tuple):
        raise InputError(f"{place} is {type(value).__name__}; it takes a list of messages")
    turns = messages_of([tagged(item) for item in value], place)
    system = row.get("system")
    if not isinstance(system, str | None):
        raise InputError(f'{where}: "system" is {type(system).__name__}; it takes text')
    return (Message("system", system), *turns) if system and turns[0].role != "system" else turns


def tools_of(row: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    """The row's "tools": JSON schemas of functions, as a list or as its JSON text; () without any.

    Raises InputError, beginning with `where`, for anything else.
    """
    tools = _json(row.get("tools")) or ()
    if not isinstance(tools, list | tuple) or not all(_function(one) for one in tools):
        raise InputError(f'{where}: "tools" takes a list of functions, each with a "name"')
    return tuple(tools)


def _function(item: Any) -> Mapping[str, Any]:
    """The {"name", ..} of a tool or a call of one; empty where there is none."""
    found = item.get("function") or item if isinstance(item, Mapping) else {}
    named = isinstance(found, Mapping) and isinstance(found.get("name"), str) and found["name"]
    return found if named else {}


def _json(value: Any) -> Any:
    """What a JSON text holds; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def prompts_from(rows: Sequence[Row], field: str | None, source: str) -> list[Row]:
    """The rows with the named field as their "prompt" too; as they are where none is named.

    Raises InputError, naming the row as "SOURCE NUMBER", where the field is missing or the row has
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


def read_template_args(text: str, where: str) -> dict[str, Any]:
    """Values for chat templates from a JSON object. Raises InputError, beginning with `where`."""
    try:
        args = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: {text!r} is not JSON ({error})") from None
    if not isinstance(args, dict):
        raise InputError(
            f'{where}: {text!r} is no JSON object such as {{"enable_thinking": false}}'
        )
    return args


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


@dataclass(frozen=True)
class Template:
    """How one model reads a conversation; made by `load_template`.

    Under `auto` and `none` a text is encoded as it stands, with the special tokens that the
    tokenizer puts in front, unless it begins with the BOS token itself: BOS is never doubled. What
    a template renders is encoded without additions, since it writes its special tokens itself; only
    those of TEXT_TEMPLATES are encoded as texts are.

    Special tokens spelled out in a content (`</s>`, `<|eot_id|>`) become those tokens: transformers
    does so by default, and the published code. Contents from people who are not trusted can
    therefore close a turn and open another one; filter them before.

    Attributes:
        tokenizer: any transformers tokenizer.
        name: auto, none, chat, a published name, or the path of a .jinja file.
        jinja: the chat template; None where there is none.
        where: how messages of errors name this template, such as the flag it came from.
        args: further values that the template may read, such as enable_thinking.
    """

    tokenizer: Any
    name: str
    jinja: str | None = None
    where: str = "template"
    args: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def render(self, conversation: Conversation) -> str:
        """The text that the response follows.

        Raises InputError for messages where this takes none, and for a template that fails.
        """
        if self.as_it_stands(conversation):
            assert conversation.text is not None
            return conversation.text
        if self.name == "none":
            raise InputError(
                f"{self.where}: {self.name} takes text only, and the row holds messages or an "
                "instruction; use chat or a published template"
            )
        if self.jinja is None:
            raise InputError(
                f"{self.where}: the tokenizer has no chat template, which messages and "
                f"instructions need; name a .jinja file or one of {', '.join(TEMPLATES)}"
            )
        messages = conversation.messages or (Message("user", conversation.text or ""),)
        args = conversation.template_args
        return self._apply(self.jinja, messages, conversation.tools, args)

    def render_whole(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
        """The text of a finished conversation, without the opening of another answer.

        For chat templates and files only: published templates always open an answer. Raises
        InputError as `render` does.
        """
        if self.name in PUBLISHED:
            raise ValueError(f"the template {self.name} writes no finished conversations")
        if self.jinja is None:
            return self.render(Conversation(messages=tuple(messages)))  # says what is missing
        return self._apply(self.jinja, messages, tools, {}, opened=False)

    def render_begun(self, messages: Sequence[Message]) -> str:
        """The text of a conversation whose last message goes on. Raises InputError as `render`."""
        if self.jinja is None:
            return self.render(Conversation(messages=tuple(messages)))  # says what is missing
        return self._apply(self.jinja, messages, (), {}, opened=False, continued=True)

    def encode(self, conversation: Conversation) -> list[int]:
        """Token ids of the rendered prompt; never empty. Raises InputError as `render` does."""
        prompt = self.render(conversation)
        if self.adds_special_tokens(conversation, prompt):
            return encode_prompt(self.tokenizer, prompt)
        return self._ids([prompt], False)[0] or encode_prompt(self.tokenizer, "")

    def encode_responses(
        self, conversation: Conversation, responses: Sequence[str]
    ) -> list[list[int]]:
        """Token ids of the rendered prompt with each response behind it, encoded together.

        The tokens that one has in common with `encode(conversation)` at its start are the prompt's,
        and all further ones the response's: where the border falls inside a token, that token is
        the response's, as in the published code. No EOS is at the end unless the response spells
        it. Raises InputError as `render` does.
        """
        if not responses:
            return []
        prompt = self.render(conversation)
        special = self.adds_special_tokens(conversation, prompt)
        alone, *rows = self._ids([prompt, *(prompt + response for response in responses)], special)
        if not alone:
            start = encode_prompt(self.tokenizer, "")
            return [[*start, *row] for row in rows]
        return rows

    @property
    def eos_id(self) -> int | None:
        """The id that ends a turn: the published template's own, else the tokenizer's EOS."""
        end = PUBLISHED[self.name].end if self.name in PUBLISHED else None
        if end is not None:
            found = self.tokenizer.convert_tokens_to_ids(end)
            # A token that is not there has the id of the unknown token, or none.
            if found not in (None, self.tokenizer.unk_token_id):
                return found
        return self.tokenizer.eos_token_id

    def describe(self) -> str:
        """The template in a word for fingerprints: equal where it renders equally."""
        kind = self.name if self.name in _NAMES else "jinja"
        if self.jinja is None:
            return kind
        told = self.jinja + (json.dumps(dict(self.args), sort_keys=True) if self.args else "")
        return f"{kind}:{hashlib.sha256(told.encode()).hexdigest()[:16]}"

    def adds_special_tokens(self, conversation: Conversation, prompt: str) -> bool:
        """Whether the tokenizer's special tokens go in front of this rendered prompt."""
        bos = self.tokenizer.bos_token
        is_text = self.as_it_stands(conversation) or self.name in TEXT_TEMPLATES
        return is_text and not (bos and prompt.startswith(bos))

    def as_it_stands(self, conversation: Conversation) -> bool:
        """Whether this is a text that no template touches."""
        return conversation.text is not None and self.name in ("auto", "none")

    def _apply(
        self,
        jinja: str,
        messages: Sequence[Message],
        tools: Sequence[Any],
        args: Mapping[str, Any],
        *,
        opened: bool = True,
        continued: bool = False,
    ) -> str:
        args = {**self.args, **args}
        named = signature(self.tokenizer.apply_chat_template).parameters
        taken = {"messages", *named}.intersection(args)
        if taken:
            raise InputError(
                f"{self.where}: {min(taken)} is no value that may be given to templates"
            )
        try:
            text = apply_template(
                self.tokenizer,
                [message.turn for message in messages],
                tools=list(tools) or None,
                chat_template=jinja,
                tokenize=False,
                add_generation_prompt=opened,
                continue_final_message=continued,
                **args,
            )
        except Exception as error:  # a template is a program, and may raise anything
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise InputError(f"{self.where}: the chat template fails: {reason}") from error
        calls = [call for one in messages for call in dict(one.more).get("tool_calls", ())]
        unread = next((f for f in map(_function, (*tools, *calls)) if f["name"] not in text), None)
        if unread is not None:
            raise InputError(
                f"{self.where}: the chat template does not write the tool {unread['name']!r}; take "
                "one that writes tools and their calls"
            )
        return text

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        try:
            for text in texts:
                text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt or a response is not text: {error.reason}") from None
        return encode_texts(self.tokenizer, texts, special=special)


def load_template(
    tokenizer: Any, name: str = "auto", *, where: str, args: Mapping[str, Any] | None = None
) -> Template:
    """The template of this name behind a tokenizer.

    auto takes a text as it stands and writes messages by the tokenizer's chat template; none takes
    texts only; chat makes a text one user message of the tokenizer's chat template; a name of
    TEMPLATES or a path that ends in .jinja does the same with another template. args: values that
    the template may read.

    Raises InputError, beginning with `where` (a flag, say), for an unknown name, a file that cannot
    be read, a template that is not jinja, and for chat where the tokenizer has no template.
    """
    if name in PUBLISHED:
        return Template(tokenizer, name, PUBLISHED[name].jinja, where, args or {})
    if Path(name).suffix == ".jinja":
        template = Template(tokenizer, name, _read(name, where), where, args or {})
    elif name in _NAMES:
        jinja = _chat_template(tokenizer, name, where)
        template = Template(tokenizer, name, jinja, where, args or {})
    else:
        near = difflib.get_close_matches(name, _NAMES, n=1)
        hint = f", perhaps {near[0]}" if near else ""
        raise InputError(
            f"{where}: no template {name!r}{hint}; it takes a .jinja file or one of "
            f"{', '.join(_NAMES)}"
        )
    if name != "auto":  # whose rows may never need the tokenizer's template
        _check_syntax(template)
    return template


def renderer(
    name: str, *, where: str, args: Mapping[str, Any] | None = None
) -> Callable[[Conversation], str]:
    """How conversations are written for a model whose tokenizer is not here, behind an API.

    auto and none take texts as they stand; the other names are those of `load_template`, without
    chat. BOS is left out at the start: servers put it there. Raises InputError as `load_template`
    does, and so does what is returned, as `Template.render`.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    nothing = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    template = load_template(nothing, name, where=where, args=args)

    def render(conversation: Conversation) -> str:
        text = template.render(conversation)
        if conversation.text is not None and name in ("auto", "none"):
            return text
        return next((text.removeprefix(bos) for bos in BOS_TEXTS if text.startswith(bos)), text)

    return render


def _instruction(row: Mapping[str, Any], where: str) -> str:
    for name in ("instruction", "input"):
        value = row.get(name)
        if not isinstance(value, str | None):
            raise InputError(f'{where}: "{name}" is {type(value).__name__}; it takes text')
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]


def _ended(messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """The messages, which the user must end."""
    if messages[-1].role not in ("user", "tool"):
        raise InputError(
            f"{where} ends with a message of role {messages[-1].role}; the last one must be the "
            "user's, since the response answers it"
        )
    return messages


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise InputError(f"{where} is {type(item).__name__}; a message is {_MESSAGE}")
    role = role_of(item.get("role"))
    if role not in _ROLES:
        fault = "no role" if role is None else f"the role {role!r}"
        raise InputError(f"{where} has {fault}; it takes {', '.join(_ROLES)}")
    more = {name: item[name] for name in _MORE if item.get(name) and (name, role) not in _IDLE}
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"], f'{where}["tool_calls"]')
    content = item.get("content")
    if isinstance(content, list | tuple):
        parts = (_part(part, f'{where}["content"][{i}]') for i, part in enumerate(content))
        content = "".join(parts)
    if content is None and "tool_calls" in more:
        content = ""
    if not isinstance(content, str):
        fault = "no content" if content is None else f"{type(content).__name__} as its content"
        raise InputError(f"{where} has {fault}; it takes text")
    return Message(role, content, tuple(more.items()))


def _calls(value: Any, where: str) -> list[Any]:
    """Calls of tools with their arguments as an object, which templates write as JSON."""
    if not isinstance(value, list | tuple) or not all(_function(call) for call in value):
        raise InputError(f'{where} takes a list of calls, each of a function with a "name"')
    found = []
    for call in value:
        function = {**_function(call), "arguments": _json(_function(call).get("arguments", {}))}
        around = call if "function" in call else {}
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


def _read(path: str, where: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{where}: {path} cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: {path} is not UTF-8 ({error.reason})") from None


def _chat_template(tokenizer: Any, name: str, where: str) -> str | None:
    """The tokenizer's chat template under this name, None where it is not needed or not there."""
    if name == "none" or (name == "auto" and not tokenizer.chat_template):
        return None
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: the tokenizer has no chat template for {name}; name a .jinja file or one of "
            f"{', '.join(TEMPLATES)}"
        )
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # several templates, none of them called default
        if name == "auto":
            return None
        raise InputError(f"{where}: {str(error).strip().splitlines()[0]}") from None


def _check_syntax(template: Template) -> None:
    """Raise InputError for a template that is not jinja, before a row needs it."""
    from jinja2 import TemplateSyntaxError

    try:
        template.render(Conversation(messages=(Message("user", "text"),)))
    except InputError as error:
        # What it refuses beyond that may be this message's fault, not its own.
        if isinstance(error.__cause__, TemplateSyntaxError):
            raise
