"""Plans: the programs of a search or a training compiled for a slice, with one or several meshes.

Meshes of a slice are tried one after the other, and slices of a family from the smallest up.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from w2s_jax.errors import InputError
from w2s_jax.models.lora import LoraConfig
from w2s_jax.models.quantize import read_quantize
from w2s_jax.ops.meshes import AUTO, check_named
from w2s_jax.ops.sharding import make_mesh, mesh_shape, parse_rules, slice_count
from w2s_jax.plan.compiled import Measured, measure
from w2s_jax.plan.config import MOST, PlanConfig, PlanSearchConfig, PlanTrainingConfig
from w2s_jax.plan.meshes import Candidate, candidates, preset_mesh
from w2s_jax.plan.programs import GuideShapes, SearchShapes, Shapes, programs_on, shape_of
from w2s_jax.plan.topology import (
    GPU_SHARE,
    check_compiler,
    check_topology,
    chip_of,
    device_count,
    family_of,
    open_slice,
    topologies,
)
from w2s_jax.search.config import cbs
from w2s_jax.train.config import OptimizerConfig
from w2s_jax.train.estimate import TrainingShapes
from w2s_jax.train.setup import check_length

GIB = 2**30
TRIED = 4
"""Meshes of a slice that are compiled by default."""
LISTED = 12
"""Meshes that were not compiled and are listed; further ones are only counted."""

Tell = Callable[[str], None]
Compile = Callable[[Shapes, str, str, Tell], "Plan"]
"""(shapes, topology, mesh, tell) -> plan."""


@dataclass(frozen=True)
class Plan:
    """A search or a training on a slice.

    Attributes:
        topology: The slice.
        mesh: The mesh's spec.
        devices: Number of devices.
        memory: Bytes that programs may have on each device.
        resident_bytes: Bytes on each device between programs, by name.
        programs: The compiled programs.
        fits: Whether every program compiles, and resident bytes and each program's temporaries fit.
        seconds: Estimated time of a batch of prompts, from prefill to the last chunk, or of a step.
        tokens_per_second: Estimated speed.
    """

    topology: str
    mesh: str
    devices: int
    memory: float
    resident_bytes: Mapping[str, int]
    programs: tuple[Measured, ...]
    fits: bool
    seconds: float
    tokens_per_second: float

    @property
    def best(self) -> "Plan | None":
        """The plan itself if it fits, else None."""
        return self if self.fits else None

    @property
    def held(self) -> int:
        """Bytes on each device between programs."""
        return sum(self.resident_bytes.values())

    @property
    def temporaries(self) -> int:
        """Bytes that the largest program takes beside what is held; 0 if all are refused."""
        return max((one.temporary for one in self.programs), default=0)

    @property
    def needed(self) -> int:
        """Bytes on each device, held and temporaries."""
        return self.held + self.temporaries

    @property
    def refusal(self) -> str | None:
        """Why the compiler refuses a program, in its words; None if it compiles all."""
        return next((one.refusal for one in self.programs if one.refusal), None)

    @property
    def compile_seconds(self) -> float:
        """Time that compiling took, including refused programs."""
        return sum((one.compile_seconds for one in self.programs), 0.0)

    @property
    def moved(self) -> float:
        """Bytes that each device sends in one call of every program."""
        return sum((x.moved for one in self.programs for x in one.exchanges), 0.0)

    def as_row(self) -> dict[str, Any]:
        """The plan as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Trials:
    """What was tried on a slice.

    Attributes:
        topology: The slice.
        devices: Number of devices.
        plans: Compiled plans, the best first: those that fit before others, then by tokens per
            second.
        skipped: Meshes that were not compiled, with reasons.
        choice: Index of the shapes that were tried, if there are several.
    """

    topology: str
    devices: int
    plans: tuple[Plan, ...]
    skipped: tuple[Candidate, ...]
    choice: int = 0

    @property
    def best(self) -> Plan | None:
        """The best plan that fits; None if none does."""
        return self.plans[0] if self.plans and self.plans[0].fits else None


@dataclass(frozen=True)
class Found:
    """Slices in the order in which they were tried; the search ended with the last one."""

    slices: tuple[Trials, ...]

    @property
    def best(self) -> Plan | None:
        """The plan looked for; None if nothing fits."""
        return self.slices[-1].best

    def as_row(self) -> dict[str, Any]:
        """All of it as JSON."""
        best = self.best
        return {
            "fits": best is not None,
            "topology": best and best.topology,
            "mesh": best and best.mesh,
            "slices": [asdict(one) for one in self.slices],
        }


def plan_as_set(config: PlanConfig, tell: Tell) -> Plan | Found:
    """One plan, or all that was tried; see `w2s_jax.plan.plan`."""
    _check(config)
    shapes, family = shapes_of(config), family_of(config.topology)
    check_compiler(family or config.topology)
    mesh = None if config.mesh == AUTO else config.mesh
    trying = Trying(config.tries or TRIED, mesh, not config.search_mesh, tell=tell)
    if family is not None or config.search_mesh:
        slices = [config.topology] if family is None else topologies(family)
        return try_slices(lambda _: (shapes,), slices, trying)
    return plan_on(shapes, config.topology, mesh or preset_mesh(shapes, config.topology), tell)


def _check(config: PlanConfig) -> None:
    """Raise InputError for a wrong topology, and for settings that exclude each other."""
    family = family_of(config.topology)
    if family is None:
        check_topology(config.topology)
    check_named(config.mesh)
    if config.search_mesh and config.mesh != AUTO:
        raise InputError("--search-mesh looks for what --mesh names; give one of them")
    if config.tries is not None and family is None and not config.search_mesh:
        raise InputError("--try goes with --search-mesh or with a topology such as v5e:auto")
    if config.tries is not None and config.tries < 1:
        raise InputError(f"--try is {config.tries}; it must be at least 1")
    if family is not None and config.mesh != AUTO and slice_count(config.mesh) > 1:
        raise InputError(
            f"--topology {config.topology} looks for one slice, and --mesh {config.mesh} is for "
            "several; name the slice"
        )


def shapes_of(config: PlanConfig) -> Shapes:
    """The models of a plan with its settings.

    Raises:
        InputError: For a wrong setting.
    """
    config.check_counts()
    if isinstance(config, PlanSearchConfig):
        return _search_shapes(config)
    assert isinstance(config, PlanTrainingConfig)
    model = shape_of(config.model)
    check_length(config.max_length, model, config.model)
    return TrainingShapes(
        model=model,
        objective=config.work,
        rows=config.batch_size,
        length=config.max_length,
        accumulate=config.accumulate,
        lora=None if config.lora_rank is None else LoraConfig(rank=config.lora_rank),
        dtype=config.dtype,
        remat=config.remat,
        optimizer=OptimizerConfig(optimizer=config.optimizer),
    )


def _search_shapes(config: PlanSearchConfig) -> SearchShapes:
    rows = config.beam_width * config.successors * config.batch_size
    if rows >= MOST:
        raise InputError(
            f"--w {config.beam_width} times --k {config.successors} times --batch-size "
            f"{config.batch_size} are {rows} rows; there must be less than {MOST}"
        )
    tokens, new = config.prompt_tokens, config.max_new_tokens
    names = {"policy": config.policy, "tuned": config.tuned}
    names["untuned"] = config.untuned or config.tuned
    models = {role: shape_of(name) for role, name in names.items()}
    for role, model in models.items():
        if tokens + new > model.max_positions:
            raise InputError(
                f"--prompt-tokens {tokens} and --max-new-tokens {new} exceed the "
                f"{model.max_positions} positions of {role}, {names[role]}"
            )
    beam = (config.beam_width, config.successors, config.chunk_length)
    return SearchShapes(
        models["policy"],
        (GuideShapes(models["tuned"], models["untuned"]),),
        config=cbs(*beam, max_new_tokens=new, policy_cache=config.policy_cache),
        prompt_tokens=tokens,
        slots=config.batch_size,
        dtype=config.dtype,
        policy_rules=parse_rules(config.policy_rules),
        guide_rules=parse_rules(config.guide_rules),
        quantize=read_quantize(config.quantise_policy) if config.quantise_policy else None,
    )


def plan_on(shapes: Shapes, topology: str, mesh: str, tell: Tell) -> Plan:
    """Compile a search or a training for a topology and a mesh; raises as its parts do.

    `tell` is called before each program is compiled. Of identical programs (twins) one is compiled.
    """
    place = open_slice(topology, slice_count(mesh))
    found = programs_on(shapes, make_mesh(mesh, place.devices))
    measured: dict[str, Measured] = {}
    for program in found.programs:
        if program.twin is not None:
            twin = replace(measured[program.twin], name=program.name, compile_seconds=0.0)
            measured[program.name] = twin
            continue
        tell(f"compiling {program.name} for {place.name}")
        measured[program.name] = measure(program, place, found.wholes)
    seconds = sum(measured[one.name].seconds * one.times for one in found.programs)
    plan = Plan(
        topology=place.name,
        mesh=mesh,
        devices=len(place.devices),
        memory=float(place.chip.memory),
        resident_bytes=dict(found.resident_bytes),
        programs=tuple(measured.values()),
        fits=False,
        seconds=seconds,
        tokens_per_second=0.0,
    )
    if plan.refusal is not None:
        return plan
    speed = found.tokens / seconds if seconds else 0.0
    return replace(plan, fits=plan.needed <= place.chip.memory, tokens_per_second=speed)


@dataclass(frozen=True)
class Trying:
    """How slices are tried.

    Attributes:
        tries: Meshes of a slice that are compiled.
        mesh: The only mesh to try; None for all.
        first: Whether to stop at the first mesh that fits.
        guess: Whether to skip meshes that are estimated to need too much memory, in addition to
            those that certainly do.
        compile_as: Makes the plan of one mesh.
        tell: Called with a line on every step.
    """

    tries: int = TRIED
    mesh: str | None = None
    first: bool = False
    guess: bool = False
    compile_as: Compile = plan_on
    tell: Tell = lambda _: None


def try_slices(
    shapes: Callable[[int], Sequence[Shapes]], slices: Sequence[str], trying: Trying = Trying()
) -> Found:
    """Try slices, the smallest first, each with its likeliest meshes, until one fits.

    Compiled meshes are ranked by the compiler's figures. Meshes that `candidates` excludes are not
    compiled; slices without other meshes are skipped.

    Args:
        shapes: The shapes for a number of devices: one or several, in the order to try them.
        slices: Topologies.
        trying: How many meshes of each are compiled, and which.

    Raises:
        InputError: If no mesh of any slice divides the arrays, so that the shapes themselves are
            wrong.
    """
    found: list[Trials] = []
    for topology in slices:
        for choice, one in enumerate(shapes(device_count(topology))):
            found.append(replace(_try(one, topology, trying), choice=choice))
            if found[-1].best is not None:
                return Found(tuple(found))
    skipped = [one for trials in found for one in trials.skipped]
    # If no mesh could be judged at all, the fault is not one of memory.
    judged = any(one.resident_bytes is not None for one in skipped)
    if not judged and not any(trials.plans for trials in found):
        last = found[-1]
        raise InputError(f"{last.topology}: no mesh: {last.skipped[0].why}")
    return Found(tuple(found))


def _try(shapes: Shapes, topology: str, trying: Trying) -> Trials:
    devices, tell = device_count(topology), trying.tell
    tell(f"{topology}: judging its meshes")
    judged = _judged(shapes, topology, devices, trying)
    possible = [one for one in judged if one.why is None]
    ruled_out = [one for one in judged if one.why is not None]
    if not possible:
        tell(f"{topology}: nothing to compile: {ruled_out[0].mesh} {ruled_out[0].why}")
    plans: list[Plan] = []
    for one in possible[: trying.tries]:
        count = f"{len(plans) + 1} of {min(trying.tries, len(possible))}"
        tell(f"{topology}: mesh {count}, {one.mesh}")
        plans.append(trying.compile_as(shapes, topology, one.mesh, tell))
        tell(f"{topology}: {one.mesh} {_verdict(plans[-1])}")
        if trying.first and plans[-1].fits:
            break
    done = trying.first and any(plan.fits for plan in plans)
    why = "not tried: another fits" if done else f"not tried: --try {trying.tries}"
    rest = [replace(one, why=why) for one in possible[len(plans) :]]
    return Trials(topology, devices, tuple(ranked(plans)), (*rest, *ruled_out))


def _judged(shapes: Shapes, topology: str, devices: int, trying: Trying) -> list[Candidate]:
    among, chip = None, chip_of(topology)
    if trying.mesh is not None:
        try:
            among = [mesh_shape(trying.mesh, devices)]
        except InputError as error:
            return [Candidate(trying.mesh, why=str(error))]
    found = candidates(shapes, chip, devices, among)
    if not trying.guess:
        return found
    return [
        replace(one, why=f"would take some {one.needed / GIB:.0f} GiB")
        if one.why is None and one.needed > chip.memory
        else one
        for one in found
    ]


def ranked(plans: Sequence[Plan]) -> list[Plan]:
    """Plans, the best first: those that fit, then by tokens per second, then by least memory."""
    return sorted(plans, key=lambda one: (not one.fits, -one.tokens_per_second, one.needed))


def _verdict(plan: Plan) -> str:
    if plan.fits:
        return f"fits, {plan.tokens_per_second:,.0f} tokens a second"
    return f"does not fit{': ' + plan.refusal if plan.refusal else ''}"


def gib(size: float) -> str:
    """Bytes in GiB, as in tables."""
    return f"{size / GIB:.2f}"


def show(console: Console, found: Plan | Found) -> None:
    """Print a plan as tables; of several tried, each in short and the best in full."""
    if isinstance(found, Plan):
        _show_plan(console, found)
        return
    for trials in found.slices:
        _show_trials(console, trials)
    if found.best is not None:
        _show_plan(console, found.best)
    else:
        tried = ", ".join(one.topology for one in found.slices)
        console.print(f"nothing that was tried fits: {tried}")


def _show_plan(console: Console, plan: Plan) -> None:
    title = f"{plan.topology}, {plan.devices} devices, --mesh {plan.mesh}"
    console.print(title, soft_wrap=True, highlight=False)
    beside, needed = gib(plan.temporaries), gib(plan.needed)
    if plan.refusal:
        beside, needed = "refused", f"> {gib(plan.memory)}"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    rows = [(name, gib(size)) for name, size in plan.resident_bytes.items()]
    held = _table(("held on each device", "GiB"), [*rows, ("temporaries, the largest", beside)])
    held.add_section()
    held.add_row(f"of {gib(plan.memory)} GiB: {verdict}", needed)
    console.print(held)
    calls = ("a call of", "GiB in", "GiB beside", "TFLOP", "GiB read", "MiB sent", "estimate")
    console.print(_table(calls, map(_call_of, plan.programs)))
    sent = [
        (one.name, x.kind, f"{x.count:,}", f"{x.moved / 2**20:,.1f}")
        for one in plan.programs
        for x in one.exchanges
    ]
    exchanges = ("exchanges of a call of", "kind", "times", "MiB sent by each device")
    console.print(_table(exchanges, sent))
    console.print(f"compiled in {plan.compile_seconds:.0f} s")
    if chip_of(plan.topology).platform == "cuda":
        share = f"XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_SHARE}"
        console.print(
            f"of the memory that {share} lets jax take; workspaces of libraries not counted"
        )
    for one in plan.programs:
        if one.gathered:
            console.print(f"{one.name}: a loop gathers whole: {', '.join(one.gathered)}")
    if plan.tokens_per_second:
        console.print(
            f"estimate, from published rates of the chip: {plan.tokens_per_second:,.0f} tokens a "
            f"second, {plan.seconds:,.1f} s for a batch"
        )


def _call_of(one: Measured) -> tuple[str, ...]:
    """A program as cells: memory, FLOPs, bytes, and the time of a call."""
    if one.refusal:
        return (one.name, one.refusal)
    return (
        one.name,
        gib(one.arguments),
        gib(one.temporary),
        f"{one.operations / 1e12:.2f}",
        f"{one.reads / GIB:.1f}",
        f"{sum(x.moved for x in one.exchanges) / 2**20:,.0f}",
        f"{1e3 * one.seconds:,.0f} ms",
    )


def _show_trials(console: Console, trials: Trials) -> None:
    about = f"{trials.topology}, {trials.devices} devices: meshes"
    mesh = Column("--mesh", no_wrap=True)
    head = ("", mesh, "GiB held", "beside", "both", "", "tokens/s", "compiled")
    rows = [(str(rank), *_compiled(plan)) for rank, plan in enumerate(trials.plans, 1)]
    if rows:
        console.print(_table(head, rows, f"{about} compiled"))
    if not trials.skipped:
        return
    held = ["" if x.resident_bytes is None else gib(x.resident_bytes) for x in trials.skipped]
    skipped = [(x.mesh, size, x.why) for x, size in zip(trials.skipped, held, strict=True)]
    short = (Column("--mesh", no_wrap=True), "GiB held", "why")
    console.print(_table(short, skipped[:LISTED], f"{about} not compiled"))
    if len(skipped) > LISTED:
        console.print(f"and {len(skipped) - LISTED} more; --json holds all")


def _compiled(plan: Plan) -> tuple[str, ...]:
    """A plan as cells: mesh, held, temporaries, both, fits or why not, tokens/s, time."""
    spent = f"{plan.compile_seconds:.0f} s"
    if plan.refusal:
        return plan.mesh, gib(plan.held), "", "", plan.refusal, "", spent
    verdict, speed = "fits" if plan.fits else "does not fit", f"{plan.tokens_per_second:,.0f}"
    sizes = map(gib, (plan.held, plan.temporaries, plan.needed))
    return plan.mesh, *sizes, verdict, speed, spent


def _table(
    head: Sequence[str | Column], rows: Iterable[Sequence[str | None]], title: str | None = None
) -> Table:
    table = Table(*head, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table
