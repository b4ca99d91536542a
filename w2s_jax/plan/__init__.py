"""Plans: what fits a slice that is not here, by the accelerator's own compiler."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from w2s_jax.plan.config import (
    PlanConfig,
    PlanDPOConfig,
    PlanMatrixConfig,
    PlanSearchConfig,
    PlanSFTConfig,
)

if TYPE_CHECKING:
    from w2s_jax.plan.planning import Found, Plan

__all__ = [
    "PlanConfig",
    "PlanDPOConfig",
    "PlanMatrixConfig",
    "PlanSFTConfig",
    "PlanSearchConfig",
    "plan",
    "plan_matrix",
]


def plan(config: PlanConfig, *, tell: Callable[[str], None] = lambda _: None) -> "Plan | Found":
    """Compile a search or a training for a slice that is not here, from its models' shapes alone.

    jax takes no TPU or GPU of this machine for the rest of the process.

    Args:
        config: what is planned: a `PlanSearchConfig`, `PlanSFTConfig` or `PlanDPOConfig`.
        tell: hears of everything that is compiled, before it is.

    Returns:
        The plan of the slice and the mesh that are named, or of the likeliest mesh. Where several
        are to be tried, all that was: `Found`. Either has `best`, the plan that was looked for,
        which is None where nothing fits.

    Raises:
        InputError: for a wrong setting, settings that do not go together, a mesh that does not
            divide an array, and where the compiler is not installed.
    """
    from w2s_jax.plan.topology import leave_accelerators

    leave_accelerators()  # Before jax is imported, which the next line does.
    from w2s_jax.plan.planning import plan_as_set

    return plan_as_set(config, tell)


def plan_matrix(
    config: PlanMatrixConfig, *, tell: Callable[[str], None] = lambda _: None
) -> tuple[str, list[str]]:
    """Plan every chip, model size and work, each on the smallest slice that fits.

    A row is written when it is done, and a run with the same files goes on where one was stopped.
    jax takes no TPU or GPU of this machine for the rest of the process.

    Args:
        config: the cells and the files.
        tell: hears of every step.

    Returns:
        The table in Markdown, and the names of cells that failed.

    Raises:
        InputError: for a wrong setting, files of other settings or of another run, and where the
            compiler is not installed.
    """
    from w2s_jax.plan.topology import leave_accelerators

    leave_accelerators()
    from w2s_jax.plan.matrix import plan_as_set

    return plan_as_set(config, tell)
