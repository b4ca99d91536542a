"""The search that transformers runs beside this package's, and what is said where it cannot."""

import sys
from dataclasses import replace
from importlib.util import find_spec

import jax
import numpy as np
import pytest
from rich.console import Console

from tests.search.oracle import gumbels
from tests.tiny import tiny_config, tiny_model
from w2s_jax.bench.beside import Beside, Side, compare, job_of, report_beside
from w2s_jax.bench.config import GenerateBenchConfig, SearchBenchConfig
from w2s_jax.bench.search import Subject, check, jobs_of
from w2s_jax.bench.setup import PEERS, call, gpt2, random_model
from w2s_jax.models.model import Model
from w2s_jax.models.save import save_model
from w2s_jax.search import Guide, search

needs_torch = pytest.mark.skipif(
    not find_spec("torch"), reason="needs torch: pip install -e '.[test,parity]'"
)


def told(found: Beside) -> str:
    with (console := Console(width=200)).capture() as said:
        report_beside(console, found)
    return said.get()


def test_an_interpreter_without_torch_is_said(tmp_path):
    options = GenerateBenchConfig(torch_python=str(tmp_path / "none"))
    found = compare(tiny_config(), options, {"generate": {}})
    assert not found.sides
    assert "generate of the rows was not measured: " in told(found)
    assert "none: No such file or directory" in told(found)


def test_ratios_are_of_throughput():
    found = Beside({"hf": Side(3.0, 0.1, 2**30)}, {}).over(2.0)
    assert found.ratios == {"hf": 1.5}
    assert "1.50 times the throughput of the same search in transformers, which took 3 s" in told(
        found
    )


def sharp_gpt2(seed: int) -> Model:
    model = random_model(gpt2(64, 64, 2, 32), seed)
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, model.params)
    return Model(model.config, params)


def sharp_llama(seed: int) -> Model:
    return tiny_model(seed, vocab_size=64)


@pytest.mark.parity
@needs_torch
@pytest.mark.parametrize("make", [sharp_gpt2, sharp_llama])
def test_both_find_the_same_responses_from_the_same_draws(make, tmp_path):
    options = SearchBenchConfig(
        beam_width=2, successors=3, chunk_length=3, max_new_tokens=7, prompt_tokens=4,
        batch_size=2, repeats=1,
    )  # fmt: skip
    models = [make(seed) for seed in range(3)]
    folders = tuple(str(tmp_path / str(seed)) for seed in range(3))
    for model, folder in zip(models, folders, strict=True):
        save_model(model, folder)
    subject, config = Subject(models[0], Guide(*models[1:]), folders), check(options)
    job = job_of(models[0].config, options)
    job |= jobs_of(subject, replace(options, compare=("hf",)))["hf"]
    draws = [
        [[gumbels(0, row, position, lane, 50) for lane in range(6)] for position in range(7)]
        for row in range(2)
    ]
    theirs = call(job | {"draws": np.asarray(draws).tolist()}, sys.executable, "-P", PEERS)
    for result, tokens, scores in zip(
        search(subject.policy, subject.guide, job["prompts"], config),
        theirs["tokens"],
        theirs["scores"],
        strict=True,
    ):
        assert [list(one.tokens) for one in result.hypotheses] == tokens
        np.testing.assert_allclose([one.score for one in result.hypotheses], scores, atol=1e-4)
