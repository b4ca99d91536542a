"""A run killed at random moments equals the one that was not."""

import json

import pytest

from w2s_jax.train.checkpoint import steps_on_disk
from w2s_jax.train.loop import read_metrics

RUN = """
import json, os, random, signal, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
import orbax.checkpoint
from w2s_jax.train.config import LoopConfig
from w2s_jax.train.loop import train
from w2s_jax.train.checkpoint import steps_on_disk
from w2s_jax.train.step import init_state, make_train_step

def loss(params, frozen, batch, key):
    hidden = jnp.tanh(batch["x"] @ params["in"]["kernel"])
    hidden = hidden * jax.random.bernoulli(key, 0.9, hidden.shape)
    errors = (hidden @ params["out"]["kernel"] - batch["y"]) ** 2
    metrics = {"loss": errors.mean(), "num_tokens": len(errors)}
    return errors.mean(), jnp.float32(len(errors)), metrics

def batch_at(i):
    rng = np.random.default_rng(i)
    x = rng.normal(size=(8, 4)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(-1, keepdims=True))}

def run(directory, batches=batch_at, *, steps, shard=lambda x: x, **options):
    rng = np.random.default_rng(7)
    shapes = {"in": (4, 16), "out": (16, 1)}
    params = {n: {"kernel": rng.normal(size=s).astype(np.float32)} for n, s in shapes.items()}
    optimizer = optax.adamw(1e-2)
    state = shard(init_state(params, optimizer, jax.random.key(3)))
    return train(
        state, make_train_step(loss, optimizer), batches, steps, directory=directory,
        config=LoopConfig(**options),
        evaluate=lambda state: {"norm": float(jnp.linalg.norm(state.params["in"]["kernel"]))},
        sample=lambda state: [{"text": str(float(state.params["in"]["kernel"][0, 0]))}],
        identity={"steps": steps},
    )
"""

KILLS, STEPS = 8, 120

KILLING = """
KILLS, STEPS, folder = {kills}, {steps}, Path({folder!r})
options = dict(steps=STEPS, log_every=3, save_every=7, eval_every=30, sample_every=30, keep_last=2)

def child(work):
    # The parent starts no thread and no device, so that a child is a fresh process, imports done.
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid

def ended(pid):
    return os.waitpid(pid, 0)[1]

began = time.monotonic()
assert ended(child(lambda: run(folder / "whole", **options))) == 0
alone = time.monotonic() - began

def slowly(i, limit):
    while i >= limit:  # no run reaches its end before the last kill
        time.sleep(0.01)
    return batch_at(i)

random.seed(5)
reached = []
for kill in range(KILLS):
    limit = STEPS * (kill + 1) // (KILLS + 1)
    pid = child(lambda: run(folder / "killed", lambda i: slowly(i, limit), **options))
    time.sleep(random.uniform(0.05, 0.6) * max(alone, 1.0))
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == signal.SIGKILL
    reached.append(max(steps_on_disk(folder / "killed" / "checkpoints"), default=0))
assert ended(child(lambda: run(folder / "killed", **options))) == 0
print(json.dumps(reached))
"""

TIMES = {"seconds", "tokens_per_second", "mfu"}


def rows(directory):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(directory)]


@pytest.mark.slow
def test_killed_again_and_again_every_logged_number_is_that_of_the_whole_run(run_python, tmp_path):
    code = RUN + KILLING.format(kills=KILLS, steps=STEPS, folder=str(tmp_path))
    reached = json.loads(run_python(code).splitlines()[-1])
    assert len(reached) == KILLS
    assert len(set(reached)) > 3, f"the kills all came too early: {reached}"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert [row["step"] for row in rows(whole) if "loss" in row] == list(range(3, STEPS + 1, 3))
    assert rows(killed) == rows(whole)
    assert (killed / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert steps_on_disk(killed / "checkpoints") == steps_on_disk(whole / "checkpoints")
