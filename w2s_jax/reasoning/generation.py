"""Responses of a local model to thousands of prompts, several samples each, resumable.

    python -m w2s_jax.reasoning.generation FOLDER/answering.json

answers one file of questions, in a process with a device of its own; the JSON file holds the fields
of `Answering`. Responses are read by `answers.py`.
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
from w2s_jax.search.compile import compiled_beside
from w2s_jax.search.config import cbs, sample
from w2s_jax.search.models import ONE_DEVICE, Places, check_prompts_fit
from w2s_jax.search.results import Hypothesis, SearchResult
from w2s_jax.search.session import hypothesis_text, search_requests
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
        model: Folder of a checkpoint or an adapter.
        questions: File of questions.
        output: File of responses.
        generation: How responses are sampled.
        ids: As in `read_questions`.
        demonstrations: File of demonstrations; None for none.
        overflow: What to do for prompts that are too long, as in `fit_prompts`.
        tuned, untuned: The guide for `generation.method` cbs.
        dtype: Dtype of the weights; None for the backend's default.
        mesh: Device mesh such as data=2,fsdp=4.
        weights: Identifies the weights in the journal.
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
    """Generate the responses as `generate` does, resuming from what a killed call has written.

    Raises:
        InputError: For files and checkpoints that cannot be read, models with different
            vocabularies, and as `fit_prompts` and `generate` do.
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
    """Check that a task's models can be asked its questions; reads only tokenizers and configs.

    Args:
        task: The task.
        count: Number of demonstrations, the first in the file; None for all.

    Raises:
        InputError: As `answer` does for files, vocabularies and prompts.
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
    """Sample responses to rows {"id", "prompt"}, and write them in order to `path`.

    Until all are finished, they are in PATH.journal; after a kill the same call resumes from it.

    Args:
        model: A `Model`.
        tokenizer: The model's tokenizer.
        rows: Their ids differ; an id and the seed determine a row's draws.
        config: How responses are sampled.
        path: The file to write.
        progress: Called with the numbers of finished and of wanted responses.
        guide: For method cbs, a `Guide` or several.
        source: The file of the rows, for messages.
        identity: JSON values that identify the model's weights; a journal of others is refused.
        mesh: The models' mesh.

    Returns:
        Rows {"id", "sample", "response" (stripped), "finished"}, by row, then by sample.

    Raises:
        InputError: Before generation, for malformed rows, duplicate ids, prompts that leave no room
            for max_new_tokens in a model's positions, a missing or superfluous guide, and a journal
            of a run with other settings.
        RowsFailed: For rows on which a model fails, after all others are done.
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
        # Of all requests, so that a resumed run uses the same programs.
        slots = min(config.batch_size, len(asked))
        how: dict[str, Any] = {"decode": decode, "mesh": mesh, "beside": compiled_beside}
        found = search_requests(models, search_config, requests, slots=slots, alone=True, **how)
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
    """The 32 bits of a row's id from which its draws come: the number, or a hash of the text."""
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
    """The models for the method; InputError for a missing or superfluous guide."""
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
    """The requests for each row, with `samples_per_request` samples at a time."""
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
            # Searches have different seeds, samples of a slot different lanes.
            seed, lane = (first, 0) if config.method == "cbs" else (0, first)
            seed = (config.seed + seed) % 2**32
            samples = range(config.samples)[first : first + config.samples_per_request]
            request = Request(row_key(row_id), (prompt,), seed=seed, lane=lane)
            found.append(_Asked(row_id, samples, request))
        check_prompts_fit(models, (prompt,), search_config.max_new_tokens, where)
    return found


def _entry(
    asked: _Asked, result: SearchResult, text_of: Callable[[Sequence[int], Hypothesis], str]
) -> Row:
    """What the journal keeps of a finished request: its output rows."""
    rows = []
    # A prompt's last slot may draw more than are wanted, and a search keeps W.
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
    del settings["batch_size"]  # does not change the results
    asked = json.dumps([[row["id"], row["prompt"]] for row in rows]).encode()
    digest = hashlib.sha256(asked).hexdigest()[:16]
    return {**settings, "prompts_sha256": digest, **(identity or {})}


def main(arguments: list[str]) -> int:
    """Run the task in a JSON file; an error is one line on stderr, and the status is 2."""
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
