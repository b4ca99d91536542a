"""One form for all ways to write an answer: "3/4", "1/20 m", "{1,2}", "(3,oo)", "no solution".

Texts are those that `answer_text.clean` returns; sets of real numbers are brought into one notation
first. Of a unit, "%", a base, "mod 7" and "p.m.", a form says all ("told"), all but what a bare
number mostly is, dollars and degrees ("voted"), or nothing, since a question may have said it
("bare").
"""

import re
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from math import gcd
from typing import Literal

from w2s_jax.reasoning.answer_text import split_top
from w2s_jax.reasoning.expressions import constant, equation_form, expression_form, write
from w2s_jax.reasoning.quantities import Quantity, is_counted, read_quantity, reads_as_word
from w2s_jax.reasoning.units import NO_UNIT, named, read_unit

VARIABLE = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?|\\(?!infty|pi)[A-Za-z]+")
ORDER = re.compile(r"\\[lg]e(?![a-zA-Z])|[<>]")
FALLING = {">": "<", r"\ge": r"\le"}
_RISING = {rising: falling for falling, rising in FALLING.items()}
_REALS_PATTERN = r"(?:\\mathbb\s*\{?R\}?|\\R(?:eals)?(?![A-Za-z])|(?i:all (?:real numbers|reals)))"
_BUILT = re.compile(
    rf"\\\{{\s*(?P<name>[A-Za-z])\s*(?:\\in\s*{_REALS_PATTERN}\s*)?(?:\\mid(?![a-zA-Z])|\||:)\s*(?P<told>.+)\\\}}"
)
_EXCEPT = re.compile(
    rf"(?:[A-Za-z]\s*\\in\s*)?{_REALS_PATTERN}\s*(?:(?:\\setminus|\\backslash|-)\s*\\\{{(?P<set>.+)\\\}}"
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


How = Literal["told", "voted", "bare"]

_IMPLIED = ((("degree", 1),), (("dollar", 1),))
_LEAD = re.compile(
    r"(?i)(?:(?:approximately|about|around|roughly|exactly|nearly|almost)\b|\\(?:approx|sim)\b|≈|=)\s*"
)
_LABEL = re.compile(
    r"\s*(\\frac\s*\{d[A-Za-z]\}\s*\{d[A-Za-z]\}"
    r"|\\?[A-Za-z][A-Za-z ]*(?:_\{?\w+\}?)?(?:'|\^\{-1\})?\s*(?:\(\s*\w+(?:\s*,\s*\w+)*\s*\))?)"
    r"\s*(?:=(?!=)|\\approx\b)\s*([^=<>]+)"
)
_MEMBER = re.compile(r"\s*[A-Za-z]\s*\\in(?![a-z])\s*")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")
_SHORT_WORDS = frozenset(("yes", "no", "odd", "all", "not", "any", "two", "six"))
_INNER_CAPITAL = re.compile("[a-z][A-Z]")
_ARTICLES = re.compile(r"\b(?:an?|the)\s+")
_REALS = frozenset((r"\mathbb{R}", r"\R", r"\Reals", "all real numbers", "all reals"))
_EMPTY = frozenset((r"\emptyset", r"\varnothing", r"\{\}", r"\{ \}", "empty set"))
_NO_SOLUTION = re.compile(r"(?:there (?:is|are) )?no solutions?(?: exists?)?", re.IGNORECASE)
_CLOCK = re.compile(
    r"(?P<hour>\d{1,2})(?::(?P<minutes>[0-5]\d(?::[0-5]\d)?|\d(?=\s*[aApP])))?"
    r"(?(minutes)\s*|\s*(?=[aApP]))(?P<half>(?:[ap]\.?\s*m|[AP]\.?\s*M)\.?)?"
)
_OCLOCK = re.compile(r"(?<=\d)\s*o['’]clock")
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*(?::|\bto\b)\s*\d+(?:\.\d+)?)+")
_IN_BASE = re.compile(r"(\d{1,200})_\s*\{?\s*(\d{1,2}|ten|two)\s*\}?")
_RESIDUE = re.compile(
    r"(?:[^=<>,]*\\equiv\s*)?(-?\d{1,200})\s*\(?\s*\\?[pb]?mod(?![a-z])\s*\{?\s*(\d{1,200})\s*\}?\s*\)?"
)
_MATRIX = re.compile(r"\\begin\{[bp]?matrix\}(.*)\\end\{[bp]?matrix\}", re.DOTALL)
_CUP = re.compile(r"\\cup(?![a-zA-Z])")
_JOINED = re.compile(r"\s*,?\s*\b(?:and|or)\b\s*|;")
_SIGNS = re.compile(r"\\(?:pm|mp)(?![a-zA-Z])\s*")
_IDLE_SPACE = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])")
_COUNTED = re.compile(r"\d+ ([A-Za-z]{3,}(?: [A-Za-z]+)*)")
_FUNCTION = re.compile(r"\\(?!frac|pi|sqrt|cdot|times)[a-z]")
_TAIL = re.compile(r"\s+(?=[A-Za-z]{2}|m\b)|(?<=[\d})])(?=[A-Za-z]{4})")


def form(answer: str, how: How = "told") -> str:
    """The one form of an answer, the text without spaces where nothing else can be read."""
    answer = plain_range(answer)
    for lead in (_LEAD, _MEMBER):
        if found := lead.match(answer):
            answer = answer[found.end() :].strip()
    labelled = _LABEL.fullmatch(answer)
    if labelled and "," not in labelled[2]:
        answer = labelled[2].strip()
    for read in _READERS:
        told = read(answer, how)
        if told is not None:
            return told
    return _IDLE_SPACE.sub("", answer)


def quantity(answer: str) -> Quantity | None:
    r"""The number with its unit that an answer is, a plain one or a constant: 5 cm, 60\pi cm^2."""
    answer = labelled[2].strip() if (labelled := _LABEL.fullmatch(answer)) else answer
    if (plain := read_quantity(answer)) is not None:
        return plain
    for place in [match.start() for match in _TAIL.finditer(answer)]:
        if _FUNCTION.search(answer[:place]):
            continue
        unit, rest = read_unit(answer[place:])
        if (unit.powers and not rest) or (not unit.powers and is_counted(rest)):
            value = constant(answer[:place])
            if value is not None:
                return Quantity(value, unit)
    value = constant(answer)
    return None if value is None else Quantity(value)


def _words(answer: str, how: How) -> str | None:
    if _ARTICLES.sub("", answer.lower()) in _EMPTY or _NO_SOLUTION.fullmatch(answer):
        return "{}"
    if answer in _REALS or answer.lower() in _REALS:
        return "(-oo,oo)"
    if not _WORDS.fullmatch(answer):
        return None
    # NaCl is no NACL; what else words say, they say in any case.
    named = answer if _INNER_CAPITAL.search(answer) else answer.lower()
    words = _ARTICLES.sub("", named).split()
    if not any(word in _SHORT_WORDS or (len(word) > 3 and reads_as_word(word)) for word in words):
        return None
    if read_quantity(answer) is not None:
        return None
    return " ".join(word[:-1] if re.search(r"[^s]s$", word) else word for word in words)


def _clock(answer: str, how: How) -> str | None:
    """24 hours where it says which half of the day: "16:30 h"; bare, without it."""
    match = _CLOCK.fullmatch(_OCLOCK.sub(":00", answer))
    if match is None or int(match["hour"]) > (12 if match["half"] else 24):
        return None
    hour, minutes = int(match["hour"]), (match["minutes"] or "00").zfill(2)
    half = (match["half"] or "")[:1].lower()
    if half and how != "bare":
        return f"{hour % 12 + 12 * (half == 'p')}:{minutes} h"
    return f"{hour}:{minutes} h" if hour > 12 and how != "bare" else f"{hour}:{minutes}"


def _ratio(answer: str, how: How) -> str | None:
    if not _RATIO.fullmatch(answer):
        return None
    parts = [Fraction(part) for part in re.findall(r"[\d.]+", answer)]
    if len(parts) == 2 and parts[1]:
        return write(parts[0] / parts[1])
    whole = [int(part * 10**6) for part in parts]
    return ":".join(str(part // max(gcd(*whole), 1)) for part in whole)


def _in_base(answer: str, how: How) -> str | None:
    match = _IN_BASE.fullmatch(answer)
    if match is None:
        return None
    base = {"ten": 10, "two": 2}.get(match[2]) or int(match[2])
    try:
        return str(int(match[1])) if how == "bare" else f"{int(match[1], base)} in a base"
    except ValueError:
        return None


def _residue(answer: str, how: How) -> str | None:
    match = _RESIDUE.fullmatch(answer)
    if match is None or int(match[2]) == 0:
        return None
    value, modulus = int(match[1]), int(match[2])
    return str(value) if how == "bare" else f"{value % modulus} mod {modulus}"


def _infinity(answer: str, how: How) -> str | None:
    match = re.fullmatch(r"([-+]?)\s*\\infty", answer)
    return match and f"{match[1].strip('+')}oo"


def _plain(answer: str, how: How) -> str | None:
    return _write(read_quantity(answer), how)


def _constant(answer: str, how: How) -> str | None:
    return _write(quantity(answer), how)


def _write(found: Quantity | None, how: How) -> str | None:
    if found is None:
        return None
    if how == "bare":
        return write(found.value)
    if found.unit == NO_UNIT or (how == "voted" and found.unit.powers in _IMPLIED):
        return write(found.told)
    return f"{write(found.told)} {found.unit}"


def _matrix(answer: str, how: How) -> str | None:
    match = _MATRIX.fullmatch(answer)
    if match is None or "\\begin" in match[1]:
        return None
    rows = [row.split("&") for row in match[1].split("\\\\") if row.strip()]
    return "; ".join(", ".join(form(cell.strip(), how) for cell in row) for row in rows)


def _bracketed(answer: str, how: How) -> str | None:
    """A tuple or an interval in its order, a set sorted."""
    if answer.startswith("\\{") and answer.endswith("\\}"):
        return _listed(split_top(answer[2:-2]), how)
    if not (re.fullmatch(r"[(\[].+[)\]]", answer) and _one_bracket(answer)):
        return None
    parts = split_top(answer[1:-1].replace(";", ","))
    if parts is None or not all(parts):
        return None
    forms = [form(part, how) for part in parts]
    return forms[0] if len(forms) == 1 else answer[0] + ",".join(forms) + answer[-1]


def _union(answer: str, how: How) -> str | None:
    r"""Intervals and inequalities joined by \cup or "or", in any order."""
    parts = _CUP.split(answer)
    if len(parts) == 1:
        parts = re.split(r"\s*,?\s*\bor\b\s*", answer)
        if len(parts) == 1 or not all(ORDER.search(part) for part in parts):
            return None
    return " u ".join(sorted(form(part.strip(), how) for part in parts))


def _inequality(answer: str, how: How) -> str | None:
    r"""x > 3 is (3,oo), -1 < x \le 2 is (-1,2]; a relation of other sides keeps them."""
    signs = [sign[0] for sign in ORDER.finditer(answer)]
    sides = [side.strip() for side in ORDER.split(answer)]
    if not 1 <= len(signs) <= 2 or not all(sides):
        return None
    falling = [sign in FALLING for sign in signs]
    if len(set(falling)) > 1:
        return None
    if falling[0]:
        signs, sides = signs[::-1], sides[::-1]
    open_ends = [sign in ("<", ">") for sign in signs]
    if len(signs) == 1 and VARIABLE.fullmatch(sides[0]):
        open_ends, sides = [True, *open_ends], [r"-\infty", *sides]
    elif len(signs) == 1 and VARIABLE.fullmatch(sides[1]):
        open_ends, sides = [*open_ends, True], [*sides, r"\infty"]
    elif len(signs) == 1 or not VARIABLE.fullmatch(sides[1]):
        names = [" < " if is_open else " <= " for is_open in open_ends]
        forms = [form(side, how) for side in sides]
        return "".join(piece for pair in zip(forms, [*names, ""], strict=True) for piece in pair)
    low, high = form(sides[0], how), form(sides[2], how)
    return f"{'[('[open_ends[0]]}{low},{high}{'])'[open_ends[1]]}"


def _several(answer: str, how: How) -> str | None:
    """A list in any order; x = 1, y = 2 and 3 red, 2 blue in the order of their names."""
    parts = split_top(_JOINED.sub(",", answer))
    if parts is None or not all(parts):
        return None
    labels = [label for label in map(_LABEL.fullmatch, parts) if label]
    names = {re.sub(r"\s", "", label[1]): label[2].strip() for label in labels}
    if how != "bare" and not labels:
        names = {counted[1]: part for part in parts if (counted := _COUNTED.fullmatch(part))}
        names = {} if any(named(name) for name in names) else names
    if 1 < len(parts) == len(names):
        return "(" + ",".join(form(value, how) for _, value in sorted(names.items())) + ")"
    if len(labels) == 1:
        parts[0] = _LABEL.sub(r"\2", parts[0])
    return _listed(parts, how) if len(parts) > 1 or _SIGNS.search(parts[0]) else None


def _listed(parts: list[str] | None, how: How) -> str | None:
    if parts is None or not all(parts):
        return None
    told = [sign for part in parts for sign in _both_signs(part)]
    forms = sorted({form(part, how) for part in told})
    return forms[0] if len(forms) == 1 else "{" + ",".join(forms) + "}"


def _both_signs(part: str) -> list[str]:
    if not _SIGNS.search(part):
        return [part]
    # A plus in front of all is no sign of an expression.
    upper = _SIGNS.sub(lambda sign: "+-"[sign[0].startswith("\\mp")], part)
    lower = _SIGNS.sub(lambda sign: "-+"[sign[0].startswith("\\mp")], part)
    return [upper.removeprefix("+"), lower.removeprefix("+")]


def _equation(answer: str, how: How) -> str | None:
    sides = re.split(r"(?<![<>!])=", answer)
    if len(sides) < 2 or not all(side.strip() for side in sides):
        return None
    return equation_form(sides[-2].strip(), sides[-1].strip())


def _expression(answer: str, how: How) -> str | None:
    return expression_form(answer)


_READERS: tuple[Callable[[str, How], str | None], ...] = (
    *(_words, _clock, _ratio, _in_base, _residue, _infinity, _plain, _matrix, _bracketed),
    *(_union, _inequality, _several, _equation, _constant, _expression),
)


def _one_bracket(answer: str) -> bool:
    """Whether the first bracket closes at the very end, as in (1,2) and not in (1,2)u(3,4)."""
    depth = 0
    for index, character in enumerate(answer):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return index == len(answer) - 1
    return False
