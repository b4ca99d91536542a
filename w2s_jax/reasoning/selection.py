"""Selects the rows that the strong model learns from: in stage I by agreement, in II by confidence.

Weak-to-strong reasoning (arXiv 2407.13647). Pure functions of graded rows, whose `pred` is in
canonical form (`answers.votes`).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from w2s_jax.errors import InputError
from w2s_jax.reasoning.config import ContrastConfig
from w2s_jax.reasoning.measures import Proportion, accuracy
from w2s_jax.reasoning.questions import Answers, Id, completion_of, draw_key, pred_of, prompt_of
from w2s_jax.text.rows import Row

WEIGHT = "weight"
"""Column of pairs with their weight in the loss."""

Questions = Sequence[Mapping[str, Any]]
Sample = Mapping[str, Any]
Verdict = Literal[
    "weak chosen", "weak rejected", "uncertain", "no answer", "unanimous", "not overruled"
]


@dataclass(frozen=True)
class Quality:
    """The size of a set of responses, and the accuracy of those that were judged."""

    name: str
    size: int
    accuracy: Proportion | None


def quality(name: str, rows: Sequence[Mapping[str, Any]]) -> Quality:
    """The quality of a set of graded rows, by their field `result` if they have one."""
    verdicts = [row["result"] for row in rows if isinstance(row.get("result"), bool)]
    return Quality(name, len(rows), accuracy(verdicts))


# --- Stage I --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curated:
    """What one iteration of stage I keeps.

    Attributes:
        kept: Ids of the kept questions, in the order of the questions.
        weak, icl: SFT rows {"id", "prompt", "completion"} of each model's responses.
        hybrid: Both, question by question, the weak response first.
        questions: Number of questions.
        empty: Number of questions to which neither model gave a final answer.
        qualities: Quality of all responses ("all weak", "all icl") and of the three sets.
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
            "sets": [asdict(quality) for quality in self.qualities],
        }


def curate(
    questions: Questions,
    weak: Answers,
    icl: Answers,
    *,
    iteration: int = 1,
    published: bool = False,
    sources: tuple[str, str] = ("the weak responses", "the in-context responses"),
) -> Curated:
    """One iteration of stage I: the sets of questions on which both graded responses agree.

    Args:
        questions: Rows with "id" and "question".
        weak: Responses of the weak model or, from iteration 2 on, of the model tuned on the `weak`
            set before.
        icl: Responses of the strong model in context or, from iteration 2 on, of the model tuned on
            the `icl` set before.
        iteration: Its number, for messages.
        published: Whether agreement on no final answer counts, as in the published sets (8 of the
            2,683 questions of iteration 1, and 11 of the 4,022 of iteration 2; the published code
            itself leaves such questions out).
        sources: Names of `weak` and `icl` in messages.

    Raises:
        InputError: For a question without a response or a grade, and if nothing is kept.
    """
    kept = agreeing(questions, weak, icl, empty=published, sources=sources)
    if not kept:
        raise InputError(
            f"stage I, iteration {iteration}, keeps none of {len(questions):,} questions: no final "
            f"answer in {sources[0]} equals that in {sources[1]}; look at their preds"
        )
    ids = [row["id"] for row in questions]
    sides = {"weak": weak, "icl": icl}
    sets = {name: sft_set(questions, side, kept) for name, side in sides.items()}
    qualities = [
        quality(prefix + name, [side[row_id] for row_id in chosen])
        for prefix, chosen in (("all ", ids), ("", kept))
        for name, side in sides.items()
    ]
    qualities.append(quality("hybrid", [side[row_id] for side in (weak, icl) for row_id in kept]))
    return Curated(
        kept,
        **sets,
        hybrid=[row for pair in zip(*sets.values(), strict=True) for row in pair],
        questions=len(questions),
        empty=sum(not weak[row_id]["pred"] and not icl[row_id]["pred"] for row_id in ids),
        qualities=tuple(qualities),
    )


def agreeing(
    questions: Questions,
    weak: Answers,
    icl: Answers,
    *,
    empty: bool = False,
    sources: tuple[str, str] = ("the weak responses", "the in-context responses"),
) -> tuple[Id, ...]:
    """Ids of the questions with equal `pred` in both responses, in order.

    Args:
        questions: Rows with "id".
        weak: One graded response per question.
        icl: Likewise.
        empty: Whether two empty preds agree.
        sources: Names of `weak` and `icl` in messages.

    Raises:
        InputError: Naming the source and the id, for a question without a response or a pred.
    """
    ids = [row["id"] for row in questions]
    preds = [(_pred(weak, one, sources[0]), _pred(icl, one, sources[1])) for one in ids]
    pairs = zip(ids, preds, strict=True)
    return tuple(one for one, (first, second) in pairs if first == second and (first or empty))


def sft_set(questions: Questions, answers: Answers, kept: Sequence[Id]) -> list[Row]:
    """SFT rows {"id", "prompt", "completion"} of the kept questions, in the order of `kept`.

    With all ids it is naive fine-tuning on all weak responses, the paper's "full weak".
    """
    asked = {row["id"]: prompt_of(row["question"]) for row in questions}
    said = {row_id: completion_of(answers[row_id]["response"]) for row_id in kept}
    return [{"id": one, "prompt": asked[one], "completion": said[one]} for one in kept]


# --- Stage II -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """The outcome of the vote on one question.

    Attributes:
        verdict: "weak chosen" or "weak rejected" in its pairs, or why there are none. "uncertain":
            the confidence is too low. "no answer": the most common answer is empty. "unanimous":
            all samples and the weak response agree. "not overruled": they disagree, but the
            confidence is too low to reject the weak response.
        winner: The most common answer.
        confidence: Its share of the samples.
    """

    verdict: Verdict
    winner: str
    confidence: float


@dataclass(frozen=True)
class Contrasts:
    """The pairs of stage II, and the decision on every question.

    Attributes:
        pairs: Rows {"id", "prompt", "chosen", "rejected", "confidence"}, and "weight" if asked for.
        verdicts: Decisions by question id.
        pair_counts: Numbers of pairs with the weak response chosen, and rejected.
        confidence: Mean over the questions.
        qualities: Quality of the chosen and of the rejected responses.
    """

    pairs: list[Row]
    verdicts: dict[Id, Decision]
    pair_counts: dict[str, int]
    confidence: float
    qualities: tuple[Quality, ...]

    def as_row(self) -> Row:
        """The figures, for JSON."""
        return {
            "questions": len(self.verdicts),
            "pairs": len(self.pairs),
            "pairs_by_weak_response": self.pair_counts,
            "questions_by_verdict": _tally(self.verdicts.values()),
            "mean_confidence": self.confidence,
            "sets": [asdict(quality) for quality in self.qualities],
        }


def votes(answers: Sequence[str]) -> tuple[str, float]:
    """The most common of the samples' answers, and its share: the confidence.

    Answers are in canonical form; an empty one votes too. Of a tie the winner is not empty, and
    then the first one in character order.
    """
    counts = Counter(answers)
    winner = min(counts, key=lambda answer: (-counts[answer], answer == "", answer))
    return winner, counts[winner] / len(answers)


def decide(weak: str, answers: Sequence[str], config: ContrastConfig) -> Decision:
    """The decision on one question from the weak answer and the samples', in canonical form."""
    winner, confidence = votes(answers)
    if confidence < config.min_confidence:
        verdict: Verdict = "uncertain"
    elif winner == "":
        verdict = "no answer"
    elif weak == winner:
        verdict = "weak chosen" if any(one != winner for one in answers) else "unanimous"
    else:
        sure = confidence >= config.overrule_confidence
        verdict = "weak rejected" if sure else "not overruled"
    return Decision(verdict, winner, confidence)


def contrastive_pairs(
    questions: Questions,
    weak: Answers,
    samples: Iterable[Sample],
    config: ContrastConfig,
    *,
    sources: tuple[str, str] = ("the weak responses", "the samples"),
) -> Contrasts:
    """The pairs of every question, in the order of the questions.

    If the weak answer is the most common one, the weak response is chosen and a sample that
    disagrees is rejected. If it is not, and the confidence suffices, a sample with the most common
    answer is chosen and the weak response rejected. Draws depend on (seed, id, text): neither the
    order of rows nor the numbers of samples change the pairs (except with `published`), and
    duplicate rows count once.

    Args:
        questions: Rows with "id" and "question".
        weak: One graded row per question.
        samples: Graded rows {"id", "sample", "response", "pred"}.
        config: The rules.
        sources: Names of `weak` and `samples` in messages.

    Raises:
        InputError: For a question without weak response or with fewer samples than asked for, a row
            that is not graded, two different rows for one sample, and if no pair is left.
    """
    grouped = group_samples(samples, [row["id"] for row in questions], config.samples, sources[1])
    pairs: list[Row] = []
    sides: list[tuple[Sample, Sample]] = []
    counts: Counter[Verdict] = Counter()
    verdicts = {}
    for row in questions:
        row_id = row["id"]
        own = _pred(weak, row_id, sources[0])
        answers = [pred_of(sample, sources[1]) for sample in grouped[row_id]]
        verdicts[row_id] = found = decide(own, answers, config)
        contrasts = _contrasts(weak[row_id], grouped[row_id], answers, found, config)
        counts[found.verdict] += len(contrasts)
        sides += contrasts
        for chosen, rejected in contrasts:
            pair = {
                "id": row_id,
                "prompt": prompt_of(row["question"]),
                "chosen": completion_of(chosen["response"]),
                "rejected": completion_of(rejected["response"]),
                "confidence": found.confidence,
            }
            pairs.append(pair | ({WEIGHT: found.confidence} if config.weighted else {}))
    if not pairs:
        reasons = ", ".join(f"{n:,} {name}" for name, n in _tally(verdicts.values()).items())
        raise InputError(
            f"stage II makes no pair of {len(verdicts):,} questions of {sources[1]}: {reasons}; "
            "look at their preds, or lower the confidence asked for"
        )
    names = ("chosen", "rejected")
    return Contrasts(
        pairs,
        verdicts,
        {"chosen": counts["weak chosen"], "rejected": counts["weak rejected"]},
        fmean(found.confidence for found in verdicts.values()),
        tuple(quality(*part) for part in zip(names, zip(*sides, strict=True), strict=True)),
    )


def group_samples(
    samples: Iterable[Sample], ids: Sequence[Id], count: int, source: str
) -> dict[Id, list[Sample]]:
    """The first `count` samples of every question by number, in that order.

    Raises:
        InputError: Naming `source` and the id, for an id that is not in `ids`, a row without
            number, two different rows of one number, and fewer samples than `count`.
    """
    found: dict[Id, dict[int, Sample]] = {row_id: {} for row_id in ids}
    for row in samples:
        row_id, number = row.get("id"), row.get("sample")
        if row_id not in found:
            raise InputError(f"{source}: no question has the id {row_id!r} of a sample")
        if not isinstance(number, int) or isinstance(number, bool):
            raise InputError(f'{source}: a row of id {row_id!r} has no number "sample"')
        known = found[row_id].setdefault(number, row)
        if any(known.get(name) != row.get(name) for name in ("response", "pred")):
            raise InputError(f"{source}: two different rows are sample {number} of id {row_id!r}")
    for row_id, rows in found.items():
        if len(rows) < count:
            raise InputError(
                f"{source}: id {row_id!r} has {len(rows)} of {count} samples; sample the rest, or "
                "ask for fewer"
            )
    return {row_id: [rows[n] for n in sorted(rows)[:count]] for row_id, rows in found.items()}


def _contrasts(
    weak: Sample,
    samples: Sequence[Sample],
    answers: Sequence[str],
    found: Decision,
    config: ContrastConfig,
) -> list[tuple[Sample, Sample]]:
    """(chosen, rejected) rows of one question."""
    pairs = list(zip(samples, answers, strict=True))
    if found.verdict == "weak chosen":
        differ = [one for one, answer in pairs if answer != found.winner]
        return [(weak, one) for one in _draw(differ, weak["id"], config, by_number=False)]
    if found.verdict == "weak rejected":
        agree = [one for one, answer in pairs if answer == found.winner]
        return [(one, weak) for one in _draw(agree, weak["id"], config, by_number=True)]
    return []


def _draw(
    samples: Sequence[Sample], row_id: Id, config: ContrastConfig, *, by_number: bool
) -> list[Sample]:
    """Draw at most `pairs_per_question` of the samples; a text of several samples is likelier.

    With `by_number`, as published, all but the first are taken by number, with texts other than the
    first one's.
    """
    copies: Counter[str] = Counter()
    keyed = []
    for sample in samples:
        text = sample["response"].strip()
        keyed.append((draw_key(config.seed, row_id, text, copies[text]), sample))
        copies[text] += 1
    drawn = [sample for _, sample in sorted(keyed, key=lambda found: found[0])]
    if not config.published:
        distinct: dict[str, Sample] = {}
        for sample in drawn:
            distinct.setdefault(sample["response"].strip(), sample)
        drawn = list(distinct.values())
    elif by_number:
        first = drawn[0]
        drawn = [first, *(one for one in samples if one["response"] != first["response"])]
    elif len(samples) <= config.pairs_per_question:
        drawn = list(samples)
    return drawn[: config.pairs_per_question]


def _pred(answers: Answers, row_id: Id, source: str) -> str:
    """A question's final answer; empty if there is none."""
    if row_id not in answers:
        raise InputError(f"{source}: no row for the question of id {row_id!r}")
    return pred_of(answers[row_id], source)


def _tally(decisions: Iterable[Decision]) -> dict[str, int]:
    return dict(sorted(Counter(found.verdict for found in decisions).items()))
