"""Times this package's training step on rows of token ids; also a program of its own.

`python -m w2s_jax.bench.train_own JOB_JSON` prints one JSON line, as train_trl.py does. The weights
are those of the job's checkpoint, or random ones of its config.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from w2s_jax.bench.setup import random_model
from w2s_jax.models.config_json import config_from_hf
from w2s_jax.models.load import load_model
from w2s_jax.models.model import Model
from w2s_jax.train.config import OptimizerConfig, PreferenceConfig
from w2s_jax.train.estimate import peak_memory
from w2s_jax.train.objectives import REFERENCE, Policy, pair_loss, sft_loss
from w2s_jax.train.step import Batch, init_state, make_optimizer, make_train_step


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train for the job's steps; seconds, CPU seconds and losses by step, and peak memory."""
    dpo, narrow = job["objective"] == "dpo", job["dtype"] == "bfloat16"
    if "checkpoint" in job:
        model = load_model(job["checkpoint"])
    else:
        model = random_model(config_from_hf(job["config"]), 0)
    policy, frozen = Policy(model.config), {}
    loss = pair_loss(policy, PreferenceConfig()) if dpo else sft_loss(policy)
    if dpo:
        # A reference is never changed, so the first state's copy is the only one.
        frozen = {REFERENCE: Model(model.config, jax.tree.map(_narrow(narrow), model.params))}
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=job["learning_rate"], schedule="constant", warmup=0.0),
        job["steps"],
    )
    step = make_train_step(loss, optimizer, compute_dtype="bfloat16" if narrow else None)
    state = init_state(model.params, optimizer, jax.random.key(0))
    del model
    size = job["batch_size"] // (2 if dpo else 1)
    seconds, cpu_seconds, losses = [], [], []
    for start in range(0, job["steps"] * size, size):
        batch = batch_of(job["rows"][start : start + size], dpo)
        started = time.perf_counter(), time.process_time()
        state, metrics = jax.block_until_ready(step(state, frozen, batch))
        seconds.append(time.perf_counter() - started[0])
        cpu_seconds.append(time.process_time() - started[1])
        losses.append(float(metrics["loss"]))
    peak = peak_memory()
    held = jax.devices()[0].memory_stats()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "losses": losses,
        "peak_bytes": held["peak_bytes_in_use"] if held else peak,
    }


def batch_of(rows: list[dict[str, list[int]]], dpo: bool) -> Batch:
    """The batch of rows that all have one length."""
    if not dpo:
        tokens = np.asarray([row["input_ids"] for row in rows], np.int32)
        prompt = 0
    else:
        sides = ("chosen_ids", "rejected_ids")
        tokens = np.asarray(
            [[row["prompt_ids"] + row[side] for side in sides] for row in rows], np.int32
        )
        prompt = len(rows[0]["prompt_ids"])
    targets = np.broadcast_to(np.arange(tokens.shape[-1]) >= max(prompt, 1), tokens.shape)
    return {"tokens": tokens, "segments": np.ones_like(tokens), "targets": targets.copy()}


def _narrow(narrow: bool) -> Any:
    return (lambda leaf: leaf.astype("bfloat16")) if narrow else (lambda leaf: leaf)


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    sys.stdout.write(json.dumps(run(job)) + "\n")
