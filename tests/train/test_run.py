"""The evaluation of a run, on a loss that shows what it is given."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.train.losses import Mean
from w2s_jax.train.optimizers import OptimizerConfig
from w2s_jax.train.run import RunConfig, Task, evaluation

VALUES = np.array([4.0, np.nan, 1.0, 2.0, 3.0, np.nan, np.nan])


class Rows:
    """Seven rows, of which those that are nan count nothing."""

    def __len__(self):
        return len(VALUES)

    def at(self, indices, part=slice(None)):
        return {"x": VALUES[indices][part].astype(np.float32)}


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
    config = RunConfig(OptimizerConfig(), eval_batch_size=rows)
    task = Task(None, loss, None, Rows())
    found = evaluation(task, config)(SimpleNamespace(params={}))
    # The last batch of two or three has no row that counts.
    assert found["loss"] == pytest.approx(2.5)
    assert found["low"] == 1.0
    assert np.isnan(found["never"])
    assert found.keys() == {"loss", "low", "never"}
