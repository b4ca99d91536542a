"""Chat templates: how each model reads a conversation, as text and as token ids.

The published formats are jinja templates here. Templates that come with checkpoints run under a
time limit.
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
    """One model's template; `end` is the token that ends a turn, None for the tokenizer's EOS."""

    jinja: str
    end: str | None = None


BOS_TEXTS = ("<s>", "<|begin_of_text|>")
"""How the published templates write BOS."""

# The published scripts pass an empty system message to models that were trained with one.
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
"""Time limit of a chat template; those of models take milliseconds."""


class TimeUp(Exception):
    """The time limit is exceeded."""


def apply_template(tokenizer: Any, turns: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """The tokenizer's apply_chat_template, with a limit of TEMPLATE_SECONDS.

    Raises:
        TimeUp: If it takes longer.
        Exception: Whatever the template raises; it is a program.
    """
    with within(TEMPLATE_SECONDS):
        return tokenizer.apply_chat_template(list(turns), **options)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeUp in the block once this thread has spent `seconds` of processor time in it.

    Works in every thread; the load of other threads or of the machine does not count. The time is
    checked at calls and, in code without a file such as jinja's compiled templates, at each line. A
    single long operation in C is noticed when it ends.
    """
    start = time.thread_time()

    @no_type_check  # called for every line, so that run-time checks of types would take long
    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        # An exception in a callback of the garbage collector or a weak reference is lost, and the
        # trace function with it: outside templates and jinja the limit is therefore doubled.
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
"""Published templates without special tokens, so that the tokenizer adds its own in front."""
_NAMES = ("auto", "none", "chat", *TEMPLATES)


def read_template_args(text: str, where: str) -> dict[str, Any]:
    """Values for chat templates from a JSON object.

    Raises:
        InputError: For anything else; the message begins with `where`.
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

    With `auto` and `none` a text is encoded as it is, with the special tokens that the tokenizer
    adds in front, unless it begins with BOS already: BOS is never doubled. The output of a template
    is encoded without additions, since it contains its special tokens; only that of TEXT_TEMPLATES
    is encoded as a text is.

    Special tokens spelled out in a content (`</s>`, `<|eot_id|>`) become those tokens, as in
    transformers by default and in the published code. Contents from untrusted users can therefore
    close a turn and open another one; filter them before.

    Rendering and encoding raise InputError for messages that the template does not take, and for a
    template that fails.

    Attributes:
        tokenizer: Any transformers tokenizer.
        name: auto, none, chat, a published name, or the path of a .jinja file.
        jinja: The chat template; None if there is none.
        where: Name of this template in error messages, such as the flag it came from.
        args: Further values that the template may read, such as enable_thinking.
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
        """The text of a finished conversation, without the opening of a further answer.

        Only for chat templates and files: published templates always open an answer.
        """
        if self.name in PUBLISHED:
            raise ValueError(f"the template {self.name} writes no finished conversations")
        return self._apply(messages, tools, opened=False)

    def reads(self, name: str) -> bool:
        """Whether the template contains a variable of this name."""
        return any(token[1:] == ("name", name) for token in _lexed(self.jinja or ""))

    def unwritten(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> frozenset[str]:
        """Names of THOUGHTS that `render_whole` omits from a message that has them.

        Some templates know none of these fields, or only another one of them, or drop the thoughts
        of earlier answers. Each field is replaced by a mark, which is then looked for in the
        output.
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
        """The text of a conversation whose last message is still being written."""
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
        """Token ids of the rendered prompt with each response, encoded together.

        Its longest common prefix with `encode(conversation)` is the prompt, the rest is the
        response: a token that spans the border belongs to the response, as in the published code.
        No EOS is added.
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
        """Id of the token that ends a turn: the published template's, or the tokenizer's EOS."""
        end = PUBLISHED[self.name].end if self.name in PUBLISHED else None
        if end is not None:
            found = self.tokenizer.convert_tokens_to_ids(end)
            # A missing token gets the id of the unknown token, or None.
            if found not in (None, self.tokenizer.unk_token_id):
                return found
        return self.tokenizer.eos_token_id

    def describe(self) -> str:
        """The template in a word for fingerprints; equal for templates that render equally."""
        kind = self.name if self.name in _NAMES else "jinja"
        if self.jinja is None:
            return kind
        told = self.jinja + (json.dumps(dict(self.args), sort_keys=True) if self.args else "")
        return f"{kind}:{hashlib.sha256(told.encode()).hexdigest()[:16]}"

    def adds_special_tokens(self, conversation: Conversation, prompt: str) -> bool:
        """Whether the tokenizer's special tokens are added in front of this rendered prompt."""
        bos = self.tokenizer.bos_token
        is_text = self.as_it_stands(conversation) or self.name in TEXT_TEMPLATES
        return is_text and not (bos and prompt.startswith(bos))

    def as_it_stands(self, conversation: Conversation) -> bool:
        """Whether the conversation is a text that no template changes."""
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
        """The template's output.

        With `opened` it opens a further answer; with `continued` the last message stays open.
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
    """The template of this name for a tokenizer.

    Args:
        tokenizer: The tokenizer.
        name: auto keeps texts as they are, and renders messages with the tokenizer's chat template.
            none takes texts only. chat treats a text as one user message of the tokenizer's chat
            template. A name of TEMPLATES, or a path that ends in .jinja, does the same with that
            template.
        where: Beginning of error messages, such as a flag.
        args: Values that the template may read.

    Raises:
        InputError: For an unknown name, a file that cannot be read, a template that is not jinja,
            and for chat if the tokenizer has no template.
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
    if name != "auto":  # with auto, rows may never need the tokenizer's template
        try:
            template.render(Conversation(messages=(Message("user", "text"),)))
        except InputError as error:
            # Other errors may be due to this message, not to the template.
            if isinstance(error.__cause__, TemplateSyntaxError):
                raise
    return template


def renderer(
    name: str, *, where: str, args: Mapping[str, Any] | None = None
) -> Callable[[Conversation], str]:
    """How conversations are rendered for a model behind an API, whose tokenizer is not here.

    auto and none keep texts as they are; the other names are those of `load_template`, except chat.
    BOS is removed at the start, where servers add it.

    Raises:
        InputError: As `load_template`; the returned function raises it as `Template.render` does.
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
    """The tokenizer's chat template for this name; None if it is not needed or missing."""
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
    """A template's tokens as (line, kind, text), without spaces; none for invalid jinja."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        return [one for one in Environment().lex(jinja) if one[1] != "whitespace"]
    except TemplateSyntaxError:  # reported when it is rendered
        return []


def _check_powers(jinja: str, where: str) -> None:
    """Raise InputError for a template with `**`: a power of large numbers cannot be interrupted."""
    for (_, kind, text), (line, _, operator) in pairwise(_lexed(jinja)):
        # After an opening bracket or a comma it unpacks arguments.
        if operator == "**" and (kind != "operator" or text in (")", "]", "}")):
            raise InputError(
                f"{where}: the chat template takes a power (**) in line {line}, which may not end"
            )
