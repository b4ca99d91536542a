"""Chat templates: how each model wants to read a conversation, as text and as token ids.

The published ways are jinja texts of their own here. Templates that checkpoints bring along run
under a limit on their time.
"""

import difflib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import signature
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, no_type_check

from w2s_jax.errors import InputError, check_fetched, check_kind
from w2s_jax.text.prompts import (
    THOUGHTS,
    Conversation,
    Message,
    check_encodable,
    encode_prompt,
    encode_texts,
    function_of,
)


@dataclass(frozen=True)
class Published:
    """One model's template; `end` is the token that ends its turns, None if the tokenizer's EOS."""

    jinja: str
    end: str | None = None


BOS_TEXTS = ("<s>", "<|begin_of_text|>")
"""How the published templates write BOS."""

# The published scripts pass an empty system message to the models that were trained with one.
_EMPTY_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{% set messages = [{'role': 'system', 'content': ''}] + messages %}"
    "{% endif %}"
)
_LLAMA_2_CHAT = (
    _EMPTY_SYSTEM + "{% for message in messages[1:] %}"
    "{% if message['role'] != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('after a system message, user and assistant must take turns') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}<s>[INST] "
    "{% if loop.first %}{{ '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ message['content'] + ' [/INST] ' }}"
    "{% else %}{{ message['content'] + ' </s>' }}{% endif %}"
    "{% endfor %}"
)
_LLAMA_3_INSTRUCT = (
    _EMPTY_SYSTEM + "<|begin_of_text|>"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>"
    "{{ '\n\n' + message['content'] }}<|eot_id|>"
    "{% endfor %}"
    "<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}"
)
_ZEPHYR = (
    _EMPTY_SYSTEM + "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '</s>\n' }}"
    "{% endfor %}"
    "{{ '<|assistant|>\n' }}"
)
_STARLING = (
    "<s>"
    "{% for message in messages %}"
    "GPT4 Correct {{ message['role'].title() + ': ' + message['content'] }}<|end_of_turn|>"
    "{% endfor %}"
    "{{ 'GPT4 Correct Assistant: ' }}"
)
_TULU = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{{ '</s>\n' if message['role'] == 'assistant' else '\n' }}"
    "{% endfor %}"
    "{{ '<|assistant|>\n' }}"
)
_IMDB = (
    "{% if messages | length > 1 %}"
    "{{ raise_exception('it takes one text to continue, not several messages') }}"
    "{% endif %}"
    "Here is a movie review from imdb: {{ messages[0]['content'] }}"
)
_ULTRARM = (
    "{% for message in messages %}"
    "{{ {'user': 'Human: ', 'assistant': 'Assistant: '}.get(message['role'], '') }}"
    "{{ message['content'] + '\n' }}"
    "{% endfor %}"
    "{{ 'Assistant: ' }}"
)
_STARLING_RM = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<s>[INST] ' + message['content'] + ' </s> [/INST] ' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '</s>' }}"
    "{% else %}{{ raise_exception('it takes no system message') }}{% endif %}"
    "{% endfor %}"
)
_PLAIN = (
    "{% if messages | length == 1 %}{{ messages[0]['content'] }}{% else %}"
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{{ 'assistant: ' }}{% endif %}"
)

PUBLISHED = {
    "llama-2-chat": Published(_LLAMA_2_CHAT, "</s>"),
    "llama-3-instruct": Published(_LLAMA_3_INSTRUCT, "<|eot_id|>"),
    "zephyr": Published(_ZEPHYR, "</s>"),
    "starling": Published(_STARLING, "<|end_of_turn|>"),
    "tulu": Published(_TULU, "</s>"),
    "imdb": Published(_IMDB),
    "plain": Published(_PLAIN),
    "ultrarm": Published(_ULTRARM, "</s>"),
    "starling-rm": Published(_STARLING_RM, "</s>"),
}


TEMPLATE_SECONDS = 5.0
"""What a chat template may take; those of models take milliseconds."""


class TimeUp(Exception):
    """The time is up."""


def apply_template(tokenizer: Any, turns: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """The tokenizer's apply_chat_template within TEMPLATE_SECONDS.

    Raises:
        TimeUp: where it takes longer.
        Exception: whatever the template raises, which is a program.
    """
    with within(TEMPLATE_SECONDS):
        return tokenizer.apply_chat_template(list(turns), **options)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeUp in what this thread runs inside once it took so many seconds of a processor.

    Calls are watched, and of code without a file, as jinja makes of templates, each line; a single
    long operation in C is seen when it ends. Works in every thread, and other threads' load, or the
    machine's, does not count.
    """
    start = time.thread_time()

    @no_type_check  # it is called for every line
    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        # Callbacks of the garbage collector and of weak references lose what is raised in them, and
        # the watch ends with it: elsewhere than in templates and jinja it is raised later.
        limit = seconds if not file.endswith(".py") or "jinja2" in file else 2 * seconds
        if time.thread_time() - start > limit:
            raise TimeUp(f"it takes longer than {seconds:g} seconds")
        return None if file.endswith(".py") else watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


TEMPLATES = tuple(PUBLISHED)
TEXT_TEMPLATES = ("imdb", "plain")
"""Published templates that write no special tokens, so that the tokenizer's own go in front."""
_NAMES = ("auto", "none", "chat", *TEMPLATES)


def read_template_args(text: str, where: str) -> dict[str, Any]:
    """Values for chat templates from a JSON object.

    Raises:
        InputError: beginning with `where`, for anything else.
    """
    try:
        args = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: {text!r} is not JSON ({error})") from None
    if not isinstance(args, dict):
        example = '{"enable_thinking": false}'
        raise InputError(f"{where}: {text!r} is no JSON object such as {example}")
    return args


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

    What renders or encodes raises InputError for messages where the template takes none, and for a
    template that fails.

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
        """The text that the response follows."""
        check_kind("a template", conversation, Conversation, "a Conversation")
        if self.as_it_stands(conversation):
            assert conversation.text is not None
            return conversation.text
        turns = conversation.turns("user")
        return self._apply(turns, conversation.tools, conversation.template_args)

    def render_whole(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
        """The text of a finished conversation, without the opening of another answer.

        For chat templates and files only: published templates always open an answer.
        """
        if self.name in PUBLISHED:
            raise ValueError(f"the template {self.name} writes no finished conversations")
        return self._apply(messages, tools, opened=False)

    def reads(self, name: str) -> bool:
        """Whether the template names a value so, wherever it takes it from."""
        return any(token[1:] == ("name", name) for token in _lexed(self.jinja or ""))

    def unwritten(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> frozenset[str]:
        """Names of THOUGHTS that `render_whole` leaves out of a message that has them.

        Some templates know none of these fields, or only another of them, or drop the thoughts of
        earlier answers. Told by what is written of a mark in the place of each.
        """
        marks: dict[str, str] = {}
        marked = []
        for index, message in enumerate(messages):
            own = {name: f"thought-{index}-in-{name}" for name in THOUGHTS}
            more = tuple((name, own.get(name, value)) for name, value in message.more)
            marks |= {own[name]: name for name, _ in more if name in own}
            marked.append(replace(message, more=more))
        text = self.render_whole(marked, tools) if marks else ""
        return frozenset(name for mark, name in marks.items() if mark not in text)

    def render_begun(self, messages: Sequence[Message]) -> str:
        """The text of a conversation whose last message goes on."""
        return self._apply(messages, opened=False, continued=True)

    def encode(self, conversation: Conversation) -> list[int]:
        """Token ids of the rendered prompt; never empty."""
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
        it.
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
        messages: Sequence[Message],
        tools: Sequence[Any] = (),
        args: Mapping[str, Any] | None = None,
        *,
        opened: bool = True,
        continued: bool = False,
    ) -> str:
        """What the template writes.

        opened: with the opening of another answer. continued: as if the last message goes on.
        """
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
        args = {**self.args, **(args or {})}
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
                chat_template=self.jinja,
                tokenize=False,
                add_generation_prompt=opened,
                continue_final_message=continued,
                **args,
            )
        except Exception as error:  # a template is a program, and may raise anything
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise InputError(f"{self.where}: the chat template fails: {reason}") from error
        calls = [call for one in messages for call in dict(one.more).get("tool_calls", ())]
        for name in (function_of(tool)["name"] for tool in (*tools, *calls)):
            if name not in text:
                raise InputError(
                    f"{self.where}: the chat template does not write the tool {name!r}; take one "
                    "that writes tools and their calls"
                )
        return text

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        check_encodable("the prompt or a response is not text", *texts)
        return encode_texts(self.tokenizer, texts, special=special)


def load_template(
    tokenizer: Any, name: str = "auto", *, where: str, args: Mapping[str, Any] | None = None
) -> Template:
    """The template of this name behind a tokenizer.

    auto takes a text as it stands and writes messages by the tokenizer's chat template; none takes
    texts only; chat makes a text one user message of the tokenizer's chat template; a name of
    TEMPLATES or a path that ends in .jinja does the same with another template. args: values that
    the template may read.

    Raises:
        InputError: beginning with `where` (a flag, say), for an unknown name, a file that
            cannot be read, a template that is not jinja, and for chat where the tokenizer has
            no template.
    """
    from jinja2 import TemplateSyntaxError

    if name in PUBLISHED:
        return Template(tokenizer, name, PUBLISHED[name].jinja, where, args or {})
    if Path(name).suffix == ".jinja":
        jinja: str | None = _read(name, where)
    elif name in _NAMES:
        jinja = _chat_template(tokenizer, name, where)
    else:
        near = difflib.get_close_matches(name, _NAMES, n=1)
        hint = f", perhaps {near[0]}" if near else ""
        raise InputError(
            f"{where}: no template {name!r}{hint}; it takes a .jinja file or one of "
            f"{', '.join(_NAMES)}"
        )
    template = Template(tokenizer, name, jinja, where, args or {})
    _check_powers(jinja or "", where)
    if name != "auto":  # whose rows may never need the tokenizer's template
        try:
            template.render(Conversation(messages=(Message("user", "text"),)))
        except InputError as error:
            # What it refuses beyond that may be this message's fault, not its own.
            if isinstance(error.__cause__, TemplateSyntaxError):
                raise
    return template


def renderer(
    name: str, *, where: str, args: Mapping[str, Any] | None = None
) -> Callable[[Conversation], str]:
    """How conversations are written for a model whose tokenizer is not here, behind an API.

    auto and none take texts as they stand; the other names are those of `load_template`, without
    chat. BOS is left out at the start: servers put it there.

    Raises:
        InputError: as `load_template` does, and so does what is returned, as `Template.render`.
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


def _read(path: str, where: str) -> str:
    check_fetched(Path(path).expanduser())
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


def _lexed(jinja: str) -> list[tuple[int, str, str]]:
    """A template's tokens as line, kind and text, without spaces; none of what is not jinja."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        return [one for one in Environment().lex(jinja) if one[1] != "whitespace"]
    except TemplateSyntaxError:  # told where it is rendered
        return []


def _check_powers(jinja: str, where: str) -> None:
    """Raise InputError for a template with a power: one of large numbers cannot be broken off."""
    for (_, kind, text), (line, _, operator) in pairwise(_lexed(jinja)):
        # Behind a bracket or a comma it hands arguments on.
        if operator == "**" and (kind != "operator" or text in (")", "]", "}")):
            raise InputError(
                f"{where}: the chat template takes a power (**) in line {line}, which may not end"
            )
