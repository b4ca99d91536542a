"""What goes into a search and what comes out of it, as plain values on the host.

A trace is what a search looked at, as JSON-serialisable rows for a report, one a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from w2s_jax.text.prompts import Conversation, response_end

Number = float | int


@dataclass(frozen=True)
class Request:
    """A prompt for a slot.

    prompts: its token ids, one sequence for all members of the models or one each (policy, tuned 0,
    untuned 0, ...). conversation: the same for scorers of texts. stop: strings that end a response.
    seed and row_id decide the draws, together with what is added to the position in the response
    and to the lane of each. limit, temperature, top_p and beta take the places of the config's
    numbers (a limit is at most max_new_tokens).
    """

    row_id: int
    prompts: tuple[tuple[int, ...], ...]
    conversation: Conversation | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    limit: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    beta: Number | None = None
    position: int = 0
    lane: int = 0


@dataclass(frozen=True)
class Hypothesis:
    """A response: its token ids, an EOS included, and its score, the sum of its objectives.

    finished: EOS or a stop string ended it; otherwise max_new_tokens did. token_scores: what each
    token added, where the scorer is one on tokens. behind: where a stop string ended it, what was
    written after it: the last token that counts may hold the beginning of that string.
    """

    tokens: tuple[int, ...]
    score: float
    finished: bool
    objectives: tuple[float, ...] = ()
    token_scores: tuple[float, ...] = ()
    behind: tuple[int, ...] = ()

    @property
    def token_count(self) -> int:
        """How many tokens it has."""
        return len(self.tokens)


def hypothesis_text(
    tokenizer: Any,
    prompt: Sequence[int],
    hypothesis: Hypothesis,
    *,
    stop: Sequence[str] = (),
    eos_ids: Sequence[int] = (),
) -> str:
    """The text of a hypothesis behind its prompt's token ids, without what ended it.

    stop, eos_ids: what ends responses beside the EOS that the tokenizer knows.
    """
    text, _ = response_end(
        tokenizer,
        prompt,
        hypothesis.tokens,
        finished=hypothesis.finished,
        stop=stop,
        behind=hypothesis.behind,
        eos_ids=eos_ids,
    )
    return text


@dataclass(frozen=True)
class SearchResult:
    """What a prompt's search kept, best first."""

    row_id: int
    hypotheses: tuple[Hypothesis, ...]

    @property
    def best(self) -> Hypothesis:
        """The first: of highest score, unless the selector weighs objectives otherwise."""
        return self.hypotheses[0]


@dataclass(frozen=True)
class ChunkTrace:
    """What one chunk of one prompt offered, and what was kept of it.

    For each of c candidates: parents, the place of the hypothesis it continues; texts, what it
    adds to it (nothing where a finished hypothesis is carried over); objectives float32 [c, J];
    finished; kept, its place among the new hypotheses or −1.
    """

    row_id: int
    parents: tuple[int, ...]
    texts: tuple[str, ...]
    objectives: np.ndarray
    finished: tuple[bool, ...]
    kept: tuple[int, ...]


TRACE = "trace"
"""The field of a journal's row that holds its trace."""


def chunk_row(chunk: ChunkTrace) -> dict[str, Any]:
    """One chunk: {"candidates": [{parent, text, score, objectives, kept, finished}]}.

    kept is the place among the new hypotheses, None for what was dropped.
    """
    objectives = chunk.objectives.tolist()
    return {
        "candidates": [
            {
                "parent": parent,
                "text": text,
                "score": sum(values),
                "objectives": values,
                "kept": None if kept < 0 else kept,
                "finished": finished,
            }
            for parent, text, values, kept, finished in zip(
                chunk.parents, chunk.texts, objectives, chunk.kept, chunk.finished, strict=True
            )
        ]
    }


def trace_row(
    row_id: int,
    prompt: str,
    answer: dict[str, Any],
    method: str,
    chunks: Sequence[ChunkTrace],
    tokens: Sequence[tuple[str, float]],
    policy_tokens: int,
) -> dict[str, Any]:
    """A prompt's trace: its chunks, and the winner's tokens with their log-ratios.

    Those are as the guide reads them; policy_tokens: how many the policy wrote.
    """
    return {
        "row_id": row_id,
        "prompt": prompt,
        "response": answer["response"],
        "score": answer["score"],
        "method": method,
        "chunks": [chunk_row(chunk) for chunk in chunks],
        "tokens": [[text, value] for text, value in tokens],
        "policy_tokens": policy_tokens,
    }
