"""What a search looked at: a self-contained page, and coloured tokens in the terminal.

Rows of a trace go in, an HTML file comes out; report.html, report.css, report.js and
report_tree.js beside this module are its parts. Where a terminal has no colours (NO_COLOR, a pipe,
a file) the same numbers stand beside the tokens.
"""

import base64
import hashlib
import html
import importlib.resources
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.text import Text

from w2s_jax.errors import InputError
from w2s_jax.text.rows import write_whole

DIGITS = 7
_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


def write_report(
    path: str | Path,
    rows: Iterable[Mapping[str, Any]],
    *,
    title: str,
    settings: Mapping[str, Any],
) -> None:
    """Write the page that shows a trace; the file appears whole or not at all.

    Rows are read once and packed one at a time. A row is {"row_id": int, "prompt": str, "response":
    str, "score": float, "method": str, "chunks": [{"candidates": [candidate, ...]}, ...], "tokens":
    [[text, log-ratio], ...]}, where a candidate is {"parent": int, "text": str, "score": float,
    "objectives": [float, ...], "kept": int or null, "finished": bool}: `parent` is the place, among
    those that the chunk before kept, of the hypothesis it continues (all continue the prompt in the
    first chunk), `kept` its own place, null where it was dropped. The tokens are as a guide reads
    them; "policy_tokens" is how many the policy wrote, by default as many. method, chunks, tokens
    and objectives may be left out.

    Args:
        path: The HTML file.
        rows: The trace, a row for each prompt.
        title: Of the page.
        settings: Shown as they are: values by name, nothing secret.

    Raises:
        InputError: Where the file cannot be written, and for a row that is not of this form or
            whose row_id came before.
    """
    write_whole(path, _page(rows, title, settings))


def shading_scale(log_ratios: np.ndarray) -> float:
    """The log-ratio at which the shading of tokens is strongest, a round number.

    Args:
        log_ratios: Any shape, in nats.

    Returns:
        The first round number (1, 1.5, 2, 3, ... times a power of ten) that 98 % of the finite ones
        do not exceed in size, so that a few outliers do not pale the rest; 1 where all are zero.
    """
    sizes = np.abs(log_ratios[np.isfinite(log_ratios)])
    wanted = float(np.quantile(sizes, 0.98)) if sizes.size else 0.0
    if wanted < 1e-6:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(wanted))
    return next((s * unit for s in _SCALES if s * unit >= wanted), 10 * unit)


def _page(
    rows: Iterable[Mapping[str, Any]], title: str, settings: Mapping[str, Any]
) -> Iterator[bytes]:
    """The page in pieces: its head, a block for each row, the index of all, the script."""
    style, script = _asset("report.css"), _asset("report_tree.js") + _asset("report.js")
    fields = {
        "title": html.escape(title),
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
    }
    head, tail = (
        re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], part)
        for part in _asset("report.html").split("{{data}}")
    )
    # A lone surrogate has no UTF-8 form; as a character reference a browser reads it as U+FFFD.
    yield head.encode("utf-8", "xmlcharrefreplace")
    index: list[list[Any]] = []
    seen: set[int] = set()
    ratios: list[np.ndarray] = []
    for number, row in enumerate(rows, start=1):
        try:
            entry, detail = _compact(row)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            fault = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"trace row {number}: not of a trace's form ({fault})") from None
        if entry[0] in seen:
            raise InputError(f"trace row {number}: row_id {entry[0]} came before; ids must differ")
        seen.add(entry[0])
        ratios.append(np.array([ratio for _, ratio in detail["tokens"]], np.float64))
        yield _block(f"row-data-{len(index)}", detail)
        index.append(entry)
    yield _block(
        "index-data",
        {
            "settings": [[str(name), _shown(value)] for name, value in settings.items()],
            "scale": shading_scale(np.concatenate([np.zeros(0), *ratios])),
            "rows": index,
        },
    )
    yield tail.encode("utf-8", "xmlcharrefreplace")


def _compact(row: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """(entry of the index, what is shown when the row is opened), fields by position."""
    tokens = [[_text(text), _number(ratio)] for text, ratio in row.get("tokens", ())]
    chunks = [
        [_candidate(candidate) for candidate in chunk["candidates"]]
        for chunk in row.get("chunks", ())
    ]
    entry = [
        int(row["row_id"]),
        _text(row["prompt"]),
        _text(row["response"]),
        _number(row["score"]),
        _text(row.get("method", "")),
        int(row.get("policy_tokens", len(tokens))),
    ]
    return entry, {"chunks": chunks, "tokens": tokens}


def _candidate(candidate: Mapping[str, Any]) -> list[Any]:
    objectives = [_number(value) for value in candidate.get("objectives") or ()]
    kept = candidate["kept"]
    return [
        int(candidate["parent"]),
        _text(candidate["text"]),
        _number(candidate["score"]),
        -1 if kept is None else int(kept),
        int(bool(candidate["finished"])),
        *([objectives] if len(objectives) > 1 else []),
    ]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text is {type(value).__name__}")
    return value


def _number(value: Any) -> float | str:
    """A number as JSON can hold it: seven digits, or the word that JavaScript reads as it."""
    number = float(value)
    if math.isfinite(number):
        return float(f"{number:.{DIGITS}g}")
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _block(name: str, value: Any) -> bytes:
    """An inert element that holds `value`: JSON in ASCII, deflated, in base64.

    Nothing in base64 can end the element, whatever the value holds.
    """
    packed = zlib.compress(json.dumps(value, separators=(",", ":")).encode("ascii"), 9)
    return b'<script type="text/plain" id="%s">%s</script>\n' % (
        name.encode("ascii"),
        base64.b64encode(packed),
    )


def _asset(name: str) -> str:
    return importlib.resources.files("w2s_jax.evaluate").joinpath(name).read_text("utf-8")


def _hash(source: str) -> str:
    """The source expression by which a content security policy allows exactly this text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


STEPS = 4
# Blue and orange, from pale to strong, each with an ink that can be read on it: colour-blind safe.
_MORE = ("#111111 on #d1e5f0", "#111111 on #92c5de", "#111111 on #5fa4d0", "#ffffff on #2166ac")
_LESS = ("#111111 on #fee0b6", "#111111 on #fdb863", "#111111 on #ec9534", "#ffffff on #9c4a03")
# Controls below the space have pictures; others, halves of characters and marks that turn the
# direction of writing have none.
_BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_TAMED = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_TAMED |= dict.fromkeys([*range(0x7F, 0xA0), *range(0xD800, 0xE000), *map(ord, _BIDI)], 0xFFFD)


def shade(tokens: Sequence[tuple[str, float | int]], *, scale: float | None = None) -> Text:
    """The tokens as one text, each with the background that its log-ratio gives it.

    Blue is above zero, orange below and underlined too; below a tenth of the scale nothing is
    shaded. Control characters, which could command the terminal, are shown as pictures.

    Args:
        tokens: (text, log p_tuned − log p_untuned) each, in nats.
        scale: Where the shading is strongest; by default `shading_scale` of these tokens.
    """
    scale = _scale(tokens) if scale is None else scale
    text = Text()
    for token, ratio in tokens:
        text.append(_tame(token), _style(float(ratio), scale))
    return text


def show(
    console: Console,
    prompt: str,
    tokens: Sequence[tuple[str, float | int]],
    score: float | int,
) -> None:
    """Print a prompt, its response shaded as `shade` does, the score and a legend.

    On a console without colours each token is followed by its log-ratio in brackets instead.
    Characters that the console's encoding lacks become question marks.

    Args:
        console: Where it is printed.
        prompt: What the response answers.
        tokens: Those of the response, as `shade` takes them.
        score: Of the response, in nats.
    """
    scale, coloured = _scale(tokens), _is_coloured(console)
    body = shade(tokens, scale=scale) if coloured else _numbered(tokens)
    legend = [_legend(scale)] if coloured else []
    if tokens and not coloured:
        legend = [Text("[log p_tuned - log p_untuned] behind each token")]
    _print(console, prompt, body, f"score {_signed(float(score))}, {len(tokens)} tokens", *legend)


def show_row(row: Mapping[str, Any]) -> None:
    """Print an answer that a search has traced, its tokens shaded where a guide values them."""
    from tqdm import tqdm

    trace = row["trace"]
    with tqdm.external_write_mode():
        if trace["tokens"]:
            show(Console(), trace["prompt"], trace["tokens"], row["score"])
        else:
            show_plain(Console(), trace["prompt"], row["response"], row["score"])


def show_plain(console: Console, prompt: str, response: str, score: float | int) -> None:
    """Print a prompt and a response whose tokens have no scores of their own, and its score."""
    total = f"score {_signed(float(score))}; its tokens have none of their own"
    _print(console, prompt, Text(_tame(response)), total)


def _is_coloured(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _print(console: Console, prompt: str, body: Text, total: str, *legend: Text) -> None:
    """Print what is behind a prompt and the lines below it; the prompt is dim, the total bold."""
    coloured = _is_coloured(console)
    response = Text().append(_tame(prompt), "dim" if coloured else "").append_text(body)
    for line in (response, Text(total, "bold" if coloured else ""), *legend):
        console.print(_encodable(line, console.encoding), highlight=False, soft_wrap=not coloured)


def _scale(tokens: Sequence[tuple[str, float | int]]) -> float:
    return shading_scale(np.array([ratio for _, ratio in tokens], np.float64))


def _style(ratio: float, scale: float) -> Style:
    share = abs(ratio) / scale
    if math.isnan(share) or share < 0.1:
        return Style.null()
    step = int(min(share * STEPS, STEPS - 1))
    colours = Style.parse((_MORE if ratio > 0 else _LESS)[step])
    return colours + Style(underline=True) if ratio < 0 else colours


def _numbered(tokens: Sequence[tuple[str, float | int]]) -> Text:
    return Text("".join(f"{_tame(token)}[{_signed(float(ratio))}]" for token, ratio in tokens))


def _legend(scale: float) -> Text:
    """One swatch for each step of the shading, holding the log-ratio from which it is used."""
    text = Text("log p_tuned - log p_untuned from ")
    starts = [0.1, *(step / STEPS for step in range(1, STEPS))]
    for share in [*(-share for share in reversed(starts)), *starts]:
        # A hair beyond the bound, so that rounding cannot put it into the step before.
        text.append(f"{share * scale:^+6.2g}", _style(share * scale * 1.0001, scale))
    return text


def _signed(number: float) -> str:
    return f"{number:+.2f}"


def _tame(text: str) -> str:
    return text.translate(_TAMED)


def _encodable(text: Text, encoding: str) -> Text:
    """`text` with question marks, which are as wide, for what `encoding` cannot hold."""
    plain = text.plain
    try:
        plain.encode(encoding)
    except UnicodeEncodeError:
        fitting = "".join(letter.encode(encoding, "replace").decode(encoding) for letter in plain)
        return Text(fitting, spans=list(text.spans))
    return text
