"""Estimates against what real arrays and the compiled step take."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from tests.cli.test_search import tiny
from tests.tiny import tiny_config, tiny_model
from w2s_jax.text.rows import write_jsonl
from w2s_jax.train.config import OptimizerConfig
from w2s_jax.train.estimate import (
    abstract_batch,
    abstract_on_mesh,
    abstract_state,
    estimate_step,
    peak_memory,
    report,
)
from w2s_jax.train.logprobs import sequence_scores
from w2s_jax.train.step import init_state, make_optimizer

BATCH = {"tokens": ((8, 64), jnp.int32), "segments": ((8, 64), jnp.int32)}


def loss(params, frozen, batch, key):
    logprobs = sequence_scores(params, batch["tokens"], batch["segments"]).logprobs
    value = -logprobs.sum()
    if frozen is not None:
        value += sequence_scores(frozen, batch["tokens"], batch["segments"]).logprobs.sum()
    return value, jnp.float32(1.0), {"loss": value}


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_the_abstract_state_is_the_real_one(name):
    optimizer = make_optimizer(OptimizerConfig(optimizer=name), 10)
    model = tiny_model(0, layers=1)
    real = init_state(model.params, optimizer, jax.random.key(0))
    abstract = abstract_state(abstract_on_mesh(model.config).params, optimizer)
    jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(str((a, b))),
        abstract,
        real,
    )


CONFIG = tiny_config(layers=1, vocab_size=2048)
OPTIMIZER = make_optimizer(OptimizerConfig(), 10)


@pytest.fixture(scope="module")
def one():
    """The estimate on one device."""
    return estimate_step(loss, OPTIMIZER, abstract_on_mesh(CONFIG), abstract_batch(BATCH))


def test_parts_are_counted_from_shapes_alone(one):
    parameters = size(tiny_model(0, layers=1, vocab_size=2048).params)
    assert one.parameters == parameters
    assert 2 * parameters <= one.optimizer <= 2 * parameters + 64
    assert one.batch == 2 * 8 * 64 * 4
    assert one.frozen == 0
    # At the least the gradients and the logits of one block.
    assert one.working > parameters
    held = one.parameters + one.optimizer + one.frozen + one.batch
    assert one.process > 2**26, "a CPU shares its memory with the interpreter and XLA"
    assert one.total == held + one.working + one.process


def test_micro_batches_take_less(one):
    shapes, batch = abstract_on_mesh(CONFIG), abstract_batch(BATCH)
    assert estimate_step(loss, OPTIMIZER, shapes, batch, accumulate=8).working < one.working


def test_the_table_names_every_part(one):
    console = Console(record=True, width=80)
    report(console, one)
    text = console.export_text()
    for word in ("parameters", "optimizer", "frozen", "batch", "activations", "programs", "GiB"):
        assert word in text


def test_peaks_are_told_where_the_system_keeps_none_of_a_process(monkeypatch):
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: "VmRSS:\t   12 kB\n")
    assert peak_memory() > 2**25


SHARDED = """
import json
from tests.train.test_estimate import BATCH, CONFIG, OPTIMIZER, loss
from w2s_jax.ops.sharding import make_mesh
from w2s_jax.train.estimate import abstract_batch, abstract_on_mesh, estimate_step
mesh = make_mesh("fsdp=4")
model = abstract_on_mesh(CONFIG, mesh=mesh)
found = estimate_step(loss, OPTIMIZER, model, abstract_batch(BATCH, mesh), frozen=model, mesh=mesh)
print(json.dumps(vars(found)))
"""


def test_a_mesh_divides_parameters_optimizer_and_batch(run_python, one):
    four = json.loads(run_python(SHARDED, devices=4))
    assert four["devices"] == 4
    assert one.parameters / 4 <= four["parameters"] < one.parameters / 3
    assert one.optimizer / 4 <= four["optimizer"] < one.optimizer / 3
    assert four["batch"] == one.batch / 4
    assert four["frozen"] == four["parameters"]


@pytest.mark.slow
def test_memory_of_the_starting_process_is_not_counted(run_python):
    held = np.ones(2**29, np.uint8)
    code = "from w2s_jax.train.estimate import peak_memory; print(peak_memory())"
    assert 2**25 < int(run_python(code)) < held.nbytes


COMMAND = """
from w2s_jax.cli.main import main
from w2s_jax.train.estimate import peak_memory
assert main(WORDS) == 0
print("peak", peak_memory() / 2**30)
"""


# What takes most of the memory: activations, weights and their moments, logits and an embedding.
SHAPES = {
    "activations": ((384, 4, 16384), (4, 512), 1, ("dpo", "--lora-rank", "8")),
    "weights": ((768, 8, 8192), (2, 128), 2, ("sft",)),
    "vocabulary": ((512, 2, 98304), (2, 128), 1, ("sft",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_on_a_cpu_the_total_is_the_peak_of_the_process(run_python, tmp_path, name):
    """Both in GiB, within a tenth, for steps that save and arrays larger than libraries are."""
    (width, layers, vocabulary), (rows, length), steps, command = SHAPES[name]
    heads = {"heads": width // 64, "kv_heads": width // 64, "head_width": 64}
    shape = {"width": width, "layers": layers, "mlp_width": 4 * width, "vocab_size": vocabulary}
    model = tiny(tmp_path / "base", 0, max_positions=512, **shape, **heads)
    # Longer than --max-length, for which the estimate is made.
    row = {"prompt": "a film", "chosen": " of the sea" * 300, "rejected": " a film" * 300}
    write_jsonl(tmp_path / "rows.jsonl", [row] * 8)
    files = ["--model", model, "--data", str(tmp_path / "rows.jsonl")]
    files += ["--output", str(tmp_path / "run"), "--max-steps", str(steps), "--save-every", "1"]
    sizes = ["--batch-size", str(rows), "--max-length", str(length)]
    run = [command[0], *files, *sizes, *command[1:]]
    told = run_python(f"WORDS = {[*run, '--estimate']!r}\n{COMMAND}")
    total = float(re.search(r"total\W+([\d.]+)", told)[1])
    peak = float(run_python(f"WORDS = {run!r}\n{COMMAND}").split("peak")[-1])
    assert peak > 1.5, "arrays are the larger part"
    assert total == pytest.approx(peak, rel=0.1)
