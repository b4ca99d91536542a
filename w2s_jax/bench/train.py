"""Measures training steps on random weights, and TRL's beside them in the same run.

Every measurement is a process of its own (train_own.py, train_trl.py) unless told otherwise, so
that peaks of memory do not mix; the two take turns, so that a busy machine slows both.
"""

import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from w2s_jax.bench import train_own
from w2s_jax.bench.floor import measure_rates, read_work
from w2s_jax.bench.setup import call, missing, named_shape, random_model, refuse_beside_shape
from w2s_jax.errors import InputError
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.config_json import config_to_hf
from w2s_jax.models.save import save_model
from w2s_jax.text.rows import check_writable
from w2s_jax.text.tokenizer import vocabularies

HEAD_WIDTH = 64
OBJECTIVES = ("sft", "dpo")
LEARNING_RATE = 1e-5
SIZES = ("architecture", "layers", "width", "vocab")
"""Options that a named shape decides."""
NO_TRL = "install the extra 'parity' or give --trl-python"
TRL_PROGRAM = Path(__file__).with_name("train_trl.py")


@dataclass(frozen=True)
class Options:
    """The shapes and sizes of a run.

    A step has `batch_size` rows of `length` tokens: texts for SFT; for DPO the two sides of half as
    many pairs, of which `prompt_tokens` are a prompt. gpt2 has layer norms, learned positions and
    tied embeddings; llama has a gated MLP and four query heads to a key head. shape: one of
    `shapes.SHAPES`, in place of architecture, layers, width and vocabulary. apart: whether this
    package's steps are taken in a process of their own; otherwise their peak of memory is that of
    all that this process did.
    """

    objectives: tuple[str, ...] = OBJECTIVES
    shape: str | None = None
    architecture: str = "gpt2"
    layers: int = 12
    width: int = 768
    vocab: int = 50257
    batch_size: int = 8
    length: int = 256
    prompt_tokens: int = 64
    dtype: str = "float32"
    repeats: int = 3
    rounds: int = 1
    trl: bool = False
    trl_python: str = sys.executable
    apart: bool = True


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
    """By objective: this package, TRL where it was asked for, and the share of the matmul rate."""

    own: dict[str, Side]
    trl: dict[str, Side]
    operations: dict[str, float]
    matmul_operations_per_second: float
    no_trl: str | None = None

    def share(self, objective: str) -> float:
        """Of the operations that the machine can do, those a step needs."""
        needed = self.operations[objective] / self.own[objective].seconds
        return needed / self.matmul_operations_per_second


def run(options: Options, *, json_path: str | Path | None = None) -> Figures:
    """Measure, print a table, and write the figures as JSON where a path is given.

    Raises InputError for sizes out of range and for a path that cannot be written.
    """
    check(options)
    if json_path is not None:
        check_writable(Path(json_path))
    figures = measure(options)
    report(Console(), options, figures)
    if json_path is not None:
        text = json.dumps({"options": asdict(options), **asdict(figures)}, indent=2)
        Path(json_path).write_text(text + "\n")
    return figures


def check(options: Options) -> None:
    """Raises InputError for sizes out of range and for a shape that is not known."""
    if options.shape is not None:
        named_shape(options.shape)
        refuse_beside_shape(options, SIZES)
    for name in ("layers", "batch_size", "repeats", "rounds", "prompt_tokens"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is {getattr(options, name)}; it must be at least 1")
    if options.width < HEAD_WIDTH or options.width % HEAD_WIDTH:
        raise InputError(
            f"--width is {options.width}; it must be a multiple of {HEAD_WIDTH}, a head's width"
        )
    if options.vocab < 32:
        raise InputError(f"--vocab is {options.vocab}; it must be at least 32")
    if options.batch_size % 2 and "dpo" in options.objectives:
        raise InputError(f"--batch-size is {options.batch_size}; DPO needs an even number of rows")
    if options.length <= options.prompt_tokens:
        raise InputError(f"--length {options.length} leaves nothing after the prompt's tokens")
    unknown = [name for name in options.objectives if name not in OBJECTIVES]
    if unknown or not options.objectives:
        raise InputError(f"--objectives must be of {', '.join(OBJECTIVES)}, not {unknown}")


def shape(options: Options) -> ModelConfig:
    """The decoder that is trained."""
    if options.shape is not None:
        return named_shape(options.shape)
    heads = options.width // HEAD_WIDTH
    size: dict[str, Any] = {
        "vocab_size": options.vocab,
        "width": options.width,
        "layers": options.layers,
        "heads": heads,
        "head_width": HEAD_WIDTH,
        "mlp_width": 4 * options.width,
        "max_positions": options.length,
        "tied_embeddings": True,
    }
    if options.architecture == "llama":
        return ModelConfig("llama", kv_heads=heads // 4 or heads, **size)
    return ModelConfig(
        "gpt2", kv_heads=heads, norm="layer", position="learned", activation="gelu_tanh",
        gated_mlp=False, qkv_bias=True, out_bias=True, mlp_bias=True, **size,
    )  # fmt: skip


def measure(options: Options) -> Figures:
    """Run the programs in turns, then measure the matmul rate in this process."""
    config = shape(options)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    no_trl = missing(options.trl_python, "torch, trl", NO_TRL) if options.trl else None
    with_trl = options.trl and no_trl is None
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {"config": config_to_hf(config)}
        if with_trl:
            given |= _for_both(config, Path(folder))
        for _ in range(options.rounds):
            for objective in options.objectives:
                job = job_of(options, config, objective) | given
                path = Path(folder) / "job.json"
                path.write_text(json.dumps(job))
                own = [sys.executable, "-m", "w2s_jax.bench.train_own", str(path)]
                took = call(own) if options.apart else train_own.run(job)
                found.setdefault(("own", objective), []).append(took)
                if with_trl:
                    took = call([options.trl_python, "-P", str(TRL_PROGRAM), str(path)])
                    found.setdefault(("trl", objective), []).append(took)
    tokens = options.batch_size * options.length
    sides: dict[str, dict[str, Side]] = {"own": {}, "trl": {}}
    for (name, objective), rounds in found.items():
        sides[name][objective] = summary(rounds, tokens)
    return Figures(
        own=sides["own"],
        trl=sides["trl"],
        operations={name: step_operations(options, config, name) for name in options.objectives},
        matmul_operations_per_second=measure_rates(jnp.dtype(options.dtype)).operations,
        no_trl=no_trl,
    )


def _for_both(config: ModelConfig, folder: Path) -> dict[str, str]:
    """A checkpoint and a tokenizer that both trainers load, as entries of a job."""
    checkpoint, tokenizer = folder / "model", folder / "tokenizer"
    save_model(random_model(config, 0), checkpoint)
    vocabularies(32)[0].save_pretrained(str(tokenizer))
    return {"checkpoint": str(checkpoint), "tokenizer": str(tokenizer)}


def job_of(options: Options, config: ModelConfig, objective: str) -> dict[str, Any]:
    """What both programs are given: random rows of one length, and the settings."""
    rng = np.random.default_rng(0)
    steps = options.repeats + 1

    def ids(*size: int) -> list:
        return rng.integers(2, config.vocab_size, size).tolist()

    if objective == "sft":
        texts = ids(steps * options.batch_size, options.length)
        # TRL divides the loss by the labels, also by one in first place, which has no log-prob.
        rows = [{"input_ids": text, "labels": [-100, *text[1:]]} for text in texts]
    else:
        count, response = steps * options.batch_size // 2, options.length - options.prompt_tokens
        sides = (ids(count, options.prompt_tokens), ids(count, response), ids(count, response))
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        rows = [dict(zip(names, row, strict=True)) for row in zip(*sides, strict=True)]
    off = ("attn_pdrop", "embd_pdrop", "resid_pdrop") if config.architecture == "gpt2" else ()
    return {
        "objective": objective,
        "steps": steps,
        "batch_size": options.batch_size,
        "length": options.length,
        "dtype": options.dtype,
        "learning_rate": LEARNING_RATE,
        "no_dropout": dict.fromkeys(off, 0.0),
        "rows": rows,
    }


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


def step_operations(options: Options, config: ModelConfig, objective: str) -> float:
    """Matmul operations of a step: three forward passes, four where a reference is read as well."""
    start = options.prompt_tokens if objective == "dpo" else 1
    forward = read_work(
        config,
        4,
        rows=options.batch_size * options.length,
        context=options.length / 2,
        cached=0,
        scored=options.batch_size * (options.length - start),
    ).operations
    return float(forward * (4 if objective == "dpo" else 3))


def report(console: Console, options: Options, figures: Figures) -> None:
    """Print the figures as a table, a row for each trainer and objective."""
    config = shape(options)
    console.print(
        f"{options.shape or config.architecture} {config.layers} × {config.width}, "
        f"vocabulary {config.vocab_size}, "
        f"{options.dtype}; {options.batch_size} rows of {options.length} tokens a step"
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
    for objective, own in figures.own.items():
        line = f"{objective}: {figures.share(objective):.0%} of the matmul rate"
        if objective in figures.trl:
            other = figures.trl[objective]
            line += (
                f"; {other.seconds / own.seconds:.2f} times TRL's throughput "
                f"({other.cpu_seconds / own.cpu_seconds:.2f} by CPU time), "
                f"{own.peak_bytes / other.peak_bytes:.2f} times its memory"
            )
        console.print(line)
    rate = figures.matmul_operations_per_second
    console.print(f"{rate / 1e9:.0f} GFLOP/s in matmuls, measured in this run")
    if figures.no_trl is not None:
        console.print(f"TRL was not measured: {figures.no_trl}")
