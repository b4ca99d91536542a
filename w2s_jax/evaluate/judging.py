"""Gold rewards of files of responses, and who wins: what `w2s eval` does.

Finished rows are kept in a journal, from which the same call goes on after a kill.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from rich.console import Console
from rich.table import Table

from w2s_jax.distributed import agree, is_first
from w2s_jax.errors import InputError, RowFailed, RowsFailed
from w2s_jax.evaluate.config import JudgeConfig
from w2s_jax.evaluate.results import (
    Results,
    count_tokens,
    encode_behind,
    encode_plain,
    read_results,
)
from w2s_jax.evaluate.rewards import check_same_prompts, compare, rewards, summarise
from w2s_jax.models.load import load_reward_config, load_reward_labels, load_reward_model
from w2s_jax.models.reward import EncoderConfig, contrast
from w2s_jax.ops.meshes import mesh_of
from w2s_jax.search.checkpoints import weights_stamp
from w2s_jax.text.chat import load_template
from w2s_jax.text.rows import Journal, check_writable, job_journal, progress, told_kept, write_whole
from w2s_jax.text.tokenizer import load_tokenizer

# What a row's reward depends on, apart from the rows and the checkpoint's files.
IN_FINGERPRINT = ("reward_model", "label", "end_token", "cut", "dtype")
FIELD = "gold_reward"


def judge(config: JudgeConfig) -> dict[str, Any]:
    """Reward the responses of one or two files by a reward model or a classifier.

    With `config.output` each row's reward is written there, and with `config.json` the figures.

    Args:
        config: The files, the reward model and how it reads them.

    Returns:
        The figures as JSON values: "reward_model", "label", the `Summary` of each file as
        "results" and "against", and their `Comparison` as "comparison".

    Raises:
        InputError: Before any weight is read, for what is wrong with files and settings; after
            all rows, for rewards that are no finite numbers.
    """
    if not config.results or not config.reward_model:
        raise InputError("give --results and --reward-model, or --quantisation-report")
    files = _read(config)
    tokenizer = load_tokenizer(config.reward_model)
    encoded, rendering = _encode(config, files, tokenizer)
    contrast(load_reward_labels(config.reward_model), config.label)
    values = np.split(_reward(config, files, encoded, rendering), [len(files[0].rows)])
    figures: dict[str, Any] = {"reward_model": config.reward_model, "label": config.label}
    for name, file, found in zip(("results", "against"), files, values, strict=False):
        summary = summarise(found, file.responses, count_tokens(tokenizer, file.responses))
        figures[name] = {"file": file.path, **asdict(summary)}
    if config.against:
        figures["comparison"] = asdict(compare(*values, seed=config.seed))
    if config.json and is_first():
        write_whole(config.json, [json.dumps(figures, indent=2).encode(), b"\n"])
    return figures


def _read(config: JudgeConfig) -> list[Results]:
    """The files of responses, checked against one another and against what is written."""
    if config.batch_size < 1:
        raise InputError(f"--batch-size is {config.batch_size}; it must be at least 1")
    inputs = [path for path in (config.results, config.against) if path is not None]
    flags = {"--output": config.output, "--json": config.json}
    outputs = {flag: path for flag, path in flags.items() if path is not None}
    taken = {Path(path).resolve() for path in inputs}
    for flag, path in outputs.items():
        if Path(path).resolve() in taken:
            raise InputError(f"{flag} {path} is also another flag's file; name another")
        taken.add(Path(path).resolve())
    files = [read_results(path) for path in inputs]
    if len(files) > 1:
        one, other = files
        names = (one.path, other.path)
        check_same_prompts(one.conversations, other.conversations, names, other.unit)
    for path in filter(None, outputs.values()):
        check_writable(path)
    return files


def _encode(
    config: JudgeConfig, files: Sequence[Results], tokenizer: Any
) -> tuple[list[list[int]], str]:
    """Token ids of all rows, and how they were rendered, in a word."""
    shape = load_reward_config(config.reward_model)
    limit = shape.max_positions
    if isinstance(shape, EncoderConfig):
        if config.template not in ("auto", "none") or config.end_token:
            flag = "--end-token" if config.end_token else f"--template {config.template}"
            raise InputError(f"{flag}: an encoder classifier reads plain text; leave it out")
        return [ids for file in files for ids in encode_plain(file, tokenizer, limit)], "plain"
    template = load_template(tokenizer, config.template, where="--template")
    encoded = [
        ids
        for file in files
        for ids in encode_behind(file, template, limit, end=config.end_token, cut=config.cut)
    ]
    return encoded, template.describe()


def _reward(
    config: JudgeConfig, files: Sequence[Results], encoded: list[list[int]], rendering: str
) -> Float32[np.ndarray, " n"]:
    """The rewards of all rows, those of the first file written to the output."""
    values = np.zeros(len(encoded), np.float32)
    rows = [row for file in files for row in file.rows]
    with contextlib.ExitStack() as stack:
        journal: Journal | None = None
        if config.output:
            mark = _fingerprint(config, files, rendering)
            journal = stack.enter_context(job_journal(config.output, mark))
        told = {"rows": rows, "read as": encoded, "batch size": config.batch_size}
        agree("evaluation", told | {"mesh": config.mesh, "output": bool(config.output)})
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
            mesh = mesh_of(config.mesh)
            model = load_reward_model(config.reward_model, dtype=config.weights_dtype, mesh=mesh)
            with progress(len(encoded), "row", done=len(finished)) as advance:
                rewards(
                    model,
                    [encoded[index] for index in waiting],
                    batch_size=config.batch_size,
                    label=config.label,
                    on_batch=keep,
                    mesh=mesh,
                )
        _check_finite(config, files, values, journal)
        if journal and config.output:
            journal.merge(config.output, len(files[0].rows))
    return values


def _check_finite(
    config: JudgeConfig,
    files: Sequence[Results],
    values: Float32[np.ndarray, " n"],
    journal: Journal | None,
) -> None:
    """Raise InputError, naming the rows, where a reward is no finite number."""
    told, name = [], f"reward model {config.reward_model}"
    for file, own in zip(files, np.split(values, [len(files[0].rows)]), strict=False):
        failed = [RowFailed(int(row), [name]) for row in np.flatnonzero(~np.isfinite(own))]
        if failed:
            told.append(str(RowsFailed(failed, where=file.unit, number=lambda row: row + 1)))
    if told:
        raise InputError("; ".join(told) + (told_kept(journal.path) if journal else ""))


def _fingerprint(config: JudgeConfig, files: Sequence[Results], rendering: str) -> dict[str, Any]:
    """What the rows of a journal depend on: settings, the input rows, the checkpoint's files."""
    mark: dict[str, Any] = {name: getattr(config, name) for name in IN_FINGERPRINT}
    folder = Path(config.reward_model).resolve()
    if folder.is_dir():
        mark |= {"reward_model": str(folder), "reward_model_files": weights_stamp(folder)}
    rows = [file.rows for file in files] + [[]] * (2 - len(files))
    content = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return mark | {"rendering": rendering, "rows_sha256": content[:16]}


def print_figures(figures: dict[str, Any]) -> None:
    """Print the table of files and, where two were compared, the win rate, as `judge` found."""
    table = Table(title="Gold reward", title_justify="left")
    table.add_column("file", overflow="fold")
    for heading in ("rows", "gold reward", "stderr", "characters", "words", "tokens"):
        table.add_column(heading, justify="right")
    for row in (figures[name] for name in ("results", "against") if name in figures):
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
