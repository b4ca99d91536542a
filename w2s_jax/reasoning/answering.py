"""One model's responses to a file of questions, in a process that holds a device of its own.

    python -m w2s_jax.reasoning.answering FOLDER/answering.json

The file holds the fields of `Answering`. What is in the responses is for `grading.py`.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w2s_jax.errors import InputError
from w2s_jax.reasoning.generation import GenerationConfig, generate
from w2s_jax.reasoning.questions import (
    Demonstration,
    Overflow,
    fit_prompts,
    read_demonstrations,
    read_questions,
)
from w2s_jax.text.prompts import encode_prompt
from w2s_jax.text.rows import Row
from w2s_jax.text.typed_yaml import from_mapping

if TYPE_CHECKING:
    from w2s_jax.search.checkpoints import SteeringPlan


@dataclass(frozen=True)
class Answering:
    """A model, what it answers, and where its responses go.

    model: a checkpoint or an adapter's folder. questions, demonstrations: files; ids: as
    `read_questions` takes them. tuned, untuned: the guide of `generation.method` cbs. output: the
    file of responses. weights: JSON values that tell these weights from others'.
    """

    model: str
    questions: str
    output: str
    generation: GenerationConfig
    ids: str = "own"
    demonstrations: str | None = None
    overflow: Overflow = "error"
    tuned: str | None = None
    untuned: str | None = None
    dtype: str | None = None
    mesh: str | None = None
    weights: str = ""


def answer(task: Answering) -> list[Row]:
    """The responses, as `generate` gives them; goes on from what a killed call has written.

    Raises InputError for files and checkpoints that cannot be read, models without one vocabulary,
    and as `fit_prompts` and `generate` do.
    """
    from tqdm import tqdm

    from w2s_jax.ops.sharding import make_mesh
    from w2s_jax.search.checkpoints import load
    from w2s_jax.search.models import ONE_DEVICE, Places

    planned = _planned(task)
    rows = _prompts(task, planned.tokenizer, planned.configs)
    places = ONE_DEVICE if task.mesh is None else Places(make_mesh(task.mesh))
    models = load(planned, dtype=task.dtype, places=places).models
    assert models is not None
    quiet = not sys.stderr.isatty()
    with tqdm(
        total=None, desc=Path(task.output).parent.name, unit="response", disable=quiet
    ) as bar:

        def progress(done: int, count: int) -> None:
            bar.total = count
            bar.update(done - bar.n)

        return generate(
            models.policy,
            planned.tokenizer,
            rows,
            task.generation,
            task.output,
            progress,
            guide=models.guides or None,
            source=task.questions,
            identity={"weights": task.weights},
            mesh=places.mesh,
        )


def check_prompts(task: Answering, count: int | None = None) -> None:
    """Whether a task's models can be asked its questions; reads tokenizers and configs alone.

    count: of the demonstrations, how many of the first; None takes all. Raises InputError as
    `answer` does for files, vocabularies and prompts.
    """
    planned = _planned(task)
    _prompts(task, planned.tokenizer, planned.configs, count)


def _planned(task: Answering) -> "SteeringPlan":
    from w2s_jax.search.checkpoints import GuideSource, Sources, plan

    guides: tuple[GuideSource, ...] = ()
    if task.tuned is not None and task.untuned is not None:
        guides = (GuideSource(task.tuned, task.untuned),)
    return plan(Sources(task.model, guides, score_on="tokens" if guides else "auto"))


def _prompts(
    task: Answering, tokenizer: Any, configs: Mapping[str, Any], count: int | None = None
) -> list[Row]:
    questions = read_questions(task.questions, ids=task.ids)  # type: ignore[arg-type]
    shown: tuple[Demonstration, ...] = ()
    if task.demonstrations is not None:
        shown = read_demonstrations(task.demonstrations)[:count]
    prompts = fit_prompts(
        questions,
        shown,
        lambda text: len(encode_prompt(tokenizer, text)),
        context=min(config.max_positions for config in configs.values()),
        max_new_tokens=task.generation.max_new_tokens,
        overflow=task.overflow,
        source=task.questions,
        demonstrations_source=task.demonstrations or "demonstrations",
    )
    return [
        {"id": row["id"], "prompt": prompt} for row, prompt in zip(questions, prompts, strict=True)
    ]


def write_task(task: Answering, path: Path) -> None:
    """The file that the command line of this module reads."""
    path.write_text(json.dumps(dataclasses.asdict(task), indent=2) + "\n")


def main(arguments: list[str]) -> int:
    """Answer what a file asks; an error is one line on stderr, and the status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        values = json.loads(Path(arguments[0]).read_text())
        answer(from_mapping(Answering, values, arguments[0]))
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
