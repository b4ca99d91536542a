"""What decides a weak-to-strong reasoning run, as frozen dataclasses that YAML fills."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from w2s_jax.errors import InputError
from w2s_jax.reasoning.contrasts import ContrastConfig
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
        file: rows {"question", "answer"}; None draws them from the weak model's own responses.
        count: how many (of a file, the first).
        seed: of the draw.
        overflow: for prompts too long for the model: "error", or "drop-first" demonstrations.
    """

    file: str | None = None
    count: int = 4
    seed: int = 0
    overflow: Overflow = "error"


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
    dtype: str | None = None
    mesh: str | None = None


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


@dataclass(frozen=True)
class ReasonConfig:
    """A run of weak-to-strong reasoning (arXiv 2407.13647); paths are relative to `--data`.

    Attributes:
        kind: how final answers are written.
        questions: what the strong model learns from; gold answers in it are for figures alone.
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
        ceiling: also train on the gold answers of the questions, for the performance gap recovered.
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
    ceiling: bool = True
    pass_at: tuple[int, ...] = (1, 5, 10)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise InputError(f"iterations {self.iterations} must be at least 1")
        if self.weak.model is None and self.weak.responses is None:
            raise InputError("weak: name a model, or a file of its responses")
        if self.weak.train is not None and self.weak.model is None:
            raise InputError("weak: train needs the model that is trained")
        cbs = self.stage_two is not None and self.stage_two.sampler == "cbs"
        if cbs and self.weak.train is None:
            raise InputError(
                "stage_two: sampler cbs is guided by the weak model before and after its training; "
                "give weak.model and weak.train"
            )


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
