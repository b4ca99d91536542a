"""`w2s plan`: what a search or a training takes of a TPU slice that is not here."""

import json
import sys
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from tyro.conf import arg

from w2s_jax.errors import InputError

if TYPE_CHECKING:
    from w2s_jax.plan.measure import Plan
    from w2s_jax.plan.programs import SearchShapes
    from w2s_jax.plan.training import TrainingShapes


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What every plan is told, and what becomes of it."""

    topology: Annotated[str, arg(metavar="NAME")] = "v5e:4x4"
    """Slice, as v5e:4x4, v6e:2x4 or v5p:4x4x4."""
    json: Annotated[str | None, arg(metavar="FILE")] = None
    """Also write the figures to FILE as JSON."""

    def run(self) -> None:
        """Compile and print, and exit with 1 if it does not fit; InputError for what is wrong."""
        from rich.console import Console

        from w2s_jax.plan.measure import show
        from w2s_jax.plan.topology import check_topology
        from w2s_jax.text.atomic import check_writable, write_whole

        check_topology(self.topology)
        if self.json is not None:
            check_writable(self.json)
        plan = self.plan()
        show(Console(), plan)
        if self.json is not None:
            write_whole(self.json, [json.dumps(plan.as_row(), indent=2).encode(), b"\n"])
        if not plan.fits:
            sys.exit(1)

    @abstractmethod
    def plan(self) -> "Plan":
        """The plan, with a line on stderr for each program that is compiled."""


@dataclass(frozen=True, kw_only=True)
class PlanSearch(Planned):
    """Compile a search for a TPU slice with the TPU compiler, on any machine, without weights.

    Prints what each chip holds, what each program needs beside it, what is exchanged between chips,
    and an estimate of the speed. Exits with 1 where it does not fit. Needs libtpu: pip install
    'w2s-jax[tpu]'.
    """

    policy: Annotated[str, arg(metavar="DIR|FILE|ID")]
    """Model that writes: a folder, a config.json, or an id on the hub; no weights are read."""
    tuned: Annotated[str, arg(metavar="DIR|FILE|ID")]
    """The guide's tuned model."""
    untuned: Annotated[str | None, arg(metavar="DIR|FILE|ID")] = None
    """The guide's untuned model, by default of the tuned model's shape."""
    mesh: Annotated[str | None, arg(metavar="SPEC")] = None
    """Device mesh such as data=2,tensor=8; by default as many tensor parts as the policy has
    key/value heads. dcn_data=2 plans for two such slices."""
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

    def plan(self) -> "Plan":
        """The plan, with a line on stderr for each program that is compiled."""
        from w2s_jax.ops.meshes import make_mesh, slice_count, spec_of
        from w2s_jax.plan.measure import plan_search
        from w2s_jax.plan.programs import search_programs
        from w2s_jax.plan.topology import open_slice

        shapes = self.shapes()
        place = open_slice(self.topology, slice_count(self.mesh or ""))
        spec = self.mesh
        if spec is None:
            tensor = min(shapes.policy.kv_heads, len(place.devices))
            spec = spec_of((len(place.devices) // tensor, 1, tensor))
        mesh = make_mesh(spec, place.devices)
        found = search_programs(shapes, mesh)

        def tell(name: str) -> None:
            print(f"compiling {name} for {place.name}", file=sys.stderr, flush=True)

        return plan_search(shapes, found, place, spec, tell)

    def shapes(self) -> "SearchShapes":
        """The models and the settings; InputError for what is wrong."""
        from w2s_jax.models.quantize import read_quantize
        from w2s_jax.ops.sharding import parse_rules
        from w2s_jax.plan.programs import SearchShapes
        from w2s_jax.plan.shapes import shape_of
        from w2s_jax.search.presets import cbs

        for flag, size in (
            ("--prompt-tokens", self.prompt_tokens),
            ("--batch-size", self.batch_size),
        ):
            if size < 1:
                raise InputError(f"{flag} is {size}; it must be at least 1")
        beam = (self.beam_width, self.successors, self.chunk_length)
        return SearchShapes(
            policy=shape_of(self.policy),
            tuned=shape_of(self.tuned),
            untuned=shape_of(self.untuned or self.tuned),
            config=cbs(*beam, max_new_tokens=self.max_new_tokens, policy_cache=self.policy_cache),
            prompt_tokens=self.prompt_tokens,
            slots=self.batch_size,
            dtype=self.dtype,
            policy_rules=parse_rules(self.policy_rules),
            guide_rules=parse_rules(self.guide_rules),
            quantize=read_quantize(self.quantise_policy) if self.quantise_policy else None,
        )


@dataclass(frozen=True, kw_only=True)
class PlanTraining(Planned):
    """What plans of both trainings are told."""

    model: Annotated[str, arg(metavar="DIR|FILE|ID")]
    """Model to train: a folder, a config.json, or an id on the hub; no weights are read."""
    mesh: Annotated[str, arg(metavar="SPEC")] = "fsdp=-1"
    """Device mesh such as fsdp=8,tensor=2; dcn_data=2 plans for two such slices."""
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

    def plan(self) -> "Plan":
        """The plan of one step."""
        from w2s_jax.ops.meshes import make_mesh, slice_count
        from w2s_jax.plan.measure import plan_training
        from w2s_jax.plan.topology import open_slice
        from w2s_jax.plan.training import training_program

        shapes = self.shapes()
        place = open_slice(self.topology, slice_count(self.mesh))
        found = training_program(shapes, make_mesh(self.mesh, place.devices))
        print(f"compiling the training step for {place.name}", file=sys.stderr, flush=True)
        return plan_training(shapes, found, place, self.mesh)

    def shapes(self) -> "TrainingShapes":
        """The model and the settings; InputError for what is wrong."""
        from w2s_jax.models.lora import LoraConfig
        from w2s_jax.plan.shapes import shape_of
        from w2s_jax.plan.training import TrainingShapes
        from w2s_jax.train.optimizers import OptimizerConfig

        if self.max_length < 2:
            raise InputError(f"--max-length {self.max_length} is below 2")
        return TrainingShapes(
            model=shape_of(self.model),
            objective=self.objective,
            rows=self.batch_size,
            length=self.max_length,
            accumulate=self.accumulate,
            lora=None if self.lora_rank is None else LoraConfig(rank=self.lora_rank),
            dtype=self.dtype,
            remat=self.remat,
            optimizer=OptimizerConfig(name=self.optimizer),
        )


@dataclass(frozen=True, kw_only=True)
class PlanSFT(PlanTraining):
    """Compile a step of `w2s sft` for a TPU slice, on any machine, without weights.

    Prints what each chip holds and needs beside it, what is exchanged between chips, and an
    estimate of the speed. Exits with 1 where it does not fit. Needs libtpu: pip install
    'w2s-jax[tpu]'.
    """


@dataclass(frozen=True, kw_only=True)
class PlanDPO(PlanTraining):
    """Compile a step of `w2s dpo` for a TPU slice, on any machine, without weights.

    The reference's log-probs are precomputed. Prints what each chip holds and needs beside it, what
    is exchanged between chips, and an estimate of the speed. Exits with 1 where it does not fit.
    Needs libtpu: pip install 'w2s-jax[tpu]'.
    """

    objective: ClassVar[Literal["sft", "dpo"]] = "dpo"
