"""GGUF files as llama.cpp's converter writes them, made here by its rules, and read."""

import sys

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from w2s_jax.errors import InputError
from w2s_jax.models.config_json import config_from_hf
from w2s_jax.models.gguf import convert_gguf
from w2s_jax.models.load import load_config, load_model
from w2s_jax.models.model import init_model
from w2s_jax.models.save import save_model
from w2s_jax.train.config import ConvertConfig
from w2s_jax.train.export import convert

TOKENS = [*bytes_to_unicode().values(), "Ġt", "he", "Ġthe", "<|end|>"]
MERGES = ["Ġ t", "h e", "Ġt he"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA2 = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TYPES = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES = {
    "llama": {"tie_word_embeddings": True},
    "llama 3.1": {
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3,
        "max_position_embeddings": 131072,
    },
    "qwen2": {"tie_word_embeddings": False},
    "gemma2": {"sliding_window": 8, "head_dim": 16, "query_pre_attn_scalar": 16},
}


def small(architecture, **changes):
    return config_from_hf(
        {
            "model_type": architecture,
            "vocab_size": len(TOKENS),
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "eos_token_id": 259,
            "bos_token_id": None,
            "pad_token_id": None,
        }
        | changes
    )


def stored_name(name, architecture):
    module, _, leaf = name.rpartition(".")
    names = NAMES | (GEMMA2 if architecture == "gemma2" else {})
    if module.startswith("model.layers."):
        _, _, layer, inner = module.split(".", 3)
        return f"blk.{layer}.{names[inner]}.{leaf}"
    return f"{names[module]}.{leaf}"


def permuted(values, heads):
    """What llama.cpp's converter makes of Llama's queries and keys."""
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def write(path, folder, *, types=TYPES, change=lambda tensors: None, fields=()):
    """The checkpoint in a folder as a GGUF file; returns what its tensors stand for, by name."""
    config = load_config(folder)
    architecture = config.architecture
    out = gguf.GGUFWriter(path, architecture)
    out.add_block_count(config.layers)
    out.add_context_length(config.max_positions)
    out.add_embedding_length(config.width)
    out.add_feed_forward_length(config.mlp_width)
    out.add_head_count(config.heads)
    out.add_head_count_kv(config.kv_heads)
    out.add_key_length(config.head_width)
    out.add_layer_norm_rms_eps(config.norm_epsilon)
    out.add_rope_freq_base(config.rope.theta)
    if architecture == "gemma2":
        out.add_attn_logit_softcapping(50.0)
        out.add_final_logit_softcapping(30.0)
        out.add_sliding_window(8)
    out.add_tokenizer_model("gpt2")
    out.add_token_list(TOKENS)
    out.add_token_types([1] * 259 + [3])
    out.add_token_merges(MERGES)
    out.add_eos_token_id(259)
    out.add_chat_template("{{ messages[0].content }}<|end|>")
    for add, *given in fields:
        if given == [None]:
            del out.kv_data[0][f"{architecture}.{add}"]
        else:
            getattr(out, add)(*given)
    stands, tensors = {}, {}
    for number, (name, values) in enumerate(
        sorted(load_file(folder / "model.safetensors").items())
    ):
        kind = types[number % len(types)] if values.ndim == 2 else Kind.F32
        held, stored = values, stored_name(name, architecture)
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            held = permuted(values, config.heads if "q_proj" in name else config.kv_heads)
        if architecture == "gemma2" and "norm" in name:
            held = values + 1
        tensors[stored] = gguf.quantize(held, kind), kind
        stands[name] = gguf.dequantize(gguf.quantize(values, kind), kind).reshape(values.shape)
    if config.rope.kind == "llama3":
        tensors["rope_freqs.weight"] = factors(config.head_width), Kind.F32
    change(tensors)
    for name, (values, kind) in tensors.items():
        out.add_tensor(name, values, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return stands


def factors(width):
    """Llama 3.1's divisors of its frequencies, as its release computes them."""
    found = []
    for pair in range(width // 2):
        wave = 2 * np.pi * 500000.0 ** (2 * pair / width)
        smooth = (8192 / wave - 1.0) / (4.0 - 1.0)
        found.append(
            1 / ((1 - smooth) / 8.0 + smooth) if 0 < smooth < 1 else 1.0 if smooth >= 1 else 8.0
        )
    return np.array(found, np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    def made(case="llama"):
        where = tmp_path_factory.getbasetemp() / f"gguf_{case.replace(' ', '_')}"
        if not where.exists():
            config = small(case.split()[0], **CASES[case])
            save_model(init_model(config, jax.random.key(1)), where)
        return where

    return made


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_the_tensors_stand_for(case, folder, tmp_path):
    stands = write(tmp_path / "model.gguf", folder(case))
    convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == stands.keys()
    for name, values in stands.items():
        # A norm was stored with one added, in float32.
        tolerance = 1e-7 if case == "gemma2" and "norm" in name else 0
        np.testing.assert_allclose(found[name], values, rtol=0, atol=tolerance, err_msg=name)
    assert load_config(tmp_path / "out") == load_config(folder(case))
    assert load_model(tmp_path / "out").dtype == np.float32


def test_plain_files_keep_their_dtype(folder, tmp_path):
    write(tmp_path / "model.gguf", folder(), types=(Kind.F16,))
    for dtype, wanted in (("auto", "float16"), ("bfloat16", "bfloat16")):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out", dtype=dtype)
        tensors = load_file(tmp_path / "out/model.safetensors").values()
        assert {str(values.dtype) for values in tensors} == {wanted}


def test_the_tokenizer_and_its_template_come_along(folder, tmp_path):
    write(tmp_path / "model.gguf", folder())
    told = []
    convert(ConvertConfig(str(tmp_path / "model.gguf"), str(tmp_path / "out")), tell=told.append)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "x the then <|end|>"
    assert tokenizer(text).input_ids == [
        TOKENS.index(t) for t in ("x", "Ġthe", "Ġthe", "n", "Ġ", "<|end|>")
    ]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == 259
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "hi<|end|>"
    assert "BF16, F16, F32, Q4_0" in told[0]
    assert told[1].endswith("written in float32")


def test_digits_of_smollm_are_words(folder, tmp_path):
    write(tmp_path / "model.gguf", folder(), fields=[("add_tokenizer_pre", "smollm")])
    convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    made = AutoTokenizer.from_pretrained(tmp_path / "out").backend_tokenizer.pre_tokenizer
    assert [word for word, _ in made.pre_tokenize_str("a 12²")] == ["a", "Ġ", "1", "2", "Â²"]


def removed(tensors):
    del tensors["blk.1.ffn_up.weight"]


def added(tensors):
    tensors["blk.0.strange.weight"] = np.zeros(4, np.float32), Kind.F32


def misshapen(tensors):
    tensors["blk.1.ffn_up.weight"] = np.zeros((64, 64), np.float32), Kind.F32


def of_two_bits(tensors):
    tensors["blk.1.ffn_up.weight"] = np.zeros((96, 84), np.uint8), Kind.Q2_K


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (removed, "tensor blk.1.ffn_up.weight is missing"),
        (added, "tensor blk.0.strange.weight is not one of llama"),
        (misshapen, r"tensor blk.1.ffn_up.weight is \(64, 64\), not \(96, 64\)"),
        (
            of_two_bits,
            "blk.1.ffn_up.weight is of type Q2_K, which is not supported; supported: F32",
        ),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(change, message, folder, tmp_path):
    write(tmp_path / "model.gguf", folder(), change=change)
    with pytest.raises(InputError, match=message):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([("add_expert_count", 8)], "mixtures of experts are not read"),
        ([("add_rope_dimension_count", 8)], "8 of 16 entries of a head rotate"),
        ([("block_count", None)], "its metadata has no num_hidden_layers"),
        ([("add_rope_scaling_type", gguf.RopeScalingType.LONGROPE)], "rope"),
    ],
)
def test_models_that_are_not_read_are_refused(fields, message, folder, tmp_path):
    write(tmp_path / "model.gguf", folder(), fields=fields)
    with pytest.raises(InputError, match=message):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")


def test_files_that_are_none_are_refused(folder, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    write(path, folder())
    whole = path.read_bytes()
    for size in (3, 100, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="is no GGUF file, or is cut off"):
            convert_gguf(path, tmp_path / "out")
    with pytest.raises(InputError, match="no such file"):
        convert_gguf(tmp_path / "other.gguf", tmp_path / "out")
    with pytest.raises(InputError, match="--merge-lora goes with a checkpoint"):
        convert(ConvertConfig(str(path), str(tmp_path / "out"), merge_lora="adapter"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'w2s-jax\[gguf\]'"):
        convert_gguf(path, tmp_path / "out")
