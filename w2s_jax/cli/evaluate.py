"""`w2s eval`: gold rewards of a file of responses. The figures are made in w2s_jax/evaluate."""

import contextlib
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from w2s_jax.cli.multihost_launch import Hosts
from w2s_jax.cli.quantisation import QuantisationFlags
from w2s_jax.distributed import is_first
from w2s_jax.errors import InputError, RowFailed, RowsFailed

if TYPE_CHECKING:
    import numpy as np
    from jax.sharding import Mesh

    from w2s_jax.evaluate.results import Results
    from w2s_jax.models.encoder import Classifier
    from w2s_jax.models.reward import RewardModel
    from w2s_jax.text.journal import Journal

# What a row's reward depends on, apart from the rows and the checkpoint's files.
IN_FINGERPRINT = ("reward_model", "label", "end_token", "cut", "dtype")
FIELD = "gold_reward"


@dataclass(frozen=True, kw_only=True)
class Evaluate(QuantisationFlags, Hosts):
    """Gold rewards of a file of responses, by a reward model or a classifier.

    Prints the mean with its standard error and the lengths; with --against also the win rate over
    another file that answers the same prompts, with a bootstrap interval. With --output, finished
    rows go to OUTPUT.journal at once, and after a kill the same command goes on where it stopped.
    With --quantisation-report, what quantising a policy changes instead.
    """

    results: Annotated[str, arg(metavar="FILE")] = ""
    """Rows with a prompt and a "response", as search writes them, or AlpacaEval's JSON array."""
    reward_model: Annotated[str, arg(metavar="DIR|ID")] = ""
    """Checkpoint that rewards: a sequence classifier, UltraRM's or Starling-RM's layout."""
    against: Annotated[str | None, arg(metavar="FILE")] = None
    """Another such file with the same prompts in the same order."""
    template: Annotated[str, arg(metavar="NAME|FILE.jinja")] = "auto"
    """How the reward model reads a prompt: auto, none, chat, a published name, a .jinja file."""
    label: Annotated[str | None, arg(metavar="NAME|NUMBER")] = None
    """The label whose logit is the reward; of two labels, by default 1 minus 0."""
    end_token: bool = False
    """Put the template's end token behind every response."""
    cut: Literal["never", "start", "end"] = "never"
    """Side to drop tokens on where a row exceeds the model's positions; encoders drop the end."""
    output: Annotated[str | None, arg(metavar="FILE")] = None
    """Rows of RESULTS, JSON lines, each with its "gold_reward"."""
    json: Annotated[str | None, arg(metavar="FILE")] = None
    """The figures of the table as JSON."""
    batch_size: int = 16
    """Rows rewarded side by side."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; auto is as stored, but float32 on a CPU, where it is faster."""
    mesh: Annotated[str | None, arg(metavar="SPEC")] = None
    """Device mesh such as data=2,tensor=4; one axis may be -1."""
    seed: int = 0
    """Of the bootstrap, or of the search in a quantisation report."""
    config: Annotated[str | None, arg(metavar="FILE|NAME")] = None
    """YAML values of these flags, by file or by the name of a built-in one; flags override them."""

    def run(self) -> None:
        """Reward all rows; raises InputError, before any weight is read, for what is wrong."""
        import numpy as np

        from w2s_jax.evaluate.results import count_tokens
        from w2s_jax.evaluate.rewards import compare, summarise
        from w2s_jax.models.load import load_reward_labels
        from w2s_jax.models.reward import contrast
        from w2s_jax.text.rows import write_whole
        from w2s_jax.text.tokenizer import load_tokenizer

        if self.quantisation_report is not None:
            return self._quantisation()
        if not self.results or not self.reward_model:
            raise InputError("give --results and --reward-model, or --quantisation-report")
        files = self.read()
        tokenizer = load_tokenizer(self.reward_model)
        encoded, rendering = self.encode(files, tokenizer)
        contrast(load_reward_labels(self.reward_model), self.label)
        values = np.split(self.reward(files, encoded, rendering), [len(files[0].rows)])
        figures: dict[str, Any] = {"reward_model": self.reward_model, "label": self.label}
        for name, file, rewards in zip(("results", "against"), files, values, strict=False):
            counts = count_tokens(tokenizer, file.responses)
            summary = summarise(rewards, file.responses, counts)
            figures[name] = {"file": file.path, **asdict(summary)}
        if self.against:
            figures["comparison"] = asdict(compare(*values, seed=self.seed))
        if self.json and is_first():
            write_whole(self.json, [json.dumps(figures, indent=2).encode(), b"\n"])
        report(figures)

    def _quantisation(self) -> None:
        if self.results or self.reward_model:
            given = "--results" if self.results else "--reward-model"
            raise InputError(f"{given} has no part in --quantisation-report; leave one out")
        self.report_quantisation(
            dtype=None if self.dtype == "auto" else self.dtype,
            mesh=self.mesh,
            batch_size=self.batch_size,
            seed=self.seed,
            out=self.json,
        )

    def read(self) -> "list[Results]":
        """The files of responses, checked against one another and against what is written."""
        from w2s_jax.evaluate.results import read_results
        from w2s_jax.evaluate.rewards import check_same_prompts
        from w2s_jax.text.rows import check_writable

        if self.batch_size < 1:
            raise InputError(f"--batch-size is {self.batch_size}; it must be at least 1")
        inputs = [path for path in (self.results, self.against) if path is not None]
        outputs = {"--output": self.output, "--json": self.json}
        taken = {Path(path).resolve() for path in inputs}
        for flag, path in outputs.items():
            if path is not None and Path(path).resolve() in taken:
                raise InputError(f"{flag} {path} is also another flag's file; name another")
            if path is not None:
                taken.add(Path(path).resolve())
        files = [read_results(path) for path in inputs]
        if len(files) > 1:
            one, other = files
            names = (one.path, other.path)
            check_same_prompts(one.conversations, other.conversations, names, other.unit)
        for path in filter(None, outputs.values()):
            check_writable(path)
        return files

    def encode(self, files: "list[Results]", tokenizer: Any) -> tuple[list[list[int]], str]:
        """Token ids of all rows, and how they were rendered, in a word."""
        from w2s_jax.evaluate.results import encode_behind, encode_plain
        from w2s_jax.models.encoder import EncoderConfig
        from w2s_jax.models.load import load_reward_config
        from w2s_jax.text.chat import load_template

        config = load_reward_config(self.reward_model)
        limit = config.max_positions
        if isinstance(config, EncoderConfig):
            if self.template not in ("auto", "none") or self.end_token:
                flag = "--end-token" if self.end_token else f"--template {self.template}"
                raise InputError(f"{flag}: an encoder classifier reads plain text; leave it out")
            return [ids for file in files for ids in encode_plain(file, tokenizer, limit)], "plain"
        template = load_template(tokenizer, self.template, where="--template")
        options: dict[str, Any] = {"end": self.end_token, "cut": self.cut}
        encoded = [ids for file in files for ids in encode_behind(file, template, limit, **options)]
        return encoded, template.describe()

    def reward(
        self, files: "list[Results]", encoded: list[list[int]], rendering: str
    ) -> "np.ndarray":
        """The rewards of all rows, those of the first file written to --output."""
        import numpy as np

        from w2s_jax.distributed import agree
        from w2s_jax.evaluate.progress import progress
        from w2s_jax.evaluate.rewards import rewards
        from w2s_jax.ops.meshes import mesh_of
        from w2s_jax.text.journal import job_journal

        values = np.zeros(len(encoded), np.float32)
        rows = [row for file in files for row in file.rows]
        with contextlib.ExitStack() as stack:
            journal: Journal | None = None
            if self.output:
                mark = self.fingerprint(rows, len(files[0].rows), rendering)
                journal = stack.enter_context(job_journal(self.output, mark))
            told = {"rows": rows, "read as": encoded, "batch size": self.batch_size}
            agree("evaluation", told | {"mesh": self.mesh, "output": bool(self.output)})
            finished = journal.read() if journal else {}
            for index, row in finished.items():
                values[index] = row[FIELD]
            waiting = np.array([i for i in range(len(encoded)) if i not in finished], np.int64)

            def keep(some: np.ndarray, found: np.ndarray) -> None:
                for index, value in zip(waiting[some].tolist(), found.tolist(), strict=True):
                    values[index] = value
                    if journal and journal.is_own(index) and math.isfinite(value):
                        journal.append(index, rows[index] | {FIELD: value})
                advance(len(some))

            if len(waiting):
                mesh = mesh_of(self.mesh)
                model = self.load(mesh)
                total, done = len(encoded), len(finished)
                with progress(total, "row", done=done) as advance:
                    ids = [encoded[index] for index in waiting]
                    options: dict[str, Any] = {"batch_size": self.batch_size, "label": self.label}
                    options["mesh"] = mesh
                    rewards(model, ids, on_batch=keep, **options)
            self._check_finite(files, values, journal)
            if journal and self.output:
                journal.merge(self.output, len(files[0].rows))
        return values

    def _check_finite(
        self, files: "list[Results]", values: "np.ndarray", journal: "Journal | None"
    ) -> None:
        """Raise InputError, naming the rows, where a reward is no finite number."""
        from w2s_jax.text.journal import told_kept

        told, first = [], 0
        for file in files:
            own = values[first : first + len(file.rows)].tolist()
            first += len(own)
            name = f"reward model {self.reward_model}"
            failed = [
                RowFailed(i, [name]) for i, value in enumerate(own) if not math.isfinite(value)
            ]
            if failed:
                told.append(str(RowsFailed(failed, where=file.unit, number=lambda row: row + 1)))
        if told:
            kept = told_kept(journal.path) if journal else ""
            raise InputError("; ".join(told) + kept)

    def fingerprint(self, rows: list[dict[str, Any]], first: int, rendering: str) -> dict[str, Any]:
        """What the rows of a journal depend on: flags, the input rows, the checkpoint's files."""
        from w2s_jax.search.checkpoints import weights_stamp

        flags = {name: value for name, value in asdict(self).items() if name in IN_FINGERPRINT}
        folder = Path(self.reward_model).resolve()
        if folder.is_dir():
            flags |= {"reward_model": str(folder), "reward_model_files": weights_stamp(folder)}
        content = hashlib.sha256(json.dumps([rows[:first], rows[first:]]).encode()).hexdigest()
        return flags | {"rendering": rendering, "rows_sha256": content[:16]}

    def load(self, mesh: "Mesh | None") -> "RewardModel | Classifier":
        """The reward model, on the mesh where there is one."""
        from w2s_jax.models.load import load_reward_model

        dtype = None if self.dtype == "auto" else self.dtype
        return load_reward_model(self.reward_model, dtype=dtype, mesh=mesh)


def report(figures: dict[str, Any]) -> None:
    """Print the table of files and, where two were compared, the win rate."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Gold reward", title_justify="left")
    table.add_column("file", overflow="fold")
    for heading in ("rows", "gold reward", "stderr", "characters", "words", "tokens"):
        table.add_column(heading, justify="right")
    for name in ("results", "against"):
        if name in figures:
            row = figures[name]
            table.add_row(
                row["file"],
                str(row["rows"]),
                f"{row['reward']:+.3f}",
                "–" if row["stderr"] is None else f"{row['stderr']:.3f}",
                *(f"{row[length]:.1f}" for length in ("characters", "words", "tokens")),
            )
    console = Console()
    console.print(table)
    if "comparison" in figures:
        found = figures["comparison"]
        low, high, rate = (f"{100 * found[name]:.1f}" for name in ("low", "high", "win_rate"))
        spread = found["difference_stderr"]
        console.print(
            f"win rate {rate} % ({100 * found['level']:.0f} % interval {low} to {high}): "
            f"{found['wins']} wins, {found['ties']} ties, {found['losses']} losses; difference "
            f"{found['difference']:+.3f}" + ("" if spread is None else f" ± {spread:.3f}"),
            soft_wrap=True,
            highlight=False,
        )
