"""`search` over plain lists of prompts, which are checked here and searched by `session.py`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from w2s_jax.errors import InputError, check_kind, shown
from w2s_jax.models.model import Model
from w2s_jax.ops.sharding import DEFAULT_RULES, Rules, check_placing
from w2s_jax.search.compile import compiled_beside
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.models import Guide, search_models
from w2s_jax.search.results import ChunkTrace, Decode, Request, SearchResult
from w2s_jax.search.scorers import TextScorer
from w2s_jax.search.session import search_all
from w2s_jax.text.prompts import Conversation


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
    """Search a response for every prompt.

    Args:
        policy: What responses are sampled from.
        guides: Tuned and untuned models with the policy's vocabulary.
        prompts: Token ids, one sequence each.
        config: The method and its sizes, as `search.config.cbs` and others make it.
        guide_prompts: For every prompt, what each guide model reads in place of it (tuned 0,
            untuned 0, tuned 1, ...), where templates differ.
        scorers: Of texts, beside the guides; they need `conversations`.
        conversations: One for each prompt.
        row_ids: With config.seed they decide a prompt's draws, whatever is searched beside it; by
            default 0, 1, ...
        decode: Turns token ids into text; stop strings, scorers and on_chunk need it.
        on_result: Called with each result as soon as its prompt is done, in the order of finishing.
        on_chunk: Called with the candidates of each chunk and which of them were kept.
        mesh: The models'; the slots are split over its devices.
        rules: How they are split.

    Returns:
        The results in the order of the prompts.

    Raises:
        RowsFailed: Once all others are done, for rows where a model's logits are NaN or infinite or
            a score is not finite.
        InputError: For an empty prompt, token ids outside the vocabulary, a prompt that leaves no
            room for max_new_tokens in a model's positions, stop strings, scorers or on_chunk
            without decode, a mesh that does not divide the slots or the heads, prompts that are no
            token ids, and a policy or a guide that is none.
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
        beside=compiled_beside,
    )


def _requests(
    seed: int,
    prompts: Sequence[Sequence[int]],
    guide_prompts: Sequence[Sequence[Sequence[int]]] | None,
    conversations: Sequence[Conversation] | None,
    row_ids: Sequence[int] | None,
    *,
    scored: bool,
) -> list[Request]:
    """The arguments of `search` as requests; InputError for wrong types and lengths."""
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
    """The items of an iterable as a list; InputError where one is of another kind."""
    check_kind(name, items, Iterable, taken)
    found = list(items)
    for item in found:
        check_kind(name, item, kind, taken)
    return found
