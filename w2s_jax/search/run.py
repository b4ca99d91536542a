"""A search over many prompts: into slots as they come free, out as they finish."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from jax.sharding import Mesh

from w2s_jax.errors import InputError, RowFailed, RowsFailed, check_kind, shown
from w2s_jax.models.model import Model
from w2s_jax.ops.sharding import DEFAULT_RULES, Rules, check_placing
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.methods import LogRatio, NoScore
from w2s_jax.search.models import Guide, SearchModels, check_ids, search_models
from w2s_jax.search.results import ChunkTrace, Decode, Request, SearchResult
from w2s_jax.search.scorers import TextScorer
from w2s_jax.search.session import start_session
from w2s_jax.text.prompts import Conversation
from w2s_jax.text.tokenizer import SMALLEST_BUCKET, buckets

DEFAULT_SLOTS = 8
R = TypeVar("R")


def search(
    policy: Model,
    guides: Guide | Sequence[Guide] | None,
    prompts: Sequence[Sequence[int]],
    config: SearchConfig,
    *,
    guide_prompts: Sequence[Sequence[Sequence[int]]] | None = None,
    scorers: Sequence[TextScorer] = (),
    conversations: Sequence[Conversation] | None = None,
    row_ids: Sequence[int] | None = None,
    decode: Decode | None = None,
    on_result: Callable[[SearchResult], None] | None = None,
    on_chunk: Callable[[ChunkTrace], None] | None = None,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
) -> list[SearchResult]:
    """Search a response for every prompt (token ids); results in the order of the prompts.

    guide_prompts: for every prompt what each guide model reads instead of it (tuned 0, untuned 0,
    tuned 1, ...), where templates differ. scorers value the responses as texts, beside the guides;
    they need `conversations`, one for each prompt. row_ids (by default 0, 1, ...) with config.seed
    decide a prompt's draws, whatever is searched beside it. decode turns token ids into text and is
    needed for stop strings, scorers and on_chunk. on_result is called with each result as soon as
    its prompt is done, in the order of finishing; on_chunk with what each chunk offered and kept.
    mesh (the models') splits the slots over its devices as the rules say.

    Raises RowsFailed, once all others are done, for rows where a model's logits are NaN or infinite
    or a score is no finite number. Raises InputError for an empty prompt, token ids outside the
    vocabulary, a prompt that leaves no room for max_new_tokens in a model's positions, stop
    strings, scorers or on_chunk without decode, and a mesh that does not divide the slots or the
    heads, for prompts that are no token ids, and for a policy or a guide that is none.
    """
    models = search_models(policy, guides)
    check_kind("config", config, SearchConfig, "what search.config.cbs and others give")
    check_placing(mesh, rules)
    scorers = _listed("scorers", scorers, TextScorer, "a list of scorers such as FunctionScorer")
    given = (prompts, guide_prompts, conversations, row_ids)
    return search_all(
        models,
        config,
        _requests(config.seed, *given, scored=bool(scorers)),
        scorers=scorers,
        on_result=on_result,
        on_chunk=on_chunk,
        decode=decode,
        mesh=mesh,
        rules=rules,
    )


def search_all(
    models: SearchModels,
    config: SearchConfig,
    requests: Sequence[Request],
    *,
    scorers: Sequence[TextScorer] = (),
    on_result: Callable[[SearchResult], None] | None = None,
    **options: Any,
) -> list[SearchResult]:
    """The results of requests in their order; `options` are those of `search_requests`.

    Raises RowsFailed and InputError as `search` does.
    """
    if scorers and not models.guides and isinstance(config.scorer, LogRatio):
        config = replace(config, scorer=NoScore())
    for request in requests:
        check_request(models, config, request, f"row {request.row_id}")
    slots = slots_for(config, len(requests))
    found = search_requests(models, config, requests, slots=slots, scorers=scorers, **options)
    return collect(found, len(requests), on_result)


def _requests(
    seed: int,
    prompts: Sequence[Sequence[int]],
    guide_prompts: Sequence[Sequence[Sequence[int]]] | None,
    conversations: Sequence[Conversation] | None,
    row_ids: Sequence[int] | None,
    *,
    scored: bool,
) -> list[Request]:
    """The requests that `search` was given as lists; InputError for what is none, or too few."""
    if conversations is not None:
        taken = "a list of Conversation"
        conversations = _listed("conversations", conversations, Conversation, taken)
    own = _token_rows("prompts", prompts)
    count = len(own)
    given = range(count) if row_ids is None else row_ids
    ids = _listed("row_ids", given, int, "a list of whole numbers")
    others = None
    if guide_prompts is not None:
        others = [_token_rows("guide_prompts", row) for row in guide_prompts]
    if not scored:
        conversations = None
    columns = {"row ids": ids, "guide prompts": others, "conversations": conversations}
    for name, values in columns.items():
        if values is not None and len(values) != count:
            raise InputError(f"{len(values)} {name} for {count} prompts; give one each")
    read, talks = others or [[]] * count, conversations or [None] * count
    rows = zip(ids, own, read, talks, strict=True)
    return [Request(id, (prompt, *more), talk, seed=seed) for id, prompt, more, talk in rows]


def slots_for(config: SearchConfig, prompts: int) -> int:
    """Prompts that are searched side by side."""
    return config.slots or max(1, min(DEFAULT_SLOTS, prompts))


def collect(
    outcomes: Iterable[tuple[int, R | RowFailed]],
    count: int,
    on_result: Callable[[R], None] | None = None,
) -> list[R]:
    """The results in the order of their requests; `on_result` hears each as it comes.

    Raises:
        RowsFailed: once all others are there, for requests that failed.
    """
    found: dict[int, R] = {}
    failures: list[RowFailed] = []
    for index, outcome in outcomes:
        if isinstance(outcome, RowFailed):
            failures.append(outcome)
            continue
        found[index] = outcome
        if on_result is not None:
            on_result(outcome)
    if failures:
        raise RowsFailed(failures, [found.get(index) for index in range(count)])
    return [found[index] for index in range(count)]


def search_requests(
    models: SearchModels,
    config: SearchConfig,
    requests: Sequence[Request],
    *,
    slots: int,
    on_chunk: Callable[[ChunkTrace], None] | None = None,
    alone: bool = False,
    **options: Any,
) -> Iterator[tuple[int, SearchResult | RowFailed]]:
    """Yield (index of the request, its outcome) as requests finish.

    Those of about one length run side by side, so that little of a prompt's room is padding; too
    few to fill the slots join the next longer ones, unless `alone`: then a request's own length
    decides the program it runs in. Even without requests, what the settings lack is said.
    `options` are those of `start_session`; InputError as of that and of `Session.insert`.
    """
    longest = [max(map(len, request.prompts)) for request in requests]
    found = buckets(longest) if alone else buckets(longest, slots=slots)
    for capacity, members in (found or {SMALLEST_BUCKET: []}).items():
        options |= {"slots": slots, "prefix_capacity": capacity, "traced": on_chunk is not None}
        session = start_session(models, config, **options)
        waiting = ((index, requests[index]) for index in members)
        yield from run_slots(session, waiting, on_chunk)
        del session  # before the next one's caches are made


def _token_rows(name: str, rows: Any) -> list[tuple[int, ...]]:
    """Rows of token ids as tuples; InputError for a text, a mapping, one flat row and the like."""
    taken = f"{name} are a list of token ids for each prompt, as text.prompts.encode_prompt gives"
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise InputError(f"{taken}; not {shown(rows)}")
    found = []
    for row in rows:
        ids = np.asarray(row)  # of text and of mappings an array without axes
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise InputError(f"{taken}; not a list that holds {shown(row)}")
        found.append(tuple(ids.tolist()))
    return found


def _listed(name: str, items: Any, kind: Any, taken: str) -> list[Any]:
    """The items of what may be gone through only once; InputError where one is of another kind."""
    check_kind(name, items, Iterable, taken)
    found = list(items)
    for item in found:
        check_kind(name, item, kind, taken)
    return found


def check_request(models: SearchModels, config: SearchConfig, request: Request, where: str) -> None:
    """Raise InputError, naming `where`, for a prompt that the models cannot be searched behind."""
    count, members = len(request.prompts), len(models.members)
    if count not in (1, members):
        raise InputError(f"{where}: {count} prompts for {members} models; give one each")
    limit = config.max_new_tokens if request.limit is None else request.limit
    for name, model, prompt, vocabulary in models.prompts_of_members(request.prompts):
        if not len(prompt):
            raise InputError(f"{where}: the prompt has no tokens; give at least one (BOS, say)")
        check_ids(prompt, vocabulary, where)
        positions = model.config.max_positions
        if len(prompt) + limit > positions:
            raise InputError(
                f"{where}: a prompt of {len(prompt)} tokens and {limit} new ones do not fit the "
                f"{name}'s {positions} positions; shorten it or lower max_new_tokens"
            )


def run_slots(
    session: Any,
    requests: Iterable[tuple[int, Request]],
    on_chunk: Callable[[ChunkTrace], None] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yield (index, result or RowFailed) of indexed requests as they finish.

    A slot is refilled as soon as it is free, so that a long response does not keep the others
    waiting.

    Args:
        session: `session.Session`, or one over texts with the same methods.
        requests: what is searched, with what to call it by.
        on_chunk: hears what each chunk offered and kept.
    """
    waiting = iter(requests)
    index_of: dict[int, int] = {}

    def refill(session: Any, slot: int) -> Any:
        for index, request in waiting:
            index_of[slot] = index
            return session.insert(slot, request)
        return session.release(slot) if slot in session.requests else session

    for slot in range(session.slots):
        session = refill(session, slot)
    while session.requests:
        session = session.advance()
        if on_chunk is not None:
            for chunk in session.chunks.values():
                on_chunk(chunk)
        done = session.done_slots()
        found, failed = session.outcomes(done) if done else ({}, {})
        for slot, outcome in (found | failed).items():
            yield index_of[slot], outcome
            session = refill(session, slot)
