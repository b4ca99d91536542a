"""`w2s convert`: a merged adapter, another dtype, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cli.test_search import tiny
from tests.search.test_adapters import TOKENS, adapter
from w2s_jax.cli.convert import Convert
from w2s_jax.errors import InputError
from w2s_jax.models.load import load_adapted, load_model
from w2s_jax.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = tiny(root / "base", 0)
    return {"base": base, "adapter": adapter(root / "adapter", base)}


def test_a_merged_adapter_is_a_checkpoint_of_its_own(folders, tmp_path, capsys):
    target = tmp_path / "merged"
    Convert(folders["base"], str(target), merge_lora=folders["adapter"]).run()
    assert capsys.readouterr().out == f"{target}: written\n"
    model = load_model(target)
    base = load_model(folders["base"])
    beside = load_adapted(folders["adapter"], base, merged=False)
    np.testing.assert_allclose(model(TOKENS), beside(TOKENS), atol=1e-4)
    assert np.abs(model(TOKENS) - base(TOKENS)).max() > 0.05
    assert not (target / "adapter_config.json").exists()
    assert load_tokenizer(target).encode("a film") == load_tokenizer(folders["base"]).encode(
        "a film"
    )


def test_the_folder_of_an_adapter_brings_its_base(folders, tmp_path):
    Convert(folders["adapter"], str(tmp_path / "one")).run()
    Convert(folders["base"], str(tmp_path / "two"), merge_lora=folders["adapter"]).run()
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        one, two = ((tmp_path / name / file).read_bytes() for name in ("one", "two"))
        assert one == two


def test_another_dtype(folders, tmp_path):
    Convert(folders["base"], str(tmp_path / "half"), dtype="bfloat16").run()
    half, whole = load_model(tmp_path / "half", dtype="stored"), load_model(folders["base"])
    assert load_model(tmp_path / "half").dtype == jnp.float32, "which a CPU computes faster in"
    assert half.dtype == jnp.bfloat16
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)),
        half.params,
        whole.params,
    )


@pytest.mark.parity
def test_peft_merges_alike(folders, tmp_path):
    pytest.importorskip("peft", reason="needs peft")
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    Convert(folders["base"], str(tmp_path / "merged"), merge_lora=folders["adapter"]).run()
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    merged = PeftModel.from_pretrained(base, folders["adapter"]).merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        np.testing.assert_allclose(ours(tokens).logits, merged(tokens).logits, atol=1e-4)


def test_a_reward_model_stays_one(folders, tmp_path):
    from w2s_jax.models.load import load_reward_model
    from w2s_jax.models.reward import RewardModel
    from w2s_jax.models.save import save_reward_model

    base = load_model(folders["base"])
    body = {name: subtree for name, subtree in base.params.items() if name != "head"}
    head = {"kernel": np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)}
    save_reward_model(RewardModel(base.config, body, head, ("bad", "good")), tmp_path / "judge")
    own = adapter(tmp_path / "adapter", tmp_path / "judge")
    Convert(str(tmp_path / "judge"), str(tmp_path / "out"), merge_lora=own).run()
    found, expected = load_reward_model(tmp_path / "out"), load_reward_model(own)
    assert found.labels == ("bad", "good")
    np.testing.assert_allclose(found(TOKENS), expected(TOKENS), atol=1e-6)


@pytest.mark.parametrize(("flags", "message"), [
    (("{base}", "{base}"), "base is what is read from; name another folder"),
    (("{adapter}", "{base}"), "base is what is read from; name another folder"),
    (("{base}", "{adapter}", "{adapter}"), "adapter is what is read from"),
    (("{adapter}", "{tmp}/out", "{adapter}"), "adapter is an adapter itself; name its base"),
    (("{base}", "{tmp}/out", "{base}"), "base: it holds no adapter_config.json"),
    (("{tmp}/none", "{tmp}/out"), "none: no such directory"),
    (("{base}", "{tmp}/file/out"), "cannot be written"),
    (("{other}", "{tmp}/out", "{adapter}"), "adapter: the adapter is for another base: tensor"),
])  # fmt: skip
def test_what_is_wrong_is_told_in_one_line(folders, flags, message, tmp_path):
    (tmp_path / "file").write_text("in the way")
    places = folders | {"tmp": tmp_path}
    if "{other}" in flags:
        places["other"] = tiny(tmp_path / "other", 1, width=24)
    source, target, *merge_lora = (flag.format(**places) for flag in flags)
    with pytest.raises(InputError, match=message) as error:
        Convert(source, target, *merge_lora).run()
    assert "\n" not in str(error.value)


def test_an_adapter_in_the_target_is_replaced(folders, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(folders["adapter"], target)
    Convert(folders["base"], str(target)).run()
    assert not list(target.glob("adapter*"))
    np.testing.assert_array_equal(load_model(target)(TOKENS), load_model(folders["base"])(TOKENS))


def test_a_base_that_is_gone_is_told_with_its_adapter(folders, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(folders["adapter"], moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/gone/base"
    (moved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"{moved}: its base: /gone/base: no such directory"):
        Convert(str(moved), str(tmp_path / "out")).run()
