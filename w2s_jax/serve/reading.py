"""What a search has found, as the choices of a job and as the text that a stream may say."""

from typing import Any

from w2s_jax.search.results import Hypothesis, SearchResult
from w2s_jax.serve.events import Choice
from w2s_jax.serve.jobs import Job
from w2s_jax.serve.pieces import settled, shared
from w2s_jax.text.prompts import response_end


def choices_of(tokenizer: Any, job: Job, result: SearchResult) -> tuple[Choice, ...]:
    """The choices of a job whose search has ended."""

    def choice(hypothesis: Hypothesis) -> Choice:
        ended_by = "length"
        if hypothesis.finished:
            is_eos = bool(hypothesis.tokens) and hypothesis.tokens[-1] in job.ends
            ended_by = "eos" if is_eos else "stop"
        text, stop = _text(tokenizer, job, hypothesis)
        score = hypothesis.score if job.chooses else None
        return Choice(text, hypothesis.tokens, ended_by, score, stop=stop)

    return tuple(choice(hypothesis) for hypothesis in result.hypotheses[: job.choices])


def settled_texts(tokenizer: Any, job: Job, result: SearchResult) -> tuple[str, ...]:
    """Of each choice of a job that runs, the text that will not change any more."""
    texts = []
    for hypothesis in result.hypotheses:
        text, _ = _text(tokenizer, job, hypothesis)
        texts.append(text if hypothesis.finished else settled(text, job.request.stop))
    return (shared(texts),) * job.choices if job.chooses else tuple(texts)


def _text(tokenizer: Any, job: Job, hypothesis: Hypothesis) -> tuple[str, str | None]:
    """A hypothesis' text and the stop string that ended it."""
    return response_end(
        tokenizer,
        job.prompt,
        hypothesis.tokens,
        finished=hypothesis.finished,
        stop=job.request.stop,
        behind=hypothesis.behind,
        eos_ids=job.ends,
    )
