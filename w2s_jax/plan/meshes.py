"""Meshes judged without compiling: what they hold, which are likely fast, which one to take.

A mesh for the devices of this machine is chosen in the same way as for a slice in a plan; no
weights are read.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from w2s_jax.distributed import agree, gather_values
from w2s_jax.errors import InputError, Undivided
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.model import STORED, quickest_dtype
from w2s_jax.ops.meshes import mesh_name
from w2s_jax.ops.sharding import MESH_AXES, Shape, make_mesh, mesh_shapes, spec_of
from w2s_jax.plan.programs import GuideShapes, Programs, SearchShapes, Shapes, programs_on
from w2s_jax.plan.topology import Chip, chip_of, chip_of_devices, device_count
from w2s_jax.search.checkpoints import SteeringPlan
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.models import Places
from w2s_jax.train.estimate import TrainingShapes

_NUMBER = 2
"""Bytes of a bfloat16 number."""


@dataclass(frozen=True)
class Candidate:
    """A mesh of a slice, before it is compiled.

    Attributes:
        mesh: Its spec.
        resident_bytes: Bytes on each device between programs; None if the mesh is excluded before
            they are known.
        needed: Estimate of those and of a program's temporaries.
        seconds: Estimated time of a batch or a step.
        why: Why the mesh is excluded, or not tried.
    """

    mesh: str
    resident_bytes: int | None = None
    needed: float | int = 0.0
    seconds: float = 0.0
    why: str | None = None


def candidates(
    shapes: Shapes, chip: Chip, devices: int, among: Iterable[Shape] | None = None
) -> list[Candidate]:
    """Meshes (data, fsdp, tensor) of so many devices, the likeliest to fit and be fast first.

    Excluded meshes come last: those that do not divide an array or the rows, and those that hold
    more than a device has. Uses no devices and no compiler.

    Args:
        shapes: The search or training.
        chip: The chip.
        devices: Number of devices.
        among: Mesh shapes to judge, by default all with this number of devices.
    """
    found = [judge(shapes, chip, shape) for shape in among or mesh_shapes(devices)]

    def order(one: Candidate) -> tuple[bool, bool, float, int]:
        return one.why is not None, one.needed > chip.memory, one.seconds, one.resident_bytes or 0

    return sorted(found, key=order)


def judge(shapes: Shapes, chip: Chip, shape: Shape) -> Candidate:
    """Judge a mesh with these sizes (data, fsdp, tensor) without compiling."""
    spec = spec_of(shape)
    # An abstract mesh has no devices, and is enough for shapes and shardings.
    mesh: Any = AbstractMesh(shape, MESH_AXES)
    try:
        found = programs_on(shapes, mesh)
    except InputError as error:
        return Candidate(spec, why=error.told if isinstance(error, Undivided) else str(error))
    held = sum(found.resident_bytes.values())
    if isinstance(shapes, SearchShapes):
        beside, seconds = _guess_search(shapes, found, chip, shape)
    else:
        beside, seconds = _guess_training(shapes, found, chip, shape)
    why = None
    if held > chip.memory:
        why = f"holds {held / 2**30:.1f} GiB, and a device has {chip.memory / 2**30:.2f}"
    return Candidate(spec, held, held + beside, seconds, why)


def _guess_search(
    shapes: SearchShapes, found: Programs, chip: Chip, shape: Shape
) -> tuple[float, float]:
    """Estimate (bytes of temporaries, seconds of a batch).

    Temporaries are a chunk's logits of a device's rows, in float32, for the largest vocabulary. The
    time is that of reading weights and caches, and of the communication of split layers.
    """
    data, fsdp, tensor = shape
    config, slots, models = shapes.config, shapes.slots, shapes.models.values()
    rows = max(1, slots // (data * fsdp)) * config.rows
    beside = 4.0 * rows * config.length * max(one.vocab_size for one in models)
    seconds = sum(one.reads * one.times for one in found.programs) / chip.bandwidth
    # A prompt is read alone, so that the data axis does not split its tokens.
    tokens = slots * (config.rows * config.chunks * config.length / data + shapes.prompt_tokens)
    layer = _ring(fsdp * tensor) + _ring(tensor) / fsdp
    moved = _NUMBER * tokens * layer * sum(one.layers * one.width for one in models)
    return beside, seconds + moved / (2 * chip.link)


def _guess_training(
    shapes: TrainingShapes, found: Programs, chip: Chip, shape: Shape
) -> tuple[float, float]:
    """Estimate (bytes of temporaries, seconds of a step).

    Temporaries are gradients, weights in the dtype of the computation, and residuals for the
    backward pass. The time is that of matmuls, of gathering weights and summing gradients, and of
    the communication of split layers.
    """
    data, fsdp, tensor = shape
    model, again = shapes.model, shapes.remat != "none"
    trained = found.resident_bytes["trained parameters"]
    parameters = model.matmul_parameters + model.width * model.vocab_size
    # Tokens of a micro-batch on one device.
    tokens = shapes.tokens / shapes.accumulate / (data * fsdp)
    kept = {"full": 1, "dots": 8, "none": 24}[shapes.remat]
    residuals = _NUMBER * kept * tokens * model.layers * model.width
    logits = 4 * tokens * model.vocab_size / tensor
    beside = 1.5 * trained * (2 if shapes.accumulate > 1 else 1) + residuals + logits
    passes = 2 + (shapes.lora is None) + again
    work = 2.0 * passes * shapes.tokens * parameters / math.prod(shape)
    # Weights are gathered for the forward and the backward pass, and again for recomputation.
    read = _NUMBER * parameters / tensor
    moved = (2 + again) * shapes.accumulate * read * _ring(fsdp) / 2
    # Trained parameters are held in fsdp shards, and their gradients summed shard by shard.
    moved += trained * (fsdp - 1 + _ring(data))
    tokens = tokens * shapes.accumulate
    moved += (2 + again) * 2 * _NUMBER * tokens * model.layers * model.width * _ring(tensor)
    return beside, work / chip.operations + moved / (2 * chip.link)


def _ring(parts: int) -> float:
    """Bytes that each of `parts` devices sends to sum one byte over all of them."""
    return 2 * (parts - 1) / parts


def preset_mesh(shapes: Shapes, topology: str) -> str:
    """The spec of the mesh that `likeliest_mesh` chooses for a topology; raises as it does."""
    return likeliest_mesh(shapes, chip_of(topology), device_count(topology), topology).mesh


def likeliest_mesh(shapes: Shapes, chip: Chip, devices: int, where: str) -> Candidate:
    """The mesh of so many devices that is likeliest to fit and be fast; deterministic.

    Meshes (data, fsdp, tensor) must divide every array and the rows. Those whose held bytes and
    estimated temporaries fit a device come first, ordered by the time estimated from published
    rates: of reads for each token of a search, of matmuls and communication in a training step. If
    none fits, the mesh that holds least is returned, with a reason in `why`.

    The mesh is for the rules in the shapes, by default `search` for a search and `train` for a
    training.

    Raises:
        InputError: Beginning with `where`, if no mesh divides the arrays.
    """
    judged = candidates(shapes, chip, devices)
    known = [one for one in judged if one.resident_bytes is not None]
    if not known:
        raise InputError(f"{where}: no mesh: {judged[0].why}")
    if known[0].why is None:
        return known[0]
    return min(known, key=lambda one: one.resident_bytes or 0)


AUTO = "--mesh auto"


@dataclass(frozen=True)
class Chosen:
    """A mesh of this machine's devices.

    Attributes:
        spec: Its spec.
        count: Number of devices.
        kind: Their kind, in jax's words.
        why: What is too large, if it cannot fit.
    """

    spec: str
    count: int
    kind: str
    why: str | None = None

    @property
    def mesh(self) -> Mesh | None:
        """The mesh; None for a single device, which needs none."""
        return make_mesh(self.spec) if self.count > 1 else None

    @property
    def name(self) -> str:
        """The mesh and the devices in words."""
        return mesh_name(self.spec, self.count, self.kind)

    @property
    def told(self) -> str:
        """The choice in one line."""
        line = f"{AUTO}: {self.name}"
        return line if self.why is None else f"{line}; no mesh fits: it {self.why}"


def choose_mesh(shapes: Shapes) -> Chosen:
    """The mesh that `likeliest_mesh` chooses for this run's devices; the same on all hosts.

    All hosts must call it. For unlisted chips see `chip_of_devices`.

    Raises:
        InputError: For devices of several slices, if no mesh divides the arrays, and if hosts would
            choose differently.
    """
    devices = jax.devices()
    _check_slices(devices)
    kind, count = devices[0].device_kind, len(devices)
    chip = chip_of_devices(kind, devices[0].platform, _memory())
    found = likeliest_mesh(shapes, chip, count, f"{AUTO}, {count} devices")
    agree("mesh", {AUTO: found.mesh})
    return Chosen(found.mesh, count, kind, found.why)


def _memory() -> int | None:
    """Bytes that every device of the run has for programs; None if one does not report it."""
    told = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    own = min((int(size) for size in told if size is not None), default=None)
    sizes = gather_values(own)
    return None if None in sizes else min(sizes)


def _check_slices(devices: Sequence[jax.Device]) -> None:
    slices = {getattr(device, "slice_index", None) for device in devices}
    # Virtual devices may lie on several machines, which are not slices.
    if devices[0].platform != "cpu" and len(slices) > 1:
        raise InputError(
            f"{AUTO} chooses for one slice, and the devices are of {len(slices)} slices; name the "
            f"mesh, such as dcn_data={len(slices)},fsdp=-1"
        )


def choose_search_mesh(
    plan: SteeringPlan,
    config: SearchConfig,
    places: Places,
    prompt_tokens: int,
    *,
    slots: int,
    dtype: str | None,
    slots_flag: str = "--batch-size",
) -> Chosen:
    """The mesh for --mesh auto of a search with a plan's models, for the rules in `places`.

    A checkpoint that is named twice counts twice.

    Args:
        plan: The checkpoints, not loaded yet.
        config: The search.
        places: The rules; its mesh is ignored.
        prompt_tokens: Tokens of the longest prompt.
        slots: Prompts searched side by side.
        dtype: Dtype of the weights; None for the default of loading.
        slots_flag: The flag for `slots`, for messages.

    Raises:
        InputError: As `choose_mesh` does.
    """
    from w2s_jax.models.huggingface import CONFIG, locate, read_json
    from w2s_jax.models.load import load_reward_config

    configs = plan.configs
    bases = {model.path: model.path for model in plan.models}
    bases |= {path: adapted.base for path, adapted in plan.adapters.items()}
    judges = [load_reward_config(bases[one.path]) for one in plan.rewards]
    dtype = dtype or quickest_dtype()
    if dtype == STORED:
        told = read_json(locate(bases[plan.members[0].path]) / CONFIG)
        dtype = str(told.get("dtype") or told.get("torch_dtype") or "float32")
    shapes = SearchShapes(
        policy=configs["policy"],
        guides=tuple(
            GuideShapes(
                configs[guide.tuned.role], configs[guide.untuned.role], on_tokens=guide.on_device
            )
            for guide in plan.guides
        ),
        config=config,
        prompt_tokens=prompt_tokens,
        slots=slots,
        slots_flag=slots_flag,
        dtype=dtype,
        policy_rules=places.policy,
        guide_rules=places.others,
        quantize=plan.sources.quantize,
        # Encoders are replicated on every device.
        judges=tuple(judge for judge in judges if isinstance(judge, ModelConfig)),
    )
    return choose_mesh(shapes)
