"""Programs compiled for a slice that is not here: memory, exchanges, an estimate of the time.

The compiler's own figures, but for the time, which follows from published rates of the chip.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from w2s_jax.plan.compiled import (
    BETWEEN_SLICES,
    Collective,
    collectives,
    gathers_of,
    matmul_operations,
)
from w2s_jax.plan.programs import Program, SearchPrograms, SearchShapes
from w2s_jax.plan.topology import GPU_SHARE, Slice, chip_of
from w2s_jax.plan.training import TrainingProgram
from w2s_jax.train.estimate import TrainingShapes

GIB = 2**30


@dataclass(frozen=True)
class Exchange:
    """All collectives of a kind: how many in a call, and the bytes that each device sends."""

    kind: str
    count: int
    moved: float


@dataclass(frozen=True)
class Measured:
    """What the compiler says of a program, in bytes of each device.

    arguments: weights, caches and all else that goes in; temporary: what is needed beside them.
    refusal: why it does not fit, in the compiler's words. operations: of matmuls, of one device's
    even share. seconds: the estimate of a call. gathered: weights and caches that a loop gathers
    whole.
    """

    name: str
    calls: int
    arguments: int = 0
    temporary: int = 0
    refusal: str | None = None
    operations: float = 0.0
    reads: float = 0.0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    exchanges: tuple[Exchange, ...] = ()
    gathered: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A search, or a training, on a slice.

    resident_bytes: of each device between programs, by name. seconds: the estimate of a batch of
    prompts, from prefill to the last chunk, or of a step. fits: every program compiles, and what is
    resident fits beside the temporaries of each.
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
    def temporaries(self) -> int:
        """Bytes that the neediest program takes beside what is held; 0 where all are refused."""
        return max((one.temporary for one in self.programs), default=0)

    @property
    def needed(self) -> int:
        """Bytes of each device, held and temporaries."""
        return sum(self.resident_bytes.values()) + self.temporaries

    @property
    def refusal(self) -> str | None:
        """Why the compiler refuses a program, in its words; None where it compiles all."""
        return next((one.refusal for one in self.programs if one.refusal), None)

    @property
    def compile_seconds(self) -> float:
        """What compiling took, refusals included."""
        return sum((one.compile_seconds for one in self.programs), 0.0)

    @property
    def moved(self) -> float:
        """Bytes that each device sends in one call of every program."""
        return sum((x.moved for one in self.programs for x in one.exchanges), 0.0)

    def as_row(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        return asdict(self)


def plan_search(
    shapes: SearchShapes,
    found: SearchPrograms,
    place: Slice,
    mesh: str,
    tell: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Compile every program of a search for a slice; `tell` hears of each before it is compiled.

    Of twins one is compiled.
    """
    measured: dict[str, Measured] = {}
    for program in found.programs:
        if program.twin is not None:
            again = replace(measured[program.twin], name=program.name, compile_seconds=0.0)
            measured[program.name] = again
            continue
        tell(f"compiling {program.name} for {place.name}")
        measured[program.name] = measure(program, place, found.wholes)
    chunks = shapes.config.chunks
    seconds = sum(one.seconds * (chunks * one.calls or shapes.slots) for one in measured.values())
    tokens = shapes.slots * shapes.config.max_new_tokens
    return _plan(place, mesh, found.resident_bytes, list(measured.values()), seconds, tokens)


def plan_training(
    shapes: TrainingShapes,
    found: TrainingProgram,
    place: Slice,
    mesh: str,
    tell: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Compile a training step for a slice; `tell` hears of it before."""
    tell(f"compiling the {found.program.name} for {place.name}")
    step = measure(found.program, place, {})
    return _plan(place, mesh, found.resident_bytes, [step], step.seconds, shapes.tokens)


def _plan(
    place: Slice,
    mesh: str,
    resident_bytes: Mapping[str, int],
    measured: Sequence[Measured],
    seconds: float,
    tokens: int,
) -> Plan:
    refused = any(one.refusal for one in measured)
    plan = Plan(
        topology=place.name,
        mesh=mesh,
        devices=len(place.devices),
        memory=float(place.chip.memory),
        resident_bytes=dict(resident_bytes),
        programs=tuple(measured),
        fits=not refused,
        seconds=seconds,
        tokens_per_second=0.0 if refused or not seconds else tokens / seconds,
    )
    return replace(plan, fits=plan.fits and plan.needed <= place.chip.memory)


def measure(program: Program, place: Slice, wholes: Mapping[str, tuple[int, ...]]) -> Measured:
    """Compile one program for a slice."""
    traced = program.trace()
    operations = matmul_operations(traced.jaxpr, program.loops) / len(place.devices)
    start = time.monotonic()
    try:
        compiled = traced.lower(lowering_platforms=(place.chip.platform,)).compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Measured(
            program.name,
            program.calls,
            refusal=_refusal(str(error)),
            compile_seconds=time.monotonic() - start,
        )
    spent = time.monotonic() - start
    used, exchanged = compiled.memory_analysis(), collectives(compiled.as_text(), program.loops)
    chip = place.chip
    moved = sum(one.moved for one in exchanged if one.kind != BETWEEN_SLICES)
    abroad = sum(one.moved for one in exchanged if one.kind == BETWEEN_SLICES)
    return Measured(
        name=program.name,
        calls=program.calls,
        arguments=used.argument_size_in_bytes,
        temporary=used.temp_size_in_bytes
        + max(0, used.output_size_in_bytes - used.alias_size_in_bytes),
        operations=operations,
        reads=program.reads,
        # Two links of a ring carry at once; nothing is assumed to overlap with the exchange.
        seconds=max(operations / chip.operations, program.reads / chip.bandwidth)
        + moved / (2 * chip.link)
        + abroad / chip.network,
        compile_seconds=spent,
        exchanges=_by_kind(exchanged),
        gathered=tuple(
            sorted({name for name, _ in gathers_of(exchanged, _own(program.name, wholes))})
        ),
    )


def _own(program: str, wholes: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
    """The arrays of the one model that a program is of ("tuned scores"), or of all."""
    roles = (name.partition("/")[0].removesuffix("'s cache") for name in wholes)
    role = next((role for role in roles if program.startswith(f"{role} ")), None)
    if role is None:
        return wholes
    return {name: shape for name, shape in wholes.items() if re.match(rf"{role}('s cache)?/", name)}


def _refusal(message: str) -> str:
    """The two sizes that the compiler names, where it does."""
    sizes = re.search(r"Used (\S+) of (\S+) hbm", message)
    if sizes:
        return f"needs {sizes[1]} of {sizes[2]}"
    beside = re.search(r"temporaries \((\S+)\) exceeds available HBM \((\S+)\)", message)
    if beside:
        return f"needs {beside[1]} beside, of {beside[2]}"
    return " ".join(message.split())[:160]


def _by_kind(found: Sequence[Collective]) -> tuple[Exchange, ...]:
    kinds: dict[str, list[Collective]] = {}
    for one in found:
        kinds.setdefault(one.kind, []).append(one)
    return tuple(
        Exchange(kind, sum(one.times for one in own), sum(one.moved for one in own))
        for kind, own in sorted(kinds.items())
    )


def show(console: Console, plan: Plan) -> None:
    """Print the plan as tables."""
    title = f"{plan.topology}, {plan.devices} devices, --mesh {plan.mesh}"
    console.print(title, soft_wrap=True, highlight=False)
    held = Table("held on each device", "GiB")
    for name, size in plan.resident_bytes.items():
        held.add_row(name, f"{size / GIB:.2f}")
    beside, needed = f"{plan.temporaries / GIB:.2f}", f"{plan.needed / GIB:.2f}"
    if plan.refusal:
        beside, needed = "refused", f"> {plan.memory / GIB:.2f}"
    held.add_row("temporaries, the largest", beside, end_section=True)
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    held.add_row(f"of {plan.memory / GIB:.2f} GiB: {verdict}", needed)
    console.print(held)
    table = Table("a call of", "GiB in", "GiB beside", "TFLOP", "GiB read", "MiB sent", "estimate")
    sent = Table("exchanges of a call of", "kind", "times", "MiB sent by each device")
    for one in plan.programs:
        if one.refusal:
            table.add_row(one.name, one.refusal, *("",) * 5)
            continue
        table.add_row(
            one.name,
            f"{one.arguments / GIB:.2f}",
            f"{one.temporary / GIB:.2f}",
            f"{one.operations / 1e12:.2f}",
            f"{one.reads / GIB:.1f}",
            f"{sum(x.moved for x in one.exchanges) / 2**20:,.0f}",
            f"{1e3 * one.seconds:,.0f} ms",
        )
        for x in one.exchanges:
            sent.add_row(one.name, x.kind, f"{x.count:,}", f"{x.moved / 2**20:,.1f}")
    console.print(table)
    console.print(sent)
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
