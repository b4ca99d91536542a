import json
import logging
import os
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from w2s_jax.errors import Diverged, InputError, Preempted
from w2s_jax.train.checkpoint import best_step, read_checkpoint, steps_on_disk
from w2s_jax.train.config import LoopConfig
from w2s_jax.train.loop import read_metrics, train
from w2s_jax.train.step import init_state, make_train_step

STEPS = 12


class Killed(Exception):
    pass


def batch_at(step):
    x = np.random.default_rng(step).normal(size=4).astype(np.float32)
    return {"x": x, "tokens": np.full(4, step, np.float32)}


def loss(params, frozen, batch, key):
    noise = jax.random.normal(key, (4,))
    value = ((params["w"] - batch["x"] + 0.1 * noise) ** 2).mean()
    return value, jnp.float32(4), {"loss": value}


OPTIMIZER = optax.adam(0.05)
_step = make_train_step(loss, OPTIMIZER)


def step(state, frozen, batch):
    state, metrics = _step(state, frozen, batch)
    return state, metrics | {"num_tokens": batch["tokens"].sum()}


def run(directory, *, batches=batch_at, step=step, **options):
    names = {"log_every": 2, "save_every": 6}
    settings = {name: options.pop(name, value) for name, value in names.items()}
    for name in ("eval_every", "sample_every", "keep_last", "keep_best", "save_seconds"):
        if name in options:
            settings[name] = options.pop(name)
    state = init_state({"w": jnp.zeros(4)}, OPTIMIZER, jax.random.key(3))
    config = LoopConfig(**settings)
    steps = options.pop("steps", STEPS)
    return train(state, step, batches, steps, config=config, directory=directory, **options)


def doing_at(step, action):
    """Batches that do something when one is asked for."""

    def batches(i):
        if i == step:
            action()
        return batch_at(i)

    return batches


def kill():
    raise Killed


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


TIMES = {"seconds", "tokens_per_second", "mfu"}


def without_times(directory):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(directory)]


def first_weight(state):
    return {"w": float(state.params["w"][0])}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return run(directory), directory


def assert_same(state, directory, whole):
    jax.tree.map(np.testing.assert_array_equal, state[:3], whole[0][:3])
    assert without_times(directory) == without_times(whole[1])


def test_rows_hold_means_sums_of_tokens_and_the_learning_rate(tmp_path):
    run(tmp_path, steps=4, schedule=lambda i: i / 8)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [2, 4]
    assert [row["num_tokens"] for row in rows] == [4, 24]  # 4 · (0 + 1), then + 4 · (2 + 3)
    assert [row["learning_rate"] for row in rows] == [1 / 8, 3 / 8]
    state = init_state({"w": jnp.zeros(4)}, OPTIMIZER, jax.random.key(3))
    losses = []
    for i in range(4):
        state, metrics = step(state, None, batch_at(i))
        losses.append(float(metrics["loss"]))
    assert [row["loss"] for row in rows] == [np.mean(losses[:2]), np.mean(losses[2:])]


@pytest.mark.parametrize(("at", "save_every"), [(1, 3), (7, 5)])
def test_a_broken_off_run_goes_on_to_the_same_bits(tmp_path, whole, at, save_every):
    with pytest.raises(Killed):
        run(tmp_path, batches=doing_at(at, kill), save_every=save_every)
    assert_same(run(tmp_path, save_every=save_every), tmp_path, whole)


def test_rows_past_the_checkpoint_and_torn_ones_are_dropped(tmp_path, whole):
    with pytest.raises(Killed):
        run(tmp_path, batches=doing_at(7, kill))
    log = tmp_path / "metrics.jsonl"
    late = json.dumps({"step": 8, "seconds": 1.0, "loss": 0.0})
    log.write_text(log.read_text() + late + "\n" + '{"step": 1')
    assert_same(run(tmp_path), tmp_path, whole)


def test_a_finished_run_is_not_trained_again(tmp_path, whole):
    own = shutil.copytree(whole[1], tmp_path / "own")
    again = run(own, batches=doing_at(0, kill))
    assert_same(again, own, whole)


def test_evaluations_stand_among_the_metrics(tmp_path):
    run(tmp_path, steps=6, evaluate=first_weight, eval_every=4)
    assert [row["step"] for row in read_metrics(tmp_path) if "eval/w" in row] == [4, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_raises(tmp_path, whole, number):
    before = signal.getsignal(number)
    batches = doing_at(4, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Preempted) as stopped:
        run(tmp_path, batches=batches, save_every=100)
    assert stopped.value.step == 5
    assert signal.getsignal(number) is before
    assert steps_on_disk(tmp_path / "checkpoints") == [5]
    assert_same(run(tmp_path, save_every=100), tmp_path, whole)


SAMPLES = {"sample": lambda state: [{"text": str(state.params["w"][0])}], "sample_every": 3}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A whole run with evaluations and samples."""
    directory = tmp_path_factory.mktemp("measured")
    run(directory, evaluate=first_weight, eval_every=3, **SAMPLES)
    return directory


@pytest.mark.parametrize("inside", [False, True])
def test_a_signal_leaves_an_evaluation_to_the_next_run(tmp_path, measured, inside):
    cut, calls = tmp_path / "cut", []

    def evaluate(state):
        calls.append(int(state.step))
        if inside and calls == [3, 6]:
            terminate()
            raise AssertionError("the evaluation was not cut off")
        return first_weight(state)

    batches = batch_at if inside else doing_at(5, terminate)
    with pytest.raises(Preempted, match="step 6"):
        run(cut, batches=batches, evaluate=evaluate, eval_every=3, save_every=100, **SAMPLES)
    assert calls == ([3, 6] if inside else [3])
    run(cut, evaluate=first_weight, eval_every=3, save_every=100, **SAMPLES)
    assert without_times(cut) == without_times(measured)
    texts = (measured / "samples.jsonl").read_text()
    assert [json.loads(line)["step"] for line in texts.splitlines()] == [3, 6, 9, 12]
    assert (cut / "samples.jsonl").read_text() == texts


def test_outside_the_main_thread_no_handler_is_set(tmp_path, whole):
    states = []
    thread = threading.Thread(target=lambda: states.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert_same(states[0], tmp_path, whole)


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_nan_stops_the_run_and_names_the_rows(tmp_path, log_every):
    def batches(i):
        return batch_at(i) | ({"x": np.full(4, np.nan, np.float32)} if i == 7 else {})

    def names(i):
        return [f"pairs.jsonl line {4 * i + j}" for j in range(4)]

    with pytest.raises(Diverged) as stopped:
        run(tmp_path, batches=batches, names=names, save_every=3, log_every=log_every)
    error = stopped.value
    assert (error.step, error.good) == (8, 6)
    assert error.rows[0] == "pairs.jsonl line 28"
    assert "loss is nan at step 8" in str(error)
    assert "line 31" in str(error)
    assert "the last good one is step 6" in str(error)
    assert "\n" not in str(error)
    assert steps_on_disk(tmp_path / "checkpoints") == [3, 6]
    assert all(row["step"] <= 7 for row in read_metrics(tmp_path))


def test_a_state_that_is_nan_is_never_saved(tmp_path):
    def broken(state, frozen, batch):
        state, metrics = step(state, frozen, batch)
        if int(state.step) == 6:
            state = state._replace(params={"w": state.params["w"].at[1].set(jnp.inf)})
        return state, metrics

    with pytest.raises(Diverged, match=r"a parameter is not finite .* at step 6.* is step 3"):
        run(tmp_path, step=broken, save_every=3)
    assert steps_on_disk(tmp_path / "checkpoints") == [3]


def test_metrics_that_are_not_finite_are_left_out_of_the_means(tmp_path):
    def partly(state, frozen, batch):
        state, metrics = step(state, frozen, batch)
        return state, metrics | {"a": [1.0, np.nan, 5.0, np.nan][int(state.step) - 1], "b": np.nan}

    run(tmp_path, step=partly, steps=4, log_every=4)
    (row,) = read_metrics(tmp_path)
    assert row["a"] == 3.0
    assert "b" not in row


@pytest.mark.parametrize(("metric", "best"), [("eval/v", 4), ("-eval/v", 8), ("eval/loss", 10)])
def test_the_best_step_is_kept_beside_the_last(tmp_path, metric, best):
    values = {2: 3.0, 4: 9.0, 6: 5.0, 8: 1.0, 10: 4.0, 12: 6.0}

    def evaluate(state):
        value = values[int(state.step)]
        return {"v": value, "loss": -1.0 if int(state.step) == 10 else value}

    options = {"evaluate": evaluate, "eval_every": 2, "save_every": 3, "keep_best": metric}
    with pytest.raises(Killed):
        run(tmp_path, batches=doing_at(9, kill), keep_last=1, **options)
    run(tmp_path, keep_last=1, **options)
    assert steps_on_disk(tmp_path / "checkpoints") == [best, 12]
    like = init_state({"w": jnp.ones(4)}, OPTIMIZER, jax.random.key(0))
    assert int(read_checkpoint(tmp_path / "checkpoints", like, best=True).step) == best


def test_an_evaluation_of_nothing_is_null_and_gives_no_score(tmp_path):
    values = {2: np.nan, 4: 3.0}
    options = {"evaluate": lambda state: {"v": values[int(state.step)]}, "eval_every": 2}
    run(tmp_path, steps=4, keep_best="eval/v", **options)
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert '"eval/v": null' in lines
    assert "NaN" not in lines
    assert best_step(tmp_path / "checkpoints") == 4


def test_an_evaluation_that_is_no_number_stops_the_run(tmp_path):
    def evaluate(state):
        raise FloatingPointError("v over the held-out examples is nan")

    with pytest.raises(Diverged, match="v over the held-out examples is nan at step 2") as stopped:
        run(tmp_path, steps=4, evaluate=evaluate, eval_every=2, names=lambda i: ["a.jsonl line 1"])
    assert stopped.value.rows == ()


def test_a_best_metric_that_is_not_measured_is_named(tmp_path):
    with pytest.raises(InputError, match=r"keep_best 'eval/x' is no metric .* there are eval/w"):
        run(tmp_path, steps=2, evaluate=first_weight, keep_best="eval/x")


def test_another_identity_is_refused_by_its_fields(tmp_path):
    identity = {"data": "a1", "optimizer": {"learning_rate": 1e-3, "name": "adamw"}}
    run(tmp_path, steps=2, identity=identity)
    log = (tmp_path / "metrics.jsonl").read_bytes()
    other = {"data": "b2", "optimizer": {"learning_rate": 1e-2, "name": "adamw"}}
    with pytest.raises(InputError) as refused:
        run(tmp_path, steps=4, identity=other)
    told = str(refused.value)
    assert "data: 'a1' there, 'b2' here, optimizer.learning_rate: 0.001 there, 0.01 here" in told
    assert "name" not in told.split("(")[1].split(")")[0].replace("learning_rate", "")
    assert (tmp_path / "metrics.jsonl").read_bytes() == log
    run(tmp_path, steps=4, identity=identity)


def test_a_state_of_another_model_is_refused(tmp_path):
    run(tmp_path, steps=2)
    state = init_state({"v": jnp.zeros(4)}, OPTIMIZER, jax.random.key(3))
    with pytest.raises(InputError, match="of another model or optimizer"):
        train(state, step, batch_at, 4, config=LoopConfig(), directory=tmp_path)


def test_two_runs_of_one_directory_are_refused(tmp_path):
    def second():
        with pytest.raises(InputError, match="another run is writing"):
            run(tmp_path)

    run(tmp_path, steps=2, batches=doing_at(1, second))


def test_a_save_by_the_clock(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, save_every=0, save_seconds=0.0, batches=doing_at(5, kill))
    assert max(steps_on_disk(tmp_path / "checkpoints")) in (4, 5)


@pytest.mark.parametrize(
    "field", ["log_every", "eval_every", "save_every", "keep_last", "save_seconds"]
)
def test_settings_out_of_range_are_refused(field):
    with pytest.raises(InputError, match=f"{field} -1 must"):
        LoopConfig(**{field: -1})


def test_every_batch_is_put_and_frozen_handed_on(tmp_path, caplog):
    seen = []

    def watched(state, frozen, batch):
        seen.append((frozen, batch))
        return step(state, None, batch_at(batch))

    with caplog.at_level(logging.WARNING):
        run(tmp_path, steps=3, batches=lambda i: i, step=watched, frozen="base", put=lambda i: i)
    assert seen == [("base", 0), ("base", 1), ("base", 2)]
    assert not [record for record in caplog.records if record.name.startswith("w2s_jax")]
