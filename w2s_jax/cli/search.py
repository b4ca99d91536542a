"""`w2s search`: a file of prompts in, one of responses out, by `search.file.search_file`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from w2s_jax.cli.multihost_launch import Hosts
from w2s_jax.errors import InputError
from w2s_jax.search.settings import SearchFileConfig

if TYPE_CHECKING:
    from w2s_jax.plan.meshes import Chosen
    from w2s_jax.search import SearchConfig
    from w2s_jax.search.checkpoints import SteeringPlan
    from w2s_jax.search.models import Places
    from w2s_jax.serve.client import CompletionsPolicy
    from w2s_jax.text.rows import Row


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
        from w2s_jax.evaluate.progress import progress
        from w2s_jax.evaluate.report import write_report
        from w2s_jax.search.file import search_file

        done = search_file(
            self,
            tell=print,
            progress=lambda count, done: progress(count, "prompt", done=done),
            on_row=self.show_row if self.show else None,
            connect=self.connect,
            choose_mesh=self.choose_mesh,
            check_rows=self.check_rows,
            write=self.write,
            write_report=write_report,
        )
        print(f"{self.output}: {done.rows} rows, {done.searched} of them in {done.seconds:.1f} s")

    def connect(
        self, config: "SearchConfig", render: Callable[..., str]
    ) -> "tuple[CompletionsPolicy, Callable[[], str]]":
        """The policy behind --endpoint, and what says how much it was asked."""
        from w2s_jax.serve.client import Endpoint, Patience, open_policy

        endpoint = Endpoint(
            str(self.endpoint),
            str(self.endpoint_model),
            api_key_env=self.api_key_env,
            prompts_per_request=self.prompts_per_request,
            share_draws=self.share_draws,
            # Tokens that were drawn need not be those that their text encodes to.
            token_ids=self.share_draws,
            price_prompt=self.price_prompt,
            price_completion=self.price_completion,
        )
        patience = Patience(self.concurrency, self.timeout, self.attempts)
        policy = open_policy(endpoint, config, render, patience=patience)
        return policy, lambda: str(policy.usage)

    def choose_mesh(
        self, plan: "SteeringPlan", config: "SearchConfig", places: "Places", longest: int
    ) -> "Chosen":
        """The mesh for --mesh auto."""
        from w2s_jax.plan.meshes import choose_mesh, search_shapes

        sizes: dict[str, Any] = {"prompt_tokens": longest, "slots": self.batch_size}
        return choose_mesh(search_shapes(plan, config, places, dtype=self.weights_dtype, **sizes))

    def check_rows(self, rows: "Sequence[Row]") -> None:
        """Raise InputError, before the search, for rows that alpaca_eval could not tell apart."""
        from w2s_jax.evaluate.results import alpaca_rows

        if self.format != "alpaca_eval":
            return
        try:
            alpaca_rows([row | {"response": ""} for row in rows], generator=self.generator_name)
        except InputError as error:
            raise InputError(f"{self.prompts} {error} (--format alpaca_eval)") from None

    def write(self, path: str | Path, rows: "list[Row]") -> None:
        """Write the output as --format says."""
        from w2s_jax.evaluate.results import write_alpaca
        from w2s_jax.text.rows import write_jsonl

        if self.format == "alpaca_eval":
            write_alpaca(path, rows, generator=self.generator_name)
        else:
            write_jsonl(path, rows)

    def show_row(self, row: "Row") -> None:
        """Print an answer, its tokens shaded where a guide values them."""
        from rich.console import Console
        from tqdm import tqdm

        from w2s_jax.evaluate.report import show, show_plain

        trace = row["trace"]
        tokens = [(text, value) for text, value in trace["tokens"]]
        with tqdm.external_write_mode():
            if tokens:
                show(Console(), trace["prompt"], tokens, row["score"])
            else:
                show_plain(Console(), trace["prompt"], row["response"], row["score"])
