"""A program compiled for a slice that is not here: memory, FLOPs, communication, time.

Memory is what the compiler reports. FLOPs are counted in the jaxpr, for the whole program over all
devices; communication in the compiled text; loops count with their length. The time is an estimate
from published rates of the chip.
"""

import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jax.extend import core

from w2s_jax.plan.programs import Program
from w2s_jax.plan.topology import Slice


def matmul_operations(jaxpr: Any, unknown: int = 1) -> float:
    """FLOPs of all dot products.

    Of the branches of a conditional the costliest counts. A Pallas kernel counts by its own cost
    estimate. The body of a `shard_map`, which is for one device, counts for each device of its
    mesh.

    Args:
        jaxpr: A (closed) jaxpr, as of `jax.make_jaxpr` or `traced.jaxpr`.
        unknown: Iterations of a loop whose length is not known.
    """
    found = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, parameters = equation.primitive.name, equation.params
        cost = parameters.get("cost_estimate")
        if name == "dot_general":
            found += _dot(equation)
        elif name == "pallas_call" and cost is not None:
            found += cost.flops
        else:
            inner = [matmul_operations(one, unknown) for one in _inside(parameters)]
            all_of_them = max if name == "cond" and inner else sum
            found += _times(name, parameters, unknown) * all_of_them(inner)
    return found


def _times(name: str, parameters: Any, unknown: int) -> int:
    """How often an equation runs what is inside it."""
    if name == "scan":
        return parameters["length"]
    if name == "shard_map":
        return parameters["mesh"].size
    return unknown if name == "while" else 1


def _dot(equation: Any) -> float:
    (contract, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contract)


def _inside(parameters: Any) -> Iterator[Any]:
    for value in parameters.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr | core.Jaxpr):
                yield one


KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "between slices"
"""Kind of all communication over the network between slices."""
_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2,
    "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
# Calls of kernels span several lines, which may begin with braces of their own.
_END = re.compile(r"\}(?:, execution_thread=.*)?$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|called_computations|branch_computations)=\{?([^,}\s][^}\s]*)"
)
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([a-z][\w\-]*)\(")


@dataclass(frozen=True)
class Collective:
    """One communication operation of a program, with all its repetitions in loops.

    Attributes:
        kind: One of `KINDS`, or `BETWEEN_SLICES`.
        shape: Shape of its result.
        size: Bytes of its result on each device.
        group: Number of devices that take part together.
        times: Repetitions in one call of the program.
        in_loop: Whether it is in a loop.
    """

    kind: str
    shape: tuple[int, ...]
    size: float | int
    group: int
    times: int
    in_loop: bool

    @property
    def moved(self) -> float | int:
        """Bytes that a device sends in all repetitions, by a ring algorithm."""
        share = (self.group - 1) / self.group
        factors = {
            "all-reduce": 2 * share,
            "reduce-scatter": self.group - 1,
            "collective-permute": 1.0,
            BETWEEN_SLICES: 1.0,
        }
        return self.size * self.times * factors.get(self.kind, share)


def collectives(text: str, unknown: int = 1) -> list[Collective]:
    """The communication operations in the text of a compiled program, `compiled.as_text()`.

    Asynchronous operations count where they start. A loop whose length depends on data counts
    `unknown` times.
    """
    entry, bodies = computations(text)
    times: Counter[str] = Counter()
    looped: dict[str, bool] = defaultdict(bool)

    def visit(name: str, count: int, in_loop: bool) -> None:
        if name not in bodies:
            return
        times[name] += count
        looped[name] |= in_loop
        for line in bodies[name]:
            loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if loop:
                length = loop_length(line, bodies, loop[1], loop[2])
                visit(loop[2], count * (unknown if length is None else length), True)
                continue
            for called in _CALLED.finditer(line):
                for one in called[1].split(","):
                    visit(one.strip().lstrip("%"), count, in_loop)

    if entry is not None:
        visit(entry, 1, False)
    partitions = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    everyone = int(partitions[1]) if partitions else 2
    found: dict[tuple, dict[str, list[Collective]]] = defaultdict(lambda: defaultdict(list))
    for name, count in times.items():
        for line in bodies[name]:
            one = _collective(line, count, looped[name], everyone)
            if one is None:
                continue
            # An asynchronous operation appears in every fusion that it overlaps with. Several in
            # one computation are different ones, though they may share a channel.
            channel = re.search(r"channel_id=(\d+)", line)
            key = (channel[1], one.kind, one.shape) if channel else (name,)
            found[key][name].append(one)
    return [
        one
        for places in found.values()
        for one in max(places.values(), key=lambda own: sum(each.times for each in own))
    ]


def gathers_of(
    found: Iterable[Collective], wholes: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, Collective]]:
    """The all-gathers in loops whose result is one of the `wholes`, each with the array's name.

    Shapes are compared without order and without dimensions of 1, since compilers transpose.
    """
    keys = {name: _key(shape) for name, shape in wholes.items()}
    return [
        (name, one)
        for one in found
        if one.kind == "all-gather" and one.in_loop
        for name, key in keys.items()
        if key and key == _key(one.shape)
    ]


def _key(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))


def computations(text: str) -> tuple[str | None, dict[str, list[str]]]:
    """The name of a program's entry computation, and the lines of each computation by name."""
    entry: str | None = None
    bodies: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            lines = bodies[start[1]] = []
            entry = start[1] if line.startswith("ENTRY") else entry
        elif _END.match(line):
            lines = None
        elif lines is not None:
            lines.append(line)
    return entry, bodies


def loop_length(
    line: str, bodies: Mapping[str, Sequence[str]], condition: str, body: str
) -> int | None:
    """Iterations of a loop: as the compiler reports, or until its counter reaches a constant."""
    told = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line)
    if told:
        return int(told[1])
    lines = bodies.get(condition, [])
    if not any("direction=LT" in one for one in lines):
        return None
    numbers = list(_constants(lines).values())
    if len(numbers) != 1:
        return None
    return -(-numbers[0] // _stride(lines, bodies.get(body, [])))


def _constants(lines: Iterable[str]) -> dict[str, int]:
    found = re.findall(r"%([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)", "\n".join(lines))
    return {name: int(number) for name, number in found}


def _stride(condition: Sequence[str], body: Sequence[str]) -> int:
    """The increment of a loop's counter: 2 if the compiler unrolled the loop once."""
    element = r"%([\w.\-]+) = .*get-tuple-element\(.*index=(\d+)"
    counters = re.findall(element, "\n".join(condition))
    compared = next((one for one in condition if "direction=LT" in one), "")
    places = [int(place) for name, place in counters if f"%{name}," in compared]
    root = next((one for one in body if one.strip().startswith("ROOT")), "")
    carried = re.search(r" tuple\((.*?)\)(?:,|$)", root)
    if len(places) != 1 or carried is None:
        return 1
    operands = re.findall(r"%([\w.\-]+)", re.sub(r"/\*.*?\*/", "", carried[1]))
    name = operands[places[0]] if places[0] < len(operands) else ""
    added = next((one for one in body if f"%{name} = " in one and " add(" in one), "")
    constants = _constants(body)
    return next(
        (constants[one] for one in re.findall(r"%([\w.\-]+)", added) if one in constants), 1
    )


def _collective(line: str, times: int, in_loop: bool, everyone: int) -> Collective | None:
    instruction = _INSTRUCTION.match(line)
    if instruction is None:
        return None
    kind = instruction[2].removesuffix("-start")
    if kind == "send" and "xla_megascale_runtime" in line:
        kind = BETWEEN_SLICES
    elif kind not in KINDS:
        return None
    arrays = [
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", instruction[1]))
        if dtype in _BYTES
    ]
    if not arrays:
        return None
    if kind == BETWEEN_SLICES:
        arrays = arrays[:1]
    elif instruction[2].endswith("-start") and len(arrays) > 1 and kind != "all-reduce":
        # Operands come before results; a permutation has two further scalars.
        arrays = arrays[len(arrays) // 2 :] if kind != "collective-permute" else arrays[1:2]
    sizes = [_BYTES[dtype] * math.prod(shape) for dtype, shape in arrays]
    largest = max(range(len(arrays)), key=sizes.__getitem__)
    return Collective(kind, arrays[largest][1], sum(sizes), _group(line, everyone), times, in_loop)


def _group(line: str, everyone: int) -> int:
    """Devices in a group: {{0,1},{2,3}}, [groups,devices]<=[..], or axes of a mesh by name.

    Part of an axis is written 'axis_0':(before)size. No group means all devices.
    """
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if counted:
        return int(counted[2])
    named = re.search(r"replica_groups=@?mesh\[([^\]]*)\].*?\{([^}]*)\}", line)
    if named is None:
        return everyone
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
    return math.prod(int(part) if part else sizes[name] for name, part in axes)


@dataclass(frozen=True)
class Exchange:
    """All communication of a kind in one call: its count, and the bytes that each device sends."""

    kind: str
    count: int
    moved: float


@dataclass(frozen=True)
class Measured:
    """A compiled program; sizes are bytes on each device.

    Attributes:
        name: The program's name.
        calls: Calls in a chunk of a search.
        arguments: Weights, caches and all other arguments.
        temporary: What is needed beside the arguments.
        refusal: Why it does not fit, in the compiler's words; None if it does.
        operations: FLOPs of matmuls, an even share for one device.
        reads: Bytes of weights and caches read and written in a call.
        seconds: Estimated time of a call.
        compile_seconds: Time that compiling took.
        exchanges: Communication by kind.
        gathered: Names of weights and caches that a loop gathers completely.
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


def measure(program: Program, place: Slice, wholes: Mapping[str, tuple[int, ...]]) -> Measured:
    """Compile one program for a slice.

    Args:
        program: The program. A program that does not fit is measured too.
        place: The slice.
        wholes: Whole shapes, by name, that no loop should gather.
    """
    traced, chip = program.trace(), place.chip
    found = Measured(program.name, program.calls)
    start = time.monotonic()
    try:
        compiled = traced.lower(lowering_platforms=(chip.platform,)).compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        spent = time.monotonic() - start
        return replace(found, refusal=_refusal(str(error)), compile_seconds=spent)
    spent = time.monotonic() - start
    operations = matmul_operations(traced.jaxpr, program.loops) / len(place.devices)
    used, exchanged = compiled.memory_analysis(), collectives(compiled.as_text(), program.loops)
    moved = sum(one.moved for one in exchanged if one.kind != BETWEEN_SLICES)
    abroad = sum(one.moved for one in exchanged if one.kind == BETWEEN_SLICES)
    beside = max(0, used.output_size_in_bytes - used.alias_size_in_bytes)
    own = {
        name: shape
        for name, shape in wholes.items()
        if program.role in (None, name.partition("/")[0].removesuffix("'s cache"))
    }
    computing = max(operations / chip.operations, program.reads / chip.bandwidth)
    return replace(
        found,
        arguments=used.argument_size_in_bytes,
        # Outputs that alias donated arguments take no further memory.
        temporary=used.temp_size_in_bytes + beside,
        operations=operations,
        reads=program.reads,
        # A ring uses two links at once; no overlap of communication and computation is assumed.
        seconds=computing + moved / (2 * chip.link) + abroad / chip.network,
        compile_seconds=spent,
        exchanges=_by_kind(exchanged),
        gathered=tuple(sorted({name for name, _ in gathers_of(exchanged, own)})),
    )


def _refusal(message: str) -> str:
    """The two sizes in the compiler's message, if it names them."""
    for pattern, told in (
        (r"Used (\S+) of (\S+) hbm", "needs {} of {}"),
        (r"temporaries \((\S+)\) exceeds available HBM \((\S+)\)", "needs {} beside, of {}"),
    ):
        sizes = re.search(pattern, message)
        if sizes:
            return told.format(*sizes.groups())
    return " ".join(message.split())[:160]


def _by_kind(found: Sequence[Collective]) -> tuple[Exchange, ...]:
    kinds = {kind: [one for one in found if one.kind == kind] for kind in (*KINDS, BETWEEN_SLICES)}
    return tuple(
        Exchange(kind, sum(one.times for one in own), sum(one.moved for one in own))
        for kind, own in sorted(kinds.items())
        if own
    )
