"""The evaluation of a run, on a loss that shows what it is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.train.config import RunConfig
from w2s_jax.train.losses import Mean
from w2s_jax.train.step import Evaluation, TrainState, number_of_steps

VALUES = np.array([4.0, np.nan, 1.0, 2.0, 3.0, np.nan, np.nan])


class Rows:
    """Seven rows, of which those that are nan count nothing."""

    def __len__(self):
        return len(VALUES)

    def at(self, indices, part=slice(None)):
        return {"x": VALUES[indices][part].astype(np.float32)}

    def names(self, index):
        return [f"row {index}"]


def loss(params, frozen, batch, key):
    held = jnp.isfinite(batch["x"])
    total, count = jnp.where(held, batch["x"], 0.0).sum(), held.sum()
    low = held & (batch["x"] < 2)
    metrics = {
        "loss": total / count,
        "low": Mean((low * jnp.nan_to_num(batch["x"])).sum(), low.sum()),
        "never": Mean(total, 0),
        "num_tokens": total,
    }
    return total / count, count, metrics


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_an_evaluation_sums_values_and_counts_over_batches(rows):
    state = TrainState(jnp.int32(0), {}, (), jax.random.key(0))
    evaluate = Evaluation(loss, Rows(), {}, rows)
    found = evaluate(state)
    assert {*evaluate.metrics({})} == {"loss", "low", "never", "num_tokens"}
    # The last batch of two or three has no row that counts.
    assert found["loss"] == pytest.approx(2.5)
    assert found["low"] == 1.0
    assert np.isnan(found["never"])
    assert found.keys() == {"loss", "low", "never"}


class Paired(Rows):
    """Rows that are read with the row before them in their batch, as labelled ones."""

    def at(self, indices, part=slice(None)):
        return {"own": indices[part], "other": np.roll(indices, 1)[part]}


@pytest.mark.parametrize("rows", [2, 3, 6])
def test_a_row_that_is_left_over_is_not_paired_with_itself(rows):
    def alike(params, frozen, batch, key):
        itself = (batch["own"] == batch["other"]).sum()
        return jnp.float32(0), len(batch["own"]), {
            "itself": Mean(itself, 1), "read": Mean(batch["own"].sum(), 1), "loss": jnp.float32(0),
        }  # fmt: skip

    state = TrainState(jnp.int32(0), {}, (), jax.random.key(0))
    found = Evaluation(alike, Paired(), {}, rows)(state)
    batches = -(-len(VALUES) // rows)
    assert found["itself"] == 0
    assert found["read"] * batches == pytest.approx(sum(range(len(VALUES))))


def test_a_held_out_mean_that_is_no_number_is_an_error():
    def spoilt(params, frozen, batch, key):
        return jnp.float32(0), jnp.float32(2), {"loss": jnp.float32(jnp.nan)}

    measure = Evaluation(spoilt, Rows(), {}, 8)
    state = TrainState(jnp.int32(0), {}, (), jax.random.key(0))
    with pytest.raises(FloatingPointError, match="^loss over the held-out examples is nan$"):
        measure(state)


@pytest.mark.parametrize(("rows", "epochs", "steps"), [
    (11, 1.0, 2), (20, 1.0, 3), (16, 1.0, 2), (20, 2.0, 5), (30, 0.1, 1), (24, 0.01, 1),
    (300, 0.1, 4),
])  # fmt: skip
def test_an_epoch_reads_every_row(rows, epochs, steps):
    config = RunConfig(epochs=epochs, batch_size=8)
    assert number_of_steps(config, rows) == steps
