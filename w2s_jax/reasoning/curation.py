"""Stage I: the questions on which two models' final answers agree, and the sets to fine-tune on.

Weak-to-strong reasoning (arXiv 2407.13647), stage I. Pure functions of graded rows; generates,
grades and trains nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from w2s_jax.errors import InputError
from w2s_jax.reasoning.measures import Proportion, accuracy
from w2s_jax.reasoning.questions import Answers, Id, completion_of, pred_of, prompt_of
from w2s_jax.text.rows import Row

Canonical = Callable[[str], str]
Questions = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Quality:
    """How good a set of responses is: its rows, and the accuracy of those that were judged."""

    name: str
    size: int
    accuracy: Proportion | None

    def as_row(self) -> Row:
        """For JSON: {"name", "size", "accuracy": {..} or null}."""
        found = None if self.accuracy is None else self.accuracy.as_row()
        return {"name": self.name, "size": self.size, "accuracy": found}


@dataclass(frozen=True)
class Curated:
    """What one iteration of stage I keeps.

    Attributes:
        kept: ids of the kept questions, in the order of the questions.
        weak, icl: SFT rows {"id", "prompt", "completion"} of either model's responses.
        hybrid: both, the weak one first, question by question.
        questions: how many there were.
        empty: how many of them both models left without a final answer.
        qualities: of all responses ("all weak", "all icl") and of the three sets.
    """

    kept: tuple[Id, ...]
    weak: list[Row]
    icl: list[Row]
    hybrid: list[Row]
    questions: int
    empty: int
    qualities: tuple[Quality, ...]

    @property
    def agreement(self) -> float:
        """The share of questions that are kept."""
        return len(self.kept) / self.questions

    def as_row(self) -> Row:
        """The figures, for JSON."""
        return {
            "questions": self.questions,
            "kept": len(self.kept),
            "agreement": self.agreement,
            "agree_on_no_answer": self.empty,
            "sets": [quality.as_row() for quality in self.qualities],
        }


def curate(
    questions: Questions,
    weak: Answers,
    icl: Answers,
    *,
    iteration: int = 1,
    published: bool = False,
    canonical: Canonical = str,
    sources: tuple[str, str] = ("the weak responses", "the in-context responses"),
) -> Curated:
    """One iteration of stage I: the sets of the questions on which both graded responses agree.

    In iteration 1 the responses are the weak model's and the strong model's in context; from
    iteration 2 on those of the model tuned on the `weak` set and of the one tuned on `icl`.
    published: whether agreement on no final answer counts, as it does in the published sets (8 of
    the 2,683 questions of iteration 1 and 11 of the 4,022 of iteration 2; the published code
    itself leaves such questions out). canonical: an answer's one form per value (`agreeing`).

    Raises InputError for a question without a response or grade, and where nothing is kept.
    """
    kept = agreeing(questions, weak, icl, canonical, empty=published, sources=sources)
    if not kept:
        raise InputError(
            f"stage I, iteration {iteration}, keeps none of {len(questions):,} questions: no final "
            f"answer in {sources[0]} equals that in {sources[1]}; look at their preds"
        )
    ids = [row["id"] for row in questions]
    qualities = [
        quality(name, [side[row_id] for row_id in chosen])
        for name, side, chosen in (
            ("all weak", weak, ids),
            ("all icl", icl, ids),
            ("weak", weak, kept),
            ("icl", icl, kept),
        )
    ]
    pooled = [side[row_id] for side in (weak, icl) for row_id in kept]
    unanswered = sum(not weak[row_id]["pred"] and not icl[row_id]["pred"] for row_id in ids)
    return Curated(
        kept,
        sft_set(questions, weak, kept),
        sft_set(questions, icl, kept),
        hybrid_set(questions, weak, icl, kept),
        len(questions),
        unanswered,
        (*qualities, quality("hybrid", pooled)),
    )


def agreeing(
    questions: Questions,
    weak: Answers,
    icl: Answers,
    canonical: Canonical = str,
    *,
    empty: bool = False,
    sources: tuple[str, str] = ("the weak responses", "the in-context responses"),
) -> tuple[Id, ...]:
    """Ids of the questions on which both `pred` are equal in canonical form, in order.

    canonical maps a non-empty `pred` to the one form of its value; `str`, the default, compares
    texts as published. empty: whether two empty preds agree. Raises InputError, naming the source
    and the id, for a question without a response or without a pred.
    """

    def form(answers: Answers, row_id: Id, source: str) -> str:
        if row_id not in answers:
            raise InputError(f"{source}: no row for the question of id {row_id!r}")
        pred = pred_of(answers[row_id], source)
        return canonical(pred) if pred else ""

    kept = []
    for row in questions:
        first, second = (
            form(answers, row["id"], source)
            for answers, source in zip((weak, icl), sources, strict=True)
        )
        if first == second and (first or empty):
            kept.append(row["id"])
    return tuple(kept)


def sft_set(questions: Questions, answers: Answers, kept: Sequence[Id]) -> list[Row]:
    """SFT rows {"id", "prompt", "completion"} of the kept questions, in the order of `kept`.

    With every id kept this is naive fine-tuning on all weak responses, the paper's "full weak".
    """
    texts = {row["id"]: row["question"] for row in questions}
    return [
        {
            "id": row_id,
            "prompt": prompt_of(texts[row_id]),
            "completion": completion_of(answers[row_id]["response"]),
        }
        for row_id in kept
    ]


def hybrid_set(questions: Questions, weak: Answers, icl: Answers, kept: Sequence[Id]) -> list[Row]:
    """SFT rows of both models, the weak one's first, question by question; each id stands twice."""
    pairs = zip(sft_set(questions, weak, kept), sft_set(questions, icl, kept), strict=True)
    return [row for pair in pairs for row in pair]


def quality(name: str, rows: Sequence[Mapping[str, Any]]) -> Quality:
    """The quality of a set of graded rows, by their field `result` where they have one."""
    verdicts = [row["result"] for row in rows if isinstance(row.get("result"), bool)]
    return Quality(name, len(rows), accuracy(verdicts))
