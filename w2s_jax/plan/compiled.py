"""What a compiled program exchanges between devices, read from its text; loops counted by length.

Knows the text of XLA's optimised programs; compiles nothing.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2,
    "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|called_computations|branch_computations)=\{?([^,}\s][^}\s]*)"
)
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([a-z][\w\-]*)\(")


@dataclass(frozen=True)
class Collective:
    """One exchange in a program, as often as its loops do it.

    kind: of `KINDS`. shape: the dimensions of what comes out of it. size: its bytes on each device.
    group: devices that take part together. times: how often in one call of the program. in_loop:
    whether it stands in a loop.
    """

    kind: str
    shape: tuple[int, ...]
    size: float | int
    group: int
    times: int
    in_loop: bool

    @property
    def moved(self) -> float | int:
        """Bytes that a device sends, all times together, where neighbours pass parts in a ring."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "reduce-scatter": self.group - 1}.get(self.kind, share)
        return self.size * self.times * (1.0 if self.kind == "collective-permute" else factor)


def collectives(text: str) -> list[Collective]:
    """The exchanges of a compiled program, `compiled.as_text()`.

    A loop whose length cannot be read counts once. Asynchronous ones are counted where they start.
    """
    bodies = _computations(text)
    entry = next((name for name, (first, _) in bodies.items() if first), None)
    times: Counter[str] = Counter()
    looped: dict[str, bool] = defaultdict(bool)

    def visit(name: str, count: int, in_loop: bool) -> None:
        if name not in bodies:
            return
        times[name] += count
        looped[name] |= in_loop
        for line in bodies[name][1]:
            loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if loop:
                visit(loop[2], count * _length(line, bodies, loop[1]), True)
                continue
            for called in _CALLED.finditer(line):
                for one in called[1].split(","):
                    visit(one.strip().lstrip("%"), count, in_loop)

    if entry is not None:
        visit(entry, 1, False)
    found = []
    for name, count in times.items():
        for line in bodies[name][1]:
            one = _collective(line, count, looped[name])
            if one is not None:
                found.append(one)
    return found


def gathers_of(
    found: Iterable[Collective], wholes: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, Collective]]:
    """The all-gathers in loops whose result is one of these whole arrays, with its name.

    Shapes are compared without their order and without dimensions of 1, since compilers transpose.
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


def _computations(text: str) -> dict[str, tuple[bool, list[str]]]:
    """The lines of each computation by its name, and whether it is the program's entry."""
    bodies: dict[str, tuple[bool, list[str]]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            lines = []
            bodies[start[1]] = (line.startswith("ENTRY"), lines)
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return bodies


def _length(line: str, bodies: Mapping[str, tuple[bool, list[str]]], condition: str) -> int:
    """How often a loop runs: as the compiler says, else the constant that its counter is below."""
    told = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line)
    if told:
        return int(told[1])
    lines = bodies.get(condition, (False, []))[1]
    if not any("direction=LT" in one for one in lines):
        return 1
    numbers = [int(n) for one in lines for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", one)]
    return numbers[0] if len(numbers) == 1 else 1


def _collective(line: str, times: int, in_loop: bool) -> Collective | None:
    instruction = _INSTRUCTION.match(line)
    if instruction is None:
        return None
    kind = instruction[2].removesuffix("-start")
    if kind not in KINDS:
        return None
    arrays = [
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", instruction[1]))
        if dtype in _BYTES
    ]
    if not arrays:
        return None
    if instruction[2].endswith("-start") and len(arrays) > 1:
        # What goes in stands before what comes out; a permutation has two numbers more.
        arrays = arrays[len(arrays) // 2 :] if kind != "collective-permute" else arrays[1:2]
    sizes = [_BYTES[dtype] * math.prod(shape) for dtype, shape in arrays]
    largest = max(range(len(arrays)), key=sizes.__getitem__)
    return Collective(kind, arrays[largest][1], sum(sizes), _group(line), times, in_loop)


def _group(line: str) -> int:
    """Devices of a group, from {{0,1},{2,3}} or [groups,devices]<=[..]."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    return int(counted[2]) if counted else 2
