"""`w2s reason`: the whole of weak-to-strong reasoning, stage by stage, from one config."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from w2s_jax.errors import InputError

if TYPE_CHECKING:
    from w2s_jax.reasoning.stages import Planned

DEFAULT_OUTPUT = "runs/reason"


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Train a strong model on the weak labels it can trust, then on contrasts it finds itself.

    Weak labels and in-context labels; stage I on what they agree on, again; stage II on pairs; and
    a test of every model (arXiv 2407.13647). Each stage has a folder; those that are done are not
    done again, and a change redoes what depends on it.
    """

    recipe: Annotated[str | None, arg(name="config", metavar="FILE|NAME")] = None
    """The run's settings: a YAML file, or one of the package's names (gsm8k_llama2_7b, ..)."""
    data: Annotated[str, arg(metavar="DIR")] = "."
    """Folder that the config's relative paths are in."""
    output: Annotated[str, arg(metavar="DIR")] = DEFAULT_OUTPUT
    """Folder of the stages and the report."""
    first: Annotated[str | None, arg(name="from", metavar="STAGE")] = None
    """First stage to do; those before it are taken as they are."""
    last: Annotated[str | None, arg(name="until", metavar="STAGE")] = None
    """Last stage to do."""
    dry_run: bool = False
    """Print what would be done, and what it costs, and do nothing."""

    def run(self) -> None:
        """Do the stages and write the report; raises InputError for what is wrong."""
        from w2s_jax.cli.config import find_config
        from w2s_jax.reasoning.config import ReasonConfig
        from w2s_jax.reasoning.pipeline import Pipeline, run_pipeline
        from w2s_jax.reasoning.stages import plan_stages
        from w2s_jax.text.typed_yaml import read_typed

        if self.recipe is None:
            raise InputError("--config is missing: a YAML file, or the name of a published one")
        source = find_config(["--config", self.recipe], folder="reasoning")
        assert source is not None
        root = Path(self.output)
        pipeline = Pipeline(read_typed(ReasonConfig, source), Path(self.data), root)
        stages = pipeline.stages()
        if self.dry_run:
            _show(plan_stages(stages, root, first=self.first, last=self.last))
            return
        tables = run_pipeline(
            pipeline, stages, first=self.first, last=self.last, tell=lambda line: _tell(line)
        )
        print(tables)
        print(f"written to {root}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(plan: "list[Planned]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "state", "work")
    for planned in plan:
        why = f" ({planned.why})" if planned.state == "changed" else ""
        table.add_row(planned.stage.name, planned.state + why, planned.stage.cost)
    Console().print(table)
