"""Which tokens are scored for a job's log-probs, and which jobs are scored together."""

from collections.abc import Sequence

from w2s_jax.search.likelihood import Response, Shape, padded_shape
from w2s_jax.search.proposers import EFTProposer, PolicyProposer, Proposer
from w2s_jax.serve.events import Choice
from w2s_jax.serve.jobs import Job

Kind = tuple[type, Shape]
"""A proposer and the shape of what is scored."""


def proposer_of(job: Job) -> Proposer:
    """What a job's responses were sampled from; its beta comes with each response."""
    return EFTProposer() if job.method == "eft" else PolicyProposer()


def responses_of(job: Job, choices: Sequence[Choice]) -> list[Response | None]:
    """What is to be scored of each choice, an echoed prompt included; None for no tokens."""
    request = job.request
    beta = None if request.beta is None else float(request.beta)
    rows: list[Response | None] = []
    for choice in choices:
        prompts, tokens = request.prompts, choice.tokens
        if job.echo is not None:
            tokens = (*prompts[0][1:], *tokens)
            prompts = (prompts[0][:1],)
        rows.append(Response(prompts, tokens, beta) if tokens else None)
    return rows


def kind_of(job: Job, choices: Sequence[Choice]) -> Kind:
    """Jobs of one kind are scored by one program; some choice must have tokens."""
    rows = [row for row in responses_of(job, choices) if row]
    return type(proposer_of(job)), padded_shape(rows)
