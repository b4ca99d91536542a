"""The benchmark end to end at a small size, and its wrong options."""

import json
from functools import partial

import numpy as np
import pytest

from tests.tiny import tiny_model
from w2s_jax.bench import search as bench
from w2s_jax.bench.config import SearchBenchConfig
from w2s_jax.bench.floor import measure_rates
from w2s_jax.bench.search import check, run
from w2s_jax.errors import InputError
from w2s_jax.search.models import Guide
from w2s_jax.text.tokenizer import vocabularies

SMALL = {
    "policy_layers": 1,
    "policy_width": 64,
    "guide_layers": 1,
    "guide_width": 64,
    "vocab": 32,
    "max_new_tokens": 4,
    "chunk_length": 2,
    "prompt_tokens": 3,
    "batch_size": 2,
    "repeats": 1,
}


@pytest.fixture
def quick_rates(monkeypatch):
    """As quick as can be: what is looked at is what becomes of the rates."""
    rates = partial(measure_rates, side=256, megabytes=4)
    monkeypatch.setattr("w2s_jax.bench.search.measure_rates", rates)


@pytest.fixture
def asked(monkeypatch):
    """What each search that is timed was given; none is run."""
    asked = []

    def search(*args, **settings):
        asked.append((args, settings))
        settings.get("on_result", str)(None)

    monkeypatch.setattr(bench, "search", search)
    return asked


def test_figures_are_printed_and_written(tmp_path, capsys, quick_rates, asked):
    """The phases are run."""
    path = tmp_path / "bench.json"
    (figures,) = run(SearchBenchConfig(**SMALL, json=str(path)))
    for (_, _, prompts, config), _ in asked:
        assert np.shape(prompts) == (2, 3)
        assert (config.max_new_tokens, config.length, config.slots) == (4, 2, 2)
    written = json.loads(path.read_text())
    assert written["options"]["batch_size"] == 2
    assert "json" not in written["options"]
    assert written["machine"]["device"] == "cpu"
    assert 0 < figures.first_row_seconds < 1
    assert figures.peak_bytes > 10_000_000
    rates = written["rates"]
    assert rates["bytes"] == (rates["before"]["bytes"] + rates["after"]["bytes"]) / 2
    assert written["prompts_per_second"] == figures.prompts_per_second > 0
    assert figures.tokens_per_second == pytest.approx(4 * figures.prompts_per_second)
    assert figures.floor_share == pytest.approx(
        sum(figures.floor_seconds.values()) / (2 * figures.seconds_per_prompt)
    )
    assert set(figures.phase_seconds) == {"prefill", "proposing", "scoring", "selecting"}
    told = capsys.readouterr().out
    assert "share of the floor" in told
    assert "guides of another vocabulary" not in told
    assert "CPU cores, jax 0." in told


def test_a_curve_has_a_row_for_each_point(tmp_path, capsys, quick_rates, asked, monkeypatch):
    monkeypatch.setattr(bench, "phase_seconds", lambda *_: dict.fromkeys(bench.PHASES, 1.0))
    path = tmp_path / "bench.json"
    curve = ("batch_size=1,2", "wk=2x1")
    found = run(SearchBenchConfig(**SMALL, curve=curve, json=str(path)))
    configs = [config for (_, _, _, config), _ in asked[::2]]
    assert [one.slots for one in configs] == [1, 2, 2]
    assert [(one.beam_width, one.successors) for one in configs] == [(4, 4), (4, 4), (2, 1)]
    assert len({id(args[0]) for args, _ in asked}) == 1
    rows = json.loads(path.read_text())["curve"]
    assert list(rows) == ["batch_size=1", "batch_size=2", "wk=2x1"]
    assert rows["wk=2x1"]["tokens_per_second"] == found[2].tokens_per_second
    told = capsys.readouterr().out.splitlines()
    assert told[-4].split()[:2] == ["s/prompt", "floor"]
    assert told[-1].split()[0] == "wk=2x1"


def test_guides_of_another_vocabulary_read_the_texts_of_the_prompts(asked):
    options, model = SearchBenchConfig(**SMALL), tiny_model(0, layers=1)
    prompts = np.random.default_rng(0).integers(2, 32, (2, 3)).tolist()
    guide = Guide(model, model)
    across = bench.measure_across(model, guide, prompts, check(options), options, 0.5)
    (policy, guides, sent, _), settings = asked[-1]
    own, _ = vocabularies(32)
    assert (policy, guides, sent) == (model, None, prompts)
    assert [one.text for one in settings["conversations"]] == [own.decode(row) for row in prompts]
    assert settings["decode"](prompts[0]) == own.decode(prompts[0])
    assert across.ratio == pytest.approx(2 * across.seconds_per_prompt / 0.5)
    assert 1 <= across.token_ratio <= 2


@pytest.mark.slow
def test_searches_are_timed_on_the_device_and_across_vocabularies(capsys, quick_rates):
    (figures,) = run(SearchBenchConfig(**SMALL, cross_vocabulary=True))
    across = figures.cross_vocabulary
    assert figures.compile_seconds > 0
    assert across.compile_seconds > 0
    assert across.ratio == pytest.approx(across.seconds_per_prompt / figures.seconds_per_prompt)
    assert "guides of another vocabulary" in capsys.readouterr().out


@pytest.mark.parametrize("size", [16, 8192, 32000])
def test_vocabularies_write_the_same_words_in_other_tokens(size):
    own, other = vocabularies(size)
    assert max(len(own), len(other)) <= size
    tokens = np.random.default_rng(0).integers(2, len(own), 300).tolist()
    text = own.decode(tokens)
    assert own(text).input_ids == tokens
    read = other(text).input_ids
    assert other.unk_token_id not in read
    assert 1.1 * len(tokens) < len(read) < 1.6 * len(tokens)


@pytest.mark.parametrize(
    ("field", "value"),
    [("policy_width", 100), ("batch_size", 0), ("repeats", 0), ("vocab", 1), ("beam_width", 0)],
)
def test_wrong_options_are_refused(field, value):
    with pytest.raises(InputError):
        check(SearchBenchConfig(**{field: value}))
