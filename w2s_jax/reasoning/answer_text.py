"""Where a final answer stands in a text, and its LaTeX without what means nothing.

Knows no values: numbers are read in quantities.py, expressions in math_answers.py.
"""

import re

_BOX_TOKENS = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(r"(?:[\s$\\,;.()]|\band\b|\bor\b){1,20}")
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_ANSWER_IS = re.compile(r"(?i)\banswers?(?: +is| +are)? *: *\**\s*|\banswers? +(?:is|are)\b\s*")
_SPAN = re.compile(
    r"\$\$(.+?)\$\$|(?<!\\)\$((?:[^$\\]|\\.)+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_JOINED = re.compile(r"[\s,;]*(?:\band\b|\bor\b)?[\s,;]*")
_CLAUSE = re.compile(r"[.;!]\s|,\s+(?=(?:because|since|so|which|as|where|and we|therefore)\b)|\n")

_DROPPED = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?|\\(?:displaystyle|quad|qquad|limits)(?![a-zA-Z])"
)
_SPACES = re.compile(r"\\[,;:!> ]|~|\\(?:thinspace|space)(?![a-zA-Z])|\s+")
_WORDS = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|mbox|mathrm|mathbf|mathit|mathsf|operatorname)\s*\{([^{}]*)\}"
)
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_SHORT_FRACTION = re.compile(r"\\frac\s*(\d|\{[^{}]*\})\s*(\d|\{[^{}]*\})")
_SHORT_ROOT = re.compile(r"\\sqrt\s*(\d)")
# What the published normaliser, which takes "ft" out of everything, leaves of \\left and \\infty.
_DAMAGED = ((re.compile(r"\\le(?=[(\[{|])(?=.*\\right)"), ""), (re.compile(r"\\iny\b"), r"\\infty"))
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u200b-\u200f\u2060\ufeff\ud800-\udfff]")
_CHARACTERS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "÷": "/",
        "π": r"\pi ",
        "∞": r"\infty ",
        "°": r"^\circ",
        "∪": r"\cup ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "²": "^2",
        "³": "^3",
        "\xa0": " ",
        "\u2009": " ",
        "\u202f": " ",
    }
)


def last_box(text: str) -> tuple[int, str]:
    r"""Where the last closed \boxed{..} begins, and its content; (-1, "") if there is none.

    Boxes with no more than a comma, "and" or "or" between them are one answer. An unclosed box is
    the end of a text that was cut off, and no answer.
    """
    open_boxes: list[tuple[int, int] | None] = []
    boxes: list[tuple[int, int, str]] = []
    for token in _BOX_TOKENS.finditer(text):
        if token[0] == "{":
            open_boxes.append(None)
        elif token[0] == "}":
            if open_boxes and (begin := open_boxes.pop()):
                boxes = [box for box in boxes[-8:] if box[0] < begin[0]]
                boxes.append((begin[0], token.end(), text[begin[1] : token.start()]))
        elif token[0].startswith(("\\boxed", "\\fbox")):
            open_boxes.append((token.start(), token.end()))
    if not boxes:
        return -1, ""
    start, _, content = boxes.pop()
    contents, first = [content], start
    while boxes and _BETWEEN_BOXES.fullmatch(text[boxes[-1][1] : first][:40]):
        first, _, content = boxes.pop()
        contents.insert(0, content)
    return start, ", ".join(dict.fromkeys(part.strip() for part in contents))


def after_hashes(text: str) -> tuple[int, str]:
    """Where the last "####" with something behind it on its line stands, and what that is."""
    found = [match for match in _HASHES.finditer(text) if match[1].strip()]
    return (found[-1].start(), found[-1][1].strip()) if found else (-1, "")


def after_answer_is(text: str) -> tuple[int, str]:
    """Where the last "answer is", "answer:" or the like stands, and the statement behind it."""
    for match in reversed(list(_ANSWER_IS.finditer(text))):
        if statement := text[match.end() :].strip(" *:"):
            return match.start(), _stated(statement)
    return -1, ""


def _stated(statement: str) -> str:
    """The mathematics at the start of a statement, or its first clause."""
    spans: list[str] = []
    end = 0
    while match := _SPAN.match(statement, end):
        spans.append(next(group for group in match.groups() if group is not None))
        between = _JOINED.match(statement, match.end())
        end = between.end() if between else match.end()
    if spans:
        return ", ".join(spans)
    return _CLAUSE.split(statement, maxsplit=1)[0].strip(" *").removesuffix(".")


def clean(answer: str) -> str:
    r"""An answer without what does not change its value: spacing, \left, $..$, \text, dots."""
    answer = _CONTROL.sub("", answer).translate(_CHARACTERS).strip()
    answer = re.sub(r"\\[(\[](.*)\\[)\]]", r"\1", answer, flags=re.DOTALL)
    if answer.count("$") >= 2 and not re.search(r"\$\s*[\d.,]+\s.*\$", answer):
        answer = re.sub(r"(?<!\\)\$", "", answer)
    answer = answer.replace("\\$", "$").replace("\\%", "%").replace("{,}", ",")
    answer = answer.replace("\\{", "\\lbrace ").replace("\\}", "\\rbrace ")
    for pattern, repaired in _DAMAGED:
        answer = pattern.sub(repaired, answer)
    answer = _DROPPED.sub("", answer)
    # Before spaces go: in a matrix, "\\ " ends a row.
    answer = answer.replace("\\\\", "\x00")
    answer = re.sub(r"(?<=\d)\\[,; ](?=\d{3}(?!\d))", ",", answer)
    answer = re.sub(r"\\!", "", answer)
    answer = _SPACES.sub(" ", answer)
    for _ in range(3):
        answer = _WORDS.sub(r" \1 ", answer)
    answer = _FRACTION.sub(r"\\frac", answer)
    answer = _SHORT_FRACTION.sub(_braced, answer)
    answer = _SHORT_ROOT.sub(r"\\sqrt{\1}", answer)
    answer = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])", " degrees ", answer)
    # As typed in plain text: in LaTeX, 2^10 would be two to the first, times nought.
    answer = re.sub(r"(?:\*\*|\^)\s*(-?\d+)(?![\d.])", r"^{\1}", answer).replace("**", "^")
    answer = re.sub(r"\s+", " ", answer.replace("\x00", "\\\\"))
    answer = answer.replace("\\lbrace ", "\\{").replace("\\rbrace ", "\\}")
    return _without_end(answer)


def _without_end(answer: str) -> str:
    answer = answer.strip(" *`\n")
    if answer.endswith(".") and not answer.endswith(".."):
        answer = answer[:-1].rstrip(" *`")
    return answer.strip('"')


def _braced(match: re.Match[str]) -> str:
    parts = [part if part.startswith("{") else f"{{{part}}}" for part in match.groups()]
    return "\\frac" + "".join(parts)


def split_top(text: str, separator: str = ",") -> list[str] | None:
    """Parts of a list between separators outside all brackets; None where brackets do not match."""
    parts, depth, begin = [], 0, 0
    for index, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth < 0:
                return None
        elif character == separator and depth == 0:
            parts.append(text[begin:index].strip())
            begin = index + 1
    return None if depth else [*parts, text[begin:].strip()]
