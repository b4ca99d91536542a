"""Live comparison with PEFT on torch: its adapters here, and ours there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.adapters import ADAPTERS, adapt
from tests.models.checkpoints import build, logits_of
from w2s_jax.models.load import load_adapted, load_config, load_model
from w2s_jax.models.lora import LoraConfig, attach, init_adapter
from w2s_jax.models.model import Model
from w2s_jax.models.parameters import PROJECTIONS
from w2s_jax.models.peft import load_adapter, save_adapter

pytestmark = pytest.mark.parity
pytest.importorskip("peft", reason="live parity needs peft: pip install -e '.[test,parity]'")

TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module", params=ADAPTERS)
def case(request, tmp_path_factory):
    """Folders of a base and of PEFT's adapter on it, tokens, and PEFT's logits."""
    root = tmp_path_factory.mktemp(request.param)
    model = adapt(request.param, root / "base", root / "adapter")
    tokens = np.random.default_rng(1).integers(0, 50, (2, 17)).astype(np.int32)
    return root / "base", root / "adapter", tokens, logits_of(model, tokens)


def peft_logits(base, adapter, tokens):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return logits_of(PeftModel.from_pretrained(model, adapter).eval(), tokens)


# The folder's own loading, below, has it merged into per-layer arrays.
@pytest.mark.parametrize(("scan_layers", "merged"), [(False, False), (True, True)])
def test_an_adapter_of_peft_gives_its_logits(case, scan_layers, merged):
    base, adapter, tokens, expected = case
    model = load_model(base, scan_layers=scan_layers)
    assert np.abs(model(tokens) - expected).max() > 0.1
    np.testing.assert_allclose(
        load_adapted(adapter, model, merged=merged)(tokens), expected, **TOLERANCE
    )


def test_the_folder_of_an_adapter_is_a_checkpoint(case):
    base, adapter, tokens, expected = case
    ours, theirs = load_config(adapter), load_config(base)
    # An embedding of the adapter's own unties the head.
    assert dataclasses.replace(ours, tied_embeddings=theirs.tied_embeddings) == theirs
    np.testing.assert_allclose(load_model(adapter)(tokens), expected, **TOLERANCE)


def test_peft_loads_an_adapter_that_was_loaded_and_saved_here(case, tmp_path):
    base, adapter, tokens, expected = case
    config = load_config(adapter)
    lora, tree = load_adapter(adapter, config)
    if any(not path.endswith("']") or "lora_" not in path for path in paths(tree)):
        pytest.skip("holds whole parameters, which are not written")
    save_adapter(tmp_path, config, lora, tree, str(base))
    np.testing.assert_allclose(peft_logits(base, tmp_path, tokens), expected, **TOLERANCE)
    again, same = load_adapter(tmp_path, config)
    assert again == lora
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), tree, same)


def paths(tree):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.parametrize(
    ("name", "targets", "rslora"),
    [
        ("gpt2", PROJECTIONS, False),
        ("gpt2", ("query", "value"), True),
        ("llama_grouped", ("key", "out", "down"), False),
        ("qwen2", ("query", "value"), False),
        ("gemma2", PROJECTIONS, True),
        ("mixtral", PROJECTIONS, False),
        ("qwen3_moe", ("query", "gate", "up", "down"), False),
    ],
)
def test_peft_loads_an_adapter_that_was_trained_here(name, targets, rslora, tmp_path):
    theirs = build(name)
    theirs.save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    lora = LoraConfig(rank=3, alpha=4.0, rslora=rslora, targets=targets)
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32),
        init_adapter(model.config, lora, jax.random.key(0)),
    )
    save_adapter(tmp_path / "adapter", model.config, lora, adapter, str(tmp_path / "base"))
    tokens = rng.integers(0, 50, (2, 17)).astype(np.int32)
    expected = peft_logits(tmp_path / "base", tmp_path / "adapter", tokens)
    ours = Model(model.config, attach(model.params, adapter, lora))(tokens)
    np.testing.assert_allclose(ours, expected, **TOLERANCE)
    again, same = load_adapter(tmp_path / "adapter", model.config)
    assert (again.rank, again.alpha, again.rslora) == (3, 4.0, rslora)
    jax.tree.map(np.testing.assert_array_equal, adapter, same)


@pytest.mark.parametrize(("headless", "rows"), [(False, 53), (True, 53), (True, 59)])
def test_a_reward_model_that_is_an_adapter(headless, rows, tmp_path):
    import torch
    from peft import LoraConfig as Theirs
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification

    from w2s_jax.models.load import load_reward_config, load_reward_labels, load_reward_model

    build("qwen2").save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    if not headless:
        model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(rows)
    model = get_peft_model(model, Theirs(task_type="SEQ_CLS", r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.eval().save_pretrained(tmp_path / "adapter")
    tokens = np.random.default_rng(1).integers(3, rows, (1, 9)).astype(np.int32)
    expected = logits_of(model, tokens)
    ours = load_reward_model(tmp_path / "adapter")
    np.testing.assert_allclose(ours(tokens), expected, **TOLERANCE)
    assert load_reward_labels(tmp_path / "adapter") == ours.labels
    assert ours.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert ours.config.vocab_size == load_reward_config(tmp_path / "adapter").vocab_size == rows
