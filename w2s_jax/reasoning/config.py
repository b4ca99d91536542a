"""The settings of a weak-to-strong reasoning run, as frozen dataclasses for YAML and flags."""

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

    Attributes:
        samples: Samples of each prompt.
        temperature: Sampling temperature; 0 is greedy, with one sample.
        top_p: Probability mass of the nucleus that is sampled from.
        top_k: Number of likeliest tokens that are sampled from; 0 for all.
        max_new_tokens: Maximum tokens of a response.
        stop: Stop strings; a response ends before the first of them.
        eos_ids: Tokens that end a response; None for the model's own, or the tokenizer's.
        seed: Determines a row's draws together with the row's id.
        batch_size: Prompts that run side by side.
        samples_per_slot: Samples drawn from one prefill of a prompt; None for all. With fewer the
            prompt is read again for each group, but short responses wait less for long ones; the
            draws are the same.
        method: "sample", or "cbs": chunk-level beam search under a guide (arXiv 2405.19262). Sample
            i is then the best response of a separate search with the seed `seed + i`.
        beam_width, successors, chunk_length: W, K and L of that search.

    Raises:
        InputError: For a size below 1, a number out of range, several samples without a
            temperature, and settings that the method does not have.
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
        """Number of samples of a prompt that share a slot."""
        if self.method == "cbs":
            return 1
        return min(self.samples, self.samples_per_slot or self.samples)


@dataclass(frozen=True)
class WeakConfig:
    """Where the weak labels come from.

    Attributes:
        model: Checkpoint of the weak model (a folder, or an id on the hub).
        train: Questions with gold answers on which it is fine-tuned first; None uses it as it is.
        responses: File of its responses to the questions, by id, in place of the model.
        sft: Flags of `w2s sft` for its own fine-tuning, over the run's.
    """

    model: str | None = None
    train: str | None = None
    responses: str | None = None
    sft: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DemonstrationConfig:
    """Solved questions before each prompt of the strong model in context.

    Attributes:
        file: Rows like those of questions, with answers. None draws from the weak model's own
            responses, except those known to be wrong by a gold answer in the questions.
        count: Number of demonstrations (of a file, the first); 0 for none.
        seed: Seed of the draw.
        overflow: What to do for prompts too long for the model: "error", or "drop-first" to drop
            demonstrations.
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
        max_new_tokens: Maximum tokens of a response.
        batch_size: Prompts that run side by side.
        stop: Stop strings.
        dtype: Dtype of the weights; None for the backend's default.
        mesh: Device mesh such as data=2,fsdp=4.
    """

    max_new_tokens: int = 512
    batch_size: int = 16
    stop: tuple[str, ...] = ("Question", "Answer")
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    mesh: str | None = None

    def __post_init__(self) -> None:
        self.generation()

    def generation(self, **options: Any) -> GenerationConfig:
        """These settings for generation, greedy unless the options say otherwise.

        Raises:
            InputError: For a value out of range.
        """
        own = {name: getattr(self, name) for name in ("max_new_tokens", "batch_size", "stop")}
        return GenerationConfig(**own, **options)


@dataclass(frozen=True)
class ContrastConfig:
    """The rules of stage II; the defaults are the published ones for GSM8K.

    Attributes:
        samples: Responses sampled for a question; if there are more, the first ones by number
            count.
        min_confidence: With a smaller share for its most common answer a question gives no pair.
        overrule_confidence: From this share on, a weak response that disagrees is rejected.
        pairs_per_question: Maximum number; published 1 for GSM8K, 3 for MATH and OlympicArena.
        weighted: Whether each pair carries its confidence as `weight`. Training multiplies the
            pair's loss by it and divides a batch's sum by the sum of its weights, so that pairs of
            higher confidence count for more while the scale of the loss stays. With equal weights
            it is DPO.
        published: Whether several pairs of a question are made exactly as in the published code:
            the same text may be rejected twice, and of the chosen samples only the first is drawn
            while the others follow by number. Otherwise all are drawn, and no pair is made twice.
        seed: Seed of the draws, together with a question's id and the texts.

    Raises:
        InputError: For values out of range.
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
        start: The set whose model of the last iteration is sampled and tuned.
        temperature, top_p: Sampling settings.
        rounds: Rounds of sampling, making pairs and tuning; 1 in the paper.
        sampler: "sample", or "cbs": search guided by the log-ratio of the weak model and the model
            it was tuned from (arXiv 2405.19262), which needs weak.train.
        beam_width, successors, chunk_length: W, K and L of that search.
        contrasts: The rules by which pairs are made.
        dpo: Flags of `w2s dpo`, over the run's.
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
        kind: Format of the final answers.
        questions: What the strong model learns from. Gold answers in it never become labels; they
            are for figures, the ceiling, and to exclude demonstrations known to be wrong.
        strong: Checkpoint of the strong model.
        weak: Where the weak labels come from.
        test: Questions with gold answers; None skips all evaluation.
        ids: "own" ids of the questions, or their "index" in the file, as in the published sets.
        demonstrations: Those of the in-context labels.
        votes: The checker by which final answers agree, and vote.
        judge: The checker that decides which answers are right.
        published: Whether agreement on no answer counts, as in the published sets of stage I.
        iterations: Iterations of stage I.
        sets: The sets of an iteration on which a model is trained, beside those that are needed.
        decoding: How all responses are decoded.
        sft, dpo: Flags of `w2s sft` and `w2s dpo` for every fine-tuning.
        stage_two: Settings of stage II; None ends after stage I.
        naive: Whether to train on all weak labels as well.
        ceiling: Whether to train on the gold answers of the questions as well, for the performance
            gap recovered; None does if every question has one.
        pass_at: The k of pass@k and majority@k over the samples of stage II, where gold exists.
        seed: Seed of every draw and training without one of its own.
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
        """How responses are generated; greedy unless the options say otherwise."""
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
