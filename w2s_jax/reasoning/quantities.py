"""Numbers with their units, in figures or words: read exactly, compared, written in one form.

Constants beyond plain numbers (roots, pi) are the matter of expressions.py.
"""

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from w2s_jax.reasoning.units import NO_UNIT, Unit, is_money, money_symbols, read_unit, unit_behind

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_VALUES = {name: value for value, name in enumerate(_ONES.split())} | {
    name: 10 * place for place, name in enumerate(_TENS.split(), 2)
}
_POWERS = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_PARTS = "half third fourth fifth sixth seventh eighth ninth tenth"
_DENOMINATORS = {name: value for value, name in enumerate(_PARTS.split(), 2)} | {
    "halve": 2,
    "quarter": 4,
}
_WORD = "|".join((*_VALUES, *_POWERS))
_NUMBER_WORDS = re.compile(rf"(?:{_WORD})(?:(?:[ -]| and )(?:{_WORD}))*\b", re.IGNORECASE)
_FRACTION = re.compile(
    rf"(?:(?P<half>half)|(?P<above>an?|{_NUMBER_WORDS.pattern})[ -]"
    rf"(?P<below>{'|'.join(_DENOMINATORS)})s?)\b",
    re.IGNORECASE,
)


def read_number_words(text: str) -> tuple[Fraction, str] | None:
    """The number in words that a text begins with, and the rest behind it; None where it has none.

    An ordinal alone, "third", is none, and so are words side by side that make no number.
    """
    if sign := re.match(r"(?:minus|negative) ", text, re.IGNORECASE):
        size = read_number_words(text[sign.end() :])
        return size and (-size[0], size[1])
    if match := _FRACTION.match(text):
        above, below = match["above"], match["below"]
        if match["half"]:
            return Fraction(1, 2), text[match.end() :]
        top = Fraction(1) if above.lower() in ("a", "an") else _whole(above)
        if top is not None:
            return top / _DENOMINATORS[below.lower()], text[match.end() :]
    match = _NUMBER_WORDS.match(text)
    whole = _whole(match[0]) if match else None
    if match is None or whole is None:
        return None
    rest = text[match.end() :]
    part = read_number_words(rest[5:]) if rest.startswith(" and a ") else None
    return (whole + part[0], part[1]) if part and part[0] < 1 else (whole, rest)


def _whole(words: str) -> Fraction | None:
    """Words of a number from the greatest scale down; None where they do not fit together."""
    total, group, least = 0, None, 10**12
    for word in re.findall("[a-z]+", words.lower().replace(" and ", " ")):
        if word in _VALUES:
            value = _VALUES[word]
            # Behind "twenty" only ones, behind "hundred" all below it.
            told = (group or 0) % 100
            if told and (value > 9 or value == 0 or told <= 10 or told % 10):
                return None
            group = (group or 0) + value
        elif group is None or (group >= 100 if word == "hundred" else _POWERS[word] >= least):
            return None
        elif word == "hundred":
            group *= 100
        else:
            least = _POWERS[word]
            total, group = total + group * least, 0
    return Fraction(total + (group or 0))


# A decimal stands for a number that is not its equal when it tells at least this many digits.
SIGNIFICANT_DIGITS = 6
_MOST_DIGITS = 400

_DECIMAL = (
    r"(?:\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d*)?|\d{1,3}(?:[ ]\d{3})+(?![\d/])(?:\.\d*)?"
    r"|\d+\.?\d*|\.\d+)"
)
_CURRENCY = "|".join((r"US\s\$", r"Rs\.", *map(re.escape, money_symbols())))
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
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = re.compile(rf"\s*({'|'.join(_SCALES)})s?\b", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(?:%|percent(?:age)?\b|per cent\b|pct\b)\s*(?:points?)?", re.IGNORECASE)
_ORDINAL = re.compile(
    r"(\d*(?:1[123]|\d))\s*\^?\s*\{?\s*(st|nd|rd|th)\b\s*\}?\s*(?P<rest>.*)", re.DOTALL
)
_OF_ONE = re.compile(r"^\s*(?:of\s+)?(?:(?:an?|the)\s+)?")
# Parts of a length, an angle or a time by their marks: 6'2", 60 degrees 30', 2h30m.
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
_PREPOSITIONS = frozenset(("a", "an", "in", "of", "on", "at", "by", "as"))
# Words that go on with the mathematics instead of naming what was counted.
_MATH_WORDS = frozenset(
    (
        *("and", "choose", "cos", "cot", "csc", "exp", "for", "minus", "mod", "over", "plus"),
        *("sec", "sin", "sqrt", "tan", "times", "when", "where", "with", "alpha", "beta"),
        *("gamma", "delta", "theta", "lambda", "sigma", "omega"),
        *("repeating", "recurring"),
    )
)


@dataclass(frozen=True)
class Quantity:
    """A number: its exact value as written (50% is 50), what follows it, and how it was told.

    places: decimals of a decimal, None for integers and fractions. digits: its significant digits.
    """

    value: Fraction
    unit: Unit = NO_UNIT
    percent: bool = False
    places: int | None = None
    digits: int = 0

    @property
    def told(self) -> Fraction:
        """The value in base units, a percentage as a part of one."""
        return self.value * self.unit.factor / (100 if self.percent else 1)

    def bare(self) -> "Quantity":
        """The number as it is written."""
        return replace(self, unit=NO_UNIT, percent=False)


def read_quantity(text: str) -> Quantity | None:
    """The number that a cleaned answer is, with or without a unit; None for everything else.

    "2 hours 30 minutes" is one number: parts of one dimension, each smaller than the one before.
    """
    if ordinal := _ORDINAL.fullmatch(text):
        counted = not ordinal["rest"] or is_counted(ordinal["rest"])
        return Quantity(Fraction(ordinal[1])) if counted else None
    if worded := read_number_words(text):
        number, rest = worded
        # Names such as "Three Sisters" are none.
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
            return total if total.unit.powers else replace(total, unit=unit_behind(rest))
        part, rest = read
        same = part.unit.powers == total.unit.powers and part.unit.factor < total.unit.factor
        if not same or total.percent or part.percent or min(part.value, total.value) < 0:
            return None
        value = total.value + part.value * part.unit.factor / total.unit.factor
        total = replace(total, value=value, places=None)
    return total


def _first(text: str) -> tuple[Quantity, str] | None:
    """The number that a text begins with and its unit, and what stands behind both."""
    match = _NUMBER.fullmatch(text) if len(text) <= 4 * _MOST_DIGITS else None
    if match is None or max(map(len, re.findall(r"\d+", text)), default=0) > _MOST_DIGITS:
        return None
    number = _value(match)
    if number is None:
        return None
    value, places, digits = number
    if "".join(match[name] or "" for name in ("sign", "sign2", "minus", "minus2")).count("-") % 2:
        value = -value
    rest = match["rest"]
    if scale := _SCALE.match(rest):
        value, rest = value * _SCALES[scale[1].lower()], rest[scale.end() :]
    percent = _PERCENT.match(rest)
    rest = rest[percent.end() :] if percent else rest
    unit, after = (NO_UNIT, rest.strip()) if percent else read_unit(rest)
    if match["currency"]:
        unit = read_unit(match["currency"].replace(" ", ""))[0].times(unit)
    elif re.match(r"[A-Za-z](?![A-Za-z])" if unit.powers else "[A-Za-z]", rest):
        # "5m" may be five times m, "5 m" is a length.
        return None
    return Quantity(value, unit, percent is not None, places, digits), after


def _value(match: re.Match[str]) -> tuple[Fraction, int | None, int] | None:
    """The size of a number, its decimals and significant digits."""
    if cycle := match["cycle"] or match["round"] or match["again"]:
        head, nines = match["head"], 10 ** len(cycle) - 1
        repeated = Fraction(int(cycle), nines * 10 ** len(head))
        return Fraction(f"{match['start'] or 0}.{head or 0}") + repeated, None, 0
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


def is_counted(rest: str) -> bool:
    """Whether what stands behind a number only says what was counted: "72 clips in total"."""
    first = re.match(r"[A-Za-z]+", rest)
    if first is None or first[0].lower() in _MATH_WORDS:
        return False
    if re.search(r"\d|[=+*(\[\\<>^_]|\b(?:or|and)\s+[-$\\]", rest):
        return False
    return first[0].lower() in _PREPOSITIONS or reads_as_word(first[0])


def reads_as_word(letters: str) -> bool:
    """Whether letters are a word and no product of variables."""
    least = 3
    return len(letters) >= least and re.search("[aeiou]", letters.lower()) is not None


def same_amount(left: Quantity, right: Quantity) -> bool:
    """Whether they are one amount of money, and one of them says of what: $18, $18 per day."""
    pairs = (left.unit.powers, right.unit.powers), (right.unit.powers, left.unit.powers)
    return left.value == right.value and any(
        len(money) == 1 < len(rate) and money[0] in rate and is_money(money[0][0])
        for money, rate in pairs
    )


def near(left: Quantity, right: Quantity) -> bool:
    """Whether one is a decimal of at least SIGNIFICANT_DIGITS digits that the other rounds to."""
    told = [side for side in (left, right) if side.places is not None]
    units = {side.unit for side in (left, right)} - {NO_UNIT}
    if not told or len(units) > 1:
        return False
    coarse = min(told, key=lambda side: side.places or 0)
    other = right if coarse is left else left
    if coarse.digits < SIGNIFICANT_DIGITS:
        return False
    step = Fraction(10) ** -(coarse.places or 0)
    return abs(coarse.value - other.value) * 2 <= step
