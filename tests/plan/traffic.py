"""Bytes that a compiled TPU program moves to and from its main memory, read from its text.

Arrays in vector memory, S(1) in their layouts, move nothing. The compiler's own "bytes accessed"
counts them too.
"""

import math
import re

_BYTES = {"bf16": 2, "f32": 4, "s8": 1, "u8": 1, "pred": 1, "s32": 4, "u32": 4}
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^()]*)\)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_NOTHING = ("parameter", "bitcast", "get-tuple-element", "tuple", "constant")


def main_memory_bytes(text: str) -> int:
    """What the instructions of a program's entry read and write in main memory, each operand whole.

    An asynchronous copy is counted where it starts. Loops are not looked into: there must be none.
    """
    entry = text[text.index("\nENTRY ") :]
    assert " while(" not in entry
    types: dict[str, str] = {}
    moved = 0
    for line in entry.splitlines():
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        name, kind, operation, operands = found.groups()
        types[name] = kind
        if operation in _NOTHING or operation.endswith("-done"):
            continue
        arrays = _arrays(kind)
        if operation == "copy-start":
            moved += sum(size for size, is_main in arrays[:2] if is_main)
        elif operation == "slice-start":
            moved += arrays[1][0]
        else:
            given = [types.get(one, "") for one in re.findall(r"%([\w.\-]+)", operands)]
            read = [array for one in given for array in _arrays(one)]
            moved += sum(size for size, is_main in arrays + read if is_main)
    return moved


def _arrays(kind: str) -> list[tuple[int, bool]]:
    """(bytes, whether in main memory) of each array of a type."""
    return [
        (_BYTES[dtype] * math.prod(int(n) for n in sizes.split(",") if n), "S(1)" not in layout)
        for dtype, sizes, layout in _ARRAY.findall(kind)
        if dtype in _BYTES
    ]
