"""Log-probs of given tokens under the distribution that a proposer samples from, at temperature 1.

One teacher-forced pass of every model; nothing is sampled. A method that chooses among samples
(CBS, best-of-N) has no likelihood in closed form, so it has none here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from w2s_jax.errors import InputError, RowFailed, RowsFailed
from w2s_jax.models.decoder import logits as logits_of
from w2s_jax.models.model import hidden_states
from w2s_jax.ops.logits import normalised
from w2s_jax.search.methods import Proposer
from w2s_jax.search.models import SearchModels, check_ids
from w2s_jax.text.tokenizer import pad_rows, power_of_two

Shape = tuple[int, int, int]
"""Tokens read, tokens scored, and prompts of a row: 1, or one for each model."""

BLOCK_BYTES = 1 << 27
"""At most about this many bytes of float32 logits, of all models, are in memory at a time."""
_PADDING = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Likelihoods:
    """Log-probs of given tokens, and the likeliest tokens in their places.

    Attributes:
        logprobs: float32 [B, n], log p(token | all before it) in nats.
        greedy: bool [B, n], whether the token is the likeliest.
        top_ids: int32 [B, n, top], the likeliest tokens, best first.
        top_logprobs: float32 [B, n, top], their log-probs.
        faults: bool [B, F], which of `SearchModels.sources` gave logits that are no distribution;
            the log-probs are NaN there.
    """

    logprobs: Array
    greedy: Array
    top_ids: Array
    top_logprobs: Array
    faults: Array


@dataclass(frozen=True)
class ScoredResponse:
    """`Likelihoods` of one response, as NumPy arrays [n] and [n, top] without padding."""

    logprobs: np.ndarray
    greedy: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclass(frozen=True)
class Response:
    """Tokens to score and the prompts before them.

    Attributes:
        prompts: Token ids of one prompt for all models, or of one each in the order (policy, tuned
            0, untuned 0, ...), where templates differ.
        tokens: The response's token ids, the same for all models.
        beta: β of EFT for this response; None for the proposer's.
    """

    prompts: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...]
    beta: float | None = None

    @property
    def width(self) -> int:
        """Tokens that are read: the longest prompt and all tokens of the response but the last."""
        return max(map(len, self.prompts)) + len(self.tokens) - 1

    def prompt(self, member: int) -> tuple[int, ...]:
        """The prompt that a member of the models reads."""
        return self.prompts[member if len(self.prompts) > 1 else 0]


def token_likelihoods(
    models: SearchModels,
    proposer: Proposer,
    tokens: Int[Array | np.ndarray, "B X"],
    mask: Bool[Array | np.ndarray, "B X"] | None = None,
    *,
    beta: Float[Array | np.ndarray, " B"] | None = None,
    top: int = 0,
) -> Likelihoods:
    """Likelihoods of right-padded rows.

    They are those of the policy, or of the EFT mixture (arXiv 2310.12962 eq. 3), renormalised over
    the ids that every model knows. Logits are float32 and computed in blocks: [B, X, V] is never
    whole in memory. Nothing precedes the first token of a row: there, as on padding, the log-prob
    is 0 and `greedy` is False; its `top` ids are 0 with log-prob −inf.

    Args:
        models: The policy and the guides that the proposer mixes.
        proposer: The policy alone, or the EFT mixture.
        tokens: int32 [B, X].
        mask: bool [B, X], False on padding; by default all True.
        beta: float32 [B], β of each row; by default the proposer's.
        top: How many of the likeliest tokens to return for each place.

    Returns:
        Likelihoods, n = X.
    """
    real = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask)
    tokens, width = jnp.asarray(tokens), tokens.shape[1]
    if width == 1:
        tokens, real = (jnp.pad(part, ((0, 0), (0, 1))) for part in (tokens, real))
    rows = ((tokens[:, :-1], real[:, :-1], jnp.zeros(tokens.shape[0], jnp.int32)),)
    betas = np.full(len(tokens), _beta(proposer), np.float32) if beta is None else jnp.asarray(beta)
    found = _likelihoods(models, proposer, rows, tokens[:, 1:], real[:, 1:], betas, top)

    def behind_first(part: Array, fill: float | int | bool) -> Array:
        edges = ((0, 0), (1, 0), *((0, 0),) * (part.ndim - 2))
        return jnp.pad(part, edges, constant_values=fill)[:, :width]

    return replace(
        found,
        logprobs=behind_first(found.logprobs, 0.0),
        greedy=behind_first(found.greedy, False),
        top_ids=behind_first(found.top_ids, 0),
        top_logprobs=behind_first(found.top_logprobs, -np.inf),
    )


def score_responses(
    models: SearchModels,
    proposer: Proposer,
    responses: Sequence[Response],
    *,
    top: int = 0,
    batch_size: int = 8,
    shape: Shape | None = None,
    on_scored: Callable[[int, ScoredResponse], None] = lambda index, scored: None,
) -> list[ScoredResponse]:
    """Likelihoods of every response behind its prompts, in the order given.

    Rows are read longest first, padded to powers of two of tokens, so that few programs are
    compiled.

    Args:
        models: The policy and the guides that the proposer mixes.
        proposer: The policy alone, or the EFT mixture.
        responses: Token ids, behind prompts of one or all models.
        top: How many of the likeliest tokens to return for each place.
        batch_size: Rows that are read side by side.
        shape: At least the `padded_shape` of all; with it one program is compiled.
        on_scored: Called with the index and result of each response as soon as it is scored.

    Raises:
        RowsFailed: Once all others are scored, for rows where a model's logits are NaN or infinite.
        InputError: Naming the row, for an empty prompt or response, an id outside the vocabulary, a
            wrong number of prompts, a row beyond a model's positions, and a `top` beyond the
            vocabulary.
    """
    if not 0 <= top <= models.vocabulary:
        raise InputError(f"top is {top}; it must lie in 0 .. {models.vocabulary}, the vocabulary")
    for index, response in enumerate(responses):
        check_response(models, response, f"row {index}")
    found: dict[int, ScoredResponse] = {}
    failures: list[RowFailed] = []
    width = [padded_width(row.width) for row in responses]
    waiting = sorted(range(len(responses)), key=lambda index: -responses[index].width)
    while waiting:
        batch = waiting[:batch_size]
        if shape is None:
            batch = [index for index in batch if width[index] == width[batch[0]]]
        waiting = waiting[len(batch) :]
        rows = [responses[index] for index in batch]
        given = _arguments(models, proposer, rows, batch_size, shape or padded_shape(rows), top)
        scored = jax.device_get(_likelihoods(*given))
        for place, index in enumerate(batch):
            if scored.faults[place].any():
                failures.append(RowFailed(index, models.at_fault(scored.faults[place])))
                continue
            count = len(responses[index].tokens)
            parts = (scored.logprobs, scored.greedy, scored.top_ids, scored.top_logprobs)
            found[index] = ScoredResponse(*(part[place, :count] for part in parts))
            on_scored(index, found[index])
    if failures:
        raise RowsFailed(failures, [found.get(index) for index in range(len(responses))])
    return [found[index] for index in range(len(responses))]


def check_response(models: SearchModels, response: Response, where: str) -> None:
    """Check that the models can score a response.

    Raises:
        InputError: Where they cannot; the message begins with `where`.
    """
    count, members = len(response.prompts), len(models.members)
    if count not in (1, members):
        raise InputError(
            f"{where}: {count} prompts for {members} models; give one for all, or one each"
        )
    if not response.tokens or not all(response.prompts):
        raise InputError(f"{where}: a prompt and a response need at least one token each")
    check_ids(response.tokens, models.vocabulary, where)
    for name, model, prompt, vocabulary in models.prompts_of_members(response.prompts):
        check_ids(prompt, vocabulary, where)
        length, positions = len(prompt) + len(response.tokens) - 1, model.config.max_positions
        if length > positions:
            raise InputError(
                f"{where}: {length} tokens to read exceed the {positions} positions of the {name}"
            )


def _beta(proposer: Proposer) -> float:
    return getattr(proposer, "beta", 0.0)


def compile_scores(
    models: SearchModels,
    proposer: Proposer,
    responses: Sequence[Response],
    *,
    top: int = 0,
    batch_size: int = 8,
) -> None:
    """Compile, on the calling thread, the program that `score_responses` runs for these shapes."""
    rows, shape = responses[:batch_size], padded_shape(responses)
    given = _arguments(models, proposer, rows, batch_size, shape, top)
    _likelihoods.lower(*given).compile()


def padded_shape(rows: Sequence[Response]) -> Shape:
    """The `Shape` that rows are padded to."""
    width = padded_width(max(row.width for row in rows))
    count = min(width, padded_width(max(len(row.tokens) for row in rows)))
    return width, count, max(len(row.prompts) for row in rows)


def padded_width(length: int) -> int:
    """The width that a row of `length` tokens is padded to."""
    return power_of_two(length, 16)


def _arguments(
    models: SearchModels,
    proposer: Proposer,
    rows: Sequence[Response],
    batch_size: int,
    shape: Shape,
    top: int,
) -> tuple[Any, ...]:
    """The arguments of `_likelihoods` for a batch, which is filled up with its last row.

    Models that read the same prompt share one array.
    """
    width, count, own = shape
    rows = [*rows, *[rows[-1]] * (batch_size - len(rows))]
    targets, real = pad_rows([row.tokens for row in rows], count, _PADDING)
    usual, read = _beta(proposer), []
    betas = np.array([usual if row.beta is None else row.beta for row in rows], np.float32)
    for member in range(own):
        inputs = [(*row.prompt(member), *row.tokens[:-1]) for row in rows]
        starts = np.array([len(row.prompt(member)) - 1 for row in rows], np.int32)
        read.append((*pad_rows(inputs, width, _PADDING), starts))
    return models, proposer, tuple(read), targets, real, betas, top


@partial(jax.jit, static_argnames=("proposer", "top"))
def _likelihoods(
    models: SearchModels,
    proposer: Proposer,
    rows: tuple[tuple[Array, Array, Array], ...],
    targets: Int[Array, "B n"],
    real: Bool[Array, "B n"],
    beta: Float[Array, " B"],
    top: int,
) -> Likelihoods:
    """Likelihoods of targets.

    Args:
        models: The policy and the guides.
        proposer: What mixes their logits.
        rows: For all models, or for each, what it reads: (tokens [B, X], mask [B, X], starts [B]).
            The state at `starts` + t predicts target t.
        targets: The tokens to score.
        real: False on padding.
        beta: β of each row.
        top: How many of the likeliest tokens to return for each place.
    """
    places = proposer.readers(models)
    readers = [models.members[place] for place in places]
    hidden = []
    for place, reader in zip(places, readers, strict=True):
        tokens, mask, starts = rows[place if len(rows) > 1 else 0]
        states = hidden_states(reader, tokens, mask)
        at = jnp.minimum(starts[:, None] + jnp.arange(targets.shape[1]), tokens.shape[1] - 1)
        hidden.append(jnp.take_along_axis(states, at[..., None], axis=1))

    def score(block: tuple[tuple[Array, ...], Array, Array]) -> tuple[Array, ...]:
        """Scores of m rows of states, targets and betas [m ..]."""
        hidden, targets, betas = block
        each = tuple(
            logits_of(reader.config, reader.params, states)
            for reader, states in zip(readers, hidden, strict=True)
        )
        mixed = proposer.mix(models, each, betas)
        normaliser = jax.nn.logsumexp(mixed, axis=-1)
        chosen = jnp.take_along_axis(mixed, targets[:, None], axis=-1)[:, 0]
        logprobs = normalised(chosen, normaliser)
        greedy = jnp.argmax(mixed, axis=-1) == targets
        values, ids = jax.lax.top_k(mixed, top)
        values = values - normaliser[:, None]
        if top:
            # Clients compare the two for equality, which separate roundings could break.
            logprobs = jnp.where(greedy, values[:, 0], logprobs)
        faults = proposer.faults(models, each, normaliser)
        return logprobs, greedy, ids.astype(jnp.int32), values, faults

    flat = tuple(states.reshape(-1, states.shape[-1]) for states in hidden)
    betas = jnp.repeat(beta, targets.shape[1])
    block = max(1, BLOCK_BYTES // sum(4 * reader.config.vocab_size for reader in readers))
    scored = _in_blocks(score, (flat, targets.reshape(-1), betas), block)
    logprobs, greedy, ids, values, faults = (
        part.reshape(*targets.shape, *part.shape[1:]) for part in scored
    )
    faults = jnp.any(faults & real[..., None], axis=1)
    return Likelihoods(jnp.where(real, logprobs, 0.0), greedy & real, ids, values, faults)


def _in_blocks(function: Callable, rows: tuple, block: int) -> tuple[Array, ...]:
    """`function` of a tree of arrays [m ..], at most `block` of the rows at a time."""
    count = jax.tree.leaves(rows)[0].shape[0]
    if count <= block:
        return function(rows)
    blocks = -(-count // block)
    extra = blocks * block - count

    def fold(part: Array) -> Array:
        padded = jnp.pad(part, ((0, extra), *((0, 0),) * (part.ndim - 1)))
        return padded.reshape(blocks, block, *part.shape[1:])

    out = jax.lax.map(function, jax.tree.map(fold, rows))
    return tuple(part.reshape(blocks * block, *part.shape[2:])[:count] for part in out)
