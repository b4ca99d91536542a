"""What a training command says of its data and its end, and the model in its folder."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w2s_jax.errors import InputError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from w2s_jax.models.model import Model
    from w2s_jax.text.token_rows import Data
    from w2s_jax.train.run import RunConfig, Task
    from w2s_jax.train.step import TrainState

SHOWN = (
    "loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected",
    "mean_token_accuracy", "kl",
)  # fmt: skip
EVAL = "eval/"


def tell_data(what: str, data: "Data") -> None:
    """A line about data that was read: how many rows and tokens, and what became of others."""
    figures = data.figures
    told = [f"{what}: {len(data):,} rows", f"{figures['tokens']:,} tokens"]
    told.append(f"{figures['targets']:,} of them count in the loss")
    others = {name: name for name in ("truncated", "dropped", "equal")}
    others["undesirable"] = "undesirable rows left out"
    told += [f"{figures[name]:,} {words}" for name, words in others.items() if figures.get(name)]
    print(", ".join(told), file=sys.stderr)


def print_run(folder: Path, step: int) -> None:
    """Print the last training row and the last evaluation of a run, side by side, to stdout."""
    from rich.console import Console
    from rich.table import Table

    from w2s_jax.train.records import read_metrics

    rows = [row for row in read_metrics(folder) if row["step"] <= step]
    training = _last(rows, "loss")
    held_out = _last(rows, f"{EVAL}loss")
    # A last batch without a desirable response has no margin, where held-out rows have one.
    names = [name for name in SHOWN if name in training or EVAL + name in held_out]
    if not names:
        return
    table = Table("after step", str(training["step"]), *(["held out"] if held_out else []))
    for name in names:
        cells = [_written(training.get(name))]
        if held_out:
            cells.append(_written(held_out.get(EVAL + name)))
        table.add_row(name, *cells)
    Console().print(table)
    told = [f"{training['num_tokens']:,} tokens"] if "num_tokens" in training else []
    print(", ".join([*told, f"{training['seconds']:.0f} s"]))


def print_rounding(before: Mapping[str, float], after: Mapping[str, float], dtype: str) -> None:
    """Print what an evaluation says of float32 weights, and of the same in another dtype."""
    from rich.console import Console
    from rich.table import Table

    table = Table("held out", "float32", dtype)
    for name in (name for name in SHOWN if name in before):
        table.add_row(name, f"{before[name]:.5f}", f"{after[name]:.5f}")
    Console().print(table)


def _last(rows: list[dict[str, Any]], name: str) -> Mapping[str, Any]:
    return next((row for row in reversed(rows) if name in row), {})


def _written(value: float | int | None) -> str:
    return "" if value is None else f"{value:.4f}"


MODEL = "model"
"""Folder of the trained model in a run's own."""


def save_run(
    directory: Path,
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
    measured it. base: what an adapter names as its base. start: reads the model that the run began
    with. dtype: of a model's weights.
    """
    from w2s_jax.models.lora_huggingface import save_adapter
    from w2s_jax.models.model import Model
    from w2s_jax.models.save import save_model
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
