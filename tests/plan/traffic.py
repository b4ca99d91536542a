"""Bytes that a compiled TPU program moves to and from its main memory, read from its text.

Arrays in vector memory, S(1) in their layouts, and in scalar memory move nothing. The compiler's
own "bytes accessed" counts them too.
"""

import math
import re

from w2s_jax.plan.compiled import computations, loop_length

_BYTES = {"bf16": 2, "f32": 4, "s8": 1, "u8": 1, "pred": 1, "s32": 4, "u32": 4}
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^()]*)\)(.*)")
_FETCHED = re.compile(r" copy-start\((%[\w.\-]+)\)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_ON_CHIP = re.compile(r"S\([126]\)")
_NOTHING = ("parameter", "bitcast", "get-tuple-element", "tuple", "constant")


def main_memory_bytes(text: str) -> int:
    """What the instructions of a program, its loops among them, read and write in main memory.

    Each operand counts whole, but for those of which a fusion takes a slice. An asynchronous copy
    counts where it starts. What is fetched at a program's end for its next call counts there alone.
    """
    entry, found = computations(text)
    return _moved(found, entry)


def _moved(bodies: dict[str, list[str]], name: str) -> int:
    types: dict[str, str] = {}
    moved = 0
    fetched = [found[1] for line in bodies[name] if (found := _FETCHED.search(line))]
    for line in bodies[name]:
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        out, kind, operation, operands, more = found.groups()
        types[out] = kind
        if operation in _NOTHING or operation.endswith("-done"):
            continue
        arrays = _arrays(kind)
        if operation == "while":
            loop = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", more)
            times = loop_length(line, bodies, loop[1], loop[2])
            moved += times * _moved(bodies, loop[2])
        elif operation == "copy-start" and "cross_program_prefetch" in more:
            again = fetched.count(operands) > 1
            moved += 0 if again else sum(size for size, is_main in arrays[:2] if is_main)
        elif operation == "copy-start":
            moved += sum(size for size, is_main in arrays[:2] if is_main)
        elif operation == "slice-start":
            moved += arrays[1][0]
        else:
            called = re.search(r"calls=%?([\w.\-]+)", more)
            moved += sum(size for size, is_main in arrays if is_main)
            for at, one in enumerate(re.findall(r"%([\w.\-]+)", operands)):
                sizes = [size for size, is_main in _arrays(types.get(one, "")) if is_main]
                if sizes and operation == "fusion":
                    moved += min(sum(sizes), _read(bodies, called[1], at))
                else:
                    moved += sum(sizes)
    return moved


def _read(bodies: dict[str, list[str]], name: str, place: int) -> float:
    """Bytes that a fused computation reads of a parameter, if it takes slices of it alone."""
    found = [(_INSTRUCTION.match(line), " ROOT " in line) for line in bodies[name]]
    lines = [(*one.groups(), is_root) for one, is_root in found if one]
    own = {
        out for out, _, operation, at, *_ in lines if operation == "parameter" and at == str(place)
    }
    read = 0.0
    for out, kind, operation, operands, more, is_root in lines:
        places = [at for at, one in enumerate(re.findall(r"%([\w.\-]+)", operands)) if one in own]
        if not places:
            continue
        if operation == "bitcast" and not is_root:
            own.add(out)
        elif operation in ("slice", "dynamic-slice") and places == [0]:
            read += sum(size for size, _ in _arrays(kind))
        elif operation == "fusion":
            called = re.search(r"calls=%?([\w.\-]+)", more)
            read += sum(_read(bodies, called[1], at) for at in places)
        else:
            return math.inf
    return read


def _arrays(kind: str) -> list[tuple[int, bool]]:
    """(bytes, whether in main memory) of each array of a type."""
    return [
        (
            _BYTES[dtype] * math.prod(int(n) for n in sizes.split(",") if n),
            not _ON_CHIP.search(layout),
        )
        for dtype, sizes, layout in _ARRAY.findall(kind)
        if dtype in _BYTES
    ]
