"""Plans: what fits a slice that is not here, according to the accelerator's own compiler."""

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

    jax uses no TPU or GPU of this machine for the rest of the process.

    Args:
        config: What to plan: a `PlanSearchConfig`, `PlanSFTConfig` or `PlanDPOConfig`.
        tell: Called with a line on everything that is compiled, before it is.

    Returns:
        The plan of the given slice with the given mesh, or with the likeliest one. If several are
        to be tried, `Found`, all that was tried. Either has `best`, the plan looked for; None if
        nothing fits.

    Raises:
        InputError: For a wrong setting, settings that exclude each other, a mesh that does not
            divide an array, and if the compiler is not installed.
    """
    from w2s_jax.plan.topology import leave_accelerators

    leave_accelerators()  # Before jax is imported, which the next line does.
    from w2s_jax.plan.planning import plan_as_set

    return plan_as_set(config, tell)


def plan_matrix(
    config: PlanMatrixConfig, *, tell: Callable[[str], None] = lambda _: None
) -> tuple[str, list[str]]:
    """Plan every chip, model size and work, each on the smallest slice that fits.

    A row is written when it is done, and a run with the same files resumes where one was stopped.
    jax uses no TPU or GPU of this machine for the rest of the process.

    Args:
        config: The cells and the files.
        tell: Called with a line on every step.

    Returns:
        The table in Markdown, and the names of the cells that failed.

    Raises:
        InputError: For a wrong setting, files with other settings or of another run, and if the
            compiler is not installed.
    """
    from w2s_jax.plan.topology import leave_accelerators

    leave_accelerators()
    from w2s_jax.plan.matrix import plan_as_set

    return plan_as_set(config, tell)
