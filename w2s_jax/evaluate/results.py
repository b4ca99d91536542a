"""Files of responses, as search writes them or AlpacaEval does, and their token ids.

The judging is the `alpaca_eval` package's, which reads them with --model_outputs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from w2s_jax.errors import InputError
from w2s_jax.evaluate.rewards import encode_texts
from w2s_jax.text.chat import Template
from w2s_jax.text.prompts import Conversation, conversation_of, plain
from w2s_jax.text.rows import Row, read_rows, write_whole

DATASET, SPLIT = "alpaca_eval", "eval"
_SHOWN = 60


def alpaca_rows(
    rows: Sequence[Mapping[str, Any]],
    *,
    generator: str,
    reference: Sequence[Mapping[str, Any]] | None = None,
) -> list[dict[str, str]]:
    """The rows that `alpaca_eval --model_outputs` reads, in the order of `rows`.

    dataset and datasplit are the row's own where it has them, "alpaca_eval" and "eval" where not.

    Args:
        rows: Search's output: an "instruction" (kept from the input) and its "response" each.
        generator: Names the system on the leaderboard.
        reference: Rows of instructions, such as AlpacaEval's 805, of which every one must be
            answered exactly once, and no other.

    Raises:
        InputError: Naming the row, for a field that is missing or not text, an instruction that is
            there twice, and one that is missing from or foreign to the reference.
    """
    if not generator:
        raise InputError("the generator has no name; give the one it has on the leaderboard")
    answered = [_answer(row, generator, f"row {number}") for number, row in enumerate(rows, 1)]
    places = _places([row["instruction"] for row in answered], "row")
    if reference is not None:
        wanted = _places(
            [_text(row, "instruction", f"reference row {n}") for n, row in enumerate(reference, 1)],
            "reference row",
        )
        missing = [instruction for instruction in wanted if instruction not in places]
        foreign = [instruction for instruction in places if instruction not in wanted]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(wanted)} instructions have no answer, first reference row "
                f"{wanted[missing[0]]} ({_shown(missing[0])})"
            )
        if foreign:
            raise InputError(
                f"row {places[foreign[0]]}: the reference has no such instruction "
                f"({_shown(foreign[0])}); {len(foreign)} are foreign to it"
            )
    return answered


def check_alpaca(rows: Sequence[Mapping[str, Any]], *, source: str, generator: str) -> None:
    """Raise InputError, before there are responses, for rows that `alpaca_rows` would refuse."""
    try:
        alpaca_rows([{**row, "response": ""} for row in rows], generator=generator)
    except InputError as error:
        raise InputError(f"{source} {error} (--format alpaca_eval)") from None


def write_alpaca(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    generator: str,
    reference: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Write `alpaca_rows` of these arguments as a JSON array; the file appears whole or not at all.

    Raises:
        InputError: As `alpaca_rows` does, and where the file cannot be written.
    """
    answered = alpaca_rows(rows, generator=generator, reference=reference)
    # Escaped beyond ASCII: a response may hold text that has no UTF-8 form.
    write_whole(path, [json.dumps(answered, indent=2).encode(), b"\n"])


def _answer(row: Mapping[str, Any], generator: str, where: str) -> dict[str, str]:
    return {
        "instruction": _text(row, "instruction", where),
        "output": _text(row, "response", where),
        "generator": generator,
        "dataset": _text(row, "dataset", where, DATASET),
        "datasplit": _text(row, "datasplit", where, SPLIT),
    }


def _text(row: Mapping[str, Any], field: str, where: str, default: str | None = None) -> str:
    value = row.get(field)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        fault = f'no "{field}"' if value is None else f'"{field}" is {type(value).__name__}'
        raise InputError(f"{where}: {fault}; AlpacaEval needs text there")
    return value


def _places(instructions: Sequence[str], kind: str) -> dict[str, int]:
    """The number, from 1, of each instruction's row; InputError where one is there twice."""
    places: dict[str, int] = {}
    for number, instruction in enumerate(instructions, 1):
        if instruction in places:
            raise InputError(
                f"{kind} {number}: the instruction of {kind} {places[instruction]} again "
                f"({_shown(instruction)}); each may be there once"
            )
        places[instruction] = number
    return places


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…")


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

    A row holds a prompt (see text/prompts.py) and a "response", or an "output" as in
    AlpacaEval's files.

    Raises:
        InputError: Naming the line, for one that does not.
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

    Args:
        results: The rows.
        template: How the reward model reads a prompt.
        limit: The most tokens of a row.
        end: Whether the template's end token is put behind the response.
        cut: Which side of more than `limit` tokens is dropped.

    Raises:
        InputError: Naming the line, where the template fails and for too many tokens if nothing may
            be cut.
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

    Raises:
        InputError: Naming the line, for a text without tokens.
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
