"""Meshes judged without compiling: what they hold, which are likely quick, which is taken here.

A mesh for the devices that are here is chosen as a plan chooses that of a slice; no weight is read.
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
    """A mesh of a slice, by its spec, before it is compiled.

    resident_bytes: of each device between programs, None where the mesh is ruled out before they
    are known. needed: a guess of those and of what a program takes beside them. seconds: a guess of
    the time of a batch or a step. why: what rules the mesh out, or leaves it untried.
    """

    mesh: str
    resident_bytes: int | None = None
    needed: float | int = 0.0
    seconds: float = 0.0
    why: str | None = None


def candidates(
    shapes: Shapes, chip: Chip, devices: int, among: Iterable[Shape] | None = None
) -> list[Candidate]:
    """Meshes (data, fsdp, tensor) of so many devices, the likeliest to fit and be quick first.

    `among`: the sizes to judge, by default all that multiply to the devices. Meshes that are ruled
    out stand at the end: those that do not divide an array or the rows, and those that hold more
    than a device has. Needs no devices and no compiler.
    """
    found = [judge(shapes, chip, shape) for shape in among or mesh_shapes(devices)]

    def order(one: Candidate) -> tuple[bool, bool, float, int]:
        return one.why is not None, one.needed > chip.memory, one.seconds, one.resident_bytes or 0

    return sorted(found, key=order)


def judge(shapes: Shapes, chip: Chip, shape: Shape) -> Candidate:
    """What can be said of a mesh of these sizes (data, fsdp, tensor) without compiling."""
    spec = spec_of(shape)
    # Without devices, which is enough for shapes and shardings.
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
    """Bytes beside what is held, and seconds of a batch.

    Beside: a chunk's logits of a device's rows, in float32, of the widest vocabulary. The time is
    that of reading weights and caches, and of what layers split over devices exchange.
    """
    data, fsdp, tensor = shape
    config, slots, models = shapes.config, shapes.slots, shapes.models.values()
    rows = max(1, slots // (data * fsdp)) * config.rows
    beside = 4.0 * rows * config.length * max(one.vocab_size for one in models)
    seconds = sum(one.reads * one.times for one in found.programs) / chip.bandwidth
    # A prompt is read alone, so that data splits its tokens no more than tensor does.
    tokens = slots * (config.rows * config.chunks * config.length / data + shapes.prompt_tokens)
    layer = _ring(fsdp * tensor) + _ring(tensor) / fsdp
    moved = _NUMBER * tokens * layer * sum(one.layers * one.width for one in models)
    return beside, seconds + moved / (2 * chip.link)


def _guess_training(
    shapes: TrainingShapes, found: Programs, chip: Chip, shape: Shape
) -> tuple[float, float]:
    """Bytes beside what is held, and seconds of a step.

    Beside: gradients, the weights as they are computed with, and what the backward pass reads
    again. The time is that of multiplications, weights gathered and gradients summed, and of what
    split layers exchange.
    """
    data, fsdp, tensor = shape
    model, again = shapes.model, shapes.remat != "none"
    trained = found.resident_bytes["trained parameters"]
    parameters = model.matmul_parameters + model.width * model.vocab_size
    # Those of a micro-batch that one device reads.
    tokens = shapes.tokens / shapes.accumulate / (data * fsdp)
    kept = {"full": 1, "dots": 8, "none": 24}[shapes.remat]
    residuals = _NUMBER * kept * tokens * model.layers * model.width
    logits = 4 * tokens * model.vocab_size / tensor
    beside = 1.5 * trained * (2 if shapes.accumulate > 1 else 1) + residuals + logits
    passes = 2 + (shapes.lora is None) + again
    work = 2.0 * passes * shapes.tokens * parameters / math.prod(shape)
    # Weights are gathered for the passes forward and back, and again where one is repeated.
    read = _NUMBER * parameters / tensor
    moved = (2 + again) * shapes.accumulate * read * _ring(fsdp) / 2
    # Trained parameters are held in fsdp parts; their gradients are summed part by part.
    moved += trained * (fsdp - 1 + _ring(data))
    tokens = tokens * shapes.accumulate
    moved += (2 + again) * 2 * _NUMBER * tokens * model.layers * model.width * _ring(tensor)
    return beside, work / chip.operations + moved / (2 * chip.link)


def _ring(parts: int) -> float:
    """Bytes that each of so many devices sends to sum one byte over all of them."""
    return 2 * (parts - 1) / parts


def preset_mesh(shapes: Shapes, topology: str) -> str:
    """The spec of the mesh that `likeliest_mesh` takes of a topology; raises as it does."""
    return likeliest_mesh(shapes, chip_of(topology), device_count(topology), topology).mesh


def likeliest_mesh(shapes: Shapes, chip: Chip, devices: int, where: str) -> Candidate:
    """The mesh of so many devices that is likeliest to fit and be quick; the same for the same.

    Of the meshes (data, fsdp, tensor) that divide every array and the rows, those come first whose
    held bytes, with a guess of the temporaries, fit a device; among them the least time guessed
    from published rates counts: what is read for each token of a search, and what is multiplied and
    exchanged in a step of training. Where none holds little enough, the one that holds least, which
    says so in its `why`.

    The rules that go with it are those of the shapes: `search` for a search, `train` for a
    training, unless they hold others.

    Raises:
        InputError: saying `where`, where no mesh divides the arrays.
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
    """A mesh of the devices here, by its spec. why: where it cannot fit, what is too much."""

    spec: str
    count: int
    kind: str
    why: str | None = None

    @property
    def mesh(self) -> Mesh | None:
        """The mesh; None of one device, which needs none."""
        return make_mesh(self.spec) if self.count > 1 else None

    @property
    def name(self) -> str:
        """The mesh and the devices in words."""
        return mesh_name(self.spec, self.count, self.kind)

    @property
    def told(self) -> str:
        """The choice in a line."""
        line = f"{AUTO}: {self.name}"
        return line if self.why is None else f"{line}; no mesh fits: it {self.why}"


def choose_mesh(shapes: Shapes) -> Chosen:
    """The mesh that `likeliest_mesh` takes of this run's devices; the same on all of its hosts.

    Every host calls it. Chips that are not listed count as `chip_of_devices` says. Raises
    InputError for devices of several slices, where no mesh divides the arrays, and where hosts
    would choose differently.
    """
    devices = jax.devices()
    _check_slices(devices)
    kind, count = devices[0].device_kind, len(devices)
    chip = chip_of_devices(kind, devices[0].platform, _memory())
    found = likeliest_mesh(shapes, chip, count, f"{AUTO}, {count} devices")
    agree("mesh", {AUTO: found.mesh})
    return Chosen(found.mesh, count, kind, found.why)


def _memory() -> int | None:
    """Bytes that every device of the run lets programs have; None where one does not say."""
    told = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    own = min((int(size) for size in told if size is not None), default=None)
    sizes = gather_values(own)
    return None if None in sizes else min(sizes)


def _check_slices(devices: Sequence[jax.Device]) -> None:
    slices = {getattr(device, "slice_index", None) for device in devices}
    # Virtual devices may lie on several machines, which are no slices.
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
    """The mesh for --mesh auto of a search with the models of a plan, by the rules of `places`.

    A checkpoint that is named twice counts twice.

    Args:
        plan: the checkpoints, looked at.
        config: the search.
        places: the rules; its mesh is not read.
        prompt_tokens: of the longest prompt.
        slots: prompts side by side, as `slots_flag` says.
        dtype: of the weights, None is what loading takes.
        slots_flag: the flag that messages name.

    Raises:
        InputError: as `choose_mesh` does.
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
        # Encoders stay whole on every device.
        judges=tuple(judge for judge in judges if isinstance(judge, ModelConfig)),
    )
    return choose_mesh(shapes)
