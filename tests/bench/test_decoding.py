"""The benchmark of plain decoding: its rows, and what runs beside it."""

from importlib.util import find_spec

import pytest
from rich.console import Console

from tests.tiny import tiny_config
from w2s_jax.bench.decoding import (
    Figures,
    Options,
    Side,
    prompts_of,
    report,
    settings,
    transformers_seconds,
)

SMALL = Options(prompts=2, samples=3, prompt_tokens=5, new_tokens=4, dtype="float32", repeats=1)


def test_both_decode_the_same_rows_to_their_full_length():
    config = settings(SMALL)
    assert (config.slots, config.rows, config.max_new_tokens, config.eos_ids) == (2, 3, 4, ())
    prompts = prompts_of(tiny_config(), SMALL)
    assert [len(prompt) for prompt in prompts] == [5, 5]
    assert prompts == prompts_of(tiny_config(), SMALL)


def test_an_interpreter_without_torch_is_said(tmp_path):
    options = Options(python=str(tmp_path / "none"))
    side, why = transformers_seconds(tiny_config(), options)
    assert side is None
    assert "none: No such file or directory" in why
    own = Side(seconds=2.0, tokens_per_second=12.0, first_seconds=1.0)
    with (console := Console(width=200)).capture() as told:
        report(console, tiny_config(), SMALL, Figures(own, None, why, 0.5, None))
    assert "share of the floor 25%" in told.get()
    assert "transformers was not measured: " in told.get()


@pytest.mark.parity
@pytest.mark.skipif(not find_spec("torch"), reason="needs torch: pip install -e '.[test,parity]'")
def test_transformers_decodes_the_rows():
    side, why = transformers_seconds(tiny_config(), SMALL)
    assert why is None
    assert side.tokens_per_second == pytest.approx(2 * 3 * 4 / side.seconds)
