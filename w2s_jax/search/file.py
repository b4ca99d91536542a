"""Search over rows: conversations in, answers out, every finished row in a journal at once.

A row is searched by a policy in this process, with guides and scorers (`SteeredPolicy`), or by one
that only gives text (`text_run.TextPolicy`). What lies above this room – the client of an API, a
choice of a mesh, a page that reports – is an argument of `search_file`.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from w2s_jax.distributed import agree, is_first, started
from w2s_jax.errors import InputError, RowsFailed
from w2s_jax.ops.meshes import ChosenMesh, batch_parts, check_batch
from w2s_jax.search.checkpoints import Sources, Steering, SteeringPlan, load, plan, weights_stamp
from w2s_jax.search.compile import compiled_beside
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.models import ONE_DEVICE, Places
from w2s_jax.search.results import (
    TRACE,
    ChunkTrace,
    Questions,
    Request,
    SearchResult,
    chunk_row,
)
from w2s_jax.search.scorers import Shaded, guide_tokens
from w2s_jax.search.session import hypothesis_text, search_all
from w2s_jax.search.settings import SearchFileConfig
from w2s_jax.search.text_run import TextPolicy, TextProposer
from w2s_jax.text.chat import renderer
from w2s_jax.text.prompts import (
    Conversation,
    conversation_of,
    decode_tokens,
    escape_notes,
    prompts_from,
    special_stops,
    token_texts,
)
from w2s_jax.text.rows import (
    Journal,
    Row,
    check_writable,
    job_journal,
    read_rows,
    told_kept,
    write_jsonl,
)


def read_questions(rows: Sequence[Row], source: str) -> Questions:
    """The rows with the conversation of each.

    Raises:
        InputError: For a row without one; the message begins with "SOURCE NUMBER".
    """
    talks = [conversation_of(row, f"{source} {number}") for number, row in enumerate(rows, start=1)]
    return Questions(rows, talks, source=source)


def encode_questions(
    plan: SteeringPlan,
    rows: Sequence[Row],
    source: str,
    *,
    max_new_tokens: int,
    read: Callable[[Conversation], Any] | None = None,
) -> Questions:
    """The rows with their conversations and prompts.

    Args:
        plan: The models that read.
        rows: Of a file.
        source: What rows are called in messages, before their number.
        max_new_tokens: Tokens of a response at most.
        read: Turns a conversation into a prompt; by default `plan.prompts`.

    Raises:
        InputError: Naming the row, for one without a conversation, a template that fails, and a
            prompt that leaves too few positions in a model.
    """
    questions, prompts = read_questions(rows, source), []
    for number, conversation in enumerate(questions.conversations, start=1):
        where = f"{source} {number}"
        try:
            prompts.append((read or plan.prompts)(conversation))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        plan.check_length(conversation, max_new_tokens, where)
    return replace(questions, prompts=prompts)


@dataclass(frozen=True)
class SteeredPolicy:
    """A policy in this process with what steers it.

    Attributes:
        plan: The models, with tokenizers and templates.
        steering: The loaded models and scorers.
        config: The search.
        mesh: The models'.
    """

    plan: SteeringPlan
    steering: Steering
    config: SearchConfig
    mesh: Mesh | None = None

    @property
    def names(self) -> Sequence[str]:
        """Names of a hypothesis's objectives."""
        return self.steering.names

    @property
    def called(self) -> Mapping[str, str]:
        """Names of the models in messages."""
        assert self.steering.models is not None
        called = (member.called for member in self.plan.members)
        return dict(zip(self.steering.models.member_names, called, strict=True))

    def search(self, questions: Questions, waiting: Sequence[int], **heard: Any) -> object:
        """Search the rows of these indices, which are their ids; callbacks are as of `search`."""
        assert self.steering.models is not None
        prompts, talks, seed = questions.prompts, questions.conversations, self.config.seed
        return search_all(
            self.steering.models,
            self.config,
            [Request(index, prompts[index], talks[index], seed=seed) for index in waiting],
            scorers=self.steering.scorers,
            decode=partial(decode_tokens, self.plan.tokenizer),
            mesh=self.mesh,
            beside=compiled_beside,
            **heard,
        )

    def render(self, conversation: Conversation) -> str:
        """A conversation as the text that a response follows."""
        return self.plan.templates["policy"].render(conversation)

    def responses(self, questions: Questions, result: SearchResult) -> list[str]:
        """The text of every hypothesis as it was scored, best first."""
        prompt, found = questions.prompts[result.row_id][0], result.hypotheses
        if self.config.reference_quirks:  # an EOS is scored behind what its length ended, too
            found = tuple(replace(one, finished=True) for one in found)
        ends = {"stop": self.config.stop, "eos_ids": self.config.eos_ids or self.plan.eos_ids}
        return [hypothesis_text(self.plan.tokenizer, prompt, one, **ends) for one in found]

    def best_tokens(self, questions: Questions, result: SearchResult, response: str) -> Shaded:
        """Each token of the best response, and the weighted log-ratio that the guides give it.

        By the guides on tokens or, where there is none, by `guide_tokens`.
        """
        best, index = result.best, result.row_id
        if self.steering.models is not None and self.steering.models.guides:
            decode = partial(decode_tokens, self.plan.tokenizer)
            texts = token_texts(decode, questions.prompts[index][0], best.tokens)
            return list(zip(texts, best.token_scores, strict=True))
        by_eos = best.tokens[-1:] and best.tokens[-1] in (self.config.eos_ids or self.plan.eos_ids)
        conversation = questions.conversations[index]
        return guide_tokens(self.steering.scorers, conversation, response, finished=bool(by_eos))


RowPolicy = SteeredPolicy | TextPolicy
"""What rows are searched with."""


def answer_row(
    row: Row, responses: Sequence[str], hypotheses: Sequence[Any], names: Sequence[str]
) -> Row:
    """The output row of a search.

    An input field named response, score, hypotheses or trace is overwritten.

    Args:
        row: The input row.
        responses: The texts of the hypotheses, best first.
        hypotheses: The same as `Hypothesis` or `TextHypothesis`.
        names: Of the objectives; where there are several, a hypothesis lists them by name.
    """
    kept: list[Row] = []
    for response, one in zip(responses, hypotheses, strict=True):
        kept.append({"response": response, "score": one.score})
        if len(one.objectives) > 1 and len(names) == len(one.objectives):
            kept[-1]["objectives"] = dict(zip(names, one.objectives, strict=True))
    prompt = {"prompt": row["prompt"]} if "prompt" in row else {}
    best = {name: kept[0][name] for name in ("response", "score")}
    found = {**prompt, **best, "hypotheses": kept}
    return found | {name: row[name] for name in row if name not in found and name != TRACE}


def search_rows(
    policy: RowPolicy,
    questions: Questions,
    journal: Journal,
    *,
    method: str = "",
    traced: bool = False,
    on_row: Callable[[Row | None], None] = lambda row: None,
) -> None:
    """Search every row that the journal does not hold yet.

    A row's index is its id, so that its draws do not depend on where an earlier run stopped.
    Finished rows stay in the journal when the search fails. Each of several hosts writes its share
    of the rows.

    Args:
        policy: What searches.
        questions: The rows.
        journal: Takes the answers.
        method: Named in traces.
        traced: Whether a row gets a field "trace" with what its search looked at.
        on_row: Called with each answer; with None for one that another host writes.

    Raises:
        RowsFailed: Once all others are in the journal, for rows that a model fails, naming it.
        InputError: As `search` and `search_texts` do.
    """
    waiting = sorted(set(range(len(questions.rows))) - set(journal.read()))
    chunks: dict[int, list[ChunkTrace]] = {}

    def note(chunk: ChunkTrace) -> None:
        chunks.setdefault(chunk.row_id, []).append(chunk)

    def keep(result: Any) -> None:
        index = result.row_id
        responses = policy.responses(questions, result)
        # All hosts take part, as models may be asked.
        tokens = policy.best_tokens(questions, result, responses[0]) if traced else []
        seen = chunks.pop(index, [])
        if not journal.is_own(index):
            on_row(None)
            return
        row = answer_row(questions.rows[index], responses, result.hypotheses, policy.names)
        if traced:
            # As JSON, for a report: the winner's tokens are as the guide reads them, beside how
            # many the policy wrote.
            row[TRACE] = {
                "row_id": index,
                "prompt": policy.render(questions.conversations[index]),
                "response": row["response"],
                "score": row["score"],
                "method": method,
                "chunks": [chunk_row(chunk) for chunk in seen],
                "tokens": [list(pair) for pair in tokens],
                "policy_tokens": result.best.token_count,
            }
        journal.append(index, row)
        on_row(row)

    try:
        policy.search(questions, waiting, on_result=keep, on_chunk=note if traced else None)
    except RowsFailed as failed:
        raise failed.named(policy.called, where=questions.source, number=lambda i: i + 1) from None


@dataclass(frozen=True)
class SearchedFile:
    """The outcome of `search_file`.

    Attributes:
        rows: Rows of the output.
        searched: Rows searched by this call.
        seconds: How long that took.
    """

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
    """Search every prompt of a file and write the responses; resumes from its own journal.

    Finished rows go to OUTPUT.journal at once; after a kill the same call goes on where it stopped.
    At the end the journal becomes the output, in input order. Hosts that were started together
    share the rows.

    Args:
        config: Input, search, and output. Further fields of a subclass count as settings of the
            run, unless they are named in `settings.NOT_IN_FINGERPRINT`.
        tell: Called with lines for the user: where each guide scores, what an endpoint has cost.
        progress: Makes, from the number of rows and of those already done, a context whose value is
            called with how many more are done.
        on_row: Called with each answer as it is found; rows are then traced.
        connect: Returns, for the search and a function that renders prompts, the policy behind
            `config.endpoint` and a function that says what was used.
        choose_mesh: Chooses the mesh for "auto" from plan, search, places, and the tokens of the
            longest prompt.
        check_rows: Raises InputError for rows that `write` could not write.
        write: Writes the output's rows to a path.
        write_report: Writes `config.report` (path, traces, title=, settings=).

    Raises:
        InputError: Before any weight is read, for wrong settings, rows and checkpoints; and for
            rows that could not be searched, once all others were.
    """
    searching, sources = config.search_config(), config.sources_of_all()
    rows, source = _read(config, tell, check_rows)
    traced = config.report is not None or on_row is not None
    job = _job(config, searching, sources, rows, source, tell, connect, choose_mesh)
    with job_journal(config.output, fingerprint(config, rows, traced=traced)) as journal:
        agree("search", config.alike() | {"rows": rows})
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
    """The rows and what to call them; InputError for wrong rows and wrong paths."""
    if Path(config.prompts).resolve() == Path(config.output).resolve():
        raise InputError(f"--output {config.output} is the file of prompts; name another")
    rows, source = read_rows(config.prompts)
    rows = prompts_from(rows, config.prompt_field, source)
    for line in escape_notes(config.stop):
        tell(line)
    check_rows(rows)
    for path in filter(None, (config.output, config.report)):
        check_writable(path)
    return rows, source


@dataclass(frozen=True)
class _Job:
    """The questions, and what loads the policy; only reading weights can still fail."""

    questions: Questions
    load: Callable[[], RowPolicy]
    places: Places = ONE_DEVICE
    close: Callable[[], object] = lambda: None


def _job(
    config: SearchFileConfig,
    searching: SearchConfig,
    sources: Sources,
    rows: Sequence[Row],
    source: str,
    tell: Callable[[str], object],
    connect: Connect | None,
    choose_mesh: ChooseMesh | None,
) -> _Job:
    if config.endpoint and config.mixes:
        raise InputError(f"--method {config.method} mixes logits, which an API does not give")
    if config.endpoint and started():
        raise InputError("--endpoint: what is behind an API is asked by one host; start one")
    if config.endpoint and connect is None:
        raise InputError("--endpoint: nothing here connects to an API")
    looked_at = plan(sources, needs_tokens=f"--method {config.method}" if config.mixes else "")
    new = config.max_new_tokens
    encode = partial(encode_questions, looked_at, rows, source, max_new_tokens=new)
    if config.endpoint and connect is not None:
        job = _remote_job(config, searching, looked_at, encode, tell, connect)
    else:
        job = _local_job(config, searching, looked_at, encode(), choose_mesh)
    for line in (*looked_at.notes(), *job.places.notes(looked_at.configs)):
        tell(line)
    return job


def _remote_job(
    config: SearchFileConfig,
    searching: SearchConfig,
    looked_at: SteeringPlan,
    encode: Callable[..., Questions],
    tell: Callable[[str], object],
    connect: Connect,
) -> _Job:
    """The search with a policy behind an API."""
    args = config.given_template_args
    render = renderer(config.policy_template, where="--policy-template", args=args)
    questions, functions = encode(read=render), config.functions()
    proposer, usage = connect(searching, render)
    final = replace(searching, slots=min(config.batch_size, len(questions.rows)))

    def loaded() -> RowPolicy:
        steering = load(looked_at, dtype=config.weights_dtype).beside(functions, config.scorer)
        return TextPolicy(proposer, steering.scorers, final, steering.names, render)

    return _Job(questions, loaded, close=lambda: tell(f"{config.endpoint}: {usage()}"))


def _local_job(
    config: SearchFileConfig,
    searching: SearchConfig,
    looked_at: SteeringPlan,
    questions: Questions,
    choose_mesh: ChooseMesh | None,
) -> _Job:
    """The search with a policy in this process."""
    functions, searching = config.functions(), replace(searching, policy_cache=config.policy_cache)
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
        slots=min(config.batch_size, -(-len(questions.rows) // parts) * parts),
    )

    def loaded() -> RowPolicy:
        steering = load(looked_at, dtype=config.weights_dtype, places=places)
        steering = steering.beside(functions, config.scorer)
        return SteeredPolicy(looked_at, steering, final, places.mesh)

    return _Job(questions, loaded, places)


def _finish(
    config: SearchFileConfig,
    journal: Journal,
    count: int,
    write: Callable[[str | Path, list[Row]], None],
    write_report: Callable[..., None] | None,
) -> None:
    """Write the report, and the output from the journal, which is removed last."""
    rows = journal.read()
    if config.report is not None and write_report is not None and len(rows) == count and is_first():
        traces = (rows[index][TRACE] for index in range(count))
        title = f"w2s search: {config.prompts}"
        write_report(config.report, traces, title=title, settings=config.shown())

    def write_plain(path: str | Path, rows: Iterable[Row]) -> None:
        write(path, [{name: row[name] for name in row if name != TRACE} for row in rows])

    journal.merge(config.output, count, write_plain)


def fingerprint(
    config: SearchFileConfig, rows: Sequence[Row], *, traced: bool = False
) -> dict[str, Any]:
    """What the rows of a journal depend on: settings, the input rows, the checkpoints' files."""
    told: dict[str, Any] = config.deciding()
    for role, path in config.sources_of_all().checkpoints.items():
        if Path(path).is_dir():
            told[role] = str(Path(path).resolve())
            told[f"{role}_files"] = weights_stamp(Path(path).resolve())
    content = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    told |= {"traced": traced, "prompts_sha256": content[:16]}
    for name in ("policy_template", "guide_template", "untuned_template", "reward_template"):
        template = Path(str(getattr(config, name)))
        if str(template).endswith(".jinja") and template.is_file():
            told[f"{name}_sha256"] = hashlib.sha256(template.read_bytes()).hexdigest()
    return told
