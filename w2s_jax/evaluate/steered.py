"""A policy with what steers it, as an evaluation asks of it: likelihoods of text, and text.

Knows nothing of any harness; `harness.py` shows one of these to lm-eval.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from jax.sharding import Mesh

from w2s_jax.errors import InputError
from w2s_jax.evaluate.config import SteeredConfig
from w2s_jax.ops.logits import Sampling
from w2s_jax.search.checkpoints import Steering, SteeringPlan, load, plan
from w2s_jax.search.compile import compiled_beside
from w2s_jax.search.config import SearchConfig, preset
from w2s_jax.search.likelihood import Response, ScoredResponse, score_responses
from w2s_jax.search.models import SearchModels
from w2s_jax.search.results import Request, SearchResult
from w2s_jax.search.session import hypothesis_text, search_all
from w2s_jax.text.prompts import Conversation, decode_tokens, special_stops

WITH_LIKELIHOOD = ("sample", "eft")
CHOOSING = ("cbs", "bon", "ivg")

Prompts = tuple[tuple[int, ...], ...]
"""Token ids: one prompt for all models on the policy's tokens, or one each."""


@dataclass(frozen=True)
class Decoding:
    """How one text is to be written: where it ends, how long it is at most, how it is drawn."""

    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Question:
    """What a text answers. row_id decides its draws, together with the config's seed."""

    row_id: int
    prompts: Prompts
    conversation: Conversation


@dataclass(frozen=True)
class Steered:
    """A policy and its guides, loaded, and the method that they are used by.

    config holds the method's settings; where a text ends, its length and its sampling come with
    each text. batch_size rows run side by side. notes: lines on how the models are used.
    """

    plan: SteeringPlan
    steering: Steering
    method: str
    config: SearchConfig
    batch_size: int = 8
    mesh: Mesh | None = None
    notes: tuple[str, ...] = ()

    @property
    def models(self) -> SearchModels:
        """The policy and the guides on its tokens."""
        assert self.steering.models is not None
        return self.steering.models

    @property
    def max_length(self) -> int:
        """Tokens that every model has positions for."""
        return min(config.max_positions for config in self.plan.configs.values())

    def check_likelihood(self) -> None:
        """Raise InputError for a method that chooses among samples: it has no likelihood."""
        if self.method not in WITH_LIKELIHOOD:
            raise InputError(
                f"--method {self.method} has no likelihood: it chooses among samples; tasks of "
                f"likelihoods need {' or '.join(WITH_LIKELIHOOD)}, {self.method} takes those "
                "that generate"
            )

    def likelihoods(
        self,
        pairs: Sequence[tuple[Prompts, Sequence[int]]],
        on_scored: Callable[[int, ScoredResponse], None] = lambda index, scored: None,
    ) -> list[ScoredResponse]:
        """Likelihoods of (prompts, response) token ids under the policy or the EFT mixture.

        Args:
            pairs: The prompts of all models on the policy's tokens, and the response, each.
            on_scored: Hears each one, with its index, as soon as it is there.

        Raises:
            InputError: As `check_likelihood` and `score_responses` do.
        """
        self.check_likelihood()
        rows = [Response(prompts, tuple(response)) for prompts, response in pairs]
        proposer, size = self.config.proposer, self.batch_size
        return score_responses(self.models, proposer, rows, batch_size=size, on_scored=on_scored)

    def generate(
        self,
        questions: Sequence[Question],
        decoding: Decoding,
        on_text: Callable[[int, str], None] = lambda row_id, text: None,
    ) -> list[str]:
        """The best response to each question, up to its end; row ids must differ.

        Args:
            questions: What is answered.
            decoding: How all of them are decoded.
            on_text: Hears each one, with its row id, as it is done.

        Raises:
            InputError: As `search` does.
        """
        tokenizer = self.plan.tokenizer
        texts, ids = special_stops(tokenizer, decoding.stop)
        config = replace(
            self.config,
            chunk_length=self._chunk_length(decoding.max_new_tokens),
            max_new_tokens=decoding.max_new_tokens,
            sampling=decoding.sampling,
            stop=texts,
            eos_ids=(*self.plan.eos_ids, *ids),
            slots=min(self.batch_size, len(questions)),
        )
        policys = {question.row_id: question.prompts[0] for question in questions}

        def text(result: SearchResult) -> str:
            ends: dict[str, Any] = {"stop": texts, "eos_ids": config.eos_ids or ()}
            return hypothesis_text(tokenizer, policys[result.row_id], result.best, **ends)

        results = search_all(
            self.models,
            config,
            [Request(q.row_id, q.prompts, q.conversation, seed=config.seed) for q in questions],
            scorers=self.steering.scorers,
            decode=partial(decode_tokens, tokenizer),
            on_result=lambda result: on_text(result.row_id, text(result)),
            mesh=self.mesh,
            beside=compiled_beside,
        )
        return [text(result) for result in results]

    def _chunk_length(self, max_new_tokens: int) -> int:
        """The config's L; what suits the length for methods that have no chunks of their own."""
        if self.method in ("cbs", "ivg"):
            return self.config.chunk_length
        return preset(self.method, max_new_tokens=max_new_tokens).chunk_length


def prepare_steered(config: SteeredConfig) -> Callable[[], Steered]:
    """Check the settings; what is returned reads the checkpoints that the method needs.

    Raises:
        InputError: For settings that are wrong; what is returned raises it where a checkpoint is
            missing or wrong, and for vocabularies that differ where the method needs one.
    """
    places, method = config.places(), config.method
    settings = replace(config.search_config(), policy_cache=config.policy_cache)
    sources = config.sources(guided=method != "sample")

    def load_steered() -> Steered:
        if sources.policy is None:
            raise InputError("--policy is missing: name the checkpoint that writes")
        if method != "sample" and not sources.guides:
            raise InputError(f"--method {method} needs --tuned and --untuned")
        looked_at = plan(sources, needs_tokens=f"--method {method}" if config.mixes else "")
        steering = load(looked_at, dtype=config.weights_dtype, places=places)
        notes = (*looked_at.notes(), *places.notes(looked_at.configs))
        return Steered(looked_at, steering, method, settings, config.batch_size, places.mesh, notes)

    return load_steered
