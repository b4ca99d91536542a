"""Settings of the benchmarks that are commands, as frozen values. Imports no jax.

Each field is a flag, an argument in Python and its help at once.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What every benchmark is told beside its sizes."""

    shape: Annotated[str | None, arg(metavar="NAME")] = None
    """A published shape, gpt2, qwen2.5-0.5b, llama-1b, llama-3b or llama-8b, in place of layers,
    widths and vocabulary. The guides of a search then have the smallest shape of that family: gpt2
    guides gpt2, llama-1b guides every llama."""
    json: Annotated[str | None, arg(metavar="FILE")] = None
    """Also write the figures to FILE as JSON."""

    def as_row(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        return {name: value for name, value in asdict(self).items() if name != "json"}


@dataclass(frozen=True, kw_only=True)
class DecodingConfig(BenchConfig):
    """What benchmarks of decoding have in common; sizes count tokens, layers, prompts."""

    batch_size: int = 1
    """Prompts side by side."""
    prompt_tokens: int = 13
    """Tokens in a prompt."""
    max_new_tokens: int = 50
    """Tokens in a response."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights."""
    repeats: int = 3
    """Timed runs; the median is reported."""
    curve: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="NAME=V,V,..")]] = ()
    """Measure a point for each value of a size, as batch_size=1,2,4,8; of W and K together as
    wk=2x2,4x4. The other sizes are those given; the models are the same."""
    torch_python: Annotated[str | None, arg(metavar="PROGRAM")] = None
    """Interpreter that has torch and transformers, for --compare; by default this one."""
    compare_seconds: float | None = None
    """The longest that a program of --compare may run; it is then not compared."""


@dataclass(frozen=True, kw_only=True)
class ModelBenchConfig(BenchConfig):
    """The shape of a single model.

    gpt2 has layer norms, learned positions and tied embeddings; llama has a gated MLP and four
    query heads to a key head.
    """

    architecture: Literal["gpt2", "llama"] = "gpt2"
    """Kind of the model."""
    layers: int = 12
    """Layers of the model."""
    width: int = 768
    """Width of the model."""
    vocab: int = 50257
    """Vocabulary size."""


@dataclass(frozen=True)
class SearchBenchConfig(DecodingConfig):
    """The shapes and sizes of a search."""

    policy_layers: int = 12
    """Layers of the policy."""
    policy_width: int = 768
    """Width of the policy."""
    guide_layers: int = 4
    """Layers of the tuned and of the untuned model."""
    guide_width: int = 256
    """Width of the tuned and of the untuned model."""
    vocab: int = 8192
    """Vocabulary size of all three."""
    beam_width: Annotated[int, arg(aliases=["--w"])] = 4
    """W, hypotheses kept."""
    successors: Annotated[int, arg(aliases=["--k"])] = 4
    """K, successors sampled from each hypothesis."""
    chunk_length: Annotated[int, arg(aliases=["--l"])] = 5
    """L, tokens in a chunk."""
    cross_vocabulary: bool = False
    """Also measure guides that read texts in a vocabulary of their own."""
    compare: tuple[Literal["hf", "generate"], ...] = ()
    """Also measure, in this run: hf, the same search on the same weights as a program of
    transformers and torch; generate, transformers' plain sampling of as many rows (W·K a
    prompt)."""


@dataclass(frozen=True)
class GenerateBenchConfig(DecodingConfig, ModelBenchConfig):
    """The shapes and sizes of plain sampling: `samples` responses to each of `batch_size` prompts.

    All rows have all their tokens: nothing ends one early.
    """

    samples: int = 16
    """Responses to each prompt."""
    compare: tuple[Literal["generate"], ...] = ()
    """Also measure transformers' `generate` of the same rows, in this run."""


@dataclass(frozen=True)
class TrainBenchConfig(ModelBenchConfig):
    """The shapes and sizes of training steps.

    A step has `batch_size` rows of `length` tokens: texts for SFT; for DPO the two sides of half as
    many pairs, of which `prompt_tokens` are a prompt.
    """

    objectives: tuple[Literal["sft", "dpo"], ...] = ("sft", "dpo")
    """What is trained for."""
    batch_size: int = 8
    """Rows of a step; DPO has half as many pairs."""
    length: int = 256
    """Tokens of a row."""
    prompt_tokens: int = 64
    """Of these, tokens of the prompt of a pair."""
    packed: bool = False
    """SFT reads rows of four documents of random lengths, each of which sees itself alone."""
    lora_rank: int = 0
    """Train adapters of this rank on all projections, with twice as much alpha; 0 trains all
    weights. GPT-2's queries, keys and values share a factor in TRL's and have their own in ours."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in; the trained weights stay float32."""
    repeats: int = 3
    """Timed steps of each round; the median is reported."""
    rounds: int = 1
    """How often the trainers take turns."""
    trl: bool = False
    """Also measure TRL on the same model, rows and settings."""
    trl_python: Annotated[str | None, arg(metavar="PROGRAM")] = None
    """Interpreter that has torch and trl; by default this one."""
