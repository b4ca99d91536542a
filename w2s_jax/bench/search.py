"""The search benchmark: random weights of named shapes, timed whole and phase by phase.

What the floor counts is in `floor.py`.
"""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from w2s_jax.bench.config import SearchBenchConfig
from w2s_jax.bench.floor import PHASES, measure_rates, search_work, timed_twice
from w2s_jax.bench.setup import (
    GUIDE_SHAPE,
    check_settings,
    gpt2,
    named_shape,
    random_model,
    write_figures,
)
from w2s_jax.errors import InputError
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.model import Model, for_decoding
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
    """What was measured. Seconds are of one batch; a floor is the least such time."""

    prompts_per_second: float
    tokens_per_second: float
    seconds_per_prompt: float
    compile_seconds: float
    phase_seconds: dict[str, float]
    floor_seconds: dict[str, float]
    floor_share: float
    matmul_operations_per_second: float
    bytes_per_second: float
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


def run(options: SearchBenchConfig) -> Figures:
    """Measure, print a table, and write the figures where `options.json` says.

    Raises:
        InputError: For sizes out of range and for a path that cannot be written.
    """
    config = check(options)
    figures = measure(options, config)
    report(Console(), options, figures)
    write_figures(options, figures)
    return figures


def check(options: SearchBenchConfig) -> SearchConfig:
    """The search that the options describe; InputError for sizes out of range."""
    check_settings(options, LEAST, SIZES)
    if options.shape is not None and options.cross_vocabulary:
        raise InputError("--cross-vocabulary has vocabularies of its own; leave --shape out")
    beam = (options.beam_width, options.successors, options.chunk_length)
    sizes = {"max_new_tokens": options.max_new_tokens, "slots": options.batch_size}
    return cbs(*beam, **sizes, eos_ids=())


def shapes_of(options: SearchBenchConfig) -> tuple[ModelConfig, ModelConfig]:
    """The policy's shape, and that of both models of the guide."""
    if options.shape is not None:
        return named_shape(options.shape), named_shape(GUIDE_SHAPE)
    # Texts in another vocabulary are longer.
    positions = 2 * (options.prompt_tokens + options.max_new_tokens)
    return (
        gpt2(options.vocab, options.policy_width, options.policy_layers, positions),
        gpt2(options.vocab, options.guide_width, options.guide_layers, positions),
    )


def measure(options: SearchBenchConfig, config: SearchConfig) -> Figures:
    """Time whole searches (the median of the repeats), then the phases of one, and the rates."""
    dtype = jnp.dtype(options.dtype)
    policy_shape, guide_shape = shapes_of(options)
    policy = for_decoding(random_model(policy_shape, 0, dtype=dtype))
    tuned, untuned = (for_decoding(random_model(guide_shape, seed, dtype=dtype)) for seed in (1, 2))
    guide = Guide(tuned, untuned)
    generator = np.random.default_rng(0)
    size = (options.batch_size, options.prompt_tokens)
    prompts = generator.integers(2, policy_shape.vocab_size, size).tolist()
    whole = partial(search, policy, guide, prompts, config)
    first, seconds = timed_twice(whole, options.repeats)
    rates = measure_rates(dtype)
    work = search_work(
        policy_shape,
        (guide_shape, guide_shape),
        config,
        prompt_tokens=options.prompt_tokens,
        slots=options.batch_size,
        size=dtype.itemsize,
    )
    floors = {phase: rates.seconds(work[phase]) for phase in PHASES}
    phases = phase_seconds(SearchModels(policy, (guide,)), prompts, config)
    across = None
    if options.cross_vocabulary:
        across = measure_across(policy, guide, prompts, config, options, seconds)
    return Figures(
        prompts_per_second=options.batch_size / seconds,
        tokens_per_second=options.batch_size * options.max_new_tokens / seconds,
        seconds_per_prompt=seconds / options.batch_size,
        compile_seconds=first - seconds,
        phase_seconds=phases,
        floor_seconds=floors,
        floor_share=sum(floors.values()) / seconds,
        matmul_operations_per_second=rates.operations,
        bytes_per_second=rates.bytes,
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
        f"compilation {figures.compile_seconds:.1f} s"
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
    console.print(
        f"share of the floor {figures.floor_share:.0%}, at "
        f"{figures.matmul_operations_per_second / 1e9:.0f} GFLOP/s in matmuls and "
        f"{figures.bytes_per_second / 1e9:.1f} GB/s of memory, both measured in this run"
    )
