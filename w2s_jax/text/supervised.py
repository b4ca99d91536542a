"""Examples as token ids, with the tokens that count in the loss; truncation of long ones.

Text is rendered by the templates of text/chat.py; rows, files and batches are elsewhere.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

from w2s_jax.errors import InputError
from w2s_jax.text.batches import Side
from w2s_jax.text.chat import PUBLISHED, Template, apply_template
from w2s_jax.text.examples import Example, common_length
from w2s_jax.text.prompts import Conversation, Message, check_encodable, encode_prompt, encode_spans

Truncation = Literal["keep_start", "keep_end", "keep_response", "drop", "error", "split"]
Spans = list[tuple[int, int]]
_Tokens = tuple[list[int], Spans]

_THOUGHTS = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """The sides of an example.

    Attributes:
        sides: One, or the chosen and the rejected one.
        merged: Whether the prompt's last tokens merged with the responses.
        unwritten: Fields of messages that the template left out.
    """

    sides: tuple[Side, ...]
    merged: bool = False
    unwritten: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Rendered:
    """Text to tokenise.

    Attributes:
        prompt: The prompt alone, which locates the start of the response; None without a prompt.
        sides: Each prompt with its response.
        special: Whether the tokenizer adds its special tokens.
        end: Token to append to each side, if any.
        spans: Where the assistant's turns are in each side, in characters.
        ready: Token ids and marks of sides that the template has tokenised.
        unwritten: Fields of messages that the template left out.
    """

    prompt: str | None
    sides: tuple[str, ...]
    special: bool
    end: int | None
    spans: tuple[Spans, ...] | None = None
    ready: tuple[tuple[list[int], list[bool]], ...] | None = None
    unwritten: frozenset[str] = frozenset()


def encode(
    template: Template,
    examples: Sequence[Example],
    places: Sequence[str],
    loss_on: str = "auto",
    *,
    append_eos: bool = True,
) -> list[Encoded]:
    """Token ids and targets of examples.

    A text is its prompt and response, tokenised together, followed by EOS. Messages are rendered
    completely by the tokenizer's chat template or a file, which end turns in their own way; a
    published template renders up to the last answer, and its end token follows. The response begins
    where the tokens differ from those of the prompt alone, so that a token across the border
    belongs to it, and at the same place in both responses of a pair (as in TRL).

    Args:
        template: The template.
        examples: The examples.
        places: Their places in files, for error messages.
        loss_on: auto (what the example says), completion (the response, or the last answer of a
            conversation), assistant (all its answers), or all. Answers are found by the template's
            {% generation %} marks, or by rendering the beginnings of the conversation.
        append_eos: Whether to append EOS, or a published template's end token, where it is missing.

    Raises:
        InputError: For what the template or the tokenizer refuses; begins with the place.
    """
    losses = [example.loss if loss_on == "auto" else loss_on for example in examples]
    rendered = []
    for example, loss, place in zip(examples, losses, places, strict=True):
        try:
            one = _render(template, example, loss)
            check_encodable("not text", *one.sides)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        rendered.append(one if append_eos else replace(one, end=None))
    found = _tokenize(template.tokenizer, rendered)
    return [
        _encoded(template.tokenizer, one, found, loss)
        for one, loss in zip(rendered, losses, strict=True)
    ]


def shorten(encoded: Encoded, max_length: int, policy: Truncation) -> list[Encoded]:
    """Truncate an example with a side longer than `max_length`.

    Sides without targets are dropped with their example, as in TRL.

    Args:
        encoded: The example.
        max_length: Maximum tokens of a side.
        policy: keep_start cuts the end and keep_end the beginning of each side (TRL's names).
            keep_response cuts the prompt's beginning first, equally on both sides, then the end.
            split makes several examples of one, whose targets are all but the first token of each.
            drop leaves nothing, as does error, which the caller handles.

    Returns:
        What is left, as zero or more examples.
    """
    if max(map(len, encoded.sides)) <= max_length:
        return [encoded] if _counts(encoded) else []
    if policy in ("drop", "error"):
        return []
    if policy == "split":
        (side,) = encoded.sides
        starts = range(0, len(side), max_length)
        parts = [Encoded((_part(side, start, max_length),), encoded.merged) for start in starts]
        return [part for part in parts if _counts(part)]
    cut = 0
    if policy == "keep_response":  # one token of the prompt stays, which predicts the response
        over = (min(len(side) - max_length, side.prompt - 1) for side in encoded.sides)
        cut = max(0, *over)
    sides = tuple(
        _part(side, len(side) - max_length if policy == "keep_end" else cut, max_length)
        if len(side) > max_length or cut
        else side
        for side in encoded.sides
    )
    short = replace(encoded, sides=sides)
    return [short] if _counts(short) else []


def _part(side: Side, start: int, length: int) -> Side:
    start = max(start, 0)
    targets = side.targets[start : start + length].copy()
    targets[:1] = False
    prompt = min(max(side.prompt - start, 0), len(targets))
    return Side(side.tokens[start : start + length], targets, prompt)


def _counts(encoded: Encoded) -> bool:
    return all(side.targets.any() for side in encoded.sides)


# Text


def _render(template: Template, example: Example, loss: str) -> _Rendered:
    if loss == "completion" and example.prompt is None:
        example = _last_answer(example)
    prompt, responses = example.prompt, example.responses
    texts = [response.text for response in responses if response.text is not None]
    if texts and (prompt is None or template.as_it_stands(prompt)):
        if loss == "assistant":
            raise InputError("text has no turns; take the loss on completion or all")
        start = "" if prompt is None or prompt.text is None else prompt.text
        bos = template.tokenizer.bos_token
        sides = tuple(start + text for text in texts)
        special = not (bos and sides[0].startswith(bos))
        return _Rendered(None if prompt is None else start, sides, special, _end(template))
    before = prompt.turns("user") if prompt else ()
    tools = (prompt or responses[0]).tools
    written = template.render(Conversation(messages=before, tools=tools)) if prompt else None
    wholes = [(*before, *response.turns("assistant")) for response in responses]
    special, unwritten = False, frozenset[str]()
    if template.name in PUBLISHED:
        sides = tuple(_published(template, whole, tools) for whole in wholes)
        asked = Conversation(messages=wholes[0][:1])
        special = template.adds_special_tokens(asked, sides[0])
    else:
        unwritten = unwritten.union(*(template.unwritten(whole, tools) for whole in wholes))
        if loss == "assistant" and template.jinja and _GENERATION.search(template.jinja):
            ready = tuple(_by_generation(template, whole, tools) for whole in wholes)
            empty = ("",) * len(wholes)
            return _Rendered(written, empty, False, None, ready=ready, unwritten=unwritten)
        sides = tuple(template.render_whole(whole, tools) for whole in wholes)
    spans = None
    if loss == "assistant":
        both = zip(wholes, sides, strict=True)
        spans = tuple(_answers(template, whole, text, tools) for whole, text in both)
    end = _end(template) if template.name in PUBLISHED else None
    return _Rendered(written, sides, special, end, spans, unwritten=unwritten)


def _last_answer(example: Example) -> Example:
    """A conversation's last answer as the response to what precedes it."""
    messages = example.responses[0].messages
    if not messages:
        raise InputError("a text of its own has no prompt; take the loss on all of it")
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise InputError("a conversation must end with what the assistant says to somebody")
    before = Conversation(messages=messages[:-1], tools=example.responses[0].tools)
    last = Conversation(messages=messages[-1:])
    return Example(before, (last,), "completion")


def _published(template: Template, whole: Sequence[Message], tools: Sequence[Any]) -> str:
    """A conversation up to its last answer, in a published template's format."""
    if whole[-1].role != "assistant":
        raise InputError("a conversation must end with what the assistant says")
    if tools or any(message.more for message in whole):
        raise InputError(
            f"the template {template.name} writes no tools and no more than contents of "
            "messages; take the tokenizer's own, or a .jinja file"
        )
    opened = template.render(Conversation(messages=tuple(whole[:-1]))) if whole[:-1] else ""
    return opened + whole[-1].content


def _answers(
    template: Template, whole: Sequence[Message], text: str, tools: Sequence[Any]
) -> Spans:  # fmt: skip
    """Spans of the assistant's turns in a rendered conversation, without their opening text."""
    spans = []
    for index, message in enumerate(whole):
        if message.role != "assistant":
            continue
        before = Conversation(messages=tuple(whole[:index]), tools=tuple(tools)) if index else None
        opening = template.render(before) if before else ""
        if template.name in PUBLISHED:
            closing = _closed(template, text, opening + message.content)
        else:
            closing = template.render_whole(whole[: index + 1], tools)
            # Templates may add a system message of their own in front, which is no answer.
            opening = opening if before else _first_opening(template, closing, tools)
            closing = _as_it_goes_on(text, opening, closing)
        if not (text.startswith(opening) and text.startswith(closing)):
            raise InputError(
                "the chat template writes a conversation's beginning differently when it goes on, "
                "so that the assistant's turns cannot be told; use a template with "
                "{% generation %} marks"
            )
        spans.append((len(opening), len(closing)))
    return spans


def _first_opening(template: Template, closing: str, tools: Sequence[Any]) -> str:
    """The text that every conversation begun by the assistant shares, whatever its content."""
    said = [(Message("assistant", content),) for content in ("\u2603", "\u260e")]
    rendered = [template.render_whole(one, tools) for one in said]
    return closing[: min(common_length(closing, one) for one in rendered)]


def _as_it_goes_on(text: str, opening: str, closing: str) -> str:
    """A conversation up to an answer, as the whole conversation begins.

    Templates such as Qwen3's render an answer's thoughts only while nothing follows it.
    """
    if text.startswith(closing) or not closing.startswith(opening):
        return closing
    spoken = opening + _THOUGHTS.sub("", closing[len(opening) :])
    return spoken if text.startswith(spoken) else closing


def _closed(template: Template, text: str, answer: str) -> str:
    """An answer with the end token that a published template writes after it."""
    end = PUBLISHED[template.name].end
    behind = text[len(answer) :]
    if end and behind.lstrip(" ").startswith(end):
        return text[: len(text) - len(behind.lstrip(" ")) + len(end)]
    return answer


def _by_generation(
    template: Template, whole: Sequence[Message], tools: Sequence[Any]
) -> tuple[list[int], list[bool]]:  # fmt: skip
    """Token ids, and marks of the assistant's tokens, of a template with generation marks."""
    template.render_whole(whole, tools)  # reports the template's errors in one line
    found = apply_template(
        template.tokenizer,
        [message.turn for message in whole],
        tools=list(tools) or None,
        chat_template=template.jinja,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]


def _end(template: Template) -> int:
    if template.eos_id is None:
        raise InputError("the tokenizer has no EOS token to end a response with")
    return template.eos_id


# Tokens


def _tokenize(tokenizer: Any, rendered: Sequence[_Rendered]) -> dict[tuple[str, bool], _Tokens]:
    """Ids and character spans of all texts; each text is tokenised once, many in one call."""
    found: dict[tuple[str, bool], _Tokens] = {}
    for special in (False, True):
        group = [one for one in rendered if one.special == special]
        wanted = [text for one in group for text in (one.prompt, *one.sides) if text is not None]
        texts = list(dict.fromkeys(wanted))
        offsets = any(one.spans is not None for one in group)
        rows = encode_spans(tokenizer, texts, special=special, offsets=offsets)
        found |= {(text, special): row for text, row in zip(texts, rows, strict=True)}
    return found


def _encoded(
    tokenizer: Any, one: _Rendered, found: Mapping[tuple[str, bool], _Tokens], loss: str
) -> Encoded:  # fmt: skip
    prompt = None if one.prompt is None else found[one.prompt, one.special][0]
    if one.ready is None:
        read = [found[text, one.special] for text in one.sides]
        rows = [list(ids) for ids, _ in read]
        spans = one.spans or ()
        marks = [_inside(own[1], told) for own, told in zip(read, spans, strict=bool(spans))]
    else:
        rows = [ids for ids, _ in one.ready]
        marks = [np.array(told, bool) for _, told in one.ready]
    if prompt == []:  # a search starts from the same tokens
        prompt = encode_prompt(tokenizer, "")
        rows = [[*prompt, *row] for row in rows]
        marks = [np.pad(mark, (len(prompt), 0)) for mark in marks]
    border = 0 if prompt is None else min(common_length(prompt, row) for row in rows)
    sides = []
    for index, row in enumerate(rows):
        if one.end is not None and not (len(row) > border and row[-1] == one.end):
            row.append(one.end)
        targets = np.arange(len(row)) >= (1 if loss == "all" else max(border, 1))
        if marks:  # the appended end belongs to the last answer
            more = len(row) - len(marks[index])
            targets &= np.pad(marks[index], (0, more), constant_values=True)
        sides.append(Side(np.asarray(row, np.int32), targets, border))
    merged = prompt is not None and border < len(prompt)
    return Encoded(tuple(sides), merged, one.unwritten)


def _inside(tokens: Sequence[tuple[int, int]], spans: Spans) -> Bool[np.ndarray, " X"]:
    """Which tokens have a character inside the spans."""
    starts, ends = np.asarray(tokens, np.int64).reshape(-1, 2).T
    inside = np.zeros(len(starts), bool)
    for start, end in spans:
        inside |= (starts < end) & (ends > start) & (ends > starts)
    return inside
