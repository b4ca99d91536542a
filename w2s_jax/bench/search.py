"""The search benchmark: random weights of named shapes, timed whole and phase by phase.

What the floor counts is in `floor.py`.
"""

import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from w2s_jax.bench.beside import (
    SAMPLING,
    Beside,
    beside_cells,
    compare,
    generate_job,
    prompts_of,
    report_beside,
)
from w2s_jax.bench.config import SearchBenchConfig
from w2s_jax.bench.curves import points, run_points
from w2s_jax.bench.floor import (
    PHASES,
    MeanRates,
    mean_rates,
    measure_rates,
    search_work,
    timed_twice,
)
from w2s_jax.bench.setup import (
    check_positions,
    check_settings,
    gpt2,
    guide_shape,
    named_shape,
    peak_bytes,
    random_model,
    reset_peak,
)
from w2s_jax.errors import InputError
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.model import Model, for_decoding
from w2s_jax.models.save import save_model
from w2s_jax.search import Guide, SearchModels, insert_prompt, search, start_search, step
from w2s_jax.search.config import SearchConfig, cbs
from w2s_jax.search.scorers import TextLogRatio, TextModel
from w2s_jax.text.chat import load_template
from w2s_jax.text.prompts import Conversation, encode_prompt
from w2s_jax.text.tokenizer import buckets, vocabularies

LEAST = {
    "policy_layers": 1, "guide_layers": 1, "vocab": 2, "prompt_tokens": 1, "batch_size": 1,
    "repeats": 1,
}  # fmt: skip
SIZES = ("policy_layers", "policy_width", "guide_layers", "guide_width", "vocab")
"""Settings that a named shape decides."""


@dataclass(frozen=True)
class Figures:
    """What was measured. Seconds are of one batch; a floor is the least such time.

    first_row_seconds: from the first call of `search` to the first response, with compilation.
    """

    prompts_per_second: float
    tokens_per_second: float
    seconds_per_prompt: float
    first_row_seconds: float
    compile_seconds: float
    peak_bytes: int
    phase_seconds: dict[str, float]
    floor_seconds: dict[str, float]
    floor_share: float
    rates: MeanRates
    beside: Beside
    cross_vocabulary: "CrossFigures | None" = None


@dataclass(frozen=True)
class CrossFigures:
    """The same search with guides that read texts in a vocabulary of their own.

    ratio: its seconds over those on the device. token_ratio: guide tokens for each policy token.
    """

    seconds_per_prompt: float
    ratio: float
    token_ratio: float
    compile_seconds: float


@dataclass(frozen=True)
class Subject:
    """The models, and the folders of their checkpoints (policy, tuned, untuned) where needed."""

    policy: Model
    guide: Guide
    checkpoints: tuple[str, ...] = ()


def run(options: SearchBenchConfig) -> list[Figures]:
    """Measure the point or those of the curve, print tables, and write what was asked for.

    Raises:
        InputError: For sizes out of range and for a path that cannot be written.
    """
    each = points(options).values()
    for point in each:
        check(point)
    longest = max(each, key=lambda point: point.prompt_tokens + point.max_new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        subject = make_subject(longest, Path(folder) if "hf" in options.compare else None)
        return run_points(options, partial(measure, subject), report, cells)


def make_subject(options: SearchBenchConfig, folder: Path | None = None) -> Subject:
    """Random models of the options' shapes; their checkpoints are written into a folder."""
    policy, guide = shapes_of(options)
    models: list[Model] = []
    folders: list[str] = []
    for seed, config in enumerate((policy, guide, guide)):
        model = random_model(config, seed, dtype=jnp.dtype(options.dtype))
        if folder is not None:
            folders.append(str(folder / str(seed)))
            save_model(model, folders[-1])
        models.append(for_decoding(model))
    return Subject(models[0], Guide(models[1], models[2]), tuple(folders))


def check(options: SearchBenchConfig) -> SearchConfig:
    """The search that the options describe; InputError for sizes out of range."""
    check_settings(options, LEAST, SIZES)
    if options.shape is not None and options.cross_vocabulary:
        raise InputError("--cross-vocabulary has vocabularies of its own; leave --shape out")
    for config in shapes_of(options):
        check_positions(config, options.prompt_tokens + options.max_new_tokens)
    beam = (options.beam_width, options.successors, options.chunk_length)
    sizes = {"max_new_tokens": options.max_new_tokens, "slots": options.batch_size}
    return cbs(*beam, **sizes, sampling=SAMPLING, eos_ids=())


def shapes_of(options: SearchBenchConfig) -> tuple[ModelConfig, ModelConfig]:
    """The policy's shape, and that of both models of the guide."""
    if options.shape is not None:
        return named_shape(options.shape), guide_shape(options.shape)
    # Texts in another vocabulary are longer.
    positions = 2 * (options.prompt_tokens + options.max_new_tokens)
    return (
        gpt2(options.vocab, options.policy_width, options.policy_layers, positions),
        gpt2(options.vocab, options.guide_width, options.guide_layers, positions),
    )


def jobs_of(subject: Subject, options: SearchBenchConfig) -> dict[str, dict[str, Any]]:
    """What is compared with, as jobs of `peers.py`."""
    search_job = {
        "checkpoints": subject.checkpoints,
        "beam_width": options.beam_width,
        "successors": options.successors,
        "chunk_length": options.chunk_length,
    }
    plain = generate_job(subject.policy.config, options.beam_width * options.successors)
    return {name: search_job if name == "hf" else plain for name in options.compare}


def measure(subject: Subject, options: SearchBenchConfig, *, with_phases: bool = True) -> Figures:
    """Time whole searches (the median of the repeats), then the phases of one.

    What they are compared with runs first.
    """
    config, dtype = check(options), jnp.dtype(options.dtype)
    policy, guide = subject.policy, subject.guide
    found = compare(policy.config, options, jobs_of(subject, options))
    prompts = prompts_of(policy.config, options)
    # Of a point before this one there may be programs that serve it as well.
    jax.clear_caches()
    before = measure_rates(dtype)
    reset_peak()
    done: list[float] = []
    whole = partial(
        search, policy, guide, prompts, config, on_result=lambda _: done.append(time.perf_counter())
    )
    start = time.perf_counter()
    first, seconds = timed_twice(whole, options.repeats)
    peak = peak_bytes()
    rates = mean_rates(before, measure_rates(dtype))
    work = search_work(
        policy.config,
        (guide.tuned.config, guide.untuned.config),
        config,
        prompt_tokens=options.prompt_tokens,
        slots=options.batch_size,
        size=dtype.itemsize,
    )
    floors = {phase: rates.seconds(work[phase]) for phase in PHASES}
    phases = {}
    if with_phases:
        phases = phase_seconds(SearchModels(policy, (guide,)), prompts, config)
    across = None
    if options.cross_vocabulary:
        across = measure_across(policy, guide, prompts, config, options, seconds)
    return Figures(
        prompts_per_second=options.batch_size / seconds,
        tokens_per_second=options.batch_size * options.max_new_tokens / seconds,
        seconds_per_prompt=seconds / options.batch_size,
        first_row_seconds=done[0] - start,
        compile_seconds=first - seconds,
        peak_bytes=peak,
        phase_seconds=phases,
        floor_seconds=floors,
        floor_share=sum(floors.values()) / seconds,
        rates=rates,
        beside=found.over(seconds),
        cross_vocabulary=across,
    )


def measure_across(
    policy: Model,
    guide: Guide,
    prompts: list[list[int]],
    config: SearchConfig,
    options: SearchBenchConfig,
    seconds: float,
) -> CrossFigures:
    """Time the search whose guide reads texts, against the `seconds` of the one on the device."""
    own, other = vocabularies(options.vocab)
    template = load_template(other, "none", where="guide")
    scorer = TextLogRatio(TextModel(guide.tuned, template), TextModel(guide.untuned, template))
    decode: Any = own.decode
    texts: list[str] = [decode(prompt) for prompt in prompts]
    whole = partial(
        search,
        policy,
        None,
        prompts,
        config,
        scorers=[scorer],
        conversations=[Conversation(text=text) for text in texts],
        decode=decode,
    )
    first, across = timed_twice(whole, options.repeats)
    tokens = sum(len(encode_prompt(other, text)) for text in texts)
    return CrossFigures(
        seconds_per_prompt=across / options.batch_size,
        ratio=across / seconds,
        token_ratio=tokens / sum(map(len, prompts)),
        compile_seconds=first - across,
    )


def phase_seconds(
    models: SearchModels, prompts: list[list[int]], config: SearchConfig
) -> dict[str, float]:
    """Seconds of each phase of one batch, every phase a program of its own.

    The search runs propose, score and select as one program, so their sum may exceed its time.
    """
    programs = {
        "prefill": partial(jax.jit, donate_argnums=1)(insert_prompt),
        "proposing": partial(jax.jit, donate_argnums=1)(step.propose),
        "scoring": partial(jax.jit, donate_argnums=1)(step.score),
        "selecting": partial(jax.jit, donate_argnums=0)(step.select),
    }
    capacity = next(iter(buckets([len(prompts[0])])))

    def once() -> dict[str, float]:
        seconds = dict.fromkeys(PHASES, 0.0)

        def timed(phase: str, *arguments: Any) -> Any:
            start = time.perf_counter()
            out = jax.block_until_ready(programs[phase](*arguments))
            seconds[phase] += time.perf_counter() - start
            return out

        state = start_search(models, config, slots=len(prompts), prefix_capacity=capacity)
        for slot, prompt in enumerate(prompts):
            padded = np.zeros(capacity + 1, np.int32)
            padded[: len(prompt)] = prompt
            numbers = (np.int32(slot), np.int32(slot), padded, np.int32(len(prompt)))
            state = timed("prefill", models, state, *numbers)
        for _ in range(config.chunks):
            state, proposal = timed("proposing", models, state)
            state, scored = timed("scoring", models, state, proposal)
            state, _ = timed("selecting", state, proposal, scored)
        return seconds

    once()
    return once()


def report(console: Console, options: SearchBenchConfig, figures: Figures) -> None:
    """Print the figures as a table of phases under a line of totals."""
    policy, guide = shapes_of(options)
    named = "" if options.shape is None else f"{options.shape}: "
    console.print(
        f"{named}policy {policy.layers} × {policy.width}, guides {guide.layers} × "
        f"{guide.width}, vocabulary {policy.vocab_size}, {options.dtype}; W/K/L "
        f"{options.beam_width}/{options.successors}/{options.chunk_length}, "
        f"{options.prompt_tokens} + {options.max_new_tokens} tokens, batch {options.batch_size}"
    )
    console.print(
        f"{figures.seconds_per_prompt:.3f} s per prompt, "
        f"{figures.prompts_per_second:.3g} prompts/s, "
        f"{figures.tokens_per_second:.3g} response tokens/s, "
        f"compilation {figures.compile_seconds:.1f} s, first response after "
        f"{figures.first_row_seconds:.1f} s, peak memory {figures.peak_bytes / 2**30:.2f} GiB"
    )
    table = Table("phase", "seconds", "floor, seconds", "share of floor")
    for phase in PHASES:
        took, floor = figures.phase_seconds[phase], figures.floor_seconds[phase]
        table.add_row(phase, f"{took:.3f}", f"{floor:.3f}", f"{floor / took:.0%}")
    console.print(table)
    if figures.cross_vocabulary is not None:
        across = figures.cross_vocabulary
        console.print(
            f"guides of another vocabulary ({across.token_ratio:.2f} tokens for each of the "
            f"policy's): {across.seconds_per_prompt:.3f} s per prompt, {across.ratio:.2f} times "
            f"the search on the device; compilation {across.compile_seconds:.1f} s"
        )
    report_beside(console, figures.beside)
    console.print(f"share of the floor {figures.floor_share:.0%}, at {figures.rates}")


def cells(figures: Figures) -> dict[str, str]:
    """A row of the table of a curve."""
    return {
        "s/prompt": f"{figures.seconds_per_prompt:.3f}",
        "floor": f"{figures.floor_share:.0%}",
        "compile": f"{figures.compile_seconds:.1f}",
        "first": f"{figures.first_row_seconds:.1f}",
        "GiB": f"{figures.peak_bytes / 2**30:.2f}",
        **beside_cells(figures.beside),
        "drift": f"{figures.rates.drift:.0%}",
    }
