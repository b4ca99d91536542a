"""Search over rows: conversations in, answers out, every finished row in a journal at once.

A row is searched by a policy in this process, which guides and scorers steer (`SteeredPolicy`), or
by one that only gives text (`TextPolicy`). Reads no checkpoint, no file of rows, and opens no
connection.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from jax.sharding import Mesh

from w2s_jax.errors import InputError, RowsFailed
from w2s_jax.search.checkpoints import Steering, SteeringPlan
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.model_scorers import TextLogRatio
from w2s_jax.search.results import (
    TRACE,
    ChunkTrace,
    Hypothesis,
    Request,
    SearchResult,
    hypothesis_text,
    trace_row,
)
from w2s_jax.search.run import search_all
from w2s_jax.search.scorers import TextScorer
from w2s_jax.search.text_run import TextProposer, TextResult, search_texts
from w2s_jax.text.prompts import Conversation, conversation_of, decode_tokens, plain, token_texts
from w2s_jax.text.rows import Journal, Row

Prompts = tuple[tuple[int, ...], ...]
OnChunk = Callable[[ChunkTrace], None] | None
OnResult = Callable[[Any], None]


@dataclass(frozen=True)
class Questions:
    """The rows of a file with their conversations, and their prompts as the models read them.

    Attributes:
        prompts: for each row one sequence of token ids for all members, or one each; none for a
            policy that gives text.
        source: what rows are called in messages, before their number.
    """

    rows: Sequence[Row]
    conversations: Sequence[Conversation]
    prompts: Sequence[Prompts] = ()
    source: str = "row"


def read_questions(rows: Sequence[Row], source: str) -> Questions:
    """The rows with the conversation of each; InputError names one without as "SOURCE NUMBER"."""
    talks = [conversation_of(row, f"{source} {number}") for number, row in enumerate(rows, start=1)]
    return Questions(rows, talks, source=source)


def encode_questions(
    plan: SteeringPlan,
    rows: Sequence[Row],
    source: str,
    *,
    max_new_tokens: int,
    read: Callable[[Conversation], Any] | None = None,
) -> Questions:
    """Every row as the models of a plan read it, or as `read` does.

    Raises InputError, naming the row as "SOURCE NUMBER", for one without a conversation, a template
    that fails, and a prompt that leaves too few positions in a model.
    """
    questions, prompts = read_questions(rows, source), []
    for number, conversation in enumerate(questions.conversations, start=1):
        where = f"{source} {number}"
        try:
            prompts.append((read or plan.prompts)(conversation))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        plan.check_length(conversation, max_new_tokens, where)
    return replace(questions, prompts=prompts)


@dataclass(frozen=True)
class SteeredPolicy:
    """A policy in this process with what steers it.

    names: what to call the objectives of a hypothesis; called: what to call the models in messages.
    """

    plan: SteeringPlan
    steering: Steering
    config: SearchConfig
    mesh: Mesh | None = None

    @property
    def names(self) -> Sequence[str]:
        return self.steering.names

    @property
    def called(self) -> Mapping[str, str]:
        return self.plan.called_members()

    def search(
        self, questions: Questions, waiting: Sequence[int], on_result: OnResult, on_chunk: OnChunk
    ) -> object:
        """Search the rows of these indices, which are their ids."""
        assert self.steering.models is not None
        prompts, talks, seed = questions.prompts, questions.conversations, self.config.seed
        return search_all(
            self.steering.models,
            self.config,
            [Request(index, prompts[index], talks[index], seed=seed) for index in waiting],
            scorers=self.steering.scorers,
            decode=partial(decode_tokens, self.plan.tokenizer),
            on_result=on_result,
            on_chunk=on_chunk,
            mesh=self.mesh,
        )

    def render(self, conversation: Conversation) -> str:
        """A conversation as the text that a response follows."""
        return self.plan.templates["policy"].render(conversation)

    def responses(self, questions: Questions, result: SearchResult) -> list[str]:
        """The text of every hypothesis as it was scored, best first."""
        prompt = questions.prompts[result.row_id][0]
        return [self._response(prompt, found) for found in result.hypotheses]

    def _response(self, prompt: Sequence[int], found: Hypothesis) -> str:
        if self.config.reference_quirks:  # an EOS is scored behind what its length ended, too
            found = replace(found, finished=True)
        stop, tokenizer = self.config.stop, self.plan.tokenizer
        return hypothesis_text(tokenizer, prompt, found, stop=stop, eos_ids=self._eos_ids)

    @property
    def _eos_ids(self) -> tuple[int, ...]:
        return self.config.eos_ids or self.plan.eos_ids

    def best_tokens(
        self, questions: Questions, result: SearchResult, response: str
    ) -> list[tuple[str, float]]:
        """Each token of the best response with what the guides add for it.

        By the guides on tokens or, where there is none, as `guide_tokens` gives them.
        """
        best, index = result.best, result.row_id
        if self.steering.models is not None and self.steering.models.guides:
            decode = partial(decode_tokens, self.plan.tokenizer)
            texts = token_texts(decode, questions.prompts[index][0], best.tokens)
            return list(zip(texts, best.token_scores, strict=True))
        ended = bool(best.tokens) and best.tokens[-1] in self._eos_ids
        conversation = questions.conversations[index]
        return guide_tokens(self.steering.scorers, conversation, response, finished=ended)


@dataclass(frozen=True)
class TextPolicy:
    """A policy that only gives text; `write` is how it reads a conversation."""

    proposer: TextProposer
    scorers: Sequence[TextScorer]
    config: SearchConfig
    names: Sequence[str] = ()
    write: Callable[[Conversation], str] = plain
    called: Mapping[str, str] = field(default_factory=dict)

    def search(
        self, questions: Questions, waiting: Sequence[int], on_result: OnResult, on_chunk: OnChunk
    ) -> object:
        """Search the rows of these indices, which are their ids."""
        return search_texts(
            self.proposer,
            self.scorers,
            [questions.conversations[index] for index in waiting],
            self.config,
            row_ids=waiting,
            on_result=on_result,
            on_chunk=on_chunk,
        )

    def render(self, conversation: Conversation) -> str:
        """A conversation as the text that a response follows."""
        return self.write(conversation)

    def responses(self, questions: Questions, result: TextResult) -> list[str]:
        """The text of every hypothesis, best first."""
        return [found.response for found in result.hypotheses]

    def best_tokens(
        self, questions: Questions, result: TextResult, response: str
    ) -> list[tuple[str, float]]:
        """Each token of the best response with what the guide adds for it (`guide_tokens`)."""
        conversation = questions.conversations[result.row_id]
        return guide_tokens(self.scorers, conversation, response, finished=result.best.by_eos)


RowPolicy = SteeredPolicy | TextPolicy
"""What rows are searched with."""


def guide_tokens(
    scorers: Sequence[TextScorer], conversation: Conversation, response: str, *, finished: bool
) -> list[tuple[str, float]]:
    """Each token of a response with what the first guide on texts adds, in its own tokens."""
    for scorer in scorers:
        if isinstance(scorer, TextLogRatio):
            return scorer.token_ratios(conversation, response, finished=finished)
    return []


def search_rows(
    policy: RowPolicy,
    questions: Questions,
    journal: Journal,
    *,
    method: str = "",
    traced: bool = False,
    on_row: Callable[[Row | None], None] = lambda row: None,
) -> None:
    """Search every row that the journal does not hold yet; `on_row` is called with each answer.

    On several hosts, each writes its share of the rows, and `on_row` is called with None for the
    others'. The row's index is its id, so that its draws do not depend on where an earlier run
    stopped. Where `traced`, a row's field "trace" tells what its search looked at (see
    `results.py`), under the method's name. What is finished stays in the journal when the search
    fails. Raises RowsFailed, once all others are in the journal, for rows that a model fails,
    naming it, and InputError as `search` and `search_texts` do.
    """
    finished = journal.read()
    waiting = [index for index in range(len(questions.rows)) if index not in finished]
    chunks: dict[int, list[ChunkTrace]] = {}

    def note(chunk: ChunkTrace) -> None:
        chunks.setdefault(chunk.row_id, []).append(chunk)

    def keep(result: Any) -> None:
        index = result.row_id
        responses = policy.responses(questions, result)
        # All hosts take part, as models may be asked.
        tokens = policy.best_tokens(questions, result, responses[0]) if traced else []
        seen = chunks.pop(index, [])
        if not journal.is_own(index):
            on_row(None)
            return
        objectives = [found.objectives for found in result.hypotheses]
        pairs = list(zip(responses, objectives, strict=True))
        scores = [found.score for found in result.hypotheses]
        row = answer_row(questions.rows[index], pairs, scores, policy.names)
        if traced:
            prompt = policy.render(questions.conversations[index])
            told = (row, method, seen, tokens, result.best.token_count)
            row = row | {TRACE: trace_row(index, prompt, *told)}
        journal.append(index, row)
        on_row(row)

    try:
        policy.search(questions, waiting, keep, note if traced else None)
    except RowsFailed as failed:
        where = questions.source
        raise failed.named(policy.called, where=where, number=lambda index: index + 1) from None


def answer_row(
    row: Row,
    hypotheses: Sequence[tuple[str, Sequence[float]]],
    scores: Sequence[float],
    names: Sequence[str],
) -> Row:
    """The output row of responses (with the objectives of each) and their scores, best first.

    Where there are several objectives, a hypothesis holds them by name. An input field called
    response, score, hypotheses or trace is overwritten.
    """
    kept: list[Row] = []
    for (response, objectives), score in zip(hypotheses, scores, strict=True):
        kept.append({"response": response, "score": score})
        if len(objectives) > 1 and len(names) == len(objectives):
            kept[-1]["objectives"] = dict(zip(names, objectives, strict=True))
    prompt = {"prompt": row["prompt"]} if "prompt" in row else {}
    best = {name: kept[0][name] for name in ("response", "score")}
    found = {**prompt, **best, "hypotheses": kept}
    return found | {name: row[name] for name in row if name not in found and name != TRACE}
