"""`w2s search`: a file of prompts in, one of responses out, by `search.file.search_file`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from w2s_jax.cli.multihost_launch import Hosts
from w2s_jax.search.settings import SearchFileConfig

if TYPE_CHECKING:
    from w2s_jax.plan.meshes import Chosen
    from w2s_jax.search import SearchConfig
    from w2s_jax.serve.client import CompletionsPolicy
    from w2s_jax.text.prompts import Conversation


@dataclass(frozen=True, kw_only=True)
class Search(SearchFileConfig, Hosts):
    """Find responses of a frozen policy, steered by small models, reward models or functions.

    Finished rows go to OUTPUT.journal at once. After a kill the same command goes on where it
    stopped; at the end the journal becomes the output, in input order.
    """

    show: bool = False
    """Print each response as it is found, its tokens shaded by their log-ratio."""
    config: Annotated[str | None, arg(metavar="FILE|NAME")] = None
    """YAML values of these flags, by file or by the name of a built-in one; flags override them."""

    def run(self) -> None:
        """Search all rows; raises InputError, before any weight is read, for what is wrong."""
        from w2s_jax.evaluate.report import show_row, write_report
        from w2s_jax.search.file import search_file
        from w2s_jax.text.rows import progress

        output: dict[str, Any] = {}
        if self.format == "alpaca_eval":
            # Not above: these import what trains.
            from w2s_jax.evaluate.results import check_alpaca, write_alpaca

            name = self.generator_name
            output["check_rows"] = partial(check_alpaca, source=self.prompts, generator=name)
            output["write"] = partial(write_alpaca, generator=name)
        done = search_file(
            self,
            tell=print,
            progress=lambda count, done: progress(count, "prompt", done=done),
            on_row=show_row if self.show else None,
            connect=self.connect,
            choose_mesh=self.choose_mesh,
            write_report=write_report,
            **output,
        )
        print(f"{self.output}: {done.rows} rows, {done.searched} of them in {done.seconds:.1f} s")

    def connect(
        self, config: "SearchConfig", render: "Callable[[Conversation], str]"
    ) -> "tuple[CompletionsPolicy, Callable[[], str]]":
        """The policy behind --endpoint, and what says how much it was asked."""
        # Not above: httpx is an extra.
        from w2s_jax.serve.client import connect

        return connect(self, config, render)

    def choose_mesh(self, *looked_at: Any) -> "Chosen":
        """The mesh for --mesh auto."""
        # Not above: compilers of other devices are seldom asked, and take long to import.
        from w2s_jax.plan.meshes import choose_search_mesh

        return choose_search_mesh(*looked_at, slots=self.batch_size, dtype=self.weights_dtype)
