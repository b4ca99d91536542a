from pathlib import Path

import numpy as np
import pytest

from tests.cli.test_search import tiny
from w2s_jax.errors import InputError
from w2s_jax.models.load import load_model
from w2s_jax.text.rows import write_jsonl
from w2s_jax.text.tokenizer import load_tokenizer
from w2s_jax.text.training_data import DataConfig, load
from w2s_jax.train import logprobs
from w2s_jax.train.export import weights_identity
from w2s_jax.train.logprobs import reference_logprobs, with_reference

ROWS = [
    {"prompt": "film " * (1 + i % 5), "chosen": " a", "rejected": " b" * i} for i in range(1, 8)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("models") / "model", 0)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def data(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    write_jsonl(place / "pairs.jsonl", ROWS)
    config = DataConfig(data=(str(place / "pairs.jsonl"),), cache=str(place), max_length=96)
    return load("pairs", config, load_tokenizer(folder))


def expected(model, data):
    """One pair at a time, by all logits."""
    found = []
    for index in range(len(data)):
        batch = data.at([index])
        for side in range(2):
            tokens, targets = batch["tokens"][0, side], batch["targets"][0, side]
            logits = np.asarray(model(tokens[None])[0], np.float64)
            logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
            places = np.flatnonzero(targets)
            found.append(logprobs[places - 1, tokens[places]].sum())
    return np.reshape(found, (-1, 2))


@pytest.mark.parametrize("rows", [4, 16])
def test_every_pair_has_its_log_probs_in_the_order_of_the_data(model, data, rows):
    found = reference_logprobs(model, data, rows=rows)
    np.testing.assert_allclose(found, expected(model, data), atol=1e-4)


def test_they_are_kept_by_weights_and_data_and_damage_is_mended(model, data, tmp_path):
    def read(identity):
        found = with_reference(model, data, rows=4, cache=tmp_path, identity=identity)
        return found.columns["reference"]

    first = read("one")
    path = next(tmp_path.iterdir())
    stamp = path.stat().st_mtime_ns
    np.testing.assert_array_equal(read("one"), first)
    assert path.stat().st_mtime_ns == stamp
    read("two")
    assert len(list(tmp_path.iterdir())) == 2
    path.write_bytes(path.read_bytes()[:-3])
    np.testing.assert_array_equal(read("one"), first)
    np.save(path, np.full_like(first, np.nan))
    np.testing.assert_array_equal(read("one"), first)


def test_a_cache_that_cannot_be_written_is_told_before_any_work(model, data, monkeypatch):
    monkeypatch.setattr(logprobs, "reference_logprobs", lambda *a, **k: pytest.fail("computed"))
    with pytest.raises(InputError, match="/proc/nowhere/.* cannot be written"):
        with_reference(model, data, rows=4, cache=Path("/proc/nowhere"), identity="x")


def test_batches_hold_the_log_probs_of_their_rows(data):
    logprobs = np.arange(2 * len(data), dtype=np.float32).reshape(-1, 2)
    source = data.beside("reference", logprobs)
    batch = source.at([3, 1, 0], slice(1, 3))
    np.testing.assert_array_equal(batch["reference"], logprobs[[1, 0]])
    assert batch["tokens"].shape[:2] == (2, 2)
    assert source.identity != data.beside("reference", logprobs + 1).identity
    assert source.names(2) == data.names(2)


def test_weights_are_known_by_content(folder, tmp_path):
    assert weights_identity(Path(folder)) == weights_identity(Path(folder))
    other = tiny(tmp_path / "other", 1)
    assert weights_identity(Path(other)) != weights_identity(Path(folder))
