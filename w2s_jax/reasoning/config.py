"""What decides a weak-to-strong reasoning run, as frozen dataclasses that YAML fills."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from w2s_jax.errors import InputError
from w2s_jax.reasoning.contrasts import ContrastConfig
from w2s_jax.reasoning.generation import GenerationConfig
from w2s_jax.reasoning.questions import Overflow

Kind = Literal["gsm8k", "math", "olympicarena"]
CheckerName = Literal["published", "harness", "harness-flexible", "math"]
SetName = Literal["weak", "icl", "hybrid"]


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
        if self.count < 0:
            raise InputError(f"count {self.count} must not be negative; 0 asks without")


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
        return GenerationConfig(
            **options,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            stop=self.stop,
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
        if self.rounds < 0:
            raise InputError(f"rounds {self.rounds} must not be negative")
        GenerationConfig(**self.drawing())

    def drawing(self) -> dict[str, Any]:
        """How samples are drawn, as fields of GenerationConfig."""
        return {
            "samples": self.contrasts.samples,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "method": self.sampler,
            "beam_width": self.beam_width,
            "successors": self.successors,
            "chunk_length": self.chunk_length,
        }


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
        if self.iterations < 1:
            raise InputError(f"iterations {self.iterations} must be at least 1")
        if self.weak.model is None and self.weak.responses is None:
            raise InputError("weak: name a model, or a file of its responses")
        if self.weak.train is not None and self.weak.model is None:
            raise InputError("weak: train needs the model that is trained")
        for name in ("votes", "judge"):
            if getattr(self, name).startswith("harness") and self.kind != "gsm8k":
                raise InputError(
                    f"{name}: {getattr(self, name)} reads gsm8k answers only, not {self.kind}; "
                    "take math"
                )
        if any(k < 1 for k in self.pass_at):
            raise InputError(f"pass_at {list(self.pass_at)}: each k must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; it must lie in 0 .. 2**32 - 1")
        if self.guided and self.weak.train is None:
            raise InputError(
                "stage_two: sampler cbs is guided by the weak model before and after its training; "
                "give weak.model and weak.train"
            )

    @property
    def guided(self) -> bool:
        """Whether the samples of stage II are drawn under the guide of the weak pair."""
        return self.stage_two is not None and self.stage_two.sampler == "cbs"


def resolved(config: ReasonConfig, data: Path) -> Mapping[str, Path]:
    """The files a run reads, by what they are, as paths under the folder `data`."""
    named = {
        "questions": config.questions,
        "test": config.test,
        "weak train": config.weak.train,
        "weak responses": config.weak.responses,
        "demonstrations": config.demonstrations.file,
    }
    found = {name: data / value for name, value in named.items() if value is not None}
    for name, path in found.items():
        if not path.is_file():
            raise InputError(f"{path}: not found; it is the file of {name}")
    return found
