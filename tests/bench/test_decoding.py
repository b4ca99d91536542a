"""The benchmark of plain decoding end to end at a small size, and beside transformers."""

import json
from functools import partial
from importlib.util import find_spec

import pytest

from w2s_jax.bench.beside import prompts_of
from w2s_jax.bench.config import GenerateBenchConfig
from w2s_jax.bench.decoding import run, settings, shape
from w2s_jax.bench.floor import measure_rates

SMALL = GenerateBenchConfig(
    layers=1, width=64, vocab=64, batch_size=2, samples=3, prompt_tokens=5, max_new_tokens=4,
    repeats=1,
)  # fmt: skip


@pytest.fixture
def quick_rates(monkeypatch):
    """As quick as can be: what is looked at is what becomes of the rates."""
    rates = partial(measure_rates, side=256, megabytes=4)
    monkeypatch.setattr("w2s_jax.bench.decoding.measure_rates", rates)


def small(**fields):
    return GenerateBenchConfig(**SMALL.as_row() | fields)


def test_all_rows_have_their_full_length():
    config = settings(SMALL)
    assert (config.slots, config.rows, config.max_new_tokens, config.eos_ids) == (2, 3, 4, ())
    prompts = prompts_of(shape(SMALL), SMALL)
    assert [len(prompt) for prompt in prompts] == [5, 5]
    assert prompts == prompts_of(shape(SMALL), SMALL)


def test_figures_are_printed_and_written(tmp_path, capsys, quick_rates):
    path = tmp_path / "bench.json"
    none = str(tmp_path / "none")
    (figures,) = run(small(compare=("generate",), torch_python=none, json=str(path)))
    assert figures.tokens_per_second == pytest.approx(2 * 3 * 4 / figures.own.seconds)
    assert figures.floor_share == pytest.approx(figures.floor_seconds / figures.own.seconds)
    written = json.loads(path.read_text())
    assert written["own"]["peak_bytes"] == figures.own.peak_bytes > 10_000_000
    assert "none: No such file or directory" in written["beside"]["missing"]["generate"]
    assert "share of the floor" in capsys.readouterr().out


@pytest.mark.parity
@pytest.mark.skipif(not find_spec("torch"), reason="needs torch: pip install -e '.[test,parity]'")
def test_transformers_decodes_the_rows(quick_rates):
    (figures,) = run(small(compare=("generate",)))
    assert not figures.beside.missing
    theirs = figures.beside.sides["generate"]
    assert figures.beside.ratios["generate"] == theirs.seconds / figures.own.seconds > 0
    assert theirs.peak_bytes > 10_000_000
