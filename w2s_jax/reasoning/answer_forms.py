"""One form for all ways to write an answer: "3/4", "1/20 m", "{1,2}", "(3,oo)", "no solution".

Texts are those that `answer_text.clean` returns; sets of real numbers are brought into one notation
first. Of a unit, "%", a base, "mod 7" and "p.m.", a form says all ("told"), all but what a bare
number mostly is, dollars and degrees ("voted"), or nothing, since a question may have said it
("bare").
"""

import re
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise, permutations
from math import gcd
from typing import Literal

from w2s_jax.reasoning.expressions import constant, equation_form, expression_form, write
from w2s_jax.reasoning.quantities import (
    NO_UNIT,
    Quantity,
    is_counted,
    named,
    read_quantity,
    read_unit,
    reads_as_word,
)

_VARIABLE = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?|\\(?!infty|pi)[A-Za-z]+")
_ORDER = re.compile(r"\\[lg]e(?![a-zA-Z])|[<>]")
_FALLING = {">": "<", r"\ge": r"\le"}
_REALS = r"(?:\\mathbb\s*\{?R\}?|\\R(?:eals)?(?![A-Za-z])|(?i:all (?:real numbers|reals)))"
_BUILT = re.compile(
    rf"\\\{{\s*[A-Za-z]\s*(?:\\in\s*{_REALS}\s*)?(?:\\mid(?![a-zA-Z])|\||:)\s*(?P<told>.+)\\\}}"
)
_EXCEPT = re.compile(
    rf"(?:[A-Za-z]\s*\\in\s*)?{_REALS}\s*(?:(?:\\setminus|\\backslash|-)\s*\\\{{(?P<set>.+)\\\}}"
    r"|,?\s*(?:except|other than)\s+(?P<told>.+))"
    rf"|(?P<name>{_VARIABLE.pattern})\s*\\ne(?![a-zA-Z])(?P<unequal>.+)"
)
_AND = re.compile(r"\s*(?:,\s*(?:and\b)?|\band\b|\\(?:cap|land|wedge)(?![a-zA-Z]))\s*")
_FOREIGN = re.compile(r"([\[(\]])([^()\[\]]+,[^()\[\]]+)([\[)\]])")
_TUPLE = re.compile(r"\((\s*\\?[A-Za-z]+(?:\s*,\s*\\?[A-Za-z]+)+\s*)\)\s*=\s*(\(.+\))")


def _plain_range(answer: str) -> str:
    """An answer with its set of numbers as an inequality, intervals or a tuple; others as told."""
    if built := _BUILT.fullmatch(answer):
        answer = built["told"].strip()
    if told := _TUPLE.fullmatch(answer):
        return _in_order(told[1].split(","), split_top(told[2][1:-1])) or answer
    if but := _EXCEPT.fullmatch(answer):
        again = rf"(?:{re.escape(but['name'])}\s*\\ne(?![a-zA-Z]))?" if but["name"] else ""
        places = (but["set"] or but["told"] or but["unequal"]).strip()
        return _without(re.split(_AND.pattern + again, places)) or answer
    parts = _AND.split(answer)
    for chains in permutations(map(_chain, parts)) if len(parts) == 2 else ():
        match chains:
            # x > 1 and 3 > x is 1 < x < 3.
            case [low, below, name], [same, above, high] if name == same:
                if _VARIABLE.fullmatch(name):
                    return f"{low} {below} {name} {above} {high}"
    return _FOREIGN.sub(_round, answer)


def _round(interval: re.Match[str]) -> str:
    """]a,b[ as (a,b)."""
    return interval[1].replace("]", "(") + interval[2] + interval[3].replace("[", ")")


def _in_order(names: list[str], values: list[str] | None) -> str | None:
    """The values of (y,x) = (2,1) as (1,2); of names that are no coordinates as they stand."""
    if values is None or len(values) != len(names):
        return None
    told = [name.strip() for name in names]
    if set(told) <= set("xyz"):
        values = [value for _, value in sorted(zip(told, values, strict=True))]
    return f"({','.join(values)})"


def _without(places: list[str]) -> str | None:
    """All numbers but some: the open intervals between them."""
    values = {constant(place): place for place in places}
    if None in values and len(values) > 1:
        return None
    ordered = [place for _, place in sorted(values.items(), key=lambda at: at[0] or 0)]
    ends = [r"-\infty", *ordered, r"\infty"]
    return r"\cup".join(f"({low},{high})" for low, high in pairwise(ends))


def _chain(answer: str) -> list[str] | None:
    r"""Sides and signs of an inequality, the least side first: 3 > x \ge 1 as 1 \le x < 3."""
    parts = [part.strip() for part in re.split(f"({_ORDER.pattern})", answer)]
    falling = {sign in _FALLING for sign in parts[1::2]}
    if len(falling) != 1 or len(parts) > 5 or not all(parts):
        return None
    return [_FALLING.get(part, part) for part in reversed(parts)] if True in falling else parts


def split_top(text: str) -> list[str] | None:
    """Parts of a list between commas outside all brackets; None where brackets do not match."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return None
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return None if depth else [part.strip() for part in parts]


How = Literal["told", "voted", "bare"]

_IMPLIED = ((("degree", 1),), (("dollar", 1),))
# What stands before a value: "approximately", "x \in".
_LEAD = re.compile(
    r"\A(?i:(?:(?:approximately|about|around|roughly|exactly|nearly|almost)\b|\\(?:approx|sim)\b|≈|=)\s*)?"
    r"(?:\s*[A-Za-z]\s*\\in(?![a-z])\s*)?"
)
_LABEL = re.compile(
    r"\s*(\\frac\s*\{d[A-Za-z]\}\s*\{d[A-Za-z]\}"
    r"|\\?[A-Za-z][A-Za-z ]*(?:_\{?\w+\}?)?(?:'|\^\{-1\})?\s*(?:\(\s*\w+(?:\s*,\s*\w+)*\s*\))?)"
    r"\s*(?:=(?!=)|\\approx\b)\s*([^=<>]+)"
)
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")
_SHORT_WORDS = frozenset(("yes", "no", "odd", "all", "not", "any", "two", "six"))
_INNER_CAPITAL = re.compile("[a-z][A-Z]")
_ARTICLES = re.compile(r"\b(?:an?|the)\s+")
_REALS_ALONE = re.compile(r"\\mathbb\{R\}|\\R|\\Reals|(?i:all real numbers|all reals)")
_EMPTY = re.compile(
    r"\\emptyset|\\varnothing|\\\{ ?\\\}|(?i:(?:an? |the )?empty set"
    r"|(?:there (?:is|are) )?no solutions?(?: exists?)?)"
)
_CLOCK = re.compile(
    r"(?P<hour>\d{1,2})"
    r"(?:(?::(?P<minutes>[0-5]\d(?::[0-5]\d)?|\d(?=\s*[aApP]))|\s*o['’]clock)\s*|\s*(?=[aApP]))"
    r"(?P<half>(?:[ap]\.?\s*m|[AP]\.?\s*M)\.?)?"
)
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*(?::|\bto\b)\s*\d+(?:\.\d+)?)+")
_IN_BASE = re.compile(r"(\d{1,200})_\s*\{?\s*(\d{1,2}|ten|two)\s*\}?")
_RESIDUE = re.compile(
    r"(?:[^=<>,]*\\equiv\s*)?(-?\d{1,200})\s*\(?\s*\\?[pb]?mod(?![a-z])\s*\{?\s*(\d{1,200})\s*\}?\s*\)?"
)
_INFINITY = re.compile(r"\+?(-?)\s*\\infty")
_MATRIX = re.compile(r"\\begin\{[bp]?matrix\}((?:(?!\\begin).)*)\\end\{[bp]?matrix\}", re.DOTALL)
_SET = re.compile(r"\\\{(.+)\\\}", re.DOTALL)
_BRACKETED = re.compile(r"([(\[])(.+)([)\]])")
_CUP = re.compile(r"\\cup(?![a-zA-Z])")
_OR = re.compile(r"\s*,?\s*\bor\b\s*")
_JOINED = re.compile(r"\s*,?\s*\b(?:and|or)\b\s*|;")
_SIGNS = re.compile(r"\\(?:pm|mp)(?![a-zA-Z])\s*")
_IDLE_SPACE = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])")
_COUNTED = re.compile(r"\d+ ([A-Za-z]{3,}(?: [A-Za-z]+)*)")
_FUNCTION = re.compile(r"\\(?!frac|pi|sqrt|cdot|times)[a-z]")
_TAIL = re.compile(r"\s+(?=[A-Za-z]{2}|m\b)|(?<=[\d})])(?=[A-Za-z]{4})")


def form(answer: str, how: How = "told") -> str:
    """The one form of an answer, the text without spaces where nothing else can be read."""
    answer = _LEAD.sub("", _plain_range(answer)).strip()
    labelled = _LABEL.fullmatch(answer)
    if labelled and "," not in labelled[2]:
        answer = labelled[2].strip()
    for pattern, notation in _NOTATIONS.items():
        if (match := pattern.fullmatch(answer)) and (told := notation(match, how)) is not None:
            return told
    for read in _READERS:
        if (told := read(answer, how)) is not None:
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
        counted = not rest if unit.powers else is_counted(rest)
        if counted and (value := constant(answer[:place])) is not None:
            return Quantity(value, unit)
    value = constant(answer)
    return None if value is None else Quantity(value)


def _clock(match: re.Match[str], how: How) -> str | None:
    """24 hours where it says which half of the day: "16:30 h"; bare, without it."""
    hour, minutes = int(match["hour"]), (match["minutes"] or "00").zfill(2)
    half = (match["half"] or "")[:1].lower()
    if hour > (12 if half else 24):
        return None
    if half and how != "bare":
        hour = hour % 12 + 12 * (half == "p")
    return f"{hour}:{minutes} h" if how != "bare" and (half or hour > 12) else f"{hour}:{minutes}"


def _ratio(match: re.Match[str], how: How) -> str | None:
    parts = [Fraction(part) for part in re.findall(r"[\d.]+", match[0])]
    if len(parts) == 2 and parts[1]:
        return write(parts[0] / parts[1])
    whole = [int(part * 10**6) for part in parts]
    return ":".join(str(part // max(gcd(*whole), 1)) for part in whole)


def _in_base(match: re.Match[str], how: How) -> str | None:
    base = {"ten": 10, "two": 2}.get(match[2]) or int(match[2])
    try:
        return str(int(match[1])) if how == "bare" else f"{int(match[1], base)} in a base"
    except ValueError:
        return None


def _residue(match: re.Match[str], how: How) -> str | None:
    value, modulus = int(match[1]), int(match[2])
    if modulus == 0:
        return None
    return str(value) if how == "bare" else f"{value % modulus} mod {modulus}"


def _matrix(match: re.Match[str], how: How) -> str | None:
    rows = [row.split("&") for row in match[1].split("\\\\") if row.strip()]
    return "; ".join(", ".join(form(cell.strip(), how) for cell in row) for row in rows)


def _bracketed(match: re.Match[str], how: How) -> str | None:
    """A tuple or an interval in its order."""
    parts = split_top(match[2].replace(";", ","))
    if parts is None or not all(parts):
        return None
    forms = [form(part, how) for part in parts]
    return forms[0] if len(forms) == 1 else match[1] + ",".join(forms) + match[3]


_NOTATIONS: dict[re.Pattern[str], Callable[[re.Match[str], How], str | None]] = {
    _EMPTY: lambda match, how: "{}",
    _REALS_ALONE: lambda match, how: "(-oo,oo)",
    _CLOCK: _clock,
    _RATIO: _ratio,
    _IN_BASE: _in_base,
    _RESIDUE: _residue,
    _INFINITY: lambda match, how: f"{match[1]}oo",
    _MATRIX: _matrix,
    _SET: lambda match, how: _listed(split_top(match[1]), how),
    _BRACKETED: _bracketed,
}


def _words(answer: str, how: How) -> str | None:
    if not _WORDS.fullmatch(answer):
        return None
    # NaCl is no NACL; what else words say, they say in any case.
    told = answer if _INNER_CAPITAL.search(answer) else answer.lower()
    words = _ARTICLES.sub("", told).split()
    if not any(word in _SHORT_WORDS or (len(word) > 3 and reads_as_word(word)) for word in words):
        return None
    if read_quantity(answer) is not None:
        return None
    return " ".join(word[:-1] if re.search(r"[^s]s$", word) else word for word in words)


def _number(found: Quantity | None, how: How) -> str | None:
    if found is None:
        return None
    if how == "bare":
        return write(found.value)
    if found.unit == NO_UNIT or (how == "voted" and found.unit.powers in _IMPLIED):
        return write(found.told)
    return f"{write(found.told)} {found.unit}"


def _union(answer: str, how: How) -> str | None:
    r"""Intervals and inequalities joined by \cup or "or", in any order."""
    parts = _CUP.split(answer)
    if len(parts) == 1:
        parts = _OR.split(answer)
        if len(parts) == 1 or not all(_ORDER.search(part) for part in parts):
            return None
    return " u ".join(sorted(form(part.strip(), how) for part in parts))


def _inequality(answer: str, how: How) -> str | None:
    r"""x > 3 is (3,oo), -1 < x \le 2 is (-1,2]; a relation of other sides keeps them."""
    chain = _chain(answer)
    if chain is None:
        return None
    if len(chain) == 3 and _VARIABLE.fullmatch(chain[0]):
        chain = [r"-\infty", "<", *chain]
    elif len(chain) == 3 and _VARIABLE.fullmatch(chain[2]):
        chain = [*chain, "<", r"\infty"]
    sides = [form(side, how) for side in chain[::2]]
    if len(sides) == 3 and _VARIABLE.fullmatch(chain[2]):
        brackets = "(" if chain[1] == "<" else "[", ")" if chain[3] == "<" else "]"
        return f"{brackets[0]}{sides[0]},{sides[2]}{brackets[1]}"
    signs = [" < " if sign == "<" else " <= " for sign in chain[1::2]]
    return "".join(map("".join, zip(sides, [*signs, ""], strict=True)))


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
    forms = sorted({form(sign, how) for part in parts for sign in _both_signs(part)})
    return forms[0] if len(forms) == 1 else "{" + ",".join(forms) + "}"


def _both_signs(part: str) -> list[str]:
    if not _SIGNS.search(part):
        return [part]
    upper = _SIGNS.sub(lambda sign: "+-"[sign[0].startswith("\\mp")], part)
    lower = _SIGNS.sub(lambda sign: "-+"[sign[0].startswith("\\mp")], part)
    # A plus in front of all is no sign of an expression.
    return [upper.removeprefix("+"), lower.removeprefix("+")]


def _equation(answer: str, how: How) -> str | None:
    sides = re.split(r"(?<![<>!])=", answer)
    if len(sides) < 2 or not all(side.strip() for side in sides):
        return None
    return equation_form(sides[-2].strip(), sides[-1].strip())


_READERS: tuple[Callable[[str, How], str | None], ...] = (
    _words,
    lambda answer, how: _number(read_quantity(answer), how),
    *(_union, _inequality, _several, _equation),
    lambda answer, how: _number(quantity(answer), how),
    lambda answer, how: expression_form(answer),
)
