"""Text of responses that still grow, and text of single tokens."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

from w2s_jax.text.prompts import INCOMPLETE, decode_tokens

_WINDOW = 8


def settled(text: str, stop: Sequence[str]) -> str:
    """The head of a growing text that further tokens cannot change.

    Left out are a character whose bytes are not all there, which decodes to U+FFFD until they are,
    and an end that may be the beginning of a stop string.
    """
    text = text.rstrip(INCOMPLETE)
    longest = max(map(len, stop), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(one.startswith(text[start:]) for one in stop):
            return text[:start]
    return text


def shared(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    shortest, longest = min(texts), max(texts)
    for index, character in enumerate(shortest):
        if longest[index] != character:
            return shortest[:index]
    return shortest


class TokenTexts:
    """Token ids one by one as text: their strings, and where each begins in the whole."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.of = lru_cache(maxsize=1 << 16)(self._of)
        self._alone: Callable[[Sequence[int]], str] = partial(
            tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        encoded = tokenizer("a", add_special_tokens=False).input_ids
        self._anchor = list(encoded[-1:])

    def _of(self, token: int) -> str:
        r"""A token's own text, its leading space included; "bytes:\xe2" for half a character."""
        before, whole = self._alone(self._anchor), self._alone([*self._anchor, token])
        text = whole.removeprefix(before) if whole.startswith(before) else self._alone([token])
        if INCOMPLETE not in text:
            return text
        name = str(self.tokenizer.convert_ids_to_tokens(token))
        if name.startswith("<0x"):
            return f"bytes:\\x{name[3:5].lower()}"
        known = _byte_values()
        if all(character in known for character in name):
            return "bytes:" + "".join(f"\\x{known[character]:02x}" for character in name)
        return text

    def offsets(self, tokens: Sequence[int]) -> list[int]:
        """Where each token's text begins in the text of all, in characters."""
        decode = partial(decode_tokens, self.tokenizer)
        offsets, length, start = [], 0, 0
        for index in range(len(tokens)):
            offsets.append(length)
            before, now = decode(tokens[start:index]), decode(tokens[start : index + 1])
            if now.endswith(INCOMPLETE):
                continue
            length += max(0, len(now) - len(before.rstrip(INCOMPLETE)))
            start = max(start, index + 1 - _WINDOW)
        return offsets


@lru_cache(maxsize=1)
def _byte_values() -> dict[str, int]:
    """The bytes that the characters of byte-level BPE stand for; arXiv 1909 (GPT-2)'s alphabet."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


def token_bytes(text: str) -> list[int]:
    """The bytes of a token's text as `TokenTexts.of` writes it."""
    if text.startswith("bytes:\\x"):
        return [int(byte, 16) for byte in text.removeprefix("bytes:").split("\\x")[1:]]
    return list(text.encode())
