"""Token ids and targets against TRL's own code: recorded, and live where trl is there."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.text.data_cases import CASES
from w2s_jax.text.rows import write_jsonl
from w2s_jax.text.tokenizer import load_tokenizer
from w2s_jax.text.training_data import DataConfig, load

FOLDER = Path(__file__).parents[1] / "golden" / "training_data"
GOLDEN = json.loads((FOLDER / "trl.json").read_text())


def ours(name, folder):
    """Rows as the record holds them, from the batch of all of them."""
    kind, chat_template, rows, options = CASES[name]
    tokenizer = load_tokenizer(FOLDER)
    tokenizer.chat_template = chat_template
    write_jsonl(folder / "rows.jsonl", rows)
    config = DataConfig(data=(str(folder / "rows.jsonl"),), cache=str(folder), **options)
    data = load(kind, config, tokenizer)
    batch = data.at(range(len(data)))
    shape = (len(data), 1 if kind == "sequences" else 2, -1)
    arrays = [batch[part].reshape(shape) for part in ("tokens", "targets", "segments")]
    found = []
    for index, sides in enumerate(zip(*arrays, strict=True)):
        row = {"sides": []}
        for tokens, targets, segments in zip(*sides, strict=True):
            length = int((segments > 0).sum())
            assert (segments[:length] == 1).all()
            row["sides"].append([tokens[:length].tolist(), targets[:length].tolist()])
        if kind == "labelled":
            row["label"] = bool(batch["labels"][index])
        found.append(row)
    return found


def check(found, expected):
    assert len(found) == len(expected)
    for row, like in zip(found, expected, strict=True):
        assert row.get("label") == like.get("label")
        for (ids, targets), (ids_like, counts) in zip(row["sides"], like["sides"], strict=True):
            assert ids == ids_like
            # The first token's label is never compared with anything.
            np.testing.assert_array_equal(targets, [False, *counts[1:]])


def comparable(name, rows):
    """TRL puts all chosen sides before the rejected ones, and so pairs other responses."""
    if name != "labelled pairs":
        return rows
    return sorted(({**row, "sides": row["sides"][:1]} for row in rows), key=str)


@pytest.mark.parametrize("name", CASES)
def test_rows_equal_the_record(name, tmp_path):
    check(comparable(name, ours(name, tmp_path)), comparable(name, GOLDEN["cases"][name]))


def test_the_record_holds_every_case():
    assert set(GOLDEN["cases"]) == set(CASES)


@pytest.mark.parity
@pytest.mark.skipif(
    not (find_spec("trl") and find_spec("torch")),
    reason="live parity needs trl: pip install -e '.[test,parity]'",
)
def test_the_record_is_what_trl_makes_now():
    from tests.golden.make_training_data import golden

    assert golden(FOLDER)["cases"] == GOLDEN["cases"]
