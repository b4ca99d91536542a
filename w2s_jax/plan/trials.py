"""Meshes of a slice tried one after the other, and slices of a family from the smallest upward.

What was tried is shown as tables.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from w2s_jax.errors import InputError
from w2s_jax.ops.sharding import make_mesh, mesh_shape, slice_count
from w2s_jax.plan.measure import GIB, Plan, plan_search, plan_training, show
from w2s_jax.plan.meshes import Candidate, Shapes, candidates, programs_on
from w2s_jax.plan.programs import SearchPrograms, SearchShapes
from w2s_jax.plan.topology import Slice, chip_of, device_count, open_slice, topologies
from w2s_jax.plan.training import TrainingProgram
from w2s_jax.train.estimate import TrainingShapes

TRIED = 4
"""Meshes of a slice that are compiled unless told otherwise."""

Tell = Callable[[str], None]
Compile = Callable[[Shapes, str, str, Tell], Plan]
"""What makes the plan of shapes on a topology with a mesh."""


@dataclass(frozen=True)
class Trials:
    """What was tried of a slice.

    plans: those compiled, the best first: what fits before what does not, then by tokens a second.
    skipped: meshes that were not compiled, and why. choice: which of several shapes were tried.
    """

    topology: str
    devices: int
    plans: tuple[Plan, ...]
    skipped: tuple[Candidate, ...]
    choice: int = 0

    @property
    def best(self) -> Plan | None:
        """The best plan that fits."""
        return self.plans[0] if self.plans and self.plans[0].fits else None


@dataclass(frozen=True)
class Found:
    """Slices in the order in which they were tried; the last is the one that was looked for."""

    slices: tuple[Trials, ...]

    @property
    def best(self) -> Plan | None:
        """The plan that was looked for; None where nothing fits."""
        return self.slices[-1].best

    def as_row(self) -> dict[str, Any]:
        """All of it as JSON holds it."""
        best = self.best
        return {
            "fits": best is not None,
            "topology": best and best.topology,
            "mesh": best and best.mesh,
            "slices": [asdict(one) for one in self.slices],
        }


def plan_on(shapes: Shapes, topology: str, mesh: str, tell: Tell) -> Plan:
    """Compile a search or a training for a topology and a mesh spec; raises as its parts do."""
    return plan_in(shapes, open_slice(topology, slice_count(mesh)), mesh, tell)


def plan_in(shapes: Shapes, place: Slice, mesh: str, tell: Tell) -> Plan:
    """Compile a search or a training for a slice; `tell` hears of each program before that."""
    found = programs_on(shapes, make_mesh(mesh, place.devices))
    if isinstance(shapes, SearchShapes):
        assert isinstance(found, SearchPrograms)
        return plan_search(shapes, found, place, mesh, tell)
    assert isinstance(shapes, TrainingShapes)
    assert isinstance(found, TrainingProgram)
    return plan_training(shapes, found, place, mesh, tell)


@dataclass(frozen=True)
class Trying:
    """How slices are tried.

    Attributes:
        tries: meshes of a slice that are compiled.
        mesh: the only mesh to try, or None for all.
        first: whether to stop at the first that fits.
        guess: whether meshes that are guessed to take more than there is are left out as well as
            those that certainly do.
        compile_as: what compiles one.
        tell: hears of every step.
    """

    tries: int = TRIED
    mesh: str | None = None
    first: bool = False
    guess: bool = False
    compile_as: Compile = plan_on
    tell: Tell = lambda _: None


def search_meshes(shapes: Shapes, topology: str, trying: Trying = Trying()) -> Found:
    """The likeliest meshes of a slice compiled, and ranked by what the compiler says.

    Meshes that are ruled out before (`candidates`) are not compiled. Raises InputError where no
    mesh divides the arrays, as where the shapes are wrong in themselves.
    """
    return _checked([_try(shapes, topology, trying)])


def smallest_slice(
    shapes: Callable[[int], Sequence[Shapes]], family: str, trying: Trying = Trying()
) -> Found:
    """The slices of a family tried from the smallest upward, until a mesh of one fits.

    `shapes` are those for so many devices, one or several in the order in which they are tried.
    Slices of which every mesh holds more than there is are passed over without compiling. Raises
    InputError where no mesh of any slice divides the arrays.
    """
    found: list[Trials] = []
    for topology in topologies(family):
        for choice, one in enumerate(shapes(device_count(topology))):
            found.append(replace(_try(one, topology, trying), choice=choice))
            if found[-1].best is not None:
                return _checked(found)
    return _checked(found)


def _try(shapes: Shapes, topology: str, trying: Trying) -> Trials:
    devices, tell = device_count(topology), trying.tell
    tell(f"{topology}: judging its meshes")
    judged = _judged(shapes, topology, devices, trying)
    possible = [one for one in judged if one.why is None]
    ruled_out = [one for one in judged if one.why is not None]
    if not possible:
        tell(f"{topology}: nothing to compile: {ruled_out[0].mesh} {ruled_out[0].why}")
    plans: list[Plan] = []
    for one in possible[: trying.tries]:
        count = f"{len(plans) + 1} of {min(trying.tries, len(possible))}"
        tell(f"{topology}: mesh {count}, {one.mesh}")
        plans.append(trying.compile_as(shapes, topology, one.mesh, tell))
        tell(f"{topology}: {one.mesh} {_verdict(plans[-1])}")
        if trying.first and plans[-1].fits:
            break
    done = trying.first and any(plan.fits for plan in plans)
    why = "not tried: another fits" if done else f"not tried: --try {trying.tries}"
    rest = [replace(one, why=why) for one in possible[len(plans) :]]
    return Trials(topology, devices, tuple(ranked(plans)), (*rest, *ruled_out))


def _judged(shapes: Shapes, topology: str, devices: int, trying: Trying) -> list[Candidate]:
    among, chip = None, chip_of(topology)
    if trying.mesh is not None:
        try:
            among = [mesh_shape(trying.mesh, devices)]
        except InputError as error:
            return [Candidate(trying.mesh, why=str(error))]
    found = candidates(shapes, chip, devices, among)
    if not trying.guess:
        return found
    return [
        replace(one, why=f"would take some {one.needed / GIB:.0f} GiB")
        if one.why is None and one.needed > chip.memory
        else one
        for one in found
    ]


def _checked(slices: Sequence[Trials]) -> Found:
    """All that was tried; InputError where nothing could be judged."""
    held = [one.resident_bytes for trials in slices for one in trials.skipped]
    if not any(trials.plans for trials in slices) and not any(size is not None for size in held):
        last = slices[-1]
        raise InputError(f"{last.topology}: no mesh: {last.skipped[0].why}")
    return Found(tuple(slices))


def ranked(plans: Sequence[Plan]) -> list[Plan]:
    """Plans with the best first: what fits, then tokens a second, then the least memory."""
    return sorted(plans, key=lambda one: (not one.fits, -one.tokens_per_second, one.needed))


def _verdict(plan: Plan) -> str:
    if plan.fits:
        return f"fits, {plan.tokens_per_second:,.0f} tokens a second"
    return f"does not fit{': ' + plan.refusal if plan.refusal else ''}"


LISTED = 12
"""Meshes that were not compiled and are listed; the others are counted."""


def show_found(console: Console, found: Found) -> None:
    """Print every slice that was tried, and the best plan of the last in full."""
    for trials in found.slices:
        _show_trials(console, trials)
    if found.best is not None:
        show(console, found.best)
    else:
        tried = ", ".join(one.topology for one in found.slices)
        console.print(f"nothing that was tried fits: {tried}")


def _show_trials(console: Console, trials: Trials) -> None:
    title = f"{trials.topology}, {trials.devices} devices: meshes compiled"
    table = Table(
        "", Column("--mesh", no_wrap=True), "GiB held", "beside", "both", "", "tokens/s",
        "compiled", title=title, title_justify="left",
    )  # fmt: skip
    for rank, plan in enumerate(trials.plans, 1):
        table.add_row(str(rank), *plan_cells(plan))
    if trials.plans:
        console.print(table)
    if not trials.skipped:
        return
    title = f"{trials.topology}, {trials.devices} devices: meshes not compiled"
    table = Table(
        Column("--mesh", no_wrap=True), "GiB held", "why", title=title, title_justify="left"
    )
    for one in trials.skipped[:LISTED]:
        held = "" if one.resident_bytes is None else f"{one.resident_bytes / GIB:.2f}"
        table.add_row(one.mesh, held, one.why)
    console.print(table)
    if len(trials.skipped) > LISTED:
        console.print(f"and {len(trials.skipped) - LISTED} more; --json holds all")


def plan_cells(plan: Plan) -> tuple[str, ...]:
    """A plan in cells: mesh, held, temporaries, both, fits or why not, tokens a second, time."""
    held, spent = f"{sum(plan.resident_bytes.values()) / GIB:.2f}", f"{plan.compile_seconds:.0f} s"
    if plan.refusal:
        return plan.mesh, held, "", "", plan.refusal, "", spent
    return (
        plan.mesh,
        held,
        f"{plan.temporaries / GIB:.2f}",
        f"{plan.needed / GIB:.2f}",
        "fits" if plan.fits else "does not fit",
        f"{plan.tokens_per_second:,.0f}",
        spent,
    )
