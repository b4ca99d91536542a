"""Settings of plans as frozen dataclasses, from which the commands are made. Imports no jax.

Each field is a flag, an argument in Python, and its help text.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from tyro.conf import arg

from w2s_jax.errors import InputError
from w2s_jax.ops.meshes import AUTO

MOST = 2**31
"""Upper bound of rows and counts; larger array sizes would overflow int64."""
_SHORT = {"beam_width": "w", "successors": "k", "chunk_length": "l"}
_USUAL = ("search", "auto", None)
"""Values that a command has by default, so that its flag need not be given."""


def flag_of(field: str) -> str:
    """The flag of a field, without dashes; the papers' letter if there is one."""
    return _SHORT.get(field, field.replace("_", "-"))


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Settings of every plan: for which slice, and with which mesh.

    Attributes:
        work: The command that is planned.
        run_flags: Fields that are also flags of that command, with other defaults there.
        sizes: Fields that hold sizes.
    """

    topology: Annotated[str, arg(metavar="NAME")] = "v5e:4x4"
    """Slice, as v5e:4x4, v6e:2x4 or v5p:4x4x4, or GPUs of a host, as h100:8; v6e:auto finds the
    smallest slice of v6e that fits (auto: of v5e)."""
    mesh: Annotated[str, arg(metavar="SPEC")] = AUTO
    """Device mesh such as data=2,tensor=8; auto, the default, is the likeliest to fit and be quick,
    by what is known before compiling. dcn_data=2 plans for two such slices."""
    search_mesh: Annotated[bool, arg(name="search-mesh")] = False
    """Compile several meshes of the slice and rank them."""
    tries: Annotated[int | None, arg(name="try", metavar="N")] = None
    """Meshes of a slice that --search-mesh and auto compile, the likeliest first; 4 by default."""

    work: ClassVar[Literal["search", "sft", "dpo"]]
    run_flags: ClassVar[tuple[str, ...]]
    sizes: ClassVar[tuple[str, ...]]

    @property
    def counts(self) -> tuple[str, ...]:
        """The fields that hold sizes, among those that are set."""
        return self.sizes

    def check_counts(self) -> None:
        """Raise InputError for a size below 1, or too large for an array."""
        for flag, count in ((flag_of(name), getattr(self, name)) for name in self.counts):
            if count < 1:
                raise InputError(f"--{flag} is {count}; it must be at least 1")
            if count >= MOST:
                raise InputError(f"--{flag} is {count}; it must be less than {MOST}")

    def command(self, mesh: str) -> str:
        """The command that runs what was planned, on this mesh."""
        flags = {"mesh": mesh} | {flag_of(name): getattr(self, name) for name in self.run_flags}
        told = [f"--{flag} {value}" for flag, value in flags.items() if value not in _USUAL]
        return " ".join(["w2s", self.work, *told])


@dataclass(frozen=True, kw_only=True)
class PlanSearchConfig(PlanConfig):
    """A search to be planned."""

    policy: Annotated[str, arg(metavar="DIR|FILE|ID")]
    """Model that writes: a folder, a config.json, or an id on the hub; no weights are read."""
    tuned: Annotated[str, arg(metavar="DIR|FILE|ID")]
    """The guide's tuned model."""
    untuned: Annotated[str | None, arg(metavar="DIR|FILE|ID")] = None
    """The guide's untuned model, by default of the tuned model's shape."""
    policy_rules: Annotated[str, arg(metavar="RULES")] = "search"
    """How the mesh splits the policy, as of `w2s search`."""
    guide_rules: Annotated[str, arg(metavar="RULES")] = "search"
    """How the mesh splits the guide."""
    beam_width: Annotated[int, arg(aliases=["--w"])] = 2
    """W, hypotheses kept."""
    successors: Annotated[int, arg(aliases=["--k"])] = 2
    """K, successors sampled from each hypothesis."""
    chunk_length: Annotated[int, arg(aliases=["--l"])] = 30
    """L, tokens in a chunk."""
    prompt_tokens: int = 512
    """Tokens of the longest prompt."""
    max_new_tokens: int = 2048
    """Tokens of the longest response."""
    batch_size: int = 16
    """Prompts searched side by side."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the weights."""
    quantise_policy: Annotated[str | None, arg(metavar="SPEC")] = None
    """Hold the policy's weights in int8 or int4, as of `w2s search`."""
    policy_cache: Literal["auto", "int8"] = "auto"
    """What the policy's keys and values are kept as."""

    work = "search"
    run_flags = (
        "batch_size", "beam_width", "successors", "chunk_length", "max_new_tokens", "dtype",
        "policy_rules", "guide_rules", "quantise_policy", "policy_cache",
    )  # fmt: skip
    sizes = (
        "beam_width", "successors", "chunk_length", "prompt_tokens", "max_new_tokens", "batch_size",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlanTrainingConfig(PlanConfig):
    """A training to be planned: one of both kinds."""

    model: Annotated[str, arg(metavar="DIR|FILE|ID")]
    """Model to train: a folder, a config.json, or an id on the hub; no weights are read."""
    batch_size: int = 16
    """Examples of a step, in pairs for dpo."""
    accumulate: int = 1
    """Cut a step into so many micro-batches."""
    max_length: int = 2048
    """Tokens of an example, prompt and response."""
    lora_rank: int | None = None
    """Train LoRA adapters of this rank on a frozen base, in place of all parameters."""
    remat: Literal["none", "full", "dots"] = "full"
    """What a backward pass computes again."""
    optimizer: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    """The optimizer, as of `w2s sft`."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What is computed in; trained parameters stay float32."""

    work: ClassVar[Literal["sft", "dpo"]]
    run_flags = (
        "batch_size", "accumulate", "max_length", "remat", "optimizer", "dtype", "lora_rank",
    )  # fmt: skip
    sizes = ("batch_size", "accumulate")

    @property
    def counts(self) -> tuple[str, ...]:
        """The fields that hold sizes; a rank of 0 is left to `LoraConfig`."""
        return (*self.sizes, "lora_rank") if self.lora_rank else self.sizes

    def command(self, mesh: str) -> str:
        """The command that runs what was planned, which was compiled with stacked layers."""
        return f"{super().command(mesh)} --scan-layers"


@dataclass(frozen=True, kw_only=True)
class PlanSFTConfig(PlanTrainingConfig):
    """A step of `w2s sft` to be planned."""

    work = "sft"


@dataclass(frozen=True, kw_only=True)
class PlanDPOConfig(PlanTrainingConfig):
    """A step of `w2s dpo` to be planned, for which the reference's log-probs are precomputed."""

    work = "dpo"


@dataclass(frozen=True, kw_only=True)
class PlanMatrixConfig:
    """The cells of a table of plans, and its files."""

    only: Annotated[str, arg(metavar="WORDS")] = ""
    """Only these cells, as v5e,70B,dpo,lora: words of a kind add up, of different kinds narrow."""
    out: Annotated[str | None, arg(metavar="FILE")] = None
    """Write the table to FILE in Markdown; rows that it holds are not planned again."""
    json: Annotated[str | None, arg(metavar="FILE")] = None
    """Write all figures to FILE as JSON; rows that it holds are not planned again."""
    tries: Annotated[int, arg(name="try", metavar="N")] = 2
    """Meshes of a slice that are compiled before a larger slice is tried, the likeliest first."""
