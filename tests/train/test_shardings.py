"""Training on eight virtual devices: where every leaf lies, and that nothing else changes."""

import json

import numpy as np
import pytest

from tests.train.test_killed import RUN, rows

STEPS = """
import jax, jax.numpy as jnp, numpy as np
from tests.tiny import tiny_config, tiny_model
from w2s_jax.models.lora import LoraConfig, init_adapter, shard_adapter
from w2s_jax.models.model import shard_model
from w2s_jax.ops.sharding import make_mesh
from w2s_jax.ops.sharding import Placement
from w2s_jax.train.config import OptimizerConfig, PreferenceConfig
from w2s_jax.train.objectives import BASE, Policy, pair_loss, sft_loss
from w2s_jax.train.step import make_optimizer
from w2s_jax.train.step import place, place_state
from w2s_jax.train.step import Evaluation, init_state, make_train_step

def batch(pairs):
    rng = np.random.default_rng(0)
    shape = (8, 2, 24) if pairs else (8, 24)
    lengths = rng.integers(8, 25, shape[:-1])[..., None]
    found = {
        "tokens": rng.integers(0, 64, shape).astype(np.int32),
        "segments": (np.arange(24) < lengths).astype(np.int32),
        "targets": (np.arange(24) >= 4) & (np.arange(24) < lengths),
    }
    return found | {"reference": rng.normal(-40, 1, (8, 2)).astype(np.float32)} if pairs else found

def run(spec, tied, adapted, pairs, accumulate):
    mesh = None if spec is None else make_mesh(spec)
    model = tiny_model(0, scan_layers=True, heads=4, kv_heads=2, width=32, vocab_size=64,
                       tied_embeddings=tied)
    model = jax.tree.map(np.asarray, model)  # to be cut into parts without a program
    model = jax.device_put(model) if mesh is None else shard_model(model, mesh)
    lora = LoraConfig(rank=4) if adapted else None
    place_of = Placement() if mesh is None else Placement(mesh)
    policy = Policy(model.config, lora, "none" if adapted else "full", place_of)
    params, frozen = model.params, {}
    if adapted:
        params = init_adapter(model.config, lora, jax.random.key(1), scan_layers=True)
        params = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.01), params)
        params = (jax.device_put(params) if mesh is None
                  else shard_adapter(model.config, params, mesh))
        frozen = {BASE: model}
    loss = pair_loss(policy, PreferenceConfig()) if pairs else sft_loss(policy)
    settings = {"optimizer": "sgd", "learning_rate": 0.5, "schedule": "constant"}
    optimizer = make_optimizer(OptimizerConfig(**settings), 10)
    state = place_state(init_state(params, optimizer, jax.random.key(0), copy=False), mesh)
    like = None if mesh is None else state
    step = make_train_step(loss, optimizer, accumulate=accumulate, mesh=mesh, like=like)
    before = jax.tree.map(lambda x: x.sharding, state)
    losses = []
    for _ in range(2):
        state, metrics = step(state, frozen, place(batch(pairs), mesh))
        losses.append(float(metrics["loss"]))
    flat = jax.tree_util.tree_leaves_with_path(state)
    for (path, leaf), was in zip(flat, jax.tree.leaves(before), strict=True):
        same = leaf.sharding.is_equivalent_to(was, leaf.ndim)
        assert same, f"{spec} {jax.tree_util.keystr(path)}: {was} became {leaf.sharding}"
    if adapted:
        # Eight rows by the mesh and two that its four parts do not divide.
        evaluate = Evaluation(loss, Rows(pairs), frozen, 10 if mesh is None else 8, mesh=mesh)
        losses.append(evaluate(state)["loss"])
    return losses, jax.device_get(state.params)

class Rows:
    def __init__(self, pairs):
        one, other = batch(pairs), batch(pairs)
        self.rows = {name: np.concatenate([one[name], other[name][::-1]]) for name in one}

    def at(self, indices, part=slice(None)):
        return {name: array[indices][part] for name, array in self.rows.items()}

    def __len__(self):
        return 10

    def names(self, index):
        return [f"row {index}"]

CASES = [
    ("all of tied parameters, DPO, in micro-batches", (True, False, True, 2), "fsdp=4,tensor=2"),
    ("adapters, SFT", (False, True, False, 1), "data=2,fsdp=2,tensor=2"),
]
for name, case, spec in CASES:
    losses, params = run(None, *case)
    assert losses[1] < losses[0], name
    found, own = run(spec, *case)
    np.testing.assert_allclose(found, losses, rtol=1e-5, err_msg=f"{name}, {spec}")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, err_msg=f"{name}, {spec}"),
        own,
        params,
    )
"""


MESHES = """
from jax.sharding import Mesh, NamedSharding, PartitionSpec

class Stop(Exception):
    pass

def part(folder, devices, until):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))

    def shard(x):
        wide = x.ndim == 2 and x.shape[-1] % 8 == 0
        spec = PartitionSpec(None, "data") if wide else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    def batches(i):
        if i == until:
            raise Stop
        return jax.device_put(batch_at(i), NamedSharding(mesh, PartitionSpec("data")))

    try:
        state = run(folder, batches, steps=15, shard=lambda state: jax.tree.map(shard, state),
                    log_every=1, save_every=5)
        assert len(state.params["in"]["kernel"].sharding.device_set) == devices
    except Stop:
        pass

for arguments in PARTS:
    part(*arguments)
"""
FOLDERS = {"one": [(1, -1)], "moved": [(1, 6), (8, 11), (2, -1)]}

ALL = """
import json, traceback
told = {}
for name, code in CODES.items():
    try:
        exec(code, {"__name__": name})
        told[name] = ""
    except Exception:
        told[name] = traceback.format_exc()
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def eight(run_python, tmp_path_factory):
    """What went wrong in each check, all in one process of eight devices; and a folder of runs."""
    root = tmp_path_factory.mktemp("runs")
    parts = [(str(root / folder), *part) for folder, own in FOLDERS.items() for part in own]
    codes = {"steps": STEPS, "meshes": f"{RUN}\nPARTS = {parts!r}\n{MESHES}"}
    told = run_python(f"CODES = {codes!r}\n{ALL}", devices=8)
    return json.loads(told.splitlines()[-1]), root


def test_every_leaf_stays_where_it_lies_and_the_step_is_that_of_one_device(eight):
    assert eight[0]["steps"] == ""


def test_resumed_on_other_meshes_the_losses_are_those_of_one_device(eight):
    assert eight[0]["meshes"] == ""
    one, moved = (rows(eight[1] / folder) for folder in FOLDERS)
    assert [row["step"] for row in moved] == [row["step"] for row in one]
    assert len([row for row in moved if "loss" in row]) == 15
    losses = [[row["loss"] for row in run if "loss" in row] for run in (one, moved)]
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-5, rtol=0)
