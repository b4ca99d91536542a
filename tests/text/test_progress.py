"""How far a command is, where its output is kept and on a terminal."""

import sys
import time

from w2s_jax.text.rows import progress


def test_lines_come_at_the_start_now_and_then_and_at_the_end(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 31.0, 32.0, 40.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress(5, "prompt", done=1, name="cbs") as advance:
        for _ in range(4):
            advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "cbs: 1 of 5 prompts; the first wait for programs to be compiled",
        "cbs: 3 of 5 prompts, 31 s",
        "cbs: 5 of 5 prompts, 40 s",
    ]


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress(2, "row") as advance:
        advance(2)
    assert "2/2" in capsys.readouterr().err
