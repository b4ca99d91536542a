"""Units of measurement: what a text names, as a factor to base units and their powers.

Symbols are read with their case (mg is no Mg), words without. Money is a dimension for each
currency; degrees of an angle and of the two scales of temperature are three.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache


@dataclass(frozen=True)
class Unit:
    """factor: how many of the base unit it is. powers: (dimension, power), sorted; () is none."""

    factor: Fraction = Fraction(1)
    powers: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return " ".join(name if power == 1 else f"{name}^{power}" for name, power in self.powers)


NO_UNIT = Unit()

# Dimension, then symbols and words with how many of the dimension's base unit each is.
_PLAIN = {
    "m": "in:127/5000 inch:127/5000 inches:127/5000 ft:381/1250 foot:381/1250 feet:381/1250 "
    "yd:1143/1250 yard:1143/1250 mi:201168/125 mile:201168/125 km:1000",
    "s": "sec:1 second:1 min:60 minute:60 h:3600 hr:3600 hour:3600 day:86400 week:604800",
    "year": "year:1 yr:1 month:1/12",
    "kg": "ton:1000 tonne:1000",
    "pound": "pound:1 lb:1 £:1 GBP:1 oz:1/16 ounce:1/16",
    "dollar": "$:1 dollar:1 USD:1 US$:1 cent:1/100 ¢:1/100",
    "euro": "€:1 euro:1 EUR:1",
    "yen": "¥:1 yen:1 JPY:1",
    "rupee": "₹:1 rupee:1 Rs:1 INR:1",
    "degree": "degree:1 deg:1",
    "radian": "radian:1 rad:1",
    "celsius": "celsius:1",
    "fahrenheit": "fahrenheit:1",
    "kcal": "calorie:1/1000 cal:1/1000",
}
# Units that take prefixes: what each is in base units; symbols; words.
_METRIC = {
    "m": ("m", "meter metre"),
    "kg/1000": ("g", "gram gramme"),
    "s": ("s", ""),
    "ampere": ("A", "ampere amp"),
    "kelvin": ("K", "kelvin"),
    "mole": ("mol", "mole"),
    "byte": ("B", "byte"),
    "eV": ("eV", "electronvolt"),
    "m^3/1000": ("L l", "liter litre"),
    "1/s": ("Hz", "hertz"),
    "kg m/s^2": ("N", "newton"),
    "kg/m/s^2": ("Pa", "pascal"),
    "kg m^2/s^2": ("J", "joule"),
    "kg m^2/s^3": ("W", "watt"),
    "ampere s": ("C", "coulomb"),
    "kg m^2/s^3/ampere": ("V", "volt"),
    "kg m^2/s^3/ampere^2": (r"Ω \Omega", "ohm"),
    "kg/s^2/ampere": ("T", "tesla"),
    "ampere^2 s^4/kg/m^2": ("F", "farad"),
}
# Of symbols, and at last of words.
_PREFIXES = {
    ",": Fraction(1),
    "n,nano": Fraction(1, 10**9),
    "μ,µ,micro": Fraction(1, 10**6),
    "m,milli": Fraction(1, 10**3),
    "c,centi": Fraction(1, 10**2),
    "d,deci": Fraction(1, 10),
    "k,K,kilo": Fraction(10**3),
    "M,mega": Fraction(10**6),
    "G,giga": Fraction(10**9),
}
_COMPOSED = {"mph": "mi/h", "kmph": "km/h", "kph": "km/h", "mps": "m/s", "gallon": "231 in^3"}


@cache
def _units() -> Mapping[str, Unit]:
    found = {}
    for dimension, entries in _PLAIN.items():
        for entry in entries.split():
            name, times = entry.rsplit(":", 1)
            found[name] = Unit(Fraction(times), ((dimension, 1),))
    for definition, (symbols, words) in _METRIC.items():
        unit = _defined(definition, {})
        for prefixes, factor in _PREFIXES.items():
            *short, word = prefixes.split(",")
            scaled = Unit(unit.factor * factor, unit.powers)
            names = [before + name for name in symbols.split() for before in short]
            for name in [*names, *(word + name for name in words.split())]:
                found.setdefault(name, scaled)
    return found | {name: _defined(text, found) for name, text in _COMPOSED.items()}


def _defined(definition: str, known: Mapping[str, Unit]) -> Unit:
    """A unit told in others, or in base units where they are not known: "kg m^2/s^2"."""
    factor, powers = Fraction(1), Counter[str]()
    for sign, name, power in re.findall(r"(/?)\s*([A-Za-z]+|\d+)(?:\^(\d))?", definition):
        times = int(power or 1) * (-1 if sign else 1)
        if name.isdigit():
            factor *= Fraction(name) ** times
            continue
        unit = known.get(name, Unit(powers=((name, 1),)))
        factor *= unit.factor**times
        powers.update({base: own * times for base, own in unit.powers})
    return Unit(factor, tuple(sorted((name, n) for name, n in powers.items() if n)))


_WORDED = (
    (re.compile(r"\\mu\s*(?=[A-Za-z])"), "μ"),
    (re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\(?:cdot|times)(?![a-zA-Z])"), " "),
    (re.compile(r"\bper\b"), "/"),
    (re.compile(r"\b(?:square|sq)\b\.?\s*([A-Za-z]+)"), r"\1^2"),
    (re.compile(r"\b(?:cubic|cu)\b\.?\s*([A-Za-z]+)"), r"\1^3"),
    (re.compile(r"([A-Za-z]+)\s+squared\b"), r"\1^2"),
    (re.compile(r"([A-Za-z]+)\s+cubed\b"), r"\1^3"),
    (re.compile(r"\bdegrees?\s+(?:C\b|(?i:celsius|centigrade)\b)"), "celsius"),
    (re.compile(r"\bdegrees?\s+(?:F\b|(?i:fahrenheit)\b)"), "fahrenheit"),
    (re.compile(r"\^\s*\{\s*(-?\d)\s*\}"), r"^\1"),
    (re.compile(r"\\/"), "/"),
)
_TOKEN = re.compile(
    r"\s*(?:(?P<name>\\[A-Za-z]+|(?:US)?\$|[A-Za-zμµΩ]+|[€£¥₹¢])\.?"
    r"(?:\s*\^\s*(?P<power>-?\d))?|(?P<mark>[/()*·]))"
)


def read_unit(text: str) -> tuple[Unit, str]:
    """The unit that stands at the beginning of a text, and the rest of the text behind it.

    A word that is no unit ends it, so that "hours a day" are hours and "clips" are none.
    """
    for pattern, plain in _WORDED:
        text = pattern.sub(plain, text)
    factor, powers = Fraction(1), Counter[str]()
    end = place = 0
    below = inside = False
    while match := _TOKEN.match(text, place):
        place = match.end()
        if mark := match["mark"]:
            below = mark == "/" or (below and mark != ")")
            inside = mark == "(" or (inside and mark != ")")
            end = place if mark == ")" else end
            continue
        unit = named(match["name"])
        # "5 in" are inches, "5 in total" are not.
        if unit is None or (match["name"] == "in" and re.match(r"\s+[A-Za-z]", text[place:])):
            break
        power = int(match["power"] or 1) * (-1 if below else 1)
        below = below and inside
        factor *= unit.factor**power
        powers.update({name: own * power for name, own in unit.powers})
        end = place
    kept = tuple(sorted((name, power) for name, power in powers.items() if power))
    return Unit(factor, kept), text[end:].strip()


def named(name: str) -> Unit | None:
    """The unit of a name: a symbol as it is written, a word in any case and number."""
    units = _units()
    if name in units:
        return units[name]
    word = name.lower()
    for known in (word, word.removesuffix("s"), word.removesuffix("es")):
        if len(known) > 2 and known in units:
            return units[known]
    return units.get(name.removesuffix("s")) if len(name) == 3 else None
