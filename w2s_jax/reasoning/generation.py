"""Responses of a local model to thousands of prompts, several samples each, resumable.

    python -m w2s_jax.reasoning.generation FOLDER/answering.json

answers one file of questions, in a process that holds a device of its own; the file holds the
fields of `Answering`. What is in the responses is for `answers.py`.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jax.sharding import Mesh
from tqdm import tqdm

from w2s_jax.errors import InputError, RowFailed, RowsFailed
from w2s_jax.ops.logits import Sampling
from w2s_jax.ops.sharding import make_mesh
from w2s_jax.reasoning.config import GenerationConfig
from w2s_jax.reasoning.questions import Overflow, fit_prompts, read_demonstrations, read_questions
from w2s_jax.search import Request, SearchConfig, SearchModels, search_models
from w2s_jax.search.checkpoints import GuideSource, Sources, SteeringPlan, load, plan
from w2s_jax.search.config import cbs, sample
from w2s_jax.search.models import ONE_DEVICE, Places
from w2s_jax.search.results import Hypothesis, SearchResult
from w2s_jax.search.session import check_request, hypothesis_text, search_requests
from w2s_jax.text.prompts import decode_tokens, encode_prompt, special_stops
from w2s_jax.text.rows import Row, journal_path, locked, open_journal, read_jsonl, write_jsonl
from w2s_jax.text.typed_yaml import from_mapping


class _Asked(NamedTuple):
    """A request, and the samples of a row that it gives."""

    row_id: str | int
    samples: range
    request: Request


@dataclass(frozen=True)
class Answering:
    """A model, what it answers, and where its responses go.

    Attributes:
        model: a checkpoint or an adapter's folder.
        questions: their file.
        output: the file of responses.
        generation: how they are sampled.
        ids: as `read_questions` takes them.
        demonstrations: their file.
        overflow: for prompts that are too long, as `fit_prompts` takes it.
        tuned, untuned: the guide of `generation.method` cbs.
        dtype: of the weights; None takes the backend's own.
        mesh: device mesh such as data=2,fsdp=4.
        weights: JSON values that tell these weights from others'.
    """

    model: str
    questions: str
    output: str
    generation: GenerationConfig
    ids: Literal["own", "index"] = "own"
    demonstrations: str | None = None
    overflow: Overflow = "error"
    tuned: str | None = None
    untuned: str | None = None
    dtype: str | None = None
    mesh: str | None = None
    weights: str = ""


def answer(task: Answering) -> list[Row]:
    """The responses, as `generate` gives them; goes on from what a killed call has written.

    Raises:
        InputError: for files and checkpoints that cannot be read, models without one vocabulary,
            and as `fit_prompts` and `generate` do.
    """
    planned = _planned(task)
    rows = _prompts(task, planned)
    places = ONE_DEVICE if task.mesh is None else Places(make_mesh(task.mesh))
    models = load(planned, dtype=task.dtype, places=places).models
    assert models is not None
    with tqdm(
        desc=Path(task.output).parent.name, unit="response", disable=not sys.stderr.isatty()
    ) as bar:

        def progress(done: int, count: int) -> None:
            bar.total = count
            bar.update(done - bar.n)

        return generate(
            models.policy,
            planned.tokenizer,
            rows,
            task.generation,
            task.output,
            progress,
            guide=models.guides or None,
            source=task.questions,
            identity={"weights": task.weights},
            mesh=places.mesh,
        )


def check_prompts(task: Answering, count: int | None = None) -> None:
    """Whether a task's models can be asked its questions; reads tokenizers and configs alone.

    count: of the demonstrations, how many of the first; None takes all.

    Raises:
        InputError: as `answer` does for files, vocabularies and prompts.
    """
    _prompts(task, _planned(task), count)


def generate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    config: GenerationConfig,
    path: str | Path,
    progress: Callable[[int, int], None] = lambda done, count: None,
    *,
    guide: Any = None,
    source: str = "",
    identity: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> list[Row]:
    """The samples of every row {"id", "prompt"}: {"id", "sample", "response", "finished"}.

    They are written to `path` in the order of the rows, samples 0, 1, ... of each together. Until
    all are there, finished ones are in PATH.journal; after a kill the same call goes on from that.
    A response has no space around it.

    Args:
        model: a `Model`.
        tokenizer: the model's.
        rows: their ids differ, and with the seed decide the draws.
        config: how responses are sampled.
        path: the file that is written.
        progress: called with the numbers of responses that are there and wanted.
        guide: for method cbs, a `Guide` or several.
        source: the file that the rows are from, for messages.
        identity: JSON values that tell the model's weights from others', so that a journal of
            theirs is refused.
        mesh: the models'.

    Raises:
        InputError: before anything is generated, for rows that are no such rows, ids that are there
            twice, prompts that leave no room for max_new_tokens in a model's positions (naming the
            row), a guide too many or too few, and a journal of a run with other settings.
        RowsFailed: once all others are done, for rows that a model fails.
    """
    models = _models(model, guide, config)
    search_config = _search_config(config, models, tokenizer)
    asked = _requests(models, search_config, rows, config, tokenizer, source)
    decode, eos_ids = partial(decode_tokens, tokenizer), models.known_eos_ids(search_config.eos_ids)
    text_of = partial(hypothesis_text, tokenizer, stop=search_config.stop, eos_ids=eos_ids)
    count = len(rows) * config.samples
    failures = []
    with locked(journal_path(path)):
        journal = open_journal(journal_path(path), _fingerprint(rows, config, identity))
        finished = journal.read()
        waiting = [index for index in range(len(asked)) if index not in finished]
        done = sum(len(entry["rows"]) for entry in finished.values())
        progress(done, count)
        requests = [asked[index].request for index in waiting]
        # Of all requests, so that a run that is taken up again runs the same programs.
        slots = min(config.batch_size, len(asked))
        found = search_requests(
            models, search_config, requests, slots=slots, decode=decode, alone=True, mesh=mesh
        )
        for place, result in found:
            if isinstance(result, RowFailed):
                failures.append(result)
                continue
            entry = _entry(asked[waiting[place]], result, text_of)
            journal.append(waiting[place], entry)
            done += len(entry["rows"])
            progress(done, count)
        if failures:
            ids = {row_key(row["id"]): row["id"] for row in rows}
            raise RowsFailed(failures, where=f"{source} row".strip(), number=ids.get)
        journal.merge(path, len(asked), _write)
    return read_jsonl(path)


def row_key(row_id: str | int) -> int:
    """The 32 bits of a row's id that its draws come from: the number, or a hash of the text."""
    if isinstance(row_id, int):
        return row_id & 0xFFFFFFFF
    return int.from_bytes(hashlib.sha256(row_id.encode("utf-8", "surrogatepass")).digest()[:4])


def _planned(task: Answering) -> SteeringPlan:
    if task.tuned is None or task.untuned is None:
        return plan(Sources(task.model))
    guides = (GuideSource(task.tuned, task.untuned),)
    return plan(Sources(task.model, guides, score_on="tokens"))


def _prompts(task: Answering, planned: SteeringPlan, count: int | None = None) -> list[Row]:
    questions = read_questions(task.questions, ids=task.ids)
    shown = () if task.demonstrations is None else read_demonstrations(task.demonstrations)[:count]
    prompts = fit_prompts(
        questions,
        shown,
        lambda text: len(encode_prompt(planned.tokenizer, text)),
        context=min(config.max_positions for config in planned.configs.values()),
        max_new_tokens=task.generation.max_new_tokens,
        overflow=task.overflow,
        source=task.questions,
        demonstrations_source=task.demonstrations or "demonstrations",
    )
    return [
        {"id": row["id"], "prompt": prompt} for row, prompt in zip(questions, prompts, strict=True)
    ]


def _models(model: Any, guide: Any, config: GenerationConfig) -> SearchModels:
    """The models of the method; InputError for a guide too many or too few."""
    if config.method == "cbs" and not guide:
        raise InputError("method cbs needs a guide: a tuned and an untuned model")
    if config.method == "sample" and guide:
        raise InputError('method sample has no guide; take method "cbs" or leave the guide out')
    return search_models(model, guide)


def _search_config(config: GenerationConfig, models: SearchModels, tokenizer: Any) -> SearchConfig:
    eos_ids = models.policy.config.eos_ids if config.eos_ids is None else config.eos_ids
    if config.eos_ids is None and not eos_ids and tokenizer.eos_token_id is not None:
        eos_ids = (tokenizer.eos_token_id,)
    texts, ids = special_stops(tokenizer, config.stop)
    settings: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "sampling": Sampling(float(config.temperature), config.top_k, float(config.top_p)),
        "stop": texts,
        "eos_ids": (*eos_ids, *ids),
        "seed": config.seed,
    }
    if config.method == "sample":
        return sample(config.samples_per_request, **settings)
    return cbs(config.beam_width, config.successors, config.chunk_length, **settings)


def _requests(
    models: SearchModels,
    search_config: SearchConfig,
    rows: Sequence[Mapping[str, Any]],
    config: GenerationConfig,
    tokenizer: Any,
    source: str,
) -> list[_Asked]:
    """What goes into slots: for each row its samples, `samples_per_request` at a time."""
    if not rows:
        raise InputError(f"{source or 'generation'}: no rows to answer")
    found = []
    seen: set[str | int] = set()
    for number, row in enumerate(rows, start=1):
        row_id = row.get("id")
        if not isinstance(row_id, str | int) or isinstance(row_id, bool):
            raise InputError(
                f"{source} row {number}: it needs an id, a text or whole number".strip()
            )
        where = f"{source} row {row_id!r}".strip()
        if row_id in seen:
            raise InputError(f"{where}: the id is there twice; ids must differ")
        seen.add(row_id)
        if not isinstance(row.get("prompt"), str):
            raise InputError(f'{where}: it needs a "prompt", a text')
        try:
            prompt = tuple(encode_prompt(tokenizer, row["prompt"]))
        except InputError as error:
            raise error.at(where) from None
        for first in range(0, config.samples, config.samples_per_request):
            # Searches differ by their seeds, the samples of a slot by their lanes.
            seed, lane = (first, 0) if config.method == "cbs" else (0, first)
            seed = (config.seed + seed) % 2**32
            samples = range(config.samples)[first : first + config.samples_per_request]
            request = Request(row_key(row_id), (prompt,), seed=seed, lane=lane)
            found.append(_Asked(row_id, samples, request))
        check_request(models, search_config, found[-1].request, where)
    return found


def _entry(
    asked: _Asked, result: SearchResult, text_of: Callable[[Sequence[int], Hypothesis], str]
) -> Row:
    """What the journal keeps of a finished request: its output rows."""
    rows = []
    # A prompt's last slot may have drawn more than are wanted, and a search keeps W.
    for number, one in zip(asked.samples, result.hypotheses, strict=False):
        response = text_of(asked.request.prompts[0], one).strip()
        row = {"id": asked.row_id, "sample": number, "response": response}
        rows.append(row | {"finished": one.finished})
    return {"rows": rows}


def _write(path: str | Path, entries: Iterable[Row]) -> None:
    write_jsonl(path, (row for entry in entries for row in entry["rows"]))


def _fingerprint(
    rows: Sequence[Mapping[str, Any]], config: GenerationConfig, identity: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the journal's rows depend on."""
    settings = asdict(config)
    del settings["batch_size"]  # how a run is carried out, not what it computes
    asked = json.dumps([[row["id"], row["prompt"]] for row in rows]).encode()
    digest = hashlib.sha256(asked).hexdigest()[:16]
    return {**settings, "prompts_sha256": digest, **(identity or {})}


def main(arguments: list[str]) -> int:
    """Answer what a file asks; an error is one line on stderr, and the status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        values = json.loads(Path(arguments[0]).read_text())
        answer(from_mapping(Answering, values, arguments[0]))
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
