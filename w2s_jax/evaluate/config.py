"""What an evaluation is asked: rewards of responses, a quantised policy, lm-eval's tasks.

Commands are made of these configs, so that a flag, a key of a YAML file and an argument in Python
are one field, declared here with its default and its help. Imports no jax, which `--help` would
wait for.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import UseAppendAction, arg

from w2s_jax.search.settings import GuidanceConfig, MethodConfig


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """How models are run, and where figures go."""

    json: Annotated[str | None, arg(metavar="FILE")] = None
    """The figures of the table as JSON."""
    batch_size: int = 16
    """Rows rewarded side by side."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; auto is as stored, but float32 on a CPU, where it is faster."""
    mesh: Annotated[str | None, arg(metavar="SPEC")] = None
    """Device mesh such as data=2,tensor=4; one axis may be -1."""
    seed: int = 0
    """Of the bootstrap, or of the search in a quantisation report."""

    @property
    def weights_dtype(self) -> str | None:
        """What loading takes: None leaves the choice to it."""
        return None if self.dtype == "auto" else self.dtype


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(MeasureConfig):
    """Which responses are rewarded, by which model, and how it reads them."""

    results: Annotated[str, arg(metavar="FILE")] = ""
    """Rows with a prompt and a "response", as search writes them, or AlpacaEval's JSON array."""
    reward_model: Annotated[str, arg(metavar="DIR|ID")] = ""
    """Checkpoint that rewards: a sequence classifier, UltraRM's or Starling-RM's layout."""
    against: Annotated[str | None, arg(metavar="FILE")] = None
    """Another such file with the same prompts in the same order."""
    template: Annotated[str, arg(metavar="NAME|FILE.jinja")] = "auto"
    """How the reward model reads a prompt: auto, none, chat, a published name, a .jinja file."""
    label: Annotated[str | None, arg(metavar="NAME|NUMBER")] = None
    """The label whose logit is the reward; of two labels, by default 1 minus 0."""
    end_token: bool = False
    """Put the template's end token behind every response."""
    cut: Literal["never", "start", "end"] = "never"
    """Side to drop tokens on where a row exceeds the model's positions; encoders drop the end."""
    output: Annotated[str | None, arg(metavar="FILE")] = None
    """Rows of RESULTS, JSON lines, each with its "gold_reward"."""


@dataclass(frozen=True, kw_only=True)
class QuantisationConfig(MeasureConfig):
    """What is measured of a policy, quantised and not."""

    quantisation_report: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """In place of rewards: what quantising this policy changes, on the texts of --data."""
    data: Annotated[str | None, arg(metavar="FILE")] = None
    """Texts for the quantisation report: rows with "text", or with "prompt" and "response"."""
    quantise: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="SPEC")]] = ()
    """A quantisation to report, as --quantise-policy of search takes it; by default int8, int4."""
    policy_cache: Literal["auto", "int8"] = "auto"
    """What quantised policies keep keys and values as; auto is the dtype of the weights."""
    tuned: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """A guide's tuned model, for the scores of a search with each policy."""
    untuned: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """The guide's untuned model."""
    beam_width: Annotated[int, arg(aliases=["--w"])] = 2
    """W of that search."""
    successors: Annotated[int, arg(aliases=["--k"])] = 2
    """K of that search."""
    chunk_length: Annotated[int, arg(aliases=["--l"])] = 5
    """L of that search."""
    max_length: int = 512
    """Tokens of each text that are read."""
    prompt_tokens: int = 32
    """Tokens of each text that are continued; at most half of it."""
    max_new_tokens: int = 32
    """Tokens of a continuation, and of a response in the search."""


@dataclass(frozen=True, kw_only=True)
class SteeredConfig(MethodConfig, GuidanceConfig):
    """A policy and what steers it, as an evaluation asks of it."""

    method: Literal["cbs", "bon", "eft", "ivg", "sample"] = "sample"
    """The policy alone (sample) or emulated fine-tuning; for tasks that generate also chunk-level
    beam search, best-of-N and integrated value guidance."""
    max_new_tokens: int = 256
    """Tokens of a generated text where a task names no number."""
    temperature: float = 0.7
    """Sampling temperature where a task samples and names none, and of all methods that choose
    among samples."""


@dataclass(frozen=True, kw_only=True)
class HarnessConfig(SteeredConfig):
    """Which of lm-eval's tasks are run, and how it asks them."""

    tasks: UseAppendAction[tuple[str, ...]]
    """A task, group or pattern of names; several with commas, or by giving the flag again."""
    include_path: Annotated[str | None, arg(metavar="DIR")] = None
    """Folder of further task files (YAML); theirs go before lm-eval's of the same name."""
    num_fewshot: int | None = None
    """Examples in front of each question; a task's own number where it is not given."""
    limit: float | None = None
    """Rows of each task, or a share of them below 1; for trying out."""
    apply_chat_template: bool = False
    """Write prompts by the policy's chat template, and those of the guides by theirs."""
    system_instruction: str | None = None
    """A system message in front of every prompt."""
    gen_kwargs: str | None = None
    """Generation arguments that go before the tasks' own: name=value, separated by commas."""
    use_cache: Annotated[str | None, arg(metavar="FILE")] = None
    """lm-eval's cache of answers; a run that was stopped goes on from it."""
    log_samples: bool = False
    """Put every prompt and answer into the output as well."""
    output: Annotated[str | None, arg(metavar="FILE")] = None
    """JSON of lm-eval's results."""
