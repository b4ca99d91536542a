import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from w2s_jax.train.loop import read_metrics, train
from w2s_jax.train.step import init_state, make_train_step


class Killed(Exception):
    pass


def batch_at(step):
    return {"x": np.random.default_rng(step).normal(size=4).astype(np.float32)}


def loss(params, batch, key):
    noise = jax.random.normal(key, (4,))
    value = ((params["w"] - batch["x"] + 0.1 * noise) ** 2).mean()
    return value, jnp.float32(4), {"loss": value}


def run(directory, *, batches=batch_at, steps=12, **options):
    optimizer = optax.adam(0.05)
    state = init_state({"w": jnp.zeros(4)}, optimizer, jax.random.key(3))
    return train(
        state, make_train_step(loss, optimizer), batches, steps=steps, directory=directory,
        log_every=2, save_every_seconds=0.0, **options,
    )  # fmt: skip


def kill_at(step):
    def batches(i):
        if i == step:
            raise Killed
        return batch_at(i)

    return batches


def without_times(directory):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(directory)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return run(directory), directory


@pytest.mark.parametrize("step", [1, 7, 11])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, whole, step):
    with pytest.raises(Killed):
        run(tmp_path, batches=kill_at(step))
    state = run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state[:3], whole[0][:3])
    assert without_times(tmp_path) == without_times(whole[1])


def test_rows_past_the_checkpoint_and_torn_ones_are_dropped(tmp_path, whole):
    with pytest.raises(Killed):
        run(tmp_path, batches=kill_at(7))
    log = tmp_path / "metrics.jsonl"
    late = json.dumps({"step": 8, "seconds": 1.0, "loss": 0.0})
    log.write_text(log.read_text() + late + "\n" + '{"step": 1')
    run(tmp_path)
    assert without_times(tmp_path) == without_times(whole[1])


def test_a_finished_run_is_not_trained_again(tmp_path, whole):
    run(tmp_path)
    again = run(tmp_path, batches=kill_at(0))
    np.testing.assert_array_equal(again.params["w"], whole[0].params["w"])


def test_evaluations_stand_among_the_metrics(tmp_path):
    run(
        tmp_path,
        steps=6,
        evaluate=lambda state: {"w": float(state.params["w"][0])},
        evaluate_every=4,
    )
    assert [row["step"] for row in read_metrics(tmp_path) if "eval/w" in row] == [4, 6]
