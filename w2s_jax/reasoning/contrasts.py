"""Stage II: contrastive pairs that the strong model picks by its own confidence over samples.

Weak-to-strong reasoning (arXiv 2407.13647), stage II. Pure functions of graded rows; samples,
grades and trains nothing.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from w2s_jax.errors import InputError
from w2s_jax.reasoning.curation import Canonical, Quality, Questions, quality
from w2s_jax.reasoning.measures import mean_over
from w2s_jax.reasoning.questions import Answers, Id, completion_of, draw_key, pred_of, prompt_of
from w2s_jax.text.rows import Row

WEIGHT = "weight"
"""Column of pairs that says how much each counts in the loss."""

Sample = Mapping[str, Any]
Verdict = Literal[
    "weak chosen", "weak rejected", "uncertain", "no answer", "unanimous", "not overruled"
]


@dataclass(frozen=True)
class ContrastConfig:
    """The rules of stage II; the defaults are the published ones for GSM8K.

    Raises InputError for values out of range.

    Attributes:
        samples: responses sampled a question; of more, those with the lowest numbers count.
        min_confidence: below this share of the most common answer a question gives no pair.
        overrule_confidence: at this share and above the weak response is rejected if it disagrees.
        pairs_per_question: at most so many; published 1 for GSM8K, 3 for MATH and OlympicArena.
        weighted: each pair carries its confidence as `weight`. Training multiplies the pair's loss
            by it and divides the batch's sum by the sum of its weights, so that pairs the model is
            surer of count for more and the scale of the loss stays; with equal weights it is DPO.
        published: where several pairs a question are made, exactly as the published code: the same
            text may be rejected twice, and of the samples to choose only the first is drawn, the
            others follow by number. Otherwise all are drawn and no pair is made twice.
        seed: of the draws, together with a question's id and the texts.
    """

    samples: int = 10
    min_confidence: float | int = 0.6
    overrule_confidence: float | int = 0.8
    pairs_per_question: int = 1
    weighted: bool = False
    published: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.pairs_per_question < 1:
            raise InputError("samples and pairs_per_question must be at least 1")
        if not 0 < self.min_confidence <= self.overrule_confidence <= 1:
            raise InputError(
                f"min_confidence {self.min_confidence} and overrule_confidence "
                f"{self.overrule_confidence}: shares are needed, the first no larger"
            )
        if self.published and self.weighted:
            raise InputError("weighted pairs are not published: drop one of the two options")


@dataclass(frozen=True)
class Decision:
    """What the votes on one question say.

    "uncertain": confidence too low; "no answer": the most common answer is empty; "unanimous": all
    samples and the weak response agree; "not overruled": they disagree, with too little confidence
    to reject the weak response.
    """

    verdict: Verdict
    winner: str
    confidence: float


@dataclass(frozen=True)
class Contrasts:
    """The pairs of stage II and what became of every question.

    Attributes:
        pairs: rows {"id", "prompt", "chosen", "rejected", "confidence"}, and "weight" if asked for.
        verdicts: by question id.
        pair_counts: pairs with the weak response chosen, and rejected.
        confidence: mean over the questions.
        qualities: of the chosen and of the rejected responses.
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
            "sets": [quality.as_row() for quality in self.qualities],
        }


def votes(answers: Sequence[str]) -> tuple[str, float]:
    """The most common of the samples' answers, in canonical form, and its share, the confidence.

    An empty answer votes as any other. Of equally common answers the winner is one that is not
    empty, and of those the first in the order of their characters; above one half there is none.
    """
    counts = Counter(answers)
    winner = min(counts, key=lambda answer: (-counts[answer], answer == "", answer))
    return winner, counts[winner] / len(answers)


def decide(weak: str, answers: Sequence[str], config: ContrastConfig) -> Decision:
    """The verdict on one question from the weak answer and the samples', all in canonical form."""
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
    canonical: Canonical = str,
    sources: tuple[str, str] = ("the weak responses", "the samples"),
) -> Contrasts:
    """The pairs of every question, in the order of the questions.

    weak: one graded row a question; samples: graded rows {"id", "sample", "response", "pred"}. If
    the weak answer is the most common one, the weak response is chosen and a disagreeing sample
    rejected; if it is another and the confidence suffices, an agreeing sample is chosen and the
    weak response rejected. Draws depend on (seed, id, text): neither the order of rows nor the
    numbers of samples change the pairs (but see `published`), and a row met twice counts once.

    Raises InputError for a question without weak response or with fewer samples than asked, a row
    not graded, two different rows for one sample, and where no pair is left.
    """
    grouped = group_samples(samples, [row["id"] for row in questions], config.samples, sources[1])
    pairs: list[Row] = []
    sides: list[tuple[Verdict, Sample, Sample]] = []
    verdicts = {}
    for row in questions:
        row_id = row["id"]
        if row_id not in weak:
            raise InputError(f"{sources[0]}: no row for the question of id {row_id!r}")
        own = _form(weak[row_id], canonical, sources[0])
        answers = [_form(sample, canonical, sources[1]) for sample in grouped[row_id]]
        verdicts[row_id] = found = decide(own, answers, config)
        for chosen, rejected in _contrasts(weak[row_id], grouped[row_id], answers, found, config):
            pair = {
                "id": row_id,
                "prompt": prompt_of(row["question"]),
                "chosen": completion_of(chosen["response"]),
                "rejected": completion_of(rejected["response"]),
                "confidence": found.confidence,
            }
            pairs.append(pair | ({WEIGHT: found.confidence} if config.weighted else {}))
            sides.append((found.verdict, chosen, rejected))
    if not pairs:
        reasons = ", ".join(f"{n:,} {name}" for name, n in _tally(verdicts.values()).items())
        raise InputError(
            f"stage II makes no pair of {len(verdicts):,} questions of {sources[1]}: {reasons}; "
            "look at their preds, or lower the confidence asked for"
        )
    return Contrasts(
        pairs,
        verdicts,
        {"chosen": _count(sides, "weak chosen"), "rejected": _count(sides, "weak rejected")},
        mean_over(found.confidence for found in verdicts.values()) or 0.0,
        (
            quality("chosen", [chosen for _, chosen, _ in sides]),
            quality("rejected", [rejected for _, _, rejected in sides]),
        ),
    )


def group_samples(
    samples: Iterable[Sample], ids: Sequence[Id], count: int, source: str
) -> dict[Id, list[Sample]]:
    """The first `count` samples of every question by their numbers, in that order.

    Raises InputError, naming `source` and the id, for an id that is not among `ids`, a row without
    number, two rows of one number that differ, and fewer samples than `count`.
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
    agree = [one for one, own in zip(samples, answers, strict=True) if own == found.winner]
    differ = [one for one, own in zip(samples, answers, strict=True) if own != found.winner]
    if found.verdict == "weak chosen":
        return [(weak, one) for one in _draw(differ, weak["id"], config, by_number=False)]
    if found.verdict == "weak rejected":
        return [(one, weak) for one in _draw(agree, weak["id"], config, by_number=True)]
    return []


def _draw(
    samples: Sequence[Sample], row_id: Id, config: ContrastConfig, *, by_number: bool
) -> list[Sample]:
    """At most `pairs_per_question` of the samples; a text held by more of them is likelier.

    by_number: the published draw takes all but the first by number, of other text than the first.
    """
    copies: Counter[str] = Counter()
    keyed = []
    for sample in samples:
        text = sample["response"].strip()
        keyed.append((draw_key(config.seed, row_id, text, copies[text]), text, sample))
        copies[text] += 1
    keyed.sort(key=lambda found: found[0])
    if not config.published:
        distinct: dict[str, Sample] = {}
        for _, text, sample in keyed:
            distinct.setdefault(text, sample)
        drawn = list(distinct.values())
    elif by_number:
        first = keyed[0][2]
        drawn = [first, *(one for one in samples if one["response"] != first["response"])]
    elif len(samples) <= config.pairs_per_question:
        drawn = list(samples)
    else:
        drawn = [sample for _, _, sample in keyed]
    return drawn[: config.pairs_per_question]


def _form(row: Sample, canonical: Canonical, source: str) -> str:
    pred = pred_of(row, source)
    return canonical(pred) if pred else ""


def _tally(decisions: Iterable[Decision]) -> dict[str, int]:
    return dict(sorted(Counter(found.verdict for found in decisions).items()))


def _count(sides: Sequence[tuple[Verdict, Sample, Sample]], verdict: Verdict) -> int:
    return sum(found == verdict for found, _, _ in sides)
