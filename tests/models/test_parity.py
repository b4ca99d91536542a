"""Live comparison with transformers on torch: tiny random checkpoints of every architecture."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.checkpoints import CASES, build, logits_of, rewrite_as_of_2024
from w2s_jax.models.load import load_model, load_reward_model
from w2s_jax.models.save import save_model

pytestmark = pytest.mark.parity
pytest.importorskip("torch", reason="live parity needs torch: pip install -e '.[test,parity]'")

TOLERANCE = {"atol": 1e-4, "rtol": 0}
WIDEST_WINDOW = 6


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A case's directory, tokens longer than any sliding window, and transformers' logits."""
    model = build(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 17)).astype(np.int32)
    assert tokens.shape[1] > WIDEST_WINDOW
    return directory, tokens, logits_of(model, tokens)


def transformers_logits(directory, tokens):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return logits_of(model.eval(), tokens)


@pytest.mark.parametrize("layout", [{}, {"scan_layers": True}, {"decoding": True}], ids=str)
def test_logits(case, layout):
    directory, tokens, expected = case
    logits = load_model(directory, **layout)(jnp.asarray(tokens))
    np.testing.assert_allclose(logits, expected, **TOLERANCE)


def test_transformers_loads_what_is_saved_and_the_older_config_json_says_the_same(case, tmp_path):
    directory, tokens, expected = case
    model = load_model(directory, scan_layers=True)
    save_model(model, tmp_path)
    np.testing.assert_allclose(transformers_logits(tmp_path, tokens), expected, **TOLERANCE)
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    rewrite_as_of_2024(tmp_path)
    assert load_model(tmp_path).config == model.config
    np.testing.assert_allclose(transformers_logits(tmp_path, tokens), expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["gpt2", "llama_grouped", "gemma2"])
def test_padding_changes_nothing(name, tmp_path):
    theirs = build(name)
    theirs.save_pretrained(tmp_path)
    tokens = np.random.default_rng(2).integers(0, theirs.config.vocab_size, (2, 17))
    expected = logits_of(theirs, tokens)
    mask = np.arange(17) < np.array([[11], [17]])
    padded = jnp.asarray(np.where(mask, tokens, 0), jnp.int32)
    logits = load_model(tmp_path)(padded, jnp.asarray(mask))
    np.testing.assert_allclose(logits[0, :11], expected[0, :11], **TOLERANCE)
    np.testing.assert_allclose(logits[1], expected[1], **TOLERANCE)


def test_sharded_files_of_either_side(tmp_path):
    model = build("llama_3_1")
    tokens = np.arange(10, dtype=np.int32)[None]
    expected = logits_of(model, tokens)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ours = load_model(tmp_path / "theirs")
    np.testing.assert_allclose(ours(jnp.asarray(tokens)), expected, **TOLERANCE)
    save_model(ours, tmp_path / "ours", max_shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    np.testing.assert_allclose(
        transformers_logits(tmp_path / "ours", tokens), expected, **TOLERANCE
    )


def test_bfloat16_weights_arrive_bit_for_bit(tmp_path):
    import torch

    model = build("qwen3").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path, dtype="stored")
    assert ours.dtype == jnp.bfloat16
    theirs = model.model.embed_tokens.weight.detach().view(torch.int16).numpy()
    np.testing.assert_array_equal(
        np.asarray(ours.params["embed"]["embedding"]).view(np.int16), theirs
    )
    save_model(ours, tmp_path / "saved")
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("labels", [None, 3])
def test_the_text_part_of_gemma3(labels, tmp_path):
    import torch
    from transformers import (
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
        Gemma3Config,
    )

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    hf = Gemma3Config(
        text_config=CASES["gemma3_text"][1] | {"pad_token_id": 0},
        vision_config=sizes | {"num_hidden_layers": 1, "image_size": 8, "patch_size": 4},
        mm_tokens_per_image=1,
        num_labels=labels or 2,
    )
    kind = AutoModelForSequenceClassification if labels else AutoModelForImageTextToText
    torch.manual_seed(0)
    theirs = kind.from_config(hf, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    theirs.save_pretrained(tmp_path)
    tokens = np.random.default_rng(1).integers(1, 53, (2, 17)).astype(np.int32)
    expected = logits_of(theirs, tokens)
    ours = (load_reward_model if labels else load_model)(tmp_path)
    found = ours(tokens, np.ones(tokens.shape, bool)) if labels else ours(tokens)
    np.testing.assert_allclose(found, expected, **TOLERANCE)
    if not labels:
        save_model(ours, tmp_path / "text")
        np.testing.assert_allclose(
            transformers_logits(tmp_path / "text", tokens), expected, **TOLERANCE
        )
