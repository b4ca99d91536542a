"""Units of measurement: what a text names, as a factor to base units and their powers.

Symbols are read with their case (mg is no Mg), words without. Money is a dimension for each
currency, and so is each coin; degrees of an angle and of the two scales of temperature are three.
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

    def times(self, other: "Unit") -> "Unit":
        """Their product: "$" by "per day"."""
        powers = Counter(dict(self.powers))
        powers.update(dict(other.powers))
        kept = tuple(sorted((name, power) for name, power in powers.items() if power))
        return Unit(self.factor * other.factor, kept)

    def __str__(self) -> str:
        return " ".join(name if power == 1 else f"{name}^{power}" for name, power in self.powers)


NO_UNIT = Unit()

# Money by its dimension: symbols, which may stand before a number, and words.
_MONEY = {
    "dollar": ("$ US$ USD", "dollar buck"),
    "euro": ("€ EUR", "euro"),
    "pound": ("£ GBP", "pound"),
    "yen": ("¥ JPY", "yen"),
    "yuan": ("CN¥ CNY RMB", "yuan renminbi"),
    "rupee": ("₹ Rs INR", "rupee"),
    "won": ("₩ KRW", "won"),
    "peso": ("₱ MXN PHP", "peso"),
    "franc": ("CHF", "franc"),
    "ruble": ("₽ RUB", "ruble rouble"),
    "krona": ("SEK", "krona kronor"),
    "krone": ("NOK DKK", "krone kroner"),
    "rand": ("ZAR", "rand"),
    "real": ("R$ BRL", "reais"),
    "lira": ("₺", "lira"),
    "shekel": ("₪ ILS", "shekel"),
    "baht": ("฿ THB", "baht"),
    "dong": ("₫ VND", "dong"),
    "naira": ("₦ NGN", "naira"),
    "zloty": ("PLN", "zloty"),
    "rupiah": ("IDR", "rupiah"),
    "CAD": ("C$ CA$ CAD", "canadiandollar"),
    "AUD": ("A$ AU$ AUD", "australiandollar"),
    "NZD": ("NZ$ NZD", ""),
    "HKD": ("HK$ HKD", ""),
    "SGD": ("S$ SGD", ""),
}
# What each is, of base units and of what stands above; symbols; words.
_PLAIN = {
    "127/5000 m": ("in", "inch"),
    "12 inch": ("ft", "foot feet"),
    "3 ft": ("yd", "yard"),
    "5280 ft": ("mi", "mile"),
    "1000 m": ("km", ""),
    "1852 m": ("nmi", "nauticalmile"),
    "9460730472580800 m": ("ly", "lightyear"),
    "60 s": ("", "min minute"),
    "60 min": ("h", "hr hour"),
    "24 h": ("", "day"),
    "7 day": ("", "week"),
    "year": ("", "yr year"),
    "1/12 year": ("", "month"),
    "10 year": ("", "decade"),
    "100 year": ("", "century"),
    "1000 year": ("", "millennium millennia"),
    "1000 kg": ("", "ton tonne"),
    "pound": ("", "lb"),
    "1/16 pound": ("", "oz ounce"),
    "14 pound": ("", "stone"),
    "1/100 pound": ("", "pence"),
    "slug": ("", "slug"),
    "penny": ("", "penny"),
    "nickel": ("", "nickel"),
    "dime": ("", "dime"),
    "quarter": ("", "quarter"),
    "1/100 dollar": ("¢", "cent"),
    "43560 ft^2": ("", "acre"),
    "10000 m^2": ("ha", "hectare"),
    "1/1000000 m^3": ("", "cc"),
    "231 inch^3": ("gal", "gallon"),
    "1/4 gallon": ("qt", "quart"),
    "1/8 gallon": ("pt", "pint"),
    "1/16 gallon": ("", "cup"),
    "1/128 gallon": ("", "fluidounce"),
    "1/256 gallon": ("", "tbsp tablespoon"),
    "1/768 gallon": ("", "tsp teaspoon"),
    "1000 bit": ("kb", ""),
    "1000000 bit": ("Mb", ""),
    "1000000000 bit": ("Gb", ""),
    "mi/h": ("", "mph"),
    "km/h": ("", "kmph kph"),
    "m/s": ("", "mps"),
    "ft/s": ("", "fps"),
    "nmi/h": ("kn", "knot"),
    "degree": ("", "deg degree"),
    "1/60 degree": ("", "arcmin arcminute"),
    "1/3600 degree": ("", "arcsec arcsecond"),
    "radian": ("", "rad radian"),
    "revolution": ("", "rev revolution"),
    "revolution/min": ("", "rpm"),
    "celsius": ("", "celsius"),
    "fahrenheit": ("", "fahrenheit"),
    "pound/inch^2": ("", "psi"),
    "1000 psi": ("", "ksi"),
    "101325 kg/m/s^2": ("atm", "atmosphere"),
    "101325/760 kg/m/s^2": ("mmHg", "torr"),
    "horsepower": ("hp", "horsepower"),
    "decibel": ("dB", "decibel"),
}
# Units that take prefixes: what each is in base units; symbols; words.
_METRIC = {
    "m": ("m", "meter metre"),
    "kg/1000": ("g", "gram gramme"),
    "s": ("s", "sec second"),
    "ampere": ("A", "ampere amp"),
    "kelvin": ("K", "kelvin"),
    "mole": ("mol", "mole"),
    "bit": ("bit", "bit"),
    "bit/s": ("bps", ""),
    "8 bit": ("B", "byte"),
    "eV": ("eV", "electronvolt"),
    "kcal/1000": ("cal", "calorie"),
    "m^3/1000": ("L l", "liter litre"),
    "1/s": ("Hz HZ hz", "hertz"),
    "kg m/s^2": ("N", "newton"),
    "kg/m/s^2": ("Pa", "pascal"),
    "100000 kg/m/s^2": ("bar", ""),
    "kg m^2/s^2": ("J", "joule"),
    "kg m^2/s^3": ("W", "watt"),
    "3600 kg m^2/s^2": ("Wh", ""),
    "ampere s": ("C", "coulomb"),
    "kg m^2/s^3/ampere": ("V", "volt"),
    "kg m^2/s^3/ampere^2": (r"Ω \Omega", "ohm"),
    "kg/s^2/ampere": ("T", "tesla"),
    "ampere^2 s^4/kg/m^2": ("F", "farad"),
}
# Of symbols, and at last of words.
_PREFIXES = {
    ",": Fraction(1),
    "f,femto": Fraction(1, 10**15),
    "p,pico": Fraction(1, 10**12),
    "n,nano": Fraction(1, 10**9),
    "μ,µ,micro": Fraction(1, 10**6),
    "m,milli": Fraction(1, 10**3),
    "c,centi": Fraction(1, 10**2),
    "d,deci": Fraction(1, 10),
    "k,K,kilo": Fraction(10**3),
    "M,mega": Fraction(10**6),
    "G,giga": Fraction(10**9),
    "T,tera": Fraction(10**12),
    "P,peta": Fraction(10**15),
}
# Products of temperatures, pressures and areas, and televisions, sooner than units.
_PRODUCTS = re.compile(r"[kK]T|p[ATV]|[TP][ACFKLNTV]")


@cache
def _units() -> tuple[Mapping[str, Unit], Mapping[str, Unit]]:
    """Units by their symbols and by their words, in lower case and singular."""
    symbols: dict[str, Unit] = {}
    words: dict[str, Unit] = {}
    for definition, names in (*_MONEY.items(), *_PLAIN.items()):
        unit = _defined(definition, words | symbols)
        symbols.update(dict.fromkeys(names[0].split(), unit))
        words.update(dict.fromkeys(names[1].split(), unit))
    for definition, names in _METRIC.items():
        unit = _defined(definition, {})
        for prefixes, factor in _PREFIXES.items():
            *short, word = prefixes.split(",")
            scaled = Unit(unit.factor * factor, unit.powers)
            for symbol in [before + name for name in names[0].split() for before in short]:
                if not _PRODUCTS.fullmatch(symbol):
                    symbols.setdefault(symbol, scaled)
            for name in names[1].split():
                words.setdefault(word + name, scaled)
    return symbols, words


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


# Of units of two words, which the tables have as one.
_FIRST_WORDS = "light|nautical|fluid|canadian|australian"
_WORDED = (
    (re.compile(r"\\mu\s*(?=[A-Za-z])"), "μ"),
    (re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\(?:cdot|times)(?![a-zA-Z])"), " "),
    (re.compile(r"(?<=[a-z])-(?=[a-z])"), " "),
    (re.compile(rf"(?i)\b({_FIRST_WORDS})\s+(?=year|mile|ounce|dollar)"), r"\1"),
    (re.compile(r"(?i)\bfl\.?\s*oz\b"), "fluidounce"),
    (re.compile(r"\bU\.?S\.?\s+(?=dollar)"), ""),
    (re.compile(r"\bdegrees?\s+(?:C\b|(?i:celsius|centigrade)\b)"), "celsius"),
    (re.compile(r"\bdegrees?\s+(?:F\b|(?i:fahrenheit)\b)"), "fahrenheit"),
    (re.compile(r"\^\s*\{\s*(-?\d)\s*\}"), r"^\1"),
    (re.compile(r"\b(units?)\s*\^[23]"), r"\1"),
    (re.compile(r"\\/"), "/"),
    (re.compile(r"\bsq\b\.?"), "square"),
    (re.compile(r"\bcu\b\.?"), "cubic"),
)
# Only beside a unit: "square tiles" and "per ticket" say what was counted.
_BESIDE = (
    (re.compile(r"\bsquare\s*([A-Za-z]+)"), r"\1^2"),
    (re.compile(r"\bcubic\s*([A-Za-z]+)"), r"\1^3"),
    (re.compile(r"([A-Za-z]+)\s+squared\b"), r"\1^2"),
    (re.compile(r"([A-Za-z]+)\s+cubed\b"), r"\1^3"),
    (re.compile(r"\bper\s+([A-Za-z]+)"), r"/ \1"),
)
_NO_MORE = r"\b(?:per|an?|the|in|of|for|from|to|with|at|on|by|each|every|and|or)\b|[^\w\s-]"
_IES = re.compile("ies$")
_TOKEN = re.compile(
    r"\s*(?:(?P<name>\\[A-Za-z]+|[A-Z]{0,2}[$¥]|[A-Za-zμµΩ]+|[£¢฿\u20a0-\u20bf])\.?"
    r"(?:\s*\^\s*(?P<power>-?\d))?|(?P<mark>[/()*·]))"
)


def read_unit(text: str) -> tuple[Unit, str]:
    """The unit that stands at the beginning of a text, and the rest of the text behind it.

    A word that is no unit ends it, so that "hours a day" are hours and "clips" are none.
    """
    for pattern, plain in _WORDED:
        text = pattern.sub(plain, text)
    for pattern, plain in _BESIDE:

        def beside(found: re.Match[str], plain: str = plain) -> str:
            return found.expand(plain) if named(found[1]) else found[0]

        text = pattern.sub(beside, text)
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
    symbols, words = _units()
    if name in symbols:
        return symbols[name]
    word = name.lower()
    for known in (word, word.removesuffix("s"), word.removesuffix("es"), _IES.sub("y", word)):
        if known in words and (len(known) > 2 or name.startswith(known)):
            return words[known]
    return symbols.get(name.removesuffix("s")) if len(name) == 3 else None


def unit_behind(counted: str) -> Unit:
    """The unit that the words behind a number come to: "more hours", no "eggs per day"."""
    for word in re.split(_NO_MORE, counted, maxsplit=1)[0].split():
        if len(word) > 2 and (unit := _units()[1].get(word.lower().removesuffix("s"))):
            return unit
    return NO_UNIT


def is_money(dimension: str) -> bool:
    """Whether a base unit is a currency."""
    return dimension in _MONEY


def money_symbols() -> list[str]:
    """Symbols and codes of money, longest first: what may stand before a number."""
    return sorted((name for names, _ in _MONEY.values() for name in names.split()), key=len)[::-1]
