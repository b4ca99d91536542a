"""Values of mathematical expressions: LaTeX read by math-verify's parser, worked out in numbers.

An expression in variables is known by its values at fixed points, so that two ways to write it
have one form. May take for ever, or all memory: `grading.py` gives it a process.
"""

import re
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from hashlib import sha256
from typing import Any

_LONGEST = 2_000  # characters; what is longer is compared as text
_DIGITS = 30  # worked out; SHOWN of them are told, the others are for rounding
_SHOWN = 12
_MOST_DIGITS = 400
_POINTS = 3
_SIMPLEST = 10**6  # the largest denominator that a value is read as
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
    """The sympy expression that a cleaned text is; None where it is none."""
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig

    for pattern, plain in _NOTATION:
        text = pattern.sub(plain, text)
    # The parser drops primes; behind another subscript it then reads nothing.
    text = _PRIMES.sub(lambda found: f"_{{p{len(_PRIME.findall(found[0]))}}}", text)
    # A current or an identity; the parser takes it for the imaginary unit, as i.
    text = _CAPITAL_I.sub(lambda found: r"\iota " if found[0] == "I" else found[0], text)
    # Two numbers side by side would be added.
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
    """The real number that a cleaned text is, to 30 digits where it is irrational."""
    expression = parse(text)
    if expression is None or expression.free_symbols:
        return None
    value = _number(expression)
    return None if value is None or value.is_real is not True else _fraction(value)


def expression_form(text: str) -> str | None:
    """One form for all ways to write an expression; None where it is none or has no values."""
    return _form(parse(text))


def equation_form(left: str, right: str) -> str | None:
    """One form for an equation: its one variable or its y where it is linear in it, its curve else.

    An equation of two equal numbers is that number.
    """
    import sympy

    sides = parse(left), parse(right)
    if sides[0] is None or sides[1] is None:
        return None
    difference = sides[0] - sides[1]
    symbols = difference.free_symbols
    if not symbols:
        equal = _form(sides[0]) == _form(sides[1])
        return _form(sides[1]) if equal else None
    alone = next(iter(symbols)) if len(symbols) == 1 else sympy.Symbol("y")
    if alone in symbols:
        slope = difference.diff(alone)
        # Linear where the slope has no y at any point.
        if alone not in slope.free_symbols and slope != 0:
            return _form(-difference.subs(alone, 0) / slope)
    values = _values(difference)
    if values is None or values[0] == 0:
        return None
    scaled = [_written(value / values[0]) for value in values[1:]]
    return None if None in scaled else f"0 = {_names(difference)}: {scaled}"


def _form(expression: Any) -> str | None:
    values = None if expression is None else _values(expression)
    written = [told for value in values or () if (told := _written(value)) is not None]
    if not values or len(written) < len(values):
        return None
    if len(set(written)) == 1:
        return written[0]
    return f"{_names(expression)}: {' '.join(written)}"


def _names(expression: Any) -> str:
    return " ".join(sorted(map(str, expression.free_symbols)))


def _values(expression: Any) -> list[Any] | None:
    """Its value, or its values at the points; None where one of them is not a number."""
    symbols = expression.free_symbols
    points = range(_POINTS if symbols else 1)
    values = [_number(expression, {s: _coordinate(str(s), n) for s in symbols}) for n in points]
    return None if None in values else values


def _coordinate(name: str, point: int) -> Any:
    """Positive and irregular, so that roots and logarithms have values and no two forms meet."""
    import sympy

    drawn = int.from_bytes(sha256(f"{name} {point}".encode()).digest()[:4], "big")
    return sympy.Rational(300 + drawn % 2003, 997)


def _number(expression: Any, point: Any = None) -> Any:
    try:
        # Substituting works out powers, which 10^{10^{10}} does not outlive.
        placed = expression.subs(point) if point else expression
        value = placed.evalf(_DIGITS, chop=True)
        if value.is_comparable and abs(value) > 10**15:
            # As many digits as tell integers apart, or none.
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
    """The simple fraction that a real value of 30 digits is, or the value as told."""
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
