"""Search over rows of a file: text in, text out, every finished row in a journal at once.

Reads no checkpoint, no file of rows, and opens no connection.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from jax.sharding import Mesh

from w2s_jax.errors import InputError, RowsFailed
from w2s_jax.search.checkpoints import Steering, SteeringPlan
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.model_scorers import TextLogRatio
from w2s_jax.search.results import (
    TRACE,
    ChunkTrace,
    Hypothesis,
    SearchResult,
    hypothesis_text,
    trace_row,
)
from w2s_jax.search.run import of_guides, search
from w2s_jax.search.text_run import TextProposer, TextResult, search_texts
from w2s_jax.search.texts import TextScorer
from w2s_jax.text.conversations import Conversation, conversation_of, plain
from w2s_jax.text.journal import Journal
from w2s_jax.text.prompts import decode_tokens, token_texts
from w2s_jax.text.rows import Row

Prompts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Questions:
    """The rows of a file with their conversations, and their prompts as the models read them.

    prompts: for each row one sequence of token ids for all members, or one each. source: what rows
    are called in messages, before their number.
    """

    rows: Sequence[Row]
    conversations: Sequence[Conversation]
    prompts: Sequence[Prompts]
    source: str = "row"


def read_conversations(rows: Sequence[Row], source: str) -> list[Conversation]:
    """The conversation of every row; InputError names it as "SOURCE NUMBER"."""
    return [conversation_of(row, f"{source} {number}") for number, row in enumerate(rows, start=1)]


def encode_questions(
    plan: SteeringPlan, rows: Sequence[Row], source: str, *, max_new_tokens: int
) -> Questions:
    """Every row as the models of a plan read it.

    Raises InputError, naming the row as "SOURCE NUMBER", for one without a conversation, a template
    that fails, and a prompt that leaves too few positions in a model.
    """
    conversations = read_conversations(rows, source)
    prompts = []
    for number, conversation in enumerate(conversations, start=1):
        where = f"{source} {number}"
        try:
            prompts.append(plan.prompts(conversation))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        plan.check_length(conversation, max_new_tokens, where)
    return Questions(rows, conversations, prompts, source)


def search_rows(
    plan: SteeringPlan,
    steering: Steering,
    questions: Questions,
    config: SearchConfig,
    journal: Journal,
    *,
    method: str = "",
    traced: bool = False,
    on_row: Callable[[Row | None], None] = lambda row: None,
    mesh: Mesh | None = None,
) -> None:
    """Search every row that the journal does not hold yet; `on_row` is called with each answer.

    On several hosts, each writes its share of the rows, and `on_row` is called with None for the
    others'. The row's index is its id, so that its draws do not depend on where an earlier run
    stopped. Where `traced`, a row's field "trace" tells what its search looked at (see
    `results.py`), under the method's name. Raises RowsFailed, once all others are in the journal,
    for rows that a model fails, naming it, and InputError as `search` does.
    """
    assert steering.models is not None
    finished = journal.read()
    waiting = [index for index in range(len(questions.rows)) if index not in finished]
    chunks: dict[int, list[ChunkTrace]] = {}

    def keep(result: SearchResult) -> None:
        index = result.row_id
        # All hosts take part, as models may be asked.
        tokens = winner_tokens(plan, steering, questions, result, config) if traced else []
        if not journal.is_own(index):
            chunks.pop(index, None)
            on_row(None)
            return
        row = answer(plan, steering, questions, result, config)
        if traced:
            prompt = plan.templates["policy"].render(questions.conversations[index])
            told = (row, method, chunks.pop(index, []), tokens, len(result.best.tokens))
            row = row | {TRACE: trace_row(index, prompt, *told)}
        journal.append(index, row)
        on_row(row)

    prompts = [questions.prompts[index] for index in waiting]
    try:
        search(
            steering.models.policy,
            steering.models.guides,
            [own[0] for own in prompts],
            config,
            guide_prompts=of_guides(prompts, len(steering.models.members)),
            scorers=steering.scorers,
            conversations=[questions.conversations[index] for index in waiting],
            row_ids=waiting,
            decode=partial(decode_tokens, plan.tokenizer),
            on_result=keep,
            on_chunk=(lambda chunk: chunks.setdefault(chunk.row_id, []).append(chunk))
            if traced
            else None,
            mesh=mesh,
        )
    except RowsFailed as failed:
        names = plan.called_members()
        raise failed.named(names, where=questions.source, number=_number) from None


def _number(index: int) -> int:
    return index + 1


def answer(
    plan: SteeringPlan,
    steering: Steering,
    questions: Questions,
    result: SearchResult,
    config: SearchConfig,
) -> Row:
    """The output row of a result: its best response and score, all hypotheses, the input fields."""
    prompt = questions.prompts[result.row_id][0]
    responses = [_response(plan, prompt, found, config) for found in result.hypotheses]
    return answer_row(
        questions.rows[result.row_id],
        [
            (response, found.objectives)
            for response, found in zip(responses, result.hypotheses, strict=True)
        ],
        [found.score for found in result.hypotheses],
        steering.names,
    )


def _response(
    plan: SteeringPlan, prompt: Sequence[int], hypothesis: Hypothesis, config: SearchConfig
) -> str:
    """The text of a response as it was scored."""
    if config.reference_quirks:  # an EOS is scored behind what its length ended, too
        hypothesis = replace(hypothesis, finished=True)
    eos_ids = config.eos_ids or plan.eos_ids
    return hypothesis_text(plan.tokenizer, prompt, hypothesis, stop=config.stop, eos_ids=eos_ids)


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


def winner_tokens(
    plan: SteeringPlan,
    steering: Steering,
    questions: Questions,
    result: SearchResult,
    config: SearchConfig,
) -> list[tuple[str, float]]:
    """Each token of the best response with what the guides add for it.

    By the guides on tokens or, where there is none, by the first guide on texts, in its own tokens.
    """
    best, index = result.best, result.row_id
    decode = partial(decode_tokens, plan.tokenizer)
    if steering.models is not None and steering.models.guides:
        texts = token_texts(decode, questions.prompts[index][0], best.tokens)
        return list(zip(texts, best.token_scores, strict=True))
    readers = [scorer for scorer in steering.scorers if isinstance(scorer, TextLogRatio)]
    if not readers:
        return []
    response = _response(plan, questions.prompts[index][0], best, config)
    ended = bool(best.tokens) and best.tokens[-1] in (config.eos_ids or plan.eos_ids)
    return readers[0].token_ratios(questions.conversations[index], response, finished=ended)


def search_text_rows(
    proposer: TextProposer,
    scorers: Sequence[TextScorer],
    rows: Sequence[Row],
    config: SearchConfig,
    journal: Journal,
    *,
    source: str,
    method: str = "",
    names: Sequence[str] = (),
    traced: bool = False,
    render: Callable[[Conversation], str] = plain,
    on_row: Callable[[Row], None] = lambda row: None,
) -> None:
    """Search every row that the journal does not hold yet; on_row is called with each answer.

    The row's index is its id, so that its draws do not depend on where an earlier run stopped.
    names are those of the scorers. What is finished stays in the journal when the search fails.
    Where `traced`, a row's field "trace" tells what its search looked at (see `results.py`), under
    the method's name and the prompt as `render` writes it. Raises InputError, naming it as "SOURCE
    NUMBER", for a row without a conversation, and as `search_texts` does; RowsFailed names rows so.
    """
    conversations = read_conversations(rows, source)
    finished = journal.read()
    waiting = [index for index in range(len(rows)) if index not in finished]
    chunks: dict[int, list[ChunkTrace]] = {}

    def note(chunk: ChunkTrace) -> None:
        chunks.setdefault(chunk.row_id, []).append(chunk)

    def keep(result: TextResult) -> None:
        index = result.row_id
        found = [(each.response, each.objectives) for each in result.hypotheses]
        row = answer_row(rows[index], found, [each.score for each in result.hypotheses], names)
        if traced:
            tokens = _winner_tokens(scorers, conversations[index], result)
            told = (row, method, chunks.pop(index, []), tokens, result.best.tokens)
            row = row | {TRACE: trace_row(index, render(conversations[index]), *told)}
        journal.append(index, row)
        on_row(row)

    try:
        search_texts(
            proposer,
            scorers,
            [conversations[index] for index in waiting],
            config,
            row_ids=waiting,
            on_result=keep,
            on_chunk=note if traced else None,
        )
    except RowsFailed as failed:
        raise failed.named({}, where=source, number=lambda index: index + 1) from None


def _winner_tokens(
    scorers: Sequence[TextScorer], conversation: Conversation, result: TextResult
) -> list[tuple[str, float]]:
    """Each token of the best response with what the first guide adds for it, in its own tokens."""
    best = result.best
    for scorer in scorers:
        if isinstance(scorer, TextLogRatio):
            return scorer.token_ratios(conversation, best.response, finished=best.by_eos)
    return []
