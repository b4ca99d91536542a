"""A training step for a model that is not here: shapes and shardings, ready to compile.

It is the step that `w2s sft` and `w2s dpo` run. Compiling is in `measure.py`.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from w2s_jax.models.lora import abstract_adapter
from w2s_jax.ops.sharding import Placement
from w2s_jax.plan.programs import Program, nbytes
from w2s_jax.train.config import PreferenceConfig
from w2s_jax.train.estimate import TrainingShapes, abstract_batch, abstract_on_mesh, abstract_state
from w2s_jax.train.logprobs import head_of, row_groups
from w2s_jax.train.objectives import BASE, Policy, preference_objective, sft_loss
from w2s_jax.train.step import check_batch, make_optimizer, make_train_step


@dataclass(frozen=True)
class TrainingProgram:
    """The step, what it holds on each device by name, in bytes, and the weights' whole shapes."""

    program: Program
    resident_bytes: dict[str, int]


def training_program(shapes: TrainingShapes, mesh: Mesh) -> TrainingProgram:
    """The step on a mesh; InputError where the mesh does not divide an array or the rows."""
    check_batch(shapes.rows, shapes.accumulate, mesh, flag="--batch-size")
    if shapes.eval_rows is not None:
        check_batch(shapes.eval_rows, 1, mesh, flag="--eval-batch-size")
    options: dict[str, Any] = {"scan_layers": True, "mesh": mesh, "rules": shapes.rules}
    frozen: dict[str, Any] = {}
    if shapes.lora is None:
        params = abstract_on_mesh(shapes.model, dtype=jnp.float32, **options).params
    else:
        params = abstract_adapter(shapes.model, shapes.lora, **options)
        frozen[BASE] = abstract_on_mesh(shapes.model, dtype=shapes.dtype, **options)
    beside = [abstract_on_mesh(one, dtype=shapes.dtype, **options) for one in shapes.beside]
    policy = Policy(shapes.model, shapes.lora, shapes.remat, Placement(mesh, shapes.rules))
    pairs = shapes.objective == "dpo"
    loss = preference_objective(policy, PreferenceConfig()) if pairs else sft_loss(policy)
    optimizer = make_optimizer(shapes.optimizer, 1000)
    state = abstract_state(params, optimizer)
    batch = abstract_batch(_batch(shapes), mesh)
    step = make_train_step(
        loss,
        optimizer,
        accumulate=shapes.accumulate,
        compute_dtype=shapes.dtype,
        mesh=mesh,
        like=state,
    )
    held = {
        "trained parameters": nbytes(state.params),
        "optimizer": nbytes(state.optimizer),
        "frozen parameters": nbytes((frozen, beside)),
        "batch": nbytes(batch),
    }
    # Forward, backward and what is computed again read the weights; the update reads and writes.
    weights = nbytes(frozen) or held["trained parameters"]
    reads = 3.0 * shapes.accumulate * weights
    reads += 2.0 * (held["trained parameters"] + held["optimizer"])
    trace = lambda: step.trace(state, frozen, batch)  # type: ignore[attr-defined]  # noqa: E731
    program = Program("training step", trace, 1, reads, _head_blocks(shapes, policy.placement))
    return TrainingProgram(program, held)


def _head_blocks(shapes: TrainingShapes, placement: Placement) -> int:
    """Blocks of logits in a micro-batch of which every token counts."""
    rows = shapes.tokens // (shapes.length * shapes.accumulate)
    groups = row_groups(placement, rows)
    return head_of(shapes.model, placement).blocks(groups, rows // groups * shapes.length)


def _batch(shapes: TrainingShapes) -> dict[str, tuple[tuple[int, ...], str]]:
    sides = (2,) if shapes.objective == "dpo" else ()
    rows = (shapes.rows, *sides, shapes.length)
    found: dict[str, tuple[tuple[int, ...], str]] = {
        "tokens": (rows, "int32"), "segments": (rows, "int32"), "targets": (rows, "bool")
    }  # fmt: skip
    if sides:
        found["reference"] = ((shapes.rows, 2), "float32")
    return found
