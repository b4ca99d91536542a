"""Prompts into token ids, response tokens back into text, behind any transformers tokenizer."""

import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

from w2s_jax.errors import InputError, check_kind

INCOMPLETE = "\ufffd"
"""How tokenizers write the bytes of a character that is not complete yet."""

CONTEXT = 64
"""Text is decoded behind at most this many of the tokens before it.

The same number wherever a response is read, so that its text is the same in scores, traces and
outputs.
"""

_logger = logging.getLogger(__name__)
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
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt is not text: {error.reason}") from None
    bos = tokenizer.bos_token
    special = not (bos and prompt.startswith(bos))
    (tokens,) = encode_texts(tokenizer, [prompt], special=special)
    if tokens:
        return tokens
    for start in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if start is not None:
            return [start]
    raise InputError("the prompt is empty and the tokenizer has neither a BOS nor an EOS token")


def encode_texts(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """Token ids of texts that may go on: with special tokens in front or none, and none behind."""
    if not texts:
        return []
    rows = tokenizer(
        list(texts),
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    ).input_ids
    behind = tokens_behind(tokenizer) if special else 0
    return [list(row[: len(row) - behind]) for row in rows]


def tokens_behind(tokenizer: Any) -> int:
    """How many special tokens the tokenizer puts behind a text: 1 for an EOS, say."""
    whole, text = _probed(tokenizer)
    for start in range(len(whole) if text else 0):
        if whole[start : start + len(text)] == text:
            return len(whole) - start - len(text)
    return 0


def tell_left_out(tokenizer: Any, where: str) -> None:
    """Log a warning that names the special tokens which prompts go without; `where` begins it."""
    behind = tokens_behind(tokenizer)
    if behind:
        whole, _ = _probed(tokenizer)
        names = " ".join(map(str, tokenizer.convert_ids_to_tokens(whole[-behind:])))
        _logger.warning(
            "%s: the tokenizer puts %s behind every text; prompts are read without", where, names
        )


def _probed(tokenizer: Any) -> tuple[list[int], list[int]]:
    """A text's token ids with the tokenizer's special tokens, and without them.

    The text is a letter or, as none is in every vocabulary, that of the first token to come back as
    tokens other than those. Both are empty where no special tokens are put around a text.
    """
    (around,) = tokenizer([""], add_special_tokens=True).input_ids
    added = set(around)
    if not added:
        return [], []
    own = (decode_tokens(tokenizer, [token]) for token in range(len(tokenizer)))
    for text in chain("a", own):
        try:
            ids = list(tokenizer(text, add_special_tokens=False).input_ids)
        except Exception:  # what tokenizers raise for what they cannot write
            continue
        if ids and not added.intersection(ids):
            return list(tokenizer(text, add_special_tokens=True).input_ids), ids
    return [], []


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
