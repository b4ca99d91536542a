"""How a training command ends: the model in the run's folder, and what is told of the run."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from w2s_jax.cli.run_table import print_rounding, print_run
from w2s_jax.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from jax.sharding import Mesh

    from w2s_jax.models.model import Model
    from w2s_jax.train.run import RunConfig, Task
    from w2s_jax.train.step import TrainState

MODEL = "model"
"""Folder of the trained model in a run's own."""


def save_run(
    directory: "Path",
    task: "Task",
    state: "TrainState",
    run: "RunConfig",
    *,
    base: str,
    start: "Callable[[], Model]",
    best: str | None,
    dtype: str,
    tokenizer: Any,
    mesh: "Mesh | None",
) -> None:
    """Write the trained model, or its adapter, with the tokenizer, into the run's folder.

    best: the metric by which the best checkpoint is taken instead of `state`, where an evaluation
    measured it. base: what an adapter names as its
    base. start: reads the model that the run began with. dtype: of a model's weights.
    """
    from w2s_jax.models.huggingface import save_model
    from w2s_jax.models.lora_huggingface import save_adapter
    from w2s_jax.models.model import Model
    from w2s_jax.train.checkpoint import best_step, read_checkpoint
    from w2s_jax.train.loop import CHECKPOINTS

    checkpoints = directory / CHECKPOINTS
    if best is not None and best_step(checkpoints) is None:
        print(f"no evaluation gave a number for {best}: the last step is written", file=sys.stderr)
    elif best is not None:
        state = read_checkpoint(checkpoints, state, best=True)
    folder, params, policy = directory / MODEL, state.params, task.policy
    if policy.lora is not None:
        save_adapter(folder, policy.config, policy.lora, params, base=base, tokenizer=tokenizer)
    else:
        if dtype != "float32":
            params = _rounded(task, state, run, start, dtype, mesh)
        save_model(Model(policy.config, params), folder, tokenizer=tokenizer)
    print_run(directory, int(state.step))
    print(f"step {int(state.step)} written to {folder}")


def _rounded(
    task: "Task",
    state: "TrainState",
    run: "RunConfig",
    start: "Callable[[], Model]",
    dtype: str,
    mesh: "Mesh | None",
) -> Any:
    """The parameters in another dtype, with lines on what that loses of the training.

    As they are, with a line, where that dtype does not reach far enough.
    """
    from w2s_jax.train.export import measure_rounding, rounded
    from w2s_jax.train.run import evaluation
    from w2s_jax.train.step import cast

    try:
        params = rounded(state.params, dtype)
    except InputError as error:
        print(f"--save-dtype: {error}; float32 is written", file=sys.stderr)
        return state.params
    print(f"--save-dtype {measure_rounding(start().params, state.params, dtype)}")
    if task.held_out is not None:
        evaluate = evaluation(task, run, mesh)
        before = evaluate(state)
        # As float32 again, which the program for it is compiled for.
        print_rounding(before, evaluate(state._replace(params=cast(params, "float32"))), dtype)
    return params
