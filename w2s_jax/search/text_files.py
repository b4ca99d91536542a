"""The text search over rows of a file: every finished row goes into a journal at once.

As `files.py` does for policies in this process; reads no file of rows and opens no connection.
"""

from collections.abc import Callable, Sequence

from w2s_jax.errors import RowsFailed
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.files import answer_row, read_conversations
from w2s_jax.search.judges import TextLogRatio
from w2s_jax.search.results import ChunkTrace
from w2s_jax.search.text_run import TextProposer, TextResult, search_texts
from w2s_jax.search.texts import TextScorer
from w2s_jax.search.traces import TRACE, trace_row
from w2s_jax.text.conversations import Conversation, plain
from w2s_jax.text.host_journal import HostJournal
from w2s_jax.text.journal import Journal
from w2s_jax.text.rows import Row


def search_text_rows(
    proposer: TextProposer,
    scorers: Sequence[TextScorer],
    rows: Sequence[Row],
    config: SearchConfig,
    journal: Journal | HostJournal,
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
    Where `traced`, a row's field "trace" tells what its search looked at (see `traces.py`), under
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
