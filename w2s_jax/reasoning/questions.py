"""Questions, responses to them, demonstrations, and the published prompt format.

Reads and validates files; every fault is one line with the file and the row. Uses no model, no
tokenizer and no rule for extracting answers.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from w2s_jax.errors import InputError
from w2s_jax.text.rows import Row, read_rows

Id = int | str
Answers = Mapping[Id, Mapping[str, Any]]
"""One row per question, by the question's id."""
Overflow = Literal["error", "drop-first"]

_MARK = re.compile("<<.*?>>")
_ASKED = ("question", "problem", "prompt")
_SOLVED = ("solution", "answer")


@dataclass(frozen=True)
class Demonstration:
    """A solved question that precedes the one to answer."""

    question: str
    answer: str


def prompt_of(question: str, demonstrations: Iterable[Demonstration] = ()) -> str:
    """The published prompt: `Question: {}`, `Answer:`, after demonstrations and blank lines.

    A question that ends in a line `Answer:`, as in OlympicArena, is a prompt already and is kept. A
    demonstration of the same question is left out, so that no prompt contains its own answer.
    """
    solved = (
        f"{_framed(one.question)} {one.answer}\n\n"
        for one in demonstrations
        if one.question.strip() != question.strip()
    )
    return f"{''.join(solved)}{_framed(question)}"


def _framed(question: str) -> str:
    return question if question.endswith("\nAnswer:") else f"Question: {question}\nAnswer:"


def completion_of(response: str) -> str:
    """A response as the text that follows its prompt: a space, then the response, stripped."""
    return f" {response.strip()}"


def solution_text(solution: str, kind: str) -> str:
    """A gold solution as shown to models: without GSM8K's calculator marks (`<<48/2=24>>`).

    The sets published with arXiv 2407.13647 do the same.
    """
    return _MARK.sub("", solution) if kind == "gsm8k" else solution


def solved_row(row: Mapping[str, Any], kind: str) -> Row:
    """A question with its gold solution as an SFT row {"id", "prompt", "completion"}."""
    return {
        "id": row["id"],
        "prompt": prompt_of(row["question"]),
        "completion": completion_of(solution_text(row["answer"], kind)),
    }


def draw_key(seed: int, *parts: Id) -> str:
    """A pseudo-random sort key, SHA-256 of the JSON of the arguments.

    Sorting by it is a random draw that does not depend on the order or number of the items.
    """
    return hashlib.sha256(json.dumps([seed, *parts]).encode()).hexdigest()


def read_questions(
    path: str | Path, *, ids: Literal["own", "index"] = "own", answers_needed: bool = False
) -> list[Row]:
    """The questions of a file as rows {"id", "question", "answer"?, and their other fields}.

    The question is the field "question", "problem" or, rendered by `prompt_of`, "prompt". The
    answer is "answer", a text or number, or "solution"; if both are there, as in MATH, it is the
    solution followed by "The answer is: ANSWER", as published. A null answer counts as missing.

    Args:
        path: The file.
        ids: "own" for a row's field id or, without one, its number in the file from 1; "index" for
            its index from 0, as in the published files.
        answers_needed: Whether every row must have an answer.

    Raises:
        InputError: For a file that cannot be read, a row without question or needed answer, an id
            that is neither integer nor text, and a duplicate id.
    """
    rows, where = read_rows(path)
    found: dict[Id, int] = {}
    result = []
    for number, row in enumerate(rows, start=1):
        place = f"{where} {number}"
        row_id = number - 1 if ids == "index" else _id(row, number, place)
        if row_id in found:
            raise InputError(
                f"{place}: the id {row_id!r} stands on {where} {found[row_id]} already; "
                "ids must differ"
            )
        found[row_id] = number
        kept = {name: row[name] for name in row if name not in ("id", *_ASKED, *_SOLVED)}
        kept |= {"id": row_id, "question": _question(row, place)}
        if any(row.get(name) is not None for name in _SOLVED):
            kept["answer"] = _solution(row, place)
        elif answers_needed:
            raise InputError(
                f'{place}: no "answer"; a question that is trained on or judged needs one'
            )
        result.append(kept)
    return result


def read_responses(
    path: str | Path,
    questions: Sequence[Mapping[str, Any]],
    *,
    needs: Sequence[str] = ("response",),
    complete: bool = True,
) -> dict[Id, Row]:
    """One response per question, by id, in the order of the questions.

    The published field `output` is read as `response`. A row without id answers the question whose
    id is the row's number in the file.

    Args:
        path: The file.
        questions: The questions, as of `read_questions`.
        needs: Fields that each row must have, as text.
        complete: Whether every question must have a row.

    Raises:
        InputError: For an unknown, duplicate or missing id, and for a row whose own `prompt` or
            `content` does not contain the question of its id.
    """
    rows, where = read_rows(path)
    texts = {row["id"]: row["question"] for row in questions}
    found: dict[Id, Row] = {}
    for number, row in enumerate(rows, start=1):
        place = f"{where} {number}"
        row_id = _id(row, number, place)
        if row_id not in texts:
            raise InputError(f"{place}: {_unknown(row_id, texts)}")
        if row_id in found:
            raise InputError(f"{place}: a second row for the id {row_id!r}; one a question")
        if "response" not in row and "output" in row:
            row = row | {"response": row["output"]}
        for name in needs:
            if not isinstance(row.get(name), str):
                raise InputError(f'{place}: no text "{name}" for the id {row_id!r}')
        for name in ("prompt", "content"):
            if texts[row_id].strip() not in str(row.get(name, texts[row_id])):
                raise InputError(
                    f'{place}: its "{name}" does not hold the question of the id {row_id!r}; '
                    "these are responses to other questions, or ids have shifted"
                )
        found[row_id] = row | {"id": row_id}
    missing = [row_id for row_id in texts if row_id not in found]
    if complete and missing:
        raise InputError(
            f"{path}: no row for the id {missing[0]!r}; {len(missing):,} of {len(texts):,} "
            "questions have none, and each needs one"
        )
    return {row_id: found[row_id] for row_id in texts if row_id in found}


def read_demonstrations(path: str | Path) -> tuple[Demonstration, ...]:
    """The demonstrations in a file of {"question", "answer"} rows, in order.

    The fields are those of `read_questions`.

    Raises:
        InputError: For a file that cannot be read, and for a row without one of the two.
    """
    rows, where = read_rows(path)
    return tuple(
        Demonstration(_question(row, f"{where} {number}"), _solution(row, f"{where} {number}"))
        for number, row in enumerate(rows, start=1)
    )


def draw_demonstrations(
    questions: Sequence[Mapping[str, Any]],
    responses: Answers,
    count: int,
    *,
    seed: int,
    source: str = "the weak model's responses",
) -> tuple[Demonstration, ...]:
    """Demonstrations drawn from a model's graded responses, except those known to be wrong.

    A row may be drawn if its `pred` is not empty and its `result`, if it has one, is true. The draw
    depends on the seed and the ids, not on the order of the rows. No question is drawn twice, not
    even under another id.

    Raises:
        InputError: Naming `source`, if too few may be drawn.
    """
    fit = {
        row["question"].strip(): (row, answer)
        for row in sorted(questions, key=lambda row: draw_key(seed, row["id"]))
        if (answer := responses.get(row["id"])) is not None
        and answer.get("result") in (None, True)
        and pred_of(answer, source)
    }
    if len(fit) < count:
        raise InputError(
            f"{source}: {len(fit):,} questions answered well enough to demonstrate, but {count:,} "
            "demonstrations are asked for; ask for fewer or name a file of demonstrations"
        )
    drawn = sorted(fit.values(), key=lambda found: draw_key(seed, found[0]["id"]))[:count]
    return tuple(
        Demonstration(row["question"], answer["response"].strip()) for row, answer in drawn
    )


def fit_prompts(
    questions: Sequence[Mapping[str, Any]],
    demonstrations: Sequence[Demonstration],
    tokens: Callable[[str], int],
    *,
    context: int,
    max_new_tokens: int,
    overflow: Overflow = "error",
    source: str = "questions",
    demonstrations_source: str = "demonstrations",
) -> list[str]:
    """The prompt of every question, short enough to leave room for the response.

    Args:
        questions: The questions.
        demonstrations: Demonstrations before each of them.
        tokens: Number of tokens of a text, special tokens included.
        context: Positions of the model, in tokens.
        max_new_tokens: Tokens reserved for the response.
        overflow: "error", or "drop-first" to drop as many of the first demonstrations as necessary.
        source: The file of the questions, for messages.
        demonstrations_source: The file of the demonstrations, for messages.

    Raises:
        InputError: Naming both files, the question, and the demonstration that exceeds the room.
    """
    room = context - max_new_tokens
    budget = f"of the {context:,} of the context {max_new_tokens:,} are for the response"

    def fit(row: Mapping[str, Any]) -> str:
        for left_out in range(len(demonstrations) + 1 if overflow == "drop-first" else 1):
            prompt = prompt_of(row["question"], demonstrations[left_out:])
            if tokens(prompt) <= room:
                return prompt
        told = f"{source} id {row['id']!r}"
        sizes = (
            tokens(prompt_of(row["question"], demonstrations[:taken]))
            for taken in range(len(demonstrations) + 1)
        )
        full, size = next((taken, size) for taken, size in enumerate(sizes) if size > room)
        if full == 0:
            raise InputError(f"{told}: the question takes {size:,} tokens; {budget}")
        raise InputError(
            f"{demonstrations_source} row {full}: {full} demonstrations and the question of {told} "
            f"take {size:,} tokens; {budget}; give fewer or shorter ones, or let the first be "
            "dropped"
        )

    return [fit(row) for row in questions]


def pred_of(row: Mapping[str, Any], source: str) -> str:
    """The final answer of a graded row; InputError, naming `source` and the id, if it has none."""
    pred = row.get("pred")
    if not isinstance(pred, str):
        raise InputError(
            f'{source}: the row of id {row.get("id")!r} has no text "pred"; grade the responses '
            'first (an empty text means "no final answer")'
        )
    return pred


def _id(row: Row, number: int, place: str) -> Id:
    row_id = row.get("id", number)
    if isinstance(row_id, bool) or not isinstance(row_id, int | str):
        raise InputError(f"{place}: the id {row_id!r} is neither an integer nor a text")
    return row_id


def _text(row: Row, name: str, place: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        fields = ", ".join(f'"{name}"' for name in row) or "no fields"
        raise InputError(f'{place}: no text "{name}"; found {fields}')
    return value


def _question(row: Row, place: str) -> str:
    return _text(row, next((name for name in _ASKED if name in row), _ASKED[0]), place)


def _solution(row: Row, place: str) -> str:
    """The gold solution, at whose end is the final answer."""
    return " The answer is: ".join(
        str(row[name]) if type(row.get(name)) in (int, float) else _text(row, name, place)
        for name in [name for name in _SOLVED if row.get(name) is not None] or _SOLVED[-1:]
    )


def _unknown(row_id: Id, known: Iterable[Id]) -> str:
    known = list(known)
    twin = next((one for one in known if str(one) == str(row_id)), None)
    if twin is not None:
        kinds = ("a text", "a number") if isinstance(row_id, str) else ("a number", "a text")
        return f"the id {row_id!r} is {kinds[0]}; the questions have it as {kinds[1]}"
    ends = f"{known[0]!r} .. {known[-1]!r}"
    return f"no question has the id {row_id!r}; those of the questions run {ends}"
