"""Rows of training files as examples: a prompt, and the response or responses to it.

Knows the columns of TRL's, LLaMA-Factory's and the published formats; uses no tokenizer and opens
no file.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from w2s_jax.errors import InputError
from w2s_jax.text.batches import Kind
from w2s_jax.text.prompts import (
    MORE,
    Conversation,
    Message,
    conversation_of,
    messages_of,
    shared_turns,
    tagged,
    text_in,
    tools_of,
    turns_before,
)

Format = Literal[
    "auto", "text", "messages", "prompt-completion", "labelled", "preference", "responses",
    "alpaca", "sharegpt",
]  # fmt: skip
Loss = Literal["completion", "assistant", "all"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """One row of training data.

    Attributes:
        prompt: What the responses answer; None if the single response is the whole text or
            conversation.
        responses: One, or the chosen and the rejected one: text after a text, messages after
            messages.
        loss: The tokens on which this format's own trainer takes the loss.
        label: Whether the single response is desirable; None if unknown.
        weight: Weight of a pair in the loss.
    """

    prompt: Conversation | None
    responses: tuple[Conversation, ...]
    loss: Loss
    label: bool | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Reader:
    """Turns rows of one format into examples of a kind: (row, place of the row) → examples.

    Attributes:
        form: Name of the format.
        kinds: Kinds of examples that its rows can become.
        columns: Columns that a row must have.
        parse: Reads a row that has these columns and no nulls.
        may: Further columns that are read.
        kind: The kind of examples to make.

    Raises:
        InputError: For a malformed row; the message begins with its place.
    """

    form: Format
    kinds: tuple[Kind, ...]
    columns: tuple[str, ...]
    parse: Callable[[Row, str], Example]
    may: tuple[str, ...] = ()
    kind: Kind = "sequences"

    def __call__(self, row: Row, where: str) -> tuple[Example, ...]:
        present = {column: value for column, value in row.items() if value is not None}
        missing = [column for column in self.columns if column not in present]
        if missing:
            raise InputError(f"{where}: no {_names(missing)}; found {_names(present)}")
        # An undesirable response must not be imitated, even if the first row had no label.
        labels = {"label", "kto_tag"} & present.keys() - {*self.columns}
        for name in sorted(labels) if self.kind == "sequences" else ():
            if present[name] is False:
                raise InputError(
                    f'{where}: "{name}" is false, which rows of the format {self.form} do '
                    "not have; give every row one, also the first, or leave such rows out"
                )
        return _as_kind(self.kind, self.parse(present, where), where)

    def unread(self, row: Row) -> set[str]:
        """Columns of a row, and fields of its messages, that are no part of examples, in quotes.

        Only columns that hold text, lists or mappings are named.
        """
        known = {*self.columns, *self.may}
        held = {name for name, value in row.items() if isinstance(value, str | list | dict)}
        fields = [_unread_fields(row.get(column)) for column in known - {"tools"}]
        told = {f'"{name}" of a message' for name in set[str]().union(*fields)}
        return told | {f'"{name}"' for name in held - known - {*_NAMING}}


def _unread_fields(value: Any) -> set[str]:
    """Fields of messages, in lists of any depth, that are neither read nor empty."""
    if isinstance(value, Mapping):
        empty: tuple[Any, ...] = (None, "", [], {})
        return {name for name, held in value.items() if name not in _READ and held not in empty}
    items = value if isinstance(value, list | tuple) else ()
    return set().union(*map(_unread_fields, items))


def parser(kind: Kind, form: Format, columns: Iterable[str], where: str) -> Reader:
    """The reader of rows with these columns.

    For `auto` it is the first format whose columns are all there. A preference row gives
    `sequences` its chosen response, and `labelled` both of its responses; a labelled row with an
    undesirable response gives `sequences` nothing.

    Raises:
        InputError: For missing columns, with those found; the message begins with `where`.
    """
    known = [one for one in _PARSERS if kind in one.kinds and form in ("auto", one.form)]
    if not known:
        takes = ", ".join(dict.fromkeys(one.form for one in _PARSERS if kind in one.kinds))
        raise InputError(f"{where}: the format {form} holds no {kind}; it takes {takes}")
    found = set(columns)
    fits = next((one for one in known if set(one.columns) <= found), None)
    if fits is None:
        raise InputError(f"{where}: {_missing(known, found)}; found {_names(columns)}")
    return replace(fits, kind=kind)


def _as_kind(kind: Kind, example: Example, where: str) -> tuple[Example, ...]:
    pair = len(example.responses) == 2
    if kind == "pairs" and not pair:
        raise InputError(f"{where}: one response; a pair takes a chosen and a rejected one")
    if kind == "sequences":
        wanted = replace(example, responses=example.responses[:1])
        return () if example.label is False else (wanted,)
    if kind == "labelled" and pair:  # as TRL's unpair_preference_dataset
        sides = zip(example.responses, (True, False), strict=True)
        return tuple(replace(example, responses=(one,), label=label) for one, label in sides)
    return (example,)


def _missing(known: list[Reader], found: set[str]) -> str:
    """Columns that the nearest formats lack or, if none is near, the columns of each format."""
    near = [one for one in known if found & {*one.columns, *one.may}]
    least = min((len(set(one.columns) - found) for one in near), default=0)
    sets = [one.columns for one in near if len(set(one.columns) - found) == least]
    if not sets:
        forms: dict[Format, tuple[str, ...]] = {}
        for one in sorted(known, key=lambda one: len(one.columns)):
            forms.setdefault(one.form, one.columns)
        sets = list(forms.values())
    if len(sets) == 1:
        return f"no {_names(column for column in sets[0] if column not in found)}"
    needed = (" + ".join(f'"{column}"' for column in columns) for columns in sets)
    return f"a row needs {', or '.join(needed)}"


def _names(columns: Iterable[str]) -> str:
    return ", ".join(f'"{column}"' for column in columns) or "no columns"


# One parser for each format, of rows that have its columns and no nulls.


def _parse_text(row: Row, where: str) -> Example:
    text = Conversation(text=text_in(row, "text", where))
    return Example(None, (text,), "all")


def _parse_messages(row: Row, where: str) -> Example:
    messages = messages_of(row["messages"], f'{where}: "messages"')
    whole = Conversation(messages=messages, tools=tools_of(row, where))
    return Example(None, (whole,), "all")


def _parse_completion(row: Row, where: str) -> Example:
    column = "completion" if "completion" in row else "response"
    return _behind(_prompt(row, where), {column: row[column]}, where)


def _parse_labelled(row: Row, where: str) -> Example:
    return replace(_parse_completion(row, where), label=_label(row["label"], f'{where}: "label"'))


def _parse_preference(row: Row, where: str) -> Example:
    """An explicit prompt, or the common beginning of both sides (TRL's extract_prompt)."""
    sides = (row["chosen"], row["rejected"])
    both = [isinstance(side, list | tuple) for side in sides]
    if both[0] != both[1]:
        raise InputError(f'{where}: "chosen" and "rejected" must both be text, or both messages')
    if "prompt" in row and not both[0]:
        return _pair(_prompt(row, where), *sides, where)
    if not both[0]:
        _check_beside(row, where)
        texts = text_in(row, "chosen", where), text_in(row, "rejected", where)
        start, *ends = _split_texts(*texts)
        return _pair(Conversation(text=start), ends[0], ends[1], where)
    answers = [
        messages_of(side, f'{where}: "{name}"') for side, name in zip(sides, _SIDES, strict=True)
    ]
    if "prompt" in row and all(answer[0].role == "assistant" for answer in answers):
        return _pair(_prompt(row, where), *sides, where)
    shared = min(common_length(*answers), *(len(answer) - 1 for answer in answers))
    if not shared:
        raise InputError(f'{where}: no "prompt", and "chosen" and "rejected" begin differently')
    asked = _agreed(row, answers[0][:shared], where)
    prompt = Conversation(messages=asked, tools=tools_of(row, where))
    responses = (Conversation(messages=answer[shared:]) for answer in answers)
    return _checked(Example(prompt, tuple(responses), "completion"), where)


def _agreed(row: Row, shared: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """The common beginning of both sides, if the row's prompt repeats it.

    A system message that only the prompt has comes first. A text prompt must be one of the user's
    messages in the beginning, as in UltraFeedback.
    """
    value = row.get("prompt")
    if isinstance(value, str):
        if any(value.strip() == one.content.strip() for one in shared if one.role == "user"):
            return shared
    elif value is None:
        return shared
    else:
        own = messages_of(value, f'{where}: "prompt"')
        system = own[:1] if own[0].role == "system" != shared[0].role else ()
        if own[len(system) :] == shared[: len(own) - len(system)]:
            return (*system, *shared)
    raise InputError(
        f'{where}: "chosen" and "rejected" begin with a dialogue that is not the "prompt"; '
        "leave the prompt out, or give answers alone as the sides"
    )


def _check_beside(row: Row, where: str) -> None:
    """Raise InputError if a pair's prompt seems to be in a column of another name."""
    asking = {name: _asks(name) for name, value in row.items() if isinstance(value, str | list)}
    found = [name for name, word in asking.items() if word is not None]
    if found:
        beside = min(found, key=lambda name: _ASKING.index(asking[name] or ""))
        raise InputError(
            f'{where}: no "prompt", but "{beside}" beside "chosen" and "rejected"; if it is the '
            f"prompt, --columns prompt={beside} says so, else leave the column out"
        )


def _asks(column: str) -> str | None:
    """The word by which a column seems to be a prompt: "prompt" in userPrompt and prompt_text."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", column).lower())
    if words and words[-1] in _BODIES:
        words.pop()
    return words[-1] if words and words[-1] in _ASKING else None


def _parse_responses(row: Row, where: str) -> Example:
    """The published {prompt, responses, chosen}: two responses, and the index of the better one."""
    responses, chosen = row["responses"], row["chosen"]
    if not isinstance(responses, list | tuple) or len(responses) != 2:
        raise InputError(f'{where}: "responses" takes a list of two')
    if isinstance(chosen, bool) or chosen not in (0, 1):
        raise InputError(f'{where}: "chosen" is {chosen!r}; it takes 0 or 1, the index of the one')
    return _pair(_prompt(row, where), responses[int(chosen)], responses[1 - int(chosen)], where)


def _parse_alpaca(row: Row, where: str) -> Example:
    """LLaMA-Factory's Alpaca: instruction, input on the next line, system, history."""
    asked = [text_in(row, column, where) for column in ("instruction", "input") if row.get(column)]
    turns = (*turns_before(row, where), Message("user", "\n".join(asked)))
    return _answered(Conversation(messages=turns), row, where)


def _parse_content(row: Row, where: str) -> Example:
    """The published sets of arXiv 2407.13647: a rendered prompt as content, and output."""
    prompt = Conversation(text=text_in(row, "content", where))
    return _behind(prompt, {"output": row["output"]}, where)


def _parse_sharegpt(row: Row, where: str) -> Example:
    """LLaMA-Factory's ShareGPT: conversations of {from, value} by human and gpt, system."""
    place = f'{where}: "conversations"'
    turns, tools = shared_turns(row, where), tools_of(row, where)
    if "chosen" in row or "rejected" in row:
        return _answered(Conversation(messages=turns, tools=tools), row, where)
    if turns[-1].role != "assistant" or len(turns) < 2:
        raise InputError(f"{place} must end with gpt's answer to what came before")
    if "kto_tag" in row:
        prompt = Conversation(messages=turns[:-1], tools=tools)
        label = _label(row["kto_tag"], f"{where}: kto_tag")
        return Example(prompt, (Conversation(messages=turns[-1:]),), "completion", label)
    return Example(None, (Conversation(messages=turns, tools=tools),), "assistant")


def _answered(prompt: Conversation, row: Row, where: str) -> Example:
    """The response or the pair of a LLaMA-Factory row, after its prompt."""
    if prompt.messages[-1].role not in ("user", "tool"):
        raise InputError(f"{where}: the prompt must end with what the user says")
    if "chosen" in row:
        return _pair(prompt, tagged(row["chosen"]), tagged(row["rejected"]), where)
    output = row["output"]
    if isinstance(output, list | tuple):  # older ranking files
        if len(output) != 2:
            raise InputError(f'{where}: "output" takes text, or the chosen and the rejected one')
        return _pair(prompt, output[0], output[1], where)
    answered = _behind(prompt, {"output": output}, where)
    if "kto_tag" in row:
        return replace(answered, label=_label(row["kto_tag"], f'{where}: "kto_tag"'))
    whole = Conversation(messages=(*prompt.messages, *answered.responses[0].messages))
    return Example(None, (whole,), "assistant")


_SIDES = ("chosen", "rejected")
# Names of columns that may hold a prompt, the likeliest first.
_ASKING = (
    "prompt", "prompts", "question", "query", "instruction", "instructions", "problem", "task",
    "request", "messages", "conversation", "dialogue", "dialog", "post", "article", "document",
    "input", "inputs", "context", "user", "system",
)  # fmt: skip
_BODIES = ("text", "content", "body")
_NAMING = ("id", "_id", "uid", "uuid", "prompt_id")
_ALL: tuple[Kind, ...] = ("sequences", "pairs", "labelled")
_SINGLE: tuple[Kind, ...] = ("sequences", "labelled")
_TOOLS = ("tools",)
_READ = ("role", "content", "from", "value", "weight", "function_call", *MORE)
_ALPACA, _SHARED = ("input", "system", "history"), ("system", "tools")
# In the order in which `auto` tries them: a row may have more columns than its format needs.
_PARSERS = (
    Reader("sharegpt", _SINGLE, ("conversations", "kto_tag"), _parse_sharegpt, _SHARED),
    Reader("sharegpt", _ALL, ("conversations", *_SIDES), _parse_sharegpt, _SHARED),
    Reader("alpaca", _SINGLE, ("instruction", "output", "kto_tag"), _parse_alpaca, _ALPACA),
    Reader("alpaca", _ALL, ("instruction", *_SIDES), _parse_alpaca, _ALPACA),
    Reader("alpaca", _ALL, ("instruction", "output"), _parse_alpaca, _ALPACA),
    Reader("labelled", _SINGLE, ("prompt", "completion", "label"), _parse_labelled, _TOOLS),
    Reader("messages", ("sequences",), ("messages",), _parse_messages, _TOOLS),
    Reader("sharegpt", ("sequences",), ("conversations",), _parse_sharegpt, _SHARED),
    Reader("preference", _ALL, _SIDES, _parse_preference, ("prompt", "tools")),
    Reader("responses", _ALL, ("prompt", "responses", "chosen"), _parse_responses, _TOOLS),
    Reader(
        "prompt-completion", ("sequences",), ("prompt", "completion"), _parse_completion, _TOOLS
    ),
    Reader("prompt-completion", ("sequences",), ("prompt", "response"), _parse_completion, _TOOLS),
    Reader("alpaca", ("sequences",), ("content", "output"), _parse_content),
    Reader("text", ("sequences",), ("text",), _parse_text),
)


def _pair(prompt: Conversation, chosen: Any, rejected: Any, where: str) -> Example:
    return _behind(prompt, {"chosen": chosen, "rejected": rejected}, where)


def _behind(prompt: Conversation, responses: Mapping[str, Any], where: str) -> Example:
    """The responses, by column, after their prompt; a text prompt becomes a message if they are."""
    if prompt.text is not None and any(not isinstance(v, str) for v in responses.values()):
        prompt = Conversation(messages=(Message("user", prompt.text),))
    sides = (_response(value, prompt, f'{where}: "{name}"') for name, value in responses.items())
    return _checked(Example(prompt, tuple(sides), "completion"), where)


def _checked(example: Example, where: str) -> Example:
    for response in example.responses:
        if response.messages and response.messages[0].role != "assistant":
            raise InputError(f"{where}: a response must begin with what the assistant says")
    return example


def _prompt(row: Row, where: str) -> Conversation:
    return conversation_of({name: row.get(name) for name in ("prompt", "tools")}, where)


def _response(value: Any, prompt: Conversation, where: str) -> Conversation:
    """A response in the form of its prompt: text after text, messages after messages."""
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list | tuple):
        return Conversation(messages=messages_of(value, where))
    if not isinstance(value, str):
        raise InputError(f"{where} is {type(value).__name__}; it takes text or messages")
    if prompt.messages:
        return Conversation(messages=(Message("assistant", value),))
    return Conversation(text=value)


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The common beginning and both ends; a space at the border goes to the ends, as in TRL."""
    shared = common_length(chosen, rejected)
    if 0 < shared < min(len(chosen), len(rejected)) and chosen[shared - 1] == " ":
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common beginning of two sequences; of tokens, TRL's common_prefix_length."""
    pairs = enumerate(zip(one, other, strict=False))
    differs = (index for index, (left, right) in pairs if left != right)
    return next(differs, min(len(one), len(other)))


def _label(value: Any, where: str) -> bool:
    if not isinstance(value, bool) and value not in (0, 1):
        raise InputError(f"{where} is {value!r}; it takes true or false")
    return bool(value)
