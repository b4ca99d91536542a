"""Measures training steps on random weights, and TRL's beside them in the same run.

Every measurement is a process of its own unless told otherwise, so that peaks of memory do not mix;
this package and TRL (`peers.py`) take turns, so that a busy machine slows both.
`python -m w2s_jax.bench.train JOB_JSON` is this package's: it prints one JSON line.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from w2s_jax.bench.config import TrainBenchConfig
from w2s_jax.bench.floor import MeanRates, Rates, mean_rates, measure_rates, read_work
from w2s_jax.bench.setup import (
    MODEL_SIZES,
    PEERS,
    call,
    check_positions,
    check_settings,
    missing,
    model_shape,
    peak_bytes,
    random_model,
    reset_peak,
    told_machine,
    write_figures,
)
from w2s_jax.errors import InputError
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.config_json import config_from_hf, config_to_hf
from w2s_jax.models.load import load_model
from w2s_jax.models.lora import LoraConfig, abstract_adapter, init_adapter
from w2s_jax.models.model import Model
from w2s_jax.models.save import save_model
from w2s_jax.text.tokenizer import vocabularies
from w2s_jax.train.config import OptimizerConfig, PreferenceConfig
from w2s_jax.train.logprobs import REFERENCE
from w2s_jax.train.objectives import BASE, Policy, pair_loss, sft_loss
from w2s_jax.train.step import Batch, init_state, make_optimizer, make_train_step

OBJECTIVES = ("sft", "dpo")
LEARNING_RATE = 1e-5
DOCUMENTS = 4
"""In a packed row."""
LEAST = {
    "layers": 1, "batch_size": 1, "repeats": 1, "rounds": 1, "prompt_tokens": 1, "vocab": 32,
    "lora_rank": 0,
}  # fmt: skip
NO_TRL = "install the extra 'parity' or give --trl-python"


@dataclass(frozen=True)
class Side:
    """What one trainer took for an objective: medians over the steps after the first of each round.

    cpu_seconds sums over cores and says more than `seconds` where other work shares the machine.
    """

    seconds: float
    cpu_seconds: float
    tokens_per_second: float
    peak_bytes: int
    first_loss: float
    first_seconds: float


@dataclass(frozen=True)
class Figures:
    """By objective: this package, TRL where it was asked for, and the operations of a step."""

    own: dict[str, Side]
    trl: dict[str, Side]
    operations: dict[str, float]
    rates: MeanRates
    no_trl: str | None = None

    def share(self, objective: str) -> float:
        """Of the operations that the machine can do, those a step needs."""
        needed = self.operations[objective] / self.own[objective].seconds
        return needed / self.rates.operations


def run(options: TrainBenchConfig, *, apart: bool = True) -> Figures:
    """Measure, print a table, and write the figures where `options.json` says.

    Args:
        options: The shapes and sizes.
        apart: Whether this package's steps are taken in a process of their own; otherwise their
            peak of memory is that of all that this process did.

    Raises:
        InputError: For sizes out of range and for a path that cannot be written.
    """
    options = replace(options, trl_python=options.trl_python or sys.executable)
    check(options)
    figures = measure(options, apart=apart)
    report(Console(), options, figures)
    write_figures(options, asdict(figures), apart=apart)
    return figures


def check(options: TrainBenchConfig) -> None:
    """Raises InputError for sizes out of range and for a shape that is not known."""
    check_settings(options, LEAST, MODEL_SIZES)
    if options.batch_size % 2 and "dpo" in options.objectives:
        raise InputError(f"--batch-size is {options.batch_size}; DPO needs an even number of rows")
    if options.length <= options.prompt_tokens:
        raise InputError(f"--length {options.length} leaves nothing after the prompt's tokens")
    if options.packed and ("dpo" in options.objectives or options.length <= DOCUMENTS):
        raise InputError(
            f"--packed is for --objectives sft alone, and rows of more than {DOCUMENTS} tokens"
        )
    check_positions(shape(options), options.length)
    unknown = [name for name in options.objectives if name not in OBJECTIVES]
    if unknown or not options.objectives:
        raise InputError(f"--objectives must be of {', '.join(OBJECTIVES)}, not {unknown}")


def shape(options: TrainBenchConfig) -> ModelConfig:
    """The decoder that is trained."""
    return model_shape(options, options.length)


def measure(options: TrainBenchConfig, *, apart: bool) -> Figures:
    """Run the programs in turns; each of this package's measures the rates as well."""
    config, python = shape(options), options.trl_python or sys.executable
    no_trl = missing(python, "torch, trl, peft", NO_TRL) if options.trl else None
    with_trl = options.trl and no_trl is None
    trainers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"own": train}
    if apart:
        trainers["own"] = lambda job: call(job, sys.executable, "-m", __name__)
    if with_trl:
        trainers["trl"] = lambda job: call(job, python, "-P", PEERS)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {"own": {}, "trl": {}}
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {"config": config_to_hf(config)}
        if with_trl:
            given |= _for_both(config, Path(folder))
        for _, objective in product(range(options.rounds), options.objectives):
            job = job_of(options, config, objective) | given
            for name, trainer in trainers.items():
                found[name].setdefault(objective, []).append(trainer(job))
    tokens = options.batch_size * options.length
    sides = {
        name: {objective: summary(rounds, tokens) for objective, rounds in own.items()}
        for name, own in found.items()
    }
    rounds = [one["rates"] for own in found["own"].values() for one in own]
    return Figures(
        **sides,
        operations={name: step_operations(options, config, name) for name in options.objectives},
        rates=mean_rates(Rates(*rounds[0][0]), Rates(*rounds[-1][1])),
        no_trl=no_trl,
    )


def _for_both(config: ModelConfig, folder: Path) -> dict[str, str]:
    """A checkpoint and a tokenizer that both trainers load, as entries of a job."""
    checkpoint, tokenizer = folder / "model", folder / "tokenizer"
    save_model(random_model(config, 0), checkpoint)
    vocabularies(32)[0].save_pretrained(str(tokenizer))
    return {"checkpoint": str(checkpoint), "tokenizer": str(tokenizer)}


def job_of(options: TrainBenchConfig, config: ModelConfig, objective: str) -> dict[str, Any]:
    """What both programs are given: random rows of one length, and the settings."""
    rng = np.random.default_rng(0)
    steps = options.repeats + 1

    def ids(*size: int) -> list:
        return rng.integers(2, config.vocab_size, size).tolist()

    if objective == "sft":
        texts = ids(steps * options.batch_size, options.length)
        rows = [_text(text, documents(options), rng) for text in texts]
    else:
        count, response = steps * options.batch_size // 2, options.length - options.prompt_tokens
        sides = (ids(count, options.prompt_tokens), ids(count, response), ids(count, response))
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        rows = [dict(zip(names, row, strict=True)) for row in zip(*sides, strict=True)]
    off = ("attn_pdrop", "embd_pdrop", "resid_pdrop") if config.architecture == "gpt2" else ()
    return options.as_row() | {
        "objective": objective,
        "steps": steps,
        "learning_rate": LEARNING_RATE,
        "no_dropout": dict.fromkeys(off, 0.0),
        "rows": rows,
    }


def documents(options: TrainBenchConfig) -> int:
    """The documents of a row."""
    return DOCUMENTS if options.packed else 1


def _text(ids: list[int], count: int, rng: np.random.Generator) -> dict[str, list[int]]:
    """A row of so many documents in the columns that TRL's packing makes."""
    cuts = np.sort(rng.choice(np.arange(1, len(ids)), count - 1, replace=False))
    labels = np.array(ids)
    # TRL divides the loss by the labels, also by one in first place, which has no log-prob.
    labels[[0, *cuts]] = -100
    lengths = np.diff([0, *cuts, len(ids)])
    return {"input_ids": ids, "labels": labels.tolist(), "seq_lengths": lengths.tolist()}


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Take the job's steps with this package, on its checkpoint's weights or on random ones.

    Returns:
        Seconds, CPU seconds and losses by step, peak memory, and the machine's rates before and
        after them.
    """
    dpo, narrow = job["objective"] == "dpo", job["dtype"] == "bfloat16"
    before = measure_rates(jnp.dtype(job["dtype"]))
    reset_peak()
    if "checkpoint" in job:
        model = load_model(job["checkpoint"])
    else:
        model = random_model(config_from_hf(job["config"]), 0)
    rank, params, frozen = job["lora_rank"], model.params, {}
    lora = LoraConfig(rank, alpha=2.0 * rank) if rank else None
    policy = Policy(model.config, lora)
    loss = pair_loss(policy, PreferenceConfig()) if dpo else sft_loss(policy)
    if dpo or lora:
        # What is frozen is never changed, so the first state's copy is the only one.
        cast = jax.tree.map(lambda x: x.astype("bfloat16") if narrow else x, params)
        frozen = {BASE if lora else REFERENCE: Model(model.config, cast)}
    if lora:
        params = init_adapter(model.config, lora, jax.random.key(0))
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=job["learning_rate"], schedule="constant", warmup=0.0),
        job["steps"],
    )
    step = make_train_step(loss, optimizer, compute_dtype="bfloat16" if narrow else None)
    state = init_state(params, optimizer, jax.random.key(0))
    del model, params
    size = job["batch_size"] // (2 if dpo else 1)
    seconds, cpu_seconds, losses = [], [], []
    for start in range(0, job["steps"] * size, size):
        batch = batch_of(job["rows"][start : start + size], dpo)
        started = time.perf_counter(), time.process_time()
        state, metrics = jax.block_until_ready(step(state, frozen, batch))
        seconds.append(time.perf_counter() - started[0])
        cpu_seconds.append(time.process_time() - started[1])
        losses.append(float(metrics["loss"]))
    held = peak_bytes()
    return {
        "rates": [astuple(before), astuple(measure_rates(jnp.dtype(job["dtype"])))],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "losses": losses,
        "peak_bytes": held,
    }


def batch_of(rows: list[dict[str, list[int]]], dpo: bool) -> Batch:
    """The batch of rows that all have one length."""
    if dpo:
        sides = ("chosen_ids", "rejected_ids")
        ids = [[row["prompt_ids"] + row[side] for side in sides] for row in rows]
        tokens = np.asarray(ids, np.int32)
        prompt = np.arange(tokens.shape[-1]) < len(rows[0]["prompt_ids"])
        targets, segments = np.tile(~prompt, (*tokens.shape[:2], 1)), np.ones_like(tokens)
    else:
        tokens = np.asarray([row["input_ids"] for row in rows], np.int32)
        targets = np.asarray([row["labels"] for row in rows]) >= 0
        # The first token of a document, and no other, has no label.
        segments = np.cumsum(~targets, axis=1, dtype=np.int32)
    return {"tokens": tokens, "segments": segments, "targets": targets}


def summary(rounds: list[dict[str, Any]], tokens: int) -> Side:
    """The medians of several rounds; the first step of each, with compilation, stands apart."""

    def median(name: str) -> float:
        return statistics.median(value for one in rounds for value in one[name][1:])

    return Side(
        seconds=median("seconds"),
        cpu_seconds=median("cpu_seconds"),
        tokens_per_second=tokens / median("seconds"),
        peak_bytes=int(max(one["peak_bytes"] for one in rounds)),
        first_loss=rounds[0]["losses"][0],
        first_seconds=rounds[0]["seconds"][0],
    )


def step_operations(options: TrainBenchConfig, config: ModelConfig, objective: str) -> float:
    """Matmul operations of a step: three forward passes, four where a reference is read as well.

    Frozen weights, beside adapters, take one pass fewer: they have no gradient.
    """
    dpo, count = objective == "dpo", documents(options)
    start = options.prompt_tokens if dpo else count
    rows = options.batch_size * options.length
    # Of a text cut at random places, the mean of the tokens behind which a token stands.
    context = options.length / (count + 1)
    scored = options.batch_size * (options.length - start)
    read = partial(read_work, config, 4, rows=rows, cached=0, scored=scored)
    passes = 3 + dpo
    if not options.lora_rank:
        return float(passes * read(context=context).operations)
    weights = read(context=0.0).operations
    adapter = abstract_adapter(config, LoraConfig(options.lora_rank))
    own = 2 * rows * sum(leaf.size for leaf in jax.tree.leaves(adapter))
    return float(passes * read(context=context).operations - weights + 3 * own)


def report(console: Console, options: TrainBenchConfig, figures: Figures) -> None:
    """Print the figures as a table, a row for each trainer and objective."""
    config = shape(options)
    console.print(
        f"{options.shape or config.architecture} {config.layers} × {config.width}, "
        f"vocabulary {config.vocab_size}, "
        f"{options.dtype}; {options.batch_size} rows of {options.length} tokens a step"
        + f", in {DOCUMENTS} documents each" * options.packed
        + f"; LoRA rank {options.lora_rank}" * bool(options.lora_rank)
    )
    table = Table(
        "objective", "trainer", "s/step", "CPU s/step", "tokens/s", "peak GiB", "first loss"
    )
    for objective in options.objectives:
        for trainer, sides in (("w2s", figures.own), ("TRL", figures.trl)):
            if objective in sides:
                side = sides[objective]
                table.add_row(
                    objective, trainer, f"{side.seconds:.2f}", f"{side.cpu_seconds:.2f}",
                    f"{side.tokens_per_second:.0f}", f"{side.peak_bytes / 2**30:.2f}",
                    f"{side.first_loss:.5f}",
                )  # fmt: skip
    console.print(table)
    for name, own in figures.own.items():
        line = f"{name}: {figures.share(name):.0%} of the matmul rate"
        if name in figures.trl:
            other = figures.trl[name]
            line += (
                f"; {other.seconds / own.seconds:.2f} times TRL's throughput "
                f"({other.cpu_seconds / own.cpu_seconds:.2f} by CPU time), "
                f"{own.peak_bytes / other.peak_bytes:.2f} times its memory"
            )
        console.print(line)
    console.print(f"{figures.rates}; {told_machine()}")
    if figures.no_trl is not None:
        console.print(f"TRL was not measured: {figures.no_trl}")


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    sys.stdout.write(json.dumps(train(job)) + "\n")
