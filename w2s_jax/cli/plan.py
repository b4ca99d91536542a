"""`w2s plan`: what a search or a training takes of a TPU slice or of GPUs that are not here."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from w2s_jax.plan import (
    PlanConfig,
    PlanDPOConfig,
    PlanMatrixConfig,
    PlanSearchConfig,
    PlanSFTConfig,
    plan,
    plan_matrix,
)


@dataclass(frozen=True, kw_only=True)
class _Plan(PlanConfig):
    """A plan as a command."""

    json: Annotated[str | None, arg(metavar="FILE")] = None
    """Also write the figures to FILE as JSON."""

    def run(self) -> None:
        """Compile and print, and exit with 1 if it does not fit; InputError for what is wrong."""
        from w2s_jax.text.rows import check_writable, write_whole

        if self.json is not None:
            check_writable(Path(self.json))
        found = plan(self, tell=_tell)
        from rich.console import Console

        from w2s_jax.plan.planning import show

        show(Console(), found)
        if found.best is not None:
            told = f"to run it: {self.command(found.best.mesh)}"
            Console().print(told, soft_wrap=True, highlight=False)
        if self.json is not None:
            figures = json.dumps(found.as_row(), indent=2)
            write_whole(Path(self.json), [figures.encode(), b"\n"])
        if found.best is None:
            sys.exit(1)


@dataclass(frozen=True, kw_only=True)
class PlanSearch(PlanSearchConfig, _Plan):
    """Compile a search for a TPU slice or for GPUs of a host, on any machine, without weights.

    Prints what each device holds, what each program needs beside it, what devices exchange, and an
    estimate of the speed. Exits with 1 where it does not fit. Needs libtpu (pip install
    'w2s-jax[tpu]'), for GPUs jax's CUDA plugin ('w2s-jax[cuda]').
    """


@dataclass(frozen=True, kw_only=True)
class PlanSFT(PlanSFTConfig, _Plan):
    """Compile a step of `w2s sft` for a TPU slice or for GPUs of a host, without weights.

    Prints what each device holds and needs beside it, what devices exchange, and an estimate of the
    speed. Exits with 1 where it does not fit. Needs libtpu (pip install 'w2s-jax[tpu]'), for GPUs
    jax's CUDA plugin ('w2s-jax[cuda]').
    """


@dataclass(frozen=True, kw_only=True)
class PlanDPO(PlanDPOConfig, _Plan):
    """Compile a step of `w2s dpo` for a TPU slice or for GPUs of a host, without weights.

    The reference's log-probs are precomputed. Prints what each device holds and needs beside it,
    what devices exchange, and an estimate of the speed. Exits with 1 where it does not fit. Needs
    libtpu (pip install 'w2s-jax[tpu]'), for GPUs jax's CUDA plugin ('w2s-jax[cuda]').
    """


@dataclass(frozen=True, kw_only=True)
class PlanMatrix(PlanMatrixConfig):
    """Plan v5e, v5p and v6e, 8B and 70B, search, sft and dpo, with LoRA and in full.

    Each on the smallest slice that fits. Takes an hour or more; a row is written when it is done,
    and a run with the same files goes on where one was stopped. Needs libtpu: pip install
    'w2s-jax[tpu]'.
    """

    def run(self) -> None:
        """Plan what the files lack, and exit with 1 where a cell failed."""
        table, failed = plan_matrix(self, tell=_tell)
        print(table, end="")
        if failed:
            _tell(f"failed: {', '.join(failed)}")
            sys.exit(1)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
