"""One form for all notations of an answer: "3/4", "1/20 m", "{1,2}", "(3,oo)", "no solution".

Texts are those that `answer_text.clean` returns; sets of real numbers are first brought into one
notation. Units, "%", bases, "mod 7" and "p.m." stay in a form ("told"); stay except dollars and
degrees, which a bare number mostly means ("voted"); or are left out, since the question may have
stated them ("bare"). Expressions are parsed by math-verify's parser and evaluated numerically; one
with variables is identified by its values at fixed points, so that equivalent ones have one form.
This may take unbounded time or memory: `answers.grade` runs it in a process of its own.
"""

import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise, permutations
from math import gcd
from typing import Any, Literal

from w2s_jax.reasoning.answer_text import split_top
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
    """An answer with its set of numbers as an inequality, intervals or a tuple; or unchanged."""
    if built := _BUILT.fullmatch(answer):
        answer = built["told"].strip()
    if told := _TUPLE.fullmatch(answer):
        names, values = [name.strip() for name in told[1].split(",")], split_top(told[2][1:-1])
        if values is None or len(values) != len(names):
            return answer
        pairs = list(zip(names, values, strict=True))
        # Only coordinates are sorted; other names keep their order.
        ordered = sorted(pairs) if set(names) <= set("xyz") else pairs
        return f"({','.join(value for _, value in ordered)})"
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
                    return " ".join((low, below, name, above, high))
    return _FOREIGN.sub(_round, answer)


def _round(interval: re.Match[str]) -> str:
    """]a,b[ as (a,b)."""
    return interval[1].replace("]", "(") + interval[2] + interval[3].replace("[", ")")


def _without(places: list[str]) -> str | None:
    """All real numbers except some, as the open intervals between them."""
    values = {constant(place): place for place in places}
    if None in values and len(values) > 1:
        return None
    ordered = [place for _, place in sorted(values.items(), key=lambda at: at[0] or 0)]
    ends = [r"-\infty", *ordered, r"\infty"]
    return r"\cup".join(f"({low},{high})" for low, high in pairwise(ends))


def _chain(answer: str) -> list[str] | None:
    r"""Sides and signs of an inequality in ascending order: 3 > x \ge 1 as 1 \le x < 3."""
    parts = [part.strip() for part in re.split(f"({_ORDER.pattern})", answer)]
    falling = {sign in _FALLING for sign in parts[1::2]}
    if len(falling) != 1 or len(parts) > 5 or not all(parts):
        return None
    return [_FALLING.get(part, part) for part in reversed(parts)] if True in falling else parts


How = Literal["told", "voted", "bare"]

_IMPLIED = ((("degree", 1),), (("dollar", 1),))
# What may precede a value: "approximately", "x \in".
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
    """The form of an answer; its text without spaces if it cannot be read otherwise."""
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
    r"""An answer as a number with a unit, plain or with a constant: 5 cm, 60\pi cm^2."""
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
    """A time in 24 hours if the half of the day is known, as "16:30 h"; without it if bare."""
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
    """A tuple or an interval, in its order."""
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
    # Case matters within a word such as NaCl, and in no other words.
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
    is_implied = found.unit == NO_UNIT or (how == "voted" and found.unit.powers in _IMPLIED)
    return write(found.told) + ("" if is_implied else f" {found.unit}")


def _union(answer: str, how: How) -> str | None:
    r"""Intervals and inequalities joined by \cup or "or", in any order."""
    parts = _CUP.split(answer)
    if len(parts) == 1:
        parts = _OR.split(answer)
        if len(parts) == 1 or not all(_ORDER.search(part) for part in parts):
            return None
    return " u ".join(sorted(form(part.strip(), how) for part in parts))


def _inequality(answer: str, how: How) -> str | None:
    r"""x > 3 as (3,oo), -1 < x \le 2 as (-1,2]; a relation between other sides keeps them."""
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
    """A list in any order; x = 1, y = 2, and 3 red, 2 blue, in the order of their names."""
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
    # A leading plus does not change an expression.
    return [upper.removeprefix("+"), lower.removeprefix("+")]


def _equation(answer: str, how: How) -> str | None:
    sides = [side.strip() for side in re.split(r"(?<![<>!])=", answer)]
    return equation_form(sides[-2], sides[-1]) if len(sides) > 1 and all(sides) else None


_READERS: tuple[Callable[[str, How], str | None], ...] = (
    _words,
    lambda answer, how: _number(read_quantity(answer), how),
    *(_union, _inequality, _several, _equation),
    lambda answer, how: _number(quantity(answer), how),
    lambda answer, how: expression_form(answer),
)


# --- Expressions ----------------------------------------------------------------------------------
_LONGEST = 2_000  # characters; a longer answer is compared as text
_DIGITS = 30  # computed; _SHOWN of them are written, the others are for rounding
_SHOWN = 12
_MOST_DIGITS = 400
_POINTS = 3
_SIMPLEST = 10**6  # the largest denominator of a fraction that a value may stand for
_FUNCTIONS = (
    "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln exp sqrt pi "
    "alpha beta gamma delta epsilon theta lambda mu rho sigma tau phi omega infty"
)
_NOTATION = (
    (re.compile(rf"(?<![A-Za-z\\])({_FUNCTIONS.replace(' ', '|')})(?![A-Za-z])"), r"\\\1"),
    (re.compile(r"\\sqrt\s*\(([^()]*)\)|√\s*\(([^()]*)\)"), r"\\sqrt{\1\2}"),
    (re.compile(r"√\s*(\d+|[A-Za-z]|\\[A-Za-z]+)"), r"\\sqrt{\1}"),
    (re.compile(r"\\log_\{?e\}?(?![A-Za-z])"), r"\\ln "),
    (re.compile(r"(\d+(?:\.\d+)?|\\pi)\s*degrees"), r"(\1 \\cdot \\frac{\\pi}{180})"),
)
_PRIME = re.compile(r"'|\\prime(?![a-zA-Z])")
_PRIMES = re.compile(
    rf"(?<=[A-Za-z0-9}}])(?:(?:{_PRIME.pattern})+|\^\s*\{{?\s*(?:(?:{_PRIME.pattern})\s*)+\}}?)"
)
_CAPITAL_I = re.compile(r"\\[A-Za-z]+|_\{[^{}]*\}|_\w|I")
_APART = re.compile(r"(?<![\d_.])[\d.]+\s+\d")


@lru_cache(maxsize=4096)
def parse(text: str) -> Any:
    """The sympy expression of a cleaned text; None if it is not one."""
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig

    for pattern, plain in _NOTATION:
        text = pattern.sub(plain, text)
    # The parser drops primes, so they become subscripts; a second subscript it refuses.
    text = _PRIMES.sub(lambda found: f"_{{p{len(_PRIME.findall(found[0]))}}}", text)
    # I is a current or an identity matrix; the parser takes it, like i, for the imaginary unit.
    text = _CAPITAL_I.sub(lambda found: r"\iota " if found[0] == "I" else found[0], text)
    # The parser would add two numbers side by side.
    if not text or len(text) > _LONGEST or _APART.search(text):
        return None
    import sympy

    try:
        found = latex2sympy(
            text,
            conversion_config=ConversionConfig(lowercase_symbols=False),
            normalization_config=NormalizationConfig(malformed_operators=True, boxed="none"),
        )
    except (MemoryError, RecursionError):
        raise
    except Exception:  # what the parser itself raises
        return None
    if not isinstance(found, sympy.Expr):
        return None
    unit = sympy.Symbol("i")
    return found.subs(unit, sympy.I) if unit in found.free_symbols else found


def constant(text: str) -> Fraction | None:
    """The real number of a cleaned text, to 30 digits if it is irrational."""
    expression = parse(text)
    is_known = expression is not None and not expression.free_symbols
    value = _worked_out(expression) if is_known else None
    return _fraction(value) if value is not None and value.is_real is True else None


def expression_form(text: str) -> str | None:
    """One form for equivalent expressions; None if it is not one, or has no values."""
    return _form(parse(text))


def equation_form(left: str, right: str) -> str | None:
    """One form for equivalent equations, solved for the only variable, or y, if linear in it.

    If both sides are equal numbers, it is that number.
    """
    import sympy

    sides = parse(left), parse(right)
    if sides[0] is None or sides[1] is None:
        return None
    difference = sides[0] - sides[1]
    if not (symbols := difference.free_symbols):
        forms = _form(sides[0]), _form(sides[1])
        return forms[0] if forms[0] == forms[1] else None
    alone = next(iter(symbols)) if len(symbols) == 1 else sympy.Symbol("y")
    if alone in symbols:
        slope = difference.diff(alone)
        # Linear if the slope does not depend on the variable.
        if alone not in slope.free_symbols and slope != 0:
            return _form(-difference.subs(alone, 0) / slope)
    values = _values(difference)
    if not values or values[0] == 0:
        return None
    scaled = [_written(value / values[0]) for value in values[1:]]
    return None if None in scaled else f"0 = {_names(difference)}: {scaled}"


def _form(expression: Any) -> str | None:
    written = [] if expression is None else list(map(_written, _values(expression)))
    if None in written or len(set(written)) < 2:
        return written[0] if written and None not in written else None
    return f"{_names(expression)}: {' '.join(map(str, written))}"


def _names(expression: Any) -> str:
    return " ".join(sorted(map(str, expression.free_symbols)))


def _values(expression: Any) -> list[Any]:
    """The value of an expression, or its values at fixed points; none if one is not a number."""
    import sympy

    def coordinate(symbol: Any, point: int) -> Any:
        # Positive, for roots and logarithms; irregular, so that different expressions differ.
        drawn = int.from_bytes(sha256(f"{symbol} {point}".encode()).digest()[:4], "big")
        return sympy.Rational(300 + drawn % 2003, 997)

    symbols = expression.free_symbols
    points = range(_POINTS if symbols else 1)
    values = [_worked_out(expression, {s: coordinate(s, n) for s in symbols}) for n in points]
    return [] if None in values else values


def _worked_out(expression: Any, point: Any = None) -> Any:
    try:
        # Substituting evaluates powers, and 10^{10^{10}} would not end.
        placed = expression.subs(point) if point else expression
        value = placed.evalf(_DIGITS, chop=True)
        if value.is_comparable and abs(value) > 10**15:
            # Enough digits to distinguish integers, or none at all.
            if abs(value) > 10**_MOST_DIGITS:
                return None
            value = placed.evalf(_DIGITS + len(str(int(value))))
        if value.is_number is not True or value.is_finite is False or not value.is_comparable:
            parts = value.as_real_imag()
            if any(part.is_comparable is not True for part in parts):
                return None
        return value
    except (TypeError, ValueError, AttributeError, NotImplementedError, ArithmeticError):
        return None


def _written(value: Any) -> str | None:
    real, imaginary = (_fraction(part) for part in value.as_real_imag())
    if real is None or imaginary is None:
        return None
    return f"{write(real)} + {write(imaginary)} i" if imaginary else write(real)


def _fraction(value: Any) -> Fraction | None:
    """The simple fraction that a real value of 30 digits equals, or the value as it is."""
    try:
        told = Fraction(str(value))
    except ValueError:
        return None
    simple = told.limit_denominator(_SIMPLEST)
    scale = abs(told) if abs(told) > 1 else Fraction(1)
    return simple if abs(simple - told) <= scale / 10 ** (_DIGITS - 5) else told


def write(value: Fraction) -> str:
    """One form for a value: "1000", "-3/4", "1.41421356237"."""
    if value.denominator <= _SIMPLEST:
        return str(value)
    return f"{Decimal(value.numerator) / Decimal(value.denominator):.{_SHOWN}g}"
