"""Responses of a local model to thousands of prompts, several samples each, resumable.

Importing this imports no jax, so that settings can be read without it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from w2s_jax.errors import InputError, RowFailed, RowsFailed
from w2s_jax.text.rows import Row

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from w2s_jax.search import Request, SearchConfig, SearchModels

# How a run is carried out, not what it computes.
NOT_IN_FINGERPRINT = ("batch_size",)


@dataclass(frozen=True)
class GenerationConfig:
    """How responses are sampled.

    samples of each prompt, at a temperature (0 is greedy: then one sample), from a nucleus of top_p
    and the top_k likeliest tokens (0: all); max_new_tokens at most. A response ends before the
    first of the stop strings or at an EOS id (None: the model's own, or the tokenizer's). seed and
    a row's id decide its draws. batch_size prompts run side by side, each with samples_per_slot of
    its samples behind one reading of it (None: all; fewer read it again for every so many, but
    short responses wait less for long ones; the draws are the same).

    method "cbs" samples by chunk-level beam search under a guide (arXiv 2405.19262) with beam_width
    W, successors K and chunk_length L; sample i is then the best response of the search with the
    seed `seed + i`, and each is a search of its own.

    Raises InputError for a size below 1, a number out of range, several samples without a
    temperature, and settings that the method does not have.
    """

    samples: int = 1
    temperature: float | int = 0.0
    top_p: float | int = 1.0
    top_k: int = 0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ("Question", "Answer")
    eos_ids: tuple[int, ...] | None = None
    seed: int = 0
    batch_size: int = 16
    samples_per_slot: int | None = None
    method: Literal["sample", "cbs"] = "sample"
    beam_width: int = 4
    successors: int = 4
    chunk_length: int = 5

    def __post_init__(self) -> None:
        sizes = {
            "samples": self.samples,
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "samples_per_slot": 1 if self.samples_per_slot is None else self.samples_per_slot,
            "beam_width": self.beam_width,
            "successors": self.successors,
            "chunk_length": self.chunk_length,
        }
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name} is {size}; it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(
                f"temperature is {self.temperature}; it must be 0 or above, and finite"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; it must be 0 (off) or above")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; it must lie in 0 .. 2**32 - 1")
        if any(not text for text in self.stop):
            raise InputError("a stop string is empty; give at least one character")
        if self.method not in ("sample", "cbs"):
            raise InputError(f"method {self.method!r} is neither sample nor cbs")
        if self.temperature == 0 and (self.samples > 1 or self.method == "cbs"):
            raise InputError(
                "temperature 0 (greedy) writes the same every time; give a temperature above 0, or "
                'samples 1 and method "sample"'
            )
        if self.method == "cbs" and self.samples_per_slot not in (None, 1):
            raise InputError("samples_per_slot is for method sample; a search is one sample")

    @property
    def samples_per_request(self) -> int:
        """How many samples of a prompt share a slot."""
        if self.method == "cbs":
            return 1
        return min(self.samples, self.samples_per_slot or self.samples)


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
    mesh: "Mesh | None" = None,
) -> list[Row]:
    """The samples of every row {"id", "prompt"}: {"id", "sample", "response", "finished"}.

    They are written to `path` in the order of the rows, samples 0, 1, ... of each together. Until
    all are there, finished ones are in PATH.journal; after a kill the same call goes on from that.
    A response has no space around it. progress is called with the numbers of responses that are
    there and wanted. model, guide: a `Model` and, for method cbs, a `Guide` or several. source: the
    file that the rows are from, for messages. identity: JSON values that tell the model's weights
    from others', so that a journal of theirs is refused.

    Raises InputError, before anything is generated, for rows that are no such rows, ids that are
    there twice, prompts that leave no room for max_new_tokens in a model's positions (naming the
    row), a guide too many or too few, and a journal of a run with other settings.
    """
    from w2s_jax.search import search_models
    from w2s_jax.text.journal import journal_path, open_journal
    from w2s_jax.text.rows import locked

    _check_guide(config, guide)
    models = search_models(model, guide)
    search_config = _search_config(config, models, tokenizer)
    requests = _requests(models, search_config, rows, config, tokenizer, source)
    count = len(rows) * config.samples
    with locked(journal_path(path)):
        journal = open_journal(journal_path(path), _fingerprint(rows, config, identity))
        finished = journal.read()
        waiting = [index for index in range(len(requests)) if index not in finished]
        done = sum(len(entry["rows"]) for entry in finished.values())
        progress(done, count)
        found = _responses(
            models,
            search_config,
            [requests[index] for index in waiting],
            tokenizer,
            # Of all requests, so that a run that is taken up again runs the same programs.
            slots=min(config.batch_size, len(requests)),
            mesh=mesh,
        )
        try:
            for place, responses in found:
                entry = _entry(rows, config, waiting[place], responses)
                journal.append(waiting[place], entry)
                done += len(entry["rows"])
                progress(done, count)
        except RowsFailed as failed:
            ids = {row_key(row["id"]): row["id"] for row in rows}
            raise failed.named({}, where=f"{source} row".strip(), number=ids.get) from None
        kept = journal.read()
        answers = list(_flat(kept[index] for index in range(len(requests))))
        journal.merge(path, len(requests), _write)
    return answers


def row_key(row_id: str | int) -> int:
    """The 32 bits of a row's id that its draws come from: the number, or a hash of the text."""
    if isinstance(row_id, int):
        return row_id & 0xFFFFFFFF
    return int.from_bytes(hashlib.sha256(row_id.encode("utf-8", "surrogatepass")).digest()[:4])


def _responses(
    models: "SearchModels",
    config: "SearchConfig",
    requests: Sequence["Request"],
    tokenizer: Any,
    *,
    slots: int,
    mesh: "Mesh | None",
) -> Iterator[tuple[int, list[tuple[str, bool]]]]:
    """Yield (index of the request, its responses, best first or by lane) as requests finish.

    A response is its text and whether EOS or a stop string, not its length, ended it. Raises
    RowsFailed, once all others are done, for rows that a model fails.
    """
    from w2s_jax.search.results import hypothesis_text
    from w2s_jax.search.run import search_requests
    from w2s_jax.search.step import search_eos
    from w2s_jax.text.prompts import decode_tokens

    decode = partial(decode_tokens, tokenizer)
    own: dict[str, Any] = {"slots": slots, "decode": decode, "alone": True, "mesh": mesh}
    ends: dict[str, Any] = {"stop": config.stop, "eos_ids": search_eos(models, config)}
    failures: list[RowFailed] = []
    for index, result in search_requests(models, config, requests, **own):
        if isinstance(result, RowFailed):
            failures.append(result)
            continue
        prompt = requests[index].prompts[0]
        yield (
            index,
            [
                (hypothesis_text(tokenizer, prompt, one, **ends), one.finished)
                for one in result.hypotheses
            ],
        )
    if failures:
        raise RowsFailed(failures)


def _check_guide(config: GenerationConfig, guide: Any) -> None:
    if config.method == "cbs" and not guide:
        raise InputError("method cbs needs a guide: a tuned and an untuned model")
    if config.method == "sample" and guide:
        raise InputError('method sample has no guide; take method "cbs" or leave the guide out')


def _search_config(
    config: GenerationConfig, models: "SearchModels", tokenizer: Any
) -> "SearchConfig":
    from w2s_jax.ops.sampling import Sampling
    from w2s_jax.search.config import cbs, sample
    from w2s_jax.search.step import search_eos
    from w2s_jax.text.prompts import special_stops

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
        found = sample(config.samples_per_request, **settings)
    else:
        found = cbs(config.beam_width, config.successors, config.chunk_length, **settings)
    search_eos(models, found)
    return found


def _requests(
    models: "SearchModels",
    search_config: "SearchConfig",
    rows: Sequence[Mapping[str, Any]],
    config: GenerationConfig,
    tokenizer: Any,
    source: str,
) -> list["Request"]:
    """What goes into slots: for each row its samples, `together` at a time."""
    from w2s_jax.search import Request
    from w2s_jax.search.run import check_request
    from w2s_jax.text.prompts import encode_prompt

    if not rows:
        raise InputError(f"{source or 'generation'}: no rows to answer")
    requests = []
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
            raise InputError(f"{where}: {error}") from None
        for first in range(0, config.samples, config.samples_per_request):
            is_search = config.method == "cbs"
            requests.append(
                Request(
                    row_key(row_id),
                    (prompt,),
                    seed=(config.seed + (first if is_search else 0)) % 2**32,
                    lane=0 if is_search else first,
                )
            )
        check_request(models, search_config, requests[-1], where)
    return requests


def _entry(
    rows: Sequence[Mapping[str, Any]],
    config: GenerationConfig,
    index: int,
    found: Sequence[tuple[str, bool]],
) -> Row:
    """What the journal keeps of a finished request: its output rows."""
    slots_a_row = -(-config.samples // config.samples_per_request)
    row, first = rows[index // slots_a_row], index % slots_a_row * config.samples_per_request
    # A prompt's last slot may have drawn more than are wanted, and a search keeps W.
    samples = range(first, min(first + config.samples_per_request, config.samples))
    return {
        "rows": [
            {
                "id": row["id"],
                "sample": sample,
                "response": text.strip(),
                "finished": finished,
            }
            for sample, (text, finished) in zip(samples, found, strict=False)
        ]
    }


def _flat(entries: Iterable[Row]) -> Iterator[Row]:
    return (row for entry in entries for row in entry["rows"])


def _write(path: str | Path, entries: Iterable[Row]) -> None:
    from w2s_jax.text.rows import write_jsonl

    write_jsonl(path, _flat(entries))


def _fingerprint(
    rows: Sequence[Mapping[str, Any]],
    config: GenerationConfig,
    identity: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What the journal's rows depend on."""
    settings = {k: v for k, v in asdict(config).items() if k not in NOT_IN_FINGERPRINT}
    asked = json.dumps([[row["id"], row["prompt"]] for row in rows]).encode()
    told = {"prompts_sha256": hashlib.sha256(asked).hexdigest()[:16]}
    return settings | told | dict(identity or {})
