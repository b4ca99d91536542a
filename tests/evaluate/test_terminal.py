import io
import re

import numpy as np
import pytest
from rich.console import Console
from rich.style import Style

from w2s_jax.evaluate.report import shade, show, show_plain

TOKENS = [(" a", 0.0), (" good", 1.9), (" bad", -2.0), (" film", 0.6), ("\x1b[2J\x00\ud83d", -0.7)]


def printed(console_of=Console, *, prompt="The", tokens=TOKENS, encoding="utf-8", **options):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    show(console_of(file=file, width=100, **options), prompt, tokens, 0.8)
    return raw.getvalue().decode(encoding)


def backgrounds(text):
    return {text.plain[span.start : span.end]: Style.parse(str(span.style)) for span in text.spans}


def luminance(colour):
    parts = np.array(colour.get_truecolor()) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_the_sign_gives_the_colour_and_the_size_the_strength():
    styles = backgrounds(shade(TOKENS))
    assert " a" not in styles
    good, film, bad = (styles[word].bgcolor.get_truecolor() for word in (" good", " film", " bad"))
    assert good.blue > good.red
    assert film.blue > film.red
    assert bad.red > bad.blue
    assert luminance(styles[" good"].bgcolor) < luminance(styles[" film"].bgcolor)
    assert [styles[word].underline for word in (" good", " bad")] == [None, True]


def test_every_shade_can_be_read():
    styles = backgrounds(shade([(str(i), i / 10) for i in range(-10, 11)], scale=1.0))
    assert len({str(style) for style in styles.values()}) == 8
    for style in styles.values():
        bright, dark = sorted(map(luminance, (style.color, style.bgcolor)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5


def test_odd_numbers_are_not_shaded_or_shaded_fully():
    tokens = [("nan", float("nan")), ("low", float("-inf")), ("high", float("inf")), ("one", 1)]
    styles = backgrounds(shade(tokens))
    assert "nan" not in styles
    assert styles["low"].bgcolor.get_truecolor().red > 150
    assert styles["high"].bgcolor == styles["one"].bgcolor
    assert shade([]).plain == ""


def test_no_token_commands_the_terminal():
    assert shade(TOKENS).plain == " a good bad film␛[2J␀\ufffd"
    assert shade([("a\u202eb\x9bc\r\n\td", 1.0)]).plain == "a\ufffdb\ufffdc␍\n\td"


def test_a_terminal_gets_colours_and_a_legend():
    out = printed(force_terminal=True, color_system="truecolor")
    assert "\x1b[2J" not in out
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert plain.splitlines()[0].startswith("The a good bad film")
    assert "score +0.80, 5 tokens" in plain
    bounds = [float(number) for number in re.findall(r"[+-][\d.]+", plain.splitlines()[-1])]
    assert bounds == [-1.5, -1.0, -0.5, -0.2, 0.2, 0.5, 1.0, 1.5]
    # The prompt is dim, the response behind it is not.
    assert re.match(r"\x1b\[2mThe\x1b\[0m a\x1b\[(?!2;)", out)


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "no_color": True}])
def test_without_colours_the_values_are_written_out(options):
    out = printed(**options)
    assert "\x1b" not in out
    assert out.splitlines()[0] == (
        "The a[+0.00] good[+1.90] bad[-2.00] film[+0.60]␛[2J␀\ufffd[-0.70]"
    )
    assert "score +0.80, 5 tokens" in out


def test_the_environment_can_forbid_colours(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in printed(force_terminal=True)


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "color_system": "truecolor"}])
def test_a_narrow_encoding_gets_question_marks(options):
    out = printed(prompt="Größe 好", encoding="ascii", **options)
    assert "Gr??e ?" in out
    assert "good" in out


def test_prompts_are_text_not_markup():
    assert printed(prompt="[bold]x[/bold] [link").startswith("[bold]x[/bold] [link a")


def test_a_response_without_token_scores_is_shown_plainly(capsys):
    show_plain(Console(no_color=True, force_terminal=False), "ask ", "said\x1b[31m", 2.5)
    out = capsys.readouterr().out
    assert "ask said" in out
    assert "\x1b" not in out
    assert "score +2.50; its tokens have none of their own" in out
