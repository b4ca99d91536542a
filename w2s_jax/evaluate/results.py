"""Files of responses, as search writes them or AlpacaEval does, and their token ids.

Reads no checkpoint: tokenizers and templates come from the caller.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from w2s_jax.errors import InputError
from w2s_jax.evaluate.rewards import encode_texts
from w2s_jax.text.chat import Template
from w2s_jax.text.conversations import Conversation, conversation_of, plain
from w2s_jax.text.rows import Row, read_rows

Cut = Literal["never", "start", "end"]
_FIELDS = ("response", "output")


@dataclass(frozen=True)
class Results:
    """A file's rows with their conversations and responses; a row stands on "`unit` NUMBER"."""

    path: str
    unit: str
    rows: list[Row]
    conversations: tuple[Conversation, ...]
    responses: tuple[str, ...]

    def where(self, index: int) -> str:
        """How errors name a row: "out.jsonl line 3"."""
        return f"{self.unit} {index + 1}"


def read_results(path: str | Path) -> Results:
    """Read JSON lines (plain, .gz or .xz) or a JSON array of rows.

    A row holds a prompt (see text/conversations.py) and a "response", or an "output" as in
    AlpacaEval's files. Raises InputError, naming the line, for one that does not.
    """
    rows, unit = read_rows(path)
    conversations, responses = [], []
    for number, row in enumerate(rows, start=1):
        where = f"{unit} {number}"
        conversations.append(conversation_of(row, where))
        responses.append(_response(row, where))
        try:
            (plain(conversations[-1]) + responses[-1]).encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where}: the prompt or the response is not text: {error.reason}"
            ) from None
    return Results(str(path), unit, rows, tuple(conversations), tuple(responses))


def encode_behind(
    results: Results, template: Template, limit: int, *, end: bool = False, cut: Cut = "never"
) -> list[list[int]]:
    """Token ids of every prompt, written by the template, with its response behind it.

    end: put the template's end token behind the response. cut: which side of more than `limit`
    tokens is dropped.

    Raises InputError, naming the line, where the template fails and for too many tokens if nothing
    may be cut.
    """
    eos = [template.eos_id] if end and template.eos_id is not None else []
    if end and not eos:
        raise InputError(f"{template.where}: the tokenizer has no end token to put behind")
    encoded = []
    for index, conversation in enumerate(results.conversations):
        try:
            (ids,) = template.encode_responses(conversation, [results.responses[index]])
        except InputError as error:
            raise InputError(f"{results.where(index)}: {error}") from None
        ids = [*ids, *eos]
        if len(ids) > limit and cut == "never":
            raise InputError(
                f"{results.where(index)}: prompt and response are {len(ids)} tokens, more than the "
                f"reward model's {limit} positions"
            )
        encoded.append(ids[-limit:] if cut == "start" else ids[:limit])
    return encoded


def encode_plain(results: Results, tokenizer: Any, limit: int) -> list[list[int]]:
    """Token ids of every prompt and response as one plain text, the end cut off at `limit`.

    Raises InputError, naming the line, for a text without tokens.
    """
    pairs = zip(results.conversations, results.responses, strict=True)
    encoded = encode_texts(tokenizer, [plain(asked) + said for asked, said in pairs], limit)
    for index, ids in enumerate(encoded):
        if not ids:
            raise InputError(f"{results.where(index)}: prompt and response are empty")
    return encoded


def count_tokens(tokenizer: Any, responses: Sequence[str]) -> Int[np.ndarray, " n"]:
    """Tokens of each response alone, without special ones."""
    found = tokenizer(list(responses), add_special_tokens=False, verbose=False)["input_ids"]
    return np.array([len(ids) for ids in found], np.int64)


def _response(row: Row, where: str) -> str:
    for field in _FIELDS:
        value = row.get(field)
        if isinstance(value, str):
            return value
        if value is not None:
            raise InputError(f'{where}: "{field}" is {type(value).__name__}; it takes text')
    raise InputError(f'{where}: no "response"; a row needs one beside its prompt (or an "output")')
