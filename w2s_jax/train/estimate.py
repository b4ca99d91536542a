"""The memory that a training step takes on each device, from shapes alone: nothing is loaded.

The real step is compiled for abstract arguments, on the devices of this machine.
"""

import contextlib
import importlib
import math
import re
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from rich.console import Console
from rich.table import Table

from w2s_jax.models.config import ModelConfig
from w2s_jax.models.decoder import Remat
from w2s_jax.models.lora import LoraConfig
from w2s_jax.models.model import Model, abstract_model
from w2s_jax.models.quantize import QuantizeConfig
from w2s_jax.ops.sharding import DEFAULT_RULES, Placement, Rules, resolve_tree, with_shardings
from w2s_jax.train.config import OptimizerConfig
from w2s_jax.train.step import Batch, LossFunction, TrainState, init_state, make_train_step


@dataclass(frozen=True)
class TrainingShapes:
    """A training to be planned; trained parameters and the optimizer's state are float32.

    Attributes:
        model: The model's config.
        objective: Which loss; a dpo example is a pair of sequences.
        rows: Examples in a step; a pair of responses is one.
        length: Tokens of a sequence.
        accumulate: Micro-batches in a step.
        lora: Adapters on a frozen base in `dtype`; None trains all parameters.
        dtype: Dtype of the computation.
        remat: What a backward pass recomputes.
        optimizer: The optimizer's settings.
        rules: How the mesh splits the parameters.
        beside: Frozen models, such as a reference, that are held in `dtype` as well; the compiled
            step does not read them.
        eval_rows: Examples in a batch of an evaluation, by default those of a micro-batch.
    """

    model: ModelConfig
    objective: Literal["sft", "dpo"]
    rows: int
    length: int
    accumulate: int = 1
    lora: LoraConfig | None = None
    dtype: str = "bfloat16"
    remat: Remat = "full"
    optimizer: OptimizerConfig = OptimizerConfig()  # noqa: RUF009
    rules: Rules = DEFAULT_RULES
    beside: tuple[ModelConfig, ...] = ()
    eval_rows: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens that a step reads if all rows have the full length."""
        return self.rows * self.length * (2 if self.objective == "dpo" else 1)


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device that holds most.

    Attributes:
        parameters: Trained parameters.
        optimizer: State of the optimizer.
        frozen: Frozen parameters.
        batch: The batch.
        working: Gradients, activations and logits: what the step needs beside its arguments.
        devices: Number of devices.
        limit: Memory of a device, None if it does not report it.
        process: On a CPU, what libraries and compiled programs take of the same memory.
    """

    parameters: int
    optimizer: int
    frozen: int
    batch: int
    working: int
    devices: int
    limit: int | None = None
    process: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        arguments = self.parameters + self.optimizer + self.frozen + self.batch
        return arguments + self.working + self.process


def estimate_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    params: Any,
    batch: Batch,
    *,
    frozen: Any = None,
    accumulate: int = 1,
    compute_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> Estimate:
    """The memory of one step, which is compiled: this takes as long as the first step of a run.

    Arrays with a sharding count by their shards. On a CPU this process's own memory, with the step
    compiled, is counted too, so that no model should be loaded in it.

    Args:
        loss: The loss of a step.
        optimizer: The optimizer.
        params: Trained parameters, as arrays or `jax.ShapeDtypeStruct`s.
        batch: A batch, likewise.
        frozen: What the loss reads and does not train, likewise.
        accumulate: Micro-batches in the step.
        compute_dtype: Dtype in which the loss sees parameters; None is their own.
        mesh: The mesh that the arrays lie on.
    """
    params, frozen, batch = (jax.tree.map(_abstract, tree) for tree in (params, frozen, batch))
    state = abstract_state(params, optimizer)
    like = None if mesh is None else state
    step = make_train_step(
        loss, optimizer, accumulate=accumulate, compute_dtype=compute_dtype, mesh=mesh, like=like
    )
    used = step.lower(state, frozen, batch).compile().memory_analysis()  # type: ignore[attr-defined]
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return Estimate(
        parameters=nbytes(state.params),
        optimizer=nbytes(state.optimizer),
        frozen=nbytes(frozen),
        batch=nbytes(batch),
        # Outputs that alias donated arguments take no further memory.
        working=used.temp_size_in_bytes
        + max(0, used.output_size_in_bytes - used.alias_size_in_bytes),
        devices=1 if mesh is None else mesh.size,
        limit=(device.memory_stats() or {}).get("bytes_limit"),
        process=_memory_of_a_run() if device.platform == "cpu" else 0,
    )


def abstract_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The shapes of `init_state`; a parameter's optimizer state has the parameter's sharding."""
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer, jax.random.key(0)), params)

    places = dict(jax.tree_util.tree_leaves_with_path(params))

    def like(path: tuple[Any, ...], held: Any) -> Any:
        # The path of a parameter's optimizer state ends with the path of the parameter.
        ends = (places.get(path[start:]) for start in range(len(path)))
        param = next((one for one in ends if one is not None and one.shape == held.shape), None)
        return (
            held
            if param is None
            else jax.ShapeDtypeStruct(held.shape, held.dtype, sharding=param.sharding)
        )

    held = jax.tree_util.tree_map_with_path(like, state.optimizer)
    return TrainState(state.step, params, held, state.key)


def abstract_on_mesh(
    config: ModelConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    scan_layers: bool = False,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    quantize_as: QuantizeConfig | None = None,
) -> Model:
    """A model's shapes and dtypes, with the shardings that `shard_model` would give them.

    Args:
        config: The model's config.
        dtype: Dtype of the parameters.
        scan_layers: Whether the layers are stacked on a leading axis.
        mesh: The mesh; None for no shardings.
        rules: How the mesh splits the parameters.
        quantize_as: Which weights are quantized, and how.

    Raises:
        InputError: Naming the parameter, if the mesh does not divide one of its dimensions.
    """
    model, axes = abstract_model(
        config, dtype=dtype, scan_layers=scan_layers, quantize_as=quantize_as
    )
    if mesh is None:
        return model
    shardings = resolve_tree(axes, model.params, rules, mesh)
    return Model(config, with_shardings(model.params, shardings), Placement(mesh, rules))


def abstract_batch(
    arrays: Mapping[str, tuple[tuple[int, ...], DTypeLike]], mesh: Mesh | None = None
) -> Batch:
    """A batch of these shapes and dtypes, its rows split over the mesh's batch axes."""
    sharding = None
    if mesh is not None:
        sharding = NamedSharding(mesh, PartitionSpec(DEFAULT_RULES.mesh_axes("batch")))
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in arrays.items()
    }


def report(console: Console, estimate: Estimate) -> None:
    """Print an estimate as a table, in GiB per device."""
    table = Table("on each device", "GiB")
    told = {"working": "gradients and activations", "process": "libraries and programs"}
    for field in fields(estimate)[:5] + fields(estimate)[-1:]:
        held = getattr(estimate, field.name)
        if held or field.name != "process":
            table.add_row(told.get(field.name, field.name), f"{held / 2**30:.2f}")
    table.add_section()
    table.add_row("total", f"{estimate.total / 2**30:.2f}")
    console.print(table)
    if estimate.limit is not None:
        fits = "fits" if estimate.total <= estimate.limit else "does not fit"
        console.print(f"{fits}: a device has {estimate.limit / 2**30:.2f} GiB")


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes.

    Read from /proc on Linux: elsewhere getrusage also counts the process that started this one.
    """
    status = Path("/proc/self/status")
    told = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text() if status.exists() else "", re.M)
    if told:
        return int(told[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _memory_of_a_run() -> int:
    """This process's peak memory with the libraries imported that a run reads and saves with."""
    for library in ("orbax.checkpoint", "pyarrow", "pandas"):
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    return peak_memory()


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    sharding = leaf.sharding if isinstance(leaf, jax.Array) else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def nbytes(tree: Any) -> int:
    """Bytes of arrays on the device that holds most; sharded arrays count by their shards."""

    def shard(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        bits = {"int4": 4, "uint4": 4}.get(str(leaf.dtype), 8 * leaf.dtype.itemsize)
        return math.prod(shape) * bits // 8

    return sum(shard(leaf) for leaf in jax.tree.leaves(tree))
