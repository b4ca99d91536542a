"""Numbers told in words: "twenty-five", "two hundred and five", "three quarters", "half"."""

import re
from fractions import Fraction

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_VALUES = {name: value for value, name in enumerate(_ONES.split())} | {
    name: 10 * place for place, name in enumerate(_TENS.split(), 2)
}
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_PARTS = "half third fourth fifth sixth seventh eighth ninth tenth"
_DENOMINATORS = {name: value for value, name in enumerate(_PARTS.split(), 2)} | {
    "halve": 2,
    "quarter": 4,
}
_WORD = "|".join((*_VALUES, *_SCALES))
_NUMBER = re.compile(rf"(?:{_WORD})(?:(?:[ -]| and )(?:{_WORD}))*\b", re.IGNORECASE)
_FRACTION = re.compile(
    rf"(?:(?P<half>half)|(?P<above>an?|{_NUMBER.pattern})[ -]"
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
    match = _NUMBER.match(text)
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
        elif group is None or (group >= 100 if word == "hundred" else _SCALES[word] >= least):
            return None
        elif word == "hundred":
            group *= 100
        else:
            least = _SCALES[word]
            total, group = total + group * least, 0
    return Fraction(total + (group or 0))
