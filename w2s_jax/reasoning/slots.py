"""Prompts through the slots of one search, and their responses as text, one slot after the other.

Imports the search, and so jax. What is asked for and where it is written is in `generation.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax.sharding import Mesh

from w2s_jax.errors import RowFailed, RowsFailed
from w2s_jax.ops.sharding import DEFAULT_RULES, Rules
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.models import SearchModels
from w2s_jax.search.results import Request, hypothesis_text
from w2s_jax.search.run import search_requests
from w2s_jax.search.step import search_eos
from w2s_jax.text.prompts import decode_tokens


@dataclass(frozen=True)
class Response:
    """A response without what ended it; finished: by EOS or a stop string, not by its length."""

    text: str
    finished: bool


def respond(
    models: SearchModels,
    config: SearchConfig,
    requests: Sequence[Request],
    tokenizer: Any,
    *,
    slots: int,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
) -> Iterator[tuple[int, list[Response]]]:
    """Yield (index of the request, its W responses, best first or by lane) as requests finish.

    Requests of about one length run side by side, so that little of a prompt's room is padding; a
    request's own length alone chooses the program that it runs in. Raises RowsFailed, once all
    others are done, for rows that a model fails, and InputError as `start_session` and `insert` do.
    """
    found = search_requests(
        models,
        config,
        requests,
        slots=slots,
        decode=partial(decode_tokens, tokenizer),
        alone=True,
        mesh=mesh,
        rules=rules,
    )
    ends: dict[str, Any] = {"stop": config.stop, "eos_ids": search_eos(models, config)}
    failures: list[RowFailed] = []
    for index, result in found:
        if isinstance(result, RowFailed):
            failures.append(result)
            continue
        prompt = requests[index].prompts[0]
        texts = (hypothesis_text(tokenizer, prompt, one, **ends) for one in result.hypotheses)
        finished = (one.finished for one in result.hypotheses)
        yield index, [Response(*both) for both in zip(texts, finished, strict=True)]
    if failures:
        raise RowsFailed(failures)
