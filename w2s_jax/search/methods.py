"""What a method is made of: proposers, scorers on tokens, and selectors, all inside the program.

A proposer names the models that read token by token, and mixes their logits into those that
successors are sampled from. A scorer names the models that read a proposed chunk, and scores each
of its tokens; scorers of texts are in `scorers.py`. A selector chooses the candidates that become
the hypotheses of the next chunk.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from w2s_jax.errors import InputError, check_fields
from w2s_jax.ops.logits import token_logprobs
from w2s_jax.search.models import SearchModels

Logits = tuple[Array, ...]
"""Float32 logits of the same rows, one array for each model that reads."""

Betas = Float[Array, " P"]
"""β of each slot."""

# Over the rows that sample (`*rows` is W and K, or R): the logits to sample from, sampled tokens,
# a number of each, their implicit rewards, and faults.
Mixed = Float[Array, "P *rows V"]
Drawn = Int[Array, "P *rows"]
Marks = Float[Array, "P *rows"]
Rewards = Float[Array, "P *rows J"]
Faults = Bool[Array, "P *rows F"]

Logprobs = tuple[Float[Array, "P R n"], ...]
"""Float32 log-probs of the tokens of a chunk, one array for each model that reads it."""

Rows = Float[Array, "P R n"]
"""Numbers of the tokens of a chunk."""

Values = Float[Array, "P R n J"]
"""Float32 scores of them, one of each objective."""


@runtime_checkable
class Proposer(Protocol):
    """Extends hypotheses by tokens sampled from mixed logits. A frozen, hashable value.

    The methods' defaults are those of a proposer that does not compute implicit rewards.
    """

    @property
    def values_tokens(self) -> bool:
        """Whether `value` computes the implicit rewards of each sampled token."""
        return False

    def readers(self, models: SearchModels) -> tuple[int, ...]:
        """The members (indices into `models.members`) that read every token."""

    def mix(self, models: SearchModels, logits: Logits, beta: Betas) -> Mixed:
        """The logits to sample from, given those of the readers and each slot's β."""

    def value(self, models: SearchModels, logits: Logits, tokens: Drawn) -> Rewards:
        """The implicit rewards of sampled tokens, one of each guide, from the readers' logits."""
        raise TypeError(f"{type(self).__name__} says nothing of the implicit reward")

    def faults(self, models: SearchModels, logits: Logits, mark: Marks) -> Faults:
        """Which of `SearchModels.sources` gave logits that are no distribution.

        That is where one logit is NaN or +inf, or all are −inf.

        Args:
            models: The policy and the guides.
            logits: Those of each reader.
            mark: A number that is finite where the mixed logits are a distribution: their
                normaliser, or the logit of the sampled token.
        """


@dataclass(frozen=True)
class PolicyProposer(Proposer):
    """Samples from the policy alone."""

    def readers(self, models: SearchModels) -> tuple[int, ...]:
        return (0,)

    def mix(self, models: SearchModels, logits: Logits, beta: Betas) -> Mixed:
        return logits[0][..., : models.vocabulary]

    def faults(self, models: SearchModels, logits: Logits, mark: Marks) -> Faults:
        others = jnp.zeros((*mark.shape, len(models.members)), bool)
        return jnp.concatenate([~jnp.isfinite(mark)[..., None], others], axis=-1)


@dataclass(frozen=True)
class EFTProposer(Proposer):
    """Emulated fine-tuning: samples from softmax(policy + β·Σ_i w_i·(tuned_i − untuned_i)).

    Log-probs are mixed, which differ from logits by a constant a row that the softmax cancels. All
    models read each token, so its implicit reward costs nothing more. A token to which a model of a
    guide gives probability 0 is not drawn where β is above 0, as its log-ratio is not finite.
    Sources: arXiv 2310.12962 eq. 3, arXiv 2405.19262 section 4.

    Attributes:
        beta: β, at least 0; of a slot whose request has none of its own.
        top_k: Above 0, only the policy's top_k likeliest tokens may be drawn, so that guides never
            bring in a token that the policy finds unlikely (PAD, arXiv 2410.04070 section 3.4).

    Raises:
        InputError: For a beta or a top_k out of range.
    """

    beta: float | int = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.beta < math.inf:
            raise InputError(f"beta is {self.beta}; it must be 0 or above, and finite")
        if self.top_k < 0:
            raise InputError(f"the proposer's top_k is {self.top_k}; it must be 0 (off) or above")

    @property
    def values_tokens(self) -> bool:
        return True

    def readers(self, models: SearchModels) -> tuple[int, ...]:
        return tuple(range(len(models.members)))

    def mix(self, models: SearchModels, logits: Logits, beta: Betas) -> Mixed:
        policy, *others = (jax.nn.log_softmax(x, axis=-1)[..., : models.vocabulary] for x in logits)
        beta = beta.reshape(-1, *(1,) * (policy.ndim - 1))
        mixed = policy
        for guide, tuned, untuned in zip(models.guides, others[0::2], others[1::2], strict=True):
            ratio = tuned - untuned
            steer = jnp.where(jnp.isfinite(ratio), beta * guide.weight * ratio, -jnp.inf)
            mixed = mixed + jnp.where(beta * guide.weight == 0, 0.0, steer)
        if 0 < self.top_k < models.vocabulary:
            least = jax.lax.top_k(policy, self.top_k)[0][..., -1:]
            mixed = jnp.where(policy >= least, mixed, -jnp.inf)
        return mixed

    def value(self, models: SearchModels, logits: Logits, tokens: Drawn) -> Rewards:
        return implicit_rewards(models, tuple(token_logprobs(x, tokens) for x in logits[1:]))

    def faults(self, models: SearchModels, logits: Logits, mark: Marks) -> Faults:
        # The softmaxes of `mix` need these maxima too: they are computed once.
        largest = (jnp.broadcast_to(x.max(axis=-1), mark.shape) for x in logits)
        return ~jnp.isfinite(jnp.stack([*largest, mark], axis=-1))


def implicit_rewards(models: SearchModels, logprobs: tuple[Array, ...]) -> Float[Array, "*rows J"]:
    """w_i·(log p_tuned_i − log p_untuned_i) of each guide, in nats.

    Args:
        models: The policy and the guides.
        logprobs: In the order tuned 0, untuned 0, tuned 1, ...

    Raises:
        InputError: Where there is no guide.
    """
    if not models.guides:
        raise InputError(
            "the implicit reward needs at least one guide (tuned and untuned), or scorers of texts"
        )
    pairs = zip(models.guides, logprobs[0::2], logprobs[1::2], strict=True)
    return jnp.stack([guide.weight * (up - down) for guide, up, down in pairs], axis=-1)


@runtime_checkable
class Scorer(Protocol):
    """Values hypotheses by J sums over the tokens of their responses. A frozen, hashable value.

    The methods' defaults are those of a scorer with one objective a guide, for which no model
    reads.
    """

    @property
    def needs_values(self) -> bool:
        """Whether the scores are made of the implicit rewards that the proposer computes."""
        return False

    def objectives(self, models: SearchModels) -> int:
        """J, scores of each token."""
        return len(models.guides)

    def readers(self, models: SearchModels) -> tuple[int, ...]:
        """The members (indices into `models.members`) that read every chunk, teacher-forced."""
        return ()

    def token_scores(
        self, models: SearchModels, logprobs: Logprobs, values: Values | None, like: Rows
    ) -> Values:
        """Float32 scores of tokens from the readers' log-probs or the proposer's values."""


@dataclass(frozen=True)
class LogRatio(Scorer):
    """The implicit rewards w_i·(log p_tuned_i − log p_untuned_i); arXiv 2405.19262 eq. 5."""

    def readers(self, models: SearchModels) -> tuple[int, ...]:
        return tuple(range(1, len(models.members)))

    def token_scores(
        self, models: SearchModels, logprobs: Logprobs, values: Values | None, like: Rows
    ) -> Values:
        return implicit_rewards(models, logprobs)


@dataclass(frozen=True)
class ProposedLogRatio(Scorer):
    """The same scores, from a proposer whose guides have read every token already.

    With an EFT proposer under chunk-level beam search this is Integrated Value Guidance's union of
    token-wise and chunk-wise guidance (arXiv 2409.17819).
    """

    @property
    def needs_values(self) -> bool:
        return True

    def token_scores(
        self, models: SearchModels, logprobs: Logprobs, values: Values | None, like: Rows
    ) -> Values:
        assert values is not None  # by `SearchConfig`, whose proposer gives them
        return values


@dataclass(frozen=True)
class NoScore(Scorer):
    """No scores on tokens: plain sampling, or a search by scores of texts alone."""

    def objectives(self, models: SearchModels) -> int:
        return 0

    def token_scores(
        self, models: SearchModels, logprobs: Logprobs, values: Values | None, like: Rows
    ) -> Values:
        return jnp.zeros((*like.shape, 0), jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Candidates:
    """What may be kept: the rows of a chunk, then the finished hypotheses.

    Entry r < R is row r; entry R + w is hypothesis w as it was, a candidate once it has finished.

    Attributes:
        objectives: float32 [P, R + W, J], arbitrary where not alive.
        alive: bool [P, R + W], whether the entry is a candidate.
    """

    objectives: Array
    alive: Array

    @property
    def scores(self) -> Float[Array, "P candidates"]:
        """The sums of the objectives, as `ordered` returns them."""
        return self.ordered(self.objectives.sum(axis=-1))

    @property
    def sound(self) -> Bool[Array, "P candidates"]:
        """Candidates with finite objectives."""
        return self.alive & jnp.isfinite(self.objectives).all(axis=-1)

    def ordered(self, values: Float[Array, "P candidates"]) -> Float[Array, "P candidates"]:
        """The values; the lowest finite number where they are not finite, −inf where not alive."""
        lowest = jnp.finfo(values.dtype).min
        values = jnp.where(jnp.isfinite(values), values, lowest)
        return jnp.where(self.alive, values, -jnp.inf)


@runtime_checkable
class Selector(Protocol):
    """Keeps W of the candidates. A frozen, hashable value."""

    @property
    def reorders(self) -> bool:
        """Whether a hypothesis may descend from another one; if not, no cache is moved."""
        return True

    def select(self, candidates: Candidates, hypotheses: int, successors: int) -> Int[Array, "P W"]:
        """Indices into the candidates, best first if `reorders`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Selection:
    """The chosen candidates.

    Attributes:
        candidates: What was chosen from.
        chosen: int32 [P, W], indices into the candidates.
        parents: int32 [P, W], the old hypothesis of each new one.
        rows: int32 [P, W], the row whose chunk a new hypothesis takes; any row of its parent where
            the parent had finished.
    """

    candidates: Candidates
    chosen: Array
    parents: Array
    rows: Array


def select_among(
    selector: Selector,
    rows: Float[Array, "P R J"],
    hypotheses: Float[Array, "P W J"],
    finished: Bool[Array, "P W"],
    *,
    reference_quirks: bool = False,
) -> Selection:
    """Select W of a chunk's rows and of the hypotheses that had finished before it.

    A finished hypothesis is one candidate; with reference_quirks it is K, in place of its rows.

    Args:
        selector: What selects.
        rows: float32 [P, R, J], objectives of the R = W·K rows; not read for finished hypotheses.
        hypotheses: float32 [P, W, J], objectives before the chunk.
        finished: bool [P, W], which hypotheses had finished.
        reference_quirks: As of `SearchConfig`.
    """
    width = finished.shape[1]
    count = rows.shape[1] // width
    over, stays = jnp.repeat(finished, count, axis=1), finished
    if reference_quirks:
        rows = jnp.where(over[..., None], jnp.repeat(hypotheses, count, axis=1), rows)
        over, stays = jnp.zeros_like(over), jnp.zeros_like(stays)
    objectives = jnp.concatenate([rows, hypotheses], axis=1)
    candidates = Candidates(objectives, jnp.concatenate([~over, stays], axis=1))
    chosen = selector.select(candidates, width, count)
    is_row = chosen < width * count
    parents = jnp.where(is_row, chosen // count, chosen - width * count)
    return Selection(candidates, chosen, parents, jnp.where(is_row, chosen, parents * count))


@dataclass(frozen=True)
class TopW(Selector):
    """The W candidates of highest score; ties go to the lower index."""

    def select(self, candidates: Candidates, hypotheses: int, successors: int) -> Int[Array, "P W"]:
        return jax.lax.top_k(candidates.scores, hypotheses)[1].astype(jnp.int32)


@dataclass(frozen=True)
class Maximin(Selector):
    """The W candidates of highest Σ_j w_j·V_j under the worst-case weights w of the objectives.

    w minimises log mean over the candidates of exp(scale·Σ_j w_j·V_j) on the simplex, a convex
    problem. As the scale grows, the highest Σ_j w_j·V_j tends to max_p min_j Σ_c p_c·V_cj over
    mixtures p of the candidates c. Source: RMOD, arXiv 2503.08796 eq. 8 and algorithm 1.

    Attributes:
        scale: Above 0.
        steps: Newton steps, at least 1.

    Raises:
        InputError: For a scale or steps out of range.
    """

    scale: float = 1.0
    steps: int = 60

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise InputError(f"the maximin scale is {self.scale}; it must be above 0, and finite")
        if self.steps < 1:
            raise InputError(f"the maximin steps are {self.steps}; there must be at least 1")

    def weights(self, candidates: Candidates) -> Float[Array, "P J"]:
        """The worst-case weights of each slot's objectives; they are positive and sum to 1."""
        return _worst_weights(candidates, self.scale, self.steps)

    def select(self, candidates: Candidates, hypotheses: int, successors: int) -> Int[Array, "P W"]:
        worst = jnp.einsum("pcj,pj->pc", candidates.objectives, self.weights(candidates))
        return jax.lax.top_k(candidates.ordered(worst), hypotheses)[1].astype(jnp.int32)


SHARPEST = 1e5
"""Where float32 can no longer tell the candidates' order: exp(SHARPEST·x) for x in 0 .. 1."""


@partial(jax.jit, static_argnums=(1, 2))
def _worst_weights(candidates: Candidates, scale: float, steps: int) -> Float[Array, "P J"]:
    find = partial(_worst_weights_of_slot, scale=scale, steps=steps)
    return jax.vmap(find)(candidates.objectives, candidates.sound)


def _worst_weights_of_slot(
    objectives: Float[Array, "c J"], alive: Bool[Array, " c"], *, scale: float, steps: int
) -> Float[Array, " J"]:
    """The weights w that minimise F(w) = log Σ_c exp(scale·Σ_j w_j·V_cj), without dead candidates.

    Damped Newton steps on F/scale − μ·Σ_j log w_j, with μ falling and the scale rising to its
    value: first-order steps are too slow where the values are far apart. The length of a step is
    that of least slope, since differences of F vanish in float32. The minimum is found to about
    1e-5 of the range of the objectives.
    """
    count = objectives.shape[-1]
    if count < 2:
        return jnp.ones(count, jnp.float32)
    low = jnp.where(alive[:, None], objectives, jnp.inf).min()
    spread = jnp.where(alive[:, None], objectives, -jnp.inf).max() - low
    spread = jnp.maximum(spread, 1e-6)
    values = jnp.where(alive[:, None], (objectives - low) / spread, 0.0)
    sharpest = jnp.minimum(scale * spread, SHARPEST)
    lengths = jnp.concatenate([jnp.zeros(1), 2.0 ** -jnp.arange(12.0)])

    def exponents(weights: Array, sharpness: Array) -> Array:
        return jnp.where(alive, sharpness * (weights @ values.T), -jnp.inf)

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weights, best, least = state
        # Of what the step before left, so that no rounding of its own takes it off the simplex.
        weights = weights / weights.sum()
        value = jax.nn.logsumexp(exponents(weights, sharpest))
        better = value < least
        best, least = jnp.where(better, weights, best), jnp.where(better, value, least)
        barrier = 10.0 ** -(1 + jnp.minimum(6.0, 6 * i / (0.7 * steps)))
        sharpness = jnp.minimum(sharpest, 1 / barrier)
        share = jax.nn.softmax(exponents(weights, sharpness))
        gradient = share @ values
        from_mean = (values - gradient) * weights
        hessian = sharpness * jnp.einsum("c,ci,cj->ij", share, from_mean, from_mean)
        # In the unknowns dw_j / w_j the barrier's part is μ times the identity.
        sides = jnp.stack([weights * gradient - barrier, weights], axis=1)
        solved = _solve(hessian + barrier * jnp.eye(count), sides)
        level = (weights @ solved[:, 0]) / (weights @ solved[:, 1])
        change = level * solved[:, 1] - solved[:, 0]
        within = jnp.minimum(1.0, 0.99 / jnp.maximum((-change).max(), 1e-9))
        factors = 1 + (within * lengths)[:, None] * change
        tried = weights * factors
        tried = tried / tried.sum(axis=-1, keepdims=True)
        gradients = jax.nn.softmax(exponents(tried, sharpness), axis=-1) @ values - gradient.mean()
        slopes = (gradients * weights - barrier / factors) @ change
        return tried[jnp.argmin(jnp.abs(slopes))], best, least

    even = jnp.full(count, 1 / count, jnp.float32)
    return jax.lax.fori_loop(0, steps, step, (even, even, jnp.float32(jnp.inf)))[1]


def _solve(matrix: Float[Array, "J J"], sides: Float[Array, "J n"]) -> Float[Array, "J n"]:
    """Gauss–Jordan for a small positive definite matrix: unlike LAPACK's, it can be sharded."""
    rows = jnp.concatenate([matrix, sides], axis=1)
    for i in range(len(matrix)):
        pivot = rows[i] / rows[i, i]
        rows = (rows - rows[:, i : i + 1] * pivot).at[i].set(pivot)
    return rows[:, len(matrix) :]


@dataclass(frozen=True)
class KeepAll(Selector):
    """Every hypothesis continues with its only successor, or stays as it is once finished.

    With W = N and K = 1 this is N independent samples: the best of them is best-of-N.
    """

    @property
    def reorders(self) -> bool:
        return False

    def select(self, candidates: Candidates, hypotheses: int, successors: int) -> Int[Array, "P W"]:
        if successors != 1:
            raise ValueError(f"KeepAll keeps one successor a hypothesis, not {successors}")
        own = jnp.arange(hypotheses, dtype=jnp.int32)
        return jnp.where(candidates.alive[:, :hypotheses], own, own + hypotheses)
