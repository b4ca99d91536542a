"""Numbers with units, in figures or words, read exactly.

A unit is a factor to base units with their powers. Symbols of units are case-sensitive (mg is not
Mg), words are not. Each currency is a dimension of its own, and so is each coin; degrees of angle,
Celsius and Fahrenheit are three more. Constants other than plain numbers (roots, pi) are read in
answer_forms.py.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache


@dataclass(frozen=True)
class Unit:
    """A unit; the default is no unit.

    Attributes:
        factor: Size in base units.
        powers: (dimension, power) pairs, sorted.
    """

    factor: Fraction = Fraction(1)
    powers: tuple[tuple[str, int], ...] = ()

    def __mul__(self, other: "Unit") -> "Unit":
        powers = Counter(dict(self.powers))
        powers.update(dict(other.powers))
        kept = tuple(sorted((name, power) for name, power in powers.items() if power))
        return Unit(self.factor * other.factor, kept)

    def __pow__(self, times: int) -> "Unit":
        return Unit(self.factor**times, tuple((name, power * times) for name, power in self.powers))

    def __str__(self) -> str:
        return " ".join(name if power == 1 else f"{name}^{power}" for name, power in self.powers)


NO_UNIT = Unit()

# Units by kind: (definition in base units and units above, symbols, words). Symbols of money may
# precede a number.
_MONEY = (
    *(("dollar", "$ US$ USD", "dollar buck"), ("euro", "€ EUR", "euro")),
    *(("pound", "£ GBP", "pound"), ("yen", "¥ JPY", "yen")),
    *(("yuan", "CN¥ CNY RMB", "yuan renminbi"), ("rupee", "₹ Rs INR", "rupee")),
    *(("won", "₩ KRW", "won"), ("peso", "₱ MXN PHP", "peso"), ("franc", "CHF", "franc")),
    *(("ruble", "₽ RUB", "ruble rouble"), ("krona", "SEK", "krona kronor")),
    *(("krone", "NOK DKK", "krone kroner"), ("rand", "ZAR", "rand"), ("real", "R$ BRL", "reais")),
    *(("lira", "₺", "lira"), ("shekel", "₪ ILS", "shekel"), ("baht", "฿ THB", "baht")),
    *(("dong", "₫ VND", "dong"), ("naira", "₦ NGN", "naira"), ("zloty", "PLN", "zloty")),
    *(("rupiah", "IDR", "rupiah"), ("CAD", "C$ CA$ CAD", "canadiandollar")),
    *(("AUD", "A$ AU$ AUD", "australiandollar"), ("NZD", "NZ$ NZD", ""), ("HKD", "HK$ HKD", "")),
    ("SGD", "S$ SGD", ""),
)
CURRENCIES = frozenset(name for name, _, _ in _MONEY)
# Units that take prefixes.
_METRIC = (
    *(("m", "m", "meter metre"), ("kg/1000", "g", "gram gramme")),
    ("s", "s", "sec second"),
    *(("ampere", "A", "ampere amp"), ("kelvin", "K", "kelvin"), ("mole", "mol", "mole")),
    *(("bit", "bit", "bit"), ("bit/s", "bps", ""), ("8 bit", "B", "byte")),
    *(("eV", "eV", "electronvolt"), ("kcal/1000", "cal", "calorie")),
    ("m^3/1000", "L l", "liter litre"),
    ("1/s", "Hz HZ hz", "hertz"),
    *(("kg m/s^2", "N", "newton"), ("kg/m/s^2", "Pa", "pascal"), ("100000 kg/m/s^2", "bar", "")),
    *(("kg m^2/s^2", "J", "joule"), ("kg m^2/s^3", "W", "watt"), ("3600 kg m^2/s^2", "Wh", "")),
    *(("ampere s", "C", "coulomb"), ("kg m^2/s^3/ampere", "V", "volt")),
    *(("kg m^2/s^3/ampere^2", r"Ω \Omega", "ohm"), ("kg/s^2/ampere", "T", "tesla")),
    ("ampere^2 s^4/kg/m^2", "F", "farad"),
)
_PLAIN = (
    *(("127/5000 m", "in", "inch"), ("12 inch", "ft", "foot feet"), ("3 ft", "yd", "yard")),
    *(("5280 ft", "mi", "mile"), ("1852 m", "nmi", "nauticalmile")),
    ("9460730472580800 m", "ly", "lightyear"),
    *(("60 s", "", "min minute"), ("60 min", "h", "hr hour"), ("24 h", "", "day")),
    ("7 day", "", "week"),
    *(("year", "", "yr year"), ("1/12 year", "", "month"), ("10 year", "", "decade")),
    *(("100 year", "", "century"), ("1000 year", "", "millennium millennia")),
    ("1000 kg", "", "ton tonne"),
    *(("pound", "", "lb"), ("1/16 pound", "", "oz ounce"), ("14 pound", "", "stone")),
    *(("1/100 pound", "", "pence"), ("1/100 dollar", "¢", "cent")),
    *(("43560 ft^2", "", "acre"), ("10000 m^2", "ha", "hectare")),
    ("1/1000000 m^3", "", "cc"),
    *(("231 inch^3", "gal", "gallon"), ("1/4 gallon", "qt", "quart")),
    ("1/8 gallon", "pt", "pint"),
    *(("1/16 gallon", "", "cup"), ("1/128 gallon", "", "fluidounce")),
    *(("1/256 gallon", "", "tbsp tablespoon"), ("1/768 gallon", "", "tsp teaspoon")),
    *(("1000 bit", "kb", ""), ("1000000 bit", "Mb", ""), ("1000000000 bit", "Gb", "")),
    *(("mi/h", "", "mph"), ("km/h", "", "kmph kph"), ("m/s", "", "mps"), ("ft/s", "", "fps")),
    ("nmi/h", "kn", "knot"),
    *(("degree", "", "deg degree"), ("1/60 degree", "", "arcmin arcminute")),
    ("1/3600 degree", "", "arcsec arcsecond"),
    *(("radian", "", "rad radian"), ("revolution", "", "rev revolution")),
    ("revolution/min", "", "rpm"),
    *(("pound/inch^2", "", "psi"), ("1000 psi", "", "ksi")),
    *(("101325 kg/m/s^2", "atm", "atmosphere"), ("101325/760 kg/m/s^2", "mmHg", "torr")),
    *(("horsepower", "hp", "horsepower"), ("decibel", "dB", "decibel")),
    *(("slug", "", "slug"), ("penny", "", "penny"), ("nickel", "", "nickel")),
    *(("dime", "", "dime"), ("quarter", "", "quarter"), ("celsius", "", "celsius")),
    ("fahrenheit", "", "fahrenheit"),
)
# (power of ten, prefixes of symbols and, last, the prefix of words).
_PREFIXES = (
    *((0, ","), (-15, "f,femto"), (-12, "p,pico"), (-9, "n,nano"), (-6, "μ,µ,micro")),
    *((-3, "m,milli"), (-2, "c,centi"), (-1, "d,deci"), (3, "k,K,kilo"), (6, "M,mega")),
    *((9, "G,giga"), (12, "T,tera"), (15, "P,peta")),
)
# More often products of temperature, pressure and area, or television, than units.
_PRODUCTS = re.compile(r"[kK]T|p[ATV]|[TP][ACFKLNTV]")


@cache
def _units() -> tuple[Mapping[str, Unit], Mapping[str, Unit]]:
    """Units by symbol and by word; words are in lower case and singular."""
    symbols: dict[str, Unit] = {}
    words: dict[str, Unit] = {}
    for table in (_METRIC, _MONEY, _PLAIN):
        prefixes = _PREFIXES if table is _METRIC else _PREFIXES[:1]
        for definition, short, long in table:
            unit = _defined(definition, words | symbols)
            for power, names in prefixes:
                scaled = replace(unit, factor=unit.factor * Fraction(10) ** power)
                *before, word = names.split(",")
                found = [prefix + name for name in short.split() for prefix in before]
                symbols |= {name: scaled for name in found if not _PRODUCTS.fullmatch(name)}
                words |= {word + name: scaled for name in long.split()}
    return symbols, words


def _defined(definition: str, known: Mapping[str, Unit]) -> Unit:
    """A unit from its definition, such as "kg m^2/s^2"; unknown names are base units."""
    unit = NO_UNIT
    for sign, name, power in re.findall(r"(/?)\s*([A-Za-z]+|\d+)(?:\^(\d))?", definition):
        base = Unit(powers=((name, 1),))
        one = Unit(Fraction(name)) if name.isdigit() else known.get(name, base)
        unit *= one ** (int(power or 1) * (-1 if sign else 1))
    return unit


# First words of units with two words, which the tables have as one.
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
# "square" and "per" count only with a unit: "square tiles" and "per ticket" name what is counted.
_TOKEN = re.compile(
    r"""\s*(?: (?P<mark>[/()*·]|per(?=\s+[A-Za-z]))
      | (?:(?P<size>square|cubic)\s*)? (?!in\s+[A-Za-z])  # "5 in" are inches, "5 in total" are not
        (?P<name>\\[A-Za-z]+|[A-Z]{0,2}[$¥]|[A-Za-zμµΩ]+|[£¢฿\u20a0-\u20bf])\.?
        (?:\s*\^\s*(?P<power>-?\d)|\s+(?P<raised>squared|cubed)\b)? )""",
    re.VERBOSE,
)
_SIZES = {"square": 2, "squared": 2, "cubic": 3, "cubed": 3}
_NO_MORE = r"\b(?:per|an?|the|in|of|for|from|to|with|at|on|by|each|every|and|or)\b|[^\w\s-]"


def read_unit(text: str) -> tuple[Unit, str]:
    """The unit at the beginning of a text, and the rest of the text.

    It ends before a word that is not a unit: "hours a day" are hours, "clips" have no unit.
    """
    for pattern, plain in _WORDED:
        text = pattern.sub(plain, text)
    unit, end, place = NO_UNIT, 0, 0
    below = inside = False
    while match := _TOKEN.match(text, place):
        place = match.end()
        if mark := match["mark"]:
            below = mark in ("/", "per") or (below and mark != ")")
            inside = mark == "(" or (inside and mark != ")")
            end = place if mark == ")" else end
            continue
        one = named(match["name"])
        if one is None:
            break
        size = _SIZES.get(match["size"] or match["raised"], 1)
        unit *= one ** (int(match["power"] or size) * (-1 if below else 1))
        below = below and inside
        end = place
    return unit, text[end:].strip()


def named(name: str) -> Unit | None:
    """The unit of a name: a symbol as written, or a word in any case and number."""
    symbols, words = _units()
    if name in symbols:
        return symbols[name]
    word = name.lower()
    for known in (word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)):
        if known in words and (len(known) > 2 or name.startswith(known)):
            return words[known]
    return symbols.get(name.removesuffix("s")) if len(name) == 3 else None


def _unit_behind(counted: str) -> Unit:
    """The unit in the words after a number: that of "more hours", none of "eggs per day"."""
    for word in re.split(_NO_MORE, counted, maxsplit=1)[0].split():
        if len(word) > 2 and (unit := _units()[1].get(word.lower().removesuffix("s"))):
            return unit
    return NO_UNIT


_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_VALUES = {name: value for value, name in enumerate(_ONES.split())}
_VALUES |= {name: 10 * place for place, name in enumerate(_TENS.split(), 2)}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = "half third fourth fifth sixth seventh eighth ninth tenth"
_DENOMINATORS = {name: value for value, name in enumerate(_PARTS.split(), 2)}
_DENOMINATORS |= {"halve": 2, "quarter": 4}
_WORD = "|".join((*_VALUES, "hundred", *_SCALES))
_NUMBER_WORDS = rf"(?:{_WORD})(?:(?:[ -]| and )(?:{_WORD}))*\b"
_WORDED_NUMBER = re.compile(
    rf"(?i)(?:half|(?P<above>an?|{_NUMBER_WORDS})[ -](?P<below>{'|'.join(_DENOMINATORS)})s?)\b"
    rf"|{_NUMBER_WORDS}"
)


def read_number_words(text: str) -> tuple[Fraction, str] | None:
    """The number in words at the beginning of a text, and the rest; None if there is none.

    An ordinal alone ("third") is none, nor are adjacent words that form no number.
    """
    if sign := re.match(r"(?i)(?:minus|negative) ", text):
        size = read_number_words(text[sign.end() :])
        return size and (-size[0], size[1])
    match = _WORDED_NUMBER.match(text)
    if match is None:
        return None
    rest = text[match.end() :]
    if below := match["below"] or (match[0].lower() == "half" and "half"):
        above = (match["above"] or "a").lower()
        top = 1 if above in ("a", "an") else _whole(above)
        return None if top is None else (Fraction(top, _DENOMINATORS[below.lower()]), rest)
    if (whole := _whole(match[0])) is None:
        return None
    part = read_number_words(rest[5:]) if rest.startswith(" and a ") else None
    return (whole + part[0], part[1]) if part and part[0] < 1 else (Fraction(whole), rest)


def _whole(words: str) -> int | None:
    """The number of words from the largest scale down; None if they do not combine."""
    total, group, least = 0, None, 10**15
    for word in re.findall("[a-z]+", words.lower().replace(" and ", " ")):
        if word in _VALUES:
            value = _VALUES[word]
            # After "twenty" only ones follow, after "hundred" anything below it.
            told = (group or 0) % 100
            if told and (value > 9 or value == 0 or told <= 10 or told % 10):
                return None
            group = (group or 0) + value
        elif group is None or (group >= 100 if word == "hundred" else _SCALES[word] >= least):
            return None
        elif word == "hundred":
            group *= 100
        else:
            least = _SCALES[word]
            total, group = total + group * least, 0
    return total + (group or 0)


_MOST_DIGITS = 400
_TOO_LONG = re.compile(rf"\d{{{_MOST_DIGITS + 1}}}")

_DECIMAL = (
    r"(?:\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d*)?|\d{1,3}(?:[ ]\d{3})+(?![\d/])(?:\.\d*)?"
    r"|\d+\.?\d*|\.\d+)"
)
_SYMBOLS = (re.escape(name) for _, names, _ in _MONEY for name in names.split())
_CURRENCY = "|".join((r"US\s\$", r"Rs\.", *sorted(_SYMBOLS, key=len, reverse=True)))
_NUMBER = re.compile(
    rf"""\s*(?P<sign>[-+]?)\s*(?P<currency>{_CURRENCY})?\s*(?P<sign2>-?)\s*
    (?: (?: (?P<whole>\d+) (?:\s+|(?=\\frac)) )?
        (?: \\frac\{{\s*(?P<minus>-?)(?P<above>{_DECIMAL})\s*\}}
              \{{\s*(?P<minus2>-?)(?P<below>{_DECIMAL})\s*\}}
          | (?P<over>{_DECIMAL})\s*/\s*(?P<under>{_DECIMAL}) )
      | (?P<start>\d*)\.(?P<head>\d*)
        (?: \\(?:overline|bar|dot)\s*\{{?\s*(?P<cycle>\d+)\s*\}}?
          | \((?P<round>\d+)\)
          | (?P<again>\d{{1,6}}?)(?P=again){{2,}}\s*(?:\.{{2,}}|…|\\[lc]?dots) )
      | (?P<decimal>{_DECIMAL})
        (?: \s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*\{{?\s*(?P<power>[-+]?\s*\d+)\s*\}}?
          | [eE](?P<exponent>[-+]?\d+) )?
      | 10\s*\^\s*\{{?\s*(?P<ten>[-+]?\s*\d+)\s*\}}? )
    (?P<rest>.*)""",
    re.VERBOSE | re.DOTALL,
)
_SCALE = re.compile(rf"(?i)\s*({'|'.join(_SCALES)})s?\b")
_PERCENT = re.compile(r"(?i)\s*(?:%|percent(?:age)?\b|per cent\b|pct\b)\s*(?:points?)?")
_ORDINAL = re.compile(
    r"(\d*(?:1[123]|\d))\s*\^?\s*\{?\s*(st|nd|rd|th)\b\s*\}?\s*(?P<rest>.*)", re.DOTALL
)
_OF_ONE = re.compile(r"^\s*(?:of\s+)?(?:(?:an?|the)\s+)?")
# Parts of a length, an angle or a time with marks: 6'2", 60 degrees 30', 2h30m.
_MARKS = (
    (re.compile(r"(?<=degrees)\s*(\d[\d.]*)\s*['′’]"), r" \1 arcminutes "),
    (re.compile(r"(?<=arcminutes)\s*(\d[\d.]*)\s*(?:['′’]{2}|[\"″”])"), r" \1 arcseconds"),
    (re.compile(r"(?<=\d)\s*(?:['′’]{2}|[\"″”])(?=\s*$)"), " inches"),
    (re.compile(r"(?<=\d)\s*['′’](?=\s*\d|\s*$)"), " feet "),
    (re.compile(r"(?<=\d):(?=[0-5]\d\s*(?:h|hrs?|hours?)$)"), " hours "),
    (re.compile(r"(?<=\d)\s*h(?:rs?)?\s*(?=\d)"), " hours "),
    (re.compile(r"(?<= hours )(\d\d)\s*(?:h|hrs?|hours?)?$"), r"\1 minutes"),
    (re.compile(r"(?<=\d)\s*m(?:in)?\s*(?=\d+\s*s(?:ec)?$)"), " minutes "),
    (re.compile(r"(?<=hours )(\d+)\s*m(?:in)?\b"), r"\1 minutes"),
    (re.compile(r"(?<=minutes )(\d+)\s*s(?:ec)?\b"), r"\1 seconds"),
)
_PREPOSITION = re.compile(r"(?i)(?:an?|in|of|on|at|by|as)\b")
# Words that continue the mathematics instead of naming what is counted.
_MATH_WORD = re.compile(
    r"(?i)(?:and|choose|cos|cot|csc|exp|for|minus|mod|over|plus|sec|sin|sqrt|tan|times|when|where"
    r"|with|alpha|beta|gamma|delta|theta|lambda|sigma|omega|repeating|recurring)\b"
)

_MATHEMATICS = re.compile(r"\d|[=+*(\[\\<>^_]|\b(?:or|and)\s+[-$\\]")


@dataclass(frozen=True)
class Quantity:
    """A number with a unit, and its notation.

    Attributes:
        value: The exact value as written: 50% has 50.
        unit: Its unit.
        percent: Whether it is a percentage.
        places: Decimal places; None for integers and fractions.
        digits: Significant digits.
    """

    value: Fraction
    unit: Unit = NO_UNIT
    percent: bool = False
    places: int | None = None
    digits: int = 0

    @property
    def told(self) -> Fraction:
        """The value in base units; a percentage as a share of one."""
        return self.value * self.unit.factor / (100 if self.percent else 1)


def read_quantity(text: str) -> Quantity | None:
    """The number of a cleaned answer, with or without a unit; None for anything else.

    "2 hours 30 minutes" is one number: parts of one dimension in descending units.
    """
    if ordinal := _ORDINAL.fullmatch(text):
        counted = not ordinal["rest"] or is_counted(ordinal["rest"])
        return Quantity(Fraction(ordinal[1])) if counted else None
    if worded := read_number_words(text):
        number, rest = worded
        # Names such as "Three Sisters" are no numbers.
        if not rest or rest.islower():
            text = f"{number} {_OF_ONE.sub('', rest)}".strip()
    for pattern, plain in _MARKS:
        text = pattern.sub(plain, text)
    read = _first(text)
    if read is None:
        return None
    total, rest = read
    while rest:
        read = _first(re.sub(r"^(?:,|\band\b|\s)+", "", rest)) if total.unit.powers else None
        if read is None:
            if not is_counted(rest):
                return None
            return total if total.unit.powers else replace(total, unit=_unit_behind(rest))
        part, rest = read
        same = part.unit.powers == total.unit.powers and part.unit.factor < total.unit.factor
        if not same or total.percent or part.percent or min(part.value, total.value) < 0:
            return None
        value = total.value + part.value * part.unit.factor / total.unit.factor
        total = replace(total, value=value, places=None)
    return total


def _first(text: str) -> tuple[Quantity, str] | None:
    """The number with its unit at the beginning of a text, and the rest of the text."""
    match = _NUMBER.fullmatch(text) if len(text) <= 4 * _MOST_DIGITS else None
    number = match and not _TOO_LONG.search(text) and _value(match)
    if not match or not number:
        return None
    rest = match["rest"]
    if scale := _SCALE.match(rest):
        number = replace(number, value=number.value * _SCALES[scale[1].lower()])
        rest = rest[scale.end() :]
    if percent := _PERCENT.match(rest):
        number, rest = replace(number, percent=True), rest[percent.end() :]
    unit, after = (NO_UNIT, rest.strip()) if percent else read_unit(rest)
    if match["currency"]:
        unit = read_unit(match["currency"].replace(" ", ""))[0] * unit
    elif re.match(r"[A-Za-z](?![A-Za-z])" if unit.powers else "[A-Za-z]", rest):
        # "5m" may be five times m; "5 m" is a length.
        return None
    return replace(number, unit=unit), after


def _value(match: re.Match[str]) -> Quantity | None:
    """A number without its unit."""
    told = {name: re.sub("[ ,]", "", part) for name, part in match.groupdict("").items()}
    minus = "".join(told[name] for name in ("sign", "sign2", "minus", "minus2")).count("-")
    sign = (-1) ** minus
    if cycle := told["cycle"] or told["round"] or told["again"]:
        head, nines = told["head"], 10 ** len(cycle) - 1
        repeated = Fraction(int(cycle), nines * 10 ** len(head))
        return Quantity(sign * (Fraction(f"{told['start'] or 0}.{head or 0}") + repeated))
    if told["decimal"] or told["ten"]:
        digits = told["decimal"] or "1"
        power = int(told["power"] or told["exponent"] or told["ten"] or 0)
        if abs(power) > _MOST_DIGITS:
            return None
        fraction = digits.partition(".")[2]
        inexact = bool(fraction.strip("0")) or power < 0
        return Quantity(
            sign * Fraction(digits) * Fraction(10) ** power,
            places=len(fraction) - power if inexact else None,
            digits=len(digits.replace(".", "").lstrip("0")),
        )
    top, bottom = Fraction(told["above"] or told["over"]), Fraction(told["below"] or told["under"])
    return Quantity(sign * (int(told["whole"] or 0) + top / bottom)) if bottom else None


def is_counted(rest: str) -> bool:
    """Whether the text after a number only names what is counted: "72 clips in total"."""
    word = re.match(r"[A-Za-z]+", rest)
    if not word or _MATH_WORD.match(rest) or _MATHEMATICS.search(rest):
        return False
    return _PREPOSITION.match(rest) is not None or reads_as_word(word[0])


def reads_as_word(letters: str) -> bool:
    """Whether letters are a word, not a product of variables."""
    return len(letters) >= 3 and re.search("(?i)[aeiou]", letters) is not None
