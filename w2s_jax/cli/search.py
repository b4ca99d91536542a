"""`w2s search`: a file of prompts in, one of responses out. The searching is in w2s_jax/search."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from w2s_jax.cli.multihost_launch import Hosts
from w2s_jax.distributed import is_first, started
from w2s_jax.errors import InputError, RowsFailed
from w2s_jax.search.settings import GuidanceConfig, MethodConfig, TextScorersConfig
from w2s_jax.text.rows import Row

if TYPE_CHECKING:
    from w2s_jax.plan.meshes import Chosen
    from w2s_jax.search import SearchConfig
    from w2s_jax.search.checkpoints import Sources
    from w2s_jax.search.models import Places
    from w2s_jax.text.journal import Journal

# How a run is carried out, not what it computes: these may change when a journal is taken up again.
NOT_IN_FINGERPRINT = (
    "prompts", "output", "batch_size", "mesh", "policy_rules", "guide_rules", "scan_layers",
    "prompt_field",  # the rows are told apart by what it makes of them
    "config", "models_map", "format", "generator", "report", "show", "concurrency",
    "timeout", "attempts", "prompts_per_request",
    "price_prompt", "price_completion", "api_key_env",
    "hosts",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A policy behind an OpenAI-compatible completions API, in place of --policy."""

    endpoint: Annotated[str | None, arg(metavar="URL")] = None
    """Address of the API; --top-k then acts with --share-draws only."""
    endpoint_model: Annotated[str | None, arg(metavar="NAME")] = None
    """The model's name there."""
    api_key_env: Annotated[str, arg(metavar="NAME")] = "OPENAI_API_KEY"
    """Environment variable that holds the key; it is written nowhere."""
    concurrency: int = 8
    """Requests at a time."""
    timeout: float = 120.0
    """Seconds that a request may take."""
    attempts: int = 6
    """Times that a request is made before the endpoint counts as not answering."""
    prompts_per_request: Annotated[int | None, arg(metavar="INT")] = None
    """Hypotheses of a prompt that share a request; by default all."""
    share_draws: bool = False
    """The endpoint is w2s serve: ask for the draws of a search in one process."""
    price_prompt: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Price of a million prompt tokens, for the cost told at the end."""
    price_completion: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Price of a million completion tokens."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """What is read and written."""

    prompts: Annotated[str, arg(metavar="FILE")]
    """Rows with "prompt", "messages", "instruction" or ShareGPT's "conversations"; JSON lines or
    array, also .gz and .xz."""
    output: Annotated[str, arg(metavar="FILE")]
    """Output rows: prompt, response, score, hypotheses, and the other input fields."""
    prompt_field: Annotated[str | None, arg(metavar="NAME")] = None
    """Field of the rows that is their prompt, such as question or text; written as "prompt" too."""


@dataclass(frozen=True, kw_only=True)
class Search(Remote, TextScorersConfig, MethodConfig, GuidanceConfig, Hosts, Files):
    """Find responses of a frozen policy, steered by small models, reward models or functions.

    Finished rows go to OUTPUT.journal at once. After a kill the same command goes on where it
    stopped; at the end the journal becomes the output, in input order.
    """

    format: Literal["rows", "alpaca_eval"] = "rows"
    """Output as JSON lines, or as the JSON array that alpaca_eval reads."""
    generator: Annotated[str | None, arg(metavar="NAME")] = None
    """The system's name in alpaca_eval's files; by default made from method and policy."""
    report: Annotated[str | None, arg(metavar="FILE")] = None
    """Also write a page (.html) that shows what every search looked at and kept."""
    show: bool = False
    """Print each response as it is found, its tokens shaded by their log-ratio."""
    config: Annotated[str | None, arg(metavar="FILE|NAME")] = None
    """YAML values of these flags, by file or by the name of a built-in one; flags override them."""

    def run(self) -> None:
        """Search all rows; raises InputError, before any weight is read, for what is wrong."""
        from w2s_jax.text.conversations import prompts_from
        from w2s_jax.text.journal import job_journal, told_kept
        from w2s_jax.text.prompts import escape_notes
        from w2s_jax.text.rows import check_writable, read_rows

        config = self.search_config()
        sources = self.sources_of_all()
        if Path(self.prompts).resolve() == Path(self.output).resolve():
            raise InputError(f"--output {self.output} is the file of prompts; name another")
        rows, source = read_rows(self.prompts)
        rows = prompts_from(rows, self.prompt_field, source)
        self._tell(escape_notes(self.stop))
        if self.format == "alpaca_eval":
            self._check_alpaca(rows)
        for path in (self.output, self.report):
            if path is not None:
                check_writable(path)
        work = self.remote_work if self.endpoint else self.local_work
        run = work(sources, config, rows, source)
        with job_journal(self.output, self.fingerprint(rows)) as journal:
            self._check_hosts(rows)
            waiting = len(rows) - len(journal.read())
            started = time.monotonic()
            if waiting:
                try:
                    self._with_progress(run, journal, len(rows), waiting)
                except RowsFailed as failed:
                    raise InputError(f"{failed}{told_kept(journal.path)}") from None
            seconds = time.monotonic() - started
            self._finish(journal, len(rows), config)
            print(f"{self.output}: {len(rows)} rows, {waiting} of them in {seconds:.1f} s")

    def _check_hosts(self, rows: Sequence[Row]) -> None:
        """Raise InputError where hosts were started with other flags, or read other rows."""
        from w2s_jax.distributed import agree

        given = asdict(self)
        flags = {flag: given[flag] for flag in given if flag not in NOT_IN_FINGERPRINT}
        alike = (
            "mesh", "policy_rules", "guide_rules", "scan_layers", "batch_size", "report", "show",
            "format",
        )  # fmt: skip
        agree("search", flags | {flag: given[flag] for flag in alike} | {"rows": rows})

    def sources_of_all(self) -> "Sources":
        """All checkpoints; InputError where the method lacks one or has too many."""
        if (self.policy is None) == (self.endpoint is None):
            raise InputError("name what writes: either --policy or --endpoint")
        if self.endpoint and not self.endpoint_model:
            raise InputError("--endpoint needs --endpoint-model, the model's name there")
        sources = self.sources(guided=self.method != "sample")
        if self.method == "sample":
            if self.reward_model or self.scorer:
                raise InputError(
                    "--method sample scores nothing; leave --reward-model and --scorer out, or "
                    "take --method bon"
                )
            return sources
        rewards = self.rewards()
        if not sources.guides and (self.mixes or not (rewards or self.scorer)):
            others = "" if self.mixes else ", --reward-model or --scorer"
            raise InputError(f"--method {self.method} needs --tuned and --untuned{others}")
        return replace(sources, rewards=rewards)

    def local_work(
        self, sources: "Sources", config: "SearchConfig", rows: list[Row], source: str
    ) -> "Callable[[Journal, Callable[[Row | None], None]], None]":
        """The search with a policy in this process; nothing but weights is left to be wrong."""
        from w2s_jax.plan.meshes import choose_mesh, search_shapes
        from w2s_jax.search import checkpoints
        from w2s_jax.search.rows import encode_questions, search_rows
        from w2s_jax.text.prompts import special_stops
        from w2s_jax.train.step import batch_parts, check_batch

        needs = f"--method {self.method}" if self.mixes else ""
        plan = checkpoints.plan(sources, needs_tokens=needs)
        questions = encode_questions(plan, rows, source, max_new_tokens=config.max_new_tokens)
        functions = self.functions()
        config = replace(config, policy_cache=self.policy_cache)
        longest = max(len(one) for prompts in questions.prompts for one in prompts)

        def choose(places: "Places") -> "Chosen":
            shapes = search_shapes(
                plan,
                config,
                places,
                prompt_tokens=longest,
                slots=self.batch_size,
                dtype=self.weights_dtype,
            )
            return choose_mesh(shapes)

        places = self.places(choose)
        check_batch(self.batch_size, 1, places.mesh, flag="--batch-size")
        texts, ids = special_stops(plan.tokenizer, self.stop)
        parts = batch_parts(places.mesh)
        config = replace(
            config,
            stop=texts,
            eos_ids=(*plan.eos_ids, *ids),
            slots=min(self.batch_size, -(-len(rows) // parts) * parts),
        )
        self._tell([*plan.notes(), *places.notes(plan.configs)])

        def run(journal: "Journal", on_row: Callable[[Row | None], None]) -> None:
            steering = checkpoints.load(plan, dtype=self.weights_dtype, places=places)
            steering = steering.beside(functions, self.scorer)
            search_rows(
                plan,
                steering,
                questions,
                config,
                journal,
                method=self.method,
                traced=self.traced,
                on_row=on_row,
                mesh=places.mesh,
            )

        return run

    def remote_work(
        self, sources: "Sources", config: "SearchConfig", rows: list[Row], source: str
    ) -> "Callable[[Journal, Callable[[Row | None], None]], None]":
        """The search with a policy behind an API."""
        from w2s_jax.search import checkpoints
        from w2s_jax.search.rows import read_conversations, search_text_rows
        from w2s_jax.serve.client import Endpoint, open_policy
        from w2s_jax.serve.retry import Meter, Patience
        from w2s_jax.text.chat import renderer

        if self.mixes:
            raise InputError(f"--method {self.method} mixes logits, which an API does not give")
        if started():
            raise InputError("--endpoint: what is behind an API is asked by one host; start one")
        assert self.endpoint is not None
        assert self.endpoint_model is not None
        endpoint = Endpoint(
            self.endpoint,
            self.endpoint_model,
            api_key_env=self.api_key_env,
            prompts_per_request=self.prompts_per_request,
            share_draws=self.share_draws,
            # Tokens that were drawn need not be those that their text encodes to.
            token_ids=self.share_draws,
            price_prompt=self.price_prompt,
            price_completion=self.price_completion,
        )
        plan = checkpoints.plan(sources)
        args = self.given_template_args
        render = renderer(self.policy_template, where="--policy-template", args=args)
        for number, conversation in enumerate(read_conversations(rows, source), start=1):
            where = f"{source} {number}"
            try:
                render(conversation)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
            plan.check_length(conversation, config.max_new_tokens, where)
        functions, meter = self.functions(), Meter()
        patience = Patience(self.concurrency, self.timeout, self.attempts)
        policy = open_policy(endpoint, config, render, patience=patience, meter=meter)
        config = replace(config, slots=min(self.batch_size, len(rows)))
        self._tell(plan.notes())

        def run(journal: "Journal", on_row: Callable[[Row | None], None]) -> None:
            steering = checkpoints.load(plan, dtype=self.weights_dtype)
            steering = steering.beside(functions, self.scorer)
            try:
                search_text_rows(
                    policy,
                    steering.scorers,
                    rows,
                    config,
                    journal,
                    source=source,
                    method=self.method,
                    names=steering.names,
                    traced=self.traced,
                    render=render,
                    on_row=on_row,
                )
            finally:
                print(f"{self.endpoint}: {endpoint.usage(meter)}")

        return run

    @property
    def traced(self) -> bool:
        """Whether what the search looked at is kept."""
        return self.report is not None or self.show

    def _tell(self, lines: list[str]) -> None:
        for line in lines:
            print(line)

    def _with_progress(
        self, run: Callable[..., None], journal: "Journal", count: int, waiting: int
    ) -> None:
        from rich.console import Console
        from tqdm import tqdm

        from w2s_jax.evaluate.progress import progress
        from w2s_jax.evaluate.report import show, show_plain
        from w2s_jax.search.results import TRACE

        console = Console()
        with progress(count, "prompt", done=count - waiting) as advance:

            def on_row(row: Row | None) -> None:
                if self.show and row is not None:
                    trace = row[TRACE]
                    tokens = [(text, value) for text, value in trace["tokens"]]
                    with tqdm.external_write_mode():
                        if tokens:
                            show(console, trace["prompt"], tokens, row["score"])
                        else:
                            show_plain(console, trace["prompt"], row["response"], row["score"])
                advance(1)

            run(journal, on_row)

    def _check_alpaca(self, rows: list[Row]) -> None:
        """Raise InputError, before the search, for rows that alpaca_eval could not tell apart."""
        from w2s_jax.evaluate.results import alpaca_rows

        try:
            alpaca_rows([row | {"response": ""} for row in rows], generator=self.generator_name)
        except InputError as error:
            raise InputError(f"{self.prompts} {error} (--format alpaca_eval)") from None

    def _finish(self, journal: "Journal", count: int, config: "SearchConfig") -> None:
        """The report and the output from the journal, which is removed last."""
        from w2s_jax.evaluate.report import write_report
        from w2s_jax.evaluate.results import write_alpaca
        from w2s_jax.search.results import TRACE
        from w2s_jax.text.rows import write_jsonl

        rows = journal.read()
        if self.report is not None and len(rows) == count and is_first():
            traces = (rows[index][TRACE] for index in range(count))
            write_report(
                self.report, traces, title=f"w2s search: {self.prompts}", settings=self.settings()
            )

        def write(path: str | Path, rows: Iterable[Row]) -> None:
            plain = [{name: row[name] for name in row if name != TRACE} for row in rows]
            if self.format == "alpaca_eval":
                write_alpaca(path, plain, generator=self.generator_name)
            else:
                write_jsonl(path, plain)

        journal.merge(self.output, count, write)

    @property
    def generator_name(self) -> str:
        """The system's name for alpaca_eval."""
        writer = self.endpoint_model or Path(str(self.policy)).name
        return self.generator or f"{writer}-w2s-{self.method}"

    def settings(self) -> dict[str, Any]:
        """The flags that were given, for the report; none of them holds a key."""
        flags = asdict(self)
        hidden = {"prompts", "output", "report", "show", "config", "hosts", "api_key_env"}
        return {name: flags[name] for name in flags if name not in hidden and flags[name]}

    def fingerprint(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What the rows of a journal depend on: flags, the input rows, the checkpoints' files."""
        from w2s_jax.search.checkpoints import weights_stamp

        given = asdict(self)
        flags = {flag: given[flag] for flag in given if flag not in NOT_IN_FINGERPRINT}
        checkpoints = self.sources_of_all().checkpoints
        folders = {
            role: Path(path).resolve() for role, path in checkpoints.items() if Path(path).is_dir()
        }
        files = {f"{role}_files": weights_stamp(folder) for role, folder in folders.items()}
        paths = {role: str(folder) for role, folder in folders.items()}
        content = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        told = {"traced": self.traced, "prompts_sha256": content[:16]}
        for flag in ("policy_template", "guide_template", "untuned_template", "reward_template"):
            if str(given[flag]).endswith(".jinja") and Path(given[flag]).is_file():
                told[f"{flag}_sha256"] = hashlib.sha256(Path(given[flag]).read_bytes()).hexdigest()
        return flags | paths | files | told
