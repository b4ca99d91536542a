"""What quantising a policy changes: perplexity, greedy choices, scores of a search, bytes.

Takes models and token ids; reads no checkpoint and prints nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from w2s_jax.errors import InputError
from w2s_jax.evaluate.rewards import mean_and_stderr
from w2s_jax.models.quantize import weight_bytes
from w2s_jax.ops.sampling import Sampling
from w2s_jax.search.config import SearchConfig, sample
from w2s_jax.search.likelihood import Response, score_responses
from w2s_jax.search.models import SearchModels
from w2s_jax.search.proposers import PolicyProposer
from w2s_jax.search.run import search
from w2s_jax.text.rows import Row

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """What is asked of every policy.

    texts: token ids, two at least, as they are scored; prompts: what continuations begin with.
    new_tokens: of a continuation. searching: the search to be scored, None for none. policy_cache
    as in SearchConfig.
    """

    texts: Sequence[Tokens]
    prompts: Sequence[Tokens]
    new_tokens: int
    searching: SearchConfig | None = None
    batch_size: int = 8
    policy_cache: str = "auto"
    mesh: Mesh | None = None


@dataclass(frozen=True)
class Measured:
    """What one policy did in a trial.

    logprobs float32 [n], likeliest int32 [n]: of each text's tokens but the first, the token's
    log-probability and the token that is likeliest there. continuations: greedy, of each prompt.
    scores: the best score of each prompt's search.
    """

    weight_bytes: int
    logprobs: tuple[np.ndarray, ...]
    likeliest: tuple[np.ndarray, ...]
    continuations: tuple[Tokens, ...]
    scores: tuple[float, ...] | None


@dataclass(frozen=True)
class Figures:
    """One policy against the unquantised one.

    perplexity: exp of the mean negative log-probability of all tokens; perplexity_change: its
    ratio to the other's, less 1. equal_next: the share of places with the same likeliest token.
    equal_continuations: the share of greedy continuations that are the same; equal_length: the
    mean share of a continuation before the first difference. score: the mean best score of the
    search, with the mean of the paired differences and its standard error (None for one row).
    """

    weight_bytes: int
    perplexity: float
    perplexity_change: float
    equal_next: float
    equal_continuations: float
    equal_length: float
    score: float | None = None
    score_change: float | None = None
    score_change_stderr: float | None = None


def text_of(row: Row, where: str) -> str:
    """A row's "text", or its "prompt" and "response"; InputError, beginning with `where`."""
    parts = [row.get("text")] if "text" in row else [row.get("prompt"), row.get("response")]
    if not all(isinstance(part, str) for part in parts):
        raise InputError(f'{where}: no "text", and no "prompt" and "response", that are strings')
    return "".join(str(part) for part in parts)


def measure(
    models: SearchModels, trial: Trial, on_row: Callable[[], None] = lambda: None
) -> Measured:
    """Read the texts, continue the prompts and search behind them, with the models' policy.

    on_row is called for every text read, continued or searched. Raises InputError for texts that do
    not fit the models.
    """
    alone = SearchModels(models.policy, ())
    scored = score_responses(
        alone,
        PolicyProposer(),
        [Response((text[:1],), text[1:]) for text in trial.texts],
        top=1,
        batch_size=trial.batch_size,
        on_scored=lambda index, response: on_row(),
    )

    def run(models: SearchModels, config: SearchConfig) -> list:
        return search(
            models.policy,
            models.guides,
            trial.prompts,
            config,
            on_result=lambda result: on_row(),
            mesh=trial.mesh,
        )

    greedy = sample(
        max_new_tokens=trial.new_tokens,
        sampling=Sampling(0.0),
        slots=trial.batch_size,
        policy_cache=trial.policy_cache,
    )
    continued = run(alone, greedy)
    searched = run(models, trial.searching) if trial.searching is not None else None
    return Measured(
        weight_bytes(models.policy.params),
        tuple(response.logprobs for response in scored),
        tuple(response.top_ids[:, 0] for response in scored),
        tuple(result.best.tokens for result in continued),
        None if searched is None else tuple(result.best.score for result in searched),
    )


def compare(plain: Measured, other: Measured) -> Figures:
    """The figures of one policy, given what the unquantised one did in the same trial."""
    loss, before = (-np.concatenate(one.logprobs).mean(dtype=np.float64) for one in (other, plain))
    same = np.concatenate(other.likeliest) == np.concatenate(plain.likeliest)
    pairs = list(zip(other.continuations, plain.continuations, strict=True))
    score: tuple[float | None, ...] = (None, None, None)
    if other.scores is not None and plain.scores is not None:
        values = np.asarray(other.scores, np.float64)
        mean, stderr = mean_and_stderr(values - np.asarray(plain.scores, np.float64))
        score = (float(values.mean()), mean, stderr)
    return Figures(
        other.weight_bytes,
        math.exp(loss),
        math.expm1(loss - before),
        float(same.mean()),
        float(np.mean([one == two for one, two in pairs])),
        float(np.mean([_common(one, two) / max(len(one), len(two), 1) for one, two in pairs])),
        *score,
    )


def _common(one: Tokens, other: Tokens) -> int:
    differ = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))
