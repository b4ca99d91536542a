"""Settings of the benchmarks that are commands, as frozen values. Imports no jax.

Each field is a flag, an argument in Python and its help at once.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from tyro.conf import arg


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What every benchmark is told beside its sizes."""

    json: Annotated[str | None, arg(metavar="FILE")] = None
    """Also write the figures to FILE as JSON."""

    def as_row(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        return {name: value for name, value in asdict(self).items() if name != "json"}


@dataclass(frozen=True)
class SearchBenchConfig(BenchConfig):
    """The shapes and sizes of a search; sizes count tokens, layers, prompts."""

    shape: Annotated[str | None, arg(metavar="NAME")] = None
    """Shape of the policy, llama-1b or llama-8b, with llama-1b guides, in place of layers, widths
    and vocabulary."""
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
    max_new_tokens: int = 50
    """Tokens in a response."""
    prompt_tokens: int = 13
    """Tokens in a prompt."""
    batch_size: int = 1
    """Prompts searched side by side."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights."""
    repeats: int = 3
    """Timed runs; the median is reported."""
    cross_vocabulary: bool = False
    """Also measure guides that read texts in a vocabulary of their own."""


@dataclass(frozen=True)
class TrainBenchConfig(BenchConfig):
    """The shapes and sizes of training steps.

    A step has `batch_size` rows of `length` tokens: texts for SFT; for DPO the two sides of half as
    many pairs, of which `prompt_tokens` are a prompt. gpt2 has layer norms, learned positions and
    tied embeddings; llama has a gated MLP and four query heads to a key head.
    """

    objectives: tuple[Literal["sft", "dpo"], ...] = ("sft", "dpo")
    """What is trained for."""
    shape: Annotated[str | None, arg(metavar="NAME")] = None
    """Shape of the model, llama-1b or llama-8b, in place of architecture, layers, width and
    vocabulary."""
    architecture: Literal["gpt2", "llama"] = "gpt2"
    """Kind of the model."""
    layers: int = 12
    """Layers of the model."""
    width: int = 768
    """Width of the model."""
    vocab: int = 50257
    """Vocabulary size."""
    batch_size: int = 8
    """Rows of a step; DPO has half as many pairs."""
    length: int = 256
    """Tokens of a row."""
    prompt_tokens: int = 64
    """Of these, tokens of the prompt of a pair."""
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
