"""Prompts into token ids, response tokens back into text, behind any transformers tokenizer."""

from collections.abc import Sequence
from typing import Any

from w2s_jax.errors import InputError


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt with the special tokens the tokenizer puts in front; never empty.

    A prompt without tokens becomes the BOS token, or EOS where there is no BOS. Raises InputError
    where there is neither.
    """
    tokens = list(tokenizer(prompt, verbose=False).input_ids)
    if tokens:
        return tokens
    for start in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if start is not None:
            return [start]
    raise InputError("the prompt is empty and the tokenizer has neither a BOS nor an EOS token")


def decode_tokens(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of token ids, special tokens left out, spaces as they are."""
    return tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def decode_response(
    tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], stop: Sequence[str] = ()
) -> str:
    """The text that response tokens add to their prompt, up to the first stop string.

    Read behind the prompt, because some tokenizers drop a leading space from text of its own.
    """
    before = decode_tokens(tokenizer, prompt)
    whole = decode_tokens(tokenizer, [*prompt, *tokens])
    added = whole.removeprefix(before) if whole.startswith(before) else None
    text = decode_tokens(tokenizer, tokens) if added is None else added
    ends = [end for end in map(text.find, stop) if end >= 0]
    return text[: min(ends)] if ends else text
