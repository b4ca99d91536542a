r"""Sets of real numbers by one notation: x \ne 3, \mathbb{R} \setminus \{3\}, \{x : x > 3\}, ]3,5[.

From a cleaned answer to another text of the same set, which `answer_forms.py` reads.
"""

import re
from itertools import pairwise

from w2s_jax.reasoning.answer_text import split_top
from w2s_jax.reasoning.expressions import constant

VARIABLE = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?|\\(?!infty|pi)[A-Za-z]+")
ORDER = re.compile(r"\\[lg]e(?![a-zA-Z])|[<>]")
FALLING = {">": "<", r"\ge": r"\le"}
_RISING = {rising: falling for falling, rising in FALLING.items()}
_REALS = r"(?:\\mathbb\s*\{?R\}?|\\R(?:eals)?(?![A-Za-z])|(?i:all (?:real numbers|reals)))"
_BUILT = re.compile(
    rf"\\\{{\s*(?P<name>[A-Za-z])\s*(?:\\in\s*{_REALS}\s*)?(?:\\mid(?![a-zA-Z])|\||:)\s*(?P<told>.+)\\\}}"
)
_EXCEPT = re.compile(
    rf"(?:[A-Za-z]\s*\\in\s*)?{_REALS}\s*(?:(?:\\setminus|\\backslash|-)\s*\\\{{(?P<set>.+)\\\}}"
    r"|,?\s*(?:except|other than)\s+(?P<told>.+))"
)
_UNEQUAL = re.compile(r"\\ne(?![a-zA-Z])")
_AND = re.compile(r"\s*(?:,\s*(?:and\b)?|\band\b|\\(?:cap|land|wedge)(?![a-zA-Z]))\s*")
_FOREIGN = re.compile(r"([\[(\]])([^()\[\]]+,[^()\[\]]+)([\[)\]])")
_TUPLE = re.compile(r"\((\s*\\?[A-Za-z]+(?:\s*,\s*\\?[A-Za-z]+)+\s*)\)\s*=\s*(\(.+\))")


def plain_range(answer: str) -> str:
    """An answer with its set of numbers as an inequality, intervals or a tuple; others as told."""
    if built := _BUILT.fullmatch(answer):
        answer = built["told"].strip()
    if named := _TUPLE.fullmatch(answer):
        return _in_order(named[1], named[2]) or answer
    if but := _EXCEPT.fullmatch(answer):
        return _without(_AND.split((but["set"] or but["told"]).strip())) or answer
    if _UNEQUAL.search(answer):
        return _unequal(answer) or answer
    if len(ends := _AND.split(answer)) == 2 and (between := _between(*ends)):
        return between
    return _FOREIGN.sub(_round, answer)


def _round(interval: re.Match[str]) -> str:
    """]a,b[ as (a,b)."""
    if interval[1] == "]" or interval[3] == "[":
        return f"{interval[1].replace(']', '(')}{interval[2]}{interval[3].replace('[', ')')}"
    return interval[0]


def _in_order(names: str, values: str) -> str | None:
    """The values of (y,x) = (2,1) as (1,2); of names that are no coordinates as they stand."""
    told, parts = [name.strip() for name in names.split(",")], split_top(values[1:-1])
    if parts is None or len(parts) != len(told):
        return None
    if set(told) <= set("xyz"):
        parts = [part for _, part in sorted(zip(told, parts, strict=True))]
    return f"({','.join(parts)})"


def _unequal(answer: str) -> str | None:
    r"""x \ne 1 and x \ne 2, x \ne 1, 2."""
    name, places = None, []
    for part in _AND.split(answer):
        sides = [side.strip() for side in _UNEQUAL.split(part)]
        if len(sides) == 2 and VARIABLE.fullmatch(sides[0]) and name in (None, sides[0]):
            name = sides[0]
        elif name is None or len(sides) != 1:
            return None
        places.append(sides[-1])
    return _without(places)


def _without(places: list[str]) -> str | None:
    """All numbers but some: the open intervals between them."""
    values = {constant(place): place for place in places}
    if None in values and len(values) > 1:
        return None
    ordered = [place for _, place in sorted(values.items(), key=lambda at: at[0] or 0)]
    ends = [r"-\infty", *ordered, r"\infty"]
    return r"\cup".join(f"({low},{high})" for low, high in pairwise(ends))


def _between(one: str, other: str) -> str | None:
    """x > 1 and 3 > x as 1 < x < 3."""
    rays = [_ray(one), _ray(other)]
    if rays[0] is None or rays[1] is None or rays[0][0] != rays[1][0]:
        return None
    low, high = sorted((rays[0], rays[1]), key=lambda ray: ray[1] not in FALLING)
    if low[1] not in FALLING or high[1] in FALLING:
        return None
    return f"{low[2]} {FALLING[low[1]]} {low[0]} {high[1]} {high[2]}"


def _ray(part: str) -> tuple[str, str, str] | None:
    """The variable of an inequality, its sign and its other side, with the variable on the left."""
    signs, sides = ORDER.findall(part), [side.strip() for side in ORDER.split(part)]
    if len(signs) != 1:
        return None
    if VARIABLE.fullmatch(sides[0]):
        return sides[0], signs[0], sides[1]
    if VARIABLE.fullmatch(sides[1]):
        return sides[1], (FALLING | _RISING)[signs[0]], sides[0]
    return None
