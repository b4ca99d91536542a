"""What was tried of slices, as tables. A single plan is shown by `measure.show`."""

from rich.console import Console
from rich.table import Column, Table

from w2s_jax.plan.measure import GIB, Plan, show
from w2s_jax.plan.trials import Found, Trials

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
        held = "" if one.held is None else f"{one.held / GIB:.2f}"
        table.add_row(one.mesh, held, one.why)
    console.print(table)
    if len(trials.skipped) > LISTED:
        console.print(f"and {len(trials.skipped) - LISTED} more; --json holds all")


def plan_cells(plan: Plan) -> tuple[str, ...]:
    """A plan in cells: mesh, held, temporaries, both, fits or why not, tokens a second, time."""
    held, spent = f"{sum(plan.held.values()) / GIB:.2f}", f"{plan.compile_seconds:.0f} s"
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
