"""`w2s reason`: the whole of weak-to-strong reasoning, stage by stage, from one config."""

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from tyro.conf import arg

from w2s_jax.cli.main import find_config, mapping_flags, read_flags
from w2s_jax.errors import InputError
from w2s_jax.reasoning.config import ReasonConfig, StagesConfig

if TYPE_CHECKING:
    from w2s_jax.reasoning.stages import Planned
    from w2s_jax.train.config import TrainConfig

OWN_FLAGS = ("model", "data", "output", "estimate")
"""Flags of training that a run sets, or that would keep it from writing a model."""


@dataclass(frozen=True, kw_only=True)
class Reason(StagesConfig):
    """Train a strong model on the weak labels it can trust, then on contrasts it finds itself.

    Weak labels and in-context labels; stage I on what they agree on, again; stage II on pairs; and
    a test of every model (arXiv 2407.13647). Each stage has a folder; those that are done are not
    done again, and a change redoes what depends on it.
    """

    recipe: Annotated[str | None, arg(name="config", metavar="FILE|NAME")] = None
    """The run's settings: a YAML file, or one of the package's names (gsm8k_llama2_7b, ..)."""
    dry_run: bool = False
    """Print what would be done, and what it costs, and do nothing."""

    def run(self) -> None:
        """Do the stages and write the report; raises InputError for what is wrong."""
        from w2s_jax.reasoning import plan, run
        from w2s_jax.text.typed_yaml import read_typed

        if self.recipe is None:
            raise InputError("--config is missing: a YAML file, or the name of a published one")
        source = find_config(["--config", self.recipe], folder="reasoning")
        assert source is not None
        config = read_typed(ReasonConfig, source)
        check_flags(config, str(source))
        if not Path(self.data).is_dir():
            raise InputError(f"--data {self.data}: no such folder")
        if self.dry_run:
            _show(plan(config, self, tell=_tell))
        else:
            print(run(config, self, tell=_tell))
            print(f"written to {Path(self.output)}")


def check_flags(config: ReasonConfig, source: str) -> None:
    """Raises InputError for flags of `w2s sft` and `w2s dpo` in a config that those would refuse.

    What hangs on the data is left to them.
    """
    from w2s_jax.cli.train import DPO, SFT
    from w2s_jax.reasoning.selection import WEIGHT
    from w2s_jax.train.setup import check_trackers

    two = {} if config.stage_two is None else config.stage_two.dpo
    if config.stage_two is not None and config.stage_two.contrasts.weighted:
        two = {"weight_column": WEIGHT} | two
    places: list[tuple[str, type[TrainConfig], dict[str, Any], dict[str, Any]]] = [
        ("sft", SFT, {}, config.sft),
        ("weak: sft", SFT, config.sft, config.weak.sft),
        ("dpo", DPO, {}, config.dpo),
        ("stage_two: dpo", DPO, config.dpo, two),
    ]
    for name, command, under, values in places:
        where = f"{source}: {name}"
        for key, value in values.items():
            if str(key).replace("-", "_") in OWN_FLAGS:
                raise InputError(f"{where}: {key} is for the run to say; leave it out")
            _parsed(command, {key: value}, where, f"{where}: {key}")
        try:
            together = _parsed(command, under | values, where, where)
            together.check()
            check_trackers(together)
        except InputError as error:
            raise error.at(where) from None


def _parsed(
    command: "type[TrainConfig]", values: dict[str, Any], source: str, where: str
) -> "TrainConfig":
    """The command of these flags; `source` heads what is wrong with a key, `where` with a value."""
    flags = mapping_flags(values, source, command)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            return cast("TrainConfig", read_flags(command, flags, (command.name,)))
        except SystemExit:
            pass
    told = " ".join(flags) or "nothing"
    raise InputError(f"{where}: `w2s {command.name}` does not take {told}; see its --help")


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
    waiting = [planned for planned in plan if planned.state not in ("done", "left out")]
    print(f"{len(waiting)} of {len(plan)} stages to do")
