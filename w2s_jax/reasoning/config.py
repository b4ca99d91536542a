"""What decides a weak-to-strong reasoning run, as frozen dataclasses that YAML and flags fill."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import arg

from w2s_jax.errors import InputError
from w2s_jax.reasoning.questions import Overflow

Kind = Literal["gsm8k", "math", "olympicarena"]
CheckerName = Literal["published", "harness", "harness-flexible", "math"]
SetName = Literal["weak", "icl", "hybrid"]


@dataclass(frozen=True)
class GenerationConfig:
    """How responses are sampled.

    Raises InputError for a size below 1, a number out of range, several samples without a
    temperature, and settings that the method does not have.

    Attributes:
        samples: of each prompt.
        temperature: 0 is greedy: then one sample.
        top_p: the nucleus that is sampled from.
        top_k: the likeliest tokens that are sampled from; 0: all.
        max_new_tokens: of a response at most.
        stop: strings; a response ends before the first of them.
        eos_ids: tokens that end a response; None: the model's own, or the tokenizer's.
        seed: with a row's id it decides the row's draws.
        batch_size: prompts that run side by side.
        samples_per_slot: samples of a prompt behind one reading of it; None: all. Fewer read it
            again for every so many, but short responses wait less for long ones; the draws are the
            same.
        method: "sample", or "cbs": chunk-level beam search under a guide (arXiv 2405.19262). Sample
            i is then the best response of the search with the seed `seed + i`, each a search of its
            own.
        beam_width, successors, chunk_length: W, K and L of that search.
    """

    samples: int = 1
    temperature: float | int = 0.0
    top_p: float | int = 1.0
    top_k: int = 0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ("Question", "Answer")
    eos_ids: tuple[int, ...] | None = None
    seed: int = 0
    batch_size: int = 16
    samples_per_slot: int | None = None
    method: Literal["sample", "cbs"] = "sample"
    beam_width: int = 4
    successors: int = 4
    chunk_length: int = 5

    def __post_init__(self) -> None:
        sizes = ("samples", "max_new_tokens", "batch_size", "samples_per_slot")
        for name in (*sizes, "beam_width", "successors", "chunk_length"):
            size = getattr(self, name)
            _check(size is None or size >= 1, f"{name} is {size}; it must be at least 1")
        temperature = f"temperature is {self.temperature}; it must be 0 or above, and finite"
        _check(0 <= self.temperature < math.inf, temperature)
        _check(0 < self.top_p <= 1, f"top_p is {self.top_p}; it must lie in (0, 1]")
        _check(self.top_k >= 0, f"top_k is {self.top_k}; it must be 0 (off) or above")
        _check_seed(self.seed)
        _check(all(self.stop), "a stop string is empty; give at least one character")
        searches = self.method == "cbs"
        _check(
            searches or self.method == "sample", f"method {self.method!r} is neither sample nor cbs"
        )
        _check(
            self.temperature > 0 or not (self.samples > 1 or searches),
            "temperature 0 (greedy) writes the same every time; give a temperature above 0, or "
            'samples 1 and method "sample"',
        )
        _check(
            not searches or self.samples_per_slot in (None, 1),
            "samples_per_slot is for method sample; a search is one sample",
        )

    @property
    def samples_per_request(self) -> int:
        """How many samples of a prompt share a slot."""
        if self.method == "cbs":
            return 1
        return min(self.samples, self.samples_per_slot or self.samples)


@dataclass(frozen=True)
class WeakConfig:
    """Where the weak labels come from.

    Attributes:
        model: checkpoint (a folder, or an id on the hub) of the weak model.
        train: questions with gold answers that it is fine-tuned on first; None takes it as it is.
        responses: a file of its responses to the questions, by id, instead of the model.
        sft: flags of `w2s sft` for its own fine-tuning, over the run's.
    """

    model: str | None = None
    train: str | None = None
    responses: str | None = None
    sft: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DemonstrationConfig:
    """Solved questions before each prompt of the strong model in context.

    Attributes:
        file: rows as those of questions, with answers; None draws them from the weak model's own
            responses, those left out that a gold answer in the questions shows to be wrong.
        count: how many (of a file, the first); 0 asks without.
        seed: of the draw.
        overflow: for prompts too long for the model: "error", or "drop-first" demonstrations.
    """

    file: str | None = None
    count: int = 4
    seed: int = 0
    overflow: Overflow = "error"

    def __post_init__(self) -> None:
        _check(self.count >= 0, f"count {self.count} must not be negative; 0 asks without")


@dataclass(frozen=True)
class DecodingConfig:
    """How models answer.

    Attributes:
        max_new_tokens: of a response.
        batch_size: prompts side by side.
        stop: what ends a response.
        dtype: float32, bfloat16; None takes the backend's own.
        mesh: device mesh such as data=2,fsdp=4.
    """

    max_new_tokens: int = 512
    batch_size: int = 16
    stop: tuple[str, ...] = ("Question", "Answer")
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    mesh: str | None = None

    def __post_init__(self) -> None:
        self.generation()

    def generation(self, **options: Any) -> GenerationConfig:
        """The settings of generation, greedy but for the options; InputError if out of range."""
        own = {name: getattr(self, name) for name in ("max_new_tokens", "batch_size", "stop")}
        return GenerationConfig(**own, **options)


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
        _check(
            self.samples >= 1 and self.pairs_per_question >= 1,
            "samples and pairs_per_question must be at least 1",
        )
        _check(
            0 < self.min_confidence <= self.overrule_confidence <= 1,
            f"min_confidence {self.min_confidence} and overrule_confidence "
            f"{self.overrule_confidence}: shares are needed, the first no larger",
        )
        _check(
            not (self.published and self.weighted),
            "weighted pairs are not published: drop one of the two options",
        )


@dataclass(frozen=True)
class StageTwoConfig:
    """Preference tuning on contrasts that the strong model finds itself.

    Attributes:
        start: the set whose model of the last iteration is sampled and tuned.
        temperature, top_p: of the samples.
        rounds: how often samples, pairs and tuning are gone through; the paper's is 1.
        sampler: "sample", or "cbs": search guided by the log-ratio of the weak model and the one
            it was tuned from (arXiv 2405.19262), which needs weak.train.
        beam_width, successors, chunk_length: of that search.
        contrasts: the rules by which pairs are made.
        dpo: flags of `w2s dpo` over the run's.
    """

    start: SetName = "hybrid"
    temperature: float = 1.0
    top_p: float = 1.0
    rounds: int = 1
    sampler: Literal["sample", "cbs"] = "sample"
    beam_width: int = 4
    successors: int = 4
    chunk_length: int = 5
    contrasts: ContrastConfig = field(default_factory=ContrastConfig)
    dpo: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.rounds >= 0, f"rounds {self.rounds} must not be negative")
        GenerationConfig(**self.drawing)

    @property
    def drawing(self) -> dict[str, Any]:
        """How samples are drawn, as fields of GenerationConfig."""
        same = ("temperature", "top_p", "beam_width", "successors", "chunk_length")
        own = {name: getattr(self, name) for name in same}
        return own | {"samples": self.contrasts.samples, "method": self.sampler}


@dataclass(frozen=True)
class ReasonConfig:
    """A run of weak-to-strong reasoning (arXiv 2407.13647); paths are relative to `--data`.

    Attributes:
        kind: how final answers are written.
        questions: what the strong model learns from. Of gold answers in it no label is made; they
            are for figures, the ceiling, and to leave out demonstrations known to be wrong.
        strong: checkpoint of the strong model.
        weak: where weak labels come from.
        test: questions with gold answers; None leaves out all evaluation.
        ids: "own" ids of the questions, or their "index" in the file, as the published sets have.
        demonstrations: those of the in-context labels.
        votes: the checker whose final answers must agree, and vote.
        judge: the checker that says which answers are right.
        published: agreement on no answer counts, as in the published sets of stage I.
        iterations: of stage I.
        sets: which of an iteration's sets to train a model on, beside those that are needed.
        decoding: of all responses.
        sft, dpo: flags of `w2s sft` and `w2s dpo` for every fine-tuning.
        stage_two: None ends after stage I.
        naive: also train on all weak labels.
        ceiling: also train on the gold answers of the questions, for the performance gap recovered;
            None does where every question has one.
        pass_at: the k of pass@k and majority@k over the samples of stage II, where gold exists.
        seed: of every draw and training that has none of its own.
    """

    kind: Kind
    questions: str
    strong: str
    weak: WeakConfig = field(default_factory=WeakConfig)
    test: str | None = None
    ids: Literal["own", "index"] = "own"
    demonstrations: DemonstrationConfig = field(default_factory=DemonstrationConfig)
    votes: CheckerName = "math"
    judge: CheckerName = "math"
    published: bool = False
    iterations: int = 2
    sets: tuple[SetName, ...] = ("weak", "icl", "hybrid")
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    sft: dict[str, Any] = field(default_factory=dict)
    dpo: dict[str, Any] = field(default_factory=dict)
    stage_two: StageTwoConfig | None = field(default_factory=StageTwoConfig)
    naive: bool = True
    ceiling: bool | None = None
    pass_at: tuple[int, ...] = (1, 5, 10)
    seed: int = 0

    def __post_init__(self) -> None:
        weak, iterations = self.weak, self.iterations
        _check(iterations >= 1, f"iterations {iterations} must be at least 1")
        _check(
            weak.model is not None or weak.responses is not None,
            "weak: name a model, or a file of its responses",
        )
        _check(
            weak.train is None or weak.model is not None,
            "weak: train needs the model that is trained",
        )
        for name in ("votes", "judge"):
            checker = getattr(self, name)
            _check(
                self.kind == "gsm8k" or not checker.startswith("harness"),
                f"{name}: {checker} reads gsm8k answers only, not {self.kind}; take math",
            )
        pass_at = f"pass_at {list(self.pass_at)}: each k must be at least 1"
        _check(all(k >= 1 for k in self.pass_at), pass_at)
        _check_seed(self.seed)
        _check(
            not self.guided or weak.train is not None,
            "stage_two: sampler cbs is guided by the weak model before and after its training; "
            "give weak.model and weak.train",
        )

    @property
    def guided(self) -> bool:
        """Whether the samples of stage II are drawn under the guide of the weak pair."""
        return self.stage_two is not None and self.stage_two.sampler == "cbs"

    def generation(self, **options: Any) -> GenerationConfig:
        """How responses are written, greedily but for the options."""
        return self.decoding.generation(**{"seed": self.seed} | options)


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """Where the stages of a run lie, and which of them are done."""

    data: Annotated[str, arg(metavar="DIR")] = "."
    """Folder that the config's relative paths are in, those of models too."""
    output: Annotated[str, arg(metavar="DIR")] = "runs/reason"
    """Folder of the stages and the report."""
    first: Annotated[str | None, arg(name="from", metavar="STAGE")] = None
    """First stage to do; those before it are taken as they are."""
    last: Annotated[str | None, arg(name="until", metavar="STAGE")] = None
    """Last stage to do."""


def _check(holds: bool, told: str) -> None:
    if not holds:
        raise InputError(told)


def _check_seed(seed: int) -> None:
    _check(0 <= seed < 2**32, f"seed is {seed}; it must lie in 0 .. 2**32 - 1")
