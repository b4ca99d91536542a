"""`w2s plan`: what a search or a training takes of a TPU slice or of GPUs that are not here."""

import json
import sys
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from tyro.conf import arg

from w2s_jax.errors import InputError
from w2s_jax.ops.meshes import AUTO, check_named
from w2s_jax.train.setup import check_length

if TYPE_CHECKING:
    from pathlib import Path

    from w2s_jax.plan.matrix import Cell
    from w2s_jax.plan.measure import Plan
    from w2s_jax.plan.programs import SearchShapes
    from w2s_jax.plan.trials import Found
    from w2s_jax.train.estimate import TrainingShapes

MOST = 2**31
"""Rows and counts stay below; sizes of arrays beyond int64 end in an OverflowError."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What every plan is told, and what becomes of it."""

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
    json: Annotated[str | None, arg(metavar="FILE")] = None
    """Also write the figures to FILE as JSON."""

    def run(self) -> None:
        """Compile and print, and exit with 1 if it does not fit; InputError for what is wrong."""
        from w2s_jax.plan.topology import leave_accelerators

        leave_accelerators()
        from rich.console import Console

        from w2s_jax.plan.measure import show
        from w2s_jax.plan.trials import Found, show_found
        from w2s_jax.text.rows import check_writable, write_whole

        self.check()
        if self.json is not None:
            check_writable(self.json)
        found = self.find()
        best = found.best if isinstance(found, Found) else found if found.fits else None
        if isinstance(found, Found):
            show_found(Console(), found)
        else:
            show(Console(), found)
        if best is not None:
            Console().print(self.told(best.mesh), soft_wrap=True, highlight=False)
        if self.json is not None:
            write_whole(self.json, [json.dumps(found.as_row(), indent=2).encode(), b"\n"])
        if best is None:
            sys.exit(1)

    def check(self) -> None:
        """Raise InputError for a wrong topology, and for flags that do not go together."""
        from w2s_jax.ops.sharding import slice_count
        from w2s_jax.plan.topology import check_topology, family_of

        family = family_of(self.topology)
        if family is None:
            check_topology(self.topology)
        check_named(self.mesh)
        if self.search_mesh and self.mesh != AUTO:
            raise InputError("--search-mesh looks for what --mesh names; give one of them")
        if self.tries is not None and family is None and not self.search_mesh:
            raise InputError("--try goes with --search-mesh or with a topology such as v5e:auto")
        if self.tries is not None and self.tries < 1:
            raise InputError(f"--try is {self.tries}; it must be at least 1")
        if family is not None and self.mesh != AUTO and slice_count(self.mesh) > 1:
            raise InputError(
                f"--topology {self.topology} looks for one slice, and --mesh {self.mesh} is for "
                "several; name the slice"
            )

    def find(self) -> "Found | Plan":
        """One plan, or all that was tried, with lines on stderr for what is being compiled."""
        from w2s_jax.plan.meshes import preset_mesh
        from w2s_jax.plan.topology import check_compiler, family_of
        from w2s_jax.plan.trials import TRIED, Trying, plan_on, search_meshes, smallest_slice

        shapes, family = self.shapes(), family_of(self.topology)
        check_compiler(family or self.topology)

        mesh = None if self.mesh == AUTO else self.mesh
        trying = Trying(self.tries or TRIED, mesh, not self.search_mesh, tell=_tell)
        if family is not None:
            return smallest_slice(lambda _: (shapes,), family, trying)
        if self.search_mesh:
            return search_meshes(shapes, self.topology, trying)
        mesh = preset_mesh(shapes, self.topology) if mesh is None else mesh
        return plan_on(shapes, self.topology, mesh, _tell)

    @abstractmethod
    def shapes(self) -> "SearchShapes | TrainingShapes":
        """The models and the settings; InputError for what is wrong."""

    @abstractmethod
    def told(self, mesh: str) -> str:
        """The flags of the command that runs what was planned, where defaults are others."""


@dataclass(frozen=True, kw_only=True)
class PlanSearch(Planned):
    """Compile a search for a TPU slice or for GPUs of a host, on any machine, without weights.

    Prints what each device holds, what each program needs beside it, what devices exchange, and an
    estimate of the speed. Exits with 1 where it does not fit. Needs libtpu (pip install
    'w2s-jax[tpu]'), for GPUs jax's CUDA plugin ('w2s-jax[cuda]').
    """

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

    def shapes(self) -> "SearchShapes":
        """The models and the settings; InputError for what is wrong."""
        from w2s_jax.models.quantize import read_quantize
        from w2s_jax.ops.sharding import parse_rules
        from w2s_jax.plan.programs import GuideShapes, SearchShapes, shape_of
        from w2s_jax.search.config import cbs

        beam = (self.beam_width, self.successors, self.chunk_length)
        _check_counts(
            dict(zip(("--w", "--k", "--l"), beam, strict=True))
            | {
                "--prompt-tokens": self.prompt_tokens,
                "--max-new-tokens": self.max_new_tokens,
                "--batch-size": self.batch_size,
            }
        )
        rows = self.beam_width * self.successors * self.batch_size
        if rows >= MOST:
            raise InputError(
                f"--w {self.beam_width} times --k {self.successors} times --batch-size "
                f"{self.batch_size} are {rows} rows; there must be less than {MOST}"
            )
        names = {"policy": self.policy, "tuned": self.tuned, "untuned": self.untuned or self.tuned}
        models = {role: shape_of(name) for role, name in names.items()}
        for role, model in models.items():
            if self.prompt_tokens + self.max_new_tokens > model.max_positions:
                raise InputError(
                    f"--prompt-tokens {self.prompt_tokens} and --max-new-tokens "
                    f"{self.max_new_tokens} exceed the {model.max_positions} positions of {role}, "
                    f"{names[role]}"
                )
        return SearchShapes(
            models["policy"],
            (GuideShapes(models["tuned"], models["untuned"]),),
            config=cbs(*beam, max_new_tokens=self.max_new_tokens, policy_cache=self.policy_cache),
            prompt_tokens=self.prompt_tokens,
            slots=self.batch_size,
            dtype=self.dtype,
            policy_rules=parse_rules(self.policy_rules),
            guide_rules=parse_rules(self.guide_rules),
            quantize=read_quantize(self.quantise_policy) if self.quantise_policy else None,
        )

    def told(self, mesh: str) -> str:
        """Flags of `w2s search`."""
        flags = {
            "mesh": mesh,
            "batch-size": self.batch_size,
            "w": self.beam_width,
            "k": self.successors,
            "l": self.chunk_length,
            "max-new-tokens": self.max_new_tokens,
            "dtype": self.dtype,
            "policy-rules": self.policy_rules,
            "guide-rules": self.guide_rules,
            "quantise-policy": self.quantise_policy,
            "policy-cache": self.policy_cache,
        }
        usual = {"search", "auto", None}
        return _command("search", {name: to for name, to in flags.items() if to not in usual})


@dataclass(frozen=True, kw_only=True)
class PlanTraining(Planned):
    """What plans of both trainings are told."""

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

    objective: ClassVar[Literal["sft", "dpo"]] = "sft"

    def shapes(self) -> "TrainingShapes":
        """The model and the settings; InputError for what is wrong."""
        from w2s_jax.models.lora import LoraConfig
        from w2s_jax.plan.programs import shape_of
        from w2s_jax.train.estimate import TrainingShapes
        from w2s_jax.train.step import OptimizerConfig

        counts = {"--batch-size": self.batch_size, "--accumulate": self.accumulate}
        _check_counts(counts | ({"--lora-rank": self.lora_rank} if self.lora_rank else {}))
        model = shape_of(self.model)
        check_length(self.max_length, model, self.model)
        return TrainingShapes(
            model=model,
            objective=self.objective,
            rows=self.batch_size,
            length=self.max_length,
            accumulate=self.accumulate,
            lora=None if self.lora_rank is None else LoraConfig(rank=self.lora_rank),
            dtype=self.dtype,
            remat=self.remat,
            optimizer=OptimizerConfig(optimizer=self.optimizer),
        )

    def told(self, mesh: str) -> str:
        """Flags of the training."""
        flags = {
            "mesh": mesh,
            "batch-size": self.batch_size,
            "accumulate": self.accumulate,
            "max-length": self.max_length,
            "remat": self.remat,
            "optimizer": self.optimizer,
            "dtype": self.dtype,
        } | ({} if self.lora_rank is None else {"lora-rank": self.lora_rank})
        return f"{_command(self.objective, flags)} --scan-layers"


@dataclass(frozen=True, kw_only=True)
class PlanSFT(PlanTraining):
    """Compile a step of `w2s sft` for a TPU slice or for GPUs of a host, without weights.

    Prints what each device holds and needs beside it, what devices exchange, and an estimate of the
    speed. Exits with 1 where it does not fit. Needs libtpu (pip install 'w2s-jax[tpu]'), for GPUs
    jax's CUDA plugin ('w2s-jax[cuda]').
    """


@dataclass(frozen=True, kw_only=True)
class PlanDPO(PlanTraining):
    """Compile a step of `w2s dpo` for a TPU slice or for GPUs of a host, without weights.

    The reference's log-probs are precomputed. Prints what each device holds and needs beside it,
    what devices exchange, and an estimate of the speed. Exits with 1 where it does not fit. Needs
    libtpu (pip install 'w2s-jax[tpu]'), for GPUs jax's CUDA plugin ('w2s-jax[cuda]').
    """

    objective: ClassVar[Literal["sft", "dpo"]] = "dpo"


@dataclass(frozen=True, kw_only=True)
class PlanMatrix:
    """Plan v5e, v5p and v6e, 8B and 70B, search, sft and dpo, with LoRA and in full.

    Each on the smallest slice that fits. Takes an hour or more; a row is written when it is done,
    and a run with the same files goes on where one was stopped. Needs libtpu: pip install
    'w2s-jax[tpu]'.
    """

    only: Annotated[str, arg(metavar="WORDS")] = ""
    """Only these cells, as v5e,70B,dpo,lora: words of a kind add up, of different kinds narrow."""
    out: Annotated[str | None, arg(metavar="FILE")] = None
    """Write the table to FILE in Markdown; rows that it holds are not planned again."""
    json: Annotated[str | None, arg(metavar="FILE")] = None
    """Write all figures to FILE as JSON; rows that it holds are not planned again."""
    tries: Annotated[int, arg(name="try", metavar="N")] = 2
    """Meshes of a slice that are compiled before a larger slice is tried, the likeliest first."""

    def run(self) -> None:
        """Plan what the files lack, and exit with 1 where a cell failed."""
        from w2s_jax.plan.topology import check_compiler, leave_accelerators

        leave_accelerators()
        from contextlib import ExitStack
        from pathlib import Path

        from w2s_jax.plan.matrix import FAMILIES, cells
        from w2s_jax.text.journal import locked

        if self.tries < 1:
            raise InputError(f"--try is {self.tries}; it must be at least 1")
        asked = cells(self.only)
        table, figures = (Path(name) if name else None for name in (self.out, self.json))
        if table and figures and table.resolve() == figures.resolve():
            raise InputError(f"--out and --json are both {self.json}; name two files")
        check_compiler(FAMILIES[0])
        with ExitStack() as locks:
            for path in filter(None, (table, figures)):
                locks.enter_context(locked(path))
            failed = self._plan(asked, table, figures)
        if failed:
            _tell(f"failed: {', '.join(failed)}")
            sys.exit(1)

    def _plan(self, asked: "list[Cell]", table: "Path | None", figures: "Path | None") -> list[str]:
        """Plan the cells that the files lack, and print the table; the cells that failed."""
        from w2s_jax.plan.matrix import cells, compiler_of, open_records, plan_cells, settings_of
        from w2s_jax.plan.trials import Trying

        order = cells()
        records = open_records(table, figures, compiler_of(), settings_of(self.tries))
        lacking = [cell for cell in asked if records.lacks(cell)]
        _tell(f"{len(asked) - len(lacking)} of {len(asked)} cells are there")
        trying = Trying(self.tries, tell=_tell)
        failed = plan_cells(lacking, trying, lambda row: records.keep(row, order))
        print(records.text([cell.name for cell in asked]), end="")
        return failed


def _check_counts(counts: dict[str, int]) -> None:
    """Raise InputError for a flag's number that is below 1, or too large to be a size of arrays."""
    for flag, count in counts.items():
        if count < 1:
            raise InputError(f"{flag} is {count}; it must be at least 1")
        if count >= MOST:
            raise InputError(f"{flag} is {count}; it must be less than {MOST}")


def _command(word: str, flags: Mapping[str, object]) -> str:
    return f"to run it: w2s {word} " + " ".join(f"--{name} {to}" for name, to in flags.items())


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
