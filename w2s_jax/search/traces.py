"""What a search looked at, as rows for a report: JSON-serialisable, one a prompt."""

from collections.abc import Sequence
from typing import Any

from w2s_jax.search.results import ChunkTrace

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
