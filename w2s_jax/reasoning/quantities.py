"""Plain numbers with their units: read exactly, compared, written in one form.

Everything beyond a number (roots, variables, lists) is not read here.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

# A decimal stands for a number that is not its equal when it tells at least this many digits.
SIGNIFICANT_DIGITS = 6
_MOST_DIGITS = 400

_DECIMAL = (
    r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d{1,3}(?:[ ]\d{3})+(?![\d/])(?:\.\d*)?|\d+\.?\d*|\.\d+)"
)
_CURRENCY = r"(?:US\s?\$|USD|EUR|Rs\.?|[$€£¥₹])"
_NUMBER = re.compile(
    rf"""\s*(?P<sign>[-+]?)\s*(?P<currency>{_CURRENCY})?\s*(?P<sign2>-?)\s*
    (?: (?: (?P<whole>\d+) (?:\s+|(?=\\frac)) )?
        (?: \\frac\{{\s*(?P<minus>-?)(?P<above>{_DECIMAL})\s*\}}\{{\s*(?P<below>{_DECIMAL})\s*\}}
          | (?P<over>{_DECIMAL})\s*/\s*(?P<under>{_DECIMAL}) )
      | (?P<decimal>{_DECIMAL})
        (?: \s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*\{{?\s*(?P<power>[-+]?\s*\d+)\s*\}}?
          | [eE](?P<exponent>[-+]?\d+) )?
      | 10\s*\^\s*\{{?\s*(?P<ten>[-+]?\s*\d+)\s*\}}? )
    \s*(?P<rest>.*)""",
    re.VERBOSE | re.DOTALL,
)
_PERCENT = re.compile(r"(?:%|percent(?:age)?\b|per cent\b|pct\b)\s*(?:points?)?", re.IGNORECASE)
# Words that go on with the mathematics instead of naming what was counted.
_MATH_WORDS = frozenset(
    (
        *("or", "and", "pi", "sqrt", "sin", "cos", "tan", "sec", "csc", "cot", "log", "ln", "exp"),
        *("mod", "to", "if", "when", "for", "plus", "minus", "times", "over", "is", "where"),
        *("with", "choose", "i", "e", "x", "y", "z", "n", "k"),
    )
)
_UNIT_LETTERS = frozenset((*"msghNJKCVAWLlTF", "Hz", "Pa"))
_UNITS: dict[str, tuple[str, Fraction]] = {}
for _dimension, _table in {
    "length": "nm:1/1000000000 um:1/1000000 mm:1/1000 cm:1/100 m:1 km:1000 millimeter:1/1000 "
    "centimeter:1/100 meter:1 kilometer:1000 centimetre:1/100 metre:1 kilometre:1000 in:127/5000 "
    "inch:127/5000 inche:127/5000 ft:381/1250 feet:381/1250 foot:381/1250 yard:1143/1250 "
    "mile:201168/125",
    "time": "ms:1/1000 s:1 sec:1 second:1 min:60 minute:60 h:3600 hr:3600 hour:3600 day:86400 "
    "week:604800",
    "mass": "mg:1/1000000 g:1/1000 gram:1/1000 kg:1 kilogram:1 ton:1000 tonne:1000",
    "money": "$:1 dollar:1 usd:1 us$:1 cent:1/100",
    "volume": "ml:1/1000 milliliter:1/1000 l:1 liter:1 litre:1",
    "area": "cm^2:1/10000 m^2:1 km^2:1000000",
    "speed": "m/s:1 km/h:5/18 kmph:5/18 mph:1397/3125 km/s:1000",
    "energy": "j:1 kj:1000 mj:1000000",
    "frequency": "hz:1 khz:1000 mhz:1000000",
}.items():
    for _entry in _table.split():
        _name, _factor = _entry.rsplit(":", 1)
        _UNITS[_name] = (_dimension, Fraction(_factor))


@dataclass(frozen=True)
class Quantity:
    """A number: its exact value as written (50% is 50), what follows it, and how it was told.

    places: decimals of a decimal, None for integers and fractions. digits: its significant digits.
    """

    value: Fraction
    unit: str = ""
    percent: bool = False
    places: int | None = None
    digits: int = 0


def read_quantity(text: str) -> Quantity | None:
    """The number that a cleaned answer is, with or without a unit; None for everything else."""
    match = _NUMBER.fullmatch(text) if len(text) <= 4 * _MOST_DIGITS else None
    if match is None or max(map(len, re.findall(r"\d+", text)), default=0) > _MOST_DIGITS:
        return None
    number = _value(match)
    rest = match["rest"].strip()
    percent = _PERCENT.match(rest)
    unit = rest[percent.end() :].strip() if percent else rest
    if number is None or not _is_unit(unit, text, rest):
        return None
    value, places, digits = number
    if "-" in match["sign"] + match["sign2"] + (match["minus"] or ""):
        value = -value
    return Quantity(value, unit or match["currency"] or "", percent is not None, places, digits)


def _value(match: re.Match[str]) -> tuple[Fraction, int | None, int] | None:
    """The size of a number, its decimals and significant digits."""
    if match["decimal"] or match["ten"]:
        digits = re.sub("[ ,]", "", match["decimal"] or "1")
        power = int((match["power"] or match["exponent"] or match["ten"] or "0").replace(" ", ""))
        if abs(power) > _MOST_DIGITS:
            return None
        value = Fraction(digits) * Fraction(10) ** power
        fraction = digits.partition(".")[2]
        inexact = bool(fraction.strip("0")) or power < 0
        told = len(digits.replace(".", "").lstrip("0"))
        return value, (len(fraction) - power if inexact else None), told
    above, below = match["above"] or match["over"], match["below"] or match["under"]
    top, bottom = (Fraction(re.sub("[ ,]", "", part)) for part in (above, below))
    if bottom == 0:
        return None
    return int(match["whole"] or 0) + top / bottom, None, 0


def _is_unit(unit: str, text: str, rest: str) -> bool:
    if not unit:
        return True
    first = re.match(r"[A-Za-z]+|\$|€|£", unit)
    if first is None or (first[0].lower() in _MATH_WORDS and first[0] not in _UNIT_LETTERS):
        return False
    if re.search(r"(?<![\^A-Za-z\-{])\d|[=+*(\[\\<>]|\b(?:or|and)\s+[-\d$\\]", unit):
        return False
    # "5m" may be five times m, "5 m" is a length.
    spaced = text[: len(text) - len(rest)].endswith(" ") if rest == unit else True
    return len(first[0]) > 1 or first[0] in "$€£" or (spaced and first[0] in _UNIT_LETTERS)


def same_quantity(prediction: Quantity, gold: Quantity) -> bool:
    """Whether two numbers are the same answer.

    Known units are converted and must be of one dimension; composed units must be alike; other
    words count nothing, and neither does a unit that only one has. 50% is 50 and is 0.5.
    """
    left, right = _base(prediction.unit), _base(gold.unit)
    if left and right and left != right:
        known = _UNITS.get(left), _UNITS.get(right)
        if known[0] and known[1]:
            scaled = (known[0][1] / known[1][1]) if known[0][0] == known[1][0] else None
            return scaled is not None and prediction.value * scaled == gold.value
        if any(re.search(r"[/^]", unit) for unit in (left, right)):
            return False
    if _near(prediction, gold):
        return True
    if prediction.percent == gold.percent:
        return False
    whole, part = (prediction, gold) if prediction.percent else (gold, prediction)
    return _near(Quantity(whole.value / 100), part)


def _near(left: Quantity, right: Quantity) -> bool:
    if left.value == right.value:
        return True
    told = [side for side in (left, right) if side.places is not None]
    if not told:
        return False
    coarse = min(told, key=lambda side: side.places or 0)
    other = right if coarse is left else left
    if coarse.digits < SIGNIFICANT_DIGITS:
        return False
    step = Fraction(10) ** -(coarse.places or 0)
    return abs(coarse.value - other.value) * 2 <= step


def write_value(value: Fraction) -> str:
    """One form for a value: "1000", "-3/4"."""
    return str(value)


def _base(unit: str) -> str:
    unit = re.sub(r"[\s{}]", "", unit).lower().removesuffix(".")
    known = unit if unit in _UNITS else unit.removesuffix("s")
    if known in _UNITS:
        return known
    match = re.fullmatch(r"square(\w+?)s?|(\w+?)s?squared", unit)
    return f"{match[1] or match[2]}^2" if match else unit
