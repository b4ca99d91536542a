"""Search over a file of prompts: read, checked, searched into a journal, written in input order.

What lies above this room – a client of an API, a choice of a mesh, a page that reports – comes as
arguments.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from w2s_jax.distributed import agree, is_first, started
from w2s_jax.errors import InputError, RowsFailed
from w2s_jax.ops.meshes import ChosenMesh, batch_parts, check_batch
from w2s_jax.search.checkpoints import Sources, SteeringPlan, load, plan, weights_stamp
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.models import Places
from w2s_jax.search.results import TRACE
from w2s_jax.search.rows import (
    Questions,
    RowPolicy,
    SteeredPolicy,
    TextPolicy,
    encode_questions,
    search_rows,
)
from w2s_jax.search.settings import SearchFileConfig
from w2s_jax.search.text_run import TextProposer
from w2s_jax.text.chat import renderer
from w2s_jax.text.prompts import Conversation, escape_notes, prompts_from, special_stops
from w2s_jax.text.rows import (
    Journal,
    Row,
    check_writable,
    job_journal,
    read_rows,
    told_kept,
    write_jsonl,
)

# How a run is carried out, not what it computes: these may change when a journal is taken up again.
NOT_IN_FINGERPRINT = (
    "prompts", "output", "batch_size", "mesh", "policy_rules", "guide_rules", "scan_layers",
    "prompt_field",  # the rows are told apart by what it makes of them
    "config", "models_map", "format", "generator", "report", "show", "concurrency",
    "timeout", "attempts", "prompts_per_request",
    "price_prompt", "price_completion", "api_key_env",
    "hosts",
)  # fmt: skip
# Of these, what hosts that search together must have alike all the same.
ALIKE = (
    "mesh", "policy_rules", "guide_rules", "scan_layers", "batch_size", "report", "show", "format",
)  # fmt: skip


@dataclass(frozen=True)
class SearchedFile:
    """What `search_file` did: rows of the output, those searched now, and how long that took."""

    rows: int
    searched: int
    seconds: float


Connect = Callable[
    [SearchConfig, Callable[[Conversation], str]], tuple[TextProposer, Callable[[], str]]
]
Progress = Callable[[int, int], AbstractContextManager[Callable[[int], object]]]
ChooseMesh = Callable[[SteeringPlan, SearchConfig, Places, int], ChosenMesh]


def search_file(
    config: SearchFileConfig,
    *,
    tell: Callable[[str], object] = lambda line: None,
    progress: Progress = lambda count, done: nullcontext(lambda more: None),
    on_row: Callable[[Row], None] | None = None,
    connect: Connect | None = None,
    choose_mesh: ChooseMesh | None = None,
    check_rows: Callable[[Sequence[Row]], None] = lambda rows: None,
    write: Callable[[str | Path, list[Row]], None] = write_jsonl,
    write_report: Callable[..., None] | None = None,
) -> SearchedFile:
    """Search every prompt of a file and write the responses, going on from a journal of its own.

    Finished rows go to OUTPUT.journal at once; after a kill the same call goes on where it stopped.
    At the end the journal becomes the output, in input order. Hosts that were started together
    share the rows.

    Args:
        config: what is read, searched, and written. What a subclass adds to it counts as further
            settings of the run, unless it is named in `NOT_IN_FINGERPRINT`.
        tell: hears lines for the user: where each guide scores, what an endpoint has cost.
        progress: of the number of rows and of those that are done, a context whose value is called
            with how many more are.
        on_row: hears each answer as it is found, its trace under "trace"; rows are then traced.
        connect: the policy behind `config.endpoint`, given the search and how prompts are written;
            with it a function that says what was used.
        choose_mesh: chooses for the mesh "auto" of a plan, a search, rules, and the tokens of the
            longest prompt.
        check_rows: raises InputError for rows that `write` could not write.
        write: writes the output's rows to a path.
        write_report: writes `config.report` (path, traces, title=, settings=).

    Raises:
        InputError: before any weight is read, for what is wrong with settings, rows and
            checkpoints; and for rows that could not be searched, once all others were.
    """
    searching, sources = config.search_config(), config.sources_of_all()
    rows, source = _read(config, tell, check_rows)
    traced = config.report is not None or on_row is not None
    if config.endpoint:
        job = _remote_job(config, sources, searching, rows, source, tell, connect)
    else:
        job = _local_job(config, sources, searching, rows, source, tell, choose_mesh)
    with job_journal(config.output, fingerprint(config, rows, traced=traced)) as journal:
        _check_hosts(config, rows)
        waiting = len(rows) - len(journal.read())
        start = time.monotonic()
        if waiting:
            with progress(len(rows), len(rows) - waiting) as advance:

                def heed(row: Row | None) -> None:
                    if on_row is not None and row is not None:
                        on_row(row)
                    advance(1)

                how: dict[str, Any] = {"method": config.method, "traced": traced, "on_row": heed}
                policy = job.load()
                try:
                    search_rows(policy, job.questions, journal, **how)
                except RowsFailed as failed:
                    raise InputError(f"{failed}{told_kept(journal.path)}") from None
                finally:
                    job.close()
        seconds = time.monotonic() - start
        _finish(config, journal, len(rows), write, write_report)
    return SearchedFile(len(rows), waiting, seconds)


def _read(
    config: SearchFileConfig,
    tell: Callable[[str], object],
    check_rows: Callable[[Sequence[Row]], None],
) -> tuple[list[Row], str]:
    """The rows and what to call them; InputError for wrong ones, and for wrong paths."""
    if Path(config.prompts).resolve() == Path(config.output).resolve():
        raise InputError(f"--output {config.output} is the file of prompts; name another")
    rows, source = read_rows(config.prompts)
    rows = prompts_from(rows, config.prompt_field, source)
    for line in escape_notes(config.stop):
        tell(line)
    check_rows(rows)
    for path in (config.output, config.report):
        if path is not None:
            check_writable(path)
    return rows, source


@dataclass(frozen=True)
class _Job:
    """What is to be searched, and by what: made before any weight is read, loaded after that."""

    questions: Questions
    load: Callable[[], RowPolicy]
    close: Callable[[], object] = lambda: None


def _local_job(
    config: SearchFileConfig,
    sources: Sources,
    searching: SearchConfig,
    rows: Sequence[Row],
    source: str,
    tell: Callable[[str], object],
    choose_mesh: ChooseMesh | None,
) -> _Job:
    """The search with a policy in this process; nothing but weights is left to be wrong."""
    looked_at = plan(sources, needs_tokens=f"--method {config.method}" if config.mixes else "")
    questions = encode_questions(looked_at, rows, source, max_new_tokens=config.max_new_tokens)
    functions = config.functions()
    searching = replace(searching, policy_cache=config.policy_cache)
    longest = max(len(one) for prompts in questions.prompts for one in prompts)

    def choose(places: Places) -> ChosenMesh:
        assert choose_mesh is not None
        return choose_mesh(looked_at, searching, places, longest)

    places = config.places(choose if choose_mesh else None)
    check_batch(config.batch_size, 1, places.mesh, flag="--batch-size")
    texts, ids = special_stops(looked_at.tokenizer, config.stop)
    parts = batch_parts(places.mesh)
    final = replace(
        searching,
        stop=texts,
        eos_ids=(*looked_at.eos_ids, *ids),
        slots=min(config.batch_size, -(-len(rows) // parts) * parts),
    )
    for line in (*looked_at.notes(), *places.notes(looked_at.configs)):
        tell(line)

    def loaded() -> RowPolicy:
        steering = load(looked_at, dtype=config.weights_dtype, places=places)
        steering = steering.beside(functions, config.scorer)
        return SteeredPolicy(looked_at, steering, final, places.mesh)

    return _Job(questions, loaded)


def _remote_job(
    config: SearchFileConfig,
    sources: Sources,
    searching: SearchConfig,
    rows: Sequence[Row],
    source: str,
    tell: Callable[[str], object],
    connect: Connect | None,
) -> _Job:
    """The search with a policy behind an API."""
    if config.mixes:
        raise InputError(f"--method {config.method} mixes logits, which an API does not give")
    if started():
        raise InputError("--endpoint: what is behind an API is asked by one host; start one")
    if connect is None:
        raise InputError("--endpoint: nothing here connects to an API")
    looked_at = plan(sources)
    args = config.given_template_args
    write = renderer(config.policy_template, where="--policy-template", args=args)
    new = config.max_new_tokens
    questions = encode_questions(looked_at, rows, source, max_new_tokens=new, read=write)
    functions = config.functions()
    proposer, usage = connect(searching, write)
    final = replace(searching, slots=min(config.batch_size, len(rows)))
    for line in looked_at.notes():
        tell(line)

    def loaded() -> RowPolicy:
        steering = load(looked_at, dtype=config.weights_dtype)
        steering = steering.beside(functions, config.scorer)
        return TextPolicy(proposer, steering.scorers, final, steering.names, write)

    return _Job(questions, loaded, lambda: tell(f"{config.endpoint}: {usage()}"))


def _finish(
    config: SearchFileConfig,
    journal: Journal,
    count: int,
    write: Callable[[str | Path, list[Row]], None],
    write_report: Callable[..., None] | None,
) -> None:
    """The report and the output from the journal, which is removed last."""
    rows = journal.read()
    if config.report is not None and write_report is not None and len(rows) == count and is_first():
        traces = (rows[index][TRACE] for index in range(count))
        title = f"w2s search: {config.prompts}"
        write_report(config.report, traces, title=title, settings=shown_settings(config))

    def write_plain(path: str | Path, rows: Iterable[Row]) -> None:
        write(path, [{name: row[name] for name in row if name != TRACE} for row in rows])

    journal.merge(config.output, count, write_plain)


def shown_settings(config: SearchFileConfig) -> dict[str, Any]:
    """The settings that were given, for a report; none of them holds a key."""
    given = asdict(config)
    hidden = {"prompts", "output", "report", "show", "config", "hosts", "api_key_env"}
    return {name: given[name] for name in given if name not in hidden and given[name]}


def fingerprint(
    config: SearchFileConfig, rows: Sequence[Row], *, traced: bool = False
) -> dict[str, Any]:
    """What the rows of a journal depend on: settings, the input rows, the checkpoints' files."""
    given = asdict(config)
    settings = {name: given[name] for name in given if name not in NOT_IN_FINGERPRINT}
    checkpoints = config.sources_of_all().checkpoints
    folders = {
        role: Path(path).resolve() for role, path in checkpoints.items() if Path(path).is_dir()
    }
    files = {f"{role}_files": weights_stamp(folder) for role, folder in folders.items()}
    paths = {role: str(folder) for role, folder in folders.items()}
    content = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    told: dict[str, Any] = {"traced": traced, "prompts_sha256": content[:16]}
    for name in ("policy_template", "guide_template", "untuned_template", "reward_template"):
        if str(given[name]).endswith(".jinja") and Path(given[name]).is_file():
            told[f"{name}_sha256"] = hashlib.sha256(Path(given[name]).read_bytes()).hexdigest()
    return settings | paths | files | told


def _check_hosts(config: SearchFileConfig, rows: Sequence[Row]) -> None:
    """Raise InputError where hosts were started with other settings, or read other rows."""
    given = asdict(config)
    names = [name for name in given if name in ALIKE or name not in NOT_IN_FINGERPRINT]
    agree("search", {name: given[name] for name in names} | {"rows": rows})
