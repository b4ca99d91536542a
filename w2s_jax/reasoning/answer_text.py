"""Finds the final answer in a text, and cleans its LaTeX of what has no meaning.

Values are not evaluated here: numbers are read in quantities.py, expressions in answer_forms.py.
"""

import re
from collections.abc import Callable
from unicodedata import normalize

_BOX_TOKENS = re.compile(
    r"(?s)\\(?:boxed|fbox)\s*(?P<bare>\d[\d.,]*|(?<=\s)(?:\\[a-z]+(?:\{[^{}]*\})*|[^\s${}\\]+))"
    r"|(?P<open>(?:\\(?:boxed|fbox)\s*)?\{)|\\.|\}"
)
_BETWEEN_BOXES = re.compile(r"(?:[\s$\\,;.()]|\band\b|\bor\b){1,20}")
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_ANSWER_IS = re.compile(
    r"""(?imx) (?<!\bthis\ )(?<!\bthat\ )(?<!\bwrong\ ) \bans(?:wers?)?\b
    (?: [^.:;=\n\d$\\]{0,40}? \b(?:is|are|must\ be|will\ be)\b \s* :? | \s*(?:[:=→⇒]|->) ) \s*
    | ^\W* (?:the\ )? (?:final\ |correct\ )? answers? \W* \n \s*"""
)
# Words between "answer is" and the answer.
_LEAD = re.compile(
    r"(?i)(?:\s*\b(?:approximately|about|around|roughly|exactly|simply|just|therefore|thus|then|also"
    r"|indeed|equal to|option|choice|(?:the )?(?:ordered )?(?:point|pair|triple|set|interval|number"
    r"|value|integer|fraction|ratio|function|vector|matrix|letter)(?=\s*[-\d$\\([{]))\b[\s:]*)+"
)
_MATHEMATICS = re.compile(
    r"(?:(?i:minus|negative)\s+)?[-+−±]?\s*(?:\.?\d|[$£¥฿\u20a0-\u20bf√π∞½¼¾\\({\[|<>≤≥≈]|(?:USD|EUR|GBP|Rs)\b)|[-−]?(?:[B-HJ-Zb-z]|[AI](?!\s+[a-z]))(?![A-Za-z'])"
    r"|[-−]?(?:[A-Za-z]{1,3}|[A-Za-z]\(\w\))(?:_\{?\w+\}?)?\s*[-+*/^=<>≤≥(]"
)
_WORDED = re.compile(r"[A-Za-z][A-Za-z'-]*(?: [A-Za-z][A-Za-z'-]*){0,3}")
# Beginnings of remarks on the answer, such as "The answer is correct".
_REMARKS = re.compile(
    r"(?i)(?:correct|right|wrong|incorrect|reasonable|valid|consistent|helpful|clear|unclear|the|not"
    r"|in|as|given|obtained|found|that|this|because|what|still|unknown|verified|expressed|if|rounded"
    r"|based|also|same|to|for|(?:final )?(?:answer|result|solution)s?$)\b"
)
_NUMBERED = re.compile(r"\d+[.)]\s+[A-Za-z]")
# An inline formula has no space inside its dollars, so that "$20 and $30" is none.
_SPAN = re.compile(
    r"\$\$(.+?)\$\$|(?<!\\)\$((?! )(?:[^$\\]|\\.)+)(?<!\s)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]",
    re.DOTALL,
)
_BETWEEN = re.compile(r"[\s,;]*(?:\band\b|\bor\b)?[\s,;]*")
_NO_REMARK = r"(?:mod|base|and|or|sin|cos|tan|log|ln|exp|sqrt|pi)\b"
_CLAUSE = re.compile(
    r"(?:(?<!\bsq)(?<!\bcu)(?<!\bfl)\.|[;!])\s|,?\s+(?=(?:because|since)\b)|\n|\s+—\s+"
    r"|,\s+(?=(?:so|which|as|where|when|though|although|therefore|rounded|not)\b)"
    r"|,\s+(?=(?:given|assuming|provided|obtained|found|consistent|by|after)\b)"
    r"|,?\s+(?=(?:and|but)\s+(?:we|this|that|it|so|hence|thus|therefore|not)\b)"
    rf"|\s+[-–]\s+(?=(?!{_NO_REMARK})(?:[a-z]{{3}}|[a-z]{{2}} [a-z]{{2}}))"
    rf"|\s+(?=[(\[](?!{_NO_REMARK})(?:[a-z]{{2}}|[ie]\.|[^()]*=))"
)
_MARK_AT_END = re.compile(r"[\s✓✔✅🎉?]+$")
_ALONE = re.compile(
    r"[\s*_`$=]*(?:\\[(\[])?\s*([$€£]?-?\d[\d,]*(?:[./]\d+)?%?)\s*(?:\\[)\]])?[\s*_`$.]*"
)
_IS_THE_ANSWER = re.compile(
    r"(\$[^$\n]{1,200}\$|\\\([^\n]{1,200}?\\\)|(?<![\d,.])[$€£]?-?\d[\d,]*(?:[./]\d+)?%?)\W{0,3}\s+"
    r"is (?:the|our|my) (?:final |correct )?answer\b"
)
_TAGGED = re.compile(r"<answer>\s*((?:(?!<answer>).)+?)\s*</answer>", re.DOTALL | re.IGNORECASE)
_QUOTED = re.compile("[\"'“‘](?=\\S)(.+?)[\"'”’]")
_EMPHASIS = re.compile(
    r"(?<![\w*\\])(\*\*\*|\*\*|\*|__)(?=[^\s*])([^*\n]*?[^\s*])\1(?![\w*])|`([^`\n]+)`"
)
# Values in a sentence; words before its result, and before its only value ("except 3" is not a
# value by itself).
_VALUE = re.compile(
    rf"{_SPAN.pattern}|(?<![\w$.,:\\])(\\?[$€£]?-?\d+(?:,\d{{3}})*(?:[./]\d+)?(?: \d+/\d+)?\\?%?"
    r"(?: (?:thousand|million|billion)\b)?)(?![\w/^:])",
    re.DOTALL,
)
_COMES_TO = re.compile(
    r"(?:\b(?:is|are|was|were|be|equals)|[=≈]|[A-Za-z]:) *"
    r"(?:(?:approximately|about|only|exactly) )?$"
)
_NO_CLAIM = re.compile(r"(?:All|Any|Every|Each|Yes|No|None|Multiples)\b")
_ONLY_BEHIND = re.compile(
    r"(?:[A-Z](?=.* [a-z]{2,} )|(?=(?:So|Thus|Therefore|Hence)\b))"
    r"(?!.*\b(?:except|than|by|least|most|below|above) $)[A-Za-z ,']*"
)
_CONCLUSION = re.compile(
    r"(?:So|Thus|Therefore|Hence|Finally|Overall|Altogether|In (?:total|all|conclusion))\b.*[.!]"
)
_SENTENCE = re.compile(r"[A-Z][A-Za-z' -]+ ([$€£]?-?\d[\d,]*(?:\.\d+)?%?)\.?")
_LINE_MARK = re.compile(
    r"(?m)^[ \t]*(?:>[ \t]*|[-*][ \t]+|#{1,3}[ \t]+|#{5,}[ \t]+)+|^```\w*[ \t]*$"
)

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u200b-\u200f\u2060\ufeff\ud800-\udfff]")
_COMMANDS = "×times ·cdot πpi ∞infty ∪cup ∈in ∅emptyset ∓mp ≠ne ≤le ≥ge ±pm ≈approx ≡equiv"
_CHARACTERS = str.maketrans("−–÷“”\xa0\u2009\u202f", '--/""   ') | str.maketrans(
    {"°": r"^\circ", "ℝ": r"\mathbb{R}"}
    | {command[0]: f"\\{command[1:]} " for command in _COMMANDS.split()}
)
_DOLLARS_OF_MONEY = re.compile(r"\$\s*[\d.,]+\s.*\$")
_WORDS = (
    r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|mbox|math(?:rm|bf|it|sf)|operatorname)\s*\{([^{}]*)\}"
)
_SIGNS = (("lt", "<"), ("gt", ">"), ("rangle", ")"), ("colon", ":"))
# Rewritings in order: the first ones before characters are replaced, the others after single
# dollar signs are removed.
_AT_FIRST: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    ("(?:\\d\u0305)+", r"\\overline{\g<0>}"),
    ("\u0305", ""),
    ("[⁺⁻⁰¹²³⁴-⁹]+", lambda run: f"^{{{normalize('NFKC', run[0])}}}"),
    ("[₀-₉]+", lambda run: f"_{{{normalize('NFKC', run[0])}}}"),
    (
        "[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]",
        lambda one: re.sub("(.+)⁄(.+)", r"\\frac{\1}{\2}", normalize("NFKC", one[0])),
    ),
)
_REWRITTEN: tuple[tuple[str, str], ...] = (
    *((r"\\([$%])", r"\1"), (r"\{([,:])\}", r"\1")),
    (r"\\leq(?:slant|q)?(?![a-zA-Z])|<=(?!>)", r"\\le "),
    (r"\\geq(?:slant|q)?(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\neq(?![a-zA-Z])|\\not\s*=", r"\\ne "),
    *((rf"\\{name}(?![a-zA-Z])", sign) for name, sign in _SIGNS),
    (r"\\l?angle(?=\s*[^A-Za-z\s]*\d)|\\langle(?![a-zA-Z])", "("),
    *((r"\\\{", r"\\lbrace "), (r"\\\}", r"\\rbrace ")),
    # Repairs \left and \infty, from which the published normaliser has removed "ft".
    (r"\\le(?=[(\[{|])(?=.*\\right)", ""),
    (r"\\iny\b", r"\\infty"),
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),
    (r"\\(?:displaystyle|q?quad|limits)(?![a-zA-Z])", ""),
    # Before spaces are removed: in a matrix, "\\ " ends a row.
    (r"\\\\", "\x00"),
    (r"(?<=\d)\\[,; ](?=\d{3}(?!\d))", ","),
    (r"\\!", ""),
    (r"\\[,;:!> ]|~|\\(?:thinspace|space)(?![a-zA-Z])|\s+", " "),
    *((_WORDS, r" \1 "),) * 3,
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac\s*(?:(\d)|\{([^{}]*)\})\s*(?:(\d)|\{([^{}]*)\})", r"\\frac{\1\2}{\3\4}"),
    (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])", " degrees "),
    # As typed in plain text: in LaTeX, 2^10 would be 2^1 followed by 0.
    (r"(?:\*\*|\^)\s*(-?\d+)(?![\d.])", r"^{\1}"),
    *((r"\*\*", "^"), (r"\s+", " ")),
    *(("\x00", r"\\\\"), (r"\\lbrace ", r"\\{"), (r"\\rbrace ", r"\\}")),
)


def last_box(text: str) -> tuple[int, str]:
    r"""Position and content of the last closed \boxed{..}; (-1, "") if there is none.

    Boxes separated by only a comma, "and" or "or" are one answer. An unclosed box means that the
    text was cut off, and is no answer.
    """
    open_braces: list[re.Match[str]] = []
    boxes: list[tuple[int, int, str]] = []
    for token in _BOX_TOKENS.finditer(text):
        if token["bare"]:
            boxes.append((token.start(), token.end(), token["bare"]))
        elif token["open"]:
            open_braces.append(token)
        elif token[0] == "}" and open_braces:
            begin = open_braces.pop()
            if begin[0] != "{":
                boxes = [box for box in boxes[-8:] if box[0] < begin.start()]
                boxes.append((begin.start(), token.end(), text[begin.end() : token.start()]))
    if not boxes:
        return -1, ""
    start, _, content = boxes.pop()
    contents, first = [content], start
    while boxes and _BETWEEN_BOXES.fullmatch(text[boxes[-1][1] : first][:40]):
        first, _, content = boxes.pop()
        contents.insert(0, content)
    return start, ", ".join(dict.fromkeys(part.strip() for part in contents))


def after_hashes(text: str) -> tuple[int, str]:
    """Position of the last "####" that precedes an answer on its line, and that answer.

    Headings of Markdown do not count; a word counts as an answer only at the end of the text.
    """
    for match in reversed(list(_HASHES.finditer(text))):
        told = match[1].strip()
        last = not text[match.end() :].strip()
        if not _NUMBERED.match(told) and reads_as_answer(told, worded=last):
            return match.start(), told
    return -1, ""


def after_answer_is(text: str) -> tuple[int, str]:
    """Position of the last "answer is" or "answer:" that precedes an answer, and that answer."""
    found = (-1, "")
    for match in reversed(list(_ANSWER_IS.finditer(text))):
        # In "The answer is 12, since the answer is even" the end remarks on the answer.
        if found[1] and re.search(r"\n|[.!?;]\s", text[match.start() : found[0]]):
            break
        statement = text[match.end() :].strip(" *:")
        statement = statement[lead.end() :] if (lead := _LEAD.match(statement)) else statement
        statement = quoted[1] if (quoted := _QUOTED.match(statement)) else statement
        stated = _stated(statement)
        if stated and _MATHEMATICS.match(statement):
            return match.start(), stated
        # After a colon or a heading all that follows is the answer, whatever it is.
        announced = re.search(r"[:\n]", match[0])
        behind = statement[len(stated) :].strip(" .*")
        if announced and not re.search(r"\d", behind) and (value := value_told(stated)):
            return match.start(), value
        last = announced and not behind
        if stated and not found[1] and (last or reads_as_answer(statement, stated)):
            found = match.start(), stated
    return found


def reads_as_answer(text: str, stated: str | None = None, *, worded: bool = True) -> bool:
    """Whether a text begins with mathematics or a choice letter, or is a few words.

    Args:
        text: The text.
        stated: Its first clause, to which the words must be limited; None for the whole text.
        worded: Whether words count.
    """
    if _MATHEMATICS.match(text):
        return True
    words = text if stated is None else stated
    return worded and _WORDED.fullmatch(words.strip(" .")) is not None and not _REMARKS.match(words)


def last_bold(text: str) -> str:
    """The last bold answer in the last line of Markdown, or the line if all of it is emphasised.

    72 in "So she sold **72** clips.", in "*72*" and in "**Clips sold: 72**".
    """
    line = text.rstrip().rpartition("\n")[2]
    if (whole := _EMPHASIS.fullmatch(line.strip())) and reads_as_answer(whole[2] or whole[3]):
        return whole[2] or whole[3]
    bolds = [match[2] for match in _EMPHASIS.finditer(line) if match[1] in ("**", "__")]
    found = [bold if reads_as_answer(bold) else value_told(bold) for bold in bolds]
    return next(filter(None, reversed(found)), "")


def without_markdown(text: str) -> str:
    """A text without Markdown's emphasis, code, quotation, list and heading marks; "####" stays."""
    text = _LINE_MARK.sub("", text)
    for _ in range(2):
        text = _EMPHASIS.sub(lambda match: match[2] or match[3], text)
    return text


def final_answer(response: str, *, hashes_first: bool = False) -> str:
    """The final answer in a response, as written there; "" if there is none.

    In order of precedence: the last box or "####", "the answer is", bold text in the last line, and
    the number at the end of a last line that is a plain sentence, or the number that is the whole
    response. Text before "</think>" counts only if nothing follows it. If there is a tag <answer>,
    only its content counts.

    Args:
        response: The text.
        hashes_first: Whether "####" takes precedence over a box, wherever they stand.
    """
    spoken = response.rpartition("</think>")[2]
    marked = spoken if spoken.strip() else response
    if tagged := _TAGGED.findall(marked):
        return final_answer(tagged[-1], hashes_first=hashes_first) or tagged[-1]
    text = without_markdown(marked)
    hashes, box = after_hashes(text), last_box(text)
    place, found = hashes if hashes_first and hashes[0] >= 0 else max(hashes, box)
    if place >= 0:
        return found
    line = text.rstrip().rpartition("\n")[2]
    ends = _ALONE.fullmatch(text) or _SENTENCE.fullmatch(line) or _IS_THE_ANSWER.search(line)
    told = after_answer_is(text)[1] or last_bold(marked) or (ends[1] if ends else "")
    return told or (value_told(line) if _CONCLUSION.fullmatch(line) else "")


def value_told(sentence: str) -> str:
    """The result in a sentence: what follows its last "is", ":" or "=", or its only value.

    5/36 in "The probability is 5/36, about 14 %", $18 in "Janet makes $18 a day"; else "".
    """
    if _NO_CLAIM.match(sentence):
        return ""
    values = list(_VALUE.finditer(sentence))
    results = [
        n for n, value in enumerate(values) if _COMES_TO.search(sentence[: value.start()][-40:])
    ]
    if results:
        return _joined(sentence, values[results[-1] :])
    only = len(values) == 1 and _ONLY_BEHIND.fullmatch(sentence[: values[0].start()])
    return _joined(sentence, values) if only else ""


def _joined(text: str, found: list[re.Match[str]]) -> str:
    """The first match, with those separated from it only by a comma, "and" or "or"."""
    kept = found[:1]
    for match in found[1:]:
        if not _BETWEEN.fullmatch(text[kept[-1].end() : match.start()]):
            break
        kept.append(match)
    return ", ".join(next(filter(None, match.groups())) for match in kept)


def _stated(statement: str) -> str:
    """The mathematics at the start of a statement, or its first clause."""
    if _SPAN.match(statement):
        return _joined(statement, list(_SPAN.finditer(statement)))
    clause = _CLAUSE.split(statement, maxsplit=1)[0].strip(" *")
    return _MARK_AT_END.sub("", clause).removesuffix(".")


def clean(answer: str) -> str:
    r"""An answer without what leaves its value unchanged: spacing, \left, $..$, \text, dots."""
    answer = _CONTROL.sub("", answer)
    for pattern, plain in _AT_FIRST:
        answer = re.sub(pattern, plain, answer)
    answer = without_markdown(answer).translate(_CHARACTERS).strip()
    answer = re.sub(r"^(?i:minus|negative)\s+(?=[\d.$\\])", "-", answer)
    answer = re.sub(r"(?s)\\[(\[](.*)\\[)\]]", r"\1", answer)
    if answer.count("$") >= 2 and not _DOLLARS_OF_MONEY.search(answer):
        answer = re.sub(r"(?<!\\)\$", "", answer)
    for pattern, plain in _REWRITTEN:
        answer = re.sub(pattern, plain, answer)
    answer = answer.strip(" *`\n")
    if answer.endswith(".") and not answer.endswith(".."):
        answer = answer[:-1].rstrip(" *`")
    # A quotation mark after a number stands for inches.
    quoted = answer.startswith('"') or not re.search(r'\d"$', answer)
    return answer.strip('"') if quoted else answer


def split_top(text: str) -> list[str] | None:
    """Split a list at commas outside of brackets; None if the brackets do not match."""
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
